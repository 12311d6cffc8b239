"""What a GPU is asked to do, without one: the runtime on a simulated device, lack of memory, tensors that know only
their device, and every name of torch.cuda held to the torch that is installed.

Real GPUs are for tests/test_gpu.py, which runs where there is one.
"""

import inspect
import random
from unittest import mock

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from poisoned import poisoned
from simulated import Device
from tiny import BUNDLED, budget, decode, resident, save_random

import mixoff
from mixoff import cuda, loading, rescue, streams
from mixoff.arena import Arena, slot_nbytes

PROMPTS = [torch.arange(3, 12)[None] % 128, torch.tensor([[5, 9], [77, 3]])]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A store of eight experts in each of three layers, plain transformers' answers, bytes beside slots, and of one."""
    folder = save_random(tmp_path_factory.mktemp("tiny") / "model", "phimoe")
    store = mixoff.convert(folder, folder.parent / "store")
    want = [decode(resident(folder), ids, 6) for ids in PROMPTS]
    return store, want, budget(store, 0), slot_nbytes(mixoff.store.open_source(store).sites)


def same(got, want):
    return all(torch.equal(a, b) for pair in zip(got, want, strict=True) for a, b in zip(*pair, strict=True))


# --- the runtime on a simulated device -------------------------------------------------------------------------------


def products_of(device):
    """`Arena.weights`, which first does what a product would wait for, and asks whether its expert is there."""
    honest = Arena.weights

    def weights(arena, slot, site):
        device.catch_up()
        key, n = device.transfer.owner[slot][0], arena.sites[site].expert_nbytes
        image = bytearray(n)
        device.reader.read_into(*key, memoryview(image))
        device.product(arena.slots[slot][:n], torch.frombuffer(image, dtype=torch.uint8))
        return honest(arena, slot, site)

    return weights


def on_device(tiny, device, slots, ram=None, late=False, prompts=PROMPTS, **how):
    """Generate on a simulated device; what went wrong, what came out, and what the runtime says of it."""
    store, _, bare, size = tiny
    reading = poisoned(device.rng.choice, []) if late else streams.open_transfer
    fast = how.pop("fast_bytes", bare + slots * size)
    how |= {"ram_bytes": None if ram is None else ram * size}
    with (
        mock.patch.object(cuda, "pick", lambda name: device),
        mock.patch.object(streams, "open_transfer", lambda *a: reading(*a)),
        mock.patch.object(Arena, "weights", products_of(device)),
        mixoff.load(store, fast, device="cuda", dtype="float32", **how) as model,
    ):
        device.transfer, device.reader = model.mixoff.transfer, mixoff.store.open_source(store).reader
        got = [decode(model, ids, 6) for ids in prompts]
        info, tiers = model.mixoff.info(), model.mixoff.transfer.counts()
    device.synchronize()
    assert device.pinned_now == []
    return device.violations, got, info, tiers


CASES = st.fixed_dictionaries(
    {
        "slots": st.sampled_from([3, 4, 6, 10, 17]),
        "ram": st.sampled_from([0, 5, 12, 30, None]),
        "late": st.booleans(),
        "scope": st.sampled_from(["layer", "global"]),
        "policy": st.sampled_from(["lru", "lfu", "none"]),
        "prefetch": st.sampled_from(["auto", "none"]),
    }
)


@settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck), phases=[Phase.generate])
@given(rng=st.randoms(use_true_random=False), case=CASES)
def test_the_runtime_on_a_device_in_any_schedule(tiny, rng, case):
    """Disk, RAM and device at once: the bits of plain transformers, and no product reads what is not there."""
    if case["prefetch"] == "auto":
        case = case | {"slots": case["slots"] + 12}
    violations, got, info, _ = on_device(tiny, Device(rng), **case)
    assert violations == [] and same(got, tiny[1])
    assert info.bytes_moved > 0


def test_what_has_a_copy_in_ram_is_read_once(tiny):
    """Nine slots, and RAM for all 24: each expert is read once; the rest crosses the link alone, and nothing back."""
    _, _, info, tiers = on_device(tiny, Device(random.Random(0)), 9, ram=24)
    assert info.ram_hits > 0 and info.bytes_moved - info.ram_bytes_moved <= 24 * info.expert_nbytes
    assert tiers["kept"] == 0


def test_device_and_ram_hold_all_experts_together(tiny):
    """15 slots and 15 places: fewer copies than experts, yet after the first reads the disk is not asked again."""
    device = Device(random.Random(0))
    _, _, info, tiers = on_device(tiny, device, 15, ram=15, prompts=PROMPTS * 4, prefetch="none")
    assert info.bytes_moved - info.ram_bytes_moved <= 24 * info.expert_nbytes and tiers["kept"] > 0


def test_a_guess_may_cross_the_link_even_from_ram(tiny):
    _, _, info, _ = on_device(tiny, Device(random.Random(0)), 20, ram=24, prefetch="next-router")
    assert info.prefetch.startswith("on") and info.prefetches > 0


def test_threads_on_streams_of_their_own(tiny):
    """A resident that one stream waited for is there for the other one too."""
    device, store = Device(random.Random(3), streams=2), tiny[0]
    with (
        mock.patch.object(cuda, "pick", lambda name: device),
        mock.patch.object(Arena, "weights", products_of(device)),
        mixoff.load(store, "1MB", device="cuda", dtype="float32") as model,
    ):
        device.transfer, device.reader = model.mixoff.transfer, mixoff.store.open_source(store).reader
        for turn in range(6):
            device.thread = turn % 2
            assert same([decode(model, PROMPTS[0], 6)], tiny[1][:1])
    device.synchronize()
    assert device.violations == []


