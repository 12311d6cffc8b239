"""What became of the weights of an encoded checkpoint in a store: by kind of tensor, with the error of one of each."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from mixoff.checkpoints.checkpoint import Checkpoint, Extent
from mixoff.checkpoints.decoded import Decoded
from mixoff.checkpoints.find import Folder
from mixoff.checkpoints.gguf.latent import Joined
from mixoff.checkpoints.shards import Ranges
from mixoff.checkpoints.survey import Survey, survey
from mixoff.quantize.tensor import QTensor
from mixoff.shapes.config import backbone_roles
from mixoff.shapes.sites import DTYPES, Part, torch_dtype
from mixoff.store.source import Source, open_backbone, open_source

OTHER = "router, norms and others"


@dataclass(frozen=True)
class Loss:
    """One kind of tensor.

    - part: part of the model.
    - kind: type in the file.
    - stored: form in the store.
    - count: number of matrices or tensors of this kind.
    - error: relative RMS error of the first of them.
    """

    part: str
    kind: str
    stored: str
    count: int
    error: float

    def __str__(self) -> str:
        exact = "exact" if self.error == 0 else f"relative error {self.error:.2g} (measured on the first)"
        return f"{self.part}: {self.count} in {self.kind} -> {self.stored}, {exact}"


def losses(checkpoint: Checkpoint, target: Path) -> list[Loss]:
    """The kinds of tensors in an encoded checkpoint, and what became of them in the store `target` of it."""
    source = open_source(Folder(target))
    ranges = Ranges(target, {})
    for file in checkpoint.files:
        ranges.open(file, checkpoint.path_of(file))
    try:
        contents = survey(checkpoint)
        return [*_of_experts(contents, source, ranges), *_of_backbone(checkpoint, contents, source, ranges)]
    finally:
        ranges.close()
        source.close()


def _of_experts(contents: Survey, source: Source, ranges: Ranges) -> Iterable[Loss]:
    plain, extents = contents.sites, contents.extents
    kinds: dict[tuple, list[tuple[int, Part, Part]]] = {}
    for i, (before, after) in enumerate(zip(plain, source.sites, strict=True)):
        for old, new in zip(before.parts, after.parts, strict=True):
            kind = _kind(_inside(extents[i, 0], old), old.dtype)
            kinds.setdefault((old.name, kind, _form(new)), []).append((i, old, new))
    for (name, kind, form), found in kinds.items():
        i, old, new = found[0]
        given = _decoded(_inside(extents[i, 0], old), math.prod(old.shape), old.dtype, ranges)
        stored = _stored(source, i, new)
        given = given.view(old.shape)
        if new.form is not None and plain[i].transposed:
            given = given.T
        count = sum(source.sites[site].num_experts for site, _, _ in found)
        yield Loss(f"experts' {name}", kind, form, count, _error(given, stored))


def _inside(extents: Iterable[Extent], part: Part) -> list[Extent]:
    """The extents of a part, with places that count from its first byte."""
    inside = [x for x in extents if part.offset <= x.place < part.offset + part.nbytes]
    return [replace(x, place=x.place - part.offset) for x in inside]


def _kind(extents: Iterable[Extent], dtype: str) -> str:
    """Encodings of the extents; the dtype of what is not encoded, or in fp8 or MXFP4, which bf16 holds."""
    return ", ".join(dict.fromkeys(x.kind if isinstance(x, Decoded) else dtype for x in extents))


def _decoded(extents: Iterable[Extent], numel: int, dtype: str, ranges: Ranges) -> torch.Tensor:
    """The numbers of the file, fp32 (numel,); `dtype` is that of an image of them."""
    if not all(isinstance(x, Decoded) for x in extents):
        image = torch.zeros(numel, dtype=torch_dtype(dtype))
        for x in extents:
            x.fill(memoryview(image.view(torch.uint8).numpy()), ranges.read)
        return image.float()
    out = torch.zeros(numel)
    for x in extents:
        assert isinstance(x, Decoded)  # as checked above
        share = 4 * x.nbytes // torch_dtype(x.dtype).itemsize
        place = 4 * x.place // torch_dtype(x.dtype).itemsize
        replace(x, dtype="float32", nbytes=share, place=place).fill(memoryview(out.numpy()).cast("B"), ranges.read)
    return out


def _stored(source: Source, i: int, part: Part) -> torch.Tensor:
    """A part of the first expert of a site in the store, fp32."""
    image = torch.zeros(source.sites[i].expert_nbytes, dtype=torch.uint8)
    source.reader.read_into(i, 0, memoryview(image.numpy()))
    if part.form is not None:
        return QTensor.from_buffer(image, part.offset, part.shape, *part.form).dequantize()
    return image[part.offset : part.offset + part.nbytes].view(torch_dtype(part.dtype)).view(part.shape).float()


def _form(part: Part) -> str:
    if part.form is None:
        return part.dtype
    return f"{part.form[0]} bits g{part.form[1]}" + ", rotated" * (len(part.form) > 3)


def _of_backbone(checkpoint: Checkpoint, contents: Survey, source: Source, ranges: Ranges) -> Iterable[Loss]:
    roles = backbone_roles(contents.model)
    kinds: dict[tuple, list[str]] = {}
    backbone = {name: entry for name, entry in checkpoint.backbone().items() if entry[0].dtype in DTYPES}
    with open_backbone(source) as (quantized, plain):
        for name, (t, extent) in backbone.items():
            q = quantized.get(name)
            form = f"{q.bits} bits g{q.group_size}" if isinstance(q, QTensor) else DTYPES[t.dtype]
            part = roles.get(name, OTHER).replace("_", " ")
            kinds.setdefault((part, _kind(_pieces(extent), DTYPES[t.dtype]), form), []).append(name)
        for (part, kind, form), names in sorted(kinds.items()):
            t, extent = backbone[names[0]]
            given = _decoded(_pieces(extent), math.prod(t.shape), DTYPES[t.dtype], ranges)
            q = quantized.get(names[0])
            stored = q.dequantize() if q is not None else plain[names[0]][...]
            yield Loss(part, kind, form, len(names), _error(given, stored))


def _pieces(extent: Extent) -> tuple[Extent, ...]:
    return extent.pieces if isinstance(extent, Joined) else (extent,)


def _error(given: torch.Tensor, stored: torch.Tensor) -> float:
    """Relative RMS error."""
    given, stored = given.double().flatten(), stored.double().flatten()
    return float((given - stored).norm() / given.norm().clamp_min(1e-300))
