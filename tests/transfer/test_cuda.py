"""What a GPU is asked to do, without one: the runtime on a simulated device, lack of memory, tensors that know only
their device, and every name of torch.cuda held to the torch that is installed.

Real GPUs are for tests/transfer/test_gpu.py, which runs where there is one.
"""

import ast
import inspect
import random
import subprocess
import sys
from dataclasses import replace
from unittest import mock

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

import mixoff
from bytesless import gpu, on_host
from mixoff import kernels
from mixoff.bench import doctor
from mixoff.loading import hooks, load, overflow, rescue
from mixoff.loading.load import measured
from mixoff.pages import out_of_memory
from mixoff.planning import planner, probe
from mixoff.planning.budget import pinned_nbytes
from mixoff.runtime import backend
from mixoff.shapes.kv_cache import advance
from mixoff.shapes.sites import slot_nbytes
from mixoff.transfer import cuda, streams
from mixoff.transfer.arena import Arena
from mixoff.transfer.mailbox import Mailbox
from mixoff.units import GIB
from poisoned import poisoned
from simulated import Device, products_of
from tiny import BUNDLED, budget, decode, resident, save_random
from to_gpu import Idle, to_gpu

PROMPTS = [torch.arange(3, 12)[None] % 128, torch.tensor([[5, 9], [77, 3]])]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A store of eight experts in each of three layers, plain transformers' answers, bytes beside slots, and of one."""
    folder = save_random(tmp_path_factory.mktemp("tiny") / "model", "phimoe")
    store = mixoff.convert(folder, folder.parent / "store")
    want = [decode(resident(folder), ids, 6) for ids in PROMPTS]
    return store, want, budget(store, 0), slot_nbytes(mixoff.store.source.open_source(store).sites)


def same(got, want):
    return all(torch.equal(a, b) for pair in zip(got, want, strict=True) for a, b in zip(*pair, strict=True))


# --- the runtime on a simulated device -------------------------------------------------------------------------------


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
        device.transfer, device.reader = model.mixoff.transfer, mixoff.store.source.open_source(store).reader
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
    assert info.bytes_moved > 0 or info.capacity == info.num_experts  # then `load` has moved all


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


def test_ram_for_what_the_card_lacks_serves_like_ram_for_all(tiny):
    """The same misses, all of them from RAM, and the same tokens: copies of what the card holds change nothing."""
    found = []
    for ram in (18, 24):  # 10 experts have no slot; 3 places are for reads, and 5 slots are set aside
        violations, got, info, tiers = on_device(tiny, Device(random.Random(0)), 14, ram=ram, prefetch="none")
        assert violations == [] and same(got, tiny[1])
        assert info.bytes_moved == info.ram_bytes_moved > 0, "nothing is read from the disk"
        found.append((info.hits, info.misses, info.bytes_moved))
        assert (tiers["kept"] > 0) == (ram < 24), "what has no copy goes back, at the same time"
    assert found[0] == found[1]


def test_later_loads_find_what_the_first_found(tiny):
    """Closing returns the memory that the allocator caches, even if the closed model is kept."""
    device, kept, budgets = Device(random.Random(0)), [], []
    with mock.patch.object(cuda, "pick", lambda name: device):
        for _ in range(3):
            kept.append(mixoff.load(tiny[0], device="cuda", dtype="float32"))
            budgets.append(kept[-1].mixoff.fast_bytes)
            kept[-1].mixoff.close()
    assert budgets[0] == budgets[1] == budgets[2] and device.held == 0


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
        device.transfer, device.reader = model.mixoff.transfer, mixoff.store.source.open_source(store).reader
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
    honest = mixoff.transfer.tiers.slab

    def refuse(nbytes):
        if nbytes > 5 * size:
            raise OSError(12, "Cannot allocate memory")
        return honest(nbytes)

    monkeypatch.setattr(mixoff.transfer.tiers, "slab", refuse)
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
    honest = hooks.bind

    def bind(model, made, **options):
        undo = honest(model, made, **options)
        Failing(model, 2, {2})
        return undo

    with mock.patch.object(load, "bind", bind), pytest.warns(UserWarning, match="going on with"):
        violations, got, _, tiers = on_device(tiny, device, 18, ram=24)
    assert violations == [] and same(got, tiny[1]) and device.given_back == 2 and tiers["ram_hits"] > 0


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
        with mock.patch.object(model.config, "sliding_window", 16):
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


