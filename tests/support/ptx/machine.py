"""Runs one launch: all lanes of all programs take each instruction together, as numpy vectors."""

import re

import numpy as np

from ptx.memory import RAW, Fault, Shared
from ptx.operations import OPERATIONS, TYPES

MOST_STEPS = 2_000_000


class Machine:
    """One launch. values: of the parameters, in order. memory: a `Global`. shared: bytes per program."""

    def __init__(self, code, values, memory, grid, threads, shared):
        self.code, self.memory, self.steps = code, memory, 0
        self.params = dict(zip(code.params, (*values, 0, 0), strict=False))  # the last two are Triton's scratch
        programs = int(np.prod(grid))
        self.lanes = np.arange(programs * threads)
        self.shared = Shared(programs, shared, threads)
        program = self.lanes // threads
        x, y, z = program % grid[0], program // grid[0] % grid[1], program // (grid[0] * grid[1])
        thread = self.lanes % threads
        found = {"%tid.x": thread, "%laneid": thread % 32, "%ctaid.x": x, "%ctaid.y": y, "%ctaid.z": z}
        self.registers = {name: value.astype(np.uint32) for name, value in found.items()}

    def run(self):
        """Until the end. Raises Fault."""
        at, instructions = 0, self.code.instructions
        while at < len(instructions):
            one, self.steps = instructions[at], self.steps + 1
            if self.steps > MOST_STEPS:
                raise Fault("endless: the program does not end")
            mask = self.guard(one)
            if one.op[0] == "ret" and self.uniform(mask):
                return
            if one.op[0] == "bra":
                at = self.code.labels[one.args[0]] if self.uniform(mask) else at + 1
                continue
            if one.op[0] != "ret":
                self.step(one, mask)
            at += 1

    def step(self, one, mask):
        """Take one instruction; a fault names it."""
        if one.op[0] not in OPERATIONS:
            raise Fault(f"unknown instruction: {one}")
        try:
            with np.errstate(all="ignore"):
                OPERATIONS[one.op[0]](self, one, mask)
        except Fault as fault:
            raise Fault(f"{fault} (in {one})") from None

    def guard(self, one):
        """Which lanes take it, bool (lanes,); None for all."""
        if one.guard is None:
            return None
        mask = np.broadcast_to(self.read(one.guard, "pred"), self.lanes.shape)
        return ~mask if one.negated else mask

    def uniform(self, mask):
        """Whether all lanes go; those that disagree are a fault, as nothing here needs it."""
        if mask is None or mask.all():
            return True
        if mask.any():
            raise Fault("divergent: lanes take different branches")
        return False

    def read(self, name, kind):
        """A register, special register or number, in the type `kind`: (lanes,), or (1,) where all lanes agree."""
        dtype = TYPES[kind]
        if name in self.registers:
            value = self.registers[name]
        elif name.startswith("%"):
            value = np.array([-1], np.int64).astype(RAW[dtype().itemsize])  # undefined bits: NaN, should they count
        else:
            value = _number(name, kind)
        return value if value.dtype == dtype else value.astype(RAW[dtype().itemsize], copy=False).view(dtype)

    def write(self, name, value, mask=None):
        """Set a register, in the lanes of the mask."""
        if name == "_":
            return
        bits = self.code.registers[re.match(r"%[a-z]+", name)[0]]
        raw = value if bits == 1 else value.view(RAW[value.dtype.itemsize]).astype(RAW[bits // 8], copy=False)
        if mask is not None and not mask.all():
            raw = np.where(mask, raw, self.registers.get(name, np.zeros(1, raw.dtype)))
        self.registers[name] = raw

    def address(self, text, mask):
        """Lanes that take part, and their addresses."""
        name, _, offset = text.partition("+")
        if name.strip() == "global_smem":
            base = np.zeros(1, np.int64)
        else:
            base = self.read(name.strip(), "u32" if re.match(r"%r\d", name.strip()) else "u64").astype(np.int64)
        addresses = np.broadcast_to(base + int(offset or 0), self.lanes.shape)
        return (self.lanes, addresses) if mask is None else (self.lanes[mask], addresses[mask])


def _number(text, kind):
    """A literal as a vector of one."""
    dtype = TYPES[kind]
    if kind == "pred":
        return np.array([int(text, 0) != 0])
    if text == "global_smem":
        return np.zeros(1, dtype)
    if text.startswith("0f"):
        return np.array([int(text[2:], 16)], np.uint32)
    size = dtype().itemsize
    return np.array([int(text.rstrip("U"), 0) & (256**size - 1)], RAW[size])
