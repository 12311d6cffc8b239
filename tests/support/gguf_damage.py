"""Hostile GGUF files: the header of a real one with numbers, names and types replaced, and random bytes changed."""

import random
import struct

from mixoff.checkpoints.gguf.header import ARRAY, NUMBERS, STRING

HUGE = (0, 1, 7, 2**16, 2**31, 2**32 - 1, 2**33, 2**40, 2**62, 2**63 - 1, 2**63, 2**64 - 1)
WIDTHS = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}


def fields(raw):
    """(offset, bytes, what) of each number of a header that says how much there is, and of what type."""
    found, at = [(4, 4, "version"), (8, 8, "tensors"), (16, 8, "entries")], 24
    tensors, entries = struct.unpack_from("<QQ", raw, 8)

    def note(width, what):
        nonlocal at
        found.append((at, width, what))
        at += width
        return int.from_bytes(raw[at - width : at], "little")

    def text(what):
        nonlocal at
        length = note(8, what)
        at += length

    def value(kind):
        nonlocal at
        if kind == STRING:
            text("length of a string")
        elif kind == ARRAY:
            inner, count = note(4, "type of an array"), note(8, "length of an array")
            for _ in range(count) if inner == STRING else ():
                at += 8 + int.from_bytes(raw[at : at + 8], "little")
            at += count * WIDTHS.get(inner, 0)
        else:
            assert kind in NUMBERS
            note(WIDTHS[kind], "value")

    for _ in range(entries):
        text("length of a key")
        value(note(4, "type of a value"))
    for _ in range(tensors):
        text("length of a tensor's name")
        for _ in range(note(4, "dimensions")):
            note(8, "dimension")
        note(4, "type of a tensor")
        note(8, "offset")
    return found


def mutated(raw, seed):
    """One mutation of a file, which follows from the seed; returns what was done, and the file."""
    rng, raw, spots = random.Random(seed), bytearray(raw), fields(raw)
    end = spots[-1][0] + 8
    way = rng.choice(["number"] * 5 + ["bytes"] * 2 + ["cut", "swap", "grow"])
    if way == "number":
        at, width, what = rng.choice(spots)
        number = rng.choice(HUGE) % 256**width
        raw[at : at + width] = number.to_bytes(width, "little")
        return f"{what} at {at} = {number}", bytes(raw)
    if way == "bytes":
        for _ in range(rng.randrange(1, 20)):
            raw[rng.randrange(end)] = rng.randrange(256)
        return "random bytes in the header", bytes(raw)
    if way == "cut":
        size = rng.randrange(len(raw))
        return f"cut at {size}", bytes(raw[:size])
    if way == "grow":
        at = rng.randrange(end)
        return f"bytes put in at {at}", bytes(raw[:at]) + rng.randbytes(rng.randrange(1, 64)) + bytes(raw[at:])
    (a, width, what), other = rng.choice(spots), rng.choice(spots)
    width = min(width, other[1])
    raw[a : a + width], raw[other[0] : other[0] + width] = raw[other[0] : other[0] + width], raw[a : a + width]
    return f"{what} and {other[2]} swapped", bytes(raw)
