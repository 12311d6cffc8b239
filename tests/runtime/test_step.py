"""The decode step: compiled layers agree with transformers' modules, offloaded equals resident, and nobody is left out
who looks inside a layer. Which families are compiled is found by comparison, so wrong matches are tested too.
"""

import copy

import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache

import mixoff
from mixoff import Scheme
from mixoff.quantize.scheme import Precision
from mixoff.runtime.growing import ATTRIBUTE, SPARE, growing
from tiny import FAMILIES, config_of, decode

SCHEME = Scheme(attention=Precision(4, 16), experts=Precision(4, 16))
IDS = torch.arange(3, 21)[None]
ALL, ATTENTION, NONE = "attention, router and experts", "attention", "nothing"
COMPILED = {
    "mixtral": ALL,
    "olmoe": ALL,  # norms of keys over all heads
    "granitemoe": ALL,  # a factor before each addition
    "qwen2_moe": ATTENTION,  # biases; a shared expert
    "glm4_moe": ATTENTION,  # half of each head is turned; another router
    "gpt_oss": ATTENTION,  # sinks, windows, eager attention with a mask
    "ernie4_5_moe": NONE,  # neighbours are turned, not halves
    "phimoe": NONE,  # layer norm
    "deepseek_v2": NONE,  # compressed keys
}
pytestmark = pytest.mark.filterwarnings("ignore:all experts .* stay in memory")


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


def offloaded(family="mixtral", dtype=torch.float32, budget="1GiB", prepare=lambda model: None, **changes):
    torch.manual_seed(0)
    config = config_of(family)
    for name, value in changes.items():
        setattr(config, name, value)
    model = AutoModelForCausalLM.from_config(config).to(dtype).eval()
    with torch.no_grad():  # norms of a new model are all 1, which would hide that one is missing
        for name, weight in model.named_parameters():
            if "norm" in name or name.endswith(("bias", "sinks")):
                weight += 0.2 * torch.randn_like(weight)
    prepare(model)
    return mixoff.offload(model, budget, scheme=SCHEME)


