"""Files of an export before they are written: which bytes of which weight go where."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch

from mixoff.checkpoints.checkpoint import Extent, Read
from mixoff.checkpoints.model_files import INDEX, WHOLE
from mixoff.checkpoints.shards import Shards
from mixoff.export.model import Model
from mixoff.quantize.scheme import Scheme
from mixoff.shapes.sites import DTYPES, Part, dtype_nbytes, torch_dtype
from mixoff.store.blueprint import Blueprint, Output, Weight, safetensors_head, to_json
from mixoff.store.stored import NAMES

SHARD = 5_000_000_000  # bytes of a file, as the Hub recommends
Entry = tuple[str, tuple[int, ...], int]  # dtype by safetensors' name, shape, bytes


@dataclass(frozen=True)
class Export(Blueprint):
    """Files for another engine before they are written.

    side: small files by name
    """

    side: dict[str, bytes] = field(default_factory=dict)

    def small_files(self, shards: Shards, done: dict[str, list[str]]) -> dict[str, bytes]:
        """Configuration, tokenizer, and the index of the files if there are several."""
        if self.alone:
            return {}
        if list(self.sizes) == [WHOLE]:
            return self.side
        weight_map = {o.name: o.file for weight in self.weights for o in weight.outputs}
        total = sum(self.sizes.values()) - sum(map(len, self.heads.values()))
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        return self.side | {INDEX: to_json(index)}


@dataclass(frozen=True)
class Place:
    """Where a tensor begins."""

    file: str
    offset: int


@dataclass(frozen=True)
class Reencoded(Extent):
    """A weight, or a part of an expert, that is written in another encoding.

    - inner: how to read it.
    - part: what it then is.
    """

    inner: tuple[Extent, ...]
    part: Part

    def ranges(self) -> list[tuple[str, int, int]]:
        return [r for x in self.inner for r in x.ranges()]

    def weights(self, read: Read) -> torch.Tensor:
        """The weights as they are read, in the shape and dtype of `part`."""
        raw = bytearray(self.part.nbytes)
        for x in self.inner:
            x.fill(memoryview(raw), read)
        return torch.frombuffer(raw, dtype=torch_dtype(self.part.dtype)).view(self.part.shape)


def lay_out_safetensors(tensors: Mapping[str, Entry]) -> tuple[dict[str, Place], dict[str, int], dict[str, bytes]]:
    """Places of tensors in files of at most SHARD bytes, with the sizes and the first bytes of the files."""
    groups: list[dict[str, Entry]] = [{}]
    room = SHARD
    for name, entry in tensors.items():
        if groups[-1] and entry[2] > room:
            groups.append({})
            room = SHARD
        groups[-1][name] = entry
        room -= entry[2]
    files = [f"model-{i + 1:05d}-of-{len(groups):05d}.safetensors" for i in range(len(groups))]
    places, sizes, heads = {}, {}, {}
    for file, group in zip(files if len(groups) > 1 else [WHOLE], groups, strict=True):
        heads[file], offsets = safetensors_head(group, {"format": "pt"})
        sizes[file] = len(heads[file]) + sum(nbytes for _, _, nbytes in group.values())
        places.update({name: Place(file, offset) for name, offset in offsets.items()})
    return places, sizes, heads


def copied(name: str, extents: Iterable[Extent], part: Part, outputs: Iterable[Output], where: str) -> Weight:
    """A weight that is written as it is read."""
    return Weight(name, tuple(extents), part, False, None, tuple(outputs), where)


def of_backbone(model: Model) -> dict[str, Entry]:
    """The backbone's tensors as they are decoded."""
    return {name: (t.dtype, t.shape, t.nbytes) for name, (t, _) in model.backbone.items()}


def of_experts(model: Model) -> dict[str, Entry]:
    """The experts' tensors as they are decoded, under the Hub's names."""
    tensors = {}
    for i, site in enumerate(model.sites):
        for e in range(site.num_experts):
            for part in site.parts:
                for piece in model.names.of_expert(i, e, part):
                    nbytes = math.prod(piece.shape) * dtype_nbytes(part.dtype)
                    tensors[piece.name] = NAMES[part.dtype], piece.shape, nbytes
    return tensors


def backbone_weights(model: Model, places: Mapping[str, Place]) -> Iterable[Weight]:
    """The backbone's weights, each in its place."""
    for name, (t, extent) in model.backbone.items():
        part = Part(name, t.shape, DTYPES.get(t.dtype, t.dtype), 0, t.nbytes)
        outputs = [Output(name, places[name].file, places[name].offset, t.nbytes)]
        yield copied(name, [extent], part, outputs, f"{name} in {t.file}")


def hub_layout(model: Model) -> Export:
    """Safetensors with the Hub's names, in the dtype that the weights had before they were quantized."""
    places, sizes, heads = lay_out_safetensors(of_backbone(model) | of_experts(model))
    weights = [*backbone_weights(model, places), *_expert_weights(model, places)]
    return Export(Scheme(), model.sites[0].parts[0].dtype, (), weights, sizes, heads, side=model.side_files())


def _expert_weights(model: Model, places: Mapping[str, Place]) -> Iterable[Weight]:
    for i, site in enumerate(model.sites):
        for e in range(site.num_experts):
            for part in site.parts:
                pieces = model.names.of_expert(i, e, part)
                nbytes, item = part.nbytes // len(pieces), dtype_nbytes(part.dtype)
                outputs = [
                    Output(p.name, places[p.name].file, places[p.name].offset + p.offset * item, nbytes) for p in pieces
                ]
                name = f"{site.name}.{e}.{part.name}"
                extents = model.of_part(i, e, part)
                alone = Part(part.name, part.shape, part.dtype, 0, part.nbytes)
                yield copied(name, extents, alone, outputs, f"{name} in {extents[0].file}")
