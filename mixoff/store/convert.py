"""From a checkpoint to a store: weight by weight, shard by shard, quantized as a scheme says.

Everything is laid out before the first byte is written: which bytes of which shard become which bytes of which file. So
a conversion that was killed at any moment goes on where it stopped, and the store is the same to the byte. While it is
in the making it lies in `TARGET.partial`, beside the journal of what is finished.

Does not know caches or budgets.
"""

from __future__ import annotations

import errno
import hashlib
import logging
import os
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from mixoff._version import __version__
from mixoff.checkpoints.find import open_shards
from mixoff.checkpoints.model_files import INDEX, WHOLE
from mixoff.checkpoints.names import pinned
from mixoff.checkpoints.shards import Range, Ranges, Shards, kept_nbytes, walk
from mixoff.errors import CheckpointError, MixoffError
from mixoff.folders import sync
from mixoff.quantize.scheme import Scheme
from mixoff.quantize.solve import is_finite, loops
from mixoff.shapes import sites
from mixoff.store.blueprint import Blueprint, Weight, index, lay_out, manifest, to_json
from mixoff.store.journal import Journal
from mixoff.store.manifest import FORMAT, MANIFEST, VERSION, marked
from mixoff.store.source import is_store
from mixoff.units import format_nbytes

if TYPE_CHECKING:
    from tqdm import tqdm


COMMIT = 64 << 20  # bytes written between two entries of the journal: what a crash can cost
AGAIN = "run the same command again, and it goes on where it stopped"
KEPT = "kept of "  # what the journal calls that which outlives a shard
PARTS = ("store", "kept", "shards", "journal.new")  # what `TARGET.partial` may hold beside journal and lock
FLOATING = ("float32", "float16", "bfloat16")
MEND = "fetch its file again, or repair the checkpoint; mixoff.load takes it as it is, and computes what it holds"
log = logging.getLogger("mixoff")


class WeightError(CheckpointError):
    """A weight that no store shall hold: the same checkpoint will have it the next time too."""


@dataclass(frozen=True)
class Options:
    """How to convert, none of which changes a byte of the store."""

    jobs: int
    restart: bool
    progress: bool | None

    def __post_init__(self) -> None:
        if type(self.jobs) is not int or self.jobs < 1:
            raise MixoffError(f"jobs is {self.jobs!r}: give a whole number of threads, or leave it out")


@dataclass(frozen=True)
class Report:
    """What a conversion did: the store, the bytes of weights read for it in this run, and what that took.

    peak_nbytes: the most memory that no file backs, beyond what the process held before the first weight.
    """

    target: Path
    source_nbytes: int
    seconds: float
    peak_nbytes: int


def convert(
    source: str | Path | Shards,
    target: str | Path,
    scheme: str | Scheme = "none",
    *,
    revision: str | None = None,
    jobs: int | None = None,
    restart: bool = False,
    progress: bool | None = None,
) -> Path:
    """Write the checkpoint `source` as a store into the new folder `target`; returns the target.

    scheme: bits of each part of the model, a `Scheme` or the name of a preset; `"none"` keeps every weight as it is.
    source: a folder, or a model on the Hub (`org/model`, with a revision as an argument or as `org/model@revision`),
    which is fetched, consumed and deleted shard by shard.
    jobs: threads that quantize; None takes every core. The store is the same bytes for any number.
    progress: a bar on standard error; None shows it on a terminal.

    The store appears under its name only when it is complete. Interrupted, killed or on a full disk, a conversion
    leaves `target.partial`, from which the next one goes on; `restart` begins anew. Memory: at most two experts, the
    backbone's largest tensors and 300 MB. Raises CheckpointError for what cannot be converted, MixoffError for a
    scheme that does not suit the model's widths.
    """
    return run(source, target, scheme, revision=revision, jobs=jobs, restart=restart, progress=progress).target


