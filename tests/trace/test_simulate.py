"""The simulator against brute force, against the cache that the runtime drives, and against the runtime itself."""

import functools
import itertools
import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import mixoff
from mixoff import BudgetError, MixoffError, Trace, simulate
from mixoff.cache.cache import ExpertCache
from mixoff.cache.policies import POLICIES
from mixoff.commands.cli import main
from mixoff.trace.simulate import CODES, COUNTERS, SCOPES, curve
from tiny import BUNDLED

ALL = sorted(CODES)
SLOT, SCRATCH = 221_184, 32 * 192 * 4


@st.composite
def traces(draw, tokens=24, experts=6, top_k=2, prompts=True, layers=3):
    """Small traces with prompts of several tokens here and there."""
    T, L = draw(st.integers(1, tokens)), draw(st.integers(1, layers))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    popularity = rng.random((L, experts)) ** 2
    chosen = np.argsort(rng.random((T, L, experts)) * popularity, axis=2)[:, :, :top_k]
    is_prompt = rng.random(T) < (0.3 if prompts else 0)
    return Trace.from_array(chosen, experts, is_prompt=is_prompt)


def replay_in_cache(trace, policy, slots, scope):
    """What ExpertCache counts, driven as the runtime drives it."""
    L, r = len(trace.layers), trace.requests()
    size = min(slots, trace.num_experts)
    cache = ExpertCache([size] * L if scope == "layer" else [size * L], policy)
    for c, (site, prompt) in enumerate(zip(r.site.tolist(), r.is_prompt.tolist(), strict=True)):
        keys = [(site, key) for key in r.keys[r.starts[c] : r.starts[c + 1]].tolist()]
        for _ in cache.access(site if scope == "layer" else 0, keys, prompt):
            pass
    return {name: getattr(cache, name) for name in COUNTERS}


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("policy", sorted(POLICIES))
@settings(max_examples=15, deadline=None)
@given(trace=traces(), slots=st.integers(2, 6))
def test_counts_what_the_cache_counts(policy, scope, trace, slots):
    got = simulate(trace, policy, slots, scope)
    assert {name: getattr(got, name) for name in COUNTERS} == replay_in_cache(trace, policy, slots, scope)
    assert [sum(getattr(x, n) for x in got.per_layer) for n in ("hits", "misses")] == [got.hits, got.misses]


def fewest_misses(calls, slots):
    """By trying every choice of victims: no policy that fetches on demand can do better."""

    @functools.cache
    def best(c, held):
        if c == len(calls):
            return 0
        wanted = frozenset(calls[c])
        spare = held - wanted
        keep = min(slots - len(wanted), len(spare))
        rest = (best(c + 1, wanted | frozenset(x)) for x in itertools.combinations(sorted(spare), keep))
        return len(wanted - held) + min(rest)

    return best(0, frozenset())


@settings(max_examples=25, deadline=None)
@given(trace=traces(tokens=12, prompts=False, layers=2), slots=st.integers(2, 4), scope=st.sampled_from(SCOPES))
def test_belady_equals_brute_force(trace, slots, scope):
    r, L = trace.requests(), len(trace.layers)
    calls = [r.keys[r.starts[c] : r.starts[c + 1]].tolist() for c in range(len(r.site))]
    pools = [calls[i::L] for i in range(L)] if scope == "layer" else [calls]
    size = slots if scope == "layer" else slots * L
    assert simulate(trace, "belady", slots, scope).misses == sum(
        fewest_misses(tuple(map(tuple, p)), size) for p in pools
    )


@settings(max_examples=15, deadline=None)
@given(trace=traces(), slots=st.integers(2, 6), scope=st.sampled_from(SCOPES))
def test_belady_is_never_beaten(trace, slots, scope):
    fewest = simulate(trace, "belady", slots, scope).misses
    assert all(simulate(trace, policy, slots, scope).misses >= fewest for policy in ALL)


