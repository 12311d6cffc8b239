"""The answers with numbers to the stretches of chapters, computed."""

import math

import pytest

import mixoff
from claims import words
from mixoff.classroom.checks.ch00 import first_in_first_out, lru


@pytest.mark.parametrize("n", [3, 4, 6])
def test_00_requests_that_go_round(n):
    rounds = [[[e]] for _ in range(400) for e in range(n)]
    trace = mixoff.Trace.from_array(rounds, num_experts=n)
    assert mixoff.simulate(trace, "lru", slots=n - 1).hits == 0
    assert mixoff.simulate(trace, "belady", slots=n - 1).hit_rate == pytest.approx((n - 2) / (n - 1), abs=0.01)
    assert first_in_first_out([1, 2, 1, 3, 1, 2], 2) == 1 and lru([1, 2, 1, 3, 1, 2], 2) == 2


def test_01_chance_of_a_repeat():
    assert f"= {1 - math.comb(6, 2) / math.comb(8, 2):.3f}: one minus" in words("01")


def test_02_tokens_whose_cache_equals_attention():
    assert f"{1_342_177_280 * 4.25 / 8 / 131_072:,.0f} tokens" in words("02")


def test_06_one_slot_less_than_a_round_never_hits():
    assert lru(list(range(64)) * 20, 63) == 0 < lru(list(range(64)) * 20, 64)


def test_15_hit_rate_for_twenty_milliseconds():
    ms = 64 * 66.4e6 / 12e9 * 1000
    assert f"would take {ms:.0f} ms, so at most 20 / {ms:.0f} may miss: {1 - 20 / ms:.2f}" in words("15")
    assert 13_112_374_272 // 66_404_420 == 197 and 197 // 32 * 32 == 192
