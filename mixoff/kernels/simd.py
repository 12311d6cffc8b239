"""Inner loops of products with quantized weights, as vectors of outputs: the instructions that numba compiles.

Letters: **T** rows of activations, **V** vectors of 8 or 16 outputs beside each other, **G** group size.
A word of codes holds neighbouring inputs of one output (`mixoff.quantize`). Shifted by i codes and masked, its four
bytes are codes of four of them, and one multiplication of bytes takes each pair to a sum in 16 bits. Three ways to the
same integers: `avx2` (vpmaddubsw, summed in 16 bits for as long as they hold, `SPANS`), `vnni` (vpdpbusd, summed in 32
bits at once) and `any` (plain vector arithmetic, which LLVM turns into what the CPU has). `float` multiplies codes with
fp32 activations. What follows the sum of a group is the same for all: the same fused multiply-adds in the same order,
so integers that agree give results that agree bit for bit.

Does not know tensors, blocks or threads: addresses come in, and sums of one group go out.
"""

from __future__ import annotations

from collections import namedtuple
from collections.abc import Callable

from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic

LANES = 8  # outputs of a vector of 256 bits
WIDE = 16  # the same of 512 bits, for CPUs that have them
WIDTH = {2: 2, 3: 2, 4: 4, 8: 8}  # bits of a code in a word; the third of 3-bit codes lies apart
TOP = 127  # the largest quantized activation
BLOCK = 128  # outputs of a block of codes
LINE = 64  # bytes of a cache line
AHEAD = 4096  # bytes; how far before their turn codes are asked for: the CPU does not foresee the steps between blocks
SPANS = {2: 128, 3: 64, 4: 32, 8: None}  # inputs whose products sum up in 16 bits; None: 8-bit codes never do

BYTE, I16, I32, I64, F32 = ir.IntType(8), ir.IntType(16), ir.IntType(32), ir.IntType(64), ir.FloatType()

Place = namedtuple(
    "Place",
    "words codes codes_row high high_row x x_row scales minima grids grids_row xs xsum xs_row total",
)


