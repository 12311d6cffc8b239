"""Reads the published Mixtral checkpoint with 2-bit experts as it is, and others in its layout.

`lavawolfiee/Mixtral-8x7B-Instruct-v0.1-offloading-demo` was published with Eliseev and Mazur, arXiv 2312.17238:

- One file, the trunk, holds the backbone, with attention in hqq's parts (`….q_proj.W_q`, `….q_proj.meta.scale_q`).
- One file per expert holds tensors without a prefix (`w1.W_q`): only the index tells which expert it is.

Nothing is repacked: an expert's parts are gathered into its image, and `strided` computes from them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path

import torch

from mixoff.checkpoints import encodings, model_files
from mixoff.checkpoints.checkpoint import Checkpoint, Extent, TensorRange
from mixoff.checkpoints.model_files import ModelFiles
from mixoff.errors import CheckpointError
from mixoff.quantize import strided
from mixoff.quantize.strided import FP16_PARTS, U8_PARTS, Form, StridedTensor
from mixoff.quantize.tensor import QTensor
from mixoff.shapes import config
from mixoff.shapes.sites import Part, Site, strided_sites

EXPERT = re.compile(r"^(?:.*\.)?layers\.(\d+)\..*\bexperts\.(\d+)\.")  # up to the name of the matrix
PARTS = U8_PARTS + FP16_PARTS
CODES = ".W_q"  # ending of the tensor with a quantized weight's codes
MATRICES = {"gate_up_proj": ("w1", "w3"), "down_proj": ("w2",)}  # matrices of a part, one above the other
DTYPES = {torch.uint8: "U8", torch.float16: "F16"}


def checkpoint_class(folder: Path, found: ModelFiles | None = None) -> type[Checkpoint]:
    """The class that reads the checkpoint in `folder`: this layout's if its index has such keys; `found` as there."""
    found = found or model_files.here(folder)
    published = found is not None and any(name.endswith(CODES) for name in found.weight_map)
    return PublishedCheckpoint if published else encodings.checkpoint_class(folder)


def open_checkpoint(
    folder: str | Path,
    found: ModelFiles | None = None,
    headers: Mapping[str, dict[str, TensorRange]] | None = None,
) -> Checkpoint:
    """The checkpoint in `folder`, in any layout; `found` and `headers` as in `Checkpoint`."""
    return checkpoint_class(Path(folder), found)(folder, found, headers)


class PublishedCheckpoint(Checkpoint):
    """A checkpoint in the published layout; `tensors` are named as in its index."""

    kind = "published"

    def _full_names(self, file: str, tensors: dict[str, TensorRange]) -> dict[str, TensorRange]:
        """The tensors of a file under the index's names, which add the expert as a prefix."""
        wanted = {name for name, holder in self.found.weight_map.items() if holder == file}
        prefixes = {""}
        if wanted.isdisjoint(tensors):
            prefixes = {m[0] for name in wanted if (m := EXPERT.match(name))}
        named = {f"{prefix}{name}": t for prefix in prefixes for name, t in tensors.items()}
        if len(prefixes) != 1 or named.keys() != wanted:
            raise CheckpointError(
                f"{self.folder / file} does not hold the tensors that its index lists: fetch it again"
            )
        return named

    def expert_names(self) -> set[str]:
        return {name for name in self.tensors if EXPERT.match(name)}

    @property
    def not_in_place(self) -> None:
        return None

    def expert_dtype(self) -> str:
        """The dtype before quantization."""
        return "float16"

    def stored_sites(self, sites: Iterable[Site]) -> tuple[Site, ...]:
        places = self._places()
        return tuple(strided_sites(sites, lambda site, part: self._form(places, site, part)))

    def extents(self, sites: Iterable[Site]) -> dict[tuple[int, int], list[Extent]]:
        places = self._places()
        return {
            (i, e): [x for part in site.parts for x in merge(self._gather(places, site, e, part))]
            for i, site in enumerate(sites)
            for e in range(site.num_experts)
        }

    def _places(self) -> dict[tuple[int, int, str], TensorRange]:
        """Tensors of experts by (layer, expert, name within the expert)."""
        matches = ((EXPERT.match(name), t) for name, t in self.tensors.items())
        return {(int(m[1]), int(m[2]), m.string[m.end() :]): t for m, t in matches if m}

    def _form(self, places: dict, site: Site, part: Part) -> Form:
        """How a part is stored in all experts, from the shapes of the first one."""
        names = MATRICES.get(part.name)
        if names is None:
            raise CheckpointError(f"{self.folder} quantizes {part.name}, which mixoff does not read in this layout")
        rows = part.shape[0] // len(names)
        parts = {name: places.get((site.layer, 0, f"{names[0]}.{name}")) for name in PARTS}
        return replace(form_of(self.folder, (rows, part.shape[1]), parts, site.name), matrices=len(names))

    def _gather(self, places: dict, site: Site, e: int, part: Part) -> Iterable[Extent]:
        form = Form(*(part.form or ())[1:])
        parts, nbytes = strided.layout(part.shape, form)
        for i, matrix in enumerate(MATRICES[part.name]):
            for name, (shape, dtype, at) in parts.items():
                t = self._expect(places.get((site.layer, e, f"{matrix}.{name}")), shape, site, e)
                if t.dtype != DTYPES[dtype]:
                    raise CheckpointError(f"{matrix}.{name} in {t.file} is {t.dtype}, expected {DTYPES[dtype]}")
                yield Extent(t.file, t.offset, part.offset + i * nbytes + at, t.nbytes)


