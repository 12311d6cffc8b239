"""What each instruction computes: OPERATIONS, by the first part of its name (NVIDIA, PTX ISA 8.8, section 9.7)."""

import numpy as np

from ptx.memory import RAW, Fault, aligned

TYPES = {"pred": np.bool_, "f16": np.float16, "f32": np.float32, "f64": np.float64}
TYPES |= {f"{sort}{8 * size}": RAW[size] for sort in "bu" for size in RAW}
TYPES |= {"s8": np.int8, "s16": np.int16, "s32": np.int32, "s64": np.int64}
TWICE = {"s16": "s32", "u16": "u32", "s32": "s64", "u32": "u64"}
VECTORS = {"v2": 2, "v4": 4}
OPERATIONS = {}


def operation(*names):
    """Register a function of (machine, instruction, mask)."""
    return lambda fn: OPERATIONS.update(dict.fromkeys(names, fn))


# Arithmetic -----------------------------------------------------------------------------------------------------------

ELEMENTWISE = {
    "add": np.add, "sub": np.subtract, "min": np.minimum, "max": np.maximum, "and": np.bitwise_and,
    "or": np.bitwise_or, "xor": np.bitwise_xor, "not": np.invert, "neg": np.negative, "abs": np.abs,
    "ex2": np.exp2, "rcp": np.reciprocal,
}  # fmt: skip


@operation(*ELEMENTWISE)
def elementwise(machine, one, mask):
    values = [machine.read(arg, one.op[-1]) for arg in one.args[1:]]
    machine.write(one.args[0], ELEMENTWISE[one.op[0]](*values), mask)


@operation("mul", "mad", "fma")
def multiply(machine, one, mask):
    """lo and floating point in the type itself, wide in twice its bits; fma rounds once, by way of fp64."""
    kind = one.op[-1]
    wide = {"wide": TWICE.get(kind), "hi": TWICE.get(kind)}.get(one.op[1], kind)
    calculated = np.float64 if one.op[0] == "fma" else TYPES[wide]
    x, y = (machine.read(arg, kind).astype(calculated) for arg in one.args[1:3])
    value = x * y
    if one.op[1] == "hi":
        value = value >> value.dtype.type(8 * TYPES[kind]().itemsize)
    if len(one.args) == 4:
        value = value + machine.read(one.args[3], wide).astype(calculated)
    machine.write(one.args[0], value.astype(TYPES[kind if one.op[1] == "hi" else wide]), mask)


@operation("div", "rem")
def divide(machine, one, mask):
    """Whole numbers towards zero, as C does."""
    x, y = (machine.read(arg, one.op[-1]) for arg in one.args[1:])
    if one.op[-1] == "f32":
        value = x / y
    else:
        rest = np.fmod(x, y)
        value = rest if one.op[0] == "rem" else (x - rest) // y
    machine.write(one.args[0], value.astype(x.dtype), mask)


@operation("shl", "shr")
def shift(machine, one, mask):
    """By more than there are bits: nothing is left, or the sign."""
    x, by = machine.read(one.args[1], one.op[-1]), machine.read(one.args[2], "u32")
    bits, shifted = 8 * x.dtype.itemsize, np.left_shift if one.op[0] == "shl" else np.right_shift
    value = shifted(x, np.minimum(by, bits - 1).astype(x.dtype))
    signed = one.op == ("shr", f"s{bits}")
    machine.write(one.args[0], value if signed else np.where(by < bits, value, x.dtype.type(0)), mask)


@operation("bfe")
def extract(machine, one, mask):
    """Some bits of a number, and its sign if the type has one."""
    x, (at, count) = machine.read(one.args[1], one.op[-1]), (int(arg.rstrip("U"), 0) for arg in one.args[2:])
    bits, kind = 8 * x.dtype.itemsize, x.dtype.type
    machine.write(one.args[0], (x << kind(bits - at - count)) >> kind(bits - count), mask)


@operation("prmt")
def permute(machine, one, mask):
    """Four bytes chosen from eight; the fourth bit of a choice takes the byte's sign instead."""
    low, high, choice = (machine.read(arg, "u32").astype(np.uint64) for arg in one.args[1:])
    both, value = low | high << np.uint64(32), np.zeros(1, np.uint64)
    for i in range(4):
        chosen = choice >> np.uint64(4 * i) & np.uint64(15)
        byte = both >> (chosen & np.uint64(7)) * np.uint64(8) & np.uint64(255)
        sign = (byte >> np.uint64(7)) * np.uint64(255)
        value = value | np.where(chosen & np.uint64(8), sign, byte) << np.uint64(8 * i)
    machine.write(one.args[0], value.astype(np.uint32), mask)


# Choices and conversions ----------------------------------------------------------------------------------------------

COMPARED = {
    "lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal, "eq": np.equal, "ne": np.not_equal,
    "lo": np.less, "ls": np.less_equal, "hi": np.greater, "hs": np.greater_equal,
    "num": lambda x, y: ~(np.isnan(x) | np.isnan(y)), "nan": lambda x, y: np.isnan(x) | np.isnan(y),
}  # fmt: skip
COMBINED = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}


@operation("setp")
def compare(machine, one, mask):
    value = COMPARED[one.op[1]](*(machine.read(arg, one.op[-1]) for arg in one.args[1:3]))
    if one.op[2] in COMBINED:
        value = COMBINED[one.op[2]](value, machine.read(one.args[3], "pred"))
    machine.write(one.args[0], value, mask)


@operation("selp")
def select(machine, one, mask):
    x, y = (machine.read(arg, one.op[-1]) for arg in one.args[1:3])
    machine.write(one.args[0], np.where(machine.read(one.args[3], "pred"), x, y), mask)


