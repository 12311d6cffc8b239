"""What a conversion will write, laid out before the first byte: which bytes of which shard go where in which file."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from mixoff.checkpoints.checkpoint import ITEM_BITS, Checkpoint, Extent
from mixoff.checkpoints.model_files import INDEX, WHOLE
from mixoff.checkpoints.shards import Shards
from mixoff.checkpoints.survey import survey as survey_of
from mixoff.errors import CheckpointError
from mixoff.quantize.scheme import Precision, Scheme
from mixoff.quantize.tensor import QTensor
from mixoff.shapes import config
from mixoff.shapes.sites import DTYPES, PART_ALIGN, Part, Site, quantized_sites, stride
from mixoff.store import codes
from mixoff.store.manifest import FORMAT, MANIFEST, QUANTIZED, VERSION, expert_file, marked

log = logging.getLogger("mixoff")


@dataclass(frozen=True)
class Output:
    """A range of a file of the store, and the name of the tensor in it."""

    name: str
    file: str
    offset: int
    nbytes: int


@dataclass(frozen=True)
class Weight:
    """One weight of a conversion: how it is read, what it is, and where its bytes go.

    - name: name in the store.
    - extents: byte ranges to read.
    - part: shape and dtype as read.
    - transposed: whether it is (inputs, outputs) in the checkpoint.
    - precision: precision in the store; None keeps it as it is.
    - outputs: ranges of the store, which its byte image fills in this order.
    - where: name and file, for errors.
    - used: whether the model uses it.
    """

    name: str
    extents: tuple[Extent, ...]
    part: Part
    transposed: bool
    precision: Precision | None
    outputs: tuple[Output, ...]
    where: str
    used: bool = True

    @property
    def ranges(self) -> list[tuple[str, int, int]]:
        """All byte ranges to read: file, offset, size."""
        return [r for extent in self.extents for r in extent.ranges()]


@dataclass(frozen=True)
class Blueprint:
    """A store before it is written.

    - scheme, dtype, sites: as in `Source`.
    - weights: all weights, in the order in which they are laid out.
    - sizes: bytes of each file.
    - heads: first bytes (the safetensors header) of each file of the backbone.
    - calibration: what a calibrated conversion depends on; None for a data-free one.
    - alone: name of the file that is all of the target; None for a folder, as a store is.
    """

    scheme: Scheme
    dtype: str
    sites: tuple[Site, ...]
    weights: list[Weight]
    sizes: dict[str, int]
    heads: dict[str, bytes]
    calibration: dict | None = None
    alone: str | None = None

    def small_files(self, shards: Shards, done: dict[str, list[str]]) -> dict[str, bytes]:
        """The small files of the store, the manifest last; `done` has the hashes of all that was written."""
        small = marked(shards.side_files())
        if list(map(shards.checkpoint.stored_as, shards.checkpoint.files)) != [WHOLE]:
            small[INDEX] = to_json(index(self))
        return small | {MANIFEST: to_json(manifest(self, done))}


def lay_out(checkpoint: Checkpoint, scheme: Scheme) -> Blueprint:
    """The store of `checkpoint` in `scheme`. Raises CheckpointError or MixoffError for what cannot be converted."""
    survey = survey_of(checkpoint)
    scheme = codes.scheme_of(checkpoint, survey) if scheme.keeps else scheme
    plan = Blueprint(
        scheme=scheme,
        dtype=survey.dtype,
        sites=quantized_sites(survey.sites, scheme),
        weights=[],
        sizes={},
        heads={},
    )
    _place_experts(plan, survey.sites, survey.extents)
    _warn_of_unused(checkpoint, survey.unused)
    backbone = checkpoint.backbone()
    roles = {name: role for name, role in config.backbone_roles(survey.model).items() if name in backbone}
    quantized = {name: role for name, role in roles.items() if scheme.precision(role) is not None}
    copied = {name: entry for name, entry in backbone.items() if name not in quantized}
    place_copied(plan, copied, {file: checkpoint.stored_as(file) for file in checkpoint.files}, survey.unused)
    if quantized:
        _place_quantized(plan, quantized, backbone)
    return plan


def _warn_of_unused(checkpoint: Checkpoint, unused: set[str]) -> None:
    if unused:
        some = ", ".join(sorted(unused)[:3]) + ", …" * (len(unused) > 3)
        log.warning("%s has %d tensors that its model does not use: %s", checkpoint.name, len(unused), some)


def _place_experts(plan: Blueprint, plain: Iterable[Site], extents: dict[tuple[int, int], list[Extent]]) -> None:
    for i, (before, after) in enumerate(zip(plain, plan.sites, strict=True)):
        file = expert_file(i)
        plan.sizes[file] = stride(after) * after.num_experts
        for e in range(before.num_experts):
            for old, new in zip(before.parts, after.parts, strict=True):
                name = f"{before.name}.{e}.{old.name}"
                inside = [x for x in extents[i, e] if old.offset <= x.place < old.offset + old.nbytes]
                moved = tuple(replace(x, place=x.place - old.offset) for x in inside)
                precision = plan.scheme.expert(old.name, i) if new.form != old.form else None
                stored = replace(old, offset=0)
                if precision and plan.scheme.keeps:
                    moved, stored = _kept(stored, new, moved)
                weight = Weight(
                    name=name,
                    extents=moved,
                    part=stored,
                    transposed=before.transposed,
                    precision=precision,
                    outputs=(Output(name, file, e * stride(after) + new.offset, new.nbytes),),
                    where=f"{name} (layer {before.layer}, expert {e}) in {moved[0].file}",
                )
                plan.weights.append(weight)


def _kept(old: Part, new: Part, extents: tuple[Extent, ...]) -> tuple[tuple[Extent, ...], Part]:
    """How to take over the codes of a weight: what to read instead, and what it then is."""
    assert new.form is not None  # a precision was chosen for it
    kept = codes.kept(codes.integers_of(old, extents), new.shape, new.form, new.nbytes)
    return (kept,), replace(new, offset=0)


def place_copied(plan: Blueprint, tensors: dict, files: dict[str, str], unused: set[str]) -> None:
    """Place the tensors that stay as they are, in a file for each shard: names of both in `files`.

    The data keeps its offset modulo 64: transformers computes from the mapped file, and the last bits of a BLAS
    product may depend on the alignment of its operands.
    """
    for shard, file in files.items():
        of_file = {name: t for name, (t, _) in tensors.items() if t.file == shard}
        ordered = sorted(of_file.items(), key=lambda item: item[1].offset)
        if not ordered:
            continue
        begin = ordered[0][1].offset % PART_ALIGN
        wanted = {name: (t.dtype, t.shape, t.nbytes) for name, t in ordered}
        offsets = place_tensors(plan, file, wanted, {"format": "pt"}, begin)
        for name, t in ordered:
            part = Part(name, t.shape, DTYPES.get(t.dtype, t.dtype), 0, t.nbytes)
            weight = Weight(
                name=name,
                extents=(tensors[name][1],),
                part=part,
                transposed=False,
                precision=None,
                outputs=(Output(name, file, offsets[name], t.nbytes),),
                where=f"{name} in {t.file}",
                used=name not in unused,
            )
            plan.weights.append(weight)


STORED_NAMES = {torch.int32: "I32", torch.int16: "I16", torch.float16: "F16", torch.uint8: "U8"}


def _place_quantized(plan: Blueprint, roles: dict[str, str], backbone: dict) -> None:
    """Place the backbone's quantized weights: each part as `NAME.PART`, and their descriptions as JSON metadata."""
    described, parts = {}, {}
    for name, role in roles.items():
        precision = plan.scheme.precision(role)
        assert precision is not None  # `roles` has none that stays in 16 bits
        shape = backbone[name][0].shape
        empty = QTensor.empty(shape, precision.bits, precision.group_size, plan.scheme.metadata_bits)
        tensors, described[name] = empty.to_tensors()
        parts[name] = {f"{name}.{part}": (STORED_NAMES[t.dtype], t.shape, t.nbytes) for part, t in tensors.items()}
    wanted = {key: entry for of_name in parts.values() for key, entry in of_name.items()}
    # widest items first, so that each is aligned to its own size
    ordered = dict(sorted(wanted.items(), key=lambda item: (-ITEM_BITS[item[1][0]], item[0])))
    offsets = place_tensors(plan, QUANTIZED, ordered, {"mixoff": json.dumps(described)}, 0)
    for name, role in roles.items():
        t, extent = backbone[name]
        if t.dtype not in DTYPES:
            raise CheckpointError(f"{name} in {t.file} is {t.dtype}: mixoff quantizes {', '.join(DTYPES)}")
        part = Part(name, t.shape, DTYPES[t.dtype], 0, t.nbytes)
        extents: tuple[Extent, ...] = (extent,)
        precision = plan.scheme.precision(role)
        if plan.scheme.keeps and precision:
            form = precision.bits, precision.group_size, plan.scheme.metadata_bits
            new = replace(part, form=form, nbytes=sum(nbytes for _, _, nbytes in parts[name].values()))
            extents, part = _kept(part, new, extents)
        outputs = tuple(Output(key, QUANTIZED, offsets[key], entry[2]) for key, entry in parts[name].items())
        weight = Weight(
            name=name,
            extents=extents,
            part=part,
            transposed=False,
            precision=precision,
            outputs=outputs,
            where=f"{name} in {t.file}",
        )
        plan.weights.append(weight)