def run(
    source: str | Path | Shards,
    target: str | Path,
    scheme: str | Scheme = "none",
    *,
    revision: str | None = None,
    jobs: int | None = None,
    restart: bool = False,
    progress: bool | None = None,
) -> Report:
    """`convert`, and what it took."""
    started = time.perf_counter()
    scheme = Scheme.preset(scheme) if isinstance(scheme, str) else scheme
    target, options = Path(target), Options(os.cpu_count() or 1 if jobs is None else jobs, restart, progress)
    partial = target.with_name(target.name + ".partial")
    if target.exists() and not (partial / "journal").exists():
        raise CheckpointError(f"{target} exists already: choose another folder, or remove it first")
    with closing(_open(source, revision, partial / "shards")) as shards:
        plan = lay_out(shards.checkpoint, scheme)
        loops()  # imported before memory is watched
        with _PeakMemory() as peak, _hold(partial, target), _explained(plan, partial, target):
            nbytes = _make(shards, plan, partial, target, options)
    return Report(target, nbytes, time.perf_counter() - started, peak.nbytes)


def _open(source: str | Path | Shards, revision: str | None, downloads: Path) -> Shards:
    if not isinstance(source, (str, Path)):
        return source
    source = pinned(source, revision)
    if is_store(source):
        raise CheckpointError(f"{source} is a store already: load it as it is, or copy the folder")
    return open_shards(source, downloads)


class _PeakMemory(threading.Thread):
    """Looks every 5 ms how much anonymous memory the process has: `with _PeakMemory() as peak`, then `peak.nbytes`."""

    def __enter__(self) -> _PeakMemory:
        self.nbytes, self.before, self.ended = 0, anonymous_nbytes(), threading.Event()
        self.start()
        return self

    def run(self) -> None:
        while not self.ended.wait(0.005):
            self.nbytes = max(self.nbytes, anonymous_nbytes() - self.before)

    def __exit__(self, *error: object) -> None:
        self.ended.set()
        self.join()


def anonymous_nbytes() -> int:
    """Bytes of this process in memory that no file backs; all that are in memory where the system does not tell."""
    try:
        with open("/proc/self/status", encoding="ascii") as status:
            return next(1024 * int(line.split()[1]) for line in status if line.startswith("RssAnon"))
    except (OSError, StopIteration):
        import psutil

        return psutil.Process().memory_info().rss


# From the lock to the rename ------------------------------------------------------------------------------------------


@contextmanager
def _hold(partial: Path, target: Path) -> Iterator[None]:
    """The folder for what is in the making, held against a second conversion, and removed once it holds nothing."""
    from filelock import FileLock, Timeout

    if partial.exists() and (strangers := sorted({p.name for p in partial.iterdir()} - {*PARTS, "journal", "lock"})):
        raise CheckpointError(f"{partial} holds {strangers[0]!r}, which is not of a conversion: move that folder away")
    partial.mkdir(parents=True, exist_ok=True)
    useful, cleared = False, True
    try:
        with FileLock(partial / "lock", timeout=0):
            try:
                yield
            except WeightError:
                raise
            except BaseException:
                useful = (partial / "shards").exists() or bool(Journal(partial / "journal").done)
                raise
            finally:
                if not useful:  # the journal late: a run that is killed here is known to be complete
                    _remove(partial, *PARTS, "journal")
                    cleared = _dissolve(partial)
    except Timeout:
        raise CheckpointError(f"another conversion into {target} is at work: wait for it, or end it first") from None
    finally:
        if not cleared:
            _dissolve(partial)


def _dissolve(partial: Path) -> bool:
    """Remove the lock and the folder around it; False where the system removes no file that is open, as Windows."""
    try:
        _remove(partial, "lock")
        partial.rmdir()
    except OSError:
        return False
    return True


@contextmanager
def _explained(plan: Blueprint, partial: Path, target: Path) -> Iterator[None]:
    """Errors of disks, and interrupts, in words."""
    try:
        yield
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"interrupted: {AGAIN}") from None
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise CheckpointError(f"could not convert into {target}: {error.strerror or error}; {AGAIN}") from error
        missing = _missing_nbytes(plan, partial)
        needs = f"{target} needs {format_nbytes(missing)} more" if missing else f"{target} is nearly complete"
        raise CheckpointError(f"the disk is full ({error.strerror}): {needs}; make room, then {AGAIN}") from error