@operation("cvt")
def convert(machine, one, mask):
    """Two halves into one register, or one type into another."""
    to, kind = one.op[-2:]
    if to == "f16x2":
        high, low = (machine.read(arg, "f32").astype(np.float16).view(np.uint16) for arg in one.args[1:])
        machine.write(one.args[0], low.astype(np.uint32) | high.astype(np.uint32) << np.uint32(16), mask)
    else:
        machine.write(one.args[0], machine.read(one.args[1], kind).astype(TYPES[to]), mask)


@operation("mov")
def move(machine, one, mask):
    """A value, or one that is taken apart or put together: {low, high}."""
    target, source = one.args
    if isinstance(target, tuple):
        whole = machine.read(source, one.op[-1])
        part = whole.dtype.itemsize // len(target)
        for i, name in enumerate(target):
            machine.write(name, (whole >> whole.dtype.type(8 * part * i)).astype(RAW[part]), mask)
    elif isinstance(source, tuple):
        whole, part = TYPES[one.op[-1]], TYPES[one.op[-1]]().itemsize // len(source)
        parts = [
            machine.read(name, f"u{8 * part}").astype(whole) << whole(8 * part * i) for i, name in enumerate(source)
        ]
        machine.write(target, np.bitwise_or.reduce(np.broadcast_arrays(*parts)), mask)
    else:
        machine.write(target, machine.read(source, one.op[-1]), mask)


# Memory ---------------------------------------------------------------------------------------------------------------


def _names(arg):
    return arg if isinstance(arg, tuple) else (arg,)


def _space(machine, one):
    """Functions that load and store for lanes, in the memory that the instruction names."""
    if "shared" in one.op:
        return machine.shared.load, machine.shared.store
    memory = machine.memory
    return lambda _, *access: memory.load(*access), lambda _, *access: memory.store(*access)


@operation("ld")
def load(machine, one, mask):
    names, dtype = _names(one.args[0]), TYPES[one.op[-1]]
    size = dtype().itemsize
    if one.op[1] == "param":
        raw = machine.params[one.args[1]] & (256**size - 1)
        return machine.write(names[0], np.array([raw], RAW[size]), mask)
    lanes, addresses = machine.address(one.args[1], mask)
    if not len(lanes):
        return None
    found = _space(machine, one)[0](lanes, addresses, size * len(names))  # (lanes, bytes)
    for i, name in enumerate(names):
        value = np.zeros(machine.lanes.shape, RAW[size])
        value[lanes] = np.ascontiguousarray(found[:, i * size : (i + 1) * size]).view(RAW[size])[:, 0]
        machine.write(name, value, mask)


@operation("st")
def store(machine, one, mask):
    lanes, addresses = machine.address(one.args[0], mask)
    if not len(lanes):
        return
    values = [machine.read(name, one.op[-1]) for name in _names(one.args[1])]
    columns = [np.ascontiguousarray(np.broadcast_to(value, machine.lanes.shape)[lanes]) for value in values]
    _space(machine, one)[1](lanes, addresses, np.stack(columns, 1).view(np.uint8))


@operation("bar")
def barrier(machine, one, mask):
    if not machine.uniform(mask):
        raise Fault("divergent: a barrier that not all lanes reach")
    if one.op[1] == "sync":
        machine.shared.barrier()


@operation("shfl")
def shuffle(machine, one, mask):
    """A value of another lane of the warp: bfly by exclusive or, idx by number."""
    if mask is not None or one.op[2] not in ("bfly", "idx"):
        raise Fault("unknown instruction")
    value = np.broadcast_to(machine.read(one.args[1], "u32"), machine.lanes.shape)
    by = machine.read(one.args[2], "u32").astype(np.int64)
    lane = machine.lanes & 31
    other = lane ^ by if one.op[2] == "bfly" else by & 31
    machine.write(one.args[0].partition("|")[0], value[machine.lanes - lane + other])


LANE = np.arange(32)


def _matrices(machine, one, address, i):
    """Lanes and addresses, eight per warp, of the rows of 8 x 8 16-bit numbers of matrix i."""
    rows = machine.address(address, None)[1].reshape(-1, 32)[:, 8 * i : 8 * i + 8]  # (warps, 8)
    aligned(rows.ravel(), 16)
    return machine.lanes.reshape(-1, 32)[:, 8 * i : 8 * i + 8].ravel(), rows.ravel()


@operation("ldmatrix")
def load_matrices(machine, one, mask):
    """Each lane gets two neighbours of each matrix (section 9.7.14.5.15); the lane's address is that of a row."""
    for i, name in enumerate(_names(one.args[0])):
        found = machine.shared.load(*_matrices(machine, one, one.args[1], i), 16)
        matrix = np.ascontiguousarray(found).view(np.uint16).reshape(-1, 8, 8).astype(np.uint32)
        matrix = matrix.transpose(0, 2, 1) if "trans" in one.op else matrix
        low, high = (matrix[:, LANE // 4, 2 * (LANE % 4) + k] for k in (0, 1))
        machine.write(name, (low | high << np.uint32(16)).ravel())


@operation("stmatrix")
def store_matrices(machine, one, mask):
    """The other way round."""
    for i, name in enumerate(_names(one.args[1])):
        value = np.broadcast_to(machine.read(name, "u32"), machine.lanes.shape).reshape(-1, 32)
        matrix = np.zeros((len(value), 8, 8), np.uint16)
        for k in (0, 1):
            matrix[:, LANE // 4, 2 * (LANE % 4) + k] = value >> np.uint32(16 * k) & np.uint32(0xFFFF)
        matrix = matrix.transpose(0, 2, 1) if "trans" in one.op else matrix
        rows = np.ascontiguousarray(matrix).reshape(-1, 8).view(np.uint8)
        machine.shared.store(*_matrices(machine, one, one.args[0], i), rows)
