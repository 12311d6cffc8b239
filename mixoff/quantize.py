"""Weights in 2, 3, 4 or 8 bits: solvers, packed storage, and which part of a model gets how many bits.

Letters: **N** outputs (rows), **K** inputs (columns), **G** group size. A group is G neighbours in one row that share
a scale and a zero: `w = (q - zero) * scale`, q a whole number. Stored are the scale and the minimum, `-zero * scale`.

All parts lie in one order, from which a kernel computes without repacking (K-major): blocks of 128 outputs; in a block
the inputs ascending; beside each other the outputs of the block. A 32-bit word holds 16, 8 or 4 neighbouring inputs of
one output, the first in its lowest bits; the high bits of 3-bit codes lie apart, 16 in a 16-bit word. 128 groups that
follow each other in this order share a grid for their 8-bit metadata (a super-group; the last one may be short).

Does not know models, files or kernels.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from types import ModuleType

import numpy as np
import torch
from torch import Tensor

from mixoff.errors import CheckpointError, MixoffError
from mixoff.pages import slab
from mixoff.units import format_nbytes

BITS = (2, 3, 4, 8)
GROUP_SIZES = (16, 32, 64, 128)
METADATA_BITS = (8, 16)
SOLVERS = ("rtn", "hqq", "lsq")
DEFAULT_SOLVER = "lsq"  # the winner at 2 and 4 bits in docs/quantization.md
FORMAT = "mixoff-qtensor-1"

BLOCK = 128  # outputs whose codes lie beside each other
SUPER = 128  # groups on one metadata grid
HUGE_PAGE = 2 << 20  # bytes
WIDTH = {2: 2, 3: 2, 4: 4, 8: 8}  # bits of a code in the part `codes`; the third bit of 3-bit codes lies in `high`
LARGEST = 8192.0  # |w| up to which every stored number stays below fp16's 65504
SMALLEST_SCALE = 2.0**-24  # the smallest fp16 number above zero
RESOLUTION = 2.0**-12  # of an fp16 minimum: a finer scale would be in vain
SLICE = 2**15 - 1  # weights in work at a time: they stay in cache, and torch shares no fewer than 2**15 among threads
ITERATIONS = 20  # hqq 0.2.8's default; groups settle after three to five
LP_NORM, BETA = 0.7, 10.0  # hqq 0.2.8's defaults
SHRINK_ABOVE = BETA ** (-1 / (2 - LP_NORM))  # the l_p shrinkage sets errors below this, 0.170, to zero
ROUND = np.float32(1.5 * 2**23)  # x + ROUND - ROUND rounds |x| < 2**22 half to even, in torch and numba alike


# Storage --------------------------------------------------------------------------------------------------------------


def check_format(shape: tuple[int, int], bits: int, group_size: int, metadata_bits: int) -> None:
    """Raise MixoffError, with the way out, unless a matrix of this shape can be stored so."""
    choices = {
        "bits": (bits, BITS),
        "group_size": (group_size, GROUP_SIZES),
        "metadata_bits": (metadata_bits, METADATA_BITS),
    }
    for name, (value, allowed) in choices.items():
        if type(value) is not int or value not in allowed:
            raise MixoffError(f"{name} is {value!r}: choose one of {', '.join(map(str, allowed))}")
    if len(shape) != 2 or any(type(size) is not int or size < 1 for size in shape):
        raise MixoffError(
            f"only matrices are quantized, not shape {tuple(shape)}: pass one (outputs, inputs) slice at a time"
        )
    if shape[1] % group_size:
        dividing = " or ".join(str(size) for size in GROUP_SIZES if shape[1] % size == 0)
        advice = f"use {dividing}" if dividing else f"nor does any of {GROUP_SIZES}: keep this matrix in 16 bits"
        raise MixoffError(f"a group of {group_size} does not divide the width {shape[1]}: {advice}")


def layout(
    shape: tuple[int, int], bits: int, group_size: int, metadata_bits: int = 8
) -> list[tuple[str, tuple[int], torch.dtype]]:
    """Name, shape and dtype of each part of a quantized (N, K) matrix, in the order of its byte image.

    >>> [(name, *size) for name, size, _ in layout((256, 64), bits=2, group_size=32)]  # doctest: +NORMALIZE_WHITESPACE
    [('codes', 1024), ('scale_base', 4), ('scale_span', 4), ('min_top', 4), ('min_span', 4),
     ('scale_codes', 512), ('min_codes', 512)]
    """
    check_format(shape, bits, group_size, metadata_bits)
    weights = shape[0] * shape[1]
    groups = weights // group_size
    parts = [("codes", weights * WIDTH[bits] // 32, torch.int32)]
    if bits == 3:
        parts.append(("high", weights // 16, torch.int16))
    if metadata_bits == 16:
        parts += [("scale", groups, torch.float16), ("minimum", groups, torch.float16)]
    else:
        grids = ("scale_base", "scale_span", "min_top", "min_span")
        parts += [(name, -(-groups // SUPER), torch.float16) for name in grids]
        parts += [("scale_codes", groups, torch.uint8), ("min_codes", groups, torch.uint8)]
    return [(name, (size,), dtype) for name, size, dtype in parts]


@functools.lru_cache(maxsize=256, typed=True)
def places(
    shape: tuple[int, int], bits: int, group_size: int, metadata_bits: int
) -> dict[str, tuple[int, int, torch.dtype]]:
    """First byte, end and dtype of each part in the byte image."""
    found, start = {}, 0
    for name, (size,), dtype in layout(shape, bits, group_size, metadata_bits):
        found[name] = start, start + size * dtype.itemsize, dtype
        start = found[name][1]
    return found


@functools.lru_cache(maxsize=256, typed=True)
def packed_nbytes(shape: tuple[int, int], bits: int, group_size: int, metadata_bits: int = 8) -> int:
    """Bytes of a quantized (N, K) matrix, metadata included, from its shape alone.

    >>> 3 * packed_nbytes((14336, 4096), bits=2, group_size=32) / 2**20  # an expert of Mixtral-8x7B, MiB
    52.828125
    """
    return sum(size * dtype.itemsize for _, (size,), dtype in layout(shape, bits, group_size, metadata_bits))


class Parts(Mapping):
    """The parts of a quantized matrix as views of its byte image, cut when they are asked for."""

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
    """Memory for the image of a matrix, uint8 (nbytes,); in huge pages where it fills one."""
    return slab(nbytes) if nbytes >= HUGE_PAGE else torch.empty(nbytes, dtype=torch.uint8)


@dataclass(frozen=True, repr=False, eq=False)
class QTensor:
    """A quantized (N, K) matrix: codes and metadata in the parts that `layout` describes.

    The parts own their memory or are views into a buffer, such as a slot of an arena (`from_buffer`).
    Tested against the hqq package, brute force, and `layout`.
    """

    shape: tuple[int, int]
    bits: int
    group_size: int
    metadata_bits: int
    parts: Mapping[str, Tensor]

    @property
    def nbytes(self) -> int:
        """Bytes of all parts."""
        return packed_nbytes(self.shape, self.bits, self.group_size, self.metadata_bits)

    @functools.cached_property
    def image(self) -> Tensor:
        """The byte image, uint8 (nbytes,): memory that the parts share, or a copy where they do not lie together."""
        return self.parts.image if isinstance(self.parts, Parts) else self.to_buffer()

    @functools.cached_property
    def plans(self) -> dict:
        """What a kernel works out once for this matrix; it ends with it."""
        return {}

    @property
    def bits_per_weight(self) -> float:
        """Bits that a weight costs, metadata included."""
        return 8 * self.nbytes / math.prod(self.shape)

    @property
    def device(self) -> torch.device:
        return self.parts["codes"].device

    def __repr__(self) -> str:
        rows, columns = self.shape
        size = f"{self.bits_per_weight:.3f} bits/weight, {format_nbytes(self.nbytes)}"
        return f"QTensor({rows}x{columns}, {self.bits}-bit g{self.group_size}, {size})"

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
        """The weight that code 0 stands for in each group, fp32 (N, K/G)."""
        return torch.cat([self._metadata(*rows)[1] for rows in self.blocks()], 1).T

    @property
    def zero(self) -> Tensor:
        """The code, rarely a whole number, that would stand for the weight 0 in each group, fp32 (N, K/G)."""
        return zero_point(self.scale, self.minimum)

    def dequantize(self, dtype: torch.dtype = torch.float32, out: Tensor | None = None) -> Tensor:
        """The weights `(q - zero) * scale` (N, K), computed in fp32, rounded to `dtype` or into `out`."""
        out = torch.empty(self.shape, dtype=dtype, device=self.device) if out is None else out
        if tuple(out.shape) != self.shape:
            raise MixoffError(f"out has shape {tuple(out.shape)}, and the matrix has {self.shape}")
        for start, stop in self.blocks():
            out[start:stop] = self.block_weights(start, stop)
        return out

    def block_weights(self, start: int, stop: int) -> Tensor:
        """The weights of one block of outputs, fp32 (rows, K)."""
        scale, minimum = self._metadata(start, stop)  # (K/G, n)
        q = self._codes(start, stop).float().unflatten(0, (-1, self.group_size))  # (K/G, G, n)
        return q.sub_(zero_point(scale, minimum)[:, None]).mul_(scale[:, None]).flatten(0, 1).T  # (n, K)

    def blocks(self) -> Iterator[tuple[int, int]]:
        """First row and end of each block of outputs."""
        return ((start, min(start + BLOCK, self.shape[0])) for start in range(0, self.shape[0], BLOCK))

    def block(self, name: str, start: int, stop: int) -> Tensor:
        """A view of what `codes`, `high` or a part with one item a group holds of one block: (items a row, rows)."""
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
    def empty(cls, shape: tuple[int, int], bits: int, group_size: int, metadata_bits: int = 8) -> QTensor:
        """A matrix with parts that are allocated and not yet filled."""
        form = tuple(shape), bits, group_size, metadata_bits
        check_format(*form)
        return cls(*form, Parts(_memory(packed_nbytes(*form)), form))

    @classmethod
    def from_buffer(
        cls, buffer: Tensor, offset: int, shape: tuple[int, int], bits: int, group_size: int, metadata_bits: int = 8
    ) -> QTensor:
        """Views, not copies, of the `packed_nbytes` bytes of a uint8 buffer (nbytes,) that begin at `offset`.

        The content is not looked at: it may arrive later. Raises MixoffError if the bytes do not lie inside the buffer
        or do not begin at a multiple of 4 bytes in memory.
        """
        form = tuple(shape), bits, group_size, metadata_bits
        end = offset + packed_nbytes(*form)
        if buffer.dtype != torch.uint8 or buffer.dim() != 1 or not buffer.is_contiguous():
            raise MixoffError(
                f"a buffer is contiguous uint8 of one dimension, not {buffer.dtype} {tuple(buffer.shape)}"
            )
        if offset < 0 or end > len(buffer):
            raise MixoffError(f"bytes {offset} to {end} do not lie inside a buffer of {len(buffer)}")
        if (buffer.data_ptr() + offset) % 4 or (buffer.storage_offset() + offset) % 4:
            raise MixoffError(f"a quantized matrix begins at a multiple of 4 bytes, and offset {offset} is none")
        return cls(*form, Parts(buffer[offset:end], form))

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
        return self if self.device == torch.device(device) else QTensor(*form, Parts(self.image.to(device), form))

    def to_tensors(self) -> tuple[dict[str, Tensor], dict]:
        """The parts by name, and plain JSON with what else `from_tensors` needs: for a safetensors file."""
        meta = {"bits": self.bits, "group_size": self.group_size, "metadata_bits": self.metadata_bits}
        return dict(self.parts), {"format": FORMAT, "shape": list(self.shape), **meta}

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor], meta: dict, room: Tensor | None = None) -> QTensor:
        """The inverse of `to_tensors`, for tensors from anywhere; copied to where `room` (nbytes,) begins, if given.

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
        found = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}
        if found != wanted:
            raise CheckpointError(f"the parts of a quantized {form[0]} matrix are {found}, and should be {wanted}")
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


