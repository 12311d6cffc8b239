"""The files of a pruned store before they are written: which bytes of the store it comes from go where.

An expert that stays keeps its bytes, quantized or not; only merged ones are computed and quantized again.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from transformers import PreTrainedModel

from mixoff.checkpoints.checkpoint import Extent, Read, TensorRange, read_header
from mixoff.checkpoints.model_files import INDEX, WHOLE, configurations
from mixoff.checkpoints.shards import Shards
from mixoff.errors import CheckpointError
from mixoff.pruning.merge import MergedExtent, check, groups
from mixoff.pruning.routers import stored_routers
from mixoff.quantize.layout import layout
from mixoff.shapes import config
from mixoff.shapes.sites import DTYPES, Part, stride
from mixoff.store.blueprint import Blueprint, Output, Weight, index, manifest, place_copied, place_tensors, to_json
from mixoff.store.inventory import EXPERTS
from mixoff.store.manifest import MANIFEST, QUANTIZED, described_quantized, expert_file, marked, read_manifest
from mixoff.store.stored import StoreCheckpoint


@dataclass(frozen=True)
class RowsExtent(Extent):
    """Some rows of a tensor, read one by one.

    starts: where each row begins in the file; `nbytes` is that of all of them
    """

    starts: tuple[int, ...]

    def _rows(self) -> list[tuple[int, int]]:
        size = self.nbytes // len(self.starts)
        return [(start, size) for start in self.starts]

    def ranges(self) -> list[tuple[str, int, int]]:
        return [(self.file, start, size) for start, size in self._rows()]

    def fill(self, image: memoryview, read: Read) -> None:
        place = self.place
        for start, size in self._rows():
            read(self.file, start, image[place : place + size])
            place += size


@dataclass(frozen=True)
class Pruned(Blueprint):
    """A store with fewer experts before it is written.

    - experts: E of the store it comes from.
    - facts: what its manifest says of the pruning; empty where all experts stay.
    """

    experts: int = 0
    facts: dict = field(default_factory=dict)

    def small_files(self, shards: Shards, done: dict[str, list[str]]) -> dict[str, bytes]:
        """As a store has them, with the new number of experts in config.json."""
        small = marked(shards.side_files())
        small.pop(MANIFEST, None)
        small["config.json"] = self._config(small["config.json"])
        if [file for file in self.heads if file != QUANTIZED] != [WHOLE]:
            small[INDEX] = to_json(index(self))
        head = manifest(self, done)
        return small | {MANIFEST: to_json(head | {"pruned": self.facts} if self.facts else head)}

    def _config(self, raw: bytes) -> bytes:
        settings, keep = json.loads(raw), self.sites[0].num_experts
        if keep == self.experts:
            return raw
        for part in configurations(settings):
            part.update({key: keep for key in EXPERTS if part.get(key) == self.experts})
        return (json.dumps(settings, indent=2) + "\n").encode()


def lay_out(store: StoreCheckpoint, kept: Sequence[Sequence[int]], facts: dict, counts: Tensor | None) -> Pruned:
    """The store with the experts in `kept`; with `counts` (L, E) those that leave are merged into them."""
    source, before = store.source, read_manifest(store.folder)
    plan = Pruned(
        scheme=source.scheme,
        dtype=source.dtype,
        sites=tuple(replace(site, num_experts=len(of)) for site, of in zip(source.sites, kept, strict=True)),
        weights=[],
        sizes={},
        heads={},
        calibration=before.get("calibration"),
        experts=source.sites[0].num_experts,
        facts=facts,
    )
    routers = stored_routers(_skeleton(store), source.sites, source.backbone.items())
    for i in range(len(plan.sites)):
        _place_experts(plan, store, i, kept[i], None if counts is None else _shares(store, routers, i, kept[i], counts))
    tensors = {
        name: _rows(t, kept[routers[name]]) if name in routers else (t, Extent(t.file, t.offset, 0, t.nbytes))
        for name, t in source.backbone.items()
    }
    files = [entry["file"] for entry in before["backbone"]]
    place_copied(plan, tensors, {file: file for file in files if file != QUANTIZED}, set())
    if QUANTIZED in files:
        _place_quantized(plan, store)
    return plan


def _skeleton(store: StoreCheckpoint) -> PreTrainedModel:
    return config.skeleton(config.read_config(store.folder))


def _rows(t: TensorRange, kept: Sequence[int]) -> tuple[TensorRange, Extent]:
    size = t.nbytes // t.shape[0]
    new = replace(t, shape=(len(kept), *t.shape[1:]), nbytes=size * len(kept))
    return new, RowsExtent(t.file, t.offset, 0, new.nbytes, tuple(t.offset + e * size for e in kept))


def _place_experts(plan: Pruned, store: StoreCheckpoint, i: int, kept: Sequence[int], merged: list | None) -> None:
    site, source = plan.sites[i], store.source
    plan.sizes[expert_file(i)] = stride(site) * site.num_experts
    if merged:
        check(source.sites[i])
    for new, old in enumerate(kept):
        whole = source.reader.extents[i, old][0]
        for p, part in enumerate(site.parts):
            name = f"{site.name}.{new}.{part.name}"
            extent: Extent = Extent(whole.file, whole.offset + part.offset, 0, part.nbytes)
            read, precision = replace(part, offset=0), None
            if merged and len(merged[new][0]) > 1:
                read = replace(store.plain[i].parts[p], offset=0)
                precision = plan.scheme.expert(part.name, i) if part.form else None
                inner = tuple(source.reader.extents[i, e][0] for e in merged[new][0])
                extent = MergedExtent(
                    whole.file,
                    whole.offset,
                    0,
                    read.nbytes,
                    inner,
                    merged[new][1],
                    source.sites[i],
                    part.name,
                    read.dtype,
                )
            plan.weights.append(
                Weight(
                    name=name,
                    extents=(extent,),
                    part=read,
                    transposed=False,
                    precision=precision,
                    outputs=(Output(name, expert_file(i), new * stride(site) + part.offset, part.nbytes),),
                    where=f"{name} (layer {site.layer}, expert {old} of {plan.experts}) in {whole.file}",
                )
            )


def _shares(
    store: StoreCheckpoint, routers: dict[str, int], i: int, kept: Sequence[int], counts: Tensor
) -> list[tuple[list[int], tuple[float, ...]]]:
    """The group of each expert that stays, and the share of each of its experts in the average."""
    name = next(name for name, place in routers.items() if place == i and len(store.tensors[name].shape) == 2)
    t = store.tensors[name]
    with (store.folder / t.file).open("rb") as file:
        file.seek(t.offset)
        raw = bytearray(file.read(t.nbytes))
    rows = torch.frombuffer(raw, dtype=getattr(torch, DTYPES[t.dtype])).view(t.shape)  # (E, D)
    found = []
    for group in groups(rows, kept):
        used = counts[i, group].double() + 1  # none counts as never used
        found.append((group, tuple((used / used.sum()).tolist())))
    return found


def _place_quantized(plan: Pruned, store: StoreCheckpoint) -> None:
    """Place the quantized weights of the backbone, byte by byte as they are."""
    described, parts = described_quantized(store.folder), read_header(store.folder / QUANTIZED)
    ordered = {name: (t.dtype, t.shape, t.nbytes) for name, t in sorted(parts.items(), key=lambda x: x[1].offset)}
    offsets = place_tensors(plan, QUANTIZED, ordered, {"mixoff": json.dumps(described)}, 0)
    roles = config.backbone_roles(_skeleton(store))
    for name, meta in described.items():
        form = meta["bits"], meta["group_size"], meta["metadata_bits"]
        keys = [f"{name}.{part}" for part, _, _ in layout(tuple(meta["shape"]), *form)]
        extents, end = [], 0
        for key in keys:
            extents.append(Extent(QUANTIZED, parts[key].offset, end, parts[key].nbytes))
            end += parts[key].nbytes
        if (precision := plan.scheme.precision(roles[name])) is None:
            raise CheckpointError(f"{name} is quantized, and the store's scheme does not say so: convert again")
        plan.weights.append(
            Weight(
                name=name,
                extents=tuple(extents),
                part=Part(name, tuple(meta["shape"]), plan.dtype, 0, end, form),
                transposed=False,
                precision=precision,
                outputs=tuple(Output(key, QUANTIZED, offsets[key], parts[key].nbytes) for key in keys),
                where=f"{name} in {QUANTIZED}",
            )
        )
