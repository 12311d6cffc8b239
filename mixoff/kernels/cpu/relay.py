"""A computation divided among threads without Python in between: idle threads watch a cell in memory.

Waking a sleeping thread takes 50 to 100 us, as long as a small product; a watching thread begins at once. Threads take
pieces one by one, so one that is late or held up leaves more of them to the others.

The cells are 64-bit numbers, each on its own cache line:

- TICKET: number of jobs so far.
- LEFT: ticket of the current job, shifted, plus the number of its pieces that are left.
- ACTIVE: number of helpers inside a job.
- FUNCTION, JOB, COUNT, PIECES: the current job; written only when no piece is left and no helper is inside.
- ASLEEP and following: 1 for each helper that sleeps.

A helper takes a piece by compare-and-swap of LEFT, which fails if the job is finished or another one. A helper that has
watched in vain for a while sets its cell and sleeps; if it just misses a job this way, the job does not wait for it.
Importing this module imports numba.
"""

from __future__ import annotations

import numpy as np
from llvmlite import ir
from numba import carray, types
from numba.extending import intrinsic, register_jitable

from mixoff.jit import jit
from mixoff.kernels.cpu.simd import pointer

STEP = 8  # 64-bit numbers from cell to cell: a cache line
TICKET, LEFT, ACTIVE, FUNCTION, JOB, COUNT, PIECES, ASLEEP = (STEP * i for i in range(8))
FIELDS = 16  # numbers per job
SHIFT = 32  # bits by which LEFT shifts the ticket
I64 = ir.IntType(64)


def _cell(context, builder, signature, array, i) -> ir.Value:
    """The address of `array[i]`."""
    data = context.make_array(signature.args[0])(context, builder, array).data
    return builder.bitcast(builder.gep(data, [i]), I64.as_pointer())


@intrinsic
def load(typingctx, cells, i):
    """`cells[i]`; what other threads wrote before storing it is visible afterwards."""

    def generate(context, builder, signature, arguments):
        return builder.load_atomic(_cell(context, builder, signature, *arguments), "seq_cst", 8)

    return types.int64(cells, types.intp), generate


@intrinsic
def store(typingctx, cells, i, value):
    """`cells[i] = value`, after everything that this thread wrote before."""

    def generate(context, builder, signature, arguments):
        cell = _cell(context, builder, signature, *arguments[:2])
        builder.store_atomic(arguments[2], cell, "seq_cst", 8)
        return context.get_dummy_value()

    return types.void(cells, types.intp, types.int64), generate


@intrinsic
def add(typingctx, cells, i, value):
    """`cells[i] += value` atomically; returns the value before."""

    def generate(context, builder, signature, arguments):
        return builder.atomic_rmw("add", _cell(context, builder, signature, *arguments[:2]), arguments[2], "seq_cst")

    return types.int64(cells, types.intp, types.int64), generate


@intrinsic
def swap(typingctx, cells, i, old, new):
    """`cells[i] = new` atomically if it is `old`; returns whether it was."""

    def generate(context, builder, signature, arguments):
        cell = _cell(context, builder, signature, *arguments[:2])
        return builder.extract_value(builder.cmpxchg(cell, arguments[2], arguments[3], "seq_cst"), 1)

    return types.boolean(cells, types.intp, types.int64, types.int64), generate


@intrinsic
def pause(typingctx):
    """Wait some tens of cycles, if the CPU has an instruction for it, between two looks of a watching thread."""

    def generate(context, builder, signature, arguments):
        if context.codegen().magic_tuple()[0].startswith(("x86", "i386", "i686")):
            kind = ir.FunctionType(ir.VoidType(), [])
            builder.call(builder.module.declare_intrinsic("llvm.x86.sse2.pause", (), kind), [])
        return context.get_dummy_value()

    return types.void(), generate


@intrinsic
def call(typingctx, function, job, first, last):
    """`function(job, first, last)`, for the address of a function of three numbers that returns nothing."""

    def generate(context, builder, signature, arguments):
        kind = ir.FunctionType(ir.VoidType(), [I64, I64, I64])
        builder.call(builder.inttoptr(arguments[0], kind.as_pointer()), arguments[1:])
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64, types.int64), generate


@register_jitable
def take_pieces(cells, ticket):
    """Compute pieces of a job until none is left."""
    function, job, count, pieces = cells[FUNCTION], cells[JOB], cells[COUNT], cells[PIECES]
    while True:
        left = load(cells, LEFT)
        if left <= ticket << SHIFT or left >> SHIFT != ticket:
            return
        if swap(cells, LEFT, left, left - 1):
            i = pieces - (left - (ticket << SHIFT))
            call(function, job, count * i // pieces, count * (i + 1) // pieces)


def _share(cells, stages, number, jobs):
    """Run `number` stages one after the other, with the help of watching threads.

    - cells, stages, jobs: addresses, because passing an array costs more than reading it.
    - stages: four numbers each: prepare, function, count, pieces; and a job of FIELDS numbers for each.

    A stage calls `prepare(job, 0, count)`, then `function(job, first, last)` for `pieces` ranges that make up 0..count.
    """
    cells, stages = carray(pointer(cells, np.int64), (ASLEEP,)), carray(pointer(stages, np.int64), (number, 4))
    for i in range(number):
        prepare, function, count, pieces = stages[i]
        job = jobs + i * 8 * FIELDS
        call(prepare, job, 0, count)
        if pieces == 1:
            call(function, job, 0, count)
            continue
        ticket = load(cells, TICKET) + 1
        cells[FUNCTION], cells[JOB], cells[COUNT], cells[PIECES] = function, job, count, pieces
        store(cells, LEFT, (ticket << SHIFT) + pieces)
        store(cells, TICKET, ticket)
        take_pieces(cells, ticket)
        while load(cells, ACTIVE) > 0:
            pause()


def _help(cells, i, seen, patience):
    """As helper i, help with every job after number `seen`; sleep after `patience` looks without a new job."""
    looks = 0
    while True:
        if load(cells, TICKET) != seen:
            add(cells, ACTIVE, 1)
            seen, looks = load(cells, TICKET), 0
            take_pieces(cells, seen)
            add(cells, ACTIVE, -1)
        elif looks < patience:
            looks += 1
            pause()
        else:
            store(cells, ASLEEP + STEP * i, 1)  # first say so, then look once more: a job in between is not missed
            if load(cells, TICKET) == seen:
                return
            store(cells, ASLEEP + STEP * i, 0)


def _alone(stages, number, jobs):
    """`_share` in one thread."""
    stages = carray(pointer(stages, np.int64), (number, 4))
    for i in range(number):
        prepare, function, count, _ = stages[i]
        call(prepare, jobs + i * 8 * FIELDS, 0, count)
        call(function, jobs + i * 8 * FIELDS, 0, count)


share, help_out, alone = jit(_share), jit(_help), jit(_alone)
