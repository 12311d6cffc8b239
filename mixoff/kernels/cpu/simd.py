"""Inner loops of products with quantized weights, as vectors of outputs: the instructions that numba compiles.

Letters: **T** rows of activations, **G** group size.
A word of codes holds neighbouring inputs of one output (`mixoff.quantize`). Shifted by i codes and masked, its four
bytes are the codes of four inputs, which one instruction multiplies with four activations:

- `avx2`: vpmaddubsw, summed in 16 bits for as long as they suffice (`SPANS`).
- `vnni`: vpdpbusd, summed in 32 bits at once.
- `any`: plain vector arithmetic, which LLVM turns into what the CPU has.
- `float`: codes times fp32 activations.

The first three give the same integers. After the sum of a group, all ways do the same fused multiply-adds in the same
order, so equal integers give results that are equal bit for bit. Addresses come in, sums of one group go out.
"""

from __future__ import annotations

import functools
from collections import namedtuple
from collections.abc import Callable, Iterator

from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic

from mixoff.pages import LINE

LANES = 8  # outputs per vector of 256 bits
WIDE = 16  # outputs per vector of 512 bits, for CPUs that have them
WIDTH = {2: 2, 3: 2, 4: 4, 8: 8}  # bits per code in a word; the third bit of 3-bit codes is stored separately
TOP = 127  # the largest quantized activation
BLOCK = 128  # outputs per block of codes
UNSHIFTED = 4  # bits of a byte whose codes are multiplied in place; their sums are shifted down instead
LINES = 4 * BLOCK // LINE  # cache lines of a word of each output of a block
AHEAD = 4096  # bytes by which codes are prefetched ahead: the CPU does not predict the steps between blocks
HELD = {"avx2": 8, "any": 8, "vnni": 16}  # vectors of activations kept in registers; wider groups take several turns
TURNS = 2  # most turns of a group, whose sums wait in the L1 cache meanwhile
GRIDS = (1, 1 / 256, 1, -1 / 256)  # what base, span, top and span of a grid are multiplied with before use
SPANS = {2: 128, 3: 64, 4: 32, 8: None}  # inputs whose products sum up in 16 bits; None: 8-bit codes never do

BYTE, I16, I32, I64, F32 = ir.IntType(8), ir.IntType(16), ir.IntType(32), ir.IntType(64), ir.FloatType()

Place = namedtuple(
    "Place", "codes codes_row high high_row x x_row scales minima grids grids_row xs xsum xs_row total common"
)


