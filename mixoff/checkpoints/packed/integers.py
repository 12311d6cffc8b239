"""Weights of whole numbers with a scale and a zero for each group of inputs: `w = (q - zero) * scale`.

GPTQ packs codes along the inputs (Frantar et al., arXiv 2210.17323, in AutoGPTQ's layout), AWQ along the outputs in an
order of its own (Lin et al., arXiv 2306.00978, AutoAWQ's `gemm`), compressed-tensors along the inputs of each row.
Letters: **N** outputs, **K** inputs, **G** group size.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from mixoff.checkpoints.checkpoint import Read
from mixoff.checkpoints.packed.matrix import Matrix, Piece
from mixoff.errors import CheckpointError
from mixoff.quantize.layout import unpack

WORDS = {3: 3}  # words after which codes begin at the start of a word again, where that is not one
AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)  # where in a word the codes of eight neighbouring outputs are


@dataclass(frozen=True)
class Integers(Matrix):
    """Codes of `bits` bits, with a scale and a zero per group of inputs.

    - bits: bits per code.
    - groups: groups of each row.
    """

    bits: int
    groups: int

    @property
    def group_size(self) -> int:
        """Neighbouring inputs that share a scale, unless `order` says otherwise."""
        return self.shape[1] // self.groups

    @property
    def in_order(self) -> bool:
        """Whether groups are neighbouring inputs, as far as headers and configuration say."""
        return "g_idx" not in self.parts

    def codes(self, read: Read) -> Iterator[Piece]:
        """The codes, uint8, in pieces."""
        raise NotImplementedError

    def levels(self, read: Read) -> tuple[Tensor, Tensor]:
        """Scale of each group, and the weight of code 0, fp32 (N, K/G) each."""
        scale, zero = self.grid(read)
        return scale, -zero * scale

    def grid(self, read: Read) -> tuple[Tensor, Tensor]:
        """Scale and zero of each group, fp32 (N, K/G) each."""
        raise NotImplementedError

    def order(self, read: Read) -> Tensor | None:
        """Group of each input (K,), for GPTQ's act-order; None where groups are neighbours.

        Raises CheckpointError for a group that does not exist.
        """
        if "g_idx" not in self.parts:
            return None
        groups = self.whole("g_idx", read).long()
        if groups.min() < 0 or groups.max() >= self.groups:
            raise CheckpointError(
                f"{self.parts['g_idx'].file} puts an input into group {int(groups.max())} of {self.groups}: it is "
                "damaged, fetch it again"
            )
        return None if torch.equal(groups, torch.arange(self.shape[1]) // self.group_size) else groups

    def pieces(self, read: Read) -> Iterator[Piece]:
        (scale, zero), order = self.grid(read), self.order(read)
        for rows, columns, codes in self.codes(read):
            wide = [self._wide(t[rows], columns, order) for t in (scale, zero)]
            yield rows, columns, codes.float().sub_(wide[1]).mul_(wide[0])

    def _wide(self, of_groups: Tensor, columns: slice, order: Tensor | None) -> Tensor:
        """What belongs to each input of `columns`, (n, k), of what belongs to each group, (n, K/G)."""
        if order is not None:
            return of_groups[:, order[columns]]
        first, last = columns.start // self.group_size, -(-columns.stop // self.group_size)
        some = of_groups[:, first:last]
        begin = columns.start - first * self.group_size
        if (
            some.stride(0) == 1
        ):  # by columns in memory, as GPTQ's and AWQ's codes are: a product of equal strides is fast
            wide = some.T.repeat_interleave(self.group_size, 0).T
        else:
            wide = some.repeat_interleave(self.group_size, 1)
        return wide[:, begin : begin + columns.stop - columns.start]


@dataclass(frozen=True)
class Gptq(Integers):
    """qweight int32 (K * bits / 32, N), qzeros int32 (K/G, N * bits / 32), scales (K/G, N), g_idx int32 (K,).

    - offset: what has to be added to a stored zero: 1, or 0 in version 2 of the layout.
    - act_order: whether g_idx gives inputs to groups in another order, according to config.json.
    """

    offset: int
    act_order: bool = False

    @property
    def in_order(self) -> bool:
        return not self.act_order

    def codes(self, read: Read) -> Iterator[Piece]:
        N, K = self.shape
        words = WORDS.get(self.bits, 1)
        for start, stop in self.steps(K * self.bits // 32, N * 32 // self.bits, words):
            codes = _unpacked(self.some("qweight", start, stop, read), self.bits)  # (k, N)
            columns = slice(start * 32 // self.bits, stop * 32 // self.bits)
            yield slice(0, N), columns, codes.T.to(torch.uint8)

    def grid(self, read: Read) -> tuple[Tensor, Tensor]:
        zeros = _unpacked(self.whole("qzeros", read).T, self.bits)  # (N, K/G)
        zeros = (zeros + self.offset) & (2**self.bits - 1)  # as in AutoGPTQ, which stored -1 as all ones
        return self.whole("scales", read).float().T, zeros.float()


def _unpacked(words: Tensor, bits: int) -> Tensor:
    """Codes, int32 (32 / bits * m, n), of words int32 (m, n), the first lowest; those of 3 bits cross words."""
    if bits != 3:
        return unpack(words, bits, 32 // bits)
    begin = 3 * torch.arange(32)
    first, shift = begin // 32, (begin % 32)[:, None]
    wide = torch.nn.functional.pad((words.long() & 0xFFFFFFFF).unflatten(0, (-1, 3)), (0, 0, 0, 1))  # (m / 3, 4, n)
    return (((wide[:, first] >> shift) | (wide[:, first + 1] << (32 - shift))) & 7).flatten(0, 1).int()


@dataclass(frozen=True)
class Awq(Integers):
    """qweight int32 (K, N / 8), qzeros int32 (K/G, N / 8), scales (K/G, N); codes of 4 bits."""

    def codes(self, read: Read) -> Iterator[Piece]:
        N, K = self.shape
        for start, stop in self.steps(K, N):
            codes = self._unpacked(self.some("qweight", start, stop, read))  # (k, N)
            yield slice(0, N), slice(start, stop), codes.T.to(torch.uint8)

    def grid(self, read: Read) -> tuple[Tensor, Tensor]:
        zeros = self._unpacked(self.whole("qzeros", read)) if "qzeros" in self.parts else torch.full((1, 1), 8)
        scale = self.whole("scales", read).float().T
        return scale, zeros.T.float().expand_as(scale)

    def _unpacked(self, words: Tensor) -> Tensor:
        shifts = 4 * torch.tensor(AWQ_ORDER, dtype=torch.int32)
        return ((words[..., None] >> shifts) & 15).flatten(1)


@dataclass(frozen=True)
class Packed(Integers):
    """compressed-tensors: weight_packed int32 (N, K * bits / 32), weight_scale (N, K/G), or (1,) for all.

    weight_zero_point is packed along the outputs, int32 (N * bits / 32, K/G); without it the zero is the middle.
    """

    def codes(self, read: Read) -> Iterator[Piece]:
        N, K = self.shape
        for start, stop in self.steps(N, K):
            words = self.some("weight_packed", start, stop, read)
            shifts = torch.arange(0, 32, self.bits, dtype=torch.int32)
            codes = ((words[..., None] >> shifts) & (2**self.bits - 1)).flatten(1)
            yield slice(start, stop), slice(0, K), codes.to(torch.uint8)

    def grid(self, read: Read) -> tuple[Tensor, Tensor]:
        N = self.shape[0]
        scale = self.whole("weight_scale", read).float().reshape(-1, self.groups).expand(N, -1)
        if "weight_zero_point" not in self.parts:
            return scale, torch.full_like(scale, 2 ** (self.bits - 1))
        return scale, self._zeros(self.whole("weight_zero_point", read)).float().reshape(-1, self.groups).expand(N, -1)

    def _zeros(self, stored: Tensor) -> Tensor:
        if stored.dtype == torch.int32:
            return unpack(stored, self.bits, 32 // self.bits)[: self.shape[0]]
        return stored.int() + 2 ** (self.bits - 1)


@dataclass(frozen=True)
class Bytes(Packed):
    """compressed-tensors: weight int8 (N, K), scale and zero as in `Packed`, zeros int8."""

    def codes(self, read: Read) -> Iterator[Piece]:
        N, K = self.shape
        for start, stop in self.steps(N, K):
            signed = self.some("weight", start, stop, read)
            yield slice(start, stop), slice(0, K), (signed.short() + 128).to(torch.uint8)
