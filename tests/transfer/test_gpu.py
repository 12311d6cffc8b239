"""What only a real GPU can show: exactness, the order of events, memory, and how often the host waits.

    python3 go.py test -m gpu        deselected where torch sees no GPU

None of this was ever run by the authors: docs/gpu.md.
"""

import warnings

import pytest
import torch

import mixoff
from mixoff.shapes.kv_cache import advance, begin
from mixoff.transfer import cuda
from tiny import BUNDLED, decode

pytestmark = pytest.mark.gpu
IDS = torch.arange(5, 29)[None]
SCHEMES = ("none", "mixed", "quality")


@pytest.fixture(scope="module", params=SCHEMES)
def store(request, tmp_path_factory):
    return mixoff.convert(BUNDLED, tmp_path_factory.mktemp("gpu") / "store", request.param)


def run(store, fast="1GiB", ram=None, new_tokens=24, **how):
    """Greedy tokens and logits on the GPU, and what the runtime says of it."""
    with mixoff.load(store, fast, ram_bytes=ram, device="cuda", **how) as model:
        tokens, logits = decode(model, IDS.to(model.device), new_tokens)
        return tokens.cpu(), logits.cpu(), model.mixoff.info()


@pytest.mark.parametrize(
    "how",
    [
        {"fast": "4MB"},
        {"fast": "4MB", "ram": 0},
        {"fast": "4MB", "ram": "3MB", "scope": "global"},
        {"fast": "6MB", "prefetch": "next-router"},
        {"fast": "5MB", "policy": "lfu", "scope": "global"},
        {"fast": "4MB", "policy": "none"},
    ],
    ids=str,
)
def test_output_does_not_depend_on_tiers(store, how):
    """Bit for bit that of the same GPU with every expert resident."""
    tokens, logits, _ = run(store)
    got_tokens, got_logits, info = run(store, **how)
    assert torch.equal(tokens, got_tokens) and torch.equal(logits, got_logits)
    assert info.bytes_moved > 0 or info.capacity == info.num_experts  # then `load` has moved all


def test_unquantized_output_is_near_that_of_the_cpu(tmp_path):
    """fp32 on both: products are summed in another order, no more."""
    torch.backends.cuda.matmul.allow_tf32 = False
    tokens, logits, _ = run(BUNDLED, "4MB", dtype="float32")
    with mixoff.load(BUNDLED, "4MB", device="cpu") as model:
        want_tokens, want = decode(model, IDS, 24)
    assert torch.equal(tokens, want_tokens) and (logits - want).abs().max() < 1e-3


class Slow(cuda.Cuda):
    """A card whose copies, or whose products, are held up: what does not wait for them shows."""

    def __init__(self, copies, products):
        super().__init__()
        self.copies, self.products = copies, products

    def copy(self, stream, target, source):
        with torch.cuda.stream(stream):
            torch.cuda._sleep(self.copies)
        super().copy(stream, target, source)

    def computing(self):
        torch.cuda._sleep(self.products)
        return super().computing()


@pytest.mark.parametrize("held", [(2_000_000, 0), (0, 2_000_000)], ids=["copies", "products"])
def test_events_keep_the_order_when_one_stream_lags(store, monkeypatch, held):
    tokens, logits, _ = run(store, new_tokens=6)
    monkeypatch.setattr(cuda, "Cuda", lambda index: Slow(*held))
    for ram in ("3MB", None):
        got_tokens, got_logits, _ = run(store, "4MB", ram, new_tokens=6, scope="global")
        assert torch.equal(tokens, got_tokens) and torch.equal(logits, got_logits)


def waits(model, cache=None):
    """How often the host waits for the card during a token: torch warns at every synchronisation of its own."""
    with torch.no_grad():
        _, past = advance(model, IDS.cuda(), cache)
        token = torch.tensor([[7]], device="cuda")
        for _ in range(3):  # with a static cache: one to warm up, one that is captured, and a replay
            _, past = advance(model, token, past)
        torch.cuda.set_sync_debug_mode("warn")
        try:
            with warnings.catch_warnings(record=True) as said:
                warnings.simplefilter("always")
                advance(model, token, past)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return len([w for w in said if "synchroniz" in str(w.message)])


