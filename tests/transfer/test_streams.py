"""The transfer of a GPU on a simulated one: any schedule that events allow, and every event shown to be needed."""

import ast
import inspect
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mixoff.transfer import streams
from mixoff.transfer.transfer import ThreadTransfer
from poisoned import Poisoned
from simulated import Device

SIZES = (300, 400)  # bytes of an expert of each of two sites
SLOT, EXPERTS = 512, 9
KEYS = [(site, expert) for site in range(2) for expert in range(EXPERTS)]
ACTS = ("fetch",) * 3 + ("wait",) * 2 + ("compute",) * 2 + ("cancel", "thread", "reseat", "stock")
KINDS = ("miss", "miss", "bypass", "restore", "prefetch")


class Memory:
    """Experts made of noise; those in `fails` cannot be read."""

    def __init__(self):
        rng = random.Random(0)
        self.experts = {key: bytearray(rng.randbytes(SIZES[key[0]])) for key in KEYS}
        self.fails, self.reads = set(), []

    def read_into(self, site, expert, image, start=0, stop=None):
        self.reads.append((site, expert))
        if (site, expert) in self.fails:
            raise OSError("the disk is gone")
        image[: SIZES[site]] = self.experts[site, expert]
        return SIZES[site]

    def tensor(self, key):
        return torch.frombuffer(self.experts[key], dtype=torch.uint8)


class Lingering(Poisoned):
    """A read that is given up writes once more, at any time before its place is read into again."""

    def __init__(self, reader, images, sizes, choose):
        super().__init__(reader, images, sizes, choose)
        self.writing = set()

    def fetch(self, key, slot, kind="miss"):
        self.writing.discard(slot)
        return super().fetch(key, slot, kind)

    def cancel(self, slot):
        self.coming.pop(slot, None)
        self.writing.add(slot)

    def stop(self):
        super().stop()
        self.write()
        self.writing.clear()

    def write(self):
        for slot in self.writing:
            self._poison(slot)


def make(device, reader, rng, slots=4, places=6, kept=3, spares=1, late=True, kind=None):
    """A transfer whose reads are late and in any order, or done at once."""

    def reading(images):
        return Lingering(reader, images, SIZES, rng.choice) if late else ThreadTransfer(reader, images, SIZES, 0)

    slots += spares
    where = device.empty(slots * SLOT).view(slots, SLOT)
    last = range(slots - spares, slots)
    return (kind or streams.DeviceTransfer)(device, where, SIZES, places, kept, reading, last)


def play(rng, steps=60, kind=None, threads=2, pace=(0, 0, 0, 1, 3), keys=KEYS, **how):
    """Fetch, wait, compute, cancel and exchange the slots, as `rng` says; returns what went wrong."""
    device, reader = Device(rng, threads, pace=pace), Memory()
    transfer, coming, there = make(device, reader, rng, kind=kind, **how), {}, {}
    for _ in range(steps):
        act = rng.choice(ACTS)
        slot = rng.choice([slot for slot in range(len(transfer.slots)) if slot not in transfer.spares])
        if act == "fetch" and slot not in coming:
            key = rng.choice([key for key in keys if key not in coming.values()])
            there = {s: k for s, k in there.items() if s != slot and k != key}
            coming[transfer.fetch(key, slot, rng.choice(KINDS))] = key
        elif act == "wait" and coming:
            landing = transfer.wait(rng.sample(sorted(coming), rng.randint(1, len(coming))))
            there[landing.slot] = coming.pop(landing.slot)
            assert landing.nbytes == SIZES[there[landing.slot][0]]
        elif act == "compute" and slot in there:
            device.product(transfer.slots[slot][: SIZES[there[slot][0]]], reader.tensor(there[slot]))
            transfer.release(slot)
        elif act == "cancel" and slot in coming:
            transfer.cancel(slot)
            del coming[slot]
        elif act == "thread":
            device.thread = rng.randrange(threads)
            transfer.enter()
        elif act == "reseat" and rng.random() < 0.1:
            coming, there, old = {}, {}, transfer.slots
            transfer.reseat(())
            if device.uses(old):
                device.violations.append("slots were given up in use")
            new = device.empty(len(old) * SLOT).view(len(old), SLOT)
            transfer.reseat(new, range(len(old) - how.get("spares", 1), len(old)))
        elif act == "stock" and not coming and rng.random() < 0.3:
            held = {key for key, _ in transfer.owner.values()}
            lacking = rng.sample([key for key in keys if key not in held], 3)
            assert set(transfer.stock(lacking)) <= transfer.copies.alone.keys()
        check_places(transfer)
        if isinstance(transfer.reading, Lingering) and rng.random() < 0.2:
            transfer.reading.write()
    transfer.close()
    device.synchronize()
    if device.pinned_now:
        device.violations.append("page-locked memory is left")
    return device.violations