# --- tensors that know only their device -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory):
    """A checkpoint; what a scheme makes of it is kept."""
    return save_random(tmp_path_factory.mktemp("mixtral") / "model", "mixtral", torch.bfloat16)


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("scheme", ["none", "paper"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_layer_waits_for_the_device_once_and_mixes_no_devices(mixtral, monkeypatch, scheme, dtype, batch):
    """A prompt and a token of each row, with guesses: all but what a look brings stays on the device."""
    looks = []

    def bring(self, *tensors):
        looks.append([tuple(t.shape) for t in tensors])
        assert all(t.device.type == "cuda" for t in tensors)
        return [torch.rand(t.shape) if t.is_floating_point() else _choice(*t.shape) for t in tensors]

    fast = budget(mixtral, 7, scheme=scheme, dtype=dtype)
    monkeypatch.setattr(cuda, "pick", lambda name: Idle())
    monkeypatch.setattr(kernels.triton_products, "serves", lambda *a: False)  # has tests of its own
    monkeypatch.setattr(overflow, "bounded", lambda logits: True)
    for name in ("_of_one_token", "by_expert", "_given"):
        monkeypatch.setattr(backend, name, on_host(getattr(backend, name)))
    monkeypatch.setattr(Mailbox, "bring", on_host(bring))
    monkeypatch.setattr(mixoff.Runtime, "expect", on_host(mixoff.Runtime.expect))
    how = {"scheme": scheme, "dtype": dtype, "prefetch": "next-router", "scope": "global", "device": "cuda"}
    with mixoff.load(mixtral, fast, **how) as model:
        with gpu():
            to_gpu(model)
            _, cache = advance(model, torch.zeros(batch, 7, dtype=torch.long, device="cuda"))
            logits, _ = advance(model, torch.zeros(batch, 1, dtype=torch.long, device="cuda"), cache)
            assert logits.device.type == "cuda" and logits.dtype == getattr(torch, dtype)
        assert len(looks) == 2 * 3 and [len(shapes) for shapes in looks] == [2, 2, 2, 3, 3, 2]
        assert model.mixoff.guesses.counts["named"] > 0


def _choice(tokens, k):
    return torch.stack([torch.randperm(4)[:k] for _ in range(tokens)])


class Locked(Idle):
    """Copies are late: they are there once somebody waits for the event."""

    def __init__(self):
        super().__init__()
        self.queued, self.waits, self.locked = [], 0, []

    def copy(self, stream, target, source):
        target.view(torch.uint8).fill_(255)
        self.queued.append((target, source))

    def synchronize(self):
        self.waits += 1
        for target, source in self.queued:
            target.copy_(source)
        self.queued.clear()

    def pinned(self, nbytes):
        self.locked.append(nbytes)
        return torch.zeros(nbytes, dtype=torch.uint8)

    def unpin(self, memory):
        self.locked.remove(memory.numel())


def test_small_tensors_come_to_the_host_with_one_wait():
    device, weights = Locked(), torch.tensor([[0.1, -3.5], [float("nan"), 2.0]])
    box = Mailbox(device)
    for half in (False, True):
        given = weights.half() if half else weights
        experts, same, guess = box.bring(torch.tensor([[3, 1], [0, 9]]), given, torch.tensor([[7]], dtype=torch.int32))
        assert experts.tolist() == [[3, 1], [0, 9]] and guess.tolist() == [[7]] and guess.dtype == torch.long
        assert torch.equal(same.nan_to_num(-1), given.float().nan_to_num(-1)) and same.dtype == torch.float32
    assert device.waits == 2 and len(device.locked) == 1, "one buffer for all"


def test_a_look_keeps_its_values_when_the_next_one_comes():
    """Traces keep them; a prompt's choice takes a larger buffer."""
    device = Locked()
    box = Mailbox(device)
    (first,), (more,) = box.bring(torch.tensor([3, 1])), box.bring(torch.arange(4000))
    (last,) = box.bring(torch.tensor([8, 9]))
    assert first.tolist() == [3, 1] and more.tolist() == list(range(4000)) and last.tolist() == [8, 9]
    assert device.locked == [64000]
    box.close()
    box.close()
    assert device.locked == []


# --- torch.cuda itself -----------------------------------------------------------------------------------------------

SOURCES = (cuda, streams, probe, doctor, kernels.triton_products)


def names_in(module):
    """Every dotted name in the source of `module` that begins with `torch.`."""
    found = set()
    for node in ast.walk(ast.parse(inspect.getsource(module))):
        parts, at = [], node
        while isinstance(at, ast.Attribute):
            parts, at = [at.attr, *parts], at.value
        if parts and isinstance(at, ast.Name) and at.id == "torch":
            found.add(".".join(["torch", *parts]))
    return found


@pytest.mark.parametrize("module", SOURCES, ids=lambda m: m.__name__)
def test_every_name_of_torch_exists(module):
    for name in names_in(module):
        thing = torch
        for part in name.split(".")[1:]:
            assert hasattr(thing, part), f"{module.__name__} uses {name}, which torch {torch.__version__} lacks"
            thing = getattr(thing, part)


CALLS = {  # what `cuda`, `streams` and `hardware` call, with the arguments that they pass
    torch.cuda.current_stream: (["device"], {}),
    torch.cuda.synchronize: (["device"], {}),
    torch.cuda.mem_get_info: (["device"], {}),
    torch.cuda.get_device_name: (["device"], {}),
    torch.cuda.get_device_capability: (["device"], {}),
    torch.cuda.stream: (["stream"], {}),
    torch.cuda.empty_cache: ([], {}),
    torch.cuda.get_arch_list: ([], {}),
    torch.cuda._sleep: (["cycles"], {}),
    torch.cuda.cudart: ([], {}),
    torch.cuda.Stream.__new__: ([torch.cuda.Stream, "device"], {}),
    torch.cuda.Event.__new__: ([torch.cuda.Event], {"enable_timing": True}),
    torch.cuda.Stream.wait_event: (["self", "event"], {}),
    torch.cuda.Stream.record_event: (["self", "event"], {}),
    torch.cuda.Event.query: (["self"], {}),
    torch.cuda.Event.synchronize: (["self"], {}),
    torch.cuda.Event.record: (["self"], {}),
    torch.cuda.Event.elapsed_time: (["self", "end"], {}),
}


@pytest.mark.parametrize("called", CALLS, ids=lambda fn: fn.__qualname__)
def test_every_call_fits_its_signature(called):
    arguments, named = CALLS[called]
    inspect.signature(called).bind(*arguments, **named)


def test_torch_locks_pages_in_the_same_way():
    """The one function that no Python stub describes: torch's own use of it is ours."""
    from torch.cuda import _pin_memory_utils

    source = inspect.getsource(_pin_memory_utils)
    assert "cudart.cudaHostRegister(\n" in source and "1,  # lines up with 'cudaHostRegisterPortable'" in source
    assert "int(torch.cuda.cudart().cudaHostUnregister(data_ptr))" in source and cuda.REGISTER_PORTABLE == 1


def test_the_package_imports_where_there_is_no_cuda():
    code = "import torch; assert not torch.cuda.is_available(); import mixoff.transfer.cuda, mixoff.transfer.streams; "
    code += "assert mixoff.transfer.cuda.pick('auto') is None and mixoff.transfer.cuda.obstacle()"
    subprocess.run([sys.executable, "-c", code], check=True, env={"CUDA_VISIBLE_DEVICES": "", "PATH": ""}, timeout=120)


# --- cards that are not here -----------------------------------------------------------------------------------------

CARDS = {  # name, compute capability, GiB that CUDA shows: what is picked for each
    "t4": (("Tesla T4", (7, 5), 14.75), "float16"),
    "l4": (("NVIDIA L4", (8, 9), 22.0), "bfloat16"),
    "a100": (("NVIDIA A100-SXM4-40GB", (8, 0), 39.4), "bfloat16"),
    "rtx-3060": (("NVIDIA GeForce RTX 3060", (8, 6), 11.6), "bfloat16"),
    "gtx-1080": (("NVIDIA GeForce GTX 1080", (6, 1), 7.9), None),
}


@pytest.fixture(params=CARDS)
def card(request, monkeypatch):
    """torch.cuda as it would describe a card, of which 350 MB are taken by the context."""
    (name, sm, total), dtype = CARDS[request.param]
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: name)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: sm)
    monkeypatch.setattr(
        torch.cuda, "mem_get_info", lambda device=None: (int(total * GIB) - 350_000_000, int(total * GIB))
    )
    monkeypatch.setattr(probe, "memory_nbytes", lambda: (12_700_000_000, 11_000_000_000))
    monkeypatch.setattr(cuda, "Cuda", lambda index: mock.Mock(describe=lambda: cuda.describe(index)))
    return request.param, dtype


