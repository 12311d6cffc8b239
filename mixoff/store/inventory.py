"""The models on this machine: bundled ones, kept stores, stores in folders, and models in the Hub's cache, with sizes.

Nothing here imports torch. What is removed was written by mixoff or huggingface_hub; a person's own files never are.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field, replace
from fnmatch import fnmatch
from pathlib import Path

from mixoff import folders, models
from mixoff.checkpoints.model_files import MANIFEST, SIDE_FILES, configurations, read_json
from mixoff.checkpoints.names import full
from mixoff.errors import CheckpointError, MixoffError, suggestion
from mixoff.store.journal import PARTS
from mixoff.units import format_nbytes

PARTIAL = ".partial"  # ending of a conversion that has not ended
STORE = (*SIDE_FILES, "experts-*.bin", "*.safetensors")  # names of the files of a store
UNFINISHED = (*PARTS, "journal", "lock")
EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")  # what config.json calls E


@dataclass(frozen=True)
class Entry:
    """A model on this machine.

    - name: name to give to any command.
    - kind: `bundled`, `kept` (a store that `--scheme` made), `gguf` (configuration and tokenizer of a GGUF file),
      `unfinished`, `store` or `hub`.
    - nbytes: bytes on the disk.
    - path: folder.
    - bits: bits per weight of the experts of a store, without metadata; None if unknown.
    - revisions: commits in the Hub's cache.
    """

    name: str
    kind: str
    nbytes: int
    path: Path
    bits: int | None = None
    revisions: tuple[str, ...] = field(default=(), repr=False)

    def to_dict(self) -> dict:
        """Plain figures, as `mixoff list --json` prints them."""
        return {"name": self.name, "kind": self.kind, "nbytes": self.nbytes, "path": str(self.path), "bits": self.bits}


def entries(within: Iterable[str | Path] = (".",)) -> list[Entry]:
    """All models, largest first within a kind.

    within: folders that are stores, or hold some; only one level is searched
    """
    kept = sorted(folder for room in ("stores", "bench") for folder in _folders(folders.cache_folder() / room))
    stores = [folder for place in within for folder in (Path(place), *_folders(Path(place)))]
    listed = [Entry(name, "bundled", nbytes_of(models.path(name)), models.path(name)) for name in models.names()]
    listed += [_converted(folder, "kept") for folder in kept if _is_ours(folder)]
    made = [folder for folder in _folders(folders.cache_folder() / "gguf") if (folder / "config.json").is_file()]
    listed += [Entry(str(folder), "gguf", nbytes_of(folder), folder) for folder in made]
    known = {entry.path.resolve() for entry in listed}
    stores = [folder for folder in stores if _is_ours(folder) and folder.resolve() not in known]
    listed += [_converted(folder, "store") for folder in stores]
    order = ("bundled", "kept", "gguf", "store", "unfinished", "hub")
    return sorted([*listed, *_on_hub()], key=lambda entry: (order.index(entry.kind), -entry.nbytes, entry.name))


def _folders(place: Path) -> list[Path]:
    with suppress(OSError):
        return [path for path in place.iterdir() if path.is_dir() and not path.is_symlink()]
    return []


def _is_ours(folder: Path) -> bool:
    """Whether a folder is a store, or an unfinished conversion."""
    return (folder / MANIFEST).is_file() or (folder.name.endswith(PARTIAL) and (folder / "journal").is_file())


def _converted(folder: Path, kind: str) -> Entry:
    kind = "unfinished" if folder.name.endswith(PARTIAL) else kind
    return Entry(str(folder), kind, nbytes_of(folder), folder, _bits(folder))


def _bits(folder: Path) -> int | None:
    """Bits per weight of a store's experts, if all have the same."""
    with suppress(OSError, ValueError, AttributeError, TypeError):
        experts = read_json(folder / MANIFEST)["scheme"].get("experts")
        bits = experts["bits"] if experts else 16
        return bits if isinstance(bits, int) else None
    return None


def nbytes_of(folder: Path) -> int:
    """Bytes of the files in a folder; links count as what they name."""
    total = 0
    for root, _, files in os.walk(folder):
        for name in files:
            with suppress(OSError):  # files come and go
                total += os.stat(os.path.join(root, name)).st_size
    return total