def place_tensors(plan: Blueprint, file: str, tensors: dict[str, tuple], metadata: dict, begin: int) -> dict[str, int]:
    """Lay out a safetensors file whose data begins at `begin` modulo 64; returns its tensors' offsets in the file."""
    if Path(file).name != file:
        raise CheckpointError(f"a shard is named {file!r}, which is a path: do not trust this checkpoint")
    if file in plan.sizes:
        raise CheckpointError(f"a shard is named {file}, like a file of the store: rename it, in the index as well")
    plan.heads[file], offsets = safetensors_head(tensors, metadata, begin)
    plan.sizes[file] = len(plan.heads[file]) + sum(nbytes for _, _, nbytes in tensors.values())
    return offsets


def safetensors_head(tensors: dict[str, tuple], metadata: dict, begin: int = 0) -> tuple[bytes, dict[str, int]]:
    """The first bytes of a safetensors file whose data begins at `begin` modulo 64, and its tensors' offsets in it.

    tensors: dtype by safetensors' name, shape and bytes of each, in their order
    """
    header, end, offsets = {"__metadata__": metadata}, 0, {}
    for name, (dtype, shape, nbytes) in tensors.items():
        offsets[name] = end
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [end, end := end + nbytes]}
    raw = json.dumps(header, separators=(",", ":")).encode()
    raw += b" " * ((begin - 8 - len(raw)) % PART_ALIGN)  # the format allows spaces after the header
    head = len(raw).to_bytes(8, "little") + raw
    return head, {name: offset + len(head) for name, offset in offsets.items()}


