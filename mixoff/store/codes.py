"""Codes of a checkpoint that a store takes over as they are, instead of rounding their weights a second time.

A checkpoint of whole numbers with a scale and a zero per group of inputs has the form of a quantized matrix with 16-bit
metadata. Scale and minimum, `-zero * scale`, become fp16: exact for a zero in the middle, else the minimum is rounded
to 11 bits. Letters: **N** outputs, **K** inputs, **G** group size.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from mixoff.checkpoints.checkpoint import Checkpoint, Extent, Read
from mixoff.checkpoints.gguf.extent import GgufExtent
from mixoff.checkpoints.gguf.integers import blocks_of
from mixoff.checkpoints.gguf.names import Rows
from mixoff.checkpoints.packed.integers import Integers
from mixoff.checkpoints.packed.matrix import MatrixExtent
from mixoff.checkpoints.survey import Survey
from mixoff.errors import CheckpointError
from mixoff.quantize.layout import GROUP_SIZES
from mixoff.quantize.scheme import KEEP, LAST, ROLES, Precision, Scheme
from mixoff.quantize.solve import store_codes, store_metadata
from mixoff.quantize.tensor import QTensor
from mixoff.shapes import config
from mixoff.shapes.sites import Part

METADATA_BITS = 16
Rounded = tuple[Integers, Rows]  # a matrix, and the rows of the weight that it fills


def scheme_of(checkpoint: Checkpoint, survey: Survey) -> Scheme:
    """The scheme in which a store keeps the codes of `checkpoint`; what has no equal form stays in 16 bits.

    Experts are kept if all of them can be, and so is each part of the backbone. Codes of fewer bits fit into more, and
    a group may be split, so one form holds several.
    """
    pairs = [tuple(_of_experts(survey, i, last) for last in (False, True)) for i in range(len(survey.sites))]
    by_layer = tuple((first, last) for first, last in pairs if first and last)
    scheme = replace(Scheme(metadata_bits=METADATA_BITS, solver=KEEP), **_of_backbone(checkpoint, survey))
    if len(by_layer) < len(pairs):
        return scheme
    first, last = by_layer[0]
    if set(by_layer) == {(first, last)}:
        return replace(scheme, experts=first, down=None if first == last else last)
    return replace(scheme, experts=first, by_layer=by_layer)


def _of_experts(survey: Survey, i: int, last: bool) -> Precision | None:
    """One form for the last matrices, or the others, of all experts of a site."""
    site = survey.sites[i]
    matrices: list[Integers | None] = []
    for part in (part for part in site.parts if len(part.shape) == 2 and (part.name == LAST) == last):
        for e in range(site.num_experts):
            kept = integers_of(part, survey.extents[i, e])
            matrices += [matrix for matrix, _ in kept] or [None]
    return form_of(matrices)


def _of_backbone(checkpoint: Checkpoint, survey: Survey) -> dict[str, Any]:
    """Forms by role."""
    matrices: dict[str, list[Integers | None]] = {}
    roles, backbone = config.backbone_roles(survey.model), checkpoint.backbone()
    for name, role in roles.items():
        if name in backbone:
            t, extent = backbone[name]
            kept = integers_of(Part(name, t.shape, "", 0, t.nbytes), [extent])
            matrices.setdefault(role, []).extend([matrix for matrix, _ in kept] or [None])
    return {role: form_of(matrices.get(role, [])) for role in ROLES if role != "experts"}


def form_of(matrices: Sequence[Integers | None]) -> Precision | None:
    """The form that holds all of the matrices; None if there is none, or if one of them is None."""
    known = [matrix for matrix in matrices if matrix is not None]
    if not matrices or len(known) < len(matrices):
        return None
    common = math.gcd(*(matrix.group_size for matrix in known))
    sizes = [size for size in GROUP_SIZES if common % size == 0]
    return Precision(max(matrix.bits for matrix in known), max(sizes)) if sizes else None


def integers_of(part: Part, extents: Iterable[Extent]) -> list[Rounded]:
    """The matrices of whole numbers that make up a part of an expert, or a weight; empty if it is not made of such."""
    inside = [x for x in extents if part.offset <= x.place < part.offset + part.nbytes]
    kept = [_matrix(x, part) for x in inside]
    return [matrix for matrix in kept if matrix] if all(kept) else []


def _matrix(x: Extent, part: Part) -> Rounded | None:
    if isinstance(x, MatrixExtent) and isinstance(x.matrix, Integers) and x.matrix.in_order:
        row = x.nbytes // x.matrix.shape[0]
        return x.matrix, Rows((x.place - part.offset) // row)
    if isinstance(x, GgufExtent) and (blocks := blocks_of(x)):
        return blocks, x.rows
    return None


@dataclass(frozen=True)
class Kept(Extent):
    """The byte image of a quantized matrix whose codes are those of a checkpoint.

    - pieces: matrices, one above the other.
    - shape, form: as in `QTensor`, outputs first.
    """

    pieces: tuple[Rounded, ...]
    shape: tuple[int, int]
    form: tuple[int, int, int]

    def ranges(self) -> list[tuple[str, int, int]]:
        return [r for matrix, _ in self.pieces for r in matrix.ranges()]

    def fill(self, image: memoryview, read: Read) -> None:
        buffer = torch.frombuffer(image[self.place : self.place + self.nbytes], dtype=torch.uint8)
        q = QTensor.from_buffer(buffer, 0, self.shape, *self.form)
        codes = torch.empty(self.shape, dtype=torch.uint8)
        scale, minimum = (torch.empty(self.shape[0], self.shape[1] // q.group_size) for _ in range(2))
        for matrix, rows in self.pieces:
            at = rows.of(0, matrix.shape[0], matrix.shape[0])
            codes[at], scale[at], minimum[at] = self._taken(matrix, q.group_size, read)
        for start, stop in q.blocks():
            store_metadata(q, start, stop, scale[start:stop], minimum[start:stop])
            store_codes(q, start, stop, slice(0, stop - start), codes[start:stop].int())
        if not (q.parts["scale"].isfinite().all() and q.parts["minimum"].isfinite().all()):
            raise CheckpointError(
                f"{self.file} has scales that are NaN, or beyond the 65504 of float16, near byte {self.offset}: use a "
                "scheme other than keep"
            )

    def _taken(self, matrix: Integers, group_size: int, read: Read) -> tuple[Tensor, Tensor, Tensor]:
        """Codes (N, K), and scales and minima (N, K/G), none of these scales below zero."""
        if matrix.order(read) is not None:
            raise CheckpointError(
                f"{self.file} orders its inputs (g_idx, act-order) without saying so in config.json: use a scheme "
                "other than keep"
            )
        codes = torch.empty(matrix.shape, dtype=torch.uint8)
        for rows, columns, some in matrix.codes(read):
            codes[rows, columns] = some
        grouped = codes.unflatten(1, (matrix.groups, -1))
        scale, minimum = matrix.levels(read)
        down = scale < 0  # GGUF has such scales: count from the other end
        top = 2**matrix.bits - (self.form[0] == matrix.bits)  # with room for one more, a zero in the middle stays there
        grouped[down] = top - grouped[down]
        minimum = torch.where(down, minimum + top * scale, minimum)
        flat = scale == 0  # all weights are the minimum, which scale 0 cannot say
        grouped[flat] = (minimum[flat] > 0).to(torch.uint8)[:, None]
        scale = torch.where(flat, minimum, scale).abs()
        minimum = torch.where(flat, minimum.clamp_max(0), minimum)
        split = matrix.group_size // group_size
        return codes, scale.repeat_interleave(split, 1), minimum.repeat_interleave(split, 1)


def kept(pieces: Sequence[Rounded], shape: tuple[int, ...], form: tuple, nbytes: int) -> Kept:
    """How to read a matrix (outputs, inputs) of whole numbers into the byte image of a quantized one."""
    first = pieces[0][0].ranges()[0]
    return Kept(first[0], first[1], 0, nbytes, tuple(pieces), (shape[0], shape[1]), (form[0], form[1], form[2]))
