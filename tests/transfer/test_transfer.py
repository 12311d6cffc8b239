"""One contract for every transfer, the runtime under a transfer that does its worst, and every wait shown to be needed.

Threads are made to meet at events, never by sleeping.
"""

import ast
import gc
import inspect
import random
import subprocess
import sys
import threading
import weakref
from unittest import mock

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, MixtralConfig

import mixoff
from mixoff.pages import pages
from mixoff.runtime import call, prefetch, runtime
from mixoff.transfer.tiers import RamTier
from mixoff.transfer.transfer import ThreadTransfer
from poisoned import Poisoned, poisoned, watch
from tiny import budget, decode, resident, save_random

SIZE, SLOTS, EXPERTS = 3 * 4096 + 100, 4, 9


class Memory:
    """A reader of experts made of noise; divided into pieces of a page, each of which can be held up or fail."""

    piece_nbytes = 4096

    def __init__(self):
        rng = random.Random(0)
        self.experts = [rng.randbytes(SIZE) for _ in range(EXPERTS)]
        self.gate, self.begun, self.fails, self.reads = None, threading.Semaphore(0), set(), []

    def read_into(self, site, expert, image, start=0, stop=None):
        stop = SIZE if stop is None else stop
        self.reads.append((expert, start))
        self.begun.release()
        if self.gate:
            assert self.gate.wait(60)
        if (expert, start) in self.fails:
            raise OSError("the disk is gone")
        image[start:stop] = self.experts[expert][start:stop]
        return stop - start


def images():
    return [memoryview(pages(16384)) for _ in range(SLOTS)]


def make(kind, reader, where):
    if kind == "poisoned":
        return Poisoned(reader, where, [SIZE], random.Random(1).choice)
    if kind == "ram":
        return RamTier(ThreadTransfer(reader, where, [SIZE], 2), where, [SIZE], 2)
    return ThreadTransfer(reader, where, [SIZE], {"inline": 0, "threads": 3}[kind])


KINDS = ("inline", "threads", "ram", "poisoned")


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=25, deadline=None)
@given(st.data())
def test_contract(kind, data):
    """Any sequence of fetches, waits and cancellations: what was waited for is there, to the byte."""
    reader, where, coming, there, landed = Memory(), images(), {}, {}, 0
    transfer = make(kind, reader, where)
    for _ in range(data.draw(st.integers(1, 25))):
        slot = data.draw(st.integers(0, SLOTS - 1))
        if slot not in coming:
            coming[slot], kind_of = data.draw(st.integers(0, EXPERTS - 1)), data.draw(st.sampled_from(MOVES))
            there.pop(slot, None)
            transfer.fetch((0, coming[slot]), slot, kind_of)
        elif data.draw(st.integers(0, 3)) == 0:
            transfer.cancel(slot)
            del coming[slot]
        else:
            landing = transfer.wait(list(coming))
            assert landing.nbytes == SIZE and landing.t0 <= landing.t1
            there[landing.slot], landed = coming.pop(landing.slot), landed + SIZE
        for slot, expert in there.items():
            assert bytes(where[slot][:SIZE]) == reader.experts[expert]
    assert sum(transfer.counts()[kind] for kind in MOVES) >= landed
    transfer.close()


MOVES = call.MOVES


@pytest.mark.parametrize("kind", ["inline", "threads", "ram"])
def test_a_failed_read_reaches_the_waiter_and_the_next_one_is_right(kind):
    reader, where = Memory(), images()
    reader.fails = {(5, start) for start in range(0, SIZE, 4096)}
    transfer = make(kind, reader, where)
    transfer.fetch((0, 5), 1)
    with pytest.raises(OSError, match="disk is gone"):
        transfer.wait([1])
    reader.fails = set()
    transfer.fetch((0, 5), 1)
    assert transfer.wait([1]).slot == 1 and bytes(where[1][:SIZE]) == reader.experts[5]
    transfer.close()


def test_several_requests_of_one_expert_are_in_flight():
    reader = Memory()
    reader.gate = threading.Event()
    transfer = make("threads", reader, images())
    transfer.fetch((0, 1), 0)
    for _ in range(3):  # three workers hold a piece each, before any of them is done
        assert reader.begun.acquire(timeout=60)
    assert sorted(start for _, start in reader.reads) == [0, 4096, 8192]
    reader.gate.set()
    assert transfer.wait([0]).nbytes == SIZE
    transfer.close()


