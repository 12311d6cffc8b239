"""The learner's policy on recorded routing: the simulator's LRU is the oracle."""

import pytest

import mixoff
from mixoff.classroom import leaderboard
from mixoff.trace.routers import preset


def oldest(ages, uses):
    return max(ages, key=ages.get)


@pytest.mark.parametrize("slots", [2, 3, 4, 7])
def test_the_oldest_is_lru(slots):
    trace = preset("mixtral-8x7b").trace(200, layers=4)
    assert leaderboard.misses(trace, oldest, slots) == mixoff.simulate(trace, "lru", slots=slots).misses
    assert leaderboard.gap_share([trace], oldest, 4) == 0


def test_no_victim_beats_the_optimum():
    trace = preset("mixtral-8x7b").trace(200, layers=4)
    for victim in (oldest, lambda ages, uses: min(uses, key=uses.get), lambda ages, uses: min(ages)):
        assert leaderboard.misses(trace, victim, 4) >= mixoff.simulate(trace, "belady", slots=4).misses


def test_an_expert_that_is_no_candidate_is_refused():
    trace = mixoff.Trace.from_array([[[0, 1]], [[2, 3]]], num_experts=8)
    with pytest.raises(ValueError, match=r"victim named 9, the candidates are \[0, 1\]: return one of them"):
        leaderboard.misses(trace, lambda ages, uses: 9, 2)