@settings(max_examples=15, deadline=None)
@given(trace=traces(prompts=False), scope=st.sampled_from(SCOPES))
def test_more_slots_never_hurt_lru_and_one_pass_gives_them_all(trace, scope):
    rates = [simulate(trace, "lru", slots, scope).hit_rate for slots in range(2, 7)]
    assert rates == sorted(rates) == list(curve(trace, "lru", scope).values())


def test_more_slots_may_hurt_fifo():
    """Belady's anomaly, on the sequence of Belady, Nelson and Shedler (1969)."""
    trace = Trace.from_array(np.array([1, 2, 3, 4, 1, 2, 5, 1, 2, 3, 4, 5])[:, None, None])
    assert [simulate(trace, "fifo", slots).misses for slots in (3, 4)] == [9, 10]


@pytest.mark.parametrize("policy", ["lru", "fifo", "random"])
def test_uniform_routing_hits_slots_of_experts(policy):
    """40,000 requests: a share of 0.5 +- 0.0025 (one sigma, if independent), so 0.01 is four; the seed is fixed."""
    chosen = np.argsort(np.random.default_rng(0).random((10_000, 2, 8)), axis=2)[:, :, :2]
    assert simulate(Trace.from_array(chosen), policy, 4).hit_rate == pytest.approx(4 / 8, abs=0.01)


@settings(max_examples=3, deadline=None)
@given(trace=traces(tokens=80))
def test_compiled_and_plain_python_agree(trace):
    """The compiled twin is taken for long traces only; here it is made to run on short ones."""
    for policy in ALL:
        plain = simulate(trace, policy, 3, "global")
        threshold, mixoff.jit.COMPILE_FROM = mixoff.jit.COMPILE_FROM, 0
        try:
            assert simulate(trace, policy, 3, "global") == plain
        finally:
            mixoff.jit.COMPILE_FROM = threshold


@pytest.fixture(scope="module")
def live():
    """Two prompts and decoding after each, recorded in one model that never evicts."""
    with mixoff.load(BUNDLED, fast_bytes="1GiB") as model, model.mixoff.trace() as recorder:
        generate(model)
    return recorder.trace


def generate(model):
    for start in (3, 400):
        model.generate(torch.arange(start, start + 6)[None], max_new_tokens=20, min_new_tokens=20, do_sample=False)


@pytest.mark.parametrize("policy", ["lru", "lfru"])
@pytest.mark.parametrize("slots", [2, 5])
@pytest.mark.parametrize("scope", SCOPES)
def test_counts_what_the_runtime_counts(live, scope, slots, policy):
    budget = 8 * slots * SLOT + SCRATCH
    events = []
    with mixoff.load(BUNDLED, fast_bytes=budget, policy=policy, scope=scope) as model:
        model.mixoff.on_event(lambda e: events.append((e.layer, e.kind)) if e.phase == "decode" else None)
        generate(model)
        info = model.mixoff.info()
    got = simulate(live, policy, slots, scope)
    assert got.evictions > 0
    assert {n: getattr(got, n) for n in COUNTERS} == {n: getattr(info, n) for n in COUNTERS}
    assert got.bytes_moved + got.prompt_bytes_moved == info.bytes_moved
    by_layer = [(x.layer, x.hits, x.misses) for x in got.per_layer]
    assert by_layer == [(i, events.count((i, "hit")), events.count((i, "miss"))) for i in range(8)]


@pytest.mark.parametrize("scope", SCOPES)
def test_prefetch_counts_what_the_runtime_counts(scope):
    """Guesses of the next router, recorded from a run that fetches on them: every count and every byte."""
    budget = (8 * 3 + 2) * SLOT + SCRATCH
    how = {"fast_bytes": budget, "policy": "half-life", "scope": scope, "prefetch": "next-router"}
    with mixoff.load(BUNDLED, **how) as model, model.mixoff.trace() as recorder:
        generate(model)
        info = model.mixoff.info()
    assert info.capacity == 24 and info.prefetch_hits > 0
    got = simulate(recorder.trace, "half-life", 3, scope, prefetch="next-router")
    same = ("prefetches", "prefetch_hits", "prefetch_wasted_bytes", "predictions", "predictions_right")
    assert {n: getattr(got, n) for n in same} == {n: getattr(info, n) for n in same}
    assert {n: getattr(got, n) for n in COUNTERS} == {n: getattr(info, n) for n in COUNTERS}
    assert got.bytes_moved + got.prompt_bytes_moved == info.bytes_moved


