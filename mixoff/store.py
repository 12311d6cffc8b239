"""The slow tier: the store, which keeps each expert in one aligned range of a file.

A store is an ordinary model folder with the backbone (all that is not an expert), beside `experts-NNN.bin`, one file a
MoE layer, one range an expert, and `mixoff.json`, which says what stands where. What a scheme quantizes of the backbone
is in `quantized.safetensors`. A plain checkpoint serves as well: there an expert is gathered from the tensors that
hold it.

Does not know caches or policies.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from mixoff import backbone, hub, published, shapes
from mixoff.checkpoint import Checkpoint, Extent, TensorRange, read_header
from mixoff.errors import CheckpointError
from mixoff.model_files import read_json
from mixoff.pages import LINE, slab
from mixoff.quantize.layout import layout, packed_nbytes
from mixoff.quantize.scheme import Scheme
from mixoff.quantize.strided import StridedTensor
from mixoff.quantize.tensor import QTensor
from mixoff.readers import ExpertReader
from mixoff.shapes import Part, Site
from mixoff.shards import local_folder

if TYPE_CHECKING:
    from transformers import PreTrainedModel

MANIFEST = "mixoff.json"
QUANTIZED = "quantized.safetensors"
FORMAT, VERSION = "mixoff-store", 1
ALIGN = 4096  # bytes; what direct I/O asks for, and a page
# how a store's config.json names what computes its experts: transformers, which would make experts up, refuses the name
FOR_MIXOFF = "a mixoff store: load this folder with mixoff.load"


class EncodedError(CheckpointError):
    """A checkpoint that has to be converted before it can be used."""


@dataclass
class Source:
    """A model folder that experts are served from: a store or a plain checkpoint.

    dtype: of the weights before any quantization, by torch's name. scheme: how they are stored. backbone: the tensors
    that are no expert's, by name, in the same files.
    """

    folder: Path
    sites: tuple[Site, ...]
    dtype: str
    scheme: Scheme
    reader: ExpertReader
    backbone: Mapping[str, TensorRange]

    @property
    def is_store(self) -> bool:
        """Whether the folder is a store, rather than a plain checkpoint."""
        return (self.folder / MANIFEST).exists()

    @property
    def expert_nbytes(self) -> int:
        """Bytes of the largest expert image: the size of a slot."""
        return max(site.expert_nbytes for site in self.sites)

    def close(self) -> None:
        """Close the files."""
        self.reader.close()


def open_source(path: str | Path) -> Source:
    """Open a store or a plain checkpoint for reading: a folder, a bundled model, or a Hub id in the local Hub cache."""
    folder = local_folder(path)
    if (folder / MANIFEST).exists():
        return _open_store(folder)
    checkpoint = published.open_checkpoint(folder)
    if reason := checkpoint.not_in_place:
        raise EncodedError(f"{reason}: convert it first (`mixoff convert {path} TARGET`), or load it with a scheme")
    found = survey(checkpoint)
    return Source(
        folder, found.sites, found.dtype, Scheme(), ExpertReader(folder, found.extents), backbone=found.backbone
    )


@dataclass(frozen=True)
class Survey:
    """What a checkpoint holds: its experts' sites, dtype and bytes, and the tensors of its backbone by name.

    unused: names of tensors that the model does not use. model: its skeleton.
    """

    model: PreTrainedModel
    dtype: str
    sites: tuple[Site, ...]
    extents: dict[tuple[int, int], list[Extent]]
    backbone: dict[str, TensorRange]
    unused: set[str]


def survey(checkpoint: Checkpoint) -> Survey:
    """What `checkpoint` holds, if its model needs no more: the one verdict of loading, converting and planning.

    Reads headers only. Raises CheckpointError.
    """
    dtype = checkpoint_dtype(checkpoint)
    model = shapes.skeleton(shapes.read_config(checkpoint.folder))
    sites = checkpoint.stored_sites(shapes.expert_sites(model, dtype))
    extents, tensors = checkpoint.extents(sites), {name: t for name, (t, _) in checkpoint.backbone().items()}
    unused = backbone.check(checkpoint.folder, _sizes(checkpoint.folder, tensors))
    return Survey(model, dtype, sites, extents, tensors, unused)


def _sizes(folder: Path, tensors: Mapping[str, TensorRange]) -> dict[str, tuple[int, ...]]:
    """Shapes of a backbone's weights by name, of those that are quantized in the files as well."""
    plain = {name: tensors[name].shape for name in published.plain_names(tensors)}
    return plain | {name: shape for name, (shape, _) in published.matrices(folder, tensors).items()}


