"""Codes and scales of the types of GGUF that are whole numbers with a scale per 32 inputs: Q8_0, Q4_0 and Q4_1."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from mixoff.checkpoints.checkpoint import Read, TensorRange
from mixoff.checkpoints.gguf.extent import GgufExtent
from mixoff.checkpoints.packed.integers import Integers
from mixoff.checkpoints.packed.matrix import Piece

BITS = {"Q8_0": 8, "Q4_0": 4, "Q4_1": 4}
HEADS = {"Q8_0": 2, "Q4_0": 2, "Q4_1": 4}  # bytes of a block before its codes: a scale, and in Q4_1 a minimum
GROUP = 32
ZERO = {"Q8_0": 128, "Q4_0": 8}


@dataclass(frozen=True)
class Blocks(Integers):
    """Rows of blocks, uint8 (N, K / 32, bytes): fp16 scale, in Q4_1 fp16 minimum, then codes, int8 or two in a byte."""

    def codes(self, read: Read) -> Iterator[Piece]:
        N, K = self.shape
        for start, stop in self.steps(N, K):
            raw = self.some("blocks", start, stop, read)[..., HEADS[self.kind] :]
            if self.kind == "Q8_0":
                codes = (raw.view(torch.int8).short() + ZERO[self.kind]).to(torch.uint8)
            else:  # the low halves are the first 16 numbers
                codes = torch.cat([raw & 15, raw >> 4], -1)
            yield slice(start, stop), slice(0, K), codes.flatten(1)

    def levels(self, read: Read) -> tuple[Tensor, Tensor]:
        N, K = self.shape
        heads = torch.empty(N, self.groups, HEADS[self.kind] // 2, dtype=torch.float16)
        for start, stop in self.steps(N, K):
            raw = self.some("blocks", start, stop, read)[..., : HEADS[self.kind]]
            heads[start:stop] = raw.contiguous().view(torch.float16)
        scale = heads[..., 0].float()
        return scale, heads[..., 1].float() if self.kind == "Q4_1" else -ZERO[self.kind] * scale


def blocks_of(x: GgufExtent) -> Blocks | None:
    """The codes of the rows that `x` reads; None for another type."""
    rows, columns = x.stored
    if x.kind not in BITS or columns % GROUP:
        return None
    shape = rows, columns // GROUP, x.row_nbytes * GROUP // columns
    blocks = TensorRange(x.file, "U8", shape, x.offset, rows * x.row_nbytes)
    return Blocks(x.kind, x.stored, {"blocks": blocks}, BITS[x.kind], columns // GROUP)
