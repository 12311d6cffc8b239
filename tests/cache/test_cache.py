"""One contract for every policy, and a plain model of LRU as oracle."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mixoff import BudgetError, MixoffError
from mixoff.cache.cache import ExpertCache
from mixoff.cache.events import BYPASS, HIT, MISS, RESTORE
from mixoff.cache.policies import POLICIES

TRACES = st.lists(st.lists(st.integers(0, 7), min_size=1, max_size=4, unique=True), min_size=1, max_size=60)


def play(cache, calls, prompt=False):
    """All grants of a list of calls, with what every slot holds checked at each step."""
    held, grants = {}, []
    for keys in calls:
        for grant in cache.access(0, keys, prompt):
            if grant.kind == HIT:
                assert held[grant.slot] == grant.key, "a hit must find its expert's bytes"
            held[grant.slot] = grant.key
            grants.append(grant)
    return grants


@pytest.mark.parametrize("policy", sorted(POLICIES))
@given(calls=TRACES, slots=st.integers(1, 9), prompts=st.lists(st.booleans(), min_size=60, max_size=60))
def test_contract(policy, calls, slots, prompts):
    """Every key is granted once, residents first; no slot is ever read with another expert's bytes; counts add up."""
    cache, held = ExpertCache([slots], policy), {}
    for keys, prompt in zip(calls, prompts, strict=False):
        resident = set(cache.slot_of)
        asked = []
        for grant in cache.access(0, keys, prompt):
            assert grant.slot in range(slots)
            if grant.kind == HIT:
                assert held[grant.slot] == grant.key
            held[grant.slot] = grant.key
            if grant.kind != RESTORE:
                asked.append(grant)
        assert sorted(g.key for g in asked) == sorted(keys)
        kinds = [g.kind == HIT for g in asked]
        assert kinds == sorted(kinds, reverse=True), "residents first"
        assert {g.key for g in asked if g.kind == HIT} == resident & set(keys)
        assert all(held[slot] == key for key, slot in cache.slot_of.items())
        assert len(set(cache.slot_of.values())) == len(cache.slot_of) <= slots
        if prompt:
            assert resident <= set(cache.slot_of), "a prompt evicts nothing"
        elif len(keys) <= slots:
            assert set(keys) <= set(cache.slot_of), "what a token used stays until the next one"
    asked_for = sum(map(len, calls))
    assert cache.hits + cache.misses + cache.prompt_hits + cache.prompt_misses == asked_for
    assert len(cache.slot_of) >= cache.misses - cache.evictions


@given(calls=TRACES, slots=st.integers(4, 8))
def test_lru_is_lru(calls, slots):
    """Against a list that is reordered by hand: hits, and what is left, for calls that fit the slots."""
    cache, recent, hits = ExpertCache([slots]), [], 0
    play(cache, calls)
    for keys in calls:
        hits += len(set(keys) & set(recent))
        for key in [k for k in keys if k not in recent]:
            if len(recent) == slots:
                recent.remove(next(k for k in recent if k not in keys))
            recent.append(key)
        recent = [k for k in recent if k not in keys] + keys
    assert (cache.hits, set(cache.slot_of)) == (hits, set(recent))


@given(calls=TRACES)
def test_more_slots_never_hit_less(calls):
    hits = []
    for slots in range(4, 9):
        cache = ExpertCache([slots])
        play(cache, calls)
        hits.append(cache.hits)
    assert hits == sorted(hits)


def test_waves_serve_more_keys_than_slots():
    cache = ExpertCache([2])
    kinds = [(g.key, g.kind) for g in play(cache, [[1, 2], [1, 3, 2, 4, 5]])]
    assert kinds == [(1, MISS), (2, MISS), (1, HIT), (2, HIT), (3, MISS), (4, MISS), (5, MISS)]
    assert cache.evictions == 3


def test_a_prompt_fills_free_slots_and_streams_the_rest_through_one_of_them():
    cache = ExpertCache([2])
    kinds = [(g.key, g.kind) for g in play(cache, [[5, 6, 7, 8]], prompt=True)]
    assert kinds == [(7, BYPASS), (8, BYPASS), (5, MISS), (6, MISS)]
    assert set(cache.slot_of) == {5, 6}
    assert (cache.prompt_misses, cache.misses, cache.evictions) == (4, 0, 0)


def test_a_prompt_past_a_full_pool_borrows_one_slot_and_gives_it_back():
    cache = ExpertCache([2])
    play(cache, [[1], [2]])
    kinds = [(g.key, g.kind) for g in cache.access(0, [2, 3, 4], prompt=True) if g.kind != HIT]
    assert kinds == [(3, BYPASS), (4, BYPASS), (1, RESTORE)]
    assert set(cache.slot_of) == {1, 2} and cache.restores == 1
    assert [g.evicted for g in cache.access(0, [9])] == [1], "recency is what decoding left"


@pytest.mark.parametrize(("before", "prompt"), [([], False), ([[1], [2]], False), ([[1], [2]], True)])
def test_a_failed_fill_leaves_a_free_slot_and_no_wrong_one(before, prompt):
    cache = ExpertCache([2])
    play(cache, before)
    grants = cache.access(0, [7], prompt)
    grant = next(grants)
    grants.close()
    assert 7 not in cache.slot_of and grant.slot not in cache.slot_of.values()
    assert [g.kind for g in cache.access(0, [7])] == [MISS], "the slot can be used again"
    assert len(cache.slot_of) + len(cache.pools[0].free) == 2


def test_pools_do_not_share_slots():
    cache = ExpertCache([1, 2])
    slots = {g.slot for g in [*cache.access(0, ["a"]), *cache.access(1, ["b", "c"])]}
    assert slots == {0, 1, 2} == set(range(cache.capacity))


def test_unknown_policy_and_empty_pools_are_refused():
    with pytest.raises(MixoffError, match="lru"):
        ExpertCache([1], "clairvoyant")
    with pytest.raises(BudgetError, match="at least one slot"):
        ExpertCache([2, 0])