# --- lack of memory --------------------------------------------------------------------------------------------------


def test_slots_shrink_to_the_memory_that_there_is(tiny):
    store, want, bare, size = tiny
    device = Device(random.Random(0), room=10 * size)
    with pytest.warns(UserWarning, match=r"no memory for 17 slots, .* going on with 8, .* set fast_bytes="):
        violations, got, info, _ = on_device(tiny, device, 17, ram=24)
    assert device.refused > 0 and info.capacity == 8 and violations == [] and same(got, want)


def test_a_device_without_memory_for_the_least_ends_with_the_figures(tiny):
    device = Device(random.Random(0), room=2 * tiny[3])
    with pytest.raises(mixoff.BudgetError, match=r"no [\d.]+ KiB for 3 slots, the least that runs .*tried to allocate"):
        on_device(tiny, device, 17)


def test_ram_copies_shrink_to_the_memory_that_there_is(tiny, monkeypatch):
    store, want, bare, size = tiny
    honest = mixoff.tiers.slab

    def refuse(nbytes):
        if nbytes > 5 * size:
            raise OSError(12, "Cannot allocate memory")
        return honest(nbytes)

    monkeypatch.setattr(mixoff.tiers, "slab", refuse)
    with (
        pytest.warns(UserWarning, match="the RAM tier takes"),
        mixoff.load(store, fast_bytes=bare + 6 * size, ram_bytes=20 * size) as model,
    ):
        assert model.mixoff.ram_nbytes == 5 * size
        assert same([decode(model, PROMPTS[0], 6)], want[:1])


class Failing:
    """A layer's forward that runs out of memory at some calls."""

    def __init__(self, model, layer, at, message="CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has"):
        self.module, self.calls, self.at, self.message = model.model.layers[layer].self_attn, 0, set(at), message
        self.own = self.module.forward
        self.module.forward = self

    def __call__(self, *args, **kwargs):
        out = self.own(*args, **kwargs)  # the cache has taken this pass's keys by now
        self.calls += 1
        if self.calls in self.at:
            raise torch.OutOfMemoryError(self.message)
        return out


@pytest.mark.parametrize("at", [{1}, {3, 5}, {1, 2, 3}], ids=["prompt", "decoding", "again and again"])
@pytest.mark.parametrize("ram", [None, "1MB"])
def test_generation_goes_on_with_fewer_slots(tiny, at, ram):
    """On a CPU as well: the pass is repeated, its tokens are the same to the bit, and counts go on."""
    store, want, bare, size = tiny
    with mixoff.load(store, fast_bytes=bare + 24 * size, ram_bytes=ram, prefetch="none") as model:
        failing = Failing(model, 1, at)
        with pytest.warns(UserWarning, match=r"no memory for 24 slots.*Tried to allocate 2.00 GiB.*going on with 21"):
            got = decode(model, PROMPTS[0], 6)
        info = model.mixoff.info()
        assert failing.calls == 6 + len(at) and same([got], want[:1])
        assert info.capacity == 24 - 3 * len(at) and info.hits + info.misses >= 5 * 3 * 2
        assert model.mixoff._tokens == PROMPTS[0].numel() + 5


def test_generation_goes_on_on_a_device(tiny):
    device = Device(random.Random(1))
    honest = loading.bind

    def bind(model, made):
        undo = honest(model, made)
        Failing(model, 2, {2})
        return undo

    with mock.patch.object(loading, "bind", bind), pytest.warns(UserWarning, match="going on with"):
        violations, got, _, tiers = on_device(tiny, device, 18, ram=24)
    assert violations == [] and same(got, tiny[1]) and device.given_back == 1 and tiers["ram_hits"] > 0


def test_generation_ends_with_figures_where_no_slot_can_be_spared(tiny):
    store, want, bare, size = tiny
    with mixoff.load(store, fast_bytes=bare + 3 * size, prefetch="none") as model:
        failing = Failing(model, 1, {2})
        with pytest.raises(mixoff.BudgetError, match=r"for 3 slots, the least that runs .*2\.00 GiB.*fewer bits"):
            decode(model, PROMPTS[0], 6)
        failing.at = set()
        assert same([decode(model, PROMPTS[0], 6)], want[:1])


def test_a_cache_that_cannot_be_cut_back_ends_with_advice(tiny):
    from transformers import StaticCache

    store, want, bare, size = tiny
    with mixoff.load(store, fast_bytes=bare + 24 * size) as model:
        Failing(model, 1, {2})
        cache = StaticCache(model.config, max_cache_len=32)
        with pytest.warns(UserWarning), pytest.raises(mixoff.BudgetError, match="StaticCache.*cannot be cut back"):
            decode(model, PROMPTS[0], 6, past_key_values=cache)
        assert same([decode(model, PROMPTS[0], 6)], want[:1])


def test_other_errors_pass_and_nothing_of_the_guard_stays():
    with mixoff.load(BUNDLED, fast_bytes="2MB") as model:
        assert "input_ids" in inspect.signature(model.forward).parameters
        Failing(model, 1, {1}).message = "no such kernel"
        with mock.patch.object(rescue, "out_of_memory", lambda error: None), pytest.raises(torch.OutOfMemoryError):
            model(torch.tensor([[5]]))
    with mixoff.load(BUNDLED, fast_bytes="2MB") as model:
        rescue.guard(model, model.mixoff).close()
        assert "forward" not in vars(model)
