"""The sums behind the map of engines, and the map's still twin."""

import math
from dataclasses import replace

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import pytest

from mixoff.classroom.engines import WAYS, Machine, Workload, best, seconds, workload
from mixoff.errors import MixoffError
from mixoff.shapes.sizes import sizes_of
from mixoff.store import describe
from mixoff.trace.routers import preset
from mixoff.widgets import EngineMap

COLAB = Machine(vram=15.8e9, ram=11e9, vram_Bps=320e9, ram_Bps=10e9, link_Bps=12e9, disk_Bps=0.5e9)
DESKTOP = replace(COLAB, ram_Bps=50e9)


@pytest.fixture(scope="module")
def mixtral():
    sizes = sizes_of(describe.shape_of("mistralai/Mixtral-8x7B-Instruct-v0.1"), "quality")
    return workload(sizes, preset("mixtral-8x7b"))


def test_sizes_are_those_of_the_plan(mixtral):
    assert mixtral.token_experts == pytest.approx(mixtral.experts / 4)
    assert mixtral.hits(0) == 0 and mixtral.hits(1) == 1 and 0.5 < mixtral.hits(0.5) < 0.65


def test_two_slow_cores_copy_and_eight_fast_ones_compute(mixtral):
    assert best(mixtral, COLAB)[0] == "copied" and best(mixtral, DESKTOP)[0] == "split"
    for machine in (COLAB, DESKTOP):
        assert best(mixtral, replace(machine, vram=32e9))[0] == "card"
        assert best(mixtral, replace(machine, vram=0, ram=64e9))[0] == "ram"
        assert best(mixtral, replace(machine, vram=0, ram=1e9)) == ("none", math.inf)


def test_copying_and_computing_break_even_where_the_formula_says(mixtral):
    share = (COLAB.vram - mixtral.backbone) / mixtral.experts
    hit = mixtral.hits(share)
    link = (1 - hit) / ((1 - share) * (1 / DESKTOP.ram_Bps - 1 / DESKTOP.vram_Bps))
    found = seconds(mixtral, replace(DESKTOP, link_Bps=link, ram=64e9))
    assert found["split"] == pytest.approx(found["copied"])


def test_more_memory_or_bandwidth_never_slows_a_way_down(mixtral):
    for name in ("vram", "ram", "vram_Bps", "ram_Bps", "link_Bps", "disk_Bps"):
        for factor in (1.1, 2, 4):
            before, after = (
                seconds(mixtral, on) for on in (COLAB, replace(COLAB, **{name: factor * getattr(COLAB, name)}))
            )
            assert all(after[way] <= before[way] * (1 + 1e-12) for way in WAYS), (name, factor)


def test_the_map_says_what_it_shows(mixtral):
    shown = EngineMap({"Mixtral": mixtral}, COLAB)
    assert (
        shown.summary()
        == f"experts copied to the card, and cached, at most {1 / best(mixtral, COLAB)[1]:.1f} tokens/s (modelled)"
    )
    assert repr(shown) == "EngineMap(Mixtral)"
    letters = {text.get_text() for text in shown.figure().axes[0].texts}
    assert letters == {"W", "C", "R"}
    plt.close("all")
    with pytest.raises(MixoffError, match="give workloads by name"):
        EngineMap({}, COLAB)
    assert EngineMap({"tiny": Workload(1e12, 1e12, 1, 1, (0.0, 1.0))}, COLAB).summary() == "it does not run there"
