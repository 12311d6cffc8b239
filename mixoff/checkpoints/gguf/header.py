"""The header of a GGUF file: metadata, and where each tensor is. Every size is checked against the file before use.

The reader of the `gguf` package allocates whatever a header asks for, so its decoders get only byte ranges that were
checked here. It knows no models: `config` and `names` do.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from io import BufferedReader
from pathlib import Path
from typing import Any

import numpy as np

from mixoff.errors import CheckpointError, printable

MAGIC = b"GGUF"
VERSIONS = (2, 3)
NUMBERS = {0: "u1", 1: "i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", 7: "?", 10: "<u8", 11: "<i8", 12: "<f8"}
STRING, ARRAY = 8, 9
MAX_NAME = 65_535  # bytes of a key or a tensor's name, from the specification
MAX_DIMENSIONS = 4  # GGML_MAX_DIMS
MOST = 2**63
ALIGNMENT = 32  # unless `general.alignment` says otherwise
AGAIN = "the copy is incomplete or damaged, fetch it again"


@dataclass(frozen=True)
class Array:
    """An array of the metadata, which stays in the file until it is asked for.

    - path: file that holds it.
    - kind: type of its elements, by GGUF's number.
    - count: number of elements.
    - offset: offset of the first element in the file.
    """

    path: Path
    kind: int
    count: int
    offset: int

    def __len__(self) -> int:
        return self.count

    def read(self) -> list:
        """The elements. Raises CheckpointError for text that is not UTF-8."""
        with self.path.open("rb") as file:
            file.seek(self.offset)
            if self.kind != STRING:
                dtype = np.dtype(NUMBERS[self.kind])
                return np.frombuffer(file.read(self.count * dtype.itemsize), dtype).tolist()
            cursor = Cursor(self.path, file)
            return [cursor.text() for _ in range(self.count)]


@dataclass(frozen=True)
class Tensor:
    """A tensor of a GGUF file.

    - file: name of the file.
    - kind: name of its type, as in `Q4_K`.
    - shape: in the order of torch, so that rows come before columns.
    - offset, nbytes: its bytes in the file.
    """

    file: str
    kind: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


@dataclass(frozen=True)
class Header:
    """All that a GGUF file says before its weights; an array in `metadata` is an `Array`."""

    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, Tensor]


def read_header(path: Path) -> Header:
    """The header of the GGUF file at `path`. Raises CheckpointError for whatever is not as it should be."""
    sizes = block_sizes()
    try:
        with path.open("rb") as file:
            cursor = Cursor(path, file)
            tensor_count, metadata_count = _counts(cursor)
            metadata = dict(_metadata(cursor, metadata_count))
            entries = list(_entries(cursor, tensor_count))
            return Header(path, metadata, _tensors(cursor, entries, _alignment(cursor, metadata), sizes))
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error.strerror or error}): fetch it again") from None


def library() -> None:
    """Raise CheckpointError, with the way out, where the package gguf is missing."""
    if find_spec("gguf") is None:
        raise CheckpointError("GGUF files take the package gguf: pip install 'mixoff[gguf]'")


def block_sizes() -> dict[int, tuple[str, int, int]]:
    """Name, numbers per block and bytes per block of each type of tensor, by GGUF's number."""
    library()
    from gguf.constants import GGML_QUANT_SIZES

    return {int(kind): (kind.name, *size) for kind, size in GGML_QUANT_SIZES.items()}


class Cursor:
    """Reads a file from front to back, never more than it has left."""

    def __init__(self, path: Path, file: BufferedReader) -> None:
        self.path, self.file = path, file
        self.size = path.stat().st_size
        self.left = self.size - file.tell()

    @property
    def at(self) -> int:
        """Offset in the file."""
        return self.size - self.left

    def damaged(self, reason: str) -> CheckpointError:
        """The error for what is wrong at this place."""
        return CheckpointError(f"{self.path} has a damaged header at byte {self.at}, {reason}: {AGAIN}")

    def take(self, nbytes: int) -> bytes:
        """The next bytes."""
        self.expect(nbytes)
        self.left -= nbytes
        raw = self.file.read(nbytes)
        if len(raw) != nbytes:
            raise CheckpointError(f"{self.path} ended too early: it was changed or cut, fetch it again")
        return raw

    def skip(self, nbytes: int) -> None:
        """Go past bytes."""
        self.expect(nbytes)
        self.left -= nbytes
        self.file.seek(nbytes, 1)

    def expect(self, nbytes: int) -> None:
        """Raise CheckpointError if the file has fewer bytes left."""
        if nbytes > self.left:
            raise self.damaged(f"which asks for {nbytes} bytes where {self.left} are left")

    def number(self, code: str) -> Any:
        """A number, by its code in the module `struct`."""
        return struct.unpack("<" + code, self.take(struct.calcsize("<" + code)))[0]

    def text(self, most: int = MOST) -> str:
        """A string of at most `most` bytes."""
        length = self.number("Q")
        if length > most:
            raise self.damaged(f"a name of {length} bytes")
        try:
            return self.take(length).decode("utf-8")
        except UnicodeDecodeError:
            raise self.damaged("text that is not UTF-8") from None

    def name(self) -> str:
        """A name of at most MAX_NAME bytes, without control characters."""
        name = self.text(MAX_NAME)
        if not name or printable(name) != name:
            raise self.damaged(f"the name {name[:50]!r}")
        return name


