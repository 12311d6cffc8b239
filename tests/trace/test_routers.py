"""Synthetic routers: fitted to what was reported, and uniform where nothing is slow."""

import numpy as np
import pytest

from mixoff import MixoffError, Trace
from mixoff.trace import simulate
from mixoff.trace.routers import GLM_5_2_RATES, MIXTRAL_REPEATS, PRESETS, QWEN3_235B_RATES, SAMPLE, WARM, Router, preset

SHARES = {"qwen3-235b": QWEN3_235B_RATES, "glm-5.2": GLM_5_2_RATES}


@pytest.mark.parametrize("name", sorted(SHARES))
def test_presets_have_the_reported_hit_rates(name):
    router = preset(name)
    assert router.rmse({router.num_experts * share: rate for share, rate in SHARES[name].items()}) < 0.04


@pytest.mark.parametrize("layer", sorted(MIXTRAL_REPEATS))
def test_mixtral_repeats_as_its_table_5_says(layer):
    """12,000 pairs of one layer: sigma 0.004 to 0.01, as neighbours are alike."""
    rates = preset("mixtral-8x7b").trace(12_000).repeat_rates()[layer]
    assert np.sqrt(np.mean((rates - MIXTRAL_REPEATS[layer]) ** 2)) < 0.04


def test_fitting_gives_the_presets_again():
    found = Router.fit(8, 2, repeats=MIXTRAL_REPEATS[15])
    mixtral = preset("mixtral-8x7b")
    assert (found.weight, found.rho, found.peak) == (mixtral.weight[1], mixtral.rho, mixtral.peak[1])


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(SHARES))
def test_fitting_hit_rates_gives_the_presets_again(name):
    given = preset(name)
    wanted = {given.num_experts * share: rate for share, rate in SHARES[name].items()}
    assert Router.fit(given.num_experts, given.top_k, hit_rates=wanted, layers=given.layers) == given


@pytest.mark.slow
def test_a_fit_finds_the_router_behind_a_curve():
    """Weight and rho move the curve alike, so the curve is what must come back."""
    truth = Router(8, 2, 0.6, 0.99)
    curve = {s: truth.hit_rate(s) for s in (2, 4, 6)}
    assert Router.fit(8, 2, hit_rates=curve).rmse(curve) < 0.01


def test_uniform_routing_hits_slots_of_experts():
    """77,000 requests: sigma of a share below 0.002, and the seed is fixed."""
    for slots in (2, 4, 6):
        assert preset("uniform").hit_rate(slots) == pytest.approx(slots / 8, abs=0.01)


def test_hit_rates_are_those_of_the_simulator():
    """Two programs, one question; the simulator's cold start is taken off by counting it apart."""
    router = Router(8, 2, 1.0, 0.95, layers=3)
    trace = router.trace(SAMPLE)
    warm = trace.select(slice(0, WARM))
    for slots in (2, 5, 8):
        whole, start = simulate.simulate(trace, slots=slots), simulate.simulate(warm, slots=slots)
        hits, asked = whole.hits - start.hits, (SAMPLE - WARM) * 3 * 2
        assert router.hit_rate(slots) == pytest.approx(hits / asked, abs=1e-12)


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_traces_are_traces_and_their_beginning_does_not_depend_on_their_length(name):
    long, short = preset(name).trace(300, layers=2, seed=5), preset(name).trace(260, layers=2, seed=5)
    assert isinstance(long, Trace) and np.array_equal(long.experts[:260], short.experts)
    assert np.allclose(long.weights.sum(2), 1) and (np.diff(long.weights, axis=2) <= 0).all()
    assert not np.array_equal(preset(name).trace(260, layers=2, seed=6).experts, short.experts)
    assert len(preset(name).trace(0, layers=2)) == 0


def test_what_is_no_router_is_refused():
    for numbers, words in [((8, 9, 1.0, 0.9), "top_k"), ((8, 2, -1.0, 0.9), "weight"), ((8, 2, 1.0, 1.0), "rho")]:
        with pytest.raises(MixoffError, match=words):
            Router(*numbers)
    with pytest.raises(MixoffError, match="either"):
        Router.fit(8, 2)
    with pytest.raises(MixoffError, match="mixtral-8x7b"):
        preset("gpt")