def by_modules(model, *args, **kwargs):
    """`decode` without the compiled step."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model.mixoff.step, "allowed", lambda *a: False)
        return decode(model, *args, **kwargs)


def kinds(model):
    return {NONE if layer.reason else ALL if layer.experts else ATTENTION for layer in model.mixoff.step.layers}


@pytest.mark.parametrize("family", COMPILED)
def test_compiled_layers_agree_with_modules(family):
    assert family in FAMILIES
    model = offloaded(family)
    tokens, logits = decode(model, IDS)
    assert kinds(model) == {COMPILED[family]}, model.mixoff.step.info()
    expected, their_logits = by_modules(model, IDS)
    same = (tokens == expected).all(0).cumprod(0).sum() - IDS.shape[1]
    assert same >= 3
    error = (logits[:same] - their_logits[:same]).norm() / their_logits[:same].norm()
    assert error < 2e-3, "more than a few int8 codes that flip"
    assert COMPILED[family] == NONE or error > 0, "the compiled step did not run"


def test_norms_of_heads_and_a_dense_layer():
    model = offloaded("qwen3_moe", moe_intermediate_size=64)
    (tokens, logits), (expected, their_logits) = decode(model, IDS), by_modules(model, IDS)
    assert [bool(layer.experts) for layer in model.mixoff.step.layers] == [False, True, True]
    assert model.mixoff.info().decode == "compiled in 3 of 3 layers" and torch.equal(tokens, expected)
    assert 0 < (logits - their_logits).norm() < 2e-3 * their_logits.norm()


def test_it_can_be_turned_off():
    model = mixoff.restore(offloaded())
    mixoff.offload(model, scheme=SCHEME, decode="modules")
    assert model.mixoff.step is None and model.mixoff.info().decode == "modules"
    with pytest.raises(mixoff.MixoffError, match="unknown decode 'fast': choose one of compiled, modules"):
        mixoff.offload(model, decode="fast")
    mixoff.offload(mixoff.restore(model))
    assert model.mixoff.step is None, "16-bit experts equal plain transformers"


def test_bf16_is_as_near_to_fp32_as_modules_are():
    exact = by_modules(offloaded(), IDS)[1]
    model = offloaded(dtype=torch.bfloat16)
    (tokens, mine), (expected, theirs) = decode(model, IDS), by_modules(model, IDS)
    assert kinds(model) == {ALL} and torch.equal(tokens[:, :20], expected[:, :20])
    assert (mine[1] - exact[1]).norm() < 1.5 * (theirs[1] - exact[1]).norm()


@pytest.mark.parametrize("window", [8, 24])
def test_sliding_windows(window):
    model = offloaded("mixtral", sliding_window=window, layer_types=None)
    tokens, logits = decode(model, IDS, 40)
    expected, their_logits = by_modules(model, IDS, 40)
    assert kinds(model) == {ALL} and torch.equal(tokens, expected)
    assert (logits - their_logits).norm() < 2e-3 * their_logits.norm()


def test_a_budget_and_threads_change_no_bit():
    model = offloaded(dtype=torch.bfloat16)
    runtime = model.mixoff
    small = runtime.allocated_nbytes - (runtime.slots - 6) * runtime.arena.slot_nbytes
    expected = decode(model, IDS, 40)
    torch.set_num_threads(3)
    for budget in ("1GiB", small):
        other = offloaded(dtype=torch.bfloat16, budget=budget)
        assert all(torch.equal(a, b) for a, b in zip(decode(other, IDS, 40), expected, strict=True))
    assert other.mixoff.info().misses > 0


def test_a_wrong_layer_is_noticed_as_soon_as_the_cache_has_doubled():
    """A model may differ from the common decoder only far into a text, as with scores scaled by position."""

    def prepare(model):
        attention = model.model.layers[1].self_attn
        own = type(attention).forward

        class Attention(type(attention)):
            def forward(self, hidden_states, *args, **kwargs):
                out, weights = own(self, hidden_states, *args, **kwargs)
                cache = kwargs.get("cache") or kwargs.get("past_key_values")
                return (out * 2 if cache.layers[1].keys.shape[2] > 40 else out), weights

        attention.__class__ = Attention

    model = offloaded(prepare=prepare)
    decode(model, IDS, 60)
    reasons = [bool(one.reason) for one in model.mixoff.step.layers]
    assert reasons == [False, True, False]
    assert "1" not in model.mixoff.step.info().split(" of ")[0] and "MixtralDecoderLayer" in model.mixoff.step.info()


# Those who look inside ------------------------------------------------------------------------------------------------


def test_hooks_inside_a_layer_are_called():
    model, seen = offloaded(), []
    decode(model, IDS, 3)
    hook = model.model.layers[0].self_attn.q_proj.register_forward_hook(lambda *a: seen.append(1))
    expected = by_modules(model, IDS, 5)
    seen.clear()
    found = decode(model, IDS, 5)
    assert len(seen) == 5 and torch.equal(found[1], expected[1])
    hook.remove()
    decode(model, IDS, 5)
    assert len(seen) == 5


def test_hidden_states_and_attentions_are_those_of_modules():
    model = offloaded()
    cache = model(IDS, use_cache=True).past_key_values
    with torch.no_grad():
        out = model(IDS[:, :1], past_key_values=cache, output_hidden_states=True, output_router_logits=True)
    assert len(out.hidden_states) == 4 and len(out.router_logits) == 3
    decode(model, IDS, 3)
    assert kinds(model) == {ALL}, "hooks that collect nothing do no harm"


def test_a_replaced_module_is_used():
    model = offloaded()
    before = decode(model, IDS, 4)[1]

    class Twice(torch.nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, x):
            return 2 * self.inner(x)

    attention = model.model.layers[2].self_attn
    attention.o_proj = Twice(attention.o_proj)
    after, expected = decode(model, IDS, 4)[1], by_modules(model, IDS, 4)[1]
    assert torch.equal(after, expected) and not torch.equal(after[-1], before[-1])


def test_listeners_of_routing_and_reroute():
    model, seen = offloaded(), []
    stop = model.mixoff.on_routing(lambda token, prompt, site, experts, weights: seen.append((experts, weights)))
    expected = decode(model, IDS, 4)[1]
    stop()
    assert all(experts.shape == weights.shape == (1, 2) for experts, weights in seen[3:])
    assert torch.allclose(seen[-1][1].float().sum(), torch.tensor(1.0), atol=1e-3)
    model.mixoff.reroute = lambda site, experts, weights: (experts, weights)
    assert torch.equal(decode(model, IDS, 4)[1], expected)
    none = model.config.num_local_experts
    for change in (lambda e: e.masked_fill(e > 1, none), lambda e: e.clone().fill_(1)):
        model.mixoff.reroute = lambda site, e, w, change=change: (change(e), w)
        mine, theirs = decode(model, IDS, 4)[1], by_modules(model, IDS, 4)[1]
        assert (mine - theirs).norm() < 2e-3 * theirs.norm() and not torch.equal(mine, expected)


def test_no_number_in_stays_no_number():
    model = offloaded()
    decode(model, IDS, 3)
    with torch.no_grad():
        cache = model(IDS, use_cache=True).past_key_values
        embedded = model.model.embed_tokens(IDS[:, :1]).fill_(float("nan"))
        assert model(inputs_embeds=embedded, past_key_values=cache).logits.isnan().all()
        assert not model(IDS).logits.isnan().any()


def test_restore_leaves_nothing_behind():
    model = offloaded()
    decode(model, IDS, 3)
    mixoff.restore(model)
    assert not any("forward" in vars(module) for module in model.modules())


# The cache ------------------------------------------------------------------------------------------------------------


def filled(model, tokens=5):
    """A cache after a prompt and some single tokens."""
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(IDS, past_key_values=cache, use_cache=True)
        for i in range(tokens):
            model(IDS[:, i : i + 1], past_key_values=cache, use_cache=True)
    return cache


def test_the_cache_grows_in_place_and_is_as_transformers_leaves_it():
    model = offloaded()
    cache = filled(model)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model.mixoff.step, "allowed", lambda *a: False)
        expected = filled(model)
    for mine, theirs in zip(cache.layers, expected.layers, strict=True):
        assert mine.keys.shape == theirs.keys.shape and ATTRIBUTE in vars(mine)
        assert torch.allclose(mine.keys, theirs.keys, atol=1e-3) and torch.allclose(
            mine.values, theirs.values, atol=1e-3
        )
    assert cache.get_seq_length() == expected.get_seq_length() == IDS.shape[1] + 5


@pytest.mark.parametrize("change", ["crop", "copy", "deepcopy", "reorder", "longer"])
def test_tokens_once_written_are_never_overwritten(change):
    model = offloaded()
    cache = filled(model)
    kept = [(layer.keys, layer.keys.clone()) for layer in cache.layers]
    other = cache
    if change == "crop":
        cache.crop(-3)
    elif change == "reorder":
        cache.reorder_cache(torch.tensor([0]))
    elif change == "longer":
        with torch.no_grad():
            model(IDS[:, :4], past_key_values=cache, use_cache=True)
    else:
        other = copy.deepcopy(cache) if change == "deepcopy" else copy.copy(cache)
        other.layers = [copy.deepcopy(one) if change == "deepcopy" else copy.copy(one) for one in cache.layers]
    with torch.no_grad():
        first = model(IDS[:, 9:10], past_key_values=other, use_cache=True).logits
        if other is not cache:
            second = model(IDS[:, 9:10], past_key_values=cache, use_cache=True).logits
            model(IDS[:, 3:4], past_key_values=other, use_cache=True)
            assert torch.equal(first, second)
    for keys, before in kept:
        assert torch.equal(keys, before)


def test_memory_of_a_cache_is_bounded_and_other_kinds_are_left_alone():
    model = offloaded()
    layer = filled(model).layers[0]
    memory, tokens = growing(layer, torch.float32), layer.keys.shape[2]
    assert memory.room <= tokens + max(64, tokens // SPARE)
    assert growing(layer, torch.bfloat16) is None
    cache = DynamicCache(config=model.config)
    model(IDS.repeat(2, 1), past_key_values=cache, use_cache=True)
    assert growing(cache.layers[0], torch.float32) is None  # two sequences
