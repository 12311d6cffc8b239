"""Guesses: what is set aside for them, that they cost the cache nothing, what is counted, and when they end."""

import pytest
import torch

import mixoff
from mixoff import BudgetError, MixoffError, simulate
from mixoff.planning.budget import set_aside
from mixoff.runtime.prefetch import WINDOW
from mixoff.shapes.config import configured_top_k
from mixoff.shapes.kv_cache import advance
from tiny import BUNDLED, FAMILIES, budget, decode, resident, save_random

IDS = torch.arange(5, 14)[None]
ROOM = {"slots": 64, "least": 8, "experts": 256, "wanted": 2, "direct": True, "slot_nbytes": 1 << 20}


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return mixoff.convert(BUNDLED, tmp_path_factory.mktemp("prefetch") / "store")


@pytest.mark.parametrize(
    ("mode", "change", "spare", "words"),
    [
        ("auto", {}, 2, "on: next-router, 2 spare slots"),
        ("auto", {"wanted": 8}, 8, "on"),
        ("auto", {"wanted": 9}, 0, "too many of 64"),
        ("auto", {"slots": 8}, 0, "too many of 8"),
        ("auto", {"direct": False}, 0, "from memory"),
        ("auto", {"experts": 64}, 0, "every expert has a slot"),
        ("none", {}, 0, "as asked"),
        ("next-router", {"direct": False}, 2, "on"),
        ("next-router", {"slots": 9}, 1, "1 spare"),
    ],
)
def test_what_is_set_aside(mode, change, spare, words):
    got, reason = set_aside(mode, **ROOM | change)
    assert got == spare and words in reason and reason.startswith("on" if spare else "off")


def test_no_room_for_guesses_is_said_with_the_budget_that_has():
    with pytest.raises(BudgetError, match=r"raise fast_bytes by 1\.00 MiB"):
        set_aside("next-router", **ROOM | {"slots": 8})
    with pytest.raises(MixoffError, match="auto, none, next-router"):
        set_aside("crystal-ball", **ROOM)


def run(store, **how):
    with mixoff.load(store, fast_bytes=how.pop("fast_bytes", "5MB"), io="direct", **how) as model:
        with model.mixoff.trace() as recorder:
            out = decode(model, IDS, 24)
        return out, model.mixoff.info(), model.mixoff.resident(), recorder.trace


@pytest.mark.parametrize("scope", ["layer", "global"])
def test_guesses_change_neither_output_nor_what_is_cached(store, scope):
    """Beside a cache of the same slots without guesses: the same tokens, residents, evictions and sum of requests; and
    what the cache itself counted is what the simulator counts."""
    size = mixoff.shapes.sites.slot_nbytes(mixoff.store.source.open_source(store).sites)
    fast = budget(store, 24)
    plain, counted, cached, _ = run(store, scope=scope, prefetch="none", fast_bytes=fast)
    out, info, here, trace = run(store, scope=scope, prefetch="next-router", fast_bytes=fast + 2 * size)
    assert all(torch.equal(a, b) for a, b in zip(out, plain, strict=True))
    assert here == cached and info.capacity == counted.capacity == 24
    assert (info.evictions, info.hits + info.misses) == (counted.evictions, counted.hits + counted.misses)
    assert info.prefetch_hits > 0 and info.hits - info.prefetch_hits == counted.hits
    assert simulate(trace, "lru", 3, scope).hits == counted.hits
    assert counted.prefetch == "off: as asked" and counted.prefetches == 0 == counted.predictions


def test_counts_add_up(store):
    _, info, _, _ = run(store, prefetch="next-router")
    size = info.expert_nbytes
    asked = info.misses + info.prompt_misses + info.restores + info.prefetch_hits
    assert info.bytes_moved == asked * size + info.prefetch_wasted_bytes
    assert 0 <= info.prefetch_wasted_bytes <= (info.prefetches - info.prefetch_hits) * size
    assert info.prefetch_precision == info.prefetch_hits / info.prefetches
    assert info.prefetch_recall == info.prefetch_hits / (info.prefetch_hits + info.misses)
    assert info.predictions == 23 * 7 * 2, "two experts for each decoded token and each layer but the first"
    assert 0.7 < info.predictions_right / info.predictions <= 1, "the bundled model's is 0.9; at random it is 0.25"
    assert "guesses right" in str(info) and info.to_dict()["prefetch_precision"] == info.prefetch_precision