def check_places(transfer):
    """Every place is free, holds one copy, or is read into; and reads always find some."""
    copies = transfer.copies
    reading = [fetch.place for fetch in transfer.coming.values() if fetch.state == streams.READING]
    held = [*copies.free, *copies.alone.values(), *copies.doubles.values(), *reading]
    assert sorted(held) == list(range(len(transfer.touched))), "a place is lost, or used twice"
    assert len(copies.alone) <= transfer.kept and not copies.alone.keys() & copies.doubles.keys()


SHAPES = st.sampled_from(
    [
        {},
        {"late": False},
        {"places": 3, "kept": 0},
        {"places": 4, "kept": 1, "slots": 7, "spares": 0},
        {"places": 3, "kept": 0, "pace": (0,), "slots": 6},
        {"places": 9, "kept": 6, "slots": 3, "spares": 2, "late": False},
        {"places": 18, "kept": 18, "slots": 2},
        {"places": 8, "kept": 5, "slots": 3, "threads": 1},
    ]
)


@settings(max_examples=120, deadline=None)
@given(rng=st.randoms(use_true_random=False), how=SHAPES)
def test_no_schedule_reads_or_overwrites_what_is_in_use(rng, how):
    assert play(rng, **how) == []


def calls_to(names):
    """Where `streams.py` calls methods of these names: (line, column, name)."""
    calls = [n for n in ast.walk(ast.parse(inspect.getsource(streams))) if isinstance(n, ast.Call)]
    calls = [n for n in calls if isinstance(n.func, ast.Attribute) and n.func.attr in names]
    return [(n.lineno, n.col_offset, n.func.attr) for n in calls]


def without(site):
    """DeviceTransfer as it would be without the call at `site`."""
    line, column, name = site

    class Remove(ast.NodeTransformer):
        def visit_Call(self, node):
            if (node.lineno, node.col_offset) == (line, column) and getattr(node.func, "attr", "") == name:
                return ast.copy_location(ast.Constant(True), node)
            return self.generic_visit(node)

    space = {"__name__": streams.__name__, "__file__": streams.__file__}
    tree = ast.fix_missing_locations(Remove().visit(ast.parse(inspect.getsource(streams))))
    exec(compile(tree, streams.__file__, "exec"), space)
    return space["DeviceTransfer"]


def noticed(kind):
    """Whether any of a few hundred fixed schedules goes wrong."""
    shapes = [{}, {"places": 4, "kept": 1, "slots": 7, "spares": 0}, {"places": 8, "kept": 5, "slots": 3}]
    shapes += [{"pace": (0,), "slots": 6}]
    back = {"places": 6, "kept": 3, "slots": 12, "keys": KEYS[1:17], "late": False}  # much is copied back
    shapes += [back | {"spares": 0, "steps": 300}, back | {"steps": 300}]
    try:
        return any(play(random.Random(i), kind=kind, **{"steps": 80} | shapes[i % len(shapes)]) for i in range(240))
    except (AssertionError, KeyError, IndexError):
        return True


SITES = calls_to({"wait_event", "record_event", "query", "synchronize"})


@pytest.mark.parametrize("site", SITES, ids=lambda site: f"{site[2]}-{site[0]}")
def test_every_event_recorded_or_waited_for_is_needed(site):
    """The call is taken out of the source; some schedule must go wrong."""
    assert noticed(without(site)), f"streams.py line {site[0]}: nobody missed {site[2]}"


def test_unharmed_all_is_well():
    assert not noticed(streams.DeviceTransfer)


class Stopped(Device):
    """A device that never gets to a copy back unless everything else waits for it."""

    def _step(self):
        ready = [stream for stream in self._all() if stream.runnable() and stream is not self.returning]
        self.asked = 0
        self.rng.choice(ready or [self.returning]).step()


@pytest.mark.parametrize("spares", [2, 0])
def test_misses_do_not_wait_for_copies_back(spares):
    """Two misses of a layer whose slots are copied back: with two spare slots both arrive before any copy back ends."""
    device, reader = Stopped(random.Random(0), pace=(0,)), Memory()
    transfer = make(device, reader, device.rng, slots=6, places=6, kept=3, spares=spares, late=False)
    slots = list(range(6))
    for key in KEYS[:6]:  # six in slots; their copies in RAM make room for three others, as in a cache under pressure
        slots[key[1]] = transfer.fetch(key, slots[key[1]])
        transfer.wait([slots[key[1]]])
    device.synchronize()
    for i, key in enumerate([(1, 0), (1, 1), (1, 2)]):  # read into the places of (0, 0), (0, 1) and (0, 2)
        slots[5 - i] = transfer.fetch(key, slots[5 - i])
        transfer.wait([slots[5 - i]])
    device.synchronize()
    coming = [transfer.fetch(key, slots[i]) for i, key in enumerate([(0, 5), (0, 4)])]
    assert transfer.counts()["kept"] == SIZES[0] * 2
    for slot in coming:
        device.run_until(transfer.arrived[transfer.wait([slot]).slot].passed)
    waiting = sum(kind == "copy" for kind, *_ in device.returning.queue)
    assert waiting == (2 if spares else 0), "copies back that have not begun when both misses have arrived"
    transfer.close()
