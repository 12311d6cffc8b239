"""Readers copy expert images from files into memory that the caller owns.

Three ways, with the same result:

- `ExpertReader` reads through the page cache.
- `DirectReader` bypasses it, which requires addresses, offsets and sizes that are multiples of a block.
- `DroppingReader`, for filesystems without direct I/O, reads through the page cache and drops the pages afterwards.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import queue
import threading
from io import FileIO
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np

from mixoff.checkpoints.checkpoint import Extent
from mixoff.errors import CheckpointError
from mixoff.pages import pages
from mixoff.units import PAGE

if TYPE_CHECKING:
    from mixoff.quantize.scheme import Scheme
    from mixoff.shapes.sites import Site

PIECE = 4 << 20  # bytes per request: smaller requests are slower, larger ones leave fewer to run in parallel


class Reader(Protocol):
    """Where a runtime gets its experts from."""

    def read_into(self, site: int, expert: int, image: memoryview) -> int:
        """Fill `image` (writable bytes) with one expert; returns the bytes read."""

    def close(self) -> None:
        """Release files or memory; reading afterwards is an error."""


class ExpertSource(Protocol):
    """Origin of experts: a model folder (`source.Source`), or a model in memory."""

    sites: tuple[Site, ...]
    scheme: Scheme

    @property
    def reader(self) -> Reader:
        """Reads experts."""

    @property
    def expert_nbytes(self) -> int:
        """Bytes of the largest expert."""

    def close(self) -> None:
        """Close files or free memory."""


class ExpertReader:
    """Copies expert images from files, through the page cache. Thread-safe.

    - extents: ranges of files, and their places in the image, by (site, expert).
    - direct: whether nothing stays in the page cache.
    - how: description of the way, for reports.
    - piece_nbytes: bytes per request into which an expert may be divided.
    - buffer_nbytes: bytes that the reader allocates itself.
    """

    direct, how = False, "buffered"
    piece_nbytes, buffer_nbytes = PIECE, 0

    def __init__(self, folder: Path, extents: dict[tuple[int, int], list[Extent]]) -> None:
        self.folder, self.extents = Path(folder), extents
        names = sorted({x.file for extent in extents.values() for x in extent})
        self.files = {name: (self.folder / name).open("rb", buffering=0) for name in names}
        self.lock = threading.Lock()  # for systems without preadv, where a file has one position for all threads

    def read_into(self, site: int, expert: int, image: memoryview, start: int = 0, stop: int | None = None) -> int:
        """Fill `image` (writable bytes) with one expert, or with its bytes from `start` to `stop`; returns how many.

        Raises CheckpointError when the file ends too early.
        """
        stop = len(image) if stop is None else stop
        extents = self.extents[site, expert]
        total = 0
        for x in extents:
            begin, end = max(start, x.place), min(stop, x.place + x.nbytes)
            if begin < end:
                self._fill(image, begin, end, x, len(image) if len(extents) == 1 else end)
                total += end - begin
        return total

    def close(self) -> None:
        """Close the files; reading afterwards is an error."""
        for file in self.files.values():
            file.close()

    def _fill(self, image: memoryview, begin: int, end: int, x: Extent, room: int) -> None:
        """Read bytes `begin` to `end` of the image, which are in `x`; bytes up to `room` may be overwritten."""
        offset = x.offset + begin - x.place
        done = 0
        while done < end - begin:
            n = self._read_at(self.files[x.file], image[begin + done : end], offset + done)
            if n == 0:
                raise _ended(x)
            done += n

    def _read_at(self, file: FileIO, view: memoryview, offset: int) -> int:
        if hasattr(os, "preadv"):
            return os.preadv(file.fileno(), [view], offset)
        with self.lock:
            file.seek(offset)
            return file.readinto(view)


class DroppingReader(ExpertReader):
    """Reads through the page cache and drops the pages again, on filesystems without direct I/O (tmpfs, some overlays).

    Without `posix_fadvise` (macOS, Windows) the pages stay in the cache, and `how` says so.
    """

    direct = True

    @property
    def how(self) -> str:  # type: ignore[override]  # nothing assigns it
        """How files are read, and why."""
        if hasattr(os, "posix_fadvise"):
            return "buffered, then dropped from the page cache: the filesystem has no direct I/O"
        return "buffered: this system has no direct I/O, nor a way to drop a file from the page cache"

    def _fill(self, image: memoryview, begin: int, end: int, x: Extent, room: int) -> None:
        super()._fill(image, begin, end, x, room)
        if hasattr(os, "posix_fadvise"):
            offset = x.offset + begin - x.place
            os.posix_fadvise(self.files[x.file].fileno(), offset, end - begin, os.POSIX_FADV_DONTNEED)


class DirectReader(ExpertReader):
    """Bypasses the page cache: reads whole blocks straight into the image, or through a buffer if they do not align.

    A store's experts are aligned, and slots are whole blocks: the bytes after an expert in its last block go behind
    its image. A checkpoint's experts are not aligned; `buffers` buffers of one piece each are allocated for them.
    """

    direct, how = True, "direct"

    def __init__(self, folder: Path, extents: dict[tuple[int, int], list[Extent]], buffers: int) -> None:
        super().__init__(folder, extents)
        self.descriptors = {name: _open_direct(self.folder / name) for name in self.files}
        self.buffers: queue.SimpleQueue[mmap.mmap] = queue.SimpleQueue()
        longest = max(x.nbytes for extent in extents.values() for x in extent)
        self.step = min(PIECE, -(-longest // PAGE) * PAGE)  # bytes of a request
        if any(x.offset % PAGE or x.place % PAGE for extent in extents.values() for x in extent):
            self.buffer_nbytes = buffers * (self.step + 2 * PAGE)
            for _ in range(buffers):
                self.buffers.put(pages(self.step + 2 * PAGE))

    def try_out(self) -> None:
        """Read a block. Raises OSError if the filesystem opens files for direct I/O but cannot read them."""
        for file in list(self.descriptors.values())[:1]:
            os.preadv(file.fileno(), [pages(PAGE)], 0)

    def close(self) -> None:
        """Close the files; reading afterwards is an error."""
        super().close()
        for file in self.descriptors.values():
            file.close()

    def _fill(self, image: memoryview, begin: int, end: int, x: Extent, room: int) -> None:
        for start in range(begin, end, self.step):
            stop, offset = min(start + self.step, end), x.offset + start - x.place
            blocks = self._blocks(image, start, stop, offset, room)
            if blocks is not None:
                self._read_blocks(blocks, stop - start, offset, x)
            else:
                self._through_buffer(image[start:stop], offset, x)

    @staticmethod
    def _blocks(image: memoryview, start: int, stop: int, offset: int, room: int) -> memoryview | None:
        """The view of the image that takes whole blocks of the file; None where file or memory is not aligned."""
        end = -(-stop // PAGE) * PAGE
        if offset % PAGE or start % PAGE or end > max(room, stop):
            return None
        view = image[start:end]
        return None if ctypes.addressof(ctypes.c_char.from_buffer(view)) % PAGE else view

    def _through_buffer(self, image: memoryview, offset: int, x: Extent) -> None:
        """Read the blocks around the wanted bytes into a buffer, and copy those."""
        skip = offset % PAGE
        try:
            buffer = self.buffers.get_nowait()
        except queue.Empty:  # an unaligned image in an aligned store: no buffer was set aside
            buffer = pages(self.step + 2 * PAGE)
        try:
            wanted = skip + len(image)
            self._read_blocks(memoryview(buffer)[: -(-wanted // PAGE) * PAGE], wanted, offset - skip, x)
            np.copyto(np.frombuffer(image, np.uint8), np.frombuffer(buffer, np.uint8, len(image), skip))  # without GIL
        finally:
            self.buffers.put(buffer)

    def _read_blocks(self, view: memoryview, wanted: int, offset: int, x: Extent) -> None:
        """Fill `view`, whole blocks, from `offset`; the file may end in the last one, after the `wanted` bytes."""
        done = 0
        while done < wanted:
            n = os.preadv(self.descriptors[x.file].fileno(), [view[done:]], offset + done)
            if n == 0 or (n % PAGE and done + n < wanted):
                raise _ended(x)
            done += n


def _open_direct(path: Path) -> FileIO:
    """A file that bypasses the page cache. Raises OSError, or AttributeError where the system has no O_DIRECT."""
    return open(path, "rb", buffering=0, opener=lambda name, flags: os.open(name, flags | os.O_DIRECT))


def _ended(x: Extent) -> CheckpointError:
    return CheckpointError(f"{x.file} ends before byte {x.offset + x.nbytes}: it was changed or cut; fetch it again")


def past_page_cache(reader: ExpertReader, buffers: int) -> ExpertReader:
    """Close `reader`; return one of the same experts, for `buffers` threads, that leaves nothing in the page cache."""
    reader.close()
    try:
        direct = DirectReader(reader.folder, reader.extents, buffers)
    except (OSError, AttributeError):  # the filesystem or the system has no direct I/O
        return DroppingReader(reader.folder, reader.extents)
    try:
        direct.try_out()
    except OSError:  # the filesystem opens such files, but cannot read them
        direct.close()
        return DroppingReader(reader.folder, reader.extents)
    return direct