def test_events_of_guesses(store):
    """A guess that came true is a prefetch and then a hit; what is fetched on a guess and never used is evicted."""
    with mixoff.load(store, fast_bytes="5MB", io="direct", prefetch="next-router") as model:
        events = []
        model.mixoff.on_event(events.append)
        decode(model, IDS, 24)
        info = model.mixoff.info()
        here = set()
        for event in events:
            at = (event.layer, event.expert)
            if event.kind != "compute":
                here.discard(at) if event.kind == "evict" else here.add(at)
        assert here == model.mixoff.resident()
    kinds = [e.kind for e in events]
    assert (
        kinds.count("hit") == info.hits + info.prompt_hits and kinds.count("miss") == info.misses + info.prompt_misses
    )
    assert kinds.count("compute") == kinds.count("hit") + kinds.count("miss")
    assert kinds.count("prefetch") >= info.prefetch_hits + info.restores > info.restores
    assert all(e.t0 <= e.t1 for e in events)


def test_auto_stops_where_guesses_are_wrong_and_says_why(store, monkeypatch):
    """A router that is asked ahead answers with the experts that it will not choose."""
    honest = mixoff.Runtime.expect

    def wrong(self, site, chosen):
        honest(self, site, torch.tensor([[e for e in range(8) if e not in chosen][:2]]))

    monkeypatch.setattr(mixoff.Runtime, "expect", wrong)
    (tokens, logits), info, _, _ = run(store, prefetch="auto")
    assert info.prefetch.startswith("off: ") and f"of {WINDOW}" in info.prefetch and "too few" in info.prefetch
    assert WINDOW <= info.prefetches <= WINDOW + 4
    want_tokens, want_logits = decode(resident(BUNDLED), IDS, 24)
    assert torch.equal(tokens, want_tokens) and torch.equal(logits, want_logits)
    _, stubborn, _, _ = run(store, prefetch="next-router")
    assert stubborn.prefetch.startswith("on") and stubborn.prefetches > info.prefetches


def test_a_router_that_cannot_be_asked_ahead_ends_guessing_and_nothing_else(store, monkeypatch):
    with mixoff.load(store, fast_bytes="5MB", io="direct", prefetch="next-router") as model:
        router = type(model.model.layers[3].mlp.gate)
        honest, calls = router.forward, []

        def fail_ahead(self, x, *args, **kwargs):
            calls.append(self)
            if calls.count(self) > 1 and self is model.model.layers[3].mlp.gate:
                raise RuntimeError("not now")
            return honest(self, x, *args, **kwargs)

        with torch.no_grad():
            _, past = advance(model, IDS)
            monkeypatch.setattr(router, "forward", fail_ahead)
            calls += [model.model.layers[3].mlp.gate]
            with pytest.raises(RuntimeError, match="not now"):  # the honest call fails as well: this router is broken
                advance(model, torch.tensor([[7]]), past)
        assert model.mixoff.info().prefetch == "off: the router of site 3 cannot be asked ahead (RuntimeError)"


def test_copies_in_ram_are_not_guessed_for(store):
    """All experts fit the RAM tier: after the first fetch of each there is nothing that a guess could hide."""
    _, info, _, _ = run(store, prefetch="next-router", ram_bytes="20MB")
    assert info.ram_hits > info.prefetches and info.bytes_moved - info.ram_bytes_moved <= 64 * info.expert_nbytes


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_families_can_be_asked_ahead(tmp_path, family):
    """The hook finds every family's router and calls it rightly, other arguments included; the output stays."""
    folder = save_random(tmp_path / family, family)
    fast = budget(folder, 6, io="direct", prefetch="none")
    with mixoff.load(folder, fast_bytes=fast, io="direct", prefetch="next-router", scope="global") as model:
        tokens, logits = decode(model, torch.arange(3, 12)[None], 6)
        info = model.mixoff.info()
    want_tokens, want_logits = decode(resident(folder), torch.arange(3, 12)[None], 6)
    assert torch.equal(tokens, want_tokens) and torch.equal(logits, want_logits)
    assert info.prefetch.startswith("on") and info.predictions > 0


def test_top_k_of_configurations():
    from tiny import config_of

    found = {family: configured_top_k(config_of(family)) for family in FAMILIES}
    assert found.pop("olmoe") == 4 and set(found.values()) == {2}
