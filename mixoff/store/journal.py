"""What a long job has finished, so that it can be killed at any moment and go on later.

A line of JSON for each finished piece, written only after the bytes of the piece are on the disk: whenever a crash
comes, what the journal names is there. Does not know what the pieces are.
"""

from __future__ import annotations

import json
import os
from io import FileIO
from pathlib import Path

from mixoff.folders import sync


class Journal:
    """Finished pieces by key, in a file that begins with the identity of the job. Opening it only reads.

    identity: of the job that the file is about, None without one. done: what `add` was told, by this run after `begin`
    and by those before it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.identity, *lines = _lines(path) or [None]
        self.done: dict[str, list] = dict(lines)
        self.waiting: list[str] = []
        self.file: FileIO | None = None

    def begin(self, identity: str) -> None:
        """Go on with the job of that identity, or begin it: then nothing of it is done."""
        if identity != self.identity:
            self.identity, self.done = identity, {}
        new = self.path.with_name(self.path.name + ".new")
        lines = [identity, *self.done.items()]
        new.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
        sync(new)
        os.replace(new, self.path)  # without what a crash may have left of a last line
        sync(self.path.parent)
        self.file = self.path.open("ab", buffering=0)  # a buffer would be written once more after a failure

    def add(self, key: str, value: list) -> None:
        """The piece is written; the journal will say so once the caller has synced its bytes and calls `commit`."""
        self.done[key] = value
        self.waiting.append(json.dumps([key, value]) + "\n")

    def commit(self) -> None:
        """Note what was added since the last time. The caller has synced the bytes of all that."""
        lines = memoryview("".join(self.waiting).encode())
        while lines:
            lines = lines[self.file.write(lines) :]
        os.fsync(self.file.fileno())
        self.waiting.clear()

    def close(self) -> None:
        """Close the file; what was not committed is as if it had not been done."""
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