def _make(shards: Shards, plan: Blueprint, partial: Path, target: Path, options: Options) -> int:
    """Everything between the lock and the rename; returns the bytes of weights that were read."""
    identity, journal = _identity(shards, plan), Journal(partial / "journal")
    if target.exists():  # only the cleaning up is missing, or it is none of ours
        if journal.identity != identity or (partial / "store").exists():
            raise CheckpointError(f"{target} exists already: choose another folder, or remove it first")
        return 0
    _resume(plan, partial, journal, identity, options.restart)
    with closing(journal):
        making = Making(plan, partial / "store", journal)
        steps = _steps(shards, plan)
        _check_space(shards, plan, steps, partial, target)
        journal.begin(identity)
        making.begin()
        with closing(Ranges(partial / "kept", {step.file: step.keep for step in steps})) as ranges:
            try:
                nbytes = _write(making, shards, steps, ranges, options)
            except (KeyboardInterrupt, MixoffError):  # the disk is fine
                making.commit()
                raise
        if _identity(shards, plan) != identity:
            raise CheckpointError("the checkpoint was changed while it was converted: run the same command again")
        making.finish(shards)
    os.replace(partial / "store", target)
    sync(target.parent)
    return nbytes


def _identity(shards: Shards, plan: Blueprint) -> str:
    """What a journal is bound to: the versions, the scheme, every header and the state of the shards."""
    facts = __version__, FORMAT, VERSION, plan.scheme, plan.weights, shards.identity()
    return hashlib.sha256(repr(facts).encode()).hexdigest()


def _resume(plan: Blueprint, partial: Path, journal: Journal, identity: str, restart: bool) -> None:
    """Go on with what is there, or remove it: what another conversion left, and what was damaged since."""
    folder = partial / "store"
    sound = all((folder / f).is_file() and (folder / f).stat().st_size == n for f, n in plan.sizes.items())
    if journal.identity == identity and (sound or not journal.done) and not restart:
        return
    if journal.done and not restart:
        what = "is damaged" if journal.identity == identity else "was begun from another source, scheme or version"
        log.warning("%s %s: beginning anew", partial, what)
    journal.identity, journal.done = None, {}
    _remove(partial, "journal", *PARTS)  # the journal first: what it names is there


def _remove(partial: Path, *names: str) -> None:
    for path in (partial / name for name in names):
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def _missing_nbytes(plan: Blueprint, partial: Path) -> int:
    """Bytes of the store that are not on the disk yet; without the small files."""
    there = {file: partial / "store" / file for file in plan.sizes}
    taken = {file: _taken_nbytes(path) if path.exists() else 0 for file, path in there.items()}
    return sum(max(0, nbytes - taken[file]) for file, nbytes in plan.sizes.items())  # a file takes whole blocks


def _taken_nbytes(path: Path) -> int:
    """Bytes of the disk that a file has; Windows, which counts no blocks, gives a file all of its size at once."""
    stat = path.stat()
    return stat.st_blocks * 512 if hasattr(stat, "st_blocks") else stat.st_size


def _check_space(shards: Shards, plan: Blueprint, steps: list[Step], partial: Path, target: Path) -> None:
    """Refuse before anything is written what cannot end well."""
    needed, passing = _missing_nbytes(plan, partial), 0
    if shards.transient:
        passing = max(t.offset + t.nbytes for t in shards.checkpoint.tensors.values())
        passing += kept_nbytes([step.file for step in steps], [weight.ranges for weight in plan.weights])
    why = f" and {format_nbytes(passing)} for shards on their way" if passing else ""
    if needed + passing > (free := shutil.disk_usage(partial).free):
        raise CheckpointError(
            f"{target} needs {format_nbytes(needed)} more{why}, and the disk has {format_nbytes(free)}: "
            "make room, or choose a target on another disk"
        )


# Shard by shard -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Step:
    """A shard, the weights that it completes, what has to be kept of it, and shards that are done with after it."""

    file: str
    weights: list[Weight]
    keep: list[Range]
    forget: list[str]


def _steps(shards: Shards, plan: Blueprint) -> list[Step]:
    needs = [weight.ranges for weight in plan.weights]
    files = shards.checkpoint.files
    steps = {file: Step(file, [], [], []) for file in (walk(files, needs) if shards.transient else files)}
    place, ends = {file: i for i, file in enumerate(steps)}, {}
    for weight, ranges in zip(plan.weights, needs, strict=True):
        last = max((file for file, _, _ in ranges), key=place.__getitem__)
        steps[last].weights.append(weight)
        for file, *_ in (earlier := [r for r in ranges if r[0] != last]):
            ends[file] = max(last, ends.get(file, file), key=place.__getitem__)
        for r in earlier:
            steps[r[0]].keep.append(r)
    for file, last in ends.items():
        steps[last].forget.append(file)
    return list(steps.values())


