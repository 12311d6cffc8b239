"""Rows of many experts in one compiled call: for prompts of models with many small experts.

Letters: **R** rows of all experts together, **D** model width, **F** expert width.
A prompt of 64 tokens gives each of 128 experts four rows. Expert by expert, Python and PyTorch took half of the time.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch

from mixoff.kernels.cpu import program, threads
from mixoff.kernels.cpu.products import Prepared, job_of, padded_rows
from mixoff.kernels.cpu.program import Memory, Program
from mixoff.quantize.tensor import QTensor

MOST_NBYTES = 32 << 20  # for intermediate values of one call


def gated_mlps(x: torch.Tensor, counts: Sequence[int], experts: Sequence[tuple[QTensor, QTensor]]) -> torch.Tensor:
    """`products.gated_mlps` for each expert's own rows: x (R, D), sorted by expert -> (R, D), in x's dtype.

    - counts: rows of each expert, R together.
    - experts: gate_up (2F, D) and down (D, F) of each; all pairs in one form, multiplied as int8.
    """
    rows, out, first = x.float().contiguous(), torch.empty(len(x), experts[0][1].shape[0]), 0
    for start, stop in _parts(counts, experts[0]):
        size = sum(counts[start:stop])
        _compute(rows[first : first + size], counts[start:stop], experts[start:stop], out[first : first + size])
        first += size
    return out.to(x.dtype)


def _parts(counts: Sequence[int], expert: tuple[QTensor, QTensor]) -> Iterator[tuple[int, int]]:
    """Ranges of experts whose intermediate values fit MOST_NBYTES, with one expert at least."""
    gate_up, down = expert
    nbytes, start, rows = 4 * gate_up.shape[0] + 2 * (gate_up.shape[1] + down.shape[1]), 0, 0
    for i, count in enumerate(counts):
        if i > start and (rows + count) * nbytes > MOST_NBYTES:
            yield start, i
            start, rows = i, 0
        rows += count
    yield start, len(counts)


def _compute(
    rows: torch.Tensor, counts: Sequence[int], experts: Sequence[tuple[QTensor, QTensor]], out: torch.Tensor
) -> None:
    p = Program(Memory())
    ups, downs = [gate_up for gate_up, _ in experts], [down for _, down in experts]
    halves = torch.empty(len(rows), ups[0].shape[0])
    p.kept.append(halves)
    for weights, x, result, gate in ((ups, rows, halves, False), (downs, halves, out, True)):
        jobs, first = [], 0
        for w, T, room in zip(weights, counts, _rooms(p, weights[0], counts), strict=True):
            at = [tensor.data_ptr() + 4 * tensor.shape[1] * first for tensor in (x, result)]
            jobs.append(job_of(w, room, at[0], gate, at[1], T))
            first += T
        blocks = program.blocks(weights[0])
        each, size = list(zip(weights, counts, strict=True)), math.prod(weights[0].shape) * len(rows)
        p.several([program.prepare(w, T) for w, T in each], jobs, [1] * len(jobs), size)
        p.several([program.linear(w, T) for w, T in each], jobs, [blocks] * len(jobs), size)
    p.run(threads.count())


def _rooms(p: Program, w: QTensor, counts: Sequence[int]) -> list[Prepared]:
    """Memory for the prepared activations of each expert."""
    K, groups = w.shape[1], w.shape[1] // w.group_size
    firsts = [0]
    for T in counts:
        firsts.append(firsts[-1] + padded_rows(T))
    values, sums = torch.empty(firsts[-1] * K, dtype=torch.uint8), torch.empty(2, firsts[-1], groups)
    p.kept += [values, sums]
    return [
        Prepared(values.data_ptr() + K * first, *(part.data_ptr() + 4 * groups * first for part in sums))
        for first in firsts[:-1]
    ]
