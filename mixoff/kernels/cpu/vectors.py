"""Sums of products of floats, as vectors of 16: the parts of a decode step that are not products with packed codes.

Letters: **D** numbers of a row or head, **T** rows.
LLVM does not reorder sums of floats on its own, so loops over them would run one number at a time. Here every sum has a
fixed order: 16 lanes each, then halves of halves. Rows in bf16 are widened as they are read.
"""

from __future__ import annotations

from collections.abc import Callable

from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic

LANES = 16
SUMS = 4  # vectors that a long dot product sums side by side
HEADS = 4  # heads that share what is read from the cache of keys and values
I16, I32, I64, F32 = ir.IntType(16), ir.IntType(32), ir.IntType(64), ir.FloatType()
FLOATS, INTS, SHORTS = (ir.VectorType(kind, LANES) for kind in (F32, I32, I16))
ZERO = ir.Constant(FLOATS, None)


class Vectors:
    """Instructions on vectors of floats, added to numba's builder; addresses are 64-bit numbers."""

    def __init__(self, builder: ir.IRBuilder) -> None:
        self.b = builder

    def moved(self, address: ir.Value, count: ir.Value, nbytes: int) -> ir.Value:
        """`address` plus `count` times `nbytes`."""
        return self.b.add(address, self.b.mul(count, I64(nbytes)))

    def read(self, address: ir.Value, narrow: bool) -> ir.Value:
        """The vector at `address`, of fp32 or of bf16."""
        if not narrow:
            return self.b.load(self.b.inttoptr(address, FLOATS.as_pointer()), align=4)
        bits = self.b.load(self.b.inttoptr(address, SHORTS.as_pointer()), align=2)
        return self.b.bitcast(self.b.shl(self.b.zext(bits, INTS), ir.Constant(INTS, [16] * LANES)), FLOATS)

    def write(self, value: ir.Value, address: ir.Value) -> None:
        """Store a vector, or one number."""
        self.b.store(value, self.b.inttoptr(address, value.type.as_pointer()), align=4)

    def prefetch(self, address: ir.Value) -> None:
        """Prefetch the cache line at `address`; any address is allowed."""
        pointer = ir.IntType(8).as_pointer()
        kind = ir.FunctionType(ir.VoidType(), [pointer, I32, I32, I32])
        function = self.b.module.declare_intrinsic("llvm.prefetch", [pointer], kind)
        self.b.call(function, [self.b.inttoptr(address, pointer), I32(0), I32(3), I32(1)])

    def everywhere(self, address: ir.Value) -> ir.Value:
        """The number at `address` in all lanes."""
        value = self.b.load(self.b.inttoptr(address, F32.as_pointer()), align=4)
        undefined = ir.Constant(FLOATS, ir.Undefined)
        first = self.b.insert_element(undefined, value, I32(0))
        return self.b.shuffle_vector(first, undefined, ir.Constant(INTS, [0] * LANES))

    def fma(self, x: ir.Value, y: ir.Value, z: ir.Value) -> ir.Value:
        """x * y + z, rounded once."""
        name, module = f"llvm.fma.v{LANES}f32", self.b.module
        function = module.globals.get(name) or ir.Function(module, ir.FunctionType(FLOATS, [FLOATS] * 3), name)
        return self.b.call(function, [x, y, z])

    def total(self, value: ir.Value) -> ir.Value:
        """The sum of all lanes: the lower half plus the upper, and again."""
        n = LANES
        while n > 1:
            n //= 2
            undefined, kind = ir.Constant(value.type, ir.Undefined), ir.VectorType(I32, n)
            halves = [ir.Constant(kind, list(range(first, first + n))) for first in (0, n)]
            value = self.b.fadd(*(self.b.shuffle_vector(value, undefined, half) for half in halves))
        return self.b.extract_element(value, I32(0))

    def loop(self, count: ir.Value, first: list[ir.Value], body: Callable) -> list[ir.Value]:
        """`values = body(i, values)` for i in 0..count, from `first` on; returns the last values. count: at least 1."""
        b, before, inside = self.b, self.b.block, self.b.append_basic_block("loop")
        b.branch(inside)
        b.position_at_end(inside)
        i = b.phi(I64)
        i.add_incoming(I64(0), before)
        values = [b.phi(value.type) for value in first]
        for phi, value in zip(values, first, strict=True):
            phi.add_incoming(value, before)
        following, i_next = body(i, values), b.add(i, I64(1))
        for phi, value in zip([i, *values], [i_next, *following], strict=True):
            phi.add_incoming(value, b.block)
        after = b.append_basic_block("after")
        b.cbranch(b.icmp_signed("<", i_next, count), inside, after)
        b.position_at_end(after)
        return following

    def rows(self, first: ir.Value, nbytes: ir.Value, count: int) -> list[ir.Value]:
        """Addresses of `count` rows, so many bytes apart."""
        return [self.b.add(first, self.b.mul(nbytes, I64(i))) for i in range(count)]

    def either(self, narrow: ir.Value, emit: Callable[[bool], None]) -> None:
        """`emit(True)` where the number `narrow` is not zero, else `emit(False)`."""
        with self.b.if_else(self.b.icmp_signed("!=", narrow, I64(0))) as (then, otherwise):
            for branch, is_narrow in ((then, True), (otherwise, False)):
                with branch:
                    emit(is_narrow)


