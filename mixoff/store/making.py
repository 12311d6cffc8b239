"""The files of a store while a conversion writes them: shard by shard, weight by weight.

A pipeline of threads: one reads a weight ahead, the caller and a pool quantize the current one, one writes the last.
`Making` keeps the invariant that a journal entry follows its bytes to the disk, never the other way round.
"""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from mixoff.checkpoints.shards import Range, Ranges, Shards, walk
from mixoff.errors import CheckpointError, MixoffError
from mixoff.folders import sync
from mixoff.quantize.scheme import Scheme
from mixoff.quantize.solve import is_finite
from mixoff.shapes import sites
from mixoff.store.blueprint import Blueprint, Weight
from mixoff.store.journal import Journal
from mixoff.store.manifest import MANIFEST

if TYPE_CHECKING:
    from tqdm import tqdm


COMMIT = 64 << 20  # bytes written between two entries of the journal: what a crash can cost
KEPT = "kept of "  # prefix of the journal's entries for ranges that outlive their shard
FLOATING = ("float32", "float16", "bfloat16")
MEND = "fetch its file again, or repair the checkpoint; mixoff.load takes it as it is, and computes what it holds"


class WeightError(CheckpointError):
    """A weight that a store must not hold; another attempt from the same checkpoint would meet it again."""


@dataclass(frozen=True)
class Options:
    """Options that do not change a byte of the store; see `convert`."""

    jobs: int | None = None
    restart: bool = False
    progress: bool | None = None

    def __post_init__(self) -> None:
        if self.jobs is not None and (type(self.jobs) is not int or self.jobs < 1):
            raise MixoffError(f"jobs is {self.jobs!r}: give a whole number of threads, 1 or more, or leave it out")


# Shard by shard -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Step:
    """What to do with one shard.

    - file: name of the shard.
    - weights: weights that it completes.
    - keep: ranges of it that later shards need.
    - forget: shards whose kept ranges are not needed after it.
    """

    file: str
    weights: list[Weight]
    keep: list[Range]
    forget: list[str]


def steps_of(shards: Shards, plan: Blueprint) -> list[Step]:
    """The shards in the order in which they are used. A weight is written with the last shard that it needs."""
    needs = [weight.ranges for weight in plan.weights]
    files = shards.checkpoint.files
    steps = {file: Step(file, [], [], []) for file in (walk(files, needs) if shards.transient else files)}
    place = {file: i for i, file in enumerate(steps)}
    ends: dict[str, str] = {}  # the last shard that needs something kept of this one
    for weight, ranges in zip(plan.weights, needs, strict=True):
        last = max((file for file, _, _ in ranges), key=place.__getitem__)
        steps[last].weights.append(weight)
        for r in ranges:
            if (file := r[0]) != last:
                steps[file].keep.append(r)
                ends[file] = max(last, ends.get(file, file), key=place.__getitem__)
    for file, last in ends.items():
        steps[last].forget.append(file)
    return list(steps.values())


def write(making: Making, shards: Shards, steps: list[Step], ranges: Ranges, options: Options) -> int:
    """Write what is not done yet; returns the bytes of weights that were read."""
    done = making.journal.done
    nbytes = 0
    if not shards.transient:
        for step in steps:
            ranges.open(step.file, shards.acquire(step.file))
    with _Workers(options.jobs or os.cpu_count() or 1) as workers, bar(making, options.progress) as shown:
        for step in steps:
            weights = [weight for weight in step.weights if weight.name not in done]
            keep = shards.transient and step.keep and KEPT + step.file not in done
            if shards.transient and (weights or keep):
                ranges.open(step.file, shards.acquire(step.file))
            for weight in workers.convert(weights, making, ranges):
                shown.update(weight.part.nbytes)
                nbytes += weight.part.nbytes
            if shards.transient:
                _let_go(making, shards, step, ranges, bool(keep))
        making.commit()
    return nbytes


def _let_go(making: Making, shards: Shards, step: Step, ranges: Ranges, keep: bool) -> None:
    """Release a shard that is used up, now or before a crash, once what later shards need of it is kept and noted."""
    if keep:
        ranges.keep(step.file)
        making.journal.add(KEPT + step.file, [])
    making.commit()
    ranges.leave(step.file)
    shards.release(step.file)
    for file in step.forget:
        ranges.forget(file)


def bar(making: Making, progress: bool | None) -> tqdm:
    """A bar of the bytes of weights that are written."""
    from tqdm.auto import tqdm

    sizes = {weight.name: weight.part.nbytes for weight in making.plan.weights}
    done = sum(nbytes for name, nbytes in sizes.items() if name in making.journal.done)
    hidden = not (sys.stderr.isatty() if progress is None else progress)
    return tqdm(total=sum(sizes.values()), initial=done, unit="B", unit_scale=True, disable=hidden, desc="converting")


# Weight by weight -----------------------------------------------------------------------------------------------------