def test_free_memory_is_asked_for_after_caches_and_dropped_models_are_returned(card, monkeypatch):
    calls = []
    monkeypatch.setattr(cuda.gc, "collect", lambda: calls.append("collect"))
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: calls.append("empty"))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device=None: calls.append("ask") or (1, 2))
    assert cuda.describe().free_nbytes == 1 and calls == ["collect", "empty", "ask"]


@pytest.mark.parametrize(("sm", "works"), [((7, 0), False), ((7, 5), True), ((8, 9), True), ((12, 0), True)])
def test_a_card_that_this_torch_has_no_code_for_is_refused(card, monkeypatch, sm, works):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: sm)
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: ["sm_75", "sm_80", "sm_90", "compute_90"])
    why = cuda.obstacle()
    assert why is None if works else "built for sm_75, sm_80, sm_90, compute_90, not sm_70" in why


def test_dtype_and_refusal_follow_from_the_card(card):
    name, dtype = card
    if dtype is None:
        assert cuda.pick("auto") is None
        with pytest.raises(mixoff.MixoffError, match="sm_61 is older than sm_70"):
            cuda.pick("cuda")
        return
    gpu = cuda.pick("auto")
    compute = {kind: str(load._compute_dtype("auto", kind, gpu)) for kind in ("bfloat16", "float16", "float32")}
    assert compute == {"bfloat16": f"torch.{dtype}", "float16": "torch.float16", "float32": "torch.float32"}
    if name == "t4":
        with pytest.warns(UserWarning, match="only emulates bfloat16"):
            load._compute_dtype("bfloat16", "bfloat16", gpu)
    with pytest.raises(mixoff.MixoffError, match="there are 1 GPUs"):
        cuda.pick("cuda:3")