@intrinsic
def dot(typingctx, narrow, x, w, D):
    """The sum of x[i] * w[i] for i in 0..D, a multiple of 64; x is fp32, w is bf16 if `narrow`, else fp32."""

    def generate(context, builder, signature, arguments):
        v, (narrow, x, w, D) = Vectors(builder), arguments
        step, result = LANES * SUMS, cgutils.alloca_once(builder, F32)

        def emit(is_narrow):
            item = 2 if is_narrow else 4

            def body(i, sums):
                at, weights = v.moved(x, i, 4 * step), v.moved(w, i, item * step)
                return [
                    v.fma(v.read(builder.add(at, I64(4 * LANES * k)), False),
                          v.read(builder.add(weights, I64(item * LANES * k)), is_narrow), one)
                    for k, one in enumerate(sums)
                ]  # fmt: skip

            a, b, c, d = v.loop(builder.sdiv(D, I64(step)), [ZERO] * SUMS, body)
            builder.store(v.total(builder.fadd(builder.fadd(a, b), builder.fadd(c, d))), result)

        v.either(narrow, emit)
        return builder.load(result)

    return types.float32(*[types.int64] * 4), generate


@intrinsic(prefer_literal=True)
def scores(typingctx, heads, narrow, q, q_row, k, D, T, out, out_row):
    """out[h, t] = q[h] . k[t] for `heads` queries, D a multiple of 16; rows of q and out are so many bytes apart.

    The T keys that follow are prefetched, here and in `mixture`: those of the next call.
    """
    number = heads.literal_value

    def generate(context, builder, signature, arguments):
        v, (_, narrow, q, q_row, k, D, T, out, out_row) = Vectors(builder), arguments
        queries, results = v.rows(q, q_row, number), v.rows(out, out_row, number)

        def emit(is_narrow):
            item = 2 if is_narrow else 4

            def row(t, _):
                key = builder.add(k, builder.mul(t, builder.mul(D, I64(item))))

                def body(i, sums):
                    place = v.moved(key, i, item * LANES)
                    v.prefetch(builder.add(place, builder.mul(T, builder.mul(D, I64(item)))))
                    values = v.read(place, is_narrow)
                    at = [v.read(v.moved(query, i, 4 * LANES), False) for query in queries]
                    return [v.fma(one, values, total) for one, total in zip(at, sums, strict=True)]

                sums = v.loop(builder.sdiv(D, I64(LANES)), [ZERO] * number, body)
                for total, result in zip(sums, results, strict=True):
                    v.write(v.total(total), v.moved(result, t, 4))
                return []

            v.loop(T, [], row)

        v.either(narrow, emit)
        return context.get_dummy_value()

    return types.void(heads, *[types.int64] * 8), generate


@intrinsic(prefer_literal=True)
def mixture(typingctx, heads, narrow, p, p_row, values, D, T, out, out_row):
    """out[h] += sum of p[h, t] * values[t] for `heads` rows of p, in the order of t."""
    number = heads.literal_value

    def generate(context, builder, signature, arguments):
        v, (_, narrow, p, p_row, values, D, T, out, out_row) = Vectors(builder), arguments
        shares, results = v.rows(p, p_row, number), v.rows(out, out_row, number)

        def emit(is_narrow):
            item = 2 if is_narrow else 4

            def column(i, _):
                at = [v.moved(result, i, 4 * LANES) for result in results]

                def body(t, sums):
                    row = builder.add(values, builder.mul(t, builder.mul(D, I64(item))))
                    place = v.moved(row, i, item * LANES)
                    v.prefetch(builder.add(place, builder.mul(T, builder.mul(D, I64(item)))))
                    value = v.read(place, is_narrow)
                    factors = [v.everywhere(v.moved(share, t, 4)) for share in shares]
                    return [v.fma(factor, value, total) for factor, total in zip(factors, sums, strict=True)]

                for address, total in zip(at, v.loop(T, [v.read(one, False) for one in at], body), strict=True):
                    v.write(total, address)
                return []

            v.loop(builder.sdiv(D, I64(LANES)), [], column)

        v.either(narrow, emit)
        return context.get_dummy_value()

    return types.void(heads, *[types.int64] * 8), generate
