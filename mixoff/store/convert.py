"""Converts a checkpoint into a store, quantized as a scheme says, so that it survives being killed at any moment.

Everything is laid out before the first byte is written: which bytes of which shard become which bytes of which file.
A conversion that was killed therefore continues where it stopped, and the store is the same to the byte. Until it is
complete it is in `TARGET.partial`, next to the journal of what is finished.
"""

from __future__ import annotations

import errno
import hashlib
import logging
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from mixoff._version import __version__
from mixoff.checkpoints.find import Folder, open_shards
from mixoff.checkpoints.shards import Ranges, Shards, kept_nbytes
from mixoff.errors import AGAIN, CheckpointError, MixoffError
from mixoff.folders import sync
from mixoff.quantize.scheme import Scheme
from mixoff.quantize.solve import loops
from mixoff.store.blueprint import Blueprint, lay_out
from mixoff.store.journal import PARTS, Journal
from mixoff.store.making import Making, Options, Step, WeightError, steps_of, write
from mixoff.store.manifest import FORMAT, VERSION
from mixoff.units import format_nbytes

Writer = Callable[[Making, Shards, list[Step], Ranges, Options], int]  # returns the bytes of weights that it read
log = logging.getLogger("mixoff")


@dataclass(frozen=True)
class Report:
    """What a conversion did, and what it took.

    - target: the store.
    - source_nbytes: bytes of weights that this run read.
    - seconds: wall-clock time.
    - peak_nbytes: largest growth of anonymous memory (memory that no file backs) since before the first weight.
    """

    target: Path
    source_nbytes: int
    seconds: float
    peak_nbytes: int


def run(
    source: str | Path | Folder | Shards,
    target: str | Path,
    scheme: str | Scheme = "none",
    revision: str | None = None,
    options: Options = Options(),  # noqa: B008  frozen
    writer: Writer | None = None,
) -> Report:
    """Write the checkpoint `source` as a store; parameters as in `conversion.convert`.

    writer: writes the weights; None goes shard by shard, each quantized by itself
    """
    started = time.perf_counter()
    scheme = Scheme.preset(scheme) if isinstance(scheme, str) else scheme
    target = Path(target)
    partial = target.with_name(target.name + ".partial")
    refuse_existing(target)
    if isinstance(source, (str, Path, Folder)):
        source = open_shards(source, revision, partial / "shards")
    with closing(source) as shards:
        plan = replace(lay_out(shards.checkpoint, scheme), calibration=getattr(writer, "facts", None))
        loops()  # import numba before memory is watched: it is not part of a conversion
        report = make(shards, plan, target, options, writer or write)
    return replace(report, seconds=time.perf_counter() - started)


def make(shards: Shards, plan: Blueprint, target: Path, options: Options, writer: Writer = write) -> Report:
    """Write what `plan` says into `target`, which appears when it is complete; see `run`."""
    started = time.perf_counter()
    partial = target.with_name(target.name + ".partial")
    with _PeakMemory() as peak, _hold(partial, target), _explained(plan, partial, target):
        nbytes = _make(shards, plan, partial, target, options, writer)
    return Report(target, nbytes, time.perf_counter() - started, peak.nbytes)


def refuse_existing(target: Path) -> None:
    """Raise CheckpointError if the target exists, unless it is one that this machinery has just finished."""
    if target.exists() and not (target.with_name(target.name + ".partial") / "journal").exists():
        raise CheckpointError(f"{target} exists already: choose another folder, or remove it first")


class _PeakMemory(threading.Thread):
    """Samples the process's anonymous memory every 5 ms: `with _PeakMemory() as peak`, then `peak.nbytes`."""

    def __enter__(self) -> _PeakMemory:
        self.nbytes = 0
        self.before = anonymous_nbytes()
        self.ended = threading.Event()
        self.start()
        return self

    def run(self) -> None:
        while not self.ended.wait(0.005):
            self.nbytes = max(self.nbytes, anonymous_nbytes() - self.before)

    def __exit__(self, *error: object) -> None:
        self.ended.set()
        self.join()


def anonymous_nbytes() -> int:
    """Bytes of this process in memory that no file backs; all its resident bytes where the system does not say."""
    try:
        with open("/proc/self/status", encoding="ascii") as status:
            return next(1024 * int(line.split()[1]) for line in status if line.startswith("RssAnon"))
    except (OSError, StopIteration):
        import psutil

        return psutil.Process().memory_info().rss


# From the lock to the rename ------------------------------------------------------------------------------------------


