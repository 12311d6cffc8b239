"""What a decoder layer computes for one token between its products: functions for `relay`, compiled by numba.

Letters: **D** model width, **H** heads of queries, **G** heads of keys and values, **C** numbers per head, **T** cached
tokens with this one, **E** experts, **K** experts per token.
Everything is fp32 but the stream between layers, the cache and weights that stay in 16 bits. The first number of a job
is the address of its record: addresses and sizes in the order of the named tuple of that stage. Products themselves are
`loops.prepare` and `loops.linear`. Importing this module imports numba.
"""

from __future__ import annotations

import hashlib
from collections import namedtuple
from pathlib import Path

import numpy as np
from numba import carray
from numba.extending import register_jitable

from mixoff.jit import function
from mixoff.kernels.cpu import loops, vectors
from mixoff.kernels.cpu.loops import EXP, FIELDS, LN2_HIGH, LN2_LOW, LOG2_E, MOST_EXP, ROUND, from_bits, to_bf16
from mixoff.kernels.cpu.relay import call
from mixoff.kernels.cpu.simd import pointer
from mixoff.kernels.cpu.vectors import HEADS, dot, mixture, scores

STAMP = hashlib.sha256(Path(vectors.__file__).read_bytes() + loops.STAMP.encode()).hexdigest()  # see `loops.STAMP`
TILE = 64  # cached tokens whose keys or values stay in the L1 cache for all heads that read them
LOWEST = np.float32(-3.0e38)

# Floats are given as their bits; an address of 0 stands for "none"; `narrow` means bf16, else fp32.
# - source: the stream as the layer gets it, or 0 if `stream` holds it already; added: what comes on top
Norm = namedtuple("Norm", "source narrow stream added bias factor weight eps D out")
# - q, k, v: products, (H, C) and (G, C) twice; *_bias, *_norm: what follows them; whole: norms are over all heads
# - cos, sin: (R / 2,); R: how many of C are turned; keys, values: the cache, (G, room, C), before: tokens in it
# - sinks: a score per head that takes part in the softmax only; out: (H, C)
Attention = namedtuple(
    "Attention",
    "q k v q_bias k_bias v_bias q_norm k_norm whole eps cos sin R keys values narrow room before H G C scale sinks out",
)
# - x: (T, D); weight: (E, D); out: (T, E)
Rows = namedtuple("Rows", "x T weight narrow bias D E out")
# - experts, weights: the choice (K,), int64 and fp32; divide: weights are divided by their sum
Choice = namedtuple("Choice", "logits E K divide experts weights")
# - functions: an address for each job; starts: first blocks of the jobs, and the end
Several = namedtuple("Several", "functions jobs starts number")
# - outs: (K, D); out: the stream for the next layer
Sum = namedtuple("Sum", "stream outs weights factor K D out narrow")


@register_jitable
def record(job, size):
    """The record of a job, as an array."""
    return carray(pointer(carray(pointer(job, np.int64), (1,))[0], np.int64), (size,))


@register_jitable
def floats(address, size):
    """`size` fp32 numbers at `address`."""
    return carray(pointer(address, np.float32), (size,))


@register_jitable
def shorts(address, size):
    """`size` numbers of 16 bits at `address`."""
    return carray(pointer(address, np.uint16), (size,))


@register_jitable
def of_bits(value):
    """The fp32 number whose bits a record gives."""
    return from_bits(np.int32(value))


@register_jitable
def row(x, w, D, narrow):
    """The sum of x[i] * w[i]; x and w are addresses, w of bf16 if `narrow`."""
    even, total = D // 64 * 64, np.float32(0)
    if even:
        total = dot(narrow, x, w, even)
    values = floats(x, D)
    for i in range(even, D):
        weight = from_bits(np.int32(shorts(w, D)[i]) << np.int32(16)) if narrow else floats(w, D)[i]
        total += values[i] * weight
    return total


@register_jitable
def normed(x, weight, D, eps, out):
    """RMS norm of D numbers; x, weight and out are addresses."""
    values, factors, result = floats(x, D), floats(weight, D), floats(out, D)
    scale = np.float32(1) / np.sqrt(row(x, x, D, 0) / np.float32(D) + eps)
    for i in range(D):
        result[i] = values[i] * scale * factors[i]


@register_jitable
def plus(x, bias, n):
    """Add n numbers, unless the address is 0."""
    if bias:
        values, more = floats(x, n), floats(bias, n)
        for i in range(n):
            values[i] += more[i]


