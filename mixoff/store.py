"""The slow tier: expert images on disk, and the store that keeps each of them in one aligned range.

A store is an ordinary model folder with the backbone (all that is not an expert), beside `experts-NNN.bin`, one file a
MoE layer, one range an expert, and `mixoff.json`, which says what stands where. A plain checkpoint serves as well:
there an expert is gathered from the tensors that hold it.

Does not know caches or policies.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import os
import shutil
import threading
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from io import FileIO
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from mixoff import models, shapes
from mixoff.checkpoint import INDEX, Checkpoint, Extent, TensorRange, read_json
from mixoff.errors import CheckpointError, MixoffError
from mixoff.shapes import PART_ALIGN, Part, Site

if TYPE_CHECKING:
    import torch

MANIFEST = "mixoff.json"
FORMAT, VERSION = "mixoff-store", 1
ALIGN = 4096  # bytes; what direct I/O asks for, and a page
CHUNK = 1 << 22  # bytes copied at a time
SIDE_FILES = ("*.json", "*.model", "*.txt", "*.jinja", "README.md", "LICENSE*", "NOTICE*")  # tokenizer, card, licences


class ExpertReader:
    """Copies expert images from files into memory that the caller owns.

    `extents[site, expert]` says which bytes of which file go where in the image. Thread-safe.
    """

    def __init__(self, folder: Path, extents: dict[tuple[int, int], list[Extent]]) -> None:
        self.extents = extents
        names = sorted({x.file for extent in extents.values() for x in extent})
        self.files = {name: (folder / name).open("rb", buffering=0) for name in names}
        self.lock = threading.Lock()  # for systems without preadv, where a file has one position for all threads

    def read_into(self, site: int, expert: int, image: memoryview) -> int:
        """Fill `image` (writable bytes) with one expert; returns the bytes read.

        Raises CheckpointError when the file ends too early.
        """
        total = 0
        for x in self.extents[site, expert]:
            self._read_exactly(image[x.place : x.place + x.nbytes], x)
            total += x.nbytes
        return total

    def _read_exactly(self, view: memoryview, x: Extent) -> None:
        done = 0
        while done < len(view):
            n = self._read_at(self.files[x.file], view[done:], x.offset + done)
            if n == 0:
                raise CheckpointError(
                    f"{x.file} ends before byte {x.offset + x.nbytes}: it was changed or cut, fetch it again"
                )
            done += n

    def _read_at(self, file: FileIO, view: memoryview, offset: int) -> int:
        if hasattr(os, "preadv"):
            return os.preadv(file.fileno(), [view], offset)
        with self.lock:
            file.seek(offset)
            return file.readinto(view)

    def close(self) -> None:
        """Close the files; reading afterwards is an error."""
        for file in self.files.values():
            file.close()


@dataclass
class Source:
    """A model folder that experts are served from: a store or a plain checkpoint.

    `dtype` is the one that expert weights are stored in, by torch's name.
    """

    folder: Path
    sites: tuple[Site, ...]
    dtype: str
    reader: ExpertReader

    @property
    def expert_nbytes(self) -> int:
        """Bytes of the largest expert image: the size of a slot."""
        return max(site.expert_nbytes for site in self.sites)


def open_source(path: str | Path) -> Source:
    """Open a store or a plain checkpoint for reading: a folder, a bundled model, or a Hub id in the local Hub cache."""
    folder = _local_folder(path)
    if (folder / MANIFEST).exists():
        return _open_store(folder)
    checkpoint = Checkpoint(folder)
    dtype = checkpoint_dtype(checkpoint)
    sites = shapes.expert_sites(shapes.skeleton(shapes.read_config(folder)), dtype)
    return Source(folder, sites, dtype, ExpertReader(folder, checkpoint.extents(sites)))


def checkpoint_dtype(checkpoint: Checkpoint) -> str:
    """The dtype of the experts in `checkpoint`; a dense model is refused by what it is, not by what it lacks."""
    if not checkpoint.expert_names():
        shapes.expert_sites(shapes.skeleton(shapes.read_config(checkpoint.folder)), "float32")
    return checkpoint.expert_dtype()


def _local_folder(path: str | Path) -> Path:
    if str(path) in models.names():
        return models.path(str(path))
    folder = Path(path).expanduser()
    if folder.exists() or str(path).count("/") != 1 or str(path).startswith((".", "~")):
        return folder
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(str(path), local_files_only=True))
    except (LocalEntryNotFoundError, HFValidationError, HfHubHTTPError, OSError):
        raise CheckpointError(
            f"no folder at {path}, and no such model in the local Hub cache: fetch it with `hf download {path}`"
        ) from None


def _open_store(folder: Path) -> Source:
    manifest = read_json(folder / MANIFEST)
    if manifest.get("format") != FORMAT or manifest.get("version") != VERSION:
        raise CheckpointError(
            f"{folder / MANIFEST} is no store of version {VERSION}: convert the original again with this mixoff"
        )
    try:
        sites = tuple(_site_from_json(entry) for entry in manifest["sites"])
        extents = {
            (i, e): [Extent(entry["file"], e * entry["stride"], 0, sites[i].expert_nbytes)]
            for i, entry in enumerate(manifest["sites"])
            for e in range(sites[i].num_experts)
        }
        files = [(entry["file"], entry["stride"] * entry["num_experts"]) for entry in manifest["sites"]]
        files += [(entry["file"], entry["nbytes"]) for entry in manifest["backbone"]]
        dtype = manifest["dtype"]
        shapes.dtype_nbytes(dtype)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{folder / MANIFEST} is damaged ({error!r}): convert the original again") from None
    for file, nbytes in files:
        _expect_file(folder, file, nbytes)
    _expect_sites(sites, shapes.expert_sites(shapes.skeleton(shapes.read_config(folder)), dtype), folder)
    return Source(folder, sites, dtype, ExpertReader(folder, extents))


def _expect_file(folder: Path, file: str, nbytes: int) -> None:
    if Path(file).name != file:
        raise CheckpointError(f"{folder / MANIFEST} points outside its folder, to {file!r}: do not trust this store")
    if not (folder / file).is_file():
        raise CheckpointError(f"{folder} lacks {file}: the copy is incomplete, copy or convert it again")
    if (size := (folder / file).stat().st_size) != nbytes:
        raise CheckpointError(
            f"{folder / file} holds {size} bytes, expected {nbytes}: the copy is incomplete, copy or convert it again"
        )


def _expect_sites(stored: tuple[Site, ...], built: tuple[Site, ...], folder: Path) -> None:
    if stored != built:
        raise CheckpointError(
            f"{folder}: mixoff.json and config.json describe different experts: convert the original again"
        )


def _site_from_json(entry: dict) -> Site:
    parts = tuple(Part(p["name"], tuple(p["shape"]), p["dtype"], p["offset"]) for p in entry["parts"])
    return Site(entry["name"], entry["layer"], entry["num_experts"], parts)


def convert(source: str | Path, target: str | Path, scheme: str = "none") -> Path:
    """Write the checkpoint in folder `source` as a store into the new folder `target`; returns the target.

    `scheme="none"` keeps every weight as it is. Memory: one expert. The store appears under its name
    only when it is complete; an interrupted conversion leaves `target.partial`, which the next one replaces.
    """
    if scheme != "none":
        raise MixoffError(f"unknown scheme {scheme!r}: this version converts with scheme 'none' only")
    target = Path(target)
    if target.exists():
        raise CheckpointError(f"{target} exists already: choose another folder, or remove it first")
    opened = open_source(source)
    if (opened.folder / MANIFEST).exists():
        opened.reader.close()
        raise CheckpointError(f"{source} is a store already: load it as it is, or copy the folder")
    partial = target.with_name(target.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        _write_store(opened, partial)
        os.replace(partial, target)
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise CheckpointError(f"could not write {target}: {error.strerror or error}; nothing was kept") from error
    finally:
        opened.reader.close()
    return target


def _write_store(source: Source, folder: Path) -> None:
    entries = []
    for i, site in enumerate(source.sites):
        file, stride = f"experts-{i:03d}.bin", -(-site.expert_nbytes // ALIGN) * ALIGN
        hashes = [_write_image(folder / file, image) for image in _images(source, i, stride)]
        parts = [asdict(part) | {"shape": list(part.shape)} for part in site.parts]
        entries.append({"name": site.name, "layer": site.layer, "num_experts": site.num_experts, "file": file,
                        "stride": stride, "parts": parts, "sha256": hashes})  # fmt: skip
    backbone = _write_backbone(Checkpoint(source.folder), folder)
    for pattern in SIDE_FILES:
        for side in source.folder.glob(pattern):
            if not side.name.endswith(".index.json"):
                shutil.copyfile(side, folder / side.name)
    manifest = {
        "format": FORMAT,
        "version": VERSION,
        "scheme": "none",
        "dtype": source.dtype,
        "backbone": backbone,
        "sites": entries,
    }
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")


def _images(source: Source, site: int, stride: int) -> Iterator[bytearray]:
    """Each expert of a site, padded to the stride with zeros."""
    for expert in range(source.sites[site].num_experts):
        image = bytearray(stride)
        source.reader.read_into(site, expert, memoryview(image))
        yield image


def _write_image(path: Path, image: bytearray) -> str:
    with path.open("ab") as f:
        f.write(image)
    return hashlib.sha256(image).hexdigest()


def _write_backbone(checkpoint: Checkpoint, folder: Path) -> list[dict]:
    """Copy all but the experts, shard by shard under the shards' own names; memory: one chunk of a file."""
    experts, weight_map, entries = checkpoint.expert_names(), {}, []
    for file in checkpoint.files:
        tensors = {n: t for n, t in checkpoint.tensors.items() if t.file == file and n not in experts}
        if tensors:
            sha256 = _copy_tensors(checkpoint.folder / file, tensors, folder / file)
            entries.append({"file": file, "nbytes": (folder / file).stat().st_size, "sha256": sha256})
            weight_map |= dict.fromkeys(tensors, file)
    if (checkpoint.folder / INDEX).exists():
        total = sum(checkpoint.tensors[name].nbytes for name in weight_map)
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        (folder / INDEX).write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")
    return entries


