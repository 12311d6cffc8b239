"""`kv_b_proj` of DeepSeek's latent attention, which llama.cpp splits by heads into k, transposed, and v.

Letters: **H** heads, **R** rank of the latent, **N** width of k without positions, **V** width of v.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from mixoff.checkpoints.checkpoint import Extent, Read
from mixoff.checkpoints.gguf.config import natural_dtype
from mixoff.checkpoints.gguf.extent import GgufExtent
from mixoff.checkpoints.gguf.header import Tensor
from mixoff.checkpoints.gguf.names import Rows
from mixoff.shapes.sites import DTYPES, dtype_nbytes

WEIGHT = re.compile(r"\.layers\.(\d+)\..*kv_b_proj\.weight$")


@dataclass(frozen=True)
class Joined(Extent):
    """Several extents that together fill a weight; their places count from its own."""

    pieces: tuple[GgufExtent, ...]

    def ranges(self) -> list[tuple[str, int, int]]:
        return [r for piece in self.pieces for r in piece.ranges()]

    def fill(self, image: memoryview, read: Read) -> None:
        for piece in self.pieces:
            piece.fill(image[self.place :], read)


def halves(name: str, tensors: Mapping[str, Tensor]) -> tuple[str, str] | None:
    """Names of k (H, R, N) and v (H, V, R) for a weight (H * (N + V), R); None if the file does not split it."""
    if (m := WEIGHT.search(name)) is None:
        return None
    k, v = (f"blk.{m[1]}.attn_{half}_b.weight" for half in "kv")
    whole = k in tensors and v in tensors and len(tensors[k].shape) == len(tensors[v].shape) == 3
    fits = whole and (tensors[k].shape[0], tensors[k].shape[1]) == (tensors[v].shape[0], tensors[v].shape[2])
    return (k, v) if fits else None


def dtype_of(k: Tensor, v: Tensor) -> str:
    """The dtype, by safetensors' name, that holds both."""
    dtypes = {natural_dtype(t.kind) for t in (k, v)}
    return dtypes.pop() if len(dtypes) == 1 else "F32"


def shape_of(k: Tensor, v: Tensor) -> tuple[int, int]:
    """(H * (N + V), R)."""
    H, R, N = k.shape
    return H * (N + v.shape[1]), R


def joined(k: Tensor, v: Tensor, place: int) -> Joined:
    """How to read the weight into an image at `place`."""
    (H, R, N), V = k.shape, v.shape[1]
    dtype = DTYPES[dtype_of(k, v)]
    row = R * dtype_nbytes(dtype)
    pieces = []
    for h in range(H):
        at = h * (N + V) * row
        for t, shape, start, rows in ((k, (R, N), at, N), (v, (V, R), at + N * row, V)):
            offset = t.offset + h * t.nbytes // H
            pieces.append(GgufExtent(t.file, offset, start, rows * row, t.kind, dtype, shape, Rows(), t is k))
    return Joined(k.file, k.offset, place, H * (N + V) * row, tuple(pieces))