@register_jitable
def turned(x, cos, sin, R):
    """Rotary positions for the first R numbers of a head: pairs lie R / 2 apart."""
    half = R // 2
    values, c, s = floats(x, R), floats(cos, half), floats(sin, half)
    for i in range(half):
        first, second = values[i], values[i + half]
        values[i] = first * c[i] - second * s[i]
        values[i + half] = second * c[i] + first * s[i]


@register_jitable
def exponentials(p, n, most):
    """p = exp(p - most); returns their sum, in order.

    The steps are those of `loops.silu_gate`, written again: as a function of both they cost that loop a quarter.
    """
    whole = np.empty(n, np.int32)
    factor = whole.view(np.float32)
    for i in range(n):
        y = max(p[i] - most, -MOST_EXP)
        k = y * LOG2_E + ROUND - ROUND
        r = y - k * LN2_HIGH - k * LN2_LOW
        q = ((((EXP[0] * r + EXP[1]) * r + EXP[2]) * r + EXP[3]) * r + EXP[4]) * r + EXP[5]
        p[i] = q * (r * r) + r + np.float32(1)
        whole[i] = (np.int32(k) + np.int32(127)) << np.int32(23)
    for i in range(n):
        p[i] *= factor[i]
    total = np.float32(0)
    for i in range(n):
        total += p[i]
    return total


def _nothing(job, first, last):
    pass


def _norm(job, first, last):
    """stream = source or stream, plus factor * (added + bias); out = its RMS norm."""
    stamp = STAMP  # noqa: F841  # in the key of the disk cache
    source, narrow, stream, added, bias, factor, weight, eps, D, out = record(job, 10)
    x = floats(stream, D)
    if source and narrow:
        widened = loops.widened_rows(shorts(source, D).reshape(1, D))[0]
        for i in range(D):
            x[i] = widened[i]
    elif source:
        given = floats(source, D)
        for i in range(D):
            x[i] = given[i]
    if added:
        plus(added, bias, D)
        more, by = floats(added, D), of_bits(factor)
        for i in range(D):
            x[i] += by * more[i]
    normed(stream, weight, D, of_bits(eps), out)


def _append(job, first, last):
    """This token's keys and values, with bias, norm and position, into the cache."""
    stamp = STAMP  # noqa: F841
    fields = record(job, 24)
    q, k, v, q_bias, k_bias, v_bias, q_norm, k_norm, whole, eps, cos, sin, R, keys, values, narrow = fields[:16]
    room, before, H, G, C = fields[16:21]
    plus(q, q_bias, H * C)
    plus(k, k_bias, G * C)
    plus(v, v_bias, G * C)
    if q_norm and whole:
        normed(q, q_norm, H * C, of_bits(eps), q)
        normed(k, k_norm, G * C, of_bits(eps), k)
    for g in range(G):
        at = k + 4 * g * C
        if q_norm and not whole:
            normed(at, k_norm, C, of_bits(eps), at)
        turned(at, cos, sin, R)
        place = (g * room + before) * C
        kept(floats(at, C), keys, place, narrow)
        kept(floats(v + 4 * g * C, C), values, place, narrow)


@register_jitable
def kept(x, cache, place, narrow):
    """Write a head's numbers into the cache, from its number `place` on."""
    n = len(x)
    if narrow:
        short = shorts(cache + 2 * place, n)
        for i in range(n):
            short[i] = to_bf16(x[i])
    else:
        long = floats(cache + 4 * place, n)
        for i in range(n):
            long[i] = x[i]


def _attend(job, first, last):
    """Heads of keys first..last: softmax of the scores of their queries, and the mixture of values."""
    stamp = STAMP  # noqa: F841
    fields = record(job, 24)
    q, k, v, q_bias, k_bias, v_bias, q_norm, k_norm, whole, eps, cos, sin, R, keys, values, narrow = fields[:16]
    room, before, H, G, C, scale, sinks, out = fields[16:]
    T, group, item = before + 1, H // G, 2 if narrow else 4
    p = np.empty((group, T), np.float32)
    p_at = loops.address(p)
    for g in range(first, last):
        for h in range(g * group, (g + 1) * group):
            at = q + 4 * h * C
            if q_norm and not whole:
                normed(at, q_norm, C, of_bits(eps), at)
            turned(at, cos, sin, R)
        start = g * room * C * item
        for t in range(0, T, TILE):
            seen(
                q + 4 * g * group * C, keys + start + t * C * item, p_at + 4 * t, group, C, min(TILE, T - t), T, narrow
            )
        for h in range(group):
            softmax(p[h], of_bits(scale), sinks + 4 * (g * group + h) if sinks else 0)
        result = out + 4 * g * group * C
        floats(result, group * C)[:] = 0
        for t in range(0, T, TILE):
            mixed(p_at + 4 * t, values + start + t * C * item, result, group, C, min(TILE, T - t), T, narrow)