def pack(codes: Tensor, width: int, per_word: int) -> Tensor:
    """Codes of `width` bits, int32 (rows, K), in words of `per_word`, the first lowest: int32 (K/per_word, rows).

    >>> hex(pack(torch.tensor([[1, 2, 3, 0]] * 4).view(1, 16), width=2, per_word=16).item())
    '0x39393939'
    """
    shifts = torch.arange(0, per_word * width, width, dtype=torch.int32)
    return (codes.unflatten(1, (-1, per_word)) << shifts).sum(-1, dtype=torch.int32).T


def unpack(words: Tensor, width: int, per_word: int) -> Tensor:
    """The inverse of `pack`, inputs first: words (K/per_word, rows) into int32 (K, rows)."""
    shifts = torch.arange(0, per_word * width, width, dtype=torch.int32, device=words.device)
    return ((words.int()[:, None] >> shifts[:, None]) & (2**width - 1)).flatten(0, 1)


# Metadata -------------------------------------------------------------------------------------------------------------


def zero_point(scale: Tensor, minimum: Tensor) -> Tensor:
    """`-minimum / scale`, and 0 for a group whose scale is 0: all its weights are."""
    return torch.where(scale > 0, -minimum / scale, 0.0)


def to_grid(values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Base and span, fp16 (super-groups,), and codes, uint8 (groups,): values (groups,) ~ base + code * span / 256.

    The span is stored, not its 256th, which fp16 could not tell from zero where weights are small.
    """
    rows = torch.cat([values, values[-1:].expand(-len(values) % SUPER)]).view(-1, SUPER)
    base = rows.amin(1).half() + 0.0  # no -0.0, whose sign depends on the order of comparisons
    span = ((rows.amax(1) - base) * (256 / 255)).clamp_min(0).half() + 0.0
    per_value = torch.where(span > 0, 256 / span.float(), 0.0)
    codes = ((rows - base[:, None]) * per_value[:, None]).round().clamp(0, 255)
    return base, span, codes.flatten()[: len(values)].to(torch.uint8)


def keep_zeros(scale: Tensor, minimum: Tensor) -> tuple[Tensor, Tensor]:
    """Metadata (groups,) in which groups of zeros, marked by scale 0, remain exactly zero on the super-groups' grids.

    Such a group can do with any scale, so it takes the least of its neighbours, but needs the minimum 0: where one is
    present, minima above zero are lowered to zero, which makes zero the top of the grid.
    """
    padding = -len(scale) % SUPER
    scales = torch.nn.functional.pad(scale, (0, padding), value=math.inf).view(-1, SUPER)
    minima = torch.nn.functional.pad(minimum, (0, padding)).view(-1, SUPER)
    zeros = scales == 0
    least = scales.masked_fill(zeros, math.inf).amin(1, keepdim=True).nan_to_num(posinf=0)
    minima = torch.where(zeros.any(1, keepdim=True), minima.clamp_max(0), minima)
    return torch.where(zeros, least, scales).flatten()[: len(scale)], minima.flatten()[: len(scale)]


def store_metadata(q: QTensor, start: int, stop: int, scale: Tensor, minimum: Tensor) -> None:
    """Write scale and minimum, fp32 (rows, K/G), of one block into `q`, in as many bits as `q` has for them."""
    groups = q.shape[1] // q.group_size
    items = slice(start * groups, stop * groups)
    scale, minimum = scale.T.flatten(), minimum.T.flatten()
    if q.metadata_bits == 16:
        q.parts["scale"][items], q.parts["minimum"][items] = scale.half() + 0.0, minimum.half() + 0.0
        return
    scale, minimum = keep_zeros(scale, minimum)
    grids = slice(items.start // SUPER, -(-items.stop // SUPER))
    q.parts["scale_base"][grids], q.parts["scale_span"][grids], q.parts["scale_codes"][items] = to_grid(scale)
    base, q.parts["min_span"][grids], q.parts["min_codes"][items] = to_grid(-minimum)
    q.parts["min_top"][grids] = 0.0 - base


# Quantizing -----------------------------------------------------------------------------------------------------------


def quantize(
    w: Tensor,
    bits: int = 2,
    group_size: int = 32,
    solver: str = DEFAULT_SOLVER,
    metadata_bits: int = 8,
    each: Callable = map,
) -> QTensor:
    """Quantize a matrix (N, K), fp32, fp16 or bf16, in groups along its inputs.

    `rtn` rounds to the grid between the least and the greatest weight of each group. `hqq` also shifts that grid
    (half-quadratic quantization, Badri and Shaji 2023, mobiusml.github.io/hqq_blog). `lsq` fits scale and minimum by
    least squares, then stretches each row to unit gain: `row @ row_hat == row @ row`. Codes are rounded against the
    metadata as stored. Groups of zeros stay exactly zero; other constant groups are as exact as the metadata.

    The result is on `w`'s device, and the same bit for bit with any number of threads, with or without numba. The inner
    loops use one thread and let others run: `each`, by default `map` of 128 rows at a time, may be a pool's. Scratch
    memory stays below a tenth of a matrix of 4096 rows.

    Raises MixoffError for a group size that does not divide K, for NaN, and for |w| above 8192.
    Tested against the hqq package (relative error within 1 %) and brute force.

    >>> quantize(torch.linspace(-1, 1, 256).view(4, 64), bits=4, group_size=64, metadata_bits=16)
    QTensor(4x64, 4-bit g64, 4.500 bits/weight, 144 B)
    """
    if not isinstance(w, Tensor) or w.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise MixoffError(f"weights are fp32, fp16 or bf16 tensors, not {getattr(w, 'dtype', type(w).__name__)}")
    if solver not in SOLVERS:
        raise MixoffError(f"no solver {solver!r}: choose one of {', '.join(SOLVERS)}")
    q = QTensor.empty(tuple(w.shape), bits, group_size, metadata_bits)
    for _ in each(lambda rows: quantize_block(w.detach(), q, *rows, solver), q.blocks()):
        pass
    return q.to(w.device)


def quantize_block(w: Tensor, q: QTensor, start: int, stop: int, solver: str) -> None:
    """Solve, store and pack the rows start..stop of `w` (N, K), which share nothing with other blocks, into `q`."""
    if compiled := loops():
        w = widened(w[start:stop], q.group_size)
        arrays = w.flatten(0, 1).numpy(), SOLVERS.index(solver), q.bits, *block_arrays(q, start, stop)
        if not compiled.compiled()(*arrays):
            check_range(w)
    else:
        quantize_block_torch(w[start:stop], q, start, stop, solver)


def block_arrays(q: QTensor, start: int, stop: int) -> tuple:
    """Where the parts of a block stand, as `solvers.compiled` takes them; of what `q` does not have, nothing."""
    groups, none = q.shape[1] // q.group_size, torch.empty(0, 0, dtype=torch.int16)
    items = slice(start * groups, stop * groups)
    ranges = dict.fromkeys(q.parts, slice(items.start // SUPER, -(-items.stop // SUPER)))
    ranges |= dict.fromkeys(("scale", "minimum", "scale_codes", "min_codes"), items)

    def parts(dtype: torch.dtype, *names: str) -> tuple[np.ndarray, ...]:
        found = (q.parts[name][ranges[name]] if name in q.parts else none.flatten() for name in names)
        return tuple(part.view(dtype).numpy() for part in found)

    high = q.block("high", start, stop) if q.bits == 3 else none
    wide = parts(torch.int16, "scale", "minimum")
    grids = parts(torch.int16, "scale_base", "scale_span", "min_top", "min_span")
    return (
        q.block("codes", start, stop).numpy(),
        high.numpy(),
        wide,
        grids,
        parts(torch.uint8, "scale_codes", "min_codes"),
    )


def quantize_block_torch(w: Tensor, q: QTensor, start: int, stop: int, solver: str) -> None:
    """`quantize_block` without numba, of the rows `w` (rows, K)."""
    top, step = 2**q.bits - 1, max(1, SLICE // q.shape[1])
    slices = [slice(row, min(row + step, stop - start)) for row in range(0, stop - start, step)]
    solved = torch.empty(4, stop - start, q.shape[1] // q.group_size)
    for rows in slices:
        solved[:, rows] = torch.stack(solve(widened(w[rows], q.group_size), top, solver))
    scale, minimum, energy, overlap = solved
    gain = torch.where(fold(overlap) > 0, fold(energy) / fold(overlap), 1.0).clamp(1, 2)[:, None]  # (rows, 1)
    store_metadata(q, start, stop, scale * gain, minimum * gain)
    scale, minimum = (stored.T for stored in q._metadata(start, stop))  # (rows, K/G)
    factor, zero = torch.where(scale > 0, gain / scale, 0.0), zero_point(scale, minimum)
    for rows in slices:
        copy = widened(w[rows], q.group_size)
        codes = nearest_codes(copy.mul_(factor[rows][..., None]).add_(zero[rows][..., None]), top)
        store_codes(q, start, stop, rows, codes.int().flatten(1))


def widened(w: Tensor, group_size: int) -> Tensor:
    """An fp32 copy (rows, K/G, G) of some rows (rows, K)."""
    copy = torch.empty(w.shape)
    for rows in zip(copy.split(few := max(1, SLICE // w.shape[1])), w.split(few), strict=True):
        rows[0].copy_(rows[1])
    return copy.unflatten(1, (-1, group_size))


def store_codes(q: QTensor, start: int, stop: int, rows: slice, codes: Tensor) -> None:
    """Pack the codes, int32 (rows, K), of some rows of a block into `q`."""
    width = WIDTH[q.bits]
    q.block("codes", start, stop)[:, rows] = pack(codes & (2**width - 1), width, 32 // width)
    if q.bits == 3:
        q.block("high", start, stop)[:, rows] = pack(codes >> 2, 1, 16).to(torch.int16)


def solve(w: Tensor, top: int, solver: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Scale and minimum for groups (rows, K/G, G) and codes 0..top, and two sums whose row totals' ratio is the gain.

    The sums are of w * w and of w times its approximation, ones where a solver stretches nothing; all (rows, K/G).
    """
    check_range(w)
    low, high = w.amin(-1), w.amax(-1)
    largest = torch.maximum(-low, high)
    floor = (largest * RESOLUTION).clamp_min(SMALLEST_SCALE)
    scale, minimum = torch.maximum((high - low) / top, floor), low.clone()
    energy, overlap = torch.ones_like(scale), torch.ones_like(scale)
    if solver == "hqq":
        zero = -low / scale
        refine_torch(w, 1 / scale, high - low > SHRINK_ABOVE, top, zero)
        minimum = -zero * scale
    elif solver == "lsq":
        fit_torch(w, top, scale, minimum, energy, overlap)
        scale = torch.maximum(scale, floor)
    constant = low == high  # then |c| is the scale and the code 0 or 1; the scale 0 marks a group of zeros
    scale, minimum = torch.where(constant, largest, scale), torch.where(constant, low.clamp_max(0), minimum)
    return scale, minimum, energy, overlap


def check_range(w: Tensor) -> None:
    """Raise MixoffError for NaN, infinity, and what fp16 metadata cannot reach."""
    low, high = torch.aminmax(w)
    if not (largest := torch.maximum(-low, high)) <= LARGEST:
        found = f"{largest:.4g}, above {LARGEST:.0f}" if largest.isfinite() else "NaN or infinity"
        raise MixoffError(f"the weights hold {found}: repair or rescale the checkpoint")


def is_finite(w: Tensor) -> bool:
    """Whether fp32, fp16 or bf16 weights hold neither NaN nor infinity.

    Two maxima over their bits, read as whole numbers with a sign and without one: above the bits of infinity, of either
    sign, are only NaNs. That takes no memory, and less time than the bytes take to be hashed.
    """
    signed, unsigned = (np.int32, np.uint32) if w.dtype == torch.float32 else (np.int16, np.uint16)
    infinity = torch.tensor([math.inf, -math.inf], dtype=w.dtype).view(getattr(torch, signed.__name__)).numpy()
    bits = w.detach().contiguous().view(getattr(torch, signed.__name__)).numpy()
    return not bits.size or bool(bits.max() < infinity[0] and bits.view(unsigned).max() < infinity.view(unsigned)[1])


# Inner loops in torch; `solvers` has them compiled by numba, with equal results ---------------------------------------


@functools.cache
def loops() -> ModuleType | None:
    """The compiled solvers; None where numba is not installed."""
    try:
        from mixoff import solvers
    except ImportError:
        return None
    return solvers


def fold(values: Tensor) -> Tensor:
    """Sum over the last dimension by adding its halves: the same bits on every machine and in whatever company."""
    while (width := values.shape[-1]) > 1:
        if width % 2:
            values = torch.nn.functional.pad(values, (0, 1))
        values = values[..., : (width + 1) // 2] + values[..., (width + 1) // 2 :]
    return values[..., 0]


def nearest_codes(x: Tensor, top: int) -> Tensor:
    """`x` held between 0 and `top` and rounded half to even, in place."""
    return x.clamp_(0, top).add_(float(ROUND)).sub_(float(ROUND))


def refine_torch(w: Tensor, inverse: Tensor, wide: Tensor, top: int, zero: Tensor) -> None:
    """HQQ on groups w (..., G): alternate codes and `zero` (...) until they settle.

    The zero that suits the codes best is `mean(q - (w - e) / scale)`, e the errors after l_p shrinkage. No error
    exceeds its group's range, so groups not marked `wide` have no e other than 0. `inverse` is 1 / scale.
    """
    share, mean, shrunk = 1 / w.shape[-1], fold(w) / w.shape[-1], torch.zeros(())
    for _ in range(ITERATIONS):
        q = nearest_codes((w * inverse[..., None]).add_(zero[..., None]), top)
        if wide.any():
            e = (w - (q - zero[..., None]) / inverse[..., None]).double()
            size = e.abs()
            shrunk = fold(
                (size - size ** (LP_NORM - 1) / BETA).masked_fill_(size <= SHRINK_ABOVE, 0) * e.sign()
            ).float()
        settled = zero.clone()
        zero.copy_(q.sum(-1) * share - (mean - shrunk * share) * inverse)
        if torch.equal(zero, settled):
            break


def fit_torch(w: Tensor, top: int, scale: Tensor, minimum: Tensor, energy: Tensor, overlap: Tensor) -> None:
    """Least squares on groups w (..., G): alternate codes and the line `scale * q + minimum` through (q, w).

    `energy` becomes the sum of w * w, `overlap` that of w times its approximation; these and the others (...).
    """
    size, mean = w.shape[-1], fold(w) / w.shape[-1]
    for _ in range(ITERATIONS):
        q = nearest_codes((w - minimum[..., None]).mul_((1 / scale)[..., None]), top)
        covariance, total = fold(q * (w - mean[..., None])), q.sum(-1)
        spread = size * (q * q).sum(-1).int() - total.int() ** 2
        before = scale.clone(), minimum.clone()
        scale.copy_(torch.where(spread > 0, size * covariance / spread.float(), scale))
        minimum.copy_(mean - scale * (total / size))
        if torch.equal(scale, before[0]) and torch.equal(minimum, before[1]):
            break
    energy.copy_(fold(w * w))
    overlap.copy_(scale * (covariance + total * mean) + minimum * (size * mean))


# Schemes --------------------------------------------------------------------------------------------------------------

ROLES = ("attention", "experts", "shared_experts", "head", "embeddings")
KEPT = ("router", "norms")  # always in 16 bits


@dataclass(frozen=True)
class Precision:
    """Bits and group size of one part of a model."""

    bits: int
    group_size: int

    def __post_init__(self) -> None:
        check_format((1, max(GROUP_SIZES)), self.bits, self.group_size, max(METADATA_BITS))


@dataclass(frozen=True)
class Scheme:
    """Which part of a model gets how many bits; None leaves it in 16. Routers and norms always stay in 16.

    Mixtral-8x7B so takes (modelled, GiB): mixed 14.4, paper 17.1, small 13.0, quality 23.5, none 87.0. `paper` has the
    bits and groups of Eliseev and Mazur (arXiv 2312.17238, section 4.2); solver and metadata are ours.

    >>> Scheme.preset("mixed").precision("experts"), Scheme.preset("mixed").precision("router")
    (Precision(bits=2, group_size=32), None)
    """

    attention: Precision | None = None
    experts: Precision | None = None
    shared_experts: Precision | None = None
    head: Precision | None = None
    embeddings: Precision | None = None
    metadata_bits: int = 8
    solver: str = DEFAULT_SOLVER

    def __post_init__(self) -> None:
        for role in ROLES:
            if not isinstance(getattr(self, role), (Precision, type(None))):
                raise MixoffError(f"{role} of a scheme is a Precision or None, not {getattr(self, role)!r}")
        if type(self.metadata_bits) is not int or self.metadata_bits not in METADATA_BITS:
            raise MixoffError(f"metadata_bits is {self.metadata_bits!r}: choose 8 or 16")
        if self.solver not in SOLVERS:
            raise MixoffError(f"no solver {self.solver!r}: choose one of {', '.join(SOLVERS)}")

    @classmethod
    def preset(cls, name: str) -> Scheme:
        """The scheme of that name; MixoffError lists the names."""
        if name not in PRESETS:
            raise MixoffError(f"no scheme {name!r}: choose one of {', '.join(PRESETS)}")
        return PRESETS[name]

    def precision(self, role: str) -> Precision | None:
        """Bits and group of a part, None where it stays in 16 bits."""
        if role not in ROLES + KEPT:
            raise MixoffError(f"a model has no part {role!r}: choose one of {', '.join(ROLES + KEPT)}")
        return None if role in KEPT else getattr(self, role)

    def quantize(self, w: Tensor, role: str, each: Callable = map) -> QTensor | None:
        """`w` (N, K) as this scheme stores it in that part; None where it stays as it is."""
        form = self.precision(role)
        return form and quantize(w, form.bits, form.group_size, self.solver, self.metadata_bits, each)

    def to_json(self) -> str:
        """One line of JSON."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Scheme:
        """The inverse of `to_json`; raises MixoffError for anything else."""
        try:
            values = json.loads(text)
            values |= {role: values[role] and Precision(**values[role]) for role in ROLES}
            if set(values) != {field.name for field in fields(cls)}:
                raise KeyError(*set(values) - {field.name for field in fields(cls)})
        except (TypeError, ValueError, KeyError, RecursionError) as error:
            raise MixoffError(f"not a scheme in JSON ({error}): {str(text)[:200]}") from None
        return cls(**values)


PRESETS = {
    name: Scheme(attention=Precision(4, 64), experts=experts, shared_experts=Precision(4, 64))
    for name, experts in {
        "mixed": Precision(2, 32),
        "paper": Precision(2, 16),
        "small": Precision(2, 64),
        "quality": Precision(4, 64),
    }.items()
} | {"none": Scheme()}
