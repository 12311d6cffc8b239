"""What chapter 12 says of batches, balance and schedules, computed."""

import re

import numpy as np
import pytest

import mixoff
from claims import traces, words
from mixoff.store import describe
from mixoff.trace.batches import Job, schedule, trace_of

SAYS = words("12")


def touched(E, K, T):
    return E * (1 - (1 - K / E) ** T)


def shares():
    return {name: trace.counts() / trace.tokens for name, trace in traces().items()}


def test_a_mixed_batch_misses_more_and_says_the_same():
    """The first figures of the chapter, from the runtime."""
    found = dict(re.findall(r"(one by one|five at once) +\d+ passes, ([\d.]+) misses", SAYS))
    assert float(found["five at once"]) > 1.2 * float(found["one by one"]) and "same texts: True" in SAYS
    alike = dict(re.findall(r"one subject, (\d) at once: ([\d.]+) misses", SAYS))
    assert float(alike["5"]) < float(alike["1"])


def test_sixteen_tokens_touch():
    one = [(1 - (1 - p) ** 16).sum(1).mean() for p in shares().values()]
    five = (1 - (1 - np.mean(list(shares().values()), axis=0)) ** 16).sum(1).mean()
    assert f"touch {touched(8, 2, 16):.1f} of 8 experts by dice, {five:.1f} on five subjects" in SAYS
    assert f"{min(one):.1f} to {max(one):.1f} on one" in SAYS
    assert f"= {touched(256, 8, 32):.0f}. Sixty-four per cent" in SAYS and round(100 * touched(256, 8, 32) / 256) == 64


def test_ridge_points_of_a_t4():
    assert round(65e12 / 320e9) == 203 and round(65e12 / 320e9 * 4) == 812
    assert "ridge point is at 203" in SAYS and "812 instead of 203" in SAYS and "again the same from 812" in SAYS
    assert touched(8, 2, 32) / 2 == pytest.approx(4, abs=0.01) and "takes 4.0 times as long as the dense one" in SAYS


def test_qwen3_wants_larger_batches():
    found = touched(128, 8, 16)
    assert f"= {found:.0f} experts, with {16 * 8 / found:.1f} tokens each" in SAYS
    assert f"= {65e12 / 320e9 * 16:,.0f} tokens away" in SAYS


def test_a_preference_does_not_even_out():
    """In the limit of large batches; chance is gone there."""
    peak = {name: (4 * p.max(1)).mean() for name, p in shares().items()}
    assert "about 2.8 times the mean" in SAYS and round(peak["novel"], 1) == 2.8
    assert min(peak.values()) > 2.8 and (4 * np.mean(list(shares().values()), axis=0).max(1)).mean() < 1.5


def test_capacity_drops_three_in_ten_on_one_subject():
    share = float(re.search(r"one subject \(novel\) +factor 1.0: [\d.]+%, factor 1.25: ([\d.]+)%", SAYS)[1])
    assert 27 < share < 33 and "lose three requests in ten" in SAYS


def test_routers_collapse_without_balance():
    without, balanced = re.search(r"without balance ([\d ]+) - with balance ([\d ]+?) ", SAYS).groups()
    assert max(map(int, without.split())) < 8 and set(balanced.split()) == {"8"}


@pytest.mark.parametrize("draw", range(20, 26))
def test_four_unlike_sequences_are_worse_than_none(draw):
    """On other draws than the chapter's, each of them alone: a batch of four subjects, one, and a single sequence."""
    names, random = list(traces()), np.random.default_rng(draw)

    def misses(chosen):
        starts = random.integers(0, 1900, len(chosen))
        pieces = [traces()[name].select(np.arange(at, at + 100)) for name, at in zip(chosen, starts, strict=True)]
        trace = trace_of(schedule([Job(1, 100)] * len(chosen), len(chosen)), pieces)
        return mixoff.simulate(trace, slots=4).misses / (99 * len(chosen))

    alone = np.mean([misses([name]) for name in names])
    alike = np.mean([misses([name] * 4) for name in names])
    assert alike < alone < misses(names[:4]) and misses([names[i % 5] for i in range(32)]) < alone / 2


def test_what_mixtral_reads_for_thirty_two():
    mixtral = describe.shape_of("mistralai/Mixtral-8x7B-Instruct-v0.1")
    experts = (mixtral.total - mixtral.active) * 8 / 6
    backbone = mixtral.total - experts
    one, many = (backbone + experts * touched(8, 2, n) / 8 for n in (1, 32))
    assert one == pytest.approx(mixtral.active)
    assert f"reads {many / one:.1f} times as much, a token {32 * one / many:.1f} times less" in SAYS
    assert f"{100 * one / mixtral.total:.0f} % of it" in SAYS


def test_steps_of_the_three_schedules():
    found = re.search(r"(\d+) steps continuously, (\d+) if a batch waits for its last row, (\d+) with prompts", SAYS)
    continuous, static, chunks = map(int, found.groups())
    assert continuous < chunks < static