def _write(making: Making, shards: Shards, steps: list[Step], ranges: Ranges, options: Options) -> int:
    """Write what is not done yet; returns the bytes of weights that were read."""
    done, nbytes = making.journal.done, 0
    if not shards.transient:
        for step in steps:
            ranges.open(step.file, shards.acquire(step.file))
    with _Workers(options.jobs) as workers, _bar(making, options.progress) as bar:
        for step in steps:
            weights = [weight for weight in step.weights if weight.name not in done]
            keep = shards.transient and step.keep and KEPT + step.file not in done
            if shards.transient and (weights or keep):
                ranges.open(step.file, shards.acquire(step.file))
            for weight in workers.convert(weights, making, ranges):
                bar.update(weight.part.nbytes)
                nbytes += weight.part.nbytes
            if shards.transient:
                _let_go(making, shards, step, ranges, bool(keep))
        making.commit()
    return nbytes


def _let_go(making: Making, shards: Shards, step: Step, ranges: Ranges, keep: bool) -> None:
    """The shard has been used up, now or before a crash: keep what others need, note that, and only then release it."""
    if keep:
        ranges.keep(step.file)
        making.journal.add(KEPT + step.file, [])
    making.commit()
    ranges.leave(step.file)
    shards.release(step.file)
    for file in step.forget:
        ranges.forget(file)


def _bar(making: Making, progress: bool | None) -> tqdm:
    from tqdm.auto import tqdm

    sizes = {weight.name: weight.part.nbytes for weight in making.plan.weights}
    done = sum(nbytes for name, nbytes in sizes.items() if name in making.journal.done)
    hidden = not (sys.stderr.isatty() if progress is None else progress)
    return tqdm(total=sum(sizes.values()), initial=done, unit="B", unit_scale=True, disable=hidden, desc="converting")


# Weight by weight -----------------------------------------------------------------------------------------------------


class _Workers:
    """Threads of a conversion: one reads ahead, one writes behind, the others quantize blocks of one weight."""

    def __init__(self, jobs: int) -> None:
        self.reader, self.writer, self.solvers = (ThreadPoolExecutor(n) for n in (1, 1, jobs))

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
    """Each item with what `work` makes of it, one ahead of the caller."""
    waiting: tuple | None = None
    for item in items:
        following = item, pool.submit(work, item)
        if waiting:
            yield waiting[0], waiting[1].result()
        waiting = following
    if waiting:
        yield waiting[0], waiting[1].result()


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
    if weight.role is None:
        return raw
    try:
        return scheme.quantize(w.t() if weight.transposed else w, weight.role, each).to_buffer().numpy()
    except MixoffError as error:
        raise WeightError(f"{weight.where}: {error}") from None


class Making:
    """The files of a store in the making, and the journal of what stands in them for certain."""

    def __init__(self, plan: Blueprint, folder: Path, journal: Journal) -> None:
        self.plan, self.folder, self.journal = plan, folder, journal
        self.files: dict[str, FileIO] = {}
        self.waiting_nbytes = 0

    def begin(self) -> None:
        """Make every file in its size, with what it begins with."""
        self.folder.mkdir(exist_ok=True)
        for file, nbytes in self.plan.sizes.items():
            with (self.folder / file).open("ab"):  # makes it, and leaves what is in it
                os.truncate(self.folder / file, nbytes)
            if file in self.plan.heads:
                self._write(file, 0, self.plan.heads[file])
        self.commit()
        sync(self.folder)

    def put(self, weight: Weight, image: np.ndarray) -> Weight:
        """Write the outputs of a weight; every 64 MB what was written is made certain."""
        hashes, rest = [], memoryview(image)
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
        """Bytes first, then the journal that names them."""
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
        """Add the small files, the manifest last, and nothing else."""
        small = marked(shards.side_files()) | {MANIFEST: to_json(manifest(self.plan, self.journal.done))}
        if shards.checkpoint.files != [WHOLE]:
            small[INDEX] = to_json(index(self.plan))
        for path in self.folder.iterdir():
            if path.name not in self.plan.sizes:
                path.unlink()
        for name in sorted(small, key=lambda name: name == MANIFEST):
            if Path(name).name != name or name in self.plan.sizes:
                raise CheckpointError(f"{name!r} is no name for a small file of a store: do not trust this checkpoint")
            (self.folder / name).write_bytes(small[name])
            sync(self.folder / name)
        sync(self.folder)