def _counts(cursor: Cursor) -> tuple[int, int]:
    """Numbers of tensors and of entries of the metadata."""
    if cursor.size < 24 or cursor.take(4) != MAGIC:
        raise CheckpointError(f"{cursor.path} is not a GGUF file ({cursor.size} bytes): {AGAIN}")
    version = cursor.number("I")
    if version not in VERSIONS:
        swapped = version.to_bytes(4, "big") in {v.to_bytes(4, "little") for v in VERSIONS}
        kind = "big-endian" if swapped else f"version {version}"
        raise CheckpointError(
            f"{cursor.path} is a GGUF file of another kind ({kind}): mixoff reads versions 2 and 3, little-endian; "
            "convert the model with a current llama.cpp"
        )
    tensors, entries = cursor.number("Q"), cursor.number("Q")
    cursor.expect(24 * tensors + 13 * entries)  # the least that so many can take
    return tensors, entries


def _metadata(cursor: Cursor, count: int) -> Iterator[tuple[str, Any]]:
    seen = set()
    for _ in range(count):
        if (key := cursor.name()) in seen:
            raise cursor.damaged(f"a second {key}")
        seen.add(key)
        yield key, _value(cursor, key)


def _value(cursor: Cursor, key: str) -> Any:
    kind = cursor.number("I")
    if kind in NUMBERS:
        dtype = np.dtype(NUMBERS[kind])
        return np.frombuffer(cursor.take(dtype.itemsize), dtype)[0].item()
    if kind == STRING:
        return cursor.text()
    if kind != ARRAY:
        raise cursor.damaged(f"{key} of unknown type {kind}")
    inner, length = cursor.number("I"), cursor.number("Q")
    array = Array(cursor.path, inner, length, cursor.at)
    if inner in NUMBERS:
        cursor.skip(length * np.dtype(NUMBERS[inner]).itemsize)
    elif inner == STRING:
        cursor.expect(8 * length)
        for _ in range(length):
            cursor.skip(cursor.number("Q"))
    else:
        raise cursor.damaged(f"{key} as an array of type {inner}, which no model needs")
    return array


def _alignment(cursor: Cursor, metadata: dict[str, Any]) -> int:
    alignment = metadata.get("general.alignment", ALIGNMENT)
    if type(alignment) is not int or not 0 < alignment <= 2**20 or alignment & (alignment - 1):
        raise cursor.damaged(f"general.alignment = {str(alignment)[:30]}, which is not a power of two")
    return alignment


Entry = tuple[str, tuple[int, ...], int, int]  # name, shape as in the file, type, offset from the first tensor


def _entries(cursor: Cursor, count: int) -> Iterator[Entry]:
    """The list of tensors."""
    seen = set()
    for _ in range(count):
        if (name := cursor.name()) in seen:
            raise cursor.damaged(f"a second tensor {name}")
        seen.add(name)
        if not 1 <= (dimensions := cursor.number("I")) <= MAX_DIMENSIONS:
            raise cursor.damaged(f"{name} with {dimensions} dimensions")
        shape = tuple(cursor.number("Q") for _ in range(dimensions))
        if not all(shape) or math.prod(shape) >= MOST:
            raise cursor.damaged(f"{name} of shape {shape}")
        yield name, shape, cursor.number("I"), cursor.number("Q")


def _tensors(cursor: Cursor, entries: list[Entry], alignment: int, sizes: dict) -> dict[str, Tensor]:
    """The tensors by name; none may overlap another, or reach beyond the file."""
    begin = -(-cursor.at // alignment) * alignment
    tensors = {}
    for name, shape, kind, offset in entries:
        if kind not in sizes:
            raise cursor.damaged(f"{name} of unknown type {kind}; a newer gguf package may know it")
        label, numbers, nbytes = sizes[kind]
        if shape[0] % numbers:
            raise cursor.damaged(f"{name} of {label} with rows of {shape[0]}, which blocks of {numbers} do not divide")
        if offset % alignment:
            raise cursor.damaged(f"{name} at {offset}, which {alignment} does not divide")
        total = math.prod(shape) // numbers * nbytes
        tensors[name] = Tensor(cursor.path.name, label, shape[::-1], begin + offset, total)
    _refuse_overlap(cursor, tensors)
    return tensors


def _refuse_overlap(cursor: Cursor, tensors: dict[str, Tensor]) -> None:
    end = 0
    for name, t in sorted(tensors.items(), key=lambda item: item[1].offset):
        if t.offset < end:
            raise cursor.damaged(f"{name} at {t.offset}, inside another tensor that ends at {end}")
        end = t.offset + t.nbytes
        if end > cursor.size:
            raise CheckpointError(
                f"{cursor.path} is {cursor.size} bytes, and {name} ends at {end}: "
                "the copy is incomplete, fetch it again"
            )