@contextmanager
def _hold(partial: Path, target: Path) -> Iterator[None]:
    """Lock the partial folder against a second conversion, and remove it once it holds nothing of use."""
    from filelock import FileLock, Timeout

    if partial.exists() and (strangers := sorted({p.name for p in partial.iterdir()} - {*PARTS, "journal", "lock"})):
        raise CheckpointError(f"{partial} holds {strangers[0]!r}, which no conversion wrote: move that folder away")
    partial.mkdir(parents=True, exist_ok=True)
    useful = False  # whether the folder holds something to continue from
    cleared = True
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
                if not useful:  # the journal goes last: as long as it exists, a finished target is known to be ours
                    _remove(partial, *PARTS, "journal")
                    cleared = _dissolve(partial)
    except Timeout:
        raise CheckpointError(f"another conversion into {target} is running: wait for it, or stop it first") from None
    finally:
        if not cleared:
            _dissolve(partial)


def _dissolve(partial: Path) -> bool:
    """Remove the lock and its folder; False where the system cannot remove an open file, as on Windows."""
    try:
        _remove(partial, "lock")
        partial.rmdir()
    except OSError:
        return False
    return True


@contextmanager
def _explained(plan: Blueprint, partial: Path, target: Path) -> Iterator[None]:
    """Turn disk errors and Ctrl-C into readable messages."""
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


def _make(shards: Shards, plan: Blueprint, partial: Path, target: Path, options: Options, writer: Writer) -> int:
    """Everything between the lock and the rename; returns the bytes of weights that were read."""
    identity = _identity(shards, plan)
    journal = Journal(partial / "journal")
    if target.exists():  # killed between rename and cleanup, or another folder of that name
        if journal.identity != identity or (partial / "store" / (plan.alone or "")).exists():
            raise CheckpointError(f"{target} exists already: choose another folder, or remove it first")
        return 0
    _resume(plan, partial, journal, identity, options.restart)
    with closing(journal):
        making = Making(plan, partial / "store", journal)
        steps = steps_of(shards, plan)
        _check_space(shards, plan, steps, partial, target)
        journal.begin(identity)
        making.begin()
        with closing(Ranges(partial / "kept", {step.file: step.keep for step in steps})) as ranges:
            try:
                nbytes = writer(making, shards, steps, ranges, options)
            except (KeyboardInterrupt, MixoffError):  # the disk is fine
                making.commit()
                raise
        if _identity(shards, plan) != identity:
            raise CheckpointError("the checkpoint was changed while it was converted: run the same command again")
        making.finish(shards)
    os.replace(partial / "store" / (plan.alone or ""), target)
    sync(target.parent)
    return nbytes


def _identity(shards: Shards, plan: Blueprint) -> str:
    """A hash of all that a journal depends on: versions, scheme, every header and the state of the shards."""
    facts = __version__, FORMAT, VERSION, plan.scheme, plan.calibration, plan.weights, shards.identity()
    return hashlib.sha256(repr(facts).encode()).hexdigest()


def _resume(plan: Blueprint, partial: Path, journal: Journal, identity: str, restart: bool) -> None:
    """Keep what is there to continue from; remove what another conversion left, or what was damaged since."""
    folder = partial / "store"
    sound = all((folder / f).is_file() and (folder / f).stat().st_size == n for f, n in plan.sizes.items())
    if journal.identity == identity and (sound or not journal.done) and not restart:
        return
    if journal.done and not restart:
        what = "is damaged" if journal.identity == identity else "was begun from another source, scheme or version"
        log.warning("%s %s: starting from scratch", partial, what)
    journal.identity, journal.done = None, {}
    _remove(partial, "journal", *PARTS)  # the journal first: it must never name bytes that are gone


def _remove(partial: Path, *names: str) -> None:
    for path in (partial / name for name in names):
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def _missing_nbytes(plan: Blueprint, partial: Path) -> int:
    """Bytes of the store that are not on the disk yet; without the small files."""
    paths = {file: partial / "store" / file for file in plan.sizes}
    taken = {file: _taken_nbytes(path) if path.exists() else 0 for file, path in paths.items()}
    return sum(max(0, nbytes - taken[file]) for file, nbytes in plan.sizes.items())  # a file takes whole blocks


def _taken_nbytes(path: Path) -> int:
    """Bytes that a file takes on the disk; Windows, which counts no blocks, allocates the whole size at once."""
    stat = path.stat()
    return stat.st_blocks * 512 if hasattr(stat, "st_blocks") else stat.st_size


def _check_space(shards: Shards, plan: Blueprint, steps: list[Step], partial: Path, target: Path) -> None:
    """Refuse a conversion that the disk has no room for, before anything is written."""
    needed = _missing_nbytes(plan, partial)
    passing = 0  # bytes of a downloaded shard, and of what is kept of earlier ones
    if shards.transient:
        passing = max(t.offset + t.nbytes for t in shards.checkpoint.tensors.values())
        passing += kept_nbytes([step.file for step in steps], [weight.ranges for weight in plan.weights])
    why = f" and {format_nbytes(passing)} for downloaded shards" if passing else ""
    if needed + passing > (free := shutil.disk_usage(partial).free):
        raise CheckpointError(
            f"{target} needs {format_nbytes(needed)} more{why}, and the disk has {format_nbytes(free)}: "
            "make room, or choose a target on another disk"
        )