def test_what_is_asked_for_overtakes_guesses_and_a_guess_that_is_asked_for_as_well():
    reader = Memory()
    reader.gate = threading.Event()
    transfer = ThreadTransfer(reader, images(), [SIZE], 1)
    transfer.fetch((0, 0), 0)
    assert reader.begun.acquire(timeout=60)
    for slot, kind in ((1, "prefetch"), (2, "prefetch"), (3, "miss")):
        transfer.fetch((0, slot), slot, kind)
    waiter = threading.Thread(target=transfer.wait, args=([2],))
    waiter.start()
    while not transfer.jobs[2].urgent:  # until the waiter has said so
        waiter.join(0.001)
    reader.gate.set()
    waiter.join(60)
    for slot in (0, 3, 1):
        transfer.wait([slot])
    order = list(dict.fromkeys(expert for expert, _ in reader.reads))
    assert order == [0, 2, 3, 1]
    transfer.close()


def test_a_cancelled_fetch_stops_early_and_never_writes_into_the_next_one():
    reader, where = Memory(), images()
    reader.gate = threading.Event()
    transfer = ThreadTransfer(reader, where, [SIZE], 1)
    transfer.fetch((0, 1), 0)
    assert reader.begun.acquire(timeout=60)
    transfer.cancel(0)
    fetcher = threading.Thread(target=transfer.fetch, args=((0, 2), 0))
    fetcher.start()
    fetcher.join(0.05)
    assert fetcher.is_alive(), "the slot is still being written to"
    reader.gate.set()
    fetcher.join(60)
    assert transfer.wait([0]).nbytes == SIZE and bytes(where[0][:SIZE]) == reader.experts[2]
    assert [start for expert, start in reader.reads if expert == 1] == [0], "pieces not begun are dropped"
    transfer.close()


def test_workers_end_with_the_transfer_even_if_nobody_closes_it():
    transfer, arena = make("threads", Memory(), where := images()), weakref.ref(where[0])
    transfer.fetch((0, 1), 0)
    transfer.wait([0])
    threads = transfer.threads
    del transfer, where
    gc.collect()
    for thread in threads:
        thread.join(60)
    assert not any(thread.is_alive() for thread in threads) and arena() is None


def test_ram_tier_holds_what_leaves_so_that_both_tiers_hold_different_experts():
    """Two slots and three copies: four experts asked for in turn are read once each, and then no more."""
    reader, where = Memory(), images()[:2]
    tier = RamTier(ThreadTransfer(reader, where, [SIZE], 0), where, [SIZE], 3)
    for turn in range(12):
        tier.fetch((0, turn % 4), turn % 2)
        tier.wait([turn % 2])
        assert bytes(where[turn % 2][:SIZE]) == reader.experts[turn % 4]
    assert [expert for expert, _ in reader.reads] == [0, 1, 2, 3] and tier.counts()["ram_hits"] == 8
    copies = {**tier.copies.alone, **tier.copies.doubles}
    assert len(copies) == len(set(copies.values())) == 3
    tier.close()


def test_what_passes_by_takes_no_place_in_ram():
    reader, where = Memory(), images()[:1]
    tier = RamTier(ThreadTransfer(reader, where, [SIZE], 0), where, [SIZE], 1)
    for expert, kind in ((0, "miss"), (1, "miss"), (2, "bypass"), (3, "bypass"), (1, "restore")):
        tier.fetch((0, expert), 0, kind)
        tier.wait([0])
    assert set(tier.copies.alone) | set(tier.copies.doubles) == {(0, 1)}
    tier.close()


# --- the runtime under a transfer that does its worst ----------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A store of eight experts a layer, what plain transformers says of two prompts, bytes without slots, of a slot."""
    folder = save_random(tmp_path_factory.mktemp("tiny") / "model", "phimoe")
    store = mixoff.convert(folder, folder.parent / "store")
    want = [decode(resident(folder), ids, 6) for ids in PROMPTS]
    return store, want, budget(store, 0), mixoff.shapes.sites.slot_nbytes(mixoff.store.source.open_source(store).sites)