def to_json(value: dict) -> bytes:
    """A JSON file's content in UTF-8, indented, with a final newline."""
    return (json.dumps(value, indent=1) + "\n").encode()


def index(plan: Blueprint) -> dict:
    """The index of the backbone's files: which of them holds which tensor that transformers loads."""
    copied = [weight for weight in plan.weights if weight.outputs[0].file in plan.heads and weight.precision is None]
    weight_map = {weight.name: weight.outputs[0].file for weight in copied}
    total = sum(weight.part.nbytes for weight in copied)
    return {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}


def manifest(plan: Blueprint, done: dict[str, list[str]]) -> dict:
    """The manifest: which file holds which tensor, with the SHA-256 of each; no times, no paths."""
    hashes = {o.name: sha256 for w in plan.weights for o, sha256 in zip(w.outputs, done[w.name], strict=True)}
    sites = []
    for i, site in enumerate(plan.sites):
        names = [[f"{site.name}.{e}.{part.name}" for part in site.parts] for e in range(site.num_experts)]
        entry = {"file": expert_file(i), "stride": stride(site), **asdict(site)}
        sites.append(entry | {"sha256": [[hashes[name] for name in of_expert] for of_expert in names]})
    by_file: dict[str, dict[str, str]] = {file: {} for file in plan.heads}
    for weight in plan.weights:
        for output in weight.outputs:
            if output.file in by_file:
                by_file[output.file][output.name] = hashes[output.name]
    backbone = [{"file": file, "nbytes": plan.sizes[file], "sha256": tensors} for file, tensors in by_file.items()]
    head = {"format": FORMAT, "version": VERSION, "scheme": json.loads(plan.scheme.to_json()), "dtype": plan.dtype}
    if plan.calibration:
        head["calibration"] = plan.calibration
    return head | {"backbone": backbone, "sites": sites}