class Emitter:
    """The instructions of one group for T rows, by vectors of `wide` outputs; a thin layer over llvmlite's builder.

    - size: inputs of the group.
    - lanes: whether every output has its own grid; else all share one.
    - bytes4, shorts2, ints, floats: types of vectors, by what they hold per output.
    """

    def __init__(self, builder: ir.IRBuilder, bits: int, rows: int, wide: int, way: str, size: int, lanes: bool):
        self.b, self.bits, self.rows, self.wide, self.way, self.lanes = builder, bits, rows, wide, way, lanes
        self.words = size * WIDTH[bits] // 32  # of an output
        self.bytes4, self.shorts2 = ir.VectorType(BYTE, 4 * wide), ir.VectorType(I16, 2 * wide)
        self.ints, self.floats = ir.VectorType(I32, wide), ir.VectorType(F32, wide)

    def run(self, place: Place, lines: ir.Value) -> None:
        """Add the group's products to the totals of as many outputs as `lines` cache lines of words, or to one vector.

        A vector's words are loaded, multiplied and summed up before the next vector's. All orders do the same work, but
        this one lets the CPU look ahead: it came near the speed of memory, and others did not (docs/kernels.md).
        """
        self.place = place
        self.factors = [self.factors_of(t) for t in range(self.rows)]
        turns, beside = self.turns(), 1 if self.lanes else LINE // (4 * self.wide)
        waiting = [self.waiting() for _ in range(self.rows if len(turns) > 1 else 0)]
        for words in turns:
            self.hold(words)
            self.loop(lines, functools.partial(self.line, words, beside, waiting))

    def line(self, words: range, beside: int, waiting: list[ir.Value], i: ir.Value) -> None:
        """One turn for the `beside` vectors of cache line i; sums of earlier turns are in `waiting`, by row."""
        for k in range(beside):
            v, self.first, self.line_number = self.b.add(self.b.mul(i, I64(beside)), I64(k)), k == 0, i
            sums = self.sums_of_floats(v) if self.way == "float" else self.integers(v, words)
            if words.start > 0:
                kept = [self.at(self.moved(at, v, 4), self.ints) for at in waiting]
                sums = [self.b.add(*both) for both in zip(sums, kept, strict=True)]
            if words.stop == self.words:
                self.finish(v, sums)
                continue
            for at, total in zip(waiting, sums, strict=True):
                self.put(total, self.moved(at, v, 4))

    def turns(self) -> list[range]:
        """Words of the group by turns: as few as suffice to hold the activations of each in registers."""
        vectors = self.words * (8 // WIDTH[self.bits]) * self.rows
        count = -(-vectors // HELD.get(self.way, vectors))
        if count > min(TURNS, self.words):
            count = 1
        size = self.words // count
        return [range(i * size, (i + 1) * size) for i in range(count)]

    def hold(self, words: range) -> None:
        """Load the activations of some words into registers, if they fit there."""
        at = [(j, i, t) for j in words for i in range(8 // WIDTH[self.bits]) for t in range(self.rows)]
        few = self.way != "float" and len(at) <= HELD[self.way]
        self.held = {}
        self.held = {place: self.activations(*place) for place in at} if few else {}

    def waiting(self) -> ir.Value:
        """The address of room for 32 bits of each output of a block, on the stack."""
        with self.b.goto_entry_block():
            room = self.b.alloca(ir.ArrayType(I32, BLOCK))
        return self.b.ptrtoint(room, I64)

    def moved(self, address: ir.Value, v: ir.Value, nbytes: int) -> ir.Value:
        """The address for vector v, whose outputs have `nbytes` each there."""
        return self.b.add(address, self.b.mul(v, I64(nbytes * self.wide)))

    def at(self, address: ir.Value, kind: ir.Type, offset: int = 0) -> ir.Value:
        """The value `offset` bytes after an address, which need not be aligned."""
        place = self.b.inttoptr(self.b.add(address, I64(offset)), kind.as_pointer())
        return self.b.load(place, align=1)

    def put(self, value: ir.Value, address: ir.Value, offset: int = 0) -> None:
        """Store a value `offset` bytes after an address, which need not be aligned."""
        self.b.store(value, self.b.inttoptr(self.b.add(address, I64(offset)), value.type.as_pointer()), align=1)

    def splat(self, value: ir.Value) -> ir.Value:
        """The same 32 bits for each output."""
        vector = ir.VectorType(value.type, self.wide)
        one = self.b.insert_element(ir.Constant(vector, ir.Undefined), value, I32(0))
        return self.b.shuffle_vector(one, ir.Constant(vector, ir.Undefined), ir.Constant(self.ints, [0] * self.wide))

    def prefetch(self, address: ir.Value, offset: int) -> None:
        """Prefetch the cache line `offset` bytes after an address into the L2 cache; any address is allowed."""
        pointer = BYTE.as_pointer()
        kind = ir.FunctionType(ir.VoidType(), [pointer, I32, I32, I32])
        place = self.b.inttoptr(self.b.add(address, I64(offset)), pointer)
        self.b.call(self.b.module.declare_intrinsic("llvm.prefetch", [pointer], kind), [place, I32(0), I32(2), I32(1)])

    def every(self, value: int, kind: ir.VectorType | None = None) -> ir.Constant:
        """A vector constant with the same value for each output."""
        kind = kind or self.ints
        return ir.Constant(kind, [value] * kind.count)

    def call(self, name: str, result: ir.Type, *arguments: ir.Value) -> ir.Value:
        kind = ir.FunctionType(result, [a.type for a in arguments])
        module = self.b.module
        function = module.globals.get(name) or ir.Function(module, kind, name)
        return self.b.call(function, arguments)

    def fma(self, x: ir.Value, y: ir.Value, z: ir.Value) -> ir.Value:
        """`x * y + z`, rounded once."""
        return self.call(f"llvm.fma.v{self.wide}f32", self.floats, x, y, z)

    def loop(self, count: ir.Value, body: Callable[[ir.Value], None]) -> None:
        """`body(i)` for i below `count`, at least once."""
        before, inside, after = self.b.block, self.b.append_basic_block("loop"), self.b.append_basic_block("after")
        self.b.branch(inside)
        self.b.position_at_end(inside)
        i = self.b.phi(I64)
        i.add_incoming(I64(0), before)
        body(i)
        following = self.b.add(i, I64(1))
        i.add_incoming(following, self.b.block)
        self.b.cbranch(self.b.icmp_signed("<", following, count), inside, after)
        self.b.position_at_end(after)

    # Codes

    def each(self, v: ir.Value, words: range) -> Iterator[tuple[int, ir.Value, ir.Value | None]]:
        """Number, words and third bits of each of some words of vector v."""
        place, b = self.place, self.b
        at, high = self.moved(place.codes, v, 4), self.moved(place.high, v, 2)
        for j in words:
            word = b.add(at, b.mul(I64(j), place.codes_row))
            if self.first and not self.lanes:
                line = b.add(b.mul(self.line_number, I64(len(words))), I64(j - words.start + words.start * LINES))
                self.prefetch(b.add(place.codes, b.mul(line, I64(LINE))), AHEAD)
            thirds = None
            if self.bits == 3:
                bits = self.at(b.add(high, b.mul(I64(j), place.high_row)), ir.VectorType(I16, self.wide))
                thirds = self.b.zext(bits, self.ints)
            yield j, self.at(word, self.ints), thirds

    def planes(self, word: ir.Value, thirds: ir.Value | None) -> Iterator[tuple[int, int, ir.Value]]:
        """Code i of each byte of a vector of words, as (i, e, codes * 2**e).

        With `vnni`, whose sums have 32 bits, codes in the upper half of four bits stay there, which spares a shift.
        """
        b, width = self.b, WIDTH[self.bits]
        spread = self.spread(thirds) if thirds else None
        for i in range(8 // width):
            e = width * i % UNSHIFTED if self.way == "vnni" else 0
            shift = width * i - e
            codes = b.lshr(word, self.every(shift)) if shift else word
            codes = b.and_(codes, self.every(0x01010101 * (2**width - 1 << e))) if width < 8 else codes
            yield i, e, b.or_(codes, self.third_bits(spread, i, e)) if thirds else codes

    def spread(self, high: ir.Value) -> ir.Value:
        """Third bits, 16 per 16-bit word, spread to four per byte of 32 bits, next to the codes they belong to."""
        b = self.b
        t = b.and_(b.or_(high, b.shl(high, self.every(8))), self.every(0x00FF00FF))
        return b.and_(b.or_(t, b.shl(t, self.every(4))), self.every(0x0F0F0F0F))

    def third_bits(self, spread: ir.Value, i: int, e: int) -> ir.Value:
        """The third bits of codes number `i`, as bit 2 + `e` of each byte."""
        left = 2 + e - i
        moved = self.b.shl(spread, self.every(left)) if left >= 0 else self.b.lshr(spread, self.every(-left))
        return self.b.and_(moved, self.every(0x04040404 << e))

    def activations(self, j: int, i: int, t: int) -> ir.Value:
        """The four bytes of row t that code i of each byte of word j is multiplied with."""
        if (j, i, t) in self.held:
            return self.held[j, i, t]
        at = self.b.add(self.place.x, self.b.mul(self.place.x_row, I64(t)))
        return self.splat(self.at(at, I32, 4 * (8 // WIDTH[self.bits] * j + i)))

    # Products of bytes

    def dot4(self, total: ir.Value, codes: ir.Value, x: ir.Value) -> ir.Value:
        """vpdpbusd: `total` (32 bits) and the products of each four bytes of codes, unsigned, and x, signed."""
        return self.call(f"llvm.x86.avx512.vpdpbusd.{32 * self.wide}", self.ints, total, codes, x)

    def madd8(self, codes: ir.Value, x: ir.Value) -> ir.Value:
        """vpmaddubsw: sums of two products of bytes, 16 bits each."""
        if self.way == "avx2":
            codes, x = (self.b.bitcast(value, self.bytes4) for value in (codes, x))
            return self.call("llvm.x86.avx2.pmadd.ub.sw", self.shorts2, codes, x)
        (even, odd), (even_x, odd_x) = self.halves(codes, signed=False), self.halves(x)
        return self.b.add(self.b.mul(even, even_x), self.b.mul(odd, odd_x))

    def halves(self, value: ir.Value, signed: bool = True) -> tuple[ir.Value, ir.Value]:
        """Even and odd bytes, 16 bits each."""
        b, eight = self.b, self.every(8, self.shorts2)
        value, shift = b.bitcast(value, self.shorts2), b.ashr if signed else b.lshr
        return shift(b.shl(value, eight), eight), shift(value, eight)

    def madd16(self, x: ir.Value, y: ir.Value) -> ir.Value:
        """vpmaddwd: sums of two products of 16 bits, 32 bits each."""
        if self.way == "avx2":
            return self.call("llvm.x86.avx2.pmadd.wd", self.ints, x, y)
        b, half = self.b, self.every(16)
        x, y = b.bitcast(x, self.ints), b.bitcast(y, self.ints)
        low = b.mul(b.ashr(b.shl(x, half), half), b.ashr(b.shl(y, half), half))
        return b.add(low, b.mul(b.ashr(x, half), b.ashr(y, half)))

    def madd_wide(self, codes: ir.Value, x: ir.Value) -> ir.Value:
        """Sums of four products of 8-bit codes, whose pairs need more than 16 bits."""
        (even, odd), (even_x, odd_x) = self.halves(codes, signed=False), self.halves(x)
        return self.b.add(self.madd16(even, even_x), self.madd16(odd, odd_x))

    # Sums of a group

    def integers(self, v: ir.Value, words: range) -> list[ir.Value]:
        """Sum of codes times quantized activations over some words, 32 bits for each output: one for each row."""
        add = self.four_bytes if self.way == "vnni" or SPANS[self.bits] is None else self.pairs
        sums: dict[tuple[int, int], ir.Value] = {}  # by row and by the power of two that it is too large by
        add(v, words, sums)
        powers = sorted({e for _, e in sums})
        return [
            functools.reduce(self.b.add, (self.b.ashr(sums[t, e], self.every(e)) if e else sums[t, e] for e in powers))
            for t in range(self.rows)
        ]

    def four_bytes(self, v: ir.Value, words: range, sums: dict[tuple[int, int], ir.Value]) -> None:
        """Sum four products at a time to 32 bits."""
        for j, word, thirds in self.each(v, words):
            for i, e, codes in self.planes(word, thirds):
                for t in range(self.rows):
                    total, x = sums.get((t, e), self.every(0)), self.activations(j, i, t)
                    wide = self.way != "vnni"
                    sums[t, e] = self.b.add(total, self.madd_wide(codes, x)) if wide else self.dot4(total, codes, x)

    def pairs(self, v: ir.Value, words: range, sums: dict[tuple[int, int], ir.Value]) -> None:
        """Sum pairs of products in 16 bits, for as many inputs as these hold, and then to 32."""
        most = (SPANS[self.bits] or 0) * WIDTH[self.bits] // 32
        shorts: dict[int, ir.Value] = {}
        for j, word, thirds in self.each(v, words):
            for i, _, codes in self.planes(word, thirds):
                for t in range(self.rows):
                    pair = self.madd8(codes, self.activations(j, i, t))
                    shorts[t] = self.b.add(shorts[t], pair) if t in shorts else pair
            if (j + 1) % most == 0 or j + 1 == words.stop:
                for t in range(self.rows):
                    total = self.madd16(shorts.pop(t), self.every(1, self.shorts2))
                    sums[t, 0] = self.b.add(sums[t, 0], total) if (t, 0) in sums else total

    def sums_of_floats(self, v: ir.Value) -> list[ir.Value]:
        """Sum of codes times fp32 activations over a group: of inputs with even and with odd numbers, then both."""
        b, width = self.b, WIDTH[self.bits]
        totals = {(t, odd): ir.Constant(self.floats, None) for t in range(self.rows) for odd in range(2)}
        for j, word, thirds in self.each(v, range(self.words)):
            for k in range(32 // width):
                code = b.and_(b.lshr(word, self.every(width * k)), self.every(2**width - 1))
                if thirds:
                    code = b.or_(code, b.and_(b.lshr(b.shl(thirds, self.every(2)), self.every(k)), self.every(4)))
                code = b.sitofp(code, self.floats)
                for t in range(self.rows):
                    at = b.add(self.place.x, b.mul(self.place.x_row, I64(t)))
                    xk = self.splat(self.at(at, F32, 4 * (32 // width * j + k)))
                    totals[t, k % 2] = self.fma(code, xk, totals[t, k % 2])
        return [b.fadd(totals[t, 0], totals[t, 1]) for t in range(self.rows)]

    # What follows

    def factors_of(self, t: int) -> list[ir.Value]:
        """The group's grids times the scale, or the sum, of row t: base, span, low, and top if `lanes`.

        Else what the top adds is alike for all outputs, and is summed apart.
        """
        b, place = self.b, self.place
        xs = self.at(b.add(place.xs, b.mul(place.xs_row, I64(t))), F32)
        xsum = self.at(b.add(place.xsum, b.mul(place.xs_row, I64(t))), F32)
        grids = [b.add(place.grids, b.mul(place.grids_row, I64(i))) for i in range(4)]
        if self.lanes:
            xs, xsum = self.splat(xs), self.splat(xsum)
            return [b.fmul(self.at(grids[i], self.floats), x) for i, x in ((0, xs), (1, xs), (3, xsum), (2, xsum))]
        base, span, top, low = (self.half(at, factor) for at, factor in zip(grids, GRIDS, strict=True))
        common = b.add(place.common, I64(4 * t))
        self.put(b.fadd(self.at(common, F32), b.fmul(top, xsum)), common)
        return [self.splat(b.fmul(grid, x)) for grid, x in ((base, xs), (span, xs), (low, xsum))]

    def half(self, address: ir.Value, factor: float) -> ir.Value:
        """The fp16 number there, times `factor`: its bits moved to fp32's places, which any CPU can."""
        b = self.b
        bits = b.zext(self.at(address, I16), I32)
        bits = b.or_(b.shl(b.and_(bits, I32(0x7FFF)), I32(13)), b.shl(b.and_(bits, I32(0x8000)), I32(16)))
        return b.fmul(b.bitcast(bits, F32), F32(factor * 2.0**112))

    def finish(self, v: ir.Value, sums: list[ir.Value]) -> None:
        """Add `sum * scale + minimum` to the totals, scale and minimum times those of the activations.

        Without `lanes` what the minimum has in common for all outputs is left out, `top` times a group's activations.
        """
        b = self.b
        scale_code, min_code = self.small(self.place.scales, v), self.small(self.place.minima, v)
        for t, (base, span, low, *top) in enumerate(self.factors):
            at = b.add(self.moved(self.place.total, v, 4), I64(4 * BLOCK * t))
            value = sums[t] if self.way == "float" else b.sitofp(sums[t], self.floats)
            total = self.fma(value, self.fma(scale_code, span, base), self.at(at, self.floats))
            total = self.fma(min_code, low, total)
            self.put(b.fadd(total, top[0]) if top else total, at)

    def small(self, address: ir.Value, v: ir.Value) -> ir.Value:
        """A byte for each output of vector v as fp32."""
        small = self.at(self.moved(address, v, 1), ir.VectorType(BYTE, self.wide))
        return self.b.sitofp(self.b.zext(small, self.ints), self.floats)


@intrinsic
def pointer(typingctx, address, kind):
    """An address as a pointer to numbers of that kind."""

    def generate(context, builder, signature, arguments):
        return builder.inttoptr(arguments[0], context.get_value_type(signature.return_type))

    return types.CPointer(kind.dtype)(types.int64, kind), generate


@intrinsic(prefer_literal=True)
def group(
    typingctx, bits, rows, wide, way, size, lanes, lines,
    codes, codes_row, high, high_row, x, x_row, scales, minima, grids, grids_row, xs, xsum, xs_row, total, common,
):  # fmt: skip
    form = [a.literal_value for a in (bits, rows, wide, way, size, lanes)]
    signature = types.void(bits, rows, wide, way, size, lanes, *[types.intp] * (1 + len(Place._fields)))

    def generate(context, builder, signature, arguments):
        Emitter(builder, *form).run(Place(*arguments[7:]), arguments[6])
        return context.get_dummy_value()

    return signature, generate