PROMPTS = [torch.arange(3, 12)[None] % 128, torch.tensor([[5, 9], [77, 3]])]
CASES = st.fixed_dictionaries(
    {
        "slots": st.sampled_from([3, 4, 6, 10, 17]),
        "scope": st.sampled_from(["layer", "global"]),
        "policy": st.sampled_from(["lru", "lfu", "none"]),
        "fetch": st.sampled_from(["expert", "expert", "layer"]),
        "guess": st.booleans(),
        "ram": st.sampled_from([0, 0, 3, 9]),
    }
)


def run(tiny, choose, slots, guess=False, ram=0, **how):
    """Generate for both prompts under the worst transfer; what was violated, and whether all is right to the bit."""
    store, want, bare, size = tiny
    made = []
    how |= {"io": "direct", "prefetch": "next-router" if guess else "none"}
    with mock.patch.object(runtime, "open_transfer", poisoned(choose, made)):
        fast = bare + (slots + 2 * guess) * size
        with mixoff.load(store, fast_bytes=fast, ram_bytes=ram * size, **how) as model:
            watch(model.mixoff)
            got = [decode(model, ids, 6) for ids in PROMPTS]
            info = model.mixoff.info()
    assert info.hits + info.misses > 0
    same = all(torch.equal(a, b) for pair in zip(got, want, strict=True) for a, b in zip(*pair, strict=True))
    return made[-1].violations, same


@settings(
    max_examples=30, deadline=None, suppress_health_check=list(HealthCheck), phases=[Phase.explicit, Phase.generate]
)
@given(rng=st.randoms(use_true_random=False), case=CASES)
def test_the_runtime_keeps_the_protocol_in_any_schedule(tiny, rng, case):
    assert run(tiny, rng.choice, **case) == ([], True)


def call_sites(module, names):
    """Every call of a method of `names` in the class of `module` that can be exchanged, by (line, column) and name."""
    classes = [n for n in ast.parse(inspect.getsource(module)).body if getattr(n, "name", "") == CLASSES[module]]
    calls = [n for n in ast.walk(classes[0]) if isinstance(n, ast.Call)]
    attributes = [(n, n.func.attr) for n in calls if isinstance(n.func, ast.Attribute) and n.func.attr in names]
    return [(n.lineno, n.col_offset, name) for n, name in attributes]


INSTEAD = {  # what is left of a call that is taken out: it looks done and did nothing
    "wait": "Landing(next(iter(slots)), 0, 0.0, 0.0)",
    "release": "None",
    "cancel": "None",
    "vacate": "self.runtime.place[grant.slot]",
    "renew": "None",
}


def without(module, site):
    """The classes of `module` as they would be without the call at `site`."""
    line, column, name = site

    class Remove(ast.NodeTransformer):
        def visit_Call(self, node):
            if (node.lineno, node.col_offset) == (line, column) and getattr(node.func, "attr", "") == name:
                return ast.copy_location(ast.parse(INSTEAD[name], mode="eval").body, node)
            return self.generic_visit(node)

    tree = ast.parse(inspect.getsource(module))
    tree.body = [node for node in tree.body if not isinstance(node, ast.Expr)]  # registers nothing
    space = {"__name__": f"{module.__name__}.mutated", "__file__": module.__file__}
    exec(compile(ast.fix_missing_locations(Remove().visit(tree)), module.__file__, "exec"), space)
    space["Landing"] = mixoff.cache.events.Landing
    return space


CLASSES = {call: "Call", runtime: "Runtime", prefetch: "Guesses"}
SITES = [(call, site) for site in call_sites(call, INSTEAD)]
SITES += [(prefetch, site) for site in call_sites(prefetch, INSTEAD)]


def noticed(tiny):
    """Whether any of a few runs of every kind goes wrong."""
    calm = random.Random(0).choice
    cases = [{"slots": 3}, {"slots": 4, "guess": True}, {"slots": 10, "guess": True, "scope": "global"}]
    try:
        return any(run(tiny, calm, **case) != ([], True) for case in cases) or not survives_a_failed_read(tiny)
    except Exception:
        return True


def survives_a_failed_read(tiny):
    """A read fails with others on their way; afterwards the protocol has been kept and the output is right."""
    store, want, bare, size = tiny
    made, calls = [], []

    def fail_once(honest, site, expert, image):
        calls.append(expert)
        if len(calls) == 12:
            raise OSError("the disk is gone")
        return honest(site, expert, image)

    with (
        mock.patch.object(runtime, "open_transfer", poisoned(random.Random(0).choice, made)),
        mixoff.load(store, fast_bytes=bare + 17 * size, io="buffered") as model,
    ):
        watch(model.mixoff)
        reader = model.mixoff.source.reader
        with mock.patch.object(reader, "read_into", lambda *a, f=reader.read_into: fail_once(f, *a)):
            with pytest.raises(OSError, match="disk is gone"):
                decode(model, PROMPTS[1], 6)
            got = decode(model, PROMPTS[1], 6)
    return made[-1].violations == [] and all(torch.equal(a, b) for a, b in zip(got, want[1], strict=True))