@register_jitable
def seen(q, keys, p, group, C, count, T, narrow):
    """Scores of a group of heads for `count` cached tokens."""
    h = 0
    while h < group:
        at, to = q + 4 * h * C, p + 4 * h * T
        if group - h >= HEADS:
            scores(HEADS, narrow, at, 4 * C, keys, C, count, to, 4 * T)
            h += HEADS
        else:
            scores(1, narrow, at, 4 * C, keys, C, count, to, 4 * T)
            h += 1


@register_jitable
def mixed(p, values, out, group, C, count, T, narrow):
    """Add the values of `count` cached tokens, times the shares of a group of heads."""
    h = 0
    while h < group:
        at, to = p + 4 * h * T, out + 4 * h * C
        if group - h >= HEADS:
            mixture(HEADS, narrow, at, 4 * T, values, C, count, to, 4 * C)
            h += HEADS
        else:
            mixture(1, narrow, at, 4 * T, values, C, count, to, 4 * C)
            h += 1


@register_jitable
def softmax(p, scale, sink):
    """Softmax of scale * p, in place; sink: the address of one more score, whose share is dropped, or 0."""
    n, most = len(p), LOWEST
    for t in range(n):
        p[t] *= scale
    for t in range(n):
        most = max(most, p[t])
    extra = np.float32(0)
    if sink:
        given = floats(sink, 1)[0]
        most = max(most, given)
        extra = np.exp(given - most)
    factor = np.float32(1) / (exponentials(p, n, most) + extra)
    for t in range(n):
        p[t] *= factor


def _rows(job, first, last):
    """Products with rows first..last of a plain matrix, read once for all T."""
    stamp = STAMP  # noqa: F841
    x, T, weight, narrow, bias, D, E, results = record(job, 8)
    out = floats(results, T * E)
    for e in range(first, last):
        for t in range(T):
            value = row(x + 4 * t * D, weight + (2 if narrow else 4) * e * D, D, narrow)
            out[t * E + e] = value + floats(bias, E)[e] if bias else value


def _choose(job, first, last):
    """Softmax over E logits; the K largest, the lower index first among equals."""
    stamp = STAMP  # noqa: F841
    logits, E, K, divide, experts, weights = record(job, 6)
    p, chosen, given = np.empty(E, np.float32), carray(pointer(experts, np.int64), (K,)), floats(weights, K)
    p[:] = floats(logits, E)
    most = LOWEST
    for e in range(E):
        most = max(most, p[e])
    wrong = np.float32(0)
    for e in range(E):
        wrong += p[e] * np.float32(0)  # NaN if a logit is no number, and then so are the weights
    factor, mass = np.float32(1) / exponentials(p, E, most) + wrong, np.float32(0)
    for e in range(E):
        p[e] = p[e] if p[e] == p[e] else np.float32(0)
    for i in range(K):
        best = 0
        for e in range(1, E):
            if p[e] > p[best]:
                best = e
        chosen[i], given[i] = best, p[best] * factor
        mass += given[i]
        p[best] = -1
    if divide:
        for i in range(K):
            given[i] /= mass


def _several(job, first, last):
    """Blocks first..last of several jobs in a row: job i has the blocks starts[i]..starts[i + 1]."""
    stamp = STAMP  # noqa: F841
    functions, jobs, starts, number = record(job, 4)
    run, start = carray(pointer(functions, np.int64), (number,)), carray(pointer(starts, np.int64), (number + 1,))
    for i in range(number):
        begin, end = max(first, start[i]), min(last, start[i + 1])
        if begin < end:
            call(run[i], jobs + i * 8 * FIELDS, begin - start[i], end - start[i])


def _sum(job, first, last):
    """The stream plus factor times the weighted sum of the experts' outputs, in the router's order."""
    stamp = STAMP  # noqa: F841
    stream, outs, weights, factor, K, D, out, narrow = record(job, 8)
    x, rows, given, by = floats(stream, D), floats(outs, K * D).reshape(K, D), floats(weights, K), of_bits(factor)
    total = np.zeros(D, np.float32)
    for i in range(K):
        outputs, weight = rows[i], given[i]
        for k in range(D):
            total[k] += weight * outputs[k]
    for k in range(D):
        total[k] = x[k] + by * total[k]
    kept(total, out, 0, narrow)


nothing, norm, append, attend, rows, choose, several, weighted = (
    function(stage, "numpy") for stage in (_nothing, _norm, _append, _attend, _rows, _choose, _several, _sum)
)
