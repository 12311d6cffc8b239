"""How numbers of a GGUF become a weight: read some rows, decode them with the `gguf` package, and put them in order."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from mixoff.checkpoints.checkpoint import Read
from mixoff.checkpoints.decoded import Decoded
from mixoff.checkpoints.gguf.names import Rows
from mixoff.errors import CheckpointError
from mixoff.quantize.solve import is_finite
from mixoff.shapes.sites import torch_dtype

if TYPE_CHECKING:
    import numpy as np

PIECE = 1 << 21  # numbers decoded at a time
FASTEST = 8192  # numbers in a row, at which the decoders of most types are fastest (measured): their rows stay in cache


@dataclass(frozen=True)
class GgufExtent(Decoded):
    """Rows of a stored matrix, which belong in some rows of a weight; `kind` is the type of the stored numbers.

    - stored: (rows, columns) to read.
    - rows: where they go in the weight.
    - transposed: whether the weight is (columns, rows).
    """

    stored: tuple[int, int]
    rows: Rows
    transposed: bool = False

    @property
    def row_nbytes(self) -> int:
        """Bytes of a stored row."""
        return row_nbytes(self.kind, self.stored[1])

    def ranges(self) -> list[tuple[str, int, int]]:
        return [(self.file, self.offset, self.stored[0] * self.row_nbytes)]

    def fill(self, image: memoryview, read: Read) -> None:
        count, columns = self.stored
        whole = torch.frombuffer(image[self.place : self.place + self.nbytes], dtype=torch_dtype(self.dtype))
        out = whole.view(columns, -1).T if self.transposed else whole.view(-1, columns)
        step = max(1, PIECE // columns)
        for start in range(0, count, step):
            stop = min(start + step, count)
            raw = bytearray((stop - start) * self.row_nbytes)
            read(self.file, self.offset + start * self.row_nbytes, memoryview(raw))
            values = torch.from_numpy(decode(raw, self.kind, columns))
            narrow = values.to(out.dtype)
            self._refuse_beyond(narrow, values)
            out[self.rows.of(start, stop, count)] = narrow

    def _refuse_beyond(self, narrow: torch.Tensor, values: torch.Tensor) -> None:
        """Raise CheckpointError for a number that float16 cannot hold; NaN and infinity are refused later, by name."""
        if self.dtype == "float16" and not is_finite(narrow) and is_finite(values):
            raise CheckpointError(
                f"{self.file} holds numbers beyond the 65504 of float16, in {self.kind} at byte {self.offset}: use "
                "another quantization of this model, or its safetensors"
            )


def block(kind: str) -> tuple[int, int]:
    """Numbers and bytes of a block of this type."""
    from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

    return GGML_QUANT_SIZES[GGMLQuantizationType[kind]]


def row_nbytes(kind: str, columns: int) -> int:
    """Bytes of a row of so many numbers."""
    numbers, nbytes = block(kind)
    return columns // numbers * nbytes


def decode(raw: bytes | bytearray, kind: str, columns: int) -> np.ndarray:
    """The numbers of stored rows, fp32 (rows, columns), by the `gguf` package."""
    import numpy as np
    from gguf.constants import GGMLQuantizationType
    from gguf.quants import dequantize

    numbers, nbytes = block(kind)
    # the package takes 16 rows at a time; blocks know no rows, so these may have the length that is fastest
    together = math.gcd(len(raw) // nbytes, max(1, FASTEST // numbers))
    blocks = np.frombuffer(raw, np.uint8).reshape(-1, together * nbytes)
    with np.errstate(all="ignore"):  # NaN and infinity are looked for in the result
        values = dequantize(blocks, GGMLQuantizationType[kind])
    return np.ascontiguousarray(values, np.float32).reshape(-1, columns)
