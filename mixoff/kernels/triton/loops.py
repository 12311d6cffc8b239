"""Products with quantized weights on a CUDA card, compiled by Triton: the codes as the store keeps them, on every chip.

Letters: **T** rows of activations, **N** outputs, **K** inputs, **G** group size, **F** expert width.
A program takes a few neighbouring outputs of one block of 128, all inputs, and up to ROWS rows. A thread holds four
outputs of a group at a time, one 16-byte load of codes each, so a warp reads whole cache lines. Sums are fp32, in an
order that a tile fixes; nothing is added atomically, so runs repeat bit for bit. `tl.sum` adds at the end; `tl.dot`
would need more rows than there are, and on sm_75 it compiles to the same multiply-adds without tensor cores.

A code becomes a number without a conversion, of which older chips do only 16 per cycle. One logical instruction puts it
into the mantissa of a power of two, and that power is subtracted. The instruction takes one immediate, so the other
operand comes from a register: `magic`, 2**23 as bits, is an argument so that the compiler does not fold it. bf16 is
widened by shifting bits.

Every load is at least four bytes wide; single bytes and halves at odd places come with the word around them. Importing
this module imports triton.

The last section is for weights whose groups run across outputs: **R** outputs from one member of a group to the next,
**C** grids of scales. There a word holds codes of four inputs, neighbouring threads take neighbouring inputs, and an
activation is multiplied by its scale once for all outputs of a program.
"""

import triton
import triton.language as tl

from mixoff.quantize import rotation

BLOCK = tl.constexpr(128)  # outputs whose codes are next to each other, and groups per grid of metadata
FIRST, SECOND = tl.constexpr(rotation.FIRST), tl.constexpr(rotation.SECOND)


# What is in an image --------------------------------------------------------------------------------------------------


@triton.jit
def word_around(image, address, live):
    """The aligned 32 bits that hold `address`, moved down so that its byte is the lowest."""
    word = tl.load(image.to(tl.pointer_type(tl.int32)) + (address >> 2), mask=live, other=0)
    return word >> ((address & 3) * 8)


@triton.jit
def half_at(image, address, live):
    """The fp16 number at `address`, as fp32."""
    return word_around(image, address, live).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def bytes_at(image, address, live, WIDE: tl.constexpr):
    """Bytes as fp32. WIDE: four neighbours begin at a multiple of four, and are one load."""
    if WIDE:
        found = tl.load(tl.multiple_of(image + address, (4, 4)), mask=live, other=0)
    else:
        found = word_around(image, address, live) & 255
    return found.to(tl.float32)


@triton.jit
def third_bits(image, high_at, at, live, WIDE: tl.constexpr):
    """The 16 bits that hold the high bits of 16 3-bit codes, those of word `at`."""
    if WIDE:
        halves = (image + high_at).to(tl.pointer_type(tl.int16))
        found = tl.load(tl.multiple_of(halves + at, (8, 8)), mask=live, other=0).to(tl.int32)
    else:
        found = word_around(image, high_at + 2 * at, live)
    return found


@triton.jit
def field(word, AT: tl.constexpr, BITS: tl.constexpr, LIFT: tl.constexpr, magic):
    """`BITS` bits of a word from bit AT on, times 2**LIFT, as fp32; AT + BITS is at most 23."""
    mask: tl.constexpr = ((1 << BITS) - 1) << AT
    power: tl.constexpr = 2.0 ** (23 - AT + LIFT)
    return ((word & mask) | (magic + ((LIFT - AT) << 23))).to(tl.float32, bitcast=True) - power


@triton.jit
def code(word, high, INDEX: tl.constexpr, BITS: tl.constexpr, magic):
    """Code number INDEX of each word, as fp32; `high` holds the third bits of 3-bit codes."""
    WIDTH: tl.constexpr = 2 if BITS == 3 else BITS
    half = word if INDEX * WIDTH < 16 else word >> 16
    found = field(half, INDEX * WIDTH % 16, WIDTH, 0, magic)
    if BITS == 3:
        found += field(high, INDEX, 1, 2, magic)
    return found


