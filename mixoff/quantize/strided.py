"""Quantized matrices whose groups run across outputs, as hqq's `axis=0` lays them out.

Letters: **N** outputs (rows), **K** inputs (columns), **G** group size, **R** = N/G rows from one member of a group to
the next, **M** = R*K groups, **C** columns of the scales' metadata.
A group is G weights of one input, R outputs apart: `w = (q - zero) * scale`. Scales and zeros are 8-bit codes: there
are C grids for scales, chosen by the group's number modulo C, and one grid for all zeros. Bytes are those of the
published files, unchanged. A weight may consist of several such matrices one above the other (an expert's gate and up).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from mixoff.errors import CheckpointError, MixoffError
from mixoff.units import format_nbytes

KIND = "axis0"  # first item of `Part.form` for such a weight; QTensor's form begins with its bits
BITS = (2, 4, 8)
BLOCK = 128  # outputs that are dequantized at a time
U8_PARTS = ("W_q", "meta.scale_q", "meta.zero_q")
FP16_PARTS = ("meta.meta_scale.scale", "meta.meta_scale.zero", "meta.meta_zero.scale", "meta.meta_zero.zero")


@dataclass(frozen=True)
class Form:
    """How a weight is stored.

    - bits: bits per code.
    - group_size: G.
    - scale_group: groups per grid of scales.
    - matrices: matrices one above the other.
    """

    bits: int
    group_size: int
    scale_group: int
    matrices: int = 1

    def to_tuple(self) -> tuple:
        """As `Part.form` holds it.

        >>> Form(2, 16, 128, matrices=2).to_tuple()
        ('axis0', 2, 16, 128, 2)
        """
        return (KIND, self.bits, self.group_size, self.scale_group, self.matrices)

    def check(self, shape: tuple[int, ...]) -> None:
        """Raise MixoffError unless a weight of this shape can be stored in this form."""
        numbers = (self.bits, self.group_size, self.scale_group, self.matrices, *shape)
        if len(shape) != 2 or any(type(n) is not int or n < 1 for n in numbers) or self.bits not in BITS:
            raise MixoffError(f"a weight of shape {tuple(shape)} is not stored as {self}: use the original checkpoint")
        rows, G = shape[0] // self.matrices, self.group_size
        fits = shape[0] % self.matrices == 0 and rows % G == 0 and G & (G - 1) == 0 and G * self.bits % 8 == 0
        groups = rows // G * shape[1]
        if not fits or groups % 2 or groups % self.scale_group:
            raise MixoffError(f"groups of {G} do not divide a weight of shape {tuple(shape)}: use another checkpoint")


def layout(shape: tuple[int, ...], form: Form) -> tuple[dict[str, tuple[tuple[int, ...], torch.dtype, int]], int]:
    """Shape, dtype and offset of each part of one of the weight's matrices, by hqq's name; and the matrix's bytes.

    >>> parts, nbytes = layout((14336, 4096), Form(2, 16, 128))
    >>> parts["W_q"][0], parts["meta.scale_q"][0], nbytes
    ((4, 3670016), (128, 28672), 22134788)
    """
    form.check(shape)
    groups = shape[0] // form.matrices // form.group_size * shape[1]  # M
    columns = groups // form.scale_group  # C
    sizes = {
        "W_q": (form.group_size * form.bits // 8, groups),
        "meta.scale_q": (form.scale_group, columns),
        "meta.zero_q": (1, groups),
    }
    parts, end = {}, 0
    for name, size in (sizes | dict(zip(FP16_PARTS, ((1, columns), (1, columns), (), ()), strict=True))).items():
        dtype = torch.float16 if name in FP16_PARTS else torch.uint8
        parts[name] = (size, dtype, end)
        end += math.prod(size) * dtype.itemsize
    return parts, end


def packed_nbytes(shape: tuple[int, ...], form: Form) -> int:
    """Bytes of a weight (N, K), including metadata."""
    return form.matrices * layout(shape, form)[1]


@dataclass(frozen=True, repr=False, eq=False)
class StridedTensor:
    """A quantized (N, K) weight: for each of its matrices, the parts that `layout` describes.

    Tested bit for bit against `hqq.core.quantize.Quantizer.dequantize`.
    """

    shape: tuple[int, ...]
    form: Form
    matrices: tuple[dict[str, Tensor], ...]

    @property
    def nbytes(self) -> int:
        """Bytes of all parts."""
        return sum(part.nbytes for parts in self.matrices for part in parts.values())

    @property
    def bits_per_weight(self) -> float:
        """Bits per weight, including metadata."""
        return 8 * self.nbytes / math.prod(self.shape)

    @property
    def device(self) -> torch.device:
        return self.matrices[0]["W_q"].device

    @property
    def step(self) -> int:
        """R: rows from one member of a group to the next."""
        return self.shape[0] // self.form.matrices // self.form.group_size

    def __repr__(self) -> str:
        rows, columns = self.shape
        size = f"{self.bits_per_weight:.3f} bits/weight, {format_nbytes(self.nbytes)}"
        return f"StridedTensor({rows}x{columns}, {self.form.bits}-bit g{self.form.group_size} across outputs, {size})"

    # Values

    def dequantize(self, dtype: torch.dtype = torch.float32, out: Tensor | None = None) -> Tensor:
        """The weights `(q - zero) * scale` (N, K), as hqq computes them: for fp16, every step is rounded to fp16.

        For any other dtype, steps are fp32 and the result is rounded.
        """
        out = torch.empty(self.shape, dtype=dtype, device=self.device) if out is None else out
        if tuple(out.shape) != self.shape:
            raise MixoffError(f"out has shape {tuple(out.shape)}, and the matrix has {self.shape}")
        steps = torch.float16 if out.dtype == torch.float16 else torch.float32
        for start, stop in self.blocks():
            out[start:stop] = self.block_weights(start, stop, steps)
        return out

    def blocks(self) -> Iterator[tuple[int, int]]:
        """First row and end of each block of outputs, at most 128 rows: inside R neighbours, or a few times R."""
        rows = self.shape[0] // self.form.matrices
        step = self.step
        if step < BLOCK:
            step = min(rows, step * 2 ** int(math.log2(BLOCK // step)))
        for first in range(0, self.shape[0], step):
            yield from ((start, min(start + BLOCK, first + step)) for start in range(first, first + step, BLOCK))

    def block_weights(self, start: int, stop: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weights of one of `blocks()`, computed in `dtype` (rows, K)."""
        matrix, first = divmod(start, self.shape[0] // self.form.matrices)
        parts, rows = self.matrices[matrix], min(stop - start, self.step)
        member, row = divmod(first, self.step)
        groups = slice(row * self.shape[1], (row + rows) * self.shape[1])
        members = (stop - start) // rows
        out = torch.empty(members, rows * self.shape[1], dtype=dtype, device=self.device)
        for i in range(members):
            out[i] = self._codes(parts, member + i, groups)
        out.sub_(_zeros(parts, groups, dtype))
        return out.mul_(_scales(parts, groups, dtype)).view(stop - start, self.shape[1])

    def _codes(self, parts: dict[str, Tensor], member: int, groups: slice) -> Tensor:
        """Codes of the given member of some groups, uint8: the rows of W_q hold the first fields, then the second."""
        field, row = divmod(member, len(parts["W_q"]))
        shift = 8 - self.form.bits * (field + 1)
        return (parts["W_q"][row, groups] >> shift) & (2**self.form.bits - 1)

    # To and from memory and files

    @classmethod
    def from_buffer(cls, buffer: Tensor, offset: int, shape: tuple[int, ...], form: Form) -> StridedTensor:
        """Views, not copies, of the `packed_nbytes` bytes of a uint8 buffer (nbytes,) that begin at `offset`."""
        parts, nbytes = layout(shape, form)
        if offset < 0 or offset + form.matrices * nbytes > len(buffer):
            raise MixoffError(f"bytes from {offset} on do not hold a weight of shape {shape} in {len(buffer)} bytes")
        matrices = []
        for begin in range(offset, offset + form.matrices * nbytes, nbytes):
            views = {}
            for name, (size, dtype, at) in parts.items():
                end = begin + at + math.prod(size) * dtype.itemsize
                views[name] = buffer[begin + at : end].view(dtype).view(size)
            matrices.append(views)
        return cls(tuple(shape), form, tuple(matrices))

    def to(self, device: torch.device | str) -> StridedTensor:
        """The same weight on another device."""
        matrices = tuple({name: part.to(device) for name, part in parts.items()} for parts in self.matrices)
        return StridedTensor(self.shape, self.form, matrices)

    @classmethod
    def from_parts(cls, shape: tuple[int, ...], form: Form, tensors: dict[str, Tensor]) -> StridedTensor:
        """A weight that is one matrix, from tensors of any origin. Raises CheckpointError for what they cannot be."""
        wanted = {name: (size, dtype) for name, (size, dtype, _) in layout(shape, form)[0].items()}
        given = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}
        if given != wanted:
            raise CheckpointError(f"the parts of a quantized {shape} matrix are {given}, and should be {wanted}")
        q = cls(tuple(shape), form, ({name: tensors[name].contiguous() for name in wanted},))
        q.check_values()
        return q

    def check_values(self) -> None:
        """Raise CheckpointError if the metadata holds NaN or infinity, as damaged files do."""
        for parts in self.matrices:
            for name in FP16_PARTS:
                if not parts[name].isfinite().all():
                    raise CheckpointError(f"{name} of a {self.shape} matrix is damaged: fetch the file again")


def _zeros(parts: dict[str, Tensor], groups: slice, dtype: torch.dtype) -> Tensor:
    zeros = parts["meta.zero_q"][0, groups].to(dtype)
    return zeros.sub_(parts["meta.meta_zero.zero"]).mul_(parts["meta.meta_zero.scale"])


def _scales(parts: dict[str, Tensor], groups: slice, dtype: torch.dtype) -> Tensor:
    """Scales of some groups: whole rows of (scale_group, C), of which the ends are cut."""
    columns = parts["meta.scale_q"].shape[1]
    first, last = groups.start // columns, -(-groups.stop // columns)
    scales = parts["meta.scale_q"][first:last].to(dtype)
    scales.sub_(parts["meta.meta_scale.zero"]).mul_(parts["meta.meta_scale.scale"])
    return scales.flatten()[groups.start - first * columns : groups.stop - first * columns]
