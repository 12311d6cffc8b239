"""A weight of several tensors in a file, and how it is decoded piece by piece.

Letters: **N** outputs, **K** inputs, **G** group size.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from mixoff.checkpoints.checkpoint import Read, TensorRange
from mixoff.checkpoints.decoded import Decoded
from mixoff.errors import CheckpointError
from mixoff.quantize.solve import is_finite
from mixoff.shapes.sites import torch_dtype

PIECE = 1 << 20  # numbers decoded at a time
TORCH = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "I64": "int64", "I32": "int32"}
TORCH |= {"I16": "int16", "I8": "int8", "U8": "uint8", "F8_E4M3": "float8_e4m3fn", "F8_E8M0": "float8_e8m0fnu"}
Piece = tuple[slice, slice, Tensor]  # rows, columns, and what is there


@dataclass(frozen=True)
class Matrix:
    """A weight (N, K) of tensors `parts` by role; subclasses know the encoding.

    - kind: name of the encoding, for reports.
    """

    kind: str
    shape: tuple[int, int]
    parts: dict[str, TensorRange]

    def ranges(self) -> list[tuple[str, int, int]]:
        """All byte ranges to read: file, offset, size."""
        return [(t.file, t.offset, t.nbytes) for t in self.parts.values()]

    def pieces(self, read: Read) -> Iterator[Piece]:
        """The weights, fp32, in pieces of about PIECE numbers."""
        raise NotImplementedError

    def whole(self, role: str, read: Read) -> Tensor:
        """One of the tensors."""
        return self.some(role, 0, self.parts[role].shape[0] if self.parts[role].shape else 1, read)

    def some(self, role: str, start: int, stop: int, read: Read) -> Tensor:
        """Rows `start` to `stop`, along its first dimension, of one of the tensors."""
        t = self.parts[role]
        rows, *rest = t.shape or (1,)
        nbytes = t.nbytes // rows
        raw = bytearray((stop - start) * nbytes)
        read(t.file, t.offset + start * nbytes, memoryview(raw))
        return torch.frombuffer(raw, dtype=getattr(torch, TORCH[t.dtype])).view(stop - start, *rest)

    def steps(self, count: int, width: int, multiple: int = 1) -> Iterator[tuple[int, int]]:
        """Ranges that cover `count` rows of `width` numbers, each a multiple of rows but for the last."""
        step = max(1, PIECE // (width * multiple)) * multiple
        return ((start, min(start + step, count)) for start in range(0, count, step))


@dataclass(frozen=True)
class MatrixExtent(Decoded):
    """A matrix that is decoded into an image, in one of the 16-bit dtypes or fp32."""

    matrix: Matrix

    def ranges(self) -> list[tuple[str, int, int]]:
        return self.matrix.ranges()

    def fill(self, image: memoryview, read: Read) -> None:
        out = torch.frombuffer(image[self.place : self.place + self.nbytes], dtype=torch_dtype(self.dtype))
        out = out.view(self.matrix.shape)
        for rows, columns, values in self.matrix.pieces(read):
            narrow = values.to(out.dtype)
            if self.dtype == "float16" and not is_finite(narrow) and is_finite(values):
                raise CheckpointError(
                    f"{self.file} holds numbers beyond the 65504 of float16, in {self.kind} at byte {self.offset}: "
                    "use another quantization of this model, or its 16-bit original"
                )
            out[rows, columns] = narrow


def extent_of(matrix: Matrix, dtype: str) -> MatrixExtent:
    """How to read a matrix into an image in `dtype`, by torch's name."""
    first = next(iter(matrix.parts.values()))
    nbytes = math.prod(matrix.shape) * torch_dtype(dtype).itemsize
    return MatrixExtent(first.file, first.offset, 0, nbytes, matrix.kind, dtype, matrix)