@triton.jit
def scales_of(image, start, groups, n, g, r, grids_at, scales_at, mins_at, count, WIDE: tl.constexpr):
    """Scale and minimum, fp32 (BG, BN), of groups g of outputs start + r, in a block of n outputs from `start` on."""
    item = start * groups + g[:, None] * n + r[None, :]
    live = (g < groups)[:, None] & (r < n)[None, :]
    if WIDE:  # a row of groups of a block of 128 shares a grid
        grid, there = (start // BLOCK * groups + g)[:, None], (g < groups)[:, None]
        live = there
    else:
        grid, there = item // BLOCK, live
    base = half_at(image, grids_at + 2 * grid, there)
    span = half_at(image, grids_at + 2 * (grid + count), there) / 256
    top = half_at(image, grids_at + 2 * (grid + 2 * count), there)
    low = half_at(image, grids_at + 2 * (grid + 3 * count), there) / 256
    scale = base + bytes_at(image, scales_at + item, live, WIDE) * span
    return scale, top - bytes_at(image, mins_at + item, live, WIDE) * low


@triton.jit
def words_of(image, start, j, K, n, r, high_at, live, BITS: tl.constexpr, WIDE: tl.constexpr):
    """Row j (BG,) of words of outputs start + r, int32 (BG, BN), and the third bits of their codes."""
    PER: tl.constexpr = 16 if BITS == 3 else 32 // BITS
    at = start * (K // PER) + j[:, None] * n + r[None, :]
    word = tl.load(image.to(tl.pointer_type(tl.int32)) + at, mask=live, other=0)
    high = word
    if BITS == 3:
        high = third_bits(image, high_at, at, live, WIDE)
    return word, high


# Activations ----------------------------------------------------------------------------------------------------------


@triton.jit
def pair(x, at, live, KIND: tl.constexpr):
    """Activations `at` and `at` + 1, an even number, as fp32. fp16 and bf16 come as words of two."""
    if KIND == "fp32":
        first, second = tl.load(x + at, mask=live, other=0.0), tl.load(x + at + 1, mask=live, other=0.0)
    else:
        word = tl.load(x + (at >> 1), mask=live, other=0)
        if KIND == "bf16":
            first, second = (word << 16).to(tl.float32, bitcast=True), (word & -65536).to(tl.float32, bitcast=True)
        else:
            first = word.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
            second = (word >> 16).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    return first, second


@triton.jit
def butterfly(x, APART: tl.constexpr):
    """Sums and differences of the neighbours of x (COUNT,) that are APART apart."""
    COUNT: tl.constexpr = x.shape[0]
    pairs = tl.permute(tl.reshape(x, (COUNT // (2 * APART), 2, APART)), (0, 2, 1))
    first, second = tl.split(pairs)
    both = tl.permute(tl.join(first + second, first - second), (0, 2, 1))
    return tl.reshape(both, (COUNT,))


@triton.jit
def rotate(x, out, K, COUNT: tl.constexpr):
    """COUNT inputs of a row of x (T, K), fp32, times the rotation of `quantize.rotation`: into out (T, K)."""
    k = tl.program_id(1) * COUNT + tl.arange(0, COUNT)
    at = tl.program_id(0) * K + k
    mixed = k.to(tl.uint32) * FIRST
    mixed = (mixed ^ (mixed >> 15)) * SECOND
    sign = tl.where(((mixed ^ (mixed >> 13)) & 1) == 0, 0.25, -0.25)
    values = tl.load(x + at, mask=k < K, other=0.0) * sign
    values = butterfly(butterfly(butterfly(butterfly(values, 8), 4), 2), 1)
    tl.store(out + at, values, mask=k < K)


# Products -------------------------------------------------------------------------------------------------------------


@triton.jit
def zeros(ROWS: tl.constexpr, shape: tl.constexpr):
    """As many tensors of zeros: an accumulator for each row."""
    one = (tl.zeros(shape, tl.float32),)
    return one if ROWS == 1 else zeros(ROWS - 1, shape) + one


@triton.jit
def sums_of(
    x, image, T, row, K, start, n, r, high_at, grids_at, scales_at, mins_at, count, magic,
    BITS: tl.constexpr, G: tl.constexpr, ROWS: tl.constexpr, KIND: tl.constexpr, WIDE: tl.constexpr,
    BG: tl.constexpr, U: tl.constexpr,
):  # fmt: skip
    """Products of rows `row`... with outputs start + r of a block of n: a tuple of ROWS tensors, fp32 (BN,)."""
    PER: tl.constexpr = 16 if BITS == 3 else 32 // BITS
    STEP: tl.constexpr = G // PER
    BN: tl.constexpr = r.shape[0]
    groups = K // G
    totals = zeros(ROWS, (BG, BN))
    for first in range(0, groups, BG):
        g = first + tl.arange(0, BG)
        inside = g < groups
        live = inside[:, None] if WIDE else inside[:, None] & (r < n)[None, :]
        products, sums = zeros(ROWS, (BG, BN)), zeros(ROWS, (BG,))
        for word_row in range(0, STEP, U):
            for u in tl.static_range(U):
                j = g * STEP + word_row + u
                word, high = words_of(image, start, j, K, n, r, high_at, live, BITS, WIDE)
                for i in tl.static_range(0, PER, 2):
                    q0, q1 = code(word, high, i, BITS, magic), code(word, high, i + 1, BITS, magic)
                    new_products, new_sums = (), ()
                    for t in tl.static_range(ROWS):
                        x0, x1 = pair(x, (row + t) * K + j * PER + i, g < tl.where(row + t < T, groups, 0), KIND)
                        new_products = new_products + (products[t] + q0 * x0[:, None] + q1 * x1[:, None],)
                        new_sums = new_sums + (sums[t] + (x0 + x1),)
                    products, sums = new_products, new_sums
        scale, minimum = scales_of(image, start, groups, n, g, r, grids_at, scales_at, mins_at, count, WIDE)
        new_totals = ()
        for t in tl.static_range(ROWS):
            new_totals = new_totals + (totals[t] + scale * products[t] + minimum * sums[t][:, None],)
        totals = new_totals
    found = ()
    for t in tl.static_range(ROWS):
        found = found + (tl.sum(totals[t], 0),)
    return found


@triton.jit
def put(out, at, value, live, KIND: tl.constexpr):
    """Store fp32 values in the dtype of `out`; bf16, rounded half to even, by its bits in int16."""
    if KIND == "bf16":
        bits = value.to(tl.int32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        tl.store(out + at, tl.where(value == value, rounded, 0x7FC0).to(tl.int16), mask=live)
    else:
        tl.store(out + at, value.to(out.dtype.element_ty), mask=live)


@triton.jit
def image_of(image, EACH: tl.constexpr):
    """The byte image of a program's matrix: the one given, or number `program_id(2)` of E, from their addresses.

    EACH: 0 for one image; else addresses (E,), all of them multiples of it.
    """
    if EACH > 0:
        address = tl.load(image + tl.program_id(2)).to(tl.pointer_type(tl.uint8))
        image = tl.multiple_of(address, EACH)
    return image


@triton.jit(do_not_specialize=["T"])
def linear(
    x, image, out, T, N, K, first, n, high_at, grids_at, scales_at, mins_at, count, apart, magic,
    BITS: tl.constexpr, G: tl.constexpr, ROWS: tl.constexpr, KIND: tl.constexpr, OUT: tl.constexpr,
    WIDE: tl.constexpr, BG: tl.constexpr, BN: tl.constexpr, U: tl.constexpr, EACH: tl.constexpr,
):  # fmt: skip
    """`x @ w.T` for x (T, K) -> out (T, N), for the outputs from `first` on, in blocks of n.

    With EACH, `image` is as in `image_of`, out is (E, T, N), and the rows of the next matrix begin `apart` further on.
    Programs for the same outputs and other rows are neighbours: they meet the same codes in the cache.
    """
    image = image_of(image, EACH)
    if EACH > 0:
        x, out = x + tl.program_id(2) * apart, out + tl.program_id(2).to(tl.int64) * T * N
    at = first + tl.program_id(1) * BN
    start, row = at // BLOCK * BLOCK, tl.program_id(0) * ROWS
    r = at - start + tl.arange(0, BN)
    found = sums_of(
        x, image, T, row, K, start, n, r, high_at, grids_at, scales_at, mins_at, count, magic,
        BITS, G, ROWS, KIND, WIDE, BG, U,
    )  # fmt: skip
    for t in tl.static_range(ROWS):
        put(out, (row + t) * N + start + r, found[t], r < tl.where(row + t < T, n, 0), OUT)


@triton.jit(do_not_specialize=["T"])
def gated(
    x, image, out, T, F, K, high_at, grids_at, scales_at, mins_at, count, magic,
    BITS: tl.constexpr, G: tl.constexpr, ROWS: tl.constexpr, KIND: tl.constexpr,
    BG: tl.constexpr, BN: tl.constexpr, U: tl.constexpr, EACH: tl.constexpr,
):  # fmt: skip
    """`silu(x @ gate.T) * (x @ up.T)` for a weight (2F, K), gate before up, whole blocks each -> fp32 out (T, F).

    With EACH, `image` is as in `image_of`, and out is (E, T, F).
    """
    image = image_of(image, EACH)
    if EACH > 0:
        out += tl.program_id(2).to(tl.int64) * T * F
    at, row = tl.program_id(1) * BN, tl.program_id(0) * ROWS
    start = at // BLOCK * BLOCK
    r = at - start + tl.arange(0, BN)
    gate = sums_of(
        x, image, T, row, K, start, BLOCK, r, high_at, grids_at, scales_at, mins_at, count, magic,
        BITS, G, ROWS, KIND, True, BG, U,
    )  # fmt: skip
    up = sums_of(
        x, image, T, row, K, F + start, BLOCK, r, high_at, grids_at, scales_at, mins_at, count, magic,
        BITS, G, ROWS, KIND, True, BG, U,
    )  # fmt: skip
    for t in tl.static_range(ROWS):
        h = gate[t] / (1 + tl.exp(-gate[t])) * up[t]
        tl.store(out + (row + t) * F + start + r, h, mask=r < tl.where(row + t < T, BLOCK, 0))


# Weights --------------------------------------------------------------------------------------------------------------


@triton.jit
def dequantize(
    image, out, C, K, first, n, high_at, grids_at, scales_at, mins_at, count, magic,
    BITS: tl.constexpr, G: tl.constexpr, OUT: tl.constexpr, WIDE: tl.constexpr, BG: tl.constexpr,
):  # fmt: skip
    """Weights of the blocks of n outputs from `first` on, inputs first: into out (K, C).

    One program per block and BG groups of inputs.
    """
    PER: tl.constexpr = 16 if BITS == 3 else 32 // BITS
    STEP: tl.constexpr = G // PER
    start, groups = first + tl.program_id(0) * BLOCK, K // G
    g, r = tl.program_id(1) * BG + tl.arange(0, BG), tl.arange(0, BLOCK)
    live = (g < groups)[:, None] & (r < n)[None, :]
    scale, minimum = scales_of(image, start, groups, n, g, r, grids_at, scales_at, mins_at, count, WIDE)
    for s in range(STEP):
        j = g * STEP + s
        word, high = words_of(image, start, j, K, n, r, high_at, live, BITS, WIDE)
        for i in tl.static_range(PER):
            at = (j * PER + i)[:, None] * C + (start - first + r)[None, :]
            put(out, at, code(word, high, i, BITS, magic) * scale + minimum, live, OUT)


# Groups across outputs ------------------------------------------------------------------------------------------------


@triton.jit
def across(scales, zeros, grid_scales, grid_zeros, at, column, live, zero_zero, magic):
    """Of the four groups in word `at`: scales, and after them the codes of zeros less `zero_zero`, fp32."""
    scale_word, zero_word = tl.load(scales + at, mask=live, other=0), tl.load(zeros + at, mask=live, other=0)
    found, lows = (), ()
    for h in tl.static_range(2):
        size, base = pair(grid_scales, column + 2 * h, live, "fp16"), pair(grid_zeros, column + 2 * h, live, "fp16")
        for e in tl.static_range(2):
            found = found + ((code(scale_word, scale_word, 2 * h + e, 8, magic) - base[e]) * size[e],)
            lows = lows + (code(zero_word, zero_word, 2 * h + e, 8, magic) - zero_zero,)
    return found + lows


@triton.jit
def zero_numbers(numbers):
    """Scale and zero of the zeros' codes, fp32, from the word that holds both."""
    word = tl.load(numbers)
    low, high = word.to(tl.int16).to(tl.float16, bitcast=True), (word >> 16).to(tl.int16).to(tl.float16, bitcast=True)
    return low.to(tl.float32), high.to(tl.float32)


@triton.jit(do_not_specialize=["T"])
def strided(
    x, codes, scales, zeros_at, grid_scales, grid_zeros, numbers, out, T, N, K, R, C, first, magic,
    BITS: tl.constexpr, HEIGHT: tl.constexpr, P: tl.constexpr, ROWS: tl.constexpr, KIND: tl.constexpr,
    OUT: tl.constexpr, BW: tl.constexpr,
):  # fmt: skip
    """`x @ w.T` for x (T, K) and one matrix -> its columns of out (T, N), from `first` on; codes (HEIGHT, R * K) bytes.

    A program takes the outputs whose codes are in P rows, r modulo R. K and C are multiples of four. Each row has
    tensors of its own: one tensor of P rows is spread over threads in another way than scales are, and some releases
    of Triton then move all of them through shared memory in every round.
    """
    FIELDS: tl.constexpr = 8 // BITS
    row, r, top = tl.program_id(0) * ROWS, tl.program_id(1), tl.program_id(2) * P
    zero_scale, zero_zero = zero_numbers(numbers)
    totals, lows = zeros(FIELDS * ROWS * P, (BW,)), zeros(ROWS, (BW,))
    for start in range(0, K // 4, BW):
        w = start + tl.arange(0, BW)
        live, at = w < K // 4, r * (K // 4) + w
        words = ()
        for p in tl.static_range(P):
            words = words + (tl.load(codes + (top + p) * (R * (K // 4)) + at, mask=live, other=0),)
        found = across(scales, zeros_at, grid_scales, grid_zeros, at, 4 * at % C, live, zero_zero, magic)
        for h in tl.static_range(2):
            values = ()
            for t in tl.static_range(ROWS):
                values = values + pair(x, (row + t) * K + 4 * w + 2 * h, w < tl.where(row + t < T, K // 4, 0), KIND)
            for e in tl.static_range(2):
                new_totals, new_lows = (), ()
                for t in tl.static_range(ROWS):
                    value = values[2 * t + e] * found[2 * h + e]
                    new_lows = new_lows + (lows[t] + value * found[4 + 2 * h + e],)
                    for i in tl.static_range(FIELDS):
                        for p in tl.static_range(P):
                            q = code(words[p], words[p], (2 * h + e + 1) * FIELDS - 1 - i, BITS, magic)
                            new_totals = new_totals + (totals[(t * FIELDS + i) * P + p] + q * value,)
                totals, lows = new_totals, new_lows
    for t in tl.static_range(ROWS):
        low = zero_scale * tl.sum(lows[t], 0)
        for i in tl.static_range(FIELDS):
            for p in tl.static_range(P):
                at = (row + t) * N + first + (i * HEIGHT + top + p) * R + r
                put(out, at, tl.sum(totals[(t * FIELDS + i) * P + p], 0) - low, row + t < T, OUT)


@triton.jit
def strided_weights(
    codes, scales, zeros_at, grid_scales, grid_zeros, numbers, out, K, R, C, first, magic,
    BITS: tl.constexpr, HEIGHT: tl.constexpr, OUT: tl.constexpr, BW: tl.constexpr,
):  # fmt: skip
    """Weights of the outputs from `first` on of one matrix: into out (outputs, K). By output and by 4 * BW inputs."""
    FIELDS: tl.constexpr = 8 // BITS
    n = first + tl.program_id(0)
    member, r = n // R, n % R
    w = tl.program_id(1) * BW + tl.arange(0, BW)
    live, at = w < K // 4, r * (K // 4) + w
    word = tl.load(codes + member % HEIGHT * (R * (K // 4)) + at, mask=live, other=0)
    word = word >> (8 - BITS * (member // HEIGHT + 1))
    zero_scale, zero_zero = zero_numbers(numbers)
    found = across(scales, zeros_at, grid_scales, grid_zeros, at, 4 * at % C, live, zero_zero, magic)
    values = ()
    for b in tl.static_range(4):
        values = values + ((code(word, word, b * FIELDS, BITS, magic) - found[4 + b] * zero_scale) * found[b],)
    even, odd = tl.join(values[0], values[2]), tl.join(values[1], values[3])
    at = tl.program_id(1) * 4 * BW + tl.arange(0, 4 * BW)
    put(out, tl.program_id(0) * K + at, tl.reshape(tl.join(even, odd), (4 * BW,)), at < K, OUT)