def checkpoint_dtype(checkpoint: Checkpoint) -> str:
    """The dtype of the experts in `checkpoint`; a dense model is refused by what it is, not by what it lacks."""
    if not checkpoint.expert_names():
        shapes.expert_sites(shapes.skeleton(shapes.read_config(checkpoint.folder)), "float32")
    return checkpoint.expert_dtype()


# Stores ---------------------------------------------------------------------------------------------------------------


def is_store(path: str | Path) -> bool:
    """Whether `path` is the folder of a store, sound or not."""
    return hub.parse(path) is None and (local_folder(path) / MANIFEST).exists()


def marked(small: dict[str, bytes]) -> dict[str, bytes]:
    """The small files of a model as a store has them: with a config.json for which transformers makes no model."""
    if "config.json" not in small:
        return small
    config = json.loads(small["config.json"])
    for holder in (config, config.get("text_config")):
        if isinstance(holder, dict):
            holder["experts_implementation"] = FOR_MIXOFF
    return small | {"config.json": (json.dumps(config, indent=2) + "\n").encode()}


def stride(site: Site) -> int:
    """Bytes from one expert to the next in a store's file."""
    return -(-site.expert_nbytes // ALIGN) * ALIGN


def expert_file(i: int) -> str:
    """The name of the file with the experts of site `i`."""
    return f"experts-{i:03d}.bin"


def quantized_sites(sites: tuple[Site, ...], scheme: Scheme) -> tuple[Site, ...]:
    """The sites as they are stored under `scheme`; biases stay as they are.

    Raises MixoffError when a group does not divide a width.
    """
    precision = scheme.precision("experts")
    if precision is None:
        return sites
    if any(part.form is not None for site in sites for part in site.parts):
        raise CheckpointError(
            "these experts are quantized already: convert them with scheme 'none', which keeps them, "
            "or give mixoff the 16-bit original of this model"
        )
    form = (precision.bits, precision.group_size, scheme.metadata_bits)

    def quantized(site: Site) -> Site:
        parts = [_quantized(part, site.transposed, form) if len(part.shape) == 2 else part for part in site.parts]
        return replace(site, parts=shapes.place(parts), transposed=False)

    return tuple(map(quantized, sites))


def _quantized(part: Part, transposed: bool, form: tuple[int, int, int]) -> Part:
    """The part as (outputs, inputs), which is how quantized weights are kept in any family."""
    shape = part.shape[::-1] if transposed else part.shape
    return replace(part, shape=shape, form=form, nbytes=packed_nbytes(shape, *form))


@dataclass(frozen=True)
class StoreBytes:
    """Bytes of a store's tensors: experts with their alignment, the backbone's quantized weights, and its others."""

    experts: int
    quantized: int
    copied: int

    @property
    def total(self) -> int:
        """All of them. Headers, the manifest, and the tokenizer's and other small files come on top."""
        return self.experts + self.quantized + self.copied


def tensor_nbytes(
    sites: Iterable[Site], backbone: Mapping[str, tuple[int, ...]], roles: Mapping[str, str], dtype: str, scheme: Scheme
) -> StoreBytes:
    """Bytes of the store that a conversion would write, from shapes alone.

    sites: as in the checkpoint. backbone: shapes by name of all tensors that the checkpoint has beside the experts (a
    tied head is none of them), all of `dtype`. roles: of `shapes.backbone_roles`. Tested against stores.
    """
    forms = {name: scheme.precision(roles[name]) for name in backbone if name in roles}
    packed = {name: form for name, form in forms.items() if form is not None}
    quantized = sum(packed_nbytes(backbone[n], f.bits, f.group_size, scheme.metadata_bits) for n, f in packed.items())
    copied = sum(math.prod(shape) for name, shape in backbone.items() if name not in packed)
    experts = sum(stride(site) * site.num_experts for site in quantized_sites(tuple(sites), scheme))
    return StoreBytes(experts, quantized, copied * shapes.dtype_nbytes(dtype))


def read_manifest(folder: Path) -> dict:
    """The manifest of the store in `folder`, of this version, with every file it names present in full."""
    manifest = read_json(folder / MANIFEST)
    if manifest.get("format") != FORMAT or manifest.get("version") != VERSION:
        raise CheckpointError(
            f"{folder / MANIFEST} is no store of version {VERSION}: convert the original again with this mixoff"
        )
    try:
        files = [(entry["file"], entry["stride"], entry["num_experts"]) for entry in manifest["sites"]]
        files += [(entry["file"], entry["nbytes"], 1) for entry in manifest["backbone"]]
    except (KeyError, TypeError) as error:
        raise _damaged(folder, error) from None
    if odd := [entry for entry in files if [type(value) for value in entry] != [str, int, int]]:
        raise _damaged(folder, TypeError(f"a file, its bytes and its experts cannot be {odd[0]}"[:200]))
    for file, nbytes in ((file, nbytes * count) for file, nbytes, count in files):
        _expect_file(folder, file, nbytes)
    return manifest


def _damaged(folder: Path, error: Exception) -> CheckpointError:
    return CheckpointError(f"{folder / MANIFEST} is damaged ({error!r}): convert the original again")


def _open_store(folder: Path) -> Source:
    return _described(folder, read_manifest(folder))


def _described(folder: Path, manifest: dict) -> Source:
    """Sites follow from configuration and scheme; the manifest has to say the same of them, and files hold the rest."""
    try:
        scheme, dtype = Scheme.from_json(json.dumps(manifest["scheme"])), manifest["dtype"]
        shapes.dtype_nbytes(dtype)
        plain = shapes.expert_sites(shapes.skeleton(shapes.read_config(folder)), dtype)
        built = quantized_sites(published.stored_sites(plain, manifest["sites"]), scheme)
        stored = [{key: entry[key] for key in ("stride", *asdict(built[0]))} for entry in manifest["sites"]]
        files = [entry["file"] for entry in manifest["sites"]]
    except (KeyError, TypeError, AttributeError) as error:
        raise _damaged(folder, error) from None
    if json.dumps(stored) != json.dumps([{"stride": stride(site), **asdict(site)} for site in built]):
        raise CheckpointError(
            f"{folder}: mixoff.json and config.json describe different experts: convert the original again"
        )
    extents = {
        (i, e): [Extent(file, e * stride(site), 0, site.expert_nbytes)]
        for i, (site, file) in enumerate(zip(built, files, strict=True))
        for e in range(site.num_experts)
    }
    tensors = _stored_backbone(folder, manifest)
    quantized = {name: tuple(meta["shape"]) for name, meta in described_quantized(folder).items()}
    backbone.check(folder, _sizes(folder, tensors) | quantized)
    return Source(folder, built, dtype, scheme, ExpertReader(folder, extents), backbone=tensors)


def _stored_backbone(folder: Path, manifest: dict) -> dict[str, TensorRange]:
    """The tensors that a store keeps as they were, in the files of its manifest."""
    files = [entry["file"] for entry in manifest["backbone"] if entry["file"] != QUANTIZED]
    return {name: t for file in files for name, t in read_header(folder / file).items()}


def _expect_file(folder: Path, file: str, nbytes: int) -> None:
    if Path(file).name != file:
        raise CheckpointError(f"{folder / MANIFEST} points outside its folder, to {file!r}: do not trust this store")
    if not (folder / file).is_file():
        raise CheckpointError(f"{folder} lacks {file}: the copy is incomplete, copy or convert it again")
    if (size := (folder / file).stat().st_size) != nbytes:
        raise CheckpointError(
            f"{folder / file} holds {size} bytes, expected {nbytes}: the copy is incomplete, copy or convert it again"
        )


def described_quantized(folder: Path) -> dict[str, dict]:
    """What a store says of its backbone's quantized weights, by name; nothing where its scheme quantizes none."""
    from safetensors import SafetensorError, safe_open

    if not (folder / QUANTIZED).exists():
        return {}
    try:
        with safe_open(folder / QUANTIZED, framework="pt") as f:
            described = json.loads(f.metadata()["mixoff"])
        tensors = read_header(folder / QUANTIZED)
        for name, meta in described.items():
            form = tuple(meta["shape"]), meta["bits"], meta["group_size"], meta["metadata_bits"]
            for part, size, _ in layout(*form):
                if (stored := tensors[f"{name}.{part}"].shape) != size:
                    raise ValueError(f"{name}.{part} has shape {stored}, its description says {size}")
        return described
    except (SafetensorError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{folder / QUANTIZED} is damaged ({error}): convert the original again") from None


def read_quantized(folder: Path) -> dict[str, QTensor]:
    """The quantized weights of a store's backbone by name, none where its scheme keeps the backbone as it is."""
    from safetensors import SafetensorError, safe_open

    if not (described := described_quantized(folder)):
        return {}
    try:
        with safe_open(folder / QUANTIZED, framework="pt") as f:
            # one piece of memory for all: most matrices alone would end amid a huge page, and have small ones there
            room, read = slab((folder / QUANTIZED).stat().st_size + LINE * len(described)), {}
            for name, meta in described.items():
                parts = {part: f.get_tensor(f"{name}.{part}") for part in part_names(meta)}
                read[name] = QTensor.from_tensors(parts, meta, room)
                room = room[-(-read[name].nbytes // LINE) * LINE :]
            return read
    except (SafetensorError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{folder / QUANTIZED} is damaged ({error}): convert the original again") from None


@contextmanager
def open_backbone(source: Source) -> Iterator[tuple[dict[str, QTensor | StridedTensor], dict[str, object]]]:
    """The backbone's quantized weights by name, and its other tensors as slices of the files that `source` reads."""
    with backbone.opened(source.folder, source.backbone) as slices:
        quantized = published.read_matrices(source.folder, source.backbone, lambda name: slices[name][...])
        if source.is_store:
            quantized |= read_quantized(source.folder)
        yield quantized, {name: slices[name] for name in published.plain_names(slices)}


def part_names(meta: dict) -> list[str]:
    """Names of the parts of a quantized weight that is described so."""
    return [
        name for name, _, _ in layout(tuple(meta["shape"]), meta["bits"], meta["group_size"], meta["metadata_bits"])
    ]


def verify(path: str | Path, full: bool = False) -> dict:
    """Check the store at `path`: every file and size, and with `full` the SHA-256 of every tensor.

    Returns `{"experts": n, "tensors": n, "nbytes": n}` of what was checked. Raises CheckpointError, which names the
    first tensor that is not what the conversion wrote.
    """
    folder = local_folder(path)
    manifest = read_manifest(folder)
    source = _described(folder, manifest)
    source.close()
    checked = {"experts": sum(site.num_experts for site in source.sites), "tensors": 0, "nbytes": 0}
    for file, offset, nbytes, name, sha256 in _hashed_ranges(folder, source, manifest):
        if full and _sha256(folder / file, offset, nbytes) != sha256:
            raise CheckpointError(f"{name} in {folder / file} is damaged: copy or convert the store again")
        checked["tensors"], checked["nbytes"] = checked["tensors"] + 1, checked["nbytes"] + nbytes
    return checked


def _hashed_ranges(folder: Path, source: Source, manifest: dict) -> Iterator[tuple[str, int, int, str, str]]:
    """File, offset, size, name and SHA-256 of every tensor of a store."""
    try:
        for site, entry in zip(source.sites, manifest["sites"], strict=True):
            for e in range(site.num_experts):
                for part, sha256 in zip(site.parts, entry["sha256"][e], strict=True):
                    offset = e * stride(site) + part.offset
                    name = f"{site.name}.{e}.{part.name} (layer {site.layer}, expert {e})"
                    yield entry["file"], offset, part.nbytes, name, sha256
        for entry in manifest["backbone"]:
            tensors = read_header(folder / entry["file"])
            if tensors.keys() != entry["sha256"].keys():
                raise CheckpointError(f"{folder / entry['file']} holds other tensors than were written: convert again")
            for name, t in tensors.items():
                yield t.file, t.offset, t.nbytes, name, entry["sha256"][name]
    except (KeyError, IndexError, TypeError, AttributeError, ValueError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise _damaged(folder, error) from None


def _sha256(path: Path, offset: int, nbytes: int) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as f:
        f.seek(offset)
        while nbytes > 0 and (piece := f.read(min(nbytes, 1 << 22))):
            digest.update(piece)
            nbytes -= len(piece)
    return digest.hexdigest()