def guessed_by_hand(trace, slots, scope, spare, guesses):
    """Guesses fetched and used, with the cache itself and sets; `guesses(c, site, wanted)` names experts."""
    L, r, size = len(trace.layers), trace.requests(), min(slots, trace.num_experts)
    cache, fetched, used = ExpertCache([size] * L if scope == "layer" else [size * L], "lru"), 0, 0
    for c, (site, prompt) in enumerate(zip(r.site.tolist(), r.is_prompt.tolist(), strict=True)):
        wanted = [(site, key % trace.num_experts) for key in r.keys[r.starts[c] : r.starts[c + 1]].tolist()]
        missing = set(wanted) - set(cache.slot_of)
        if site and not prompt:
            taken = [key for key in guesses(c, site, wanted) if key not in cache.slot_of][:spare]
            fetched, used = fetched + len(taken), used + len(missing & set(taken))
        for _ in cache.access(site if scope == "layer" else 0, wanted, prompt):
            pass
    return fetched, used


@settings(max_examples=25, deadline=None)
@given(trace=traces(), slots=st.integers(2, 5), spare=st.integers(0, 3), scope=st.sampled_from(SCOPES))
def test_guesses_are_counted_as_by_hand(trace, slots, spare, scope):
    E = trace.num_experts
    named = np.argsort(np.random.default_rng(1).random((*trace.experts.shape[:2], E)), axis=2)[:, :, :3]
    first = np.r_[True, np.diff(trace.passes) > 0] if len(trace) else np.zeros(0, bool)
    trace = Trace.from_array(trace.experts, E, is_prompt=trace.is_prompt, predicted=named, expert_nbytes=10)
    keys = named[first].reshape(-1, 3)
    got = simulate(trace, "lru", slots, scope, prefetch="next-router", prefetch_nbytes=spare * 10)
    by_hand = guessed_by_hand(trace, slots, scope, spare, lambda c, site, _: [(site, e) for e in keys[c].tolist()])
    assert (got.prefetches, got.prefetch_hits) == by_hand
    plain = simulate(trace, "lru", slots, scope)
    assert (got.hits - got.prefetch_hits, got.evictions) == (plain.hits, plain.evictions), "the cache does not notice"
    oracle = simulate(trace, "lru", slots, scope, prefetch="oracle", prefetch_nbytes=spare * 10)
    assert oracle.prefetches == oracle.prefetch_hits
    assert (oracle.prefetches, oracle.prefetch_hits) == guessed_by_hand(trace, slots, scope, spare, lambda *a: a[2])


def test_predictors_are_what_they_say():
    """16,000 named experts: sigma of the share 0.003, and the seed is fixed."""
    trace = mixoff.trace.routers.preset("mixtral-8x7b").trace(1_000, layers=9)
    guessed = simulate(trace, slots=2, prefetch="recall=0.8", expert_nbytes=10)
    assert guessed.predictions_right / guessed.predictions == pytest.approx(0.8, abs=0.015)
    assert guessed.prefetch_used_bytes + guessed.prefetch_wasted_bytes == 10 * guessed.prefetches
    oracle, popular = (simulate(trace, slots=2, prefetch=name) for name in ("oracle", "popularity"))
    assert 0 < popular.prefetch_hits < oracle.prefetch_hits and popular.prefetches <= 1_000 * 8 * 2
    assert sum(x.misses for x in oracle.per_layer[1:]) == 0 < oracle.per_layer[0].misses
    for prefetch, words in [("next-router", "no guesses"), ("recall=2", "oracle"), ("crystal", "popularity")]:
        with pytest.raises(MixoffError, match=words):
            simulate(trace, prefetch=prefetch)
    with pytest.raises(MixoffError, match="expert_nbytes"):
        simulate(trace, prefetch="oracle", prefetch_nbytes=10)


