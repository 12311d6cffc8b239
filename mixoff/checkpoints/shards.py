"""Where a conversion takes its bytes from: the shards of a model, at hand or fetched one at a time.

The headers of all shards are known before any shard is: so it is known up front which expert stands where, how large
the store will be, and which shard completes which expert. Does not know stores, schemes or progress.
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
from mixoff.checkpoints.published import open_checkpoint
from mixoff.errors import CheckpointError
from mixoff.folders import sync

CHUNK = 1 << 22  # bytes copied at a time
Range = tuple[str, int, int]  # file, offset, size
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
        """The shard is not needed any more; one that was fetched for us, by this process or before, is deleted."""

    def close(self) -> None:
        """Give back what is held; shards that were kept by somebody else stay."""


class LocalShards:
    """A model folder on disk: every shard is at hand, and stays."""

    transient = False

    def __init__(self, folder: str | Path) -> None:
        self.checkpoint = open_checkpoint(folder)

    def identity(self) -> str:
        stats = {file: (self.checkpoint.folder / file).stat() for file in self.checkpoint.files}
        return repr([(file, stat.st_size, stat.st_mtime_ns) for file, stat in stats.items()])

    def side_files(self) -> dict[str, bytes]:
        return read_side_files(self.checkpoint.folder) | self.checkpoint.side_changes()

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


# One shard at a time --------------------------------------------------------------------------------------------------


def walk(files: Iterable[str], needs: Iterable[Iterable[Range]]) -> list[str]:
    """The shards in an order that leaves little to be kept of them, when each of `needs` is read as soon as it can be.

    That is the order of `files`, or a greedy one where its peak is lower.

    >>> walk("abc", [[("a", 0, 9), ("c", 0, 9)], [("b", 0, 5), ("c", 9, 5)]])
    ['b', 'c', 'a']
    """
    split = [sizes for sizes in map(_sizes, needs) if len(sizes) > 1]
    return min(list(files), _greedy(files, split), key=lambda order: max(_kept(order, split), default=0))


def kept_nbytes(order: list[str], needs: Iterable[Iterable[Range]]) -> int:
    """The most bytes of released shards that are kept at any time."""
    return max(_kept(order, list(map(_sizes, needs))), default=0)


def _sizes(ranges: Iterable[Range]) -> Counter[str]:
    """Bytes by shard."""
    sizes: Counter[str] = Counter()
    for file, _, nbytes in ranges:
        sizes[file] += nbytes
    return sizes


def _kept(order: list[str], split: list[Counter[str]]) -> list[int]:
    """Bytes that are kept after each shard of an order: of all that a later one completes."""
    place, change = {file: i for i, file in enumerate(order)}, [0] * len(order)
    for sizes in split:
        for file, nbytes in sizes.items():
            change[place[file]] += nbytes
            change[max(place[file] for file in sizes)] -= nbytes
    return list(accumulate(change))


def _greedy(files: Iterable[str], split: list[Counter[str]]) -> list[str]:
    """Next is always the shard after which the least is kept."""
    left, order, missing = list(files), [], [set(sizes) for sizes in split]
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
    """Ranges of shards: read from a shard while it is at hand, and from what was kept of it afterwards.

    folder: where parts of shards are kept, each in a file of its own. needs: by shard, the ranges that outlive it.
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
        """Read `file` from what was kept of it from now on."""
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
        """Fill `view` with the bytes of a shard from `offset`. Raises CheckpointError when it ends too early."""
        path = self.paths.get(file, self._kept(file))
        if path not in self.files:
            self.files[path] = path.open("rb", buffering=0)
        self.files[path].seek(offset if file in self.paths else self._place(file, offset))
        while view:
            if not (n := self.files[path].readinto(view[:CHUNK])):
                raise CheckpointError(f"{file} ended too early: it was changed or cut, fetch it again")
            view = view[n:]

    def keep(self, file: str) -> None:
        """Write the ranges that outlive a shard, to the disk for certain."""
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
        """Remove what was kept of a shard."""
        self._close(self._kept(file))
        self._kept(file).unlink(missing_ok=True)

    def _kept(self, file: str) -> Path:
        return self.folder / f"{file}.kept"

    def _place(self, file: str, offset: int) -> int:
        """Where a byte of a shard stands in what is kept of it."""
        ranges = self.needs[file]
        i = bisect_right(ranges, offset, key=lambda r: r[0]) - 1
        return sum(nbytes for _, nbytes in ranges[:i]) + offset - ranges[i][0]


def _merged(ranges: Iterable[Range]) -> list[tuple[int, int]]:
    """Offset and size of ranges of one file, ascending, those that touch as one.

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
