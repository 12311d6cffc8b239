"""A quantized matrix as a tensor: views of its parts in one buffer, and its dequantized values."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from mixoff.errors import CheckpointError, MixoffError
from mixoff.pages import slab
from mixoff.quantize import rotation
from mixoff.quantize.layout import (
    BLOCK,
    FORMAT,
    HUGE_PAGE,
    SUPER,
    WIDTH,
    check_format,
    layout,
    packed_nbytes,
    places,
    unpack,
    zero_point,
)
from mixoff.units import format_nbytes


class Parts(Mapping):
    """The parts of a quantized matrix as views of its byte image, created on access."""

    def __init__(self, image: Tensor, form: tuple) -> None:
        self.image, self.places = image, places(*form)

    def __getitem__(self, name: str) -> Tensor:
        start, stop, dtype = self.places[name]
        return self.image[start:stop].view(dtype)

    def __iter__(self) -> Iterator[str]:
        return iter(self.places)

    def __len__(self) -> int:
        return len(self.places)


def _memory(nbytes: int) -> Tensor:
    """Memory for the image of a matrix, uint8 (nbytes,); in huge pages if it fills one."""
    return slab(nbytes) if nbytes >= HUGE_PAGE else torch.empty(nbytes, dtype=torch.uint8)


@dataclass(frozen=True, repr=False, eq=False)
class QTensor:
    """A quantized (N, K) matrix.

    - shape: (N, K).
    - bits, group_size, metadata_bits: format, as in `quantize`.
    - parts: codes and metadata by name, as in `layout`; they own their memory, or are views of a buffer such as a slot.
    - rotated: whether the codes are those of `W R`, whose inputs are rotated (see `rotation`).

    Tested against the hqq package, brute force, and `layout`.
    """

    shape: tuple[int, ...]
    bits: int
    group_size: int
    metadata_bits: int
    parts: Mapping[str, Tensor]
    rotated: bool = False

    @property
    def nbytes(self) -> int:
        """Bytes of all parts."""
        return packed_nbytes(self.shape, self.bits, self.group_size, self.metadata_bits)

    @functools.cached_property
    def image(self) -> Tensor:
        """The byte image, uint8 (nbytes,): memory that the parts share, or a copy if they do not share any."""
        return self.parts.image if isinstance(self.parts, Parts) else self.to_buffer()

    @functools.cached_property
    def plans(self) -> dict:
        """Plans that kernels make once for this matrix and keep as long as it exists."""
        return {}

    @property
    def bits_per_weight(self) -> float:
        """Bits per weight, including metadata."""
        return 8 * self.nbytes / math.prod(self.shape)

    @property
    def device(self) -> torch.device:
        """Where the codes are."""
        return self.parts["codes"].device

    def __repr__(self) -> str:
        rows, columns = self.shape
        size = f"{self.bits_per_weight:.3f} bits/weight, {format_nbytes(self.nbytes)}"
        form = f"{self.bits}-bit g{self.group_size}" + ", rotated" * self.rotated
        return f"QTensor({rows}x{columns}, {form}, {size})"

    # Values

    @property
    def codes(self) -> Tensor:
        """The codes q, uint8 (N, K)."""
        return torch.cat([self._codes(*rows).to(torch.uint8) for rows in self.blocks()], 1).T

    @property
    def scale(self) -> Tensor:
        """Scale of each group, fp32 (N, K/G)."""
        return torch.cat([self._metadata(*rows)[0] for rows in self.blocks()], 1).T

    @property
    def minimum(self) -> Tensor:
        """The weight that code 0 represents in each group, fp32 (N, K/G)."""
        return torch.cat([self._metadata(*rows)[1] for rows in self.blocks()], 1).T

    @property
    def zero(self) -> Tensor:
        """The code, rarely a whole number, that represents the weight 0 in each group, fp32 (N, K/G)."""
        return zero_point(self.scale, self.minimum)

    def dequantize(self, dtype: torch.dtype = torch.float32, out: Tensor | None = None) -> Tensor:
        """The weights `(q - zero) * scale` (N, K), computed in fp32, rounded to `dtype` or into `out`.

        The inputs of a rotated matrix are rotated back.
        """
        out = torch.empty(self.shape, dtype=dtype, device=self.device) if out is None else out
        if tuple(out.shape) != self.shape:
            raise MixoffError(f"out has shape {tuple(out.shape)}, and the matrix has {self.shape}")
        for start, stop in self.blocks():
            weights = self.block_weights(start, stop)
            out[start:stop] = rotation.unrotate(weights) if self.rotated else weights
        return out

    def block_weights(self, start: int, stop: int) -> Tensor:
        """The weights of one block of outputs, fp32 (rows, K), with their inputs as they are stored."""
        scale, minimum = self._metadata(start, stop)  # (K/G, n)
        q = self._codes(start, stop).float().unflatten(0, (-1, self.group_size))  # (K/G, G, n)
        return q.sub_(zero_point(scale, minimum)[:, None]).mul_(scale[:, None]).flatten(0, 1).T  # (n, K)

    def blocks(self) -> Iterator[tuple[int, int]]:
        """First row and end of each block of outputs."""
        return ((start, min(start + BLOCK, self.shape[0])) for start in range(0, self.shape[0], BLOCK))

    def block(self, name: str, start: int, stop: int) -> Tensor:
        """A view of one block of `codes`, `high` or a part with one item per group: (items per row, rows)."""
        items = len(self.parts[name]) // self.shape[0]
        return self.parts[name][start * items : stop * items].view(items, stop - start)

    def _codes(self, start: int, stop: int) -> Tensor:
        """Codes of a block, int32 (K, rows)."""
        codes = unpack(self.block("codes", start, stop), WIDTH[self.bits], 32 // WIDTH[self.bits])
        return codes | unpack(self.block("high", start, stop), 1, 16) << 2 if self.bits == 3 else codes

    def _metadata(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """Scale and minimum of a block as stored, fp32 (K/G, rows) each."""
        if self.metadata_bits == 16:
            return self.block("scale", start, stop).float(), self.block("minimum", start, stop).float()
        groups = self.shape[1] // self.group_size
        grids = slice(start * groups // SUPER, -(-stop * groups // SUPER))
        base, span, top, min_span = (
            self.parts[name][grids].float().repeat_interleave(SUPER)[: groups * (stop - start)].view(groups, -1)
            for name in ("scale_base", "scale_span", "min_top", "min_span")
        )
        scale = base + self.block("scale_codes", start, stop) * (span / 256)
        return scale, top - self.block("min_codes", start, stop) * (min_span / 256)

    # To and from memory and files

    @classmethod
    def empty(
        cls, shape: tuple[int, ...], bits: int, group_size: int, metadata_bits: int = 8, rotated: bool = False
    ) -> QTensor:
        """A matrix whose parts are allocated but not filled."""
        form = tuple(shape), bits, group_size, metadata_bits
        check_format(*form)
        return cls(*form, Parts(_memory(packed_nbytes(*form)), form), rotated)

    @classmethod
    def from_buffer(
        cls,
        buffer: Tensor,
        offset: int,
        shape: tuple[int, ...],
        bits: int,
        group_size: int,
        metadata_bits: int = 8,
        rotated: bool = False,
    ) -> QTensor:
        """Views, not copies, of the `packed_nbytes` bytes of a uint8 buffer (nbytes,) that begin at `offset`.

        The content is not read, so it may arrive later. Raises MixoffError if the bytes are not inside the buffer, or
        do not begin at a multiple of 4 bytes in memory.
        """
        form = tuple(shape), bits, group_size, metadata_bits
        end = offset + packed_nbytes(*form)
        if buffer.dtype != torch.uint8 or buffer.dim() != 1 or not buffer.is_contiguous():
            raise MixoffError(
                f"a buffer is contiguous uint8 of one dimension, not {buffer.dtype} {tuple(buffer.shape)}"
            )
        if offset < 0 or end > len(buffer):
            raise MixoffError(f"bytes {offset} to {end} are not inside a buffer of {len(buffer)}")
        if (buffer.data_ptr() + offset) % 4 or (buffer.storage_offset() + offset) % 4:
            raise MixoffError(
                f"offset {offset} is not a multiple of 4 bytes in memory, where a quantized matrix begins"
            )
        return cls(*form, Parts(buffer[offset:end], form), rotated)

    def to_buffer(self, buffer: Tensor | None = None, offset: int = 0) -> Tensor:
        """Write the byte image into a uint8 buffer (nbytes,) from `offset`, a fresh one if none is given; return it."""
        if buffer is None:
            buffer = torch.empty(offset + self.nbytes, dtype=torch.uint8, device=self.device)
        image = self.from_buffer(buffer, offset, self.shape, self.bits, self.group_size, self.metadata_bits)
        for name, part in image.parts.items():
            part.copy_(self.parts[name])
        return buffer

    def to(self, device: torch.device | str) -> QTensor:
        """The same matrix on another device."""
        form = self.shape, self.bits, self.group_size, self.metadata_bits
        if self.device == torch.device(device):
            return self
        return QTensor(*form, Parts(self.image.to(device), form), self.rotated)

    def to_tensors(self) -> tuple[dict[str, Tensor], dict]:
        """The parts by name, and a JSON description for `from_tensors`; both fit into a safetensors file."""
        meta = {"bits": self.bits, "group_size": self.group_size, "metadata_bits": self.metadata_bits}
        return dict(self.parts), {"format": FORMAT, "shape": list(self.shape), **meta}

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor], meta: dict, room: Tensor | None = None) -> QTensor:
        """The inverse of `to_tensors`, for tensors from any source.

        - tensors: parts by name.
        - meta: description of the matrix.
        - room: uint8 memory (nbytes,) to copy the parts into; None allocates it.

        Raises CheckpointError for keys, shapes, dtypes or values that a quantized matrix cannot have.
        """
        if not isinstance(meta, dict) or set(meta) != {"format", "shape", "bits", "group_size", "metadata_bits"}:
            raise CheckpointError(f"this is not the description of a quantized matrix: {str(meta)[:200]}")
        if meta["format"] != FORMAT or not isinstance(meta["shape"], list):
            raise CheckpointError(f"this mixoff reads {FORMAT}, not {str(meta)[:200]}: convert the model again")
        form = tuple(meta["shape"]), meta["bits"], meta["group_size"], meta["metadata_bits"]
        try:
            wanted = {name: (size, dtype) for name, size, dtype in layout(*form)}
        except MixoffError as error:
            raise CheckpointError(f"damaged description of a quantized matrix: {error}") from None
        given = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}
        if given != wanted:
            raise CheckpointError(f"the parts of a quantized {form[0]} matrix are {given}, and should be {wanted}")
        q = cls.empty(*form) if room is None else cls.from_buffer(room, 0, *form)
        for name, part in q.parts.items():
            part.copy_(tensors[name])
        q.check_values()
        return q

    def check_values(self) -> None:
        """Raise CheckpointError if the metadata holds NaN, infinity or a negative scale, as damaged files do."""
        for name, part in self.parts.items():
            signed = name in ("minimum", "min_top")
            if part.is_floating_point() and not (part.isfinite() & (signed | (part >= 0))).all():
                raise CheckpointError(f"{name} of a quantized {self.shape} matrix is damaged: convert the model again")
