"""Memory of processes: what one takes at its peak, and real limits on what it may take.

A limit is a control group of the kernel (v1 or v2, below the one that we are in), or a scope of systemd. The page cache
counts: pages of a file are charged to whoever reads them first, so `forget` them before. Does not know models.
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
SAMPLE_S = 0.02  # seconds between two looks at the peak


# What a process takes -------------------------------------------------------------------------------------------------


def anonymous_nbytes() -> int | None:
    """Bytes of this process that no file backs: heap, arenas, shared memory of its own. None where nobody tells."""
    try:
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith(("RssAnon:", "RssShmem:")))


def read_nbytes() -> int | None:
    """Bytes that this process caused to be read from storage, by the kernel's own count; None where nobody tells."""
    try:
        lines = Path("/proc/self/io").read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    return next(int(line.split()[1]) for line in lines if line.startswith("read_bytes:"))


class Peak:
    """The most anonymous memory between start and end: `with Peak() as peak: ...; peak.nbytes`."""

    def __init__(self) -> None:
        self.nbytes = anonymous_nbytes()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def _watch(self) -> None:
        while not self._over.wait(SAMPLE_S):
            self.nbytes = max(self.nbytes, anonymous_nbytes())

    def __enter__(self) -> Peak:
        if self.nbytes is not None:
            self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._over.set()
        if self.nbytes is not None:
            self._thread.join()
            self.nbytes = max(self.nbytes, anonymous_nbytes())


def forget(path: Path) -> None:
    """Let the page cache forget a file, or all files below a folder; nothing happens where that cannot be asked."""
    if not hasattr(os, "posix_fadvise"):
        return
    for file in [path] if path.is_file() else [p for p in path.rglob("*") if p.is_file()]:
        with file.open("rb") as f:
            os.fsync(f.fileno())
            os.posix_fadvise(f.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


# Limits ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Limit:
    """How a process is started under a limit: words before its command. kind: what enforces it."""

    kind: str
    words: tuple[str, ...]


@contextlib.contextmanager
def limit(nbytes: int) -> Iterator[Limit]:
    """A real limit of `nbytes` on the memory, page cache included, of what is started with its words.

    Raises MixoffError, with the reason of each way that was tried, where the system does not allow one.
    """
    refusals = []
    for way in (_cgroup_v1, _cgroup_v2, _systemd):
        try:
            entered = way(nbytes)
            found = entered.__enter__()
        except (OSError, MixoffError) as error:
            refusals.append(f"{way.__name__.strip('_')}: {error}")
            continue
        try:
            yield found
        finally:
            entered.__exit__(None, None, None)
        return
    raise MixoffError(
        f"this system allows no memory limit ({'; '.join(refusals)}): run as root, inside a delegated group or under "
        "systemd, or leave --memory-limit out"
    )


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
    """The group that this process is in: ours is made below it, so that its own limits go on to hold."""
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
        if not (folder / needed).exists():  # a folder that is no group, or one without this controller
            raise MixoffError(f"{parent} has no memory controller")
        for name, text in files.items():
            if (folder / name).exists():
                (folder / name).write_text(text, encoding="utf-8")
        yield folder
    finally:
        with contextlib.suppress(OSError):  # what still runs inside keeps it
            folder.rmdir()


def _enter(tasks: Path) -> tuple[str, ...]:
    """A shell that joins the group and becomes the command."""
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
