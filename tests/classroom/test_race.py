"""The race's arithmetic: misses as the simulator counts them, times as the time model has them."""

import matplotlib
import numpy as np
import pytest
from transformers import MixtralConfig

matplotlib.use("Agg")

import mixoff
from mixoff import models
from mixoff.planning import probe, speed
from mixoff.store.describe import shape_of
from mixoff.widgets import Race, optimum, race


@pytest.fixture(scope="module")
def shape():
    return shape_of(MixtralConfig())


@pytest.fixture(scope="module")
def recorded():
    """A run of a prompt of 13 tokens and 40 decoded ones."""
    trace = mixoff.trace.load_domains(models.path() / "traces.npz")["spanish"].select(np.arange(53))
    return mixoff.Trace.from_array(trace.experts, 8, is_prompt=np.arange(53) < 13)


@pytest.mark.parametrize("policy", ["lru", "belady"])
@pytest.mark.parametrize("slots", [2, 4, 7])
def test_misses_are_those_of_the_simulator(recorded, policy, slots):
    rule = optimum.for_pools(race.future(recorded)) if policy == "belady" else policy
    misses = race.misses_of(recorded, slots, rule)
    counted = mixoff.simulate(recorded, policy, slots=slots)
    assert misses.shape == (40, 8) and misses.sum() == counted.misses > 0
    if policy == "lru":
        assert misses.sum(0).tolist() == [layer.misses for layer in counted.per_layer]


@pytest.mark.parametrize("scheme", ["mixed", "quality"])
@pytest.mark.parametrize("rate", [0.0, 1.0])
def test_times_without_hits_and_without_misses_are_the_time_models(shape, scheme, rate):
    machine = probe.named("t4")
    clock = race.Clock.of(shape, scheme, machine)
    misses = np.full((1, 8), round(2 * (1 - rate)))
    (seconds,) = np.add(clock.waiting_s(misses), clock.computing_s(misses, resident=rate == 1))
    assert seconds == pytest.approx(speed.predict(shape, scheme, machine, rate).seconds, abs=2e-5)


def test_a_miss_waits_for_its_copy_while_the_resident_is_computed():
    clock = race.Clock(lambda rate: 2 - rate, layers=4, top_k=2, fetch_s=5.0, expert_s=0.5)
    misses = np.array([[0, 0], [1, 0], [2, 1]])
    assert clock.waiting_s(misses) == [0.0, 2 * 4.5, 2 * (10 + 4.5)]
    assert clock.computing_s(misses) == [1.0, 1.25, 1.75]


def test_only_a_card_with_every_expert_replays_a_token_as_one_graph(shape):
    """A token without a miss still costs the host its calls where some experts are away."""
    clock, none = race.Clock.of(shape, "small", probe.named("h100")), np.zeros((1, 8), int)
    assert clock.computing_s(none)[0] > clock.computing_s(none, resident=True)[0]


def test_lanes_finish_in_order_and_say_what_they_are(shape, recorded):
    contest = Race(recorded, ["x"] * 40, shape=shape)
    rates = [lane.tokens_per_s for lane in contest.lanes]
    assert rates == sorted(rates) and [sum(lane.misses) for lane in contest.lanes][::3] == [640, 0]
    assert contest.summary().count("hit rate") == 4 and "modelled" in contest.summary()
    assert contest.about.startswith("Modelled: ") and "each of which represents 4" in contest.about
    assert repr(contest) == "Race(40 tokens, without a cache, LRU, best possible, all resident)"
    assert len(contest.figure().axes[0].lines) == 4
    matplotlib.pyplot.close("all")


def test_words_and_models_that_do_not_belong_to_the_trace_are_refused(shape, recorded):
    with pytest.raises(mixoff.MixoffError, match="39 words for 40 decoded tokens"):
        Race(recorded, ["x"] * 39, shape=shape)
    with pytest.raises(mixoff.MixoffError, match="asks for 2 experts per token, the model for 8"):
        Race(recorded, ["x"] * 40, shape="allenai/OLMoE-1B-7B-0924")
