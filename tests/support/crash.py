"""Conversions in processes of their own that end themselves with a signal at a step that is told by its number.

A step is whatever changes the disk: a write, an fsync, a rename, a file removed or cut. Writes of a step are done by
half first. The processes are forked from one that has imported this module, so they begin at once.
"""

import functools
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import torch
from transformers import MixtralForCausalLM  # noqa: F401  once, so that no fork has to

from mixoff.checkpoints.checkpoint import Checkpoint
from mixoff.checkpoints.shards import LocalShards
from mixoff.quantize.scheme import Scheme
from mixoff.quantize.solve import quantize
from mixoff.store import convert as conversion
from mixoff.store import making
from mixoff.store.journal import Journal

ROOT = Path(__file__).resolve().parents[2]


class Fetched(LocalShards):
    """Shards that are copied from a folder one at a time and deleted when they are released, as from the Hub."""

    transient = True

    def __init__(self, folder, downloads):
        super().__init__(folder)
        self.downloads, self.acquired = Path(downloads), []

    def acquire(self, file):
        self.acquired.append(file)
        self.downloads.mkdir(parents=True, exist_ok=True)
        assert len(list(self.downloads.iterdir())) <= 1, "one shard at a time"
        return Path(shutil.copy(self.checkpoint.folder / file, self.downloads / file))

    def release(self, file):
        (self.downloads / file).unlink(missing_ok=True)


def open_source(source, target, fetched):
    return Fetched(source, Path(f"{target}.partial") / "shards") if fetched else source


class Steps:
    """Counts what changes the disk, and at step `at` sends this process `kill`."""

    def __init__(self, at, kill=signal.SIGKILL):
        self.at, self.kill, self.count = at, kill, 0

    def counted(self, function, half=None):
        def step(*args, **kwargs):
            self.count += 1
            if self.count == self.at:
                if half:
                    half(*args)
                os.kill(os.getpid(), self.kill)
            return function(*args, **kwargs)

        return step

    def install(self):
        for name in ("fsync", "replace", "truncate", "unlink", "rmdir"):
            setattr(os, name, self.counted(getattr(os, name)))
        write, commit = conversion.Making._write, Journal.commit

        def half_write(making, file, offset, piece):
            write(making, file, offset, memoryview(piece)[: len(piece) // 2])

        def half_commit(journal):
            text = "".join(journal.waiting).encode()
            journal.file.write(text[: len(text) // 2])

        conversion.Making._write = self.counted(write, half_write)
        Journal.commit = self.counted(commit, half_commit)


def convert(source, target, scheme, at, fetched, kill):
    """Convert until step `at`; what got to the end leaves steps and bytes read in `TARGET.json`."""
    making.COMMIT = 1 << 20
    steps = Steps(at, kill)
    steps.install()
    model = open_source(source, target, fetched)
    report = conversion.run(model, target, Scheme.from_json(scheme), options=making.Options(2))
    Path(f"{target}.json").write_text(json.dumps({"steps": steps.count, "source_nbytes": report.source_nbytes}))


def serve():
    """A process for each line of standard input, which holds the arguments of `convert`; its id and how it ended."""
    quantize(torch.ones(8, 64))  # compiles the solver's loops, which the forks then have
    for line in sys.stdin:
        if not (pid := os.fork()):
            convert(*json.loads(line))
            os._exit(0)
        status = None
        while status is None or os.WIFSTOPPED(status):
            status = os.waitpid(pid, os.WUNTRACED)[1]
            print(json.dumps([pid, status]), flush=True)


@functools.cache
def server():
    """The process that forks the others; it ends when this one does."""
    return subprocess.Popen(
        [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT
    )


def start(source, target, scheme, at, fetched=False, kill=signal.SIGKILL):
    """Run until step `at`: process id, and the status with which it ended or stopped."""
    scheme = Scheme.preset(scheme) if isinstance(scheme, str) else scheme
    line = json.dumps([str(source), str(target), scheme.to_json(), at, fetched, int(kill)])
    server().stdin.write(line + "\n")
    server().stdin.flush()
    return answer()


def answer():
    """The next that the server says: process id, and the status with which it ended or stopped."""
    return json.loads(server().stdout.readline())


def attempt(source, target, scheme, at, fetched=False):
    """Run until step `at`: what it reported when it got to the end, None when it was killed."""
    _, status = start(source, target, scheme, at, fetched)
    if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL:
        return None
    assert status == 0
    out = Path(f"{target}.json")
    report = json.loads(out.read_text())
    out.unlink()
    return report


def tree(folder):
    """The files of a store and their bytes."""
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def nbytes(folder):
    """Bytes of weights in a checkpoint."""
    return sum(t.nbytes for t in Checkpoint(folder).tensors.values())


if __name__ == "__main__":
    serve()
