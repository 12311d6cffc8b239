"""Readers copy expert images from files into memory that the caller owns.

Does not know which file holds what, nor caches or policies.
"""

from __future__ import annotations

import os
import threading
from io import FileIO
from pathlib import Path

from mixoff.checkpoint import Extent
from mixoff.errors import CheckpointError


class ExpertReader:
    """Copies expert images from files into memory that the caller owns.

    `extents[site, expert]` says which bytes of which file go where in the image. Thread-safe.
    """

    def __init__(self, folder: Path, extents: dict[tuple[int, int], list[Extent]]) -> None:
        self.extents = extents
        names = sorted({x.file for extent in extents.values() for x in extent})
        self.files = {name: (folder / name).open("rb", buffering=0) for name in names}
        self.lock = threading.Lock()  # for systems without preadv, where a file has one position for all threads

    def read_into(self, site: int, expert: int, image: memoryview) -> int:
        """Fill `image` (writable bytes) with one expert; returns the bytes read.

        Raises CheckpointError when the file ends too early.
        """
        total = 0
        for x in self.extents[site, expert]:
            self._read_exactly(image[x.place : x.place + x.nbytes], x)
            total += x.nbytes
        return total

    def _read_exactly(self, view: memoryview, x: Extent) -> None:
        done = 0
        while done < len(view):
            n = self._read_at(self.files[x.file], view[done:], x.offset + done)
            if n == 0:
                raise CheckpointError(
                    f"{x.file} ends before byte {x.offset + x.nbytes}: it was changed or cut, fetch it again"
                )
            done += n

    def _read_at(self, file: FileIO, view: memoryview, offset: int) -> int:
        if hasattr(os, "preadv"):
            return os.preadv(file.fileno(), [view], offset)
        with self.lock:
            file.seek(offset)
            return file.readinto(view)

    def close(self) -> None:
        """Close the files; reading afterwards is an error."""
        for file in self.files.values():
            file.close()
