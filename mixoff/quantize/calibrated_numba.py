"""The loops of `calibrated`, compiled by numba: error feedback and descent within one panel of inputs.

Letters: **K** inputs, **R** outputs of a block, **G** group size, **P** inputs of a panel. Weights are inputs first,
(K, R), so that the outputs of a block are next to each other: each output is a lane, and LLVM turns lanes into vectors.
Metadata (K/G * R,) are in the order in which they are stored. All arithmetic is fp32 in a fixed order.

Importing this module imports numba.
"""

from __future__ import annotations

import functools
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
from numba.extending import register_jitable

from mixoff.jit import jit
from mixoff.quantize import layout, solve_numba
from mixoff.quantize.layout import LARGEST, SUPER
from mixoff.quantize.solve_numba import (
    FINEST,
    LEAST_SCALE,
    ONE,
    ZERO,
    factor_and_zero,
    nearest_code,
    store_grids,
    store_wide,
)

SOURCES = b"".join(Path(str(module.__file__)).read_bytes() for module in (layout, solve_numba))
STAMP = zlib.crc32(SOURCES)  # part of the cache key: numba does not notice changes there
STARTS = np.array([1.0, 0.85, 0.7], np.float32)  # shares of a group's range from which its line is fitted
ROUNDS = 8  # of codes and line in turn; more gain nothing
LIMIT = np.float32(4 * LARGEST)  # of a line: feedback may leave the range of the weights, but not that of fp16
HALF = np.float32(0.5)
SINGULAR = np.float32(1e-6)  # below this share of its diagonal, the determinant of two unknowns counts as zero
JUMP = np.float32(4)  # a refit that changes a scale by more than this factor is not trusted


@functools.cache
def compiled() -> tuple[Callable, Callable, Callable]:
    """The compiled `feed_back`, `descend` and `pack`."""
    stamp = STAMP

    def feed_back_panel(values, importance, factor, first, form, codes, lines, store, errors):
        return feed_back(stamp, values, importance, factor, first, form, codes, lines, store, errors)

    def descend_panel(gradient, hessian, first, form, codes, drift, lines, store):
        return descend(stamp, gradient, hessian, first, form, codes, drift, lines, store)

    return jit(feed_back_panel, "numpy"), jit(descend_panel, "numpy"), jit(pack, "numpy")


# Error feedback -------------------------------------------------------------------------------------------------------


@register_jitable
def feed_back(stamp, values, importance, factor, first, form, codes, lines, store, errors):
    """Round the inputs of a panel one by one, and make up for each error in the inputs of the panel that follow.

    - values: weights with the feedback so far (K, R); the panel's are replaced by their approximations.
    - importance: weight of each input's squared error when lines are fitted (K,).
    - factor: the panel's square (P, P) of T, the lower Cholesky factor of the inverse Hessian.
    - first: first input of the panel.
    - form: group size and largest code.
    - codes: whole numbers, fp32 (K, R).
    - lines: scale and minimum as stored, fp32 (K/G * R,) each.
    - store: parts `wide`, `grids` and `fine` of the block, as in `solve_numba.compiled`.
    - errors: each error divided by the diagonal of T, (P, R), for feedback beyond the panel.
    """
    size, rows, panel = form[0], values.shape[1], values[first : first + len(factor)]
    for start in range(0, len(factor), size):
        group, end = (first + start) // size, start + size
        choose_lines(values, importance, group, form, lines, store)
        some = slice(group * rows, (group + 1) * rows)
        a, z = factors_and_zeros(lines[0][some], lines[1][some])
        for j in range(start, end):
            round_input(panel[j], lines[0][some], a, z, form[1], codes[first + j], errors[j])
            scale_by(errors[j], ONE / factor[j, j])
            for k in range(j + 1, end):
                add_scaled(panel[k], -factor[k, j], errors[j])
        for k in range(end, len(factor)):
            for j in range(start, end):
                add_scaled(panel[k], -factor[k, j], errors[j])


