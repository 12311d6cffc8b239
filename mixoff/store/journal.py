"""What a long job has finished, so that it can be killed at any moment and continue later.

Each finished piece has a line of JSON, written only after the bytes of the piece are on the disk. No matter when a
crash happens, whatever the journal names is there.
"""

from __future__ import annotations

import json
import os
from io import FileIO
from pathlib import Path

from mixoff.folders import sync

PARTS = ("store", "kept", "shards", "journal.new")  # what `TARGET.partial` may hold, in addition to journal and lock


class Journal:
    """Finished pieces by key, in a file that begins with the identity of the job. Opening it only reads.

    - identity: identity of the job in the file; None if there is none.
    - done: values passed to `add` by key, by earlier runs and, after `begin`, by this one.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.identity, *lines = _lines(path) or [None]
        self.done: dict[str, list] = dict(lines)
        self.waiting: list[str] = []
        self.file: FileIO | None = None

    def begin(self, identity: str) -> None:
        """Continue the job of that identity, or start it with nothing done."""
        if identity != self.identity:
            self.identity, self.done = identity, {}
        new = self.path.with_name(self.path.name + ".new")
        lines = [identity, *self.done.items()]
        new.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
        sync(new)
        os.replace(new, self.path)  # drops a last line that a crash cut short
        sync(self.path.parent)
        self.file = self.path.open("ab", buffering=0)  # unbuffered: a buffer would be written again after a failure

    def add(self, key: str, value: list) -> None:
        """Note a piece that is written; it counts once the caller has synced its bytes and called `commit`."""
        self.done[key] = value
        self.waiting.append(json.dumps([key, value]) + "\n")

    def commit(self) -> None:
        """Write what was added since the last commit. The caller must have synced those bytes before."""
        assert self.file is not None  # after `begin`
        lines = memoryview("".join(self.waiting).encode())
        while lines:
            lines = lines[self.file.write(lines) :]
        os.fsync(self.file.fileno())
        self.waiting.clear()

    def close(self) -> None:
        """Close the file; pieces that were not committed count as not done."""
        if self.file:
            self.file.close()


def _lines(path: Path) -> list:
    """The values of all lines up to the first that was not written in full."""
    values = []
    for line in path.read_bytes().split(b"\n")[:-1] if path.exists() else ():
        try:
            values.append(json.loads(line))
        except ValueError:
            break
    return values
