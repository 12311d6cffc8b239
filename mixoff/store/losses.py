"""What became of the weights of a GGUF in a store: by kind of tensor, with the relative error of one of each kind."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from mixoff.checkpoints.checkpoint import Extent
from mixoff.checkpoints.find import Folder
from mixoff.checkpoints.gguf.checkpoint import GgufCheckpoint
from mixoff.checkpoints.gguf.extent import GgufExtent
from mixoff.checkpoints.gguf.latent import Joined
from mixoff.checkpoints.shards import Ranges
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


def losses(checkpoint: GgufCheckpoint, target: Path) -> list[Loss]:
    """The kinds of tensors in a GGUF, and what became of them in the store `target` of it."""
    source = open_source(Folder(target))
    ranges = Ranges(target, {})
    for file in checkpoint.files:
        ranges.open(file, checkpoint.path_of(file))
    try:
        return [*_of_experts(checkpoint, source, ranges), *_of_backbone(checkpoint, source, ranges)]
    finally:
        ranges.close()
        source.close()


def _of_experts(checkpoint: GgufCheckpoint, source: Source, ranges: Ranges) -> Iterable[Loss]:
    plain = checkpoint.plain_sites()
    extents = checkpoint.extents(plain)
    kinds: dict[tuple, list[tuple[int, Part, Part]]] = {}
    for i, (before, after) in enumerate(zip(plain, source.sites, strict=True)):
        for old, new in zip(before.parts, after.parts, strict=True):
            kind = ", ".join(dict.fromkeys(x.kind for x in _inside(extents[i, 0], old)))
            kinds.setdefault((old.name, kind, _form(new)), []).append((i, old, new))
    for (name, kind, form), found in kinds.items():
        i, old, new = found[0]
        given = _decoded(_inside(extents[i, 0], old), math.prod(old.shape), ranges)
        stored = _stored(source, i, new)
        given = given.view(old.shape)
        if new.form is not None and plain[i].transposed:
            given = given.T
        count = sum(source.sites[site].num_experts for site, _, _ in found)
        yield Loss(f"experts' {name}", kind, form, count, _error(given, stored))


def _inside(extents: Iterable[Extent], part: Part) -> list[GgufExtent]:
    """The extents of a part, with places that count from its first byte."""
    inside = [x for x in extents if part.offset <= x.place < part.offset + part.nbytes]
    return [replace(x, place=x.place - part.offset) for x in inside if isinstance(x, GgufExtent)]


def _decoded(extents: Iterable[GgufExtent], numel: int, ranges: Ranges) -> torch.Tensor:
    """The numbers of the file, fp32 (numel,)."""
    out = torch.zeros(numel)
    image = memoryview(out.numpy()).cast("B")
    for x in extents:
        share = 4 * x.nbytes // torch_dtype(x.dtype).itemsize
        place = 4 * x.place // torch_dtype(x.dtype).itemsize
        replace(x, dtype="float32", nbytes=share, place=place).fill(image, ranges.read)
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


def _of_backbone(checkpoint: GgufCheckpoint, source: Source, ranges: Ranges) -> Iterable[Loss]:
    roles = backbone_roles(checkpoint.model)
    kinds: dict[tuple, list[str]] = {}
    with open_backbone(source) as (quantized, plain):
        for name, (t, _) in checkpoint.backbone().items():
            q = quantized.get(name)
            form = f"{q.bits} bits g{q.group_size}" if isinstance(q, QTensor) else DTYPES[t.dtype]
            part = roles.get(name, OTHER).replace("_", " ")
            kinds.setdefault((part, checkpoint.kind_of(name), form), []).append(name)
        for (part, kind, form), names in sorted(kinds.items()):
            t, extent = checkpoint.backbone()[names[0]]
            pieces = extent.pieces if isinstance(extent, Joined) else (extent,)
            given = _decoded([x for x in pieces if isinstance(x, GgufExtent)], math.prod(t.shape), ranges)
            q = quantized.get(names[0])
            stored = q.dequantize() if q is not None else plain[names[0]][...]
            yield Loss(part, kind, form, len(names), _error(given, stored))


def _error(given: torch.Tensor, stored: torch.Tensor) -> float:
    """Relative RMS error."""
    given, stored = given.double().flatten(), stored.double().flatten()
    return float((given - stored).norm() / given.norm().clamp_min(1e-300))
