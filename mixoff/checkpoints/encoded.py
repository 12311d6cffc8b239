"""Checkpoints whose weights are encoded, decoded while they are read: fp8 with scales of blocks, and MXFP4.

DeepSeek-V3 stores `….weight` in fp8 and `….weight_scale_inv`, one number per block of 128 x 128. gpt-oss stores experts
as `…_proj_blocks`, 32 numbers of 4 bits in 16 bytes, and `…_proj_scales`, one exponent per 32 numbers. Both are decoded
to bf16, as in transformers. Only a conversion can read them, and its store is an ordinary one.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from mixoff.checkpoints.checkpoint import Checkpoint, Extent, Read, TensorRange
from mixoff.checkpoints.model_files import configurations, read_json
from mixoff.errors import CheckpointError

QUANTIZATION = "quantization_config"  # key of config.json
SCALE = "_scale_inv"
FP8 = {"F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2}
SCALES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "F8_E8M0": torch.float8_e8m0fnu}
UNUSED = (".input_scale", ".activation_scale")  # scales of activations, which are not encoded here
FP4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # and their negatives; OCP Microscaling Formats 1.0, section 5.3.3
GROUP = 32  # numbers of MXFP4 that share an exponent
BIAS = 127  # bias of that exponent
PIECE = 1 << 22  # numbers decoded at a time


def quantization_of(folder: Path) -> dict[str, Any]:
    """The `quantization_config` of the configuration in `folder`, or of the text model in it; empty if it has none."""
    config = read_json(folder / "config.json") if (folder / "config.json").is_file() else {}
    given = (part.get(QUANTIZATION) for part in configurations(config))
    return next((dict(settings) for settings in given if isinstance(settings, dict)), {})


class EncodedCheckpoint(Checkpoint):
    """A checkpoint of encoded weights; `tensors` describes them decoded, under transformers' names."""

    widens = False

    def _read_headers(self, headers: Mapping[str, dict[str, TensorRange]] | None) -> None:
        super()._read_headers(headers)
        self.encoded: dict[str, Extent] = {}
        self._decode_names()

    @property
    def not_in_place(self) -> str:
        return f"{self.folder} stores weights as {self.kind}, from which experts cannot be served"

    def _decode_names(self) -> None:
        """Replace encoded tensors in `tensors` by decoded ones, and note in `encoded` how to decode them."""
        raise NotImplementedError

    def _extent(self, name: str, start: int, nbytes: int, place: int) -> Extent:
        if name not in self.encoded:
            return super()._extent(name, start, nbytes, place)
        return replace(self.encoded[name], place=place, nbytes=nbytes)  # a matrix is decoded as a whole

    def _add(self, name: str, shape: tuple[int, ...], extent: Extent, dtype: str = "BF16") -> None:
        if name in self.tensors:
            raise CheckpointError(f"{name} appears twice in {self.folder}, encoded and plain: keep one")
        self.tensors[name] = TensorRange(extent.file, dtype, shape, extent.offset, 2 * math.prod(shape))
        self.encoded[name] = extent

    def side_changes(self) -> dict[str, bytes]:
        """config.json without its quantization_config: the store's weights are decoded."""
        config = read_json(self.folder / "config.json")
        for part in configurations(config):
            part.pop(QUANTIZATION, None)
        return {"config.json": (json.dumps(config, indent=2) + "\n").encode()}


