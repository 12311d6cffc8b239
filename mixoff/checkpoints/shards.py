"""Where a conversion gets its bytes: the shards of a model, on disk or fetched one at a time.

The headers of all shards are read before any shard. They tell where every expert is, how large the store will be, and
which shard completes which expert.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable
from io import FileIO
from itertools import accumulate
from pathlib import Path
from typing import Protocol

from mixoff.checkpoints.checkpoint import Checkpoint
from mixoff.checkpoints.model_files import MODELOPT, SIDE_FILES
from mixoff.checkpoints.published import open_checkpoint
from mixoff.errors import CheckpointError
from mixoff.folders import sync

CHUNK = 1 << 22  # bytes copied at a time
Range = tuple[str, int, int]  # file, offset, size


class Shards(Protocol):
    """The shards of one model, wherever they are. Implemented by `LocalShards` and `hub.HubShards`.

    - checkpoint: headers of all shards, and the folder with config.json.
    - transient: whether a released shard is gone, so that ranges needed later have to be kept elsewhere first.
    """

    checkpoint: Checkpoint
    transient: bool

    def identity(self) -> str:
        """A text that changes when a shard may have changed: sizes and times of files, or a commit of the Hub."""

    def side_files(self) -> dict[str, bytes]:
        """The small files of the store by plain name: tokenizer, card, and config.json as it should appear there."""

    def acquire(self, file: str) -> Path:
        """The path of a shard, valid until it is released. Raises CheckpointError if it cannot be fetched.

        After a crash a shard may be acquired again, even if it was released before.
        """

    def release(self, file: str) -> None:
        """Release a shard; one that was fetched for the conversion, now or before a crash, is deleted."""

    def close(self) -> None:
        """Release all resources; shards that were there before stay."""


class LocalShards:
    """A model on disk, by its folder or opened already: every shard is there, and stays."""

    transient = False

    def __init__(self, folder: str | Path | Checkpoint) -> None:
        self.checkpoint = folder if isinstance(folder, Checkpoint) else open_checkpoint(folder)

    def identity(self) -> str:
        stats = {file: self.checkpoint.path_of(file).stat() for file in self.checkpoint.files}
        return repr([(file, stat.st_size, stat.st_mtime_ns) for file, stat in stats.items()])

    def side_files(self) -> dict[str, bytes]:
        return read_side_files(self.checkpoint.folder) | self.checkpoint.side_changes()

    def acquire(self, file: str) -> Path:
        return self.checkpoint.path_of(file)

    def release(self, file: str) -> None:
        pass

    def close(self) -> None:
        pass


def read_side_files(folder: Path) -> dict[str, bytes]:
    """The small files of a model folder, except those about its shards: a store has its own index."""
    paths = {p.name: p for pattern in SIDE_FILES for p in folder.glob(pattern) if p.is_file()}
    kept = (name for name in sorted(paths) if not name.endswith(".index.json") and name != MODELOPT)
    return {name: paths[name].read_bytes() for name in kept}


# One shard at a time --------------------------------------------------------------------------------------------------


def walk(files: Iterable[str], needs: Iterable[Iterable[Range]]) -> list[str]:
    """An order of the shards in which few bytes of them have to be kept for later.

    - files: names of the shards.
    - needs: ranges of each weight, which is read as soon as its last shard is there.

    Returns the order of `files`, or a greedy one if its peak is lower.

    >>> walk("abc", [[("a", 0, 9), ("c", 0, 9)], [("b", 0, 5), ("c", 9, 5)]])
    ['b', 'c', 'a']
    """
    split = [sizes for sizes in map(_sizes, needs) if len(sizes) > 1]
    return min(list(files), _greedy(files, split), key=lambda order: max(_kept(order, split), default=0))


def kept_nbytes(order: list[str], needs: Iterable[Iterable[Range]]) -> int:
    """Peak number of bytes kept of released shards."""
    return max(_kept(order, list(map(_sizes, needs))), default=0)


def _sizes(ranges: Iterable[Range]) -> Counter[str]:
    """Bytes by shard."""
    sizes: Counter[str] = Counter()
    for file, _, nbytes in ranges:
        sizes[file] += nbytes
    return sizes


def _kept(order: list[str], split: list[Counter[str]]) -> list[int]:
    """Bytes kept after each shard of an order: ranges of weights that a later shard completes."""
    place = {file: i for i, file in enumerate(order)}
    change = [0] * len(order)
    for sizes in split:
        for file, nbytes in sizes.items():
            change[place[file]] += nbytes
            change[max(place[file] for file in sizes)] -= nbytes
    return list(accumulate(change))


def _greedy(files: Iterable[str], split: list[Counter[str]]) -> list[str]:
    """An order whose next shard is always the one after which the fewest bytes are kept."""
    left = list(files)
    order = []
    missing = [set(sizes) for sizes in split]
    users = {file: [i for i, sizes in enumerate(split) if file in sizes] for file in left}

    def growth(file: str) -> int:
        last = {i for i in users[file] if missing[i] == {file}}
        return sum(split[i][file] - (i in last) * split[i].total() for i in users[file])

    while left:
        order.append(min(left, key=growth))
        left.remove(order[-1])
        for i in users[order[-1]]:
            missing[i].discard(order[-1])
    return order


class Ranges:
    """Reads ranges of shards: from the shard while it is there, later from the copy that was kept.

    - folder: folder for kept ranges, one file per shard.
    - needs: ranges to keep, by shard.
    """

    def __init__(self, folder: Path, needs: dict[str, Iterable[Range]]) -> None:
        self.folder = folder
        self.needs = {file: _merged(ranges) for file, ranges in needs.items()}
        self.paths: dict[str, Path] = {}
        self.files: dict[Path, FileIO] = {}

    def open(self, file: str, path: Path) -> None:
        """Read `file` from `path` from now on."""
        self.paths[file] = path

    def leave(self, file: str) -> None:
        """Read `file` from its kept ranges from now on."""
        if file in self.paths:
            self._close(self.paths.pop(file))

    def close(self) -> None:
        """Close all files."""
        for path in list(self.files):
            self._close(path)

    def _close(self, path: Path) -> None:
        if path in self.files:
            self.files.pop(path).close()

    def read(self, file: str, offset: int, view: memoryview) -> None:
        """Fill `view` with the bytes of a shard from `offset`. Raises CheckpointError if it ends too early."""
        path = self.paths.get(file, self._kept(file))
        if path not in self.files:
            self.files[path] = path.open("rb", buffering=0)
        self.files[path].seek(offset if file in self.paths else self._place(file, offset))
        while view:
            if not (n := self.files[path].readinto(view[:CHUNK])):
                raise CheckpointError(f"{file} ended too early: it was changed or cut, fetch it again")
            view = view[n:]

    def keep(self, file: str) -> None:
        """Write and sync the ranges of a shard that are needed later."""
        piece = memoryview(bytearray(CHUNK))
        self.folder.mkdir(exist_ok=True)
        with self._kept(file).open("wb") as out:
            for start, nbytes in self.needs[file]:
                for done in range(0, nbytes, CHUNK):
                    part = piece[: min(CHUNK, nbytes - done)]
                    self.read(file, start + done, part)
                    out.write(part)
        sync(self._kept(file))
        sync(self.folder)

    def forget(self, file: str) -> None:
        """Remove the kept ranges of a shard."""
        self._close(self._kept(file))
        self._kept(file).unlink(missing_ok=True)

    def _kept(self, file: str) -> Path:
        return self.folder / f"{file}.kept"

    def _place(self, file: str, offset: int) -> int:
        """Offset of a shard's byte in its file of kept ranges."""
        ranges = self.needs[file]
        i = bisect_right(ranges, offset, key=lambda r: r[0]) - 1
        return sum(nbytes for _, nbytes in ranges[:i]) + offset - ranges[i][0]


def _merged(ranges: Iterable[Range]) -> list[tuple[int, int]]:
    """Offset and size of the ranges of one file, ascending; ranges that touch are joined.

    >>> _merged([("a", 4, 2), ("a", 0, 3), ("a", 6, 1), ("a", 4, 1)])
    [(0, 3), (4, 3)]
    """
    merged: list[tuple[int, int]] = []
    for _, start, nbytes in sorted(ranges):
        end = start + nbytes
        if merged and start <= sum(merged[-1]):
            start, end = merged[-1][0], max(end, sum(merged.pop()))
        merged.append((start, end - start))
    return merged