class _Workers:
    """Threads of a conversion: one reads ahead, one writes behind, the others quantize blocks of one weight.

    reader    | weight 3 | weight 4 | ...
    solvers   | weight 2 | weight 3 | ...
    writer    | weight 1 | weight 2 | ...
    """

    def __init__(self, jobs: int) -> None:
        self.reader = ThreadPoolExecutor(1)
        self.writer = ThreadPoolExecutor(1)
        self.solvers = ThreadPoolExecutor(jobs)

    def __enter__(self) -> _Workers:
        return self

    def __exit__(self, *error: object) -> None:
        for pool in (self.reader, self.solvers, self.writer):
            pool.shutdown(cancel_futures=True)

    def convert(self, weights: list[Weight], making: Making, ranges: Ranges) -> Iterator[Weight]:
        """Yields each weight once it is written; no more than three are in memory."""
        behind: Future | None = None
        for weight, raw in _ahead(self.reader, lambda weight: _read(weight, ranges), weights):
            image = _image(weight, raw, making.plan.scheme, self.solvers.map)
            if behind:
                yield behind.result()
            behind = self.writer.submit(making.put, weight, image)
        if behind:
            yield behind.result()


def _ahead(pool: ThreadPoolExecutor, work: Callable, items: Iterable) -> Iterator[tuple]:
    """Each item with the result of `work`, which is computed one item ahead of the caller."""
    earlier: tuple | None = None
    for item in items:
        submitted = item, pool.submit(work, item)
        if earlier:
            yield earlier[0], earlier[1].result()
        earlier = submitted
    if earlier:
        yield earlier[0], earlier[1].result()


def _read(weight: Weight, ranges: Ranges) -> np.ndarray:
    """The bytes of a weight as its checkpoint has them, uint8 (nbytes,)."""
    raw = np.empty(weight.part.nbytes, np.uint8)
    for extent in weight.extents:
        extent.fill(memoryview(raw), ranges.read)
    return raw


def _image(weight: Weight, raw: np.ndarray, scheme: Scheme, each: Callable) -> np.ndarray:
    """The bytes of a weight as the store has them, uint8 (nbytes,). Raises WeightError for NaN and infinity."""
    dtype = weight.part.dtype
    if dtype not in FLOATING or weight.part.form is not None:
        return raw
    w = torch.from_numpy(raw).view(sites.torch_dtype(dtype)).view(weight.part.shape)
    if weight.used and not is_finite(w):
        raise WeightError(f"{weight.where} holds NaN or infinity: {MEND}")
    if weight.precision is None:
        return raw
    try:
        q = scheme.quantize_as(w.t() if weight.transposed else w, weight.precision, each)
    except MixoffError as error:
        raise WeightError(f"{weight.where}: {error}") from None
    return q.to_buffer().numpy()


class Making:
    """The files of a store that is being written, and the journal of what is safely in them."""

    def __init__(self, plan: Blueprint, folder: Path, journal: Journal) -> None:
        self.plan, self.folder, self.journal = plan, folder, journal
        self.files: dict[str, FileIO] = {}
        self.waiting_nbytes = 0

    def begin(self) -> None:
        """Create every file in its final size, with its header."""
        self.folder.mkdir(exist_ok=True)
        for file, nbytes in self.plan.sizes.items():
            with (self.folder / file).open("ab"):  # creates it, or leaves its content as it is
                os.truncate(self.folder / file, nbytes)
            if file in self.plan.heads:
                self._write(file, 0, self.plan.heads[file])
        self.commit()
        sync(self.folder)

    def put(self, weight: Weight, image: np.ndarray) -> Weight:
        """Write the outputs of a weight; every COMMIT bytes they are synced and noted in the journal."""
        hashes = []
        rest = memoryview(image)
        for output in weight.outputs:
            piece, rest = rest[: output.nbytes], rest[output.nbytes :]
            self._write(output.file, output.offset, piece)
            hashes.append(hashlib.sha256(piece).hexdigest())
        self.journal.add(weight.name, hashes)
        self.waiting_nbytes += image.nbytes
        if self.waiting_nbytes >= COMMIT:
            self.commit()
        return weight

    def commit(self) -> None:
        """Sync what was written: bytes first, then the journal that names them."""
        for file in list(self.files):
            os.fsync(self.files[file].fileno())
            self.files.pop(file).close()
        self.journal.commit()
        self.waiting_nbytes = 0

    def _write(self, file: str, offset: int, piece: bytes | memoryview) -> None:
        if file not in self.files:
            self.files[file] = (self.folder / file).open("r+b", buffering=0)
        self.files[file].seek(offset)
        rest = memoryview(piece)
        while rest:
            rest = rest[self.files[file].write(rest) :]

    def finish(self, shards: Shards) -> None:
        """Add the small files, the manifest last, and remove whatever does not belong to the store."""
        small = self.plan.small_files(shards, self.journal.done)
        for path in self.folder.iterdir():
            if path.name not in self.plan.sizes:
                path.unlink()
        for name in sorted(small, key=lambda name: name == MANIFEST):
            if Path(name).name != name or name in self.plan.sizes:
                raise CheckpointError(
                    f"{name!r} is not a name for a small file of a store: do not trust this checkpoint"
                )
            (self.folder / name).write_bytes(small[name])
            sync(self.folder / name)
        sync(self.folder)