# fp8 ------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Fp8Extent(Extent):
    """A matrix of fp8 and the scales of its blocks; `nbytes` counts the decoded matrix, bf16."""

    weight: TensorRange
    scale: TensorRange
    block: tuple[int, ...]

    def ranges(self) -> list[tuple[str, int, int]]:
        return [(t.file, t.offset, t.nbytes) for t in (self.weight, self.scale)]

    def fill(self, image: memoryview, read: Read) -> None:
        (rows, columns), (height, width) = self.weight.shape, self.block
        out = torch.frombuffer(image[self.place : self.place + self.nbytes], dtype=torch.bfloat16).view(rows, columns)
        scales = _read(self.scale, self.scale.offset, self.scale.nbytes, SCALES[self.scale.dtype], read).float()
        scales = scales.view(-(-rows // height), -(-columns // width)).repeat_interleave(width, 1)[:, :columns]
        step = max(1, PIECE // (height * columns)) * height  # rows decoded at a time, whole blocks
        for start in range(0, rows, step):
            n = min(step, rows - start)
            offset = self.weight.offset + start * columns
            codes = _read(self.weight, offset, n * columns, FP8[self.weight.dtype], read).view(n, columns)
            of_rows = scales[start // height : -(-(start + n) // height)].repeat_interleave(height, 0)[:n]
            out[start : start + n] = codes.float().mul_(of_rows)


class Fp8Checkpoint(EncodedCheckpoint):
    """fp8 as in DeepSeek-V3: `weight_block_size` in the configuration, or one scale per matrix."""

    kind = "fp8"

    def _decode_names(self) -> None:
        for name in [name for name in self.tensors if name.endswith(UNUSED)]:
            del self.tensors[name]
        for name in [name for name in self.tensors if name.endswith(SCALE)]:
            scale, weight = self.tensors.pop(name), self.tensors.pop(name.removesuffix(SCALE), None)
            if weight is None:
                raise CheckpointError(f"{self.folder} lacks {name.removesuffix(SCALE)}: fetch it again")
            size = quantization_of(self.folder).get("weight_block_size")
            block = block_of(weight.shape, scale, size) if weight.dtype in FP8 and scale.dtype in SCALES else None
            if block is None:
                raise CheckpointError(
                    f"{name} is {scale.dtype} {scale.shape} for a weight that is {weight.dtype} {weight.shape}: "
                    "mixoff knows fp8 matrices with one scale per block; use the 16-bit original of this model"
                )
            place = weight.file, weight.offset, 0, 2 * math.prod(weight.shape)
            self._add(name.removesuffix(SCALE), weight.shape, Fp8Extent(*place, weight, scale, block))
        if plain := sorted(name for name, t in self.tensors.items() if t.dtype in FP8):
            raise CheckpointError(f"{self.folder} has no scale for {plain[0]}: fetch it again, or use a 16-bit copy")


def block_of(shape: tuple[int, ...], scale: TensorRange, size: object) -> tuple[int, ...] | None:
    """Rows and columns that share a scale, as configured in `size` or as the grid implies; None if it does not fit."""
    grid = (1, 1) if math.prod(scale.shape) == 1 else scale.shape
    if len(shape) != 2 or len(grid) != 2 or 0 in (*shape, *grid):
        return None
    given = tuple(size) if isinstance(size, list) and all(type(n) is int and n > 0 for n in size) else ()
    if len(given) == 2 and grid == tuple(-(-n // b) for n, b in zip(shape, given, strict=True)):
        return given
    even = not any(n % g for n, g in zip(shape, grid, strict=True))
    return tuple(n // g for n, g in zip(shape, grid, strict=True)) if even else None


# MXFP4 ----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Mxfp4Extent(Extent):
    """Experts' matrices of MXFP4, transposed: codes (outputs, inputs), decoded (inputs, outputs).

    - nbytes: bytes of the decoded matrices, bf16.
    - blocks, scales: tensors of all experts.
    - first, count: range of experts to read.
    """

    blocks: TensorRange
    scales: TensorRange
    first: int
    count: int

    def ranges(self) -> list[tuple[str, int, int]]:
        return [(t.file, t.offset + self.first * n, self.count * n) for t, n in self._sizes()]

    def fill(self, image: memoryview, read: Read) -> None:
        _, outputs, groups, _ = self.blocks.shape
        inputs = groups * GROUP
        out = torch.frombuffer(image[self.place : self.place + self.nbytes], dtype=torch.bfloat16)
        out = out.view(self.count, inputs, outputs)
        step = max(1, PIECE // inputs)  # outputs
        for i in range(self.count):
            for start in range(0, outputs, step):
                n = min(step, outputs - start)
                packed, exponents = (
                    _read(t, t.offset + (self.first + i) * size + start * size // outputs, n * size // outputs,
                          torch.uint8, read)
                    for t, size in self._sizes()
                )  # fmt: skip
                out[i, :, start : start + n] = decode_mxfp4(packed.view(n, groups, -1), exponents.view(n, groups)).T

    def _sizes(self) -> list[tuple[TensorRange, int]]:
        """Blocks and scales, with bytes per expert."""
        return [(t, t.nbytes // t.shape[0]) for t in (self.blocks, self.scales)]


def decode_mxfp4(packed: torch.Tensor, exponents: torch.Tensor) -> torch.Tensor:
    """MXFP4 codes, uint8 (rows, groups, 16), with their exponents, uint8 (rows, groups): bf16 (rows, groups * 32).

    >>> decode_mxfp4(torch.tensor([[[0x21] + [0xF0] * 15]], dtype=torch.uint8), torch.tensor([[128]]))[0, :4]
    tensor([  1.,   2.,   0., -12.], dtype=torch.bfloat16)
    """
    table = torch.tensor((*FP4, *(-value for value in FP4)), dtype=torch.bfloat16)
    values = torch.stack([table[(packed & 15).int()], table[(packed >> 4).int()]], dim=-1).flatten(-2)
    return torch.ldexp(values, exponents.int()[..., None] - BIAS).flatten(1)


class Mxfp4Checkpoint(EncodedCheckpoint):
    """gpt-oss: experts in MXFP4, all experts of a layer in one tensor, everything else in bf16."""

    kind = "mxfp4"

    def _decode_names(self) -> None:
        for name in [name for name in self.tensors if name.endswith("_blocks")]:
            base = name.removesuffix("_blocks")
            blocks, scales = self.tensors.pop(name), self.tensors.pop(f"{base}_scales", None)
            if scales is None or len(blocks.shape) != 4 or 0 in blocks.shape or blocks.shape[-1] != GROUP // 2:
                raise CheckpointError(f"{name} {blocks.shape} has no scales or is not MXFP4: fetch {blocks.file} again")
            if scales.shape != blocks.shape[:-1] or {blocks.dtype, scales.dtype} != {"U8"}:
                raise CheckpointError(f"{name} {blocks.shape} does not match its scales {scales.shape}: fetch it again")
            experts, outputs, groups, _ = blocks.shape
            shape = (experts, groups * GROUP, outputs)
            extent = Mxfp4Extent(blocks.file, blocks.offset, 0, 2 * math.prod(shape), blocks, scales, 0, experts)
            self._add(base, shape, extent)

    def _extent(self, name: str, start: int, nbytes: int, place: int) -> Extent:
        whole = self.encoded.get(name)
        if not isinstance(whole, Mxfp4Extent):
            return super()._extent(name, start, nbytes, place)
        one = whole.nbytes // whole.count
        return replace(whole, place=place, nbytes=nbytes, first=start // one, count=nbytes // one)


def _read(t: TensorRange, offset: int, nbytes: int, dtype: torch.dtype, read: Read) -> torch.Tensor:
    """`nbytes` of the file of `t` as a tensor (nbytes / itemsize,)."""
    raw = bytearray(nbytes)
    read(t.file, offset, memoryview(raw))
    return torch.frombuffer(raw, dtype=dtype)