MIXTRAL = "mistralai/Mixtral-8x7B-Instruct-v0.1"


@pytest.mark.parametrize("scheme", ["small", "mixed", "quality"])
def test_budgets_of_mixtral_on_a_t4_and_others(card, scheme):
    """The loader's figures: `small` whole on a T4 and no RAM; `mixed` in VRAM and RAM; 4 bits on the disk as well."""
    name, dtype = card
    if dtype is None:
        return
    machine = measured(cuda.describe())
    fast = planner.fast_nbytes(MIXTRAL, machine, 4096, mixoff.Scheme.preset(scheme))
    needs = planner._needs(MIXTRAL, mixoff.Scheme.preset(scheme), machine, 4096, 1)
    slots, experts = needs.slots(fast), needs.sizes.experts
    copies = pinned_nbytes(experts, experts - sum(slots) * needs.sizes.slot_nbytes, machine)
    assert fast + needs.fixed + machine.reserved_nbytes == cuda.describe().free_nbytes
    resident, beyond = sum(slots) == 256, experts - sum(slots) * needs.sizes.slot_nbytes
    whole = {"t4": ("small",), "l4": ("small", "mixed"), "a100": ("small", "mixed", "quality"), "rtx-3060": ()}
    assert resident == (scheme in whole[name])
    assert copies <= max(machine.ram_bytes - 2 * GIB, 0), "page-locked memory leaves 2 GiB"
    assert copies <= max(beyond, 0) or copies == experts, "no more than what the card lacks, unless all of them fit"
    on_disk = {("t4", "quality"), ("rtx-3060", "quality")}
    assert (not resident and beyond > copies) == ((name, scheme) in on_disk)


class Cudart:
    """The CUDA runtime's two functions that torch exposes for page-locking."""

    def __init__(self, error):
        self.error, self.calls = error, []

    def cudaHostRegister(self, address, nbytes, flags):
        self.calls.append(("register", address, nbytes, flags))
        return self.error

    def cudaHostUnregister(self, address):
        self.calls.append(("unregister", address))
        return 0


@pytest.fixture
def runtime_of(monkeypatch):
    def make(error):
        cudart, device = Cudart(error), object.__new__(cuda.Cuda)
        device.where, device.registered = torch.device("cpu"), set()
        monkeypatch.setattr(torch.cuda, "cudart", lambda: cudart)
        monkeypatch.setattr(torch.cuda, "synchronize", lambda where: cudart.calls.append(("synchronize",)))
        return device, cudart

    return make


