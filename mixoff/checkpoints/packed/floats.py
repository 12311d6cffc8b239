"""Weights in 4-bit numbers with a point: FP4 with scales of groups (NVFP4, MXFP4), and bitsandbytes' nf4 and fp4.

Letters: **N** outputs, **K** inputs.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from mixoff.checkpoints.checkpoint import Read
from mixoff.checkpoints.encoded import BIAS, FP4
from mixoff.checkpoints.packed.matrix import Matrix, Piece
from mixoff.errors import CheckpointError

TABLE = torch.tensor((*FP4, *(-value for value in FP4)))


@dataclass(frozen=True)
class Fp4(Matrix):
    """weight uint8 (N, K / 2), the first number of a byte in its low half, and a scale for each 16 or 32 inputs.

    NVFP4 has scales in fp8 and one more, fp32, for the matrix; MXFP4 has powers of two alone.

    - divided: whether the scales are divided by that of the matrix, as in compressed-tensors, or multiplied by it.
    """

    divided: bool = False

    def pieces(self, read: Read) -> Iterator[Piece]:
        N, K = self.shape
        whole = self.whole("global", read).float() if "global" in self.parts else torch.ones(1)
        whole = 1 / whole if self.divided else whole
        for start, stop in self.steps(N, K):
            raw, scale = (self.some(role, start, stop, read) for role in ("weight", "scale"))
            scale = torch.exp2(scale.float() - BIAS) if scale.dtype == torch.uint8 else scale.float() * whole
            codes = torch.stack([raw & 15, raw >> 4], -1).flatten(1)  # (n, K)
            values = TABLE[codes.int()].unflatten(1, (scale.shape[1], -1)) * scale[..., None]
            yield slice(start, stop), slice(0, K), values.flatten(1)


@dataclass(frozen=True)
class Bnb(Matrix):
    """bitsandbytes: weight uint8 (N * K / 2, 1), rows after each other, the first number of a byte in its high half.

    quant_map holds the 16 values, absmax one number per block. Quantized twice, absmax is uint8 codes of
    nested_quant_map, with one nested_absmax per nested block, and an offset.

    - block, nested_block: numbers of a block.
    - nested_offset: what is added to each absmax.
    """

    block: int
    nested_block: int = 0
    nested_offset: float = 0.0

    def pieces(self, read: Read) -> Iterator[Piece]:
        N, K = self.shape
        table, absmax = self.whole("quant_map", read).float(), self._absmax(read)
        for start, stop in self.steps(N, K):
            raw = self.some("weight", start * K // 2, stop * K // 2, read).flatten()
            values = table[torch.stack([raw >> 4, raw & 15], -1).flatten().int()]
            values *= absmax[torch.arange(start * K, stop * K) // self.block]
            yield slice(start, stop), slice(0, K), values.view(-1, K)

    def _absmax(self, read: Read) -> Tensor:
        absmax = self.whole("absmax", read)
        if not self.nested_block:
            return absmax.float()
        table, scales = (self.whole(name, read).float() for name in ("nested_quant_map", "nested_absmax"))
        of = torch.arange(len(absmax)) // self.nested_block
        return table[absmax.int()] * scales[of] + self.nested_offset


def bnb_state(raw: bytes, name: str) -> dict:
    """What bitsandbytes keeps about a weight as JSON: shape, sizes of blocks, dtype. Raises CheckpointError."""
    numbers = {"blocksize": int, "nested_blocksize": int, "nested_offset": float}
    try:
        state = json.loads(raw.decode("utf-8"))
        shape, dtype = tuple(state["shape"]), state["dtype"]
        values = {key: kind(state[key]) for key, kind in numbers.items() if key in state}
        sound = len(shape) == 2 and all(type(n) is int and 0 < n < 2**31 for n in shape)
        if not sound or dtype not in ("bfloat16", "float16", "float32") or not 0 < values["blocksize"] < 2**20:
            raise ValueError(f"shape {shape}, dtype {dtype}")
        return values | {"shape": shape, "dtype": dtype, "quant_type": str(state["quant_type"])[:10]}
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError) as error:
        raise CheckpointError(f"{name} is damaged ({error!r}): fetch it again") from None