def _copy_tensors(source: Path, tensors: dict[str, TensorRange], target: Path) -> str:
    """Write a safetensors file with some of another's tensors, in the same order; returns its SHA-256.

    The data begins at the same place modulo 64 as in the source: transformers computes from the mapped file, and the
    last bits of a BLAS product may depend on the alignment of its operands.
    """
    ordered = sorted(tensors.items(), key=lambda item: item[1].offset)
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for name, t in ordered:
        header[name] = {"dtype": t.dtype, "shape": t.shape, "data_offsets": [end, end := end + t.nbytes]}
    raw = json.dumps(header, separators=(",", ":")).encode()
    raw += b" " * ((ordered[0][1].offset - 8 - len(raw)) % PART_ALIGN)  # the format allows spaces after the header
    digest = hashlib.sha256()
    with source.open("rb") as f, target.open("wb") as out:
        for piece in (len(raw).to_bytes(8, "little"), raw, *(p for _, t in ordered for p in _pieces(f, t))):
            digest.update(piece)
            out.write(piece)
    return digest.hexdigest()


def _pieces(file: BinaryIO, t: TensorRange) -> Iterator[bytes]:
    """The bytes of one tensor, a chunk at a time."""
    file.seek(t.offset)
    for start in range(0, t.nbytes, CHUNK):
        yield file.read(min(CHUNK, t.nbytes - start))


def slab(nbytes: int) -> torch.Tensor:
    """`nbytes` of memory as a uint8 tensor, aligned to a page, allocated once and given back with its last view."""
    import torch

    if nbytes == 0:
        return torch.empty(0, dtype=torch.uint8)
    return torch.frombuffer(mmap.mmap(-1, nbytes), dtype=torch.uint8)