def test_pages_are_locked_once_at_their_exact_size_and_let_go_after_the_copies(runtime_of):
    device, cudart = runtime_of(0)
    memory = device.pinned(3 * 5000)
    address = memory.data_ptr()
    assert memory.numel() == 15000 and address % 4096 == 0
    device.unpin(memory)
    device.unpin(memory)
    assert cudart.calls == [
        ("register", address, 15000, 1), ("synchronize",), ("unregister", address), ("synchronize",)
    ]  # fmt: skip


class Stream:
    """Makes itself the current stream, and what was current again."""

    current = None

    def __init__(self, fails=False):
        self.fails = fails

    def __enter__(self):
        self.before, Stream.current = Stream.current, self

    def __exit__(self, *error):
        if self.fails:
            raise RuntimeError("CUDA error: operation failed due to a previous error during capture")
        Stream.current = self.before


@pytest.mark.parametrize("fails", [False, True])
def test_a_capture_leaves_the_stream_of_before(runtime_of, monkeypatch, fails):
    """Even one that fails, where torch's own context would leave the capturing stream current."""
    device, _ = runtime_of(0)
    for name, stub in {
        "CUDAGraph": mock.MagicMock,
        "Stream": lambda where: Stream(),
        "current_stream": lambda where: Stream.current,
        "stream": Restored,
        "device": lambda where: mock.MagicMock(),
        "graph": lambda graph, stream, capture_error_mode: Stream(fails),
    }.items():
        monkeypatch.setattr(torch.cuda, name, stub)
    monkeypatch.setattr(Stream, "current", Stream())
    before = Stream.current
    if fails:
        with pytest.raises(RuntimeError, match="error during capture"):
            device.capture(lambda: 3)
    else:
        assert device.capture(lambda: 3)[0] == 3
    assert Stream.current is before


class Restored:
    """As `torch.cuda.stream`: at its end the stream of its beginning is current, whatever happened in between."""

    def __init__(self, stream):
        self.stream = stream

    def __enter__(self):
        self.before, Stream.current = Stream.current, self.stream

    def __exit__(self, *error):
        Stream.current = self.before


@pytest.mark.parametrize("wsl", [True, False])
def test_pageable_ram_is_the_fallback_and_is_said(runtime_of, monkeypatch, wsl):
    monkeypatch.setattr(cuda.platform, "release", lambda: "5.15-microsoft-standard-WSL2" if wsl else "6.1.0")
    device, cudart = runtime_of(2)
    with pytest.warns(UserWarning, match=r"cannot be page-locked \(CUDA error 2\)" + (".*WSL2" if wsl else "")):
        memory = device.pinned(8192)
    memory.fill_(7)
    device.unpin(memory)
    assert [call[0] for call in cudart.calls] == ["register", "synchronize"]


# --- the doctor ------------------------------------------------------------------------------------------------------


def test_the_doctor_describes_a_card(card, monkeypatch):
    name, dtype = card
    links = {"pinned": 11.9e9, "pageable": 4.2e9, "back": 12.1e9}
    monkeypatch.setattr(cuda, "link_bandwidths", lambda: links)
    made = replace(probe.named("t4"), name="here", disk_bytes=60_000_000_000)
    monkeypatch.setattr(probe, "probe", lambda cached: made)
    monkeypatch.setattr(probe, "named", lambda name: made)
    checkup = doctor.examine()
    said, text = {f.what: f for f in checkup.findings}, str(checkup)
    if dtype is None:
        assert not said["GPU"].works and "sm_61 is older" in said["GPU"].why and checkup.card is None
        return
    assert said["GPU"].works and said["page-locked RAM"].works
    assert said["bf16 on the GPU"].works == (dtype == "bfloat16")
    assert "pinned 11.9, pageable 4.2, back 12.1" in text and f"computes in {dtype}" in text
    assert checkup.to_dict()["card"]["link_Bps"] == links


@pytest.mark.parametrize(
    "message", ["CUDA error: out of memory\nCUDA kernel errors", "Triton Error [CUDA]: out of memory"]
)
def test_lack_of_memory_in_other_words(message):
    """From a launch, or from the driver: no torch.OutOfMemoryError, and generation goes on all the same."""
    assert out_of_memory(RuntimeError(message)) == message.split("\n")[0]
    assert out_of_memory(RuntimeError("CUDA error: an illegal memory access was encountered")) is None
