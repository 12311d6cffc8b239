"""Checks a store: every file, every size, and on request every byte."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

from mixoff.checkpoints.checkpoint import read_header
from mixoff.checkpoints.find import find
from mixoff.errors import CheckpointError
from mixoff.shapes.sites import stride
from mixoff.store.manifest import damaged, read_manifest
from mixoff.store.source import Source, open_store


def verify(path: str | Path, full: bool = False) -> dict:
    """Check the store at `path`: every file and every size.

    - path: a folder or a Hub id.
    - full: whether to check the SHA-256 of every tensor as well.

    Returns counts of what was checked: `{"experts": n, "tensors": n, "nbytes": n}`. Raises CheckpointError, which names
    the first tensor that differs from what the conversion wrote.
    """
    files = find(path)
    folder = files.path
    manifest = read_manifest(folder)
    source = open_store(files, manifest)
    source.close()
    checked = {"experts": sum(site.num_experts for site in source.sites), "tensors": 0, "nbytes": 0}
    for file, offset, nbytes, name, sha256 in _hashed_ranges(folder, source, manifest):
        if full and _sha256(folder / file, offset, nbytes) != sha256:
            raise CheckpointError(f"{name} in {folder / file} is damaged: copy or convert the store again")
        checked["tensors"] += 1
        checked["nbytes"] += nbytes
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
        raise damaged(folder, error) from None


def _sha256(path: Path, offset: int, nbytes: int) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as f:
        f.seek(offset)
        while nbytes > 0 and (piece := f.read(min(nbytes, 1 << 22))):
            digest.update(piece)
            nbytes -= len(piece)
    return digest.hexdigest()
