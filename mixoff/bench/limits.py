"""Memory of processes: the peak of this one, and real limits for others.

A limit is a control group of the kernel (v1 or v2, below our own group), or a scope of systemd. It includes the page
cache: pages of a file are charged to the process that reads them first, so `forget` them before a run.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from mixoff.errors import MixoffError

ROOT = Path("/sys/fs/cgroup")
SAMPLE_S = 0.02  # seconds between samples


# Memory of this process -----------------------------------------------------------------------------------------------


def process_nbytes() -> int | None:
    """Bytes of this process that no file backs: heap, arenas, its shared memory. None if the system does not say."""
    try:
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith(("RssAnon:", "RssShmem:")))


def read_nbytes() -> int | None:
    """Bytes that this process read from storage, by the kernel's count; None if the system does not say."""
    try:
        lines = Path("/proc/self/io").read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    return next(int(line.split()[1]) for line in lines if line.startswith("read_bytes:"))


def difference(after: int | None, before: int | None) -> int | None:
    """Bytes between two counts; None if the system does not say."""
    return None if after is None or before is None else after - before


class Peak:
    """The peak of anonymous memory inside a block: `with Peak() as peak: ...; peak.nbytes`."""

    def __init__(self) -> None:
        self.nbytes = process_nbytes()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def _watch(self) -> None:
        while not self._over.wait(SAMPLE_S):
            self.nbytes = max(self.nbytes or 0, process_nbytes() or 0)

    def __enter__(self) -> Peak:
        if self.nbytes is not None:
            self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._over.set()
        if self.nbytes is not None:
            self._thread.join()
            self.nbytes = max(self.nbytes or 0, process_nbytes() or 0)


def forget(path: Path) -> None:
    """Drop a file, or all files below a folder, from the page cache, on systems that allow it."""
    if not hasattr(os, "posix_fadvise"):
        return
    for file in [path] if path.is_file() else [p for p in path.rglob("*") if p.is_file()]:
        with file.open("rb") as f:
            os.fsync(f.fileno())
            os.posix_fadvise(f.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


# Limits ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Limit:
    """How to start a process under a limit.

    kind: mechanism that enforces it.
    words: arguments to put before the command of the process.
    """

    kind: str
    words: tuple[str, ...]


@contextlib.contextmanager
def limit(nbytes: int) -> Iterator[Limit]:
    """A real limit of `nbytes` on the memory, page cache included, of processes started with its `words`.

    Raises MixoffError, with the reason for each mechanism, if the system allows none.
    """
    refusals = []
    with contextlib.ExitStack() as stack:
        for mechanism in (_cgroup_v1, _cgroup_v2, _systemd):
            try:
                limit = stack.enter_context(mechanism(nbytes))
                break
            except (OSError, MixoffError) as error:
                refusals.append(f"{mechanism.__name__.strip('_')}: {error}")
        else:
            raise MixoffError(
                f"this system allows no memory limit ({'; '.join(refusals)}): run as root, inside a delegated group or "
                "under systemd, or leave --memory-limit out"
            )
        yield limit


@contextlib.contextmanager
def _cgroup_v1(nbytes: int) -> Iterator[Limit]:
    files = {"memory.limit_in_bytes": str(nbytes), "memory.memsw.limit_in_bytes": str(nbytes)}
    with _group(ROOT / "memory" / _own_group("memory"), files, "memory.limit_in_bytes") as folder:
        yield Limit("cgroup v1", _enter(folder / "tasks"))


@contextlib.contextmanager
def _cgroup_v2(nbytes: int) -> Iterator[Limit]:
    files = {"memory.max": str(nbytes), "memory.swap.max": "0"}
    with _group(ROOT / _own_group(""), files, "memory.max") as folder:
        yield Limit("cgroup v2", _enter(folder / "cgroup.procs"))


def _own_group(controller: str) -> str:
    """The group of this process; a new group below it keeps the limits of this one."""
    for line in Path("/proc/self/cgroup").read_text(encoding="utf-8").splitlines():
        _, controllers, path = line.split(":", 2)
        if controller in controllers.split(","):
            return path.lstrip("/")
    raise MixoffError(f"no group for {controller or 'v2'}")


@contextlib.contextmanager
def _group(parent: Path, files: dict[str, str], needed: str) -> Iterator[Path]:
    folder = parent / f"mixoff-{os.getpid()}"
    folder.mkdir()
    try:
        if not (folder / needed).exists():  # a folder that is not a group, or has no memory controller
            raise MixoffError(f"{parent} has no memory controller")
        for name, text in files.items():
            if (folder / name).exists():
                (folder / name).write_text(text, encoding="utf-8")
        yield folder
    finally:
        with contextlib.suppress(OSError):  # processes that still run inside keep it
            folder.rmdir()


def _enter(tasks: Path) -> tuple[str, ...]:
    """A shell that joins the group, then executes the command."""
    return "sh", "-c", f'echo $$ > "{tasks}" && exec "$@"', "sh"


@contextlib.contextmanager
def _systemd(nbytes: int) -> Iterator[Limit]:
    if shutil.which("systemd-run") is None:
        raise MixoffError("systemd-run is not installed")
    words = ["systemd-run", "--scope", "--quiet", f"--property=MemoryMax={nbytes}", "--property=MemorySwapMax=0"]
    if getattr(os, "geteuid", lambda: 0)():
        words.insert(1, "--user")
    tried = subprocess.run([*words, "true"], capture_output=True, text=True)
    if tried.returncode:
        raise MixoffError(tried.stderr.strip().split("\n")[0])
    yield Limit("systemd", tuple(words))