@register_jitable
def factors_and_zeros(scale, minimum):
    """Factor and zero of `code = weight * factor + zero` (R,) each."""
    a, z = np.empty(len(scale), np.float32), np.empty(len(scale), np.float32)
    for i in range(len(scale)):
        a[i], z[i] = factor_and_zero(scale[i], minimum[i], ONE)
    return a, z


@register_jitable
def round_input(values, scale, a, z, top, codes, errors):
    """Replace the weights of one input (R,) by their approximations; write codes and errors (R,)."""
    limit = np.float32(top)
    for i in range(len(values)):
        code = nearest_code(values[i] * a[i] + z[i], limit)
        approximation = (code - z[i]) * scale[i]  # as `QTensor.block_weights` computes it
        errors[i] = values[i] - approximation
        values[i], codes[i] = approximation, code


@register_jitable
def add_scaled(total, factor, values):
    """Add `factor * values` to `total`, in place."""
    for i in range(len(total)):
        total[i] += factor * values[i]


@register_jitable
def scale_by(values, factor):
    """Multiply values by a factor, in place."""
    for i in range(len(values)):
        values[i] *= factor


# Lines: scale and minimum ---------------------------------------------------------------------------------------------


@register_jitable
def choose_lines(values, importance, group, form, lines, store):
    """Fit and store the lines of a group, and of all groups that share a grid with it.

    In a block of 128 outputs a grid is exactly one group; the grids of a narrower block span several.
    """
    rows = values.shape[1]
    unit = rows if len(store[0][0]) else SUPER
    for number in range(-(-group * rows // unit), -(-(group + 1) * rows // unit)):
        some = slice(number * unit, min((number + 1) * unit, len(lines[0])))
        fit(values, importance, some.start, form, lines[0][some], lines[1][some])
        store_lines(lines[0][some], lines[1][some], grid(store, number, some))


@register_jitable
def grid(store, number, some):
    """Views of the parts that hold one grid, of which number and items are given."""
    wide, grids, fine = store
    one = slice(number, number + 1)
    return (
        (wide[0][some], wide[1][some]),
        (grids[0][one], grids[1][one], grids[2][one], grids[3][one]),
        (fine[0][some], fine[1][some]),
    )


@register_jitable
def store_lines(scale, minimum, parts):
    """Write lines (items,) into the parts of their grid, and replace them by the stored numbers."""
    if len(parts[0][0]):
        store_wide(scale, parts[0][0])
        store_wide(minimum, parts[0][1])
    else:
        store_grids(scale, minimum, parts[1], parts[2])


@register_jitable
def fit(values, importance, start, form, scale, minimum):
    """Weighted least squares: the line of each of some groups, item numbers from `start`, into arrays (items,).

    Codes and line in turn, from three ranges; the line with the least error stays. Groups of zeros get the scale 0.
    """
    size, rows, lanes = form[0], values.shape[1], len(scale)
    w, p = np.empty((size, lanes), np.float32), np.empty((size, lanes), np.float32)
    for i in range(lanes):
        group, row = divmod(start + i, rows)
        for k in range(size):
            w[k, i], p[k, i] = values[group * size + k, row], importance[group * size + k]
    low, high, total, mean = ranges(w, p)
    least, s, m = np.empty(lanes, np.float32), np.empty(lanes, np.float32), np.empty(lanes, np.float32)
    best = np.full(lanes, np.inf, np.float32)
    for i in range(lanes):
        least[i] = max(max(-low[i], high[i]) * FINEST, LEAST_SCALE)  # as in `solve.solve`
    for share in STARTS:
        for i in range(lanes):
            width = (high[i] - low[i]) * share
            s[i], m[i] = max(width / np.float32(form[1]), least[i]), (low[i] + high[i] - width) * HALF
        error = settle(w, p, total, mean, least, form[1], s, m)
        for i in range(lanes):
            if error[i] < best[i]:
                best[i], scale[i], minimum[i] = error[i], s[i], m[i]
    for i in range(lanes):
        if low[i] == high[i]:
            scale[i], minimum[i] = max(-low[i], high[i]), min(low[i], ZERO)
        scale[i], minimum[i] = min(scale[i], LIMIT), min(max(minimum[i], -LIMIT), LIMIT)


@register_jitable
def ranges(w, p):
    """Least, largest, total importance and mean of each group in the lanes (G, lanes)."""
    low, high, total, mean = (
        w[0].copy(),
        w[0].copy(),
        np.zeros(w.shape[1], np.float32),
        np.zeros(w.shape[1], np.float32),
    )
    for k in range(len(w)):
        for i in range(len(low)):
            low[i], high[i] = min(low[i], w[k, i]), max(high[i], w[k, i])
            total[i] += p[k, i]
            mean[i] += p[k, i] * w[k, i]
    for i in range(len(mean)):
        mean[i] /= total[i]
    return low, high, total, mean


@register_jitable
def settle(w, p, total, mean, least, top, s, m):
    """ROUNDS rounds of codes and line, in place, for groups in lanes (G, lanes); returns the errors of the lines."""
    lanes, top = len(s), np.float32(top)
    sums = np.empty((4, lanes), np.float32)
    inverse, codes, squares, products = sums[0], sums[1], sums[2], sums[3]
    for _ in range(ROUNDS):
        for i in range(lanes):
            inverse[i], codes[i], squares[i], products[i] = ONE / s[i], ZERO, ZERO, ZERO
        for k in range(len(w)):
            for i in range(lanes):
                q = nearest_code((w[k, i] - m[i]) * inverse[i], top)
                share = p[k, i] * q
                codes[i] += share
                squares[i] += share * q
                products[i] += share * (w[k, i] - mean[i])
        moved = 0
        for i in range(lanes):
            before_s, before_m, average = s[i], m[i], codes[i] / total[i]
            spread = squares[i] - codes[i] * average
            s[i] = max(products[i] / spread, least[i]) if spread > SINGULAR * squares[i] else before_s
            m[i] = mean[i] - s[i] * average
            moved += (s[i] != before_s) | (m[i] != before_m)
        if moved == 0:
            break
    error = np.zeros(lanes, np.float32)
    for i in range(lanes):
        inverse[i] = ONE / s[i]
    for k in range(len(w)):
        for i in range(lanes):
            e = w[k, i] - (nearest_code((w[k, i] - m[i]) * inverse[i], top) * s[i] + m[i])
            error[i] += p[k, i] * e * e
    return error


# Descent --------------------------------------------------------------------------------------------------------------


@register_jitable
def descend(stamp, gradient, hessian, first, form, codes, drift, lines, store):
    """Refit the lines of a panel's groups, and move each code to its best value, given all others.

    - gradient: half the derivative of the error by the panel's weights (P, R); kept up to date.
    - hessian: the panel's square of the Hessian (P, P).
    - drift: approximation less weights (K, R); kept up to date.
    - first, form, codes, lines, store: as in `feed_back`.
    """
    size, rows = form[0], codes.shape[1]
    moved = np.empty((size, rows), np.float32)
    for start in range(0, len(hessian), size):
        end, group = start + size, (first + start) // size
        some = slice(group * rows, (group + 1) * rows)
        h, g, q = hessian[start:end, start:end].copy(), gradient[start:end], codes[first + start : first + end]
        moved[:] = ZERO
        if rows == SUPER or len(store[0][0]):  # otherwise several groups are on one grid
            refit(h, g, q, lines[0][some], lines[1][some], grid(store, group, some), moved)
        move_codes(h, g, q, form[1], lines[0][some], lines[1][some], moved)
        for k in range(size):
            add_scaled(drift[first + start + k], ONE, moved[k])
        for n in range(end, len(hessian)):
            for k in range(size):
                add_scaled(gradient[n], hessian[n, start + k], moved[k])


@register_jitable
def move_codes(h, g, q, top, scale, minimum, moved):
    """Coordinate descent on the codes (G, R) of a group with the Hessian (G, G); `moved` (G, R) adds up the changes."""
    step, limit = np.empty(len(scale), np.float32), np.float32(top)
    a, z = factors_and_zeros(scale, minimum)
    for k in range(len(h)):
        inverse, row, gradient = ONE / h[k, k], q[k], g[k]
        for i in range(len(step)):
            before = (row[i] - z[i]) * scale[i]
            code = nearest_code((before - gradient[i] * inverse) * a[i] + z[i], limit)
            step[i], row[i] = (code - z[i]) * scale[i] - before, code
        add_scaled(moved[k], ONE, step)
        for n in range(len(h)):
            add_scaled(g[n], h[n, k], step)


@register_jitable
def refit(h, g, q, scale, minimum, parts, moved):
    """Replace a group's lines by the best ones for its codes, if that lowers the error of the block once stored.

    - h, g, q: Hessian (G, G), half gradient (G, R) and codes (G, R) of the group.
    - scale, minimum, parts: its lines (R,), and the parts of the image that hold them.
    - moved: change of the approximation (G, R), zeros on entry.
    """
    wide, grids, fine = parts
    trial = (
        (wide[0].copy(), wide[1].copy()),
        (grids[0].copy(), grids[1].copy(), grids[2].copy(), grids[3].copy()),
        (fine[0].copy(), fine[1].copy()),
    )
    s, m = best_lines(h, g, q, scale, minimum)
    store_lines(s, m, trial)
    change, product = np.zeros(len(s), np.float32), np.zeros(g.shape, np.float32)
    after, before = factors_and_zeros(s, m)[1], factors_and_zeros(scale, minimum)[1]
    for k in range(len(g)):
        for i in range(len(s)):
            moved[k, i] = (q[k, i] - after[i]) * s[i] - (q[k, i] - before[i]) * scale[i]
        for n in range(len(g)):
            add_scaled(product[n], h[n, k], moved[k])
    for k in range(len(g)):
        for i in range(len(s)):
            change[i] += moved[k, i] * (g[k, i] + g[k, i] + product[k, i])
    if not change.sum() < 0:
        moved[:] = ZERO
        return
    g += product
    scale[:], minimum[:] = s, m
    for number in range(2):
        wide[number][:], fine[number][:] = trial[0][number], trial[2][number]
    for number in range(4):
        grids[number][:] = trial[1][number]


@register_jitable
def best_lines(h, g, q, scale, minimum):
    """The least-squares lines (R,) of a group for its codes: two unknowns per output. Arguments as in `refit`."""
    s, m = scale.copy(), minimum.copy()
    sums = np.zeros((5, len(s)), np.float32)
    ss, sm, gs, gm, total = sums[0], sums[1], sums[2], sums[3], sums[4]
    mm, product = ZERO, np.empty(len(s), np.float32)
    for n in range(len(h)):
        product[:] = ZERO
        for k in range(len(h)):
            mm += h[n, k]
            add_scaled(product, h[n, k], q[k])
        for i in range(len(s)):
            ss[i] += q[n, i] * product[i]
            gs[i] += q[n, i] * g[n, i]
        add_scaled(sm, ONE, product)
        add_scaled(gm, ONE, g[n])
        add_scaled(total, ONE, q[n])
    for i in range(len(s)):
        determinant = ss[i] * mm - sm[i] * sm[i]
        if total[i] == 0 and minimum[i] == 0:
            s[i] = ZERO  # a group of zeros stays one
        elif determinant > SINGULAR * ss[i] * mm:
            new = scale[i] + (gm[i] * sm[i] - gs[i] * mm) / determinant
            if new * JUMP > scale[i] and new < scale[i] * JUMP:
                s[i], m[i] = new, minimum[i] + (gs[i] * sm[i] - gm[i] * ss[i]) / determinant
        elif mm > 0:
            m[i] = minimum[i] - gm[i] / mm
        s[i], m[i] = min(s[i], LIMIT), min(max(m[i], -LIMIT), LIMIT)
    return s, m


# Codes ----------------------------------------------------------------------------------------------------------------


@register_jitable
def pack(codes, shift, width, words):
    """Pack bits shift..shift + width of codes (K, R) into words (K / codes per word, R)."""
    per_word, mask = 8 * words.itemsize // width, 2**width - 1
    for n in range(len(words)):
        for i in range(words.shape[1]):
            word = np.int32(0)
            for k in range(per_word):
                word |= ((np.int32(codes[n * per_word + k, i]) >> shift) & mask) << np.int32(k * width)
            words[n, i] = word