def test_bundled_traces_and_all_policies_from_the_command_line(tmp_path, capsys):
    for domain in ("novel", "scripture", "spanish", "code", "facts"):
        trace = Trace.load(f"tiny-mixtral/{domain}")
        assert len(trace) >= 2_000 and np.allclose(trace.weights.sum(2), 1, atol=1e-3)
        assert (trace.predicted[:, 0] == -1).all() and simulate(trace, prefetch="next-router").prefetch_hits > 0
    short = Trace.load("tiny-mixtral/facts").select(slice(0, 150)).save(tmp_path / "t.npz")
    command = ["simulate", str(short), "--slots", "3", "--policy", "all"]
    assert main([*command, "--prefetch", "oracle", "--prefetch-nbytes", "1MB", "--json"]) == 0
    results = json.loads(capsys.readouterr().out)["results"]
    assert {r["policy"]: r["gap_closed"] for r in results}["belady"] == 1 and len(results) == len(ALL)
    assert all(r["bytes_moved"] == (r["misses"] + r["prefetches"]) * SLOT for r in results)
    assert main(command) == 0 and "half-life" in capsys.readouterr().out
    assert main(["simulate", "tiny-mixtral/poems"]) == 2 and "tiny-mixtral/novel" in capsys.readouterr().err


def test_recording_and_replay_from_the_command_line(tmp_path, capsys):
    prompt, out = tmp_path / "prompt.txt", tmp_path / "t.npz"
    prompt.write_text("It was a fine morning, and", encoding="utf-8")
    command = [
        "trace",
        str(BUNDLED),
        "--prompt-file",
        str(prompt),
        "--max-new-tokens",
        "9",
        "--out",
        str(out),
        "--fast-bytes",
        "6MB",
        "--prefetch",
        "next-router",
        "--json",
    ]
    assert main(command) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["tokens"] == report["prompt_tokens"] + 8 and report["layers"] == 8 and report["predicted"]
    assert main(["simulate", str(out), "--prefetch", "next-router", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["predictions"] == 8 * 7 * 2
    assert main(["simulate", str(out), "--policy", "belady", "--slots", "3", "--global", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["hits"] + report["misses"] == 8 * 8 * 2 and report["bytes_moved"] == report["misses"] * SLOT
    assert [row.keys() for row in report["per_layer"]] == [{"layer", "hits", "misses"}] * 8


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["no/such.npz"], "no trace at"),
        (["{t}", "--slots", "1"], "give 2"),
        (["{t}", "--policy", "clairvoyant"], "belady"),
        (["{t}", "--expert-nbytes", "many"], "6GiB"),
    ],
)
def test_bad_requests_are_one_line_and_exit_code_2(tmp_path, capsys, arguments, words):
    path = Trace.from_array([[[0, 1]], [[1, 2]]]).save(tmp_path / "t.npz")
    assert main(["simulate", *(a.format(t=path) for a in arguments)]) == 2
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1


def test_what_cannot_be_replayed_is_refused():
    trace = Trace.from_array([[[0, 1]], [[1, 2]]])
    for arguments, error, words in [
        ({"slots": 1}, BudgetError, "2 experts of a token"),
        ({"slots": 2.5}, BudgetError, "whole number"),
        ({"scope": "town"}, MixoffError, "layer, global"),
        ({"policy": "no"}, MixoffError, "least-stale"),
    ]:
        with pytest.raises(error, match=words):
            simulate(trace, **arguments)
    with pytest.raises(MixoffError, match="from_array"):
        simulate(np.zeros((2, 1, 2), int))


def test_a_simulation_shows_itself():
    result = simulate(Trace.from_array([[[0, 1]], [[1, 2]]]), slots=2, expert_nbytes=1024)
    assert repr(result) == "lru, 2 slots per layer: 1 hits, 3 misses (hit rate 0.250), 1 evictions, 3.00 KiB moved"
    assert "<td>3</td>" in result._repr_html_() and result.to_dict()["bytes_moved"] == 3072
    assert simulate(Trace.from_array(np.zeros((0, 1, 2), int))).hit_rate is None