def stored_sites(sites: tuple[Site, ...], entries: list[dict]) -> tuple[Site, ...]:
    """The sites in the forms that a store's manifest gives, if it was converted from this layout."""
    forms = {part["name"]: part["form"] for entry in entries for part in entry["parts"]}
    if not any(form and form[0] == strided.KIND for form in forms.values()):
        return sites
    return tuple(strided_sites(sites, lambda _, part: Form(*forms[part.name][1:])))


def merge(extents: Iterable[Extent]) -> list[Extent]:
    """Join extents that are neighbours in both file and image: an expert takes six reads, not 21."""
    merged: list[Extent] = []
    for x in extents:
        last = merged[-1] if merged else Extent("", 0, 0, 0)
        if (x.file, x.offset, x.place) == (last.file, last.offset + last.nbytes, last.place + last.nbytes):
            merged[-1] = replace(last, nbytes=last.nbytes + x.nbytes)
        else:
            merged.append(x)
    return merged


# The backbone ---------------------------------------------------------------------------------------------------------


def form_of(folder: Path, shape: tuple[int, int], parts: Mapping[str, TensorRange | None], name: str) -> Form:
    """How a matrix (N, K) is stored, according to the shapes of its parts."""
    codes, scales = parts["W_q"], parts["meta.scale_q"]
    if codes is None or scales is None or len(codes.shape) != 2 or 0 in codes.shape or len(scales.shape) != 2:
        raise CheckpointError(f"{folder} lacks weights of {name}: the download is incomplete, fetch it again")
    group_size = shape[0] * shape[1] // codes.shape[1]
    form = Form(8 * codes.shape[0] // max(1, group_size), group_size, scales.shape[0])
    try:
        form.check(shape)
    except ValueError as error:
        raise CheckpointError(f"{folder}: {name} has shape {codes.shape} in {codes.file}: {error}") from None
    return form


def matrices(folder: Path, ranges: Mapping[str, TensorRange]) -> dict[str, tuple[tuple[int, int], Form]]:
    """Shape and form of the backbone's quantized weights by name (`….q_proj.weight`), from its tensors `ranges`."""
    layers = [name.removesuffix(CODES) for name in ranges if name.endswith(CODES)]
    weights = dict(config.skeleton(config.read_config(folder)).named_parameters()) if layers else {}
    described = {}
    for layer in layers:
        if (name := f"{layer}.weight") not in weights:
            raise CheckpointError(f"{folder} quantizes {layer}, and config.json describes a model without it")
        shape = tuple(weights[name].shape)
        parts = {part: ranges.get(f"{layer}.{part}") for part in PARTS}
        described[name] = shape, form_of(folder, shape, parts, layer)
    return described


def plain_names(ranges: Iterable[str]) -> list[str]:
    """Names of the backbone's tensors that are not parts of a quantized weight."""
    layers = [name.removesuffix(CODES) for name in ranges if name.endswith(CODES)]
    parts = {f"{layer}.{part}" for layer in layers for part in PARTS}
    return [name for name in ranges if name not in parts]


def read_matrices(
    folder: Path, ranges: Mapping[str, TensorRange], read: Callable[[str], torch.Tensor]
) -> dict[str, QTensor | StridedTensor]:
    """The backbone's quantized weights by name; `read(name)` reads a tensor of the files."""
    weights: dict[str, QTensor | StridedTensor] = {}
    for name, (shape, form) in matrices(folder, ranges).items():
        layer = name.removesuffix(".weight")
        parts = {part: read(f"{layer}.{part}") for part in PARTS if f"{layer}.{part}" in ranges}
        weights[name] = StridedTensor.from_parts(shape, form, parts)
    return weights