class Emitter:
    """The instructions of one group for V vectors of `wide` outputs and T rows; a thin layer over llvmlite's builder.

    Kinds of vectors by what they hold, once for each output: `bytes4`, `shorts2`, `ints` and `floats`.
    """

    def __init__(self, builder: ir.IRBuilder, bits: int, rows: int, vectors: int, wide: int, way: str) -> None:
        self.b, self.bits, self.rows, self.vectors, self.wide, self.way = builder, bits, rows, vectors, wide, way
        self.cells = [(t, v) for t in range(rows) for v in range(vectors)]
        self.bytes4, self.shorts2 = ir.VectorType(BYTE, 4 * wide), ir.VectorType(I16, 2 * wide)
        self.ints, self.floats = ir.VectorType(I32, wide), ir.VectorType(F32, wide)

    def at(self, address: ir.Value, kind: ir.Type, offset: int = 0) -> ir.Value:
        """What stands `offset` bytes after an address, which needs no alignment."""
        place = self.b.inttoptr(self.b.add(address, I64(offset)), kind.as_pointer())
        return self.b.load(place, align=1)

    def put(self, value: ir.Value, address: ir.Value, offset: int = 0) -> None:
        self.b.store(value, self.b.inttoptr(self.b.add(address, I64(offset)), value.type.as_pointer()), align=1)

    def splat(self, value: ir.Value) -> ir.Value:
        """The same 32 bits for each output."""
        vector = ir.VectorType(value.type, self.wide)
        one = self.b.insert_element(ir.Constant(vector, ir.Undefined), value, I32(0))
        return self.b.shuffle_vector(one, ir.Constant(vector, ir.Undefined), ir.Constant(self.ints, [0] * self.wide))

    def prefetch(self, address: ir.Value, offset: int) -> None:
        """Have the cache line `offset` bytes after an address come to the second cache; none there is no error."""
        pointer = BYTE.as_pointer()
        kind = ir.FunctionType(ir.VoidType(), [pointer, I32, I32, I32])
        place = self.b.inttoptr(self.b.add(address, I64(offset)), pointer)
        self.b.call(self.b.module.declare_intrinsic("llvm.prefetch", [pointer], kind), [place, I32(0), I32(2), I32(1)])

    def every(self, value: int, kind: ir.VectorType | None = None) -> ir.Constant:
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

    def variables(self, kind: ir.Type) -> dict[tuple[int, int], ir.Value]:
        """One zero for each row and vector; LLVM keeps them in registers."""
        with self.b.goto_entry_block():
            places = {cell: self.b.alloca(kind) for cell in self.cells}
        for place in places.values():
            self.b.store(ir.Constant(kind, None), place)
        return places

    # Codes

    def plane(self, word: ir.Value, high: ir.Value | None, i: int) -> ir.Value:
        """Code i of each byte of a vector of words."""
        width = WIDTH[self.bits]
        codes = self.b.lshr(word, self.every(width * i)) if i else word
        codes = self.b.and_(codes, self.every(0x01010101 * (2**width - 1))) if width < 8 else codes
        return self.b.or_(codes, self.third_bits(self.spread(high), i)) if high else codes

    def spread(self, high: ir.Value) -> ir.Value:
        """Third bits, 16 in a 16-bit word, four to each byte of 32 bits: where the codes that they belong to lie."""
        b = self.b
        t = b.and_(b.or_(high, b.shl(high, self.every(8))), self.every(0x00FF00FF))
        return b.and_(b.or_(t, b.shl(t, self.every(4))), self.every(0x0F0F0F0F))

    def third_bits(self, spread: ir.Value, i: int) -> ir.Value:
        moved = self.b.shl(spread, self.every(2 - i)) if i < 2 else self.b.lshr(spread, self.every(i - 2))
        return self.b.and_(moved, self.every(0x04040404))

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

    def each(self, place: Place, j: ir.Value, take: Callable[[tuple[int, int], ir.Value, ir.Value], None]) -> None:
        """`take(cell, codes, x)`, four bytes for each output, for what row j of words holds.

        The order is the one that needs the fewest registers: vector by vector for one row, plane by plane for several.
        """
        b, count = self.b, 8 // WIDTH[self.bits]
        words, highs = self.words(place, j)
        x = [b.add(place.x, b.add(b.mul(j, I64(4 * count)), b.mul(place.x_row, I64(t)))) for t in range(self.rows)]
        if self.rows == 1:
            order = [(v, i) for v in range(self.vectors) for i in range(count)]
        else:
            order = [(v, i) for i in range(count) for v in range(self.vectors)]
        for v, i in order:
            codes = self.plane(words[v], highs and highs[v], i)
            for t in range(self.rows):
                take((t, v), codes, self.splat(self.at(x[t], I32, 4 * i)))

    def words(self, place: Place, j: ir.Value) -> tuple[list[ir.Value], list[ir.Value] | None]:
        b = self.b
        at = b.add(place.codes, b.mul(j, place.codes_row))
        step = 4 * self.wide
        words = [self.at(at, self.ints, step * v) for v in range(self.vectors)]
        for offset in range(0, step * self.vectors, LINE):
            self.prefetch(at, offset + AHEAD)
        if self.bits != 3:
            return words, None
        at = b.add(place.high, b.mul(j, place.high_row))
        thirds = ir.VectorType(I16, self.wide)
        return words, [b.zext(self.at(at, thirds, step // 2 * v), self.ints) for v in range(self.vectors)]

    def integers(self, place: Place) -> dict[tuple[int, int], ir.Value]:
        """Sum of codes times quantized activations over a group, 32 bits for each output."""
        b, span = self.b, SPANS[self.bits] if self.way != "vnni" else None
        totals = self.variables(self.ints)
        if span is None:
            self.loop(place.words, lambda j: self.each(place, j, lambda *a: self.add_four(totals, *a)))
        elif span >= 128:
            self.add_span(place, I64(0), place.words, totals)
        else:
            most = I64(span * WIDTH[self.bits] // 32)
            inner = b.select(b.icmp_signed("<", place.words, most), place.words, most)
            self.loop(b.udiv(place.words, inner), lambda i: self.add_span(place, b.mul(i, inner), inner, totals))
        return {cell: b.load(total) for cell, total in totals.items()}

    def add_four(self, totals: dict, cell: tuple[int, int], codes: ir.Value, x: ir.Value) -> None:
        total = self.b.load(totals[cell])
        total = self.dot4(total, codes, x) if self.way == "vnni" else self.b.add(total, self.madd_wide(codes, x))
        self.b.store(total, totals[cell])

    def add_span(self, place: Place, start: ir.Value, count: ir.Value, totals: dict) -> None:
        """Add the products of `count` rows of words, summed in 16 bits, to the totals."""
        shorts, b = self.variables(self.shorts2), self.b

        def add(cell: tuple[int, int], codes: ir.Value, x: ir.Value) -> None:
            b.store(b.add(b.load(shorts[cell]), self.madd8(codes, x)), shorts[cell])

        self.loop(count, lambda i: self.each(place, b.add(start, i), add))
        for cell, total in totals.items():
            pairs = self.madd16(b.load(shorts[cell]), self.every(1, self.shorts2))
            b.store(b.add(b.load(total), pairs), total)

    def sums_of_floats(self, place: Place) -> dict[tuple[int, int], ir.Value]:
        """Sum of codes times fp32 activations over a group, inputs ascending."""
        totals = self.variables(self.floats)
        self.loop(place.words, lambda j: self.add_floats(place, j, totals))
        return {cell: self.b.load(total) for cell, total in totals.items()}

    def add_floats(self, place: Place, j: ir.Value, totals: dict) -> None:
        b, width = self.b, WIDTH[self.bits]
        count = 32 // width
        words, highs = self.words(place, j)
        x = [b.add(place.x, b.add(b.mul(j, I64(4 * count)), b.mul(place.x_row, I64(t)))) for t in range(self.rows)]
        for k in range(count):
            xk = [self.splat(self.at(at, F32, 4 * k)) for at in x]
            for v in range(self.vectors):
                code = b.and_(b.lshr(words[v], self.every(width * k)), self.every(2**width - 1))
                if highs:
                    code = b.or_(code, b.and_(b.lshr(b.shl(highs[v], self.every(2)), self.every(k)), self.every(4)))
                code = b.sitofp(code, self.floats)
                for t in range(self.rows):
                    b.store(self.fma(code, xk[t], b.load(totals[t, v])), totals[t, v])

    # What follows

    def finish(self, place: Place, sums: dict[tuple[int, int], ir.Value], lanes: bool) -> None:
        """Add `sum * xs * scale + xsum * minimum` to the totals of each output."""
        b = self.b
        xs = [self.splat(self.at(b.add(place.xs, b.mul(place.xs_row, I64(t))), F32)) for t in range(self.rows)]
        xsum = [self.splat(self.at(b.add(place.xsum, b.mul(place.xs_row, I64(t))), F32)) for t in range(self.rows)]
        grids = [b.add(place.grids, b.mul(place.grids_row, I64(i))) for i in range(4)]
        if lanes:  # each output has its own
            base, span, top, low = (self.at(at, self.floats) for at in grids)
        else:
            base, span, top, low = (self.splat(self.at(at, F32)) for at in grids)
        totals = {}  # stored when all are there: after a store, LLVM would load the grid again
        for v in range(self.vectors):
            scale = self.fma(self.small(place.scales, v), span, base)
            minimum = self.fma(self.small(place.minima, v), low, top)
            for t in range(self.rows):
                value = sums[t, v] if self.way == "float" else b.sitofp(sums[t, v], self.floats)
                total = self.at(place.total, self.floats, 4 * (BLOCK * t + self.wide * v))
                total = self.fma(b.fmul(value, xs[t]), scale, total)
                totals[t, v] = self.fma(xsum[t], minimum, total)
        for (t, v), total in totals.items():
            self.put(total, place.total, 4 * (BLOCK * t + self.wide * v))

    def small(self, address: ir.Value, v: int) -> ir.Value:
        """A byte for each output as fp32."""
        small = self.at(address, ir.VectorType(BYTE, self.wide), self.wide * v)
        return self.b.sitofp(self.b.zext(small, self.ints), self.floats)


@intrinsic
def pointer(typingctx, address, kind):
    """An address as a pointer to numbers of that kind."""

    def generate(context, builder, signature, arguments):
        return builder.inttoptr(arguments[0], context.get_value_type(signature.return_type))

    return types.CPointer(kind.dtype)(types.int64, kind), generate


@intrinsic(prefer_literal=True)
def group(
    typingctx, bits, rows, vectors, wide, way, lanes,
    words, codes, codes_row, high, high_row, x, x_row, scales, minima, grids, grids_row, xs, xsum, xs_row, total,
):  # fmt: skip
    form = [a.literal_value for a in (bits, rows, vectors, wide, way)]
    signature = types.void(bits, rows, vectors, wide, way, lanes, *[types.intp] * len(Place._fields))

    def generate(context, builder, signature, arguments):
        emitter, place = Emitter(builder, *form), Place(*arguments[6:])
        sums = emitter.sums_of_floats(place) if emitter.way == "float" else emitter.integers(place)
        emitter.finish(place, sums, bool(lanes.literal_value))
        return context.get_dummy_value()

    return signature, generate