def _on_hub() -> Iterator[Entry]:
    """Mixture-of-Experts models in the Hub's cache."""
    from huggingface_hub import CacheNotFound, constants, scan_cache_dir

    with suppress(CacheNotFound, OSError):
        for repo in scan_cache_dir(constants.HF_HUB_CACHE).repos:
            if repo.repo_type == "model" and any(_has_experts(r.snapshot_path) for r in repo.revisions):
                commits = tuple(sorted(revision.commit_hash for revision in repo.revisions))
                yield Entry(repo.repo_id, "hub", repo.size_on_disk, repo.repo_path, None, commits)


def _has_experts(folder: Path) -> bool:
    """Whether config.json describes experts, or the folder is a store."""
    with suppress(OSError, ValueError, AttributeError):
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        return any(key in part for part in configurations(config) for key in EXPERTS)
    return (folder / MANIFEST).is_file()


# Removing -------------------------------------------------------------------------------------------------------------


def find(name: str, listed: Iterable[Entry]) -> Entry:
    """The entry that `name` means: its name, its folder, or the folder's last part. Raises CheckpointError."""
    listed = list(listed)
    wanted = full(name)
    path = Path(os.path.expanduser(name))
    for entry in listed:
        if entry.name == wanted or (os.path.exists(path) and entry.path.resolve() == path.resolve()):
            return entry
    if len(same := [entry for entry in listed if entry.path.name == name]) == 1:
        return same[0]
    if os.path.exists(path):
        raise CheckpointError(f"{name} is not a store of mixoff, so it stays: remove it by hand")
    known = {spelling for entry in listed for spelling in (entry.name, entry.path.name)}
    raise CheckpointError(f"no model here is called {name}: `mixoff list` names all{suggestion(name, known)}")


def remove(entry: Entry) -> None:
    """Delete a model. Raises MixoffError for what must stay, and while a conversion writes it."""
    if entry.kind == "bundled":
        raise MixoffError(f"{entry.name} is part of mixoff and stays: it takes {format_nbytes(entry.nbytes)}")
    if entry.kind == "hub":
        return _remove_from_hub_cache(entry)
    try:
        if entry.kind == "unfinished":
            _remove_unfinished(entry.path)
        else:
            _remove_store(entry.path, SIDE_FILES if entry.kind == "gguf" else STORE)
    except OSError as error:
        raise MixoffError(f"cannot remove {entry.path}: {error.strerror or error}; check its permissions") from error


def _remove_from_hub_cache(entry: Entry) -> None:
    from huggingface_hub import constants, scan_cache_dir

    info = scan_cache_dir(constants.HF_HUB_CACHE)
    # commits alone would leave it open which model they belong to
    alone = replace(info, repos=frozenset(repo for repo in info.repos if repo.repo_path == entry.path))
    alone.delete_revisions(*entry.revisions).execute()
    if entry.path.exists():  # huggingface_hub only warns
        raise MixoffError(f"cannot remove all of {entry.path}: check its permissions, then run the command again")


def _remove_store(folder: Path, patterns: Iterable[str]) -> None:
    _check(folder, patterns)
    shutil.rmtree(folder)
    Path(f"{folder}.lock").unlink(missing_ok=True)  # of `kept.store_of`


def _remove_unfinished(folder: Path) -> None:
    from filelock import FileLock, Timeout

    _check(folder, UNFINISHED)
    try:
        with FileLock(folder / "lock", timeout=0):
            for part in PARTS:
                shutil.rmtree(folder / part, ignore_errors=True)
    except Timeout:
        raise MixoffError(f"{folder} is being written by another process: wait for it, or end it") from None
    shutil.rmtree(folder)


def _check(folder: Path, patterns: Iterable[str]) -> None:
    """Refuse a folder with files that no conversion writes."""
    strange = (p.name for p in folder.iterdir() if not any(fnmatch(p.name, pattern) for pattern in patterns))
    if (name := next(strange, None)) is not None:
        raise MixoffError(f"{folder} holds {name}, which mixoff did not write: remove the folder by hand")