def test_the_host_waits_once_a_layer(store):
    with mixoff.load(store, "4MB", device="cuda") as model:
        assert waits(model) <= len(model.mixoff.source.sites)


def test_a_resident_models_host_does_not_wait(store):
    """Once every expert was asked for, where Triton's kernels multiply: not with 16-bit experts."""
    with mixoff.load(store, device="cuda") as model:
        runtime = model.mixoff
        for i, site in enumerate(runtime.source.sites):
            runtime.serve(i, list(range(site.num_experts)), lambda weights: None)
        quantized = runtime.source.scheme.experts is not None
        assert waits(model) == 0 or not quantized


def test_a_replayed_tokens_host_does_not_wait(store):
    with mixoff.load(store, device="cuda") as model:
        quantized = model.mixoff.source.scheme.experts is not None
        assert waits(model, begin(model, 64)) == 0 or not quantized
        assert (model.mixoff.info().decode == "one graph per token") == quantized


@pytest.mark.parametrize("sampled", [False, True])
def test_a_graph_has_the_bits_of_modules(store, sampled):
    found = []
    how = {"max_new_tokens": 24, "min_new_tokens": 24, "pad_token_id": 0, "output_logits": True}
    how |= {"do_sample": sampled, "return_dict_in_generate": True, "cache_implementation": "static"}
    for decode_by in ("modules", "compiled"):
        with mixoff.load(store, device="cuda", decode=decode_by) as model:
            torch.manual_seed(0)
            out = model.generate(IDS.cuda(), **how)
            found.append((out.sequences.cpu(), torch.stack(out.logits).cpu()))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_slots_lie_on_the_card_and_go_back(store):
    before = torch.cuda.memory_allocated()
    with mixoff.load(store, "4MB", device="cuda") as model:
        arena = model.mixoff.arena
        assert arena.slots.device.type == "cuda" and arena.numel() <= 4_000_000
        assert torch.cuda.memory_allocated() - before >= arena.numel()
        assert model.mixoff.transfer.memory.is_pinned()
    del model, arena
    assert torch.cuda.memory_allocated() - before < 1_000_000


def test_budgets_follow_from_what_is_free(store):
    with mixoff.load(store, device="cuda") as model:
        info = model.mixoff.info()
        assert info.capacity == info.num_experts and info.prefetch == "off: every expert has a slot"
        assert {p.device.type for p in model.parameters()} == {"cuda"}


def test_a_second_load_finds_the_memory_of_the_first(store):
    budgets = []
    for _ in range(2):
        with mixoff.load(store, device="cuda") as model:
            budgets.append(model.mixoff.fast_bytes)
    assert budgets[1] >= 0.99 * budgets[0]


def test_copies_back_do_not_change_the_output(store):
    """RAM for what the card lacks alone: every miss sends its victim back, on a stream of its own."""
    tokens, logits, info = run(store)
    size = info.expert_nbytes
    got_tokens, got_logits, _ = run(store, 40 * size, 30 * size, scope="global", prefetch="none")
    assert torch.equal(tokens, got_tokens) and torch.equal(logits, got_logits)


def test_more_than_the_card_has_shrinks(store, monkeypatch):
    """An allocator that refuses large slabs: slots shrink, and the output stays."""
    tokens, logits, _ = run(store, new_tokens=6)
    honest = cuda.Cuda.empty

    def empty(self, nbytes):
        if nbytes > 4_000_000:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate too much. As a test.")
        return honest(self, nbytes)

    monkeypatch.setattr(cuda.Cuda, "empty", empty)
    with pytest.warns(UserWarning, match="going on with"):
        got_tokens, got_logits, info = run(store, "1GiB", new_tokens=6)
    assert torch.equal(tokens, got_tokens) and torch.equal(logits, got_logits) and info.fast_bytes_peak <= 5_000_000


def test_the_link_is_measured():
    found = cuda.link_bandwidths(rounds=2)
    assert set(found) == {"pinned", "pageable", "back"} and min(found.values()) > 0
