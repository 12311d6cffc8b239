"""Where a conversion takes its bytes from: the shards of a model, at hand or fetched one at a time.

The headers of all shards are known before any shard is: so it is known up front which expert stands where, how large
the store will be, and which shard completes which expert. Does not know stores, schemes or progress.
"""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

from mixoff import models
from mixoff.checkpoint import Checkpoint
from mixoff.errors import CheckpointError

SIDE_FILES = ("*.json", "*.model", "*.txt", "*.jinja", "README.md", "LICENSE*", "NOTICE*")  # tokenizer, card, licences


class Shards(Protocol):
    """The shards of one model, in any place.

    checkpoint: their headers, and the folder with config.json. transient: whether a released shard is gone, so that
    what is still needed of it has to be kept elsewhere first. Implemented by `LocalShards`, and for the Hub in `hub`.
    """

    checkpoint: Checkpoint
    transient: bool

    def identity(self) -> str:
        """A text that changes when the content of a shard may have: sizes and times of files, a commit of the Hub."""

    def side_files(self) -> dict[str, bytes]:
        """The small files of the store by plain name: config.json as the store shall have it, tokenizer, card."""

    def acquire(self, file: str) -> Path:
        """The path of that shard, which stays there until it is released. Raises CheckpointError when it cannot be had.

        It may be asked for again after a crash, even if it was released before.
        """

    def release(self, file: str) -> None:
        """The shard is not needed any more; one that was fetched for us is deleted."""

    def close(self) -> None:
        """Give back what is held; shards that were kept by somebody else stay."""


class LocalShards:
    """A model folder on disk: every shard is at hand, and stays."""

    transient = False

    def __init__(self, folder: str | Path) -> None:
        self.checkpoint = Checkpoint(folder)

    def identity(self) -> str:
        stats = {file: (self.checkpoint.folder / file).stat() for file in self.checkpoint.files}
        return repr([(file, stat.st_size, stat.st_mtime_ns) for file, stat in stats.items()])

    def side_files(self) -> dict[str, bytes]:
        return read_side_files(self.checkpoint.folder)

    def acquire(self, file: str) -> Path:
        return self.checkpoint.folder / file

    def release(self, file: str) -> None:
        pass

    def close(self) -> None:
        pass


def read_side_files(folder: Path) -> dict[str, bytes]:
    """The small files of a model folder, without the index of its shards, which a store writes anew."""
    found = {p.name: p for pattern in SIDE_FILES for p in folder.glob(pattern) if p.is_file()}
    return {name: path.read_bytes() for name, path in sorted(found.items()) if not name.endswith(".index.json")}


def open_shards(source: str | Path) -> Shards:
    """The shards of a checkpoint: a folder, a bundled model, or a Hub id in the local Hub cache."""
    return LocalShards(local_folder(source))


def local_folder(path: str | Path) -> Path:
    """The folder of a model: itself, a bundled model's by name, or a Hub id's in the local Hub cache."""
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