def test_unharmed_all_is_well(tiny):
    assert not noticed(tiny)


@pytest.mark.parametrize(("module", "site"), SITES, ids=lambda x: x[2] if isinstance(x, tuple) else x.__name__)
def test_every_wait_release_and_cancel_is_needed(tiny, module, site):
    """The call is taken out of the source; some run must notice."""
    mutated = without(module, site)
    with mock.patch.object(runtime, CLASSES[module], mutated[CLASSES[module]]):
        assert noticed(tiny), f"{module.__name__} line {site[0]}: nobody missed {site[2]}"


def test_the_sites_are_all_there_is():
    """One place waits, one releases, one vacates, one begins again after a stop; what gives a guess up cancels it."""
    assert sorted(site[2] for _, site in SITES) == ["cancel", "release", "renew", "vacate", "wait"]


# --- memory ----------------------------------------------------------------------------------------------------------

MEASURE = """
import pathlib, re, sys, torch, mixoff
torch.set_num_threads(1)

def anonymous():
    return 1024 * int(re.search(r"RssAnon:\\s+(\\d+)", pathlib.Path("/proc/self/status").read_text())[1])

def generate(model):
    for start in (3, 90):
        model.generate(torch.arange(start, start + 40)[None], max_new_tokens=16, min_new_tokens=16)

how = {"fast_bytes": "16MB", "ram_bytes": "24MB", "scope": "global", "prefetch": "next-router"}
for _ in range(2):  # imports, what the allocator keeps, and code that oneDNN makes for every number of rows: 14 MB
    with mixoff.load(sys.argv[1], **how) as model:
        generate(model)
before = anonymous()
model = mixoff.load(sys.argv[1], **how)
backbone = sum(p.numel() * p.itemsize for p in model.parameters())
generate(model)
info = model.mixoff.info()
print(anonymous() - before, info.fast_bytes_peak + info.ram_bytes, backbone, info.ram_hits, info.bytes_moved)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux tells anonymous memory apart")
def test_tiers_are_hard_limits(tmp_path):
    """128 experts of 0.8 MB, 101 MB, in tiers of 16 and 24 MB: anonymous memory grows by the tiers, which are full, and
    the backbone, and by no more than 8 MB for passes, the allocator and the workers."""
    shape = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 8, "vocab_size": 256}
    config = MixtralConfig(**shape, num_attention_heads=8, num_key_value_heads=2, num_local_experts=16)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(tmp_path / "model")
    store = mixoff.convert(tmp_path / "model", tmp_path / "store")
    done = subprocess.run([sys.executable, "-c", MEASURE, store], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    grown, tiers, backbone, ram_hits, moved = map(int, done.stdout.split())
    assert 37_000_000 < tiers <= 40_000_000 and ram_hits > 0 and moved > 2 * tiers
    assert 0.95 * tiers < grown < tiers + backbone + 8_000_000


@pytest.mark.parametrize(("module", "words"), [("arena", "the least that runs"), ("tiers", "lower ram_bytes")])
def test_memory_that_the_system_does_not_have_is_said_with_figures(tiny, monkeypatch, module, words):
    def refuse(nbytes):
        raise OSError(12, "Cannot allocate memory")

    monkeypatch.setattr(getattr(mixoff.transfer, module), "slab", refuse)
    with pytest.raises(mixoff.BudgetError, match=rf"the system has no [\d.]+ [KM]iB .*{words}"):
        mixoff.load(tiny[0], fast_bytes="1MB", ram_bytes="1MB")


def test_tiers_beyond_all_memory_are_refused(tiny, monkeypatch):
    monkeypatch.setattr(mixoff.planning.probe, "memory_nbytes", lambda: (500_000, 100_000))
    with pytest.raises(mixoff.BudgetError, match="this process may use 488 KiB"):
        mixoff.load(tiny[0], fast_bytes="1MB", ram_bytes="1MB")
