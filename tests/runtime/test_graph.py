"""A token as a graph, without a card: a stand-in notes what a capture would hold, and does it again (`recorded`)."""

import gc
import random
import warnings
import weakref
from contextlib import contextmanager
from dataclasses import replace
from unittest import mock

import pytest
import torch
from transformers import StaticCache

import mixoff
import recorded
from bytesless import gpu
from counted import Calls, Card, Mixing, card_of, looking, save_blocks
from mixoff.kernels.triton import products
from mixoff.runtime import graph
from mixoff.shapes.kv_cache import advance
from mixoff.text import generation
from mixoff.transfer import cuda
from mixoff.transfer.arena import Arena
from simulated import Device, products_of
from tiny import budget, decode
from to_gpu import Idle, to_gpu

IDS = torch.tensor([[5, 9, 77, 3]])
LAYERS = EXPERTS = 2


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return save_blocks(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def resident_bytes(store):
    return budget(store, 8)


@contextmanager
def loaded(store, fast, kernels=None, dtype="float32", **how):
    """A model on a simulated device, and the device."""
    device = Device(random.Random(0))
    with (
        card_of(kernels or Mixing()),
        mock.patch.object(cuda, "pick", lambda name: device),
        mock.patch.object(Arena, "weights", products_of(device)),
        mixoff.load(store, fast, device="cuda", dtype=dtype, prefetch="none", **how) as model,
    ):
        yield model, device


@pytest.fixture
def resident(store, resident_bytes):
    with loaded(store, resident_bytes) as (model, device):
        yield model, device


def static(model, length=32):
    return StaticCache(model.config, max_cache_len=length)


def begun(model, tokens=3, length=32):
    """A cache that has seen a prompt and some tokens: the third is the first replay."""
    with torch.no_grad():
        _, cache = advance(model, IDS, static(model, length))
        for token in range(tokens):
            _, cache = advance(model, torch.tensor([[token + 1]]), cache)
    return cache


def token(model, cache, ids=((8,),), **how):
    with torch.no_grad():
        return advance(model, torch.tensor(ids), cache, **how)[0]


# --- the same numbers -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sampled", [False, True], ids=["greedy", "sampled"])
@pytest.mark.parametrize("padded", [False, True], ids=["alone", "padded"])
def test_generation_has_the_bits_of_modules(resident, sampled, padded):
    """Static caches of one length, so that attention sums alike; the fake kernels mix all that they read."""
    how = {"max_new_tokens": 9, "min_new_tokens": 9, "cache_implementation": "static", "pad_token_id": 0}
    how |= {"do_sample": sampled, "output_logits": True, "return_dict_in_generate": True}
    if padded:
        how["attention_mask"] = torch.tensor([[0, 1, 1, 1]])
    model, device = resident
    found, graphs = [], model.mixoff.step
    for graphs.why in ("not now", ""):
        model.mixoff.reset_counts()
        torch.manual_seed(3)
        out = model.generate(IDS, **how)
        found.append((out.sequences, torch.stack(out.logits), model.mixoff.info(), model.mixoff._tokens))
        assert device.replays == (0 if graphs.why else 7), "the first token warms up, the second is captured"
    (ids, logits, info, tokens), (got_ids, got, got_info, got_tokens) = found
    assert torch.equal(ids, got_ids) and torch.equal(logits, got) and got_tokens == 2 * tokens
    assert (info.hits, info.decode) == (got_info.hits, "modules: not now")
    assert len(logits.flatten(1).unique(dim=0)) == 9, "every step differs"


def test_offloaded_and_resident_models_write_the_same_text(store, resident_bytes, monkeypatch):
    """`generate` takes a static cache on a card whatever the budget, so that attention sums alike."""
    texts = []
    tokenizer = mock.MagicMock(decode=lambda ids, **_: " ".join(map(str, ids)))
    monkeypatch.setattr(generation, "encode", lambda *args: mock.MagicMock(
        to=lambda _: {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}
    ))  # fmt: skip
    for fast in (resident_bytes, budget(store, 4)):
        with loaded(store, fast) as (model, device):
            model.generation_config.eos_token_id = None
            texts.append(generation.generate(model, tokenizer, "", 8).token_ids)
            assert (device.replays > 0) == (fast == resident_bytes)
    assert texts[0] == texts[1]


def test_a_kept_result_is_not_overwritten(resident):
    model, _ = resident
    cache = begun(model)
    first = token(model, cache)
    kept = first.clone()
    token(model, cache, ((9,),))
    assert torch.equal(first, kept)


# --- what a token costs -----------------------------------------------------------------------------------------------


def test_a_replayed_token_is_a_handful_of_calls(store, resident_bytes):
    """Its inputs and result are copied; the router's choice never comes to the host."""
    with loaded(store, resident_bytes, Card()) as (model, device), looking() as looks:
        cache = begun(model)
        looks.clear()
        before, waits = device.replays, device.waits
        with Calls() as counted:
            token(model, cache)
        assert device.replays == before + 1 and looks == [] and device.waits == waits
        assert counted.calls == {"copy_": 1, "clone": 2}  # the id; the result, and how long the cache was


def test_a_capture_needs_no_values(store, resident_bytes, monkeypatch):
    """The pass that is captured, on tensors that know only their device: whatever looks at one raises."""
    monkeypatch.setattr(cuda, "pick", lambda name: Idle())
    monkeypatch.setattr(products, "chip", lambda _: 75)
    monkeypatch.setattr(products, "on", lambda _: mock.MagicMock())
    with card_of(Card()) as card, mixoff.load(store, resident_bytes, device="cuda", dtype="float32") as model:
        runtime = model.mixoff
        assert runtime.residents.found(runtime)
        with mock.patch.object(products, "DEVICES", ("cpu", "cuda")), gpu():
            to_gpu(model)
            tables = runtime.residents.tables
            where = {"dtype": torch.long, "device": "cuda"}
            runtime.residents.tables = [replace(t, at=torch.zeros(t.at.shape, **where)) for t in tables]
            cache = static(model)
            for layer in cache.layers:
                layer.lazy_initialization(*[torch.zeros(1, 4, 1, 32, device="cuda")] * 2)
                layer.cumulative_length = torch.zeros((), **where)
            card.launches.clear()
            with graph.Looks() as seen:
                logits, _ = advance(model, torch.zeros(1, 1, **where), cache)
        assert seen.found == [] and logits.device.type == "cuda"
        assert [kind for kind, _ in card.launches] == LAYERS * ["linear", "linear", "gated", "rotate", "linear"]


@pytest.mark.parametrize(
    ("work", "name"),
    [
        (lambda x: x.sum().item(), "_local_scalar_dense"),
        (lambda x: x[x > 0], "index"),
        (lambda x: x.nonzero(), "nonzero"),
        (lambda x: bool((x > 0).any()), "_local_scalar_dense"),
        (lambda x: torch.repeat_interleave(torch.tensor([1, 2, 1])), "repeat_interleave"),
        (lambda x: torch.equal(x, x), "equal"),
        (lambda x: torch.cat([x, x])[torch.tensor([1, 0])].softmax(-1).topk(1), None),
    ],
)
def test_looks_of_the_host_are_noted(work, name):
    with graph.Looks() as seen:
        work(torch.ones(2))
    assert seen.found == ([name] if name else [])


def test_a_copy_to_the_host_is_a_look():
    with gpu(), graph.Looks() as seen:
        torch.zeros(3, device="cuda").cpu()
    assert seen.found == ["_to_copy"]


# --- when modules compute ---------------------------------------------------------------------------------------------


def replays(resident, work):
    """How many replays a piece of work was."""
    _, device = resident
    before = device.replays
    work()
    return device.replays - before


def test_listeners_and_hooks_see_every_token(resident):
    model, _ = resident
    cache, seen, layer = begun(model), [], model.model.layers[1]
    assert replays(resident, lambda: token(model, cache)) == 1
    attachments = (
        lambda: model.mixoff.on_event(seen.append),
        lambda: model.mixoff.on_routing(lambda *args: seen.append(args)),
        lambda: layer.self_attn.register_forward_hook(lambda *args: seen.append(args)).remove,
        lambda: torch.nn.modules.module.register_module_forward_hook(lambda *args: seen.append(args)).remove,
    )
    for attach in attachments:
        end = attach()
        assert replays(resident, lambda: token(model, cache)) == 0 and seen
        end()
        seen.clear()
        assert replays(resident, lambda: token(model, cache)) == 1
    model.mixoff.reroute = lambda site, index, weights: (seen.append(site) or index, weights)
    assert replays(resident, lambda: token(model, cache)) == 0 and seen == [0, 1]


def test_a_replaced_module_is_called(resident):
    """As adapters are added."""
    model, _ = resident
    cache, seen = begun(model), []
    honest = model.model.layers[0].self_attn.o_proj
    model.model.layers[0].self_attn.o_proj = torch.nn.Sequential(honest)
    model.model.layers[0].self_attn.o_proj.register_forward_hook(lambda *args: seen.append(args))
    assert replays(resident, lambda: token(model, cache)) == 0 and seen


@pytest.mark.parametrize("ids", [((5, 9),), ((5,), (9,))], ids=["a prompt", "a batch"])
def test_only_a_token_is_a_graph(resident, ids):
    model, _ = resident
    cache = static(model)
    with torch.no_grad():
        assert replays(resident, lambda: [advance(model, torch.tensor(ids), cache) for _ in range(4)]) == 0


def test_only_a_static_cache_has_graphs(resident):
    model, _ = resident
    assert replays(resident, lambda: decode(model, IDS, 6)) == 0


def test_gradients_are_not_captured(resident):
    model, _ = resident
    cache = begun(model)
    with torch.enable_grad():
        assert replays(resident, lambda: advance(model, torch.tensor([[8]]), cache)) == 0


def test_what_is_given_otherwise_is_captured_again(resident):
    """Another argument, another mode of autograd, keys that moved: each warms up, is captured, and is replayed."""
    model, _ = resident
    cache = begun(model)
    mask = torch.ones(1, 1, 1, 32, dtype=torch.bool)

    def three(**how):
        return [replays(resident, lambda: token(model, cache, **how)) for _ in range(3)]

    assert three() == [1, 1, 1]
    assert three(logits_to_keep=1) == three(attention_mask=mask) == [0, 1, 1]
    cache.layers[0].keys = cache.layers[0].keys.clone()
    assert three(attention_mask=mask) == [0, 1, 1]
    with torch.inference_mode():
        other = begun(model)
        assert three() == [0, 1, 1] and replays(resident, lambda: token(model, other)) == 1


def test_slots_that_changed_end_the_graph(resident):
    model, _ = resident
    cache = begun(model)
    with pytest.warns(UserWarning, match="going on with"):
        model.mixoff.make_room("as a test")
    assert replays(resident, lambda: [token(model, cache) for _ in range(4)]) == 0
    model.mixoff.close()
    with pytest.raises(RuntimeError, match="was closed"):
        token(model, cache)


def test_a_graph_goes_with_its_cache(resident):
    model, _ = resident
    cache = begun(model)
    captured = model.mixoff.step.known[cache]
    keys, gone = weakref.ref(captured.inputs[0]), weakref.ref(cache)
    del captured, cache
    gc.collect()
    assert gone() is None and keys() is None and not len(model.mixoff.step.known)


def test_two_caches_have_graphs_of_their_own(resident):
    model, _ = resident
    one, other = begun(model), begun(model)
    want = [token(model, begun(model), ((n,),)) for n in (8, 9)]
    got = token(model, one, ((8,),)), token(model, other, ((9,),))
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


# --- when it cannot be ------------------------------------------------------------------------------------------------


def test_a_card_that_refuses_is_told_once_and_served_by_modules(resident):
    model, device = resident
    want = [token(model, begun(model, n)) for n in (1, 2)]
    tokens, hits = model.mixoff._tokens, model.mixoff.cache.hits
    model.mixoff.step.known.clear()

    def capture(work):
        recorded.capture(work)
        raise RuntimeError("CUDA error: operation not permitted\nsecond line")

    with mock.patch.object(device, "capture", capture), pytest.warns(UserWarning, match="without a CUDA graph") as said:
        got = [token(model, begun(model, n)) for n in (1, 2)]
    assert len(said) == 1 and str(said[0].message).endswith("(RuntimeError: CUDA error: operation not permitted)")
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    assert (model.mixoff._tokens, model.mixoff.cache.hits) == (2 * tokens, 2 * hits)
    assert model.mixoff.info().decode == "modules: RuntimeError: CUDA error: operation not permitted"


def test_a_pass_that_looks_is_not_captured(resident, monkeypatch):
    model, device = resident
    honest = type(model.model.norm).forward

    def forward(self, x):
        assert x.sum().item() == x.sum().item()
        return honest(self, x)

    monkeypatch.setattr(type(model.model.norm), "forward", forward)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert replays(resident, lambda: begun(model, 5)) == 0
    assert model.mixoff.info().decode == "modules: the host waits for _local_scalar_dense in every token"


def test_experts_that_kernels_do_not_find_are_computed_one_by_one(resident, monkeypatch):
    model, _ = resident
    monkeypatch.setattr("mixoff.runtime.resident.fuses", lambda *args: False)
    assert replays(resident, lambda: begun(model, 5)) == 0
    assert model.mixoff.info().decode == "modules: experts of this form are not found by kernels"


def test_memory_that_runs_out_cuts_a_static_cache_back(store, resident_bytes):
    """The pass is repeated from where it began."""
    with loaded(store, resident_bytes) as (model, _):
        want = token(model, begun(model, 1))
        cache, layer = begun(model, 1), model.model.layers[1].self_attn
        honest, calls = layer.forward, []

        def forward(*args, **kwargs):
            out = honest(*args, **kwargs)
            calls.append(1)
            if len(calls) == 1:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has")
            return out

        layer.forward = forward
        with pytest.warns(UserWarning, match="going on with"):
            got = token(model, cache)
        assert len(calls) == 2 and torch.equal(got, want) and cache.get_seq_length() == IDS.shape[1] + 2
