"""The map of engines in Chromium: its sums are Python's, for every dial, by mouse and by keyboard."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest

from mixoff.classroom.engines import Machine, Workload, best, seconds
from mixoff.widgets import EngineMap
from mixoff.widgets.engine_map import GB, RAM, VRAM

pytestmark = pytest.mark.e2e
RATES = (0.0, 0.138, 0.328, 0.454, 0.579, 0.693, 0.8, 0.901, 1.0)
MODELS = {"large": Workload(1.5e9, 24e9, 0.98e9, 6e9, RATES), "small": Workload(1e9, 16e9, 0.9e9, 1e9, (0.0, 0.6, 1.0))}
HERE = Machine(16e9, 12e9, 320e9, 10e9, 12e9, 0.5e9)


def said(page):
    return page.locator(".mixoff-engines").evaluate("e => ({...e.dataset})")


def counted(of, on):
    ways = [best(of, replace(on, vram=v * GB, ram=r * GB))[0] for v in VRAM for r in RAM]
    return {way: ways.count(way) for way in set(ways)}


@pytest.mark.parametrize("dark", [False, True])
def test_the_page_computes_what_python_computes(mount, dark):
    page = mount(EngineMap(MODELS, HERE), dark)
    on = HERE
    for name, value in (("ram_Bps", 50), ("link_Bps", 25), ("disk_Bps", 3.1), ("vram_Bps", 900)):
        page.locator(f"input[name={name}]").evaluate(
            "(e, v) => { e.value = v; e.dispatchEvent(new Event('input')); }", value
        )
        on = replace(on, **{name: value * GB})
        assert json.loads(said(page)["counts"]) == counted(MODELS["large"], on)
    found = json.loads(said(page)["found"])
    for way, s in seconds(MODELS["large"], on).items():
        assert found[way] is None if s == math.inf else found[way] == pytest.approx(s)  # JSON has no infinity
    page.locator("select").select_option("small")
    assert json.loads(said(page)["counts"]) == counted(MODELS["small"], on)
    assert page.complaints == []


def test_the_mark_moves_by_keys_and_by_a_click(mount):
    page = mount(EngineMap(MODELS, HERE))
    assert (said(page)["vram"], said(page)["ram"]) == ("16", "12")
    page.locator("table").focus()
    for key in ("ArrowUp", "ArrowRight", "ArrowRight", "ArrowDown", "ArrowDown"):
        page.keyboard.press(key)
    assert (said(page)["vram"], said(page)["ram"]) == ("14", "20")
    page.locator("td").first.click()
    assert (said(page)["vram"], said(page)["ram"]) == ("32", "4") and said(page)["way"] == "card"
    page.keyboard.press("ArrowUp")  # the edge
    assert said(page)["vram"] == "32"
    assert "32 GB of VRAM and 4 GB of RAM: whole on the card" in page.locator(".said").inner_text()


def test_letters_stand_out_from_their_cells_and_the_map_fits_a_phone(mount):
    page = mount(EngineMap(MODELS, HERE))
    page.set_viewport_size({"width": 390, "height": 800})
    pairs = page.locator("td").evaluate_all("cells => cells.map(c => [getComputedStyle(c).color, c.style.background])")
    for ink, paper in {tuple(pair) for pair in pairs}:
        light, deep = sorted((luminance(ink), luminance(paper)), reverse=True)
        assert (light + 0.05) / (deep + 0.05) >= 7
    assert page.evaluate("document.documentElement.scrollWidth") <= 390


def luminance(colour):
    parts = np.array([int(part) for part in colour[4:-1].split(",")]) / 255
    return float(np.where(parts <= 0.03928, parts / 12.92, ((parts + 0.055) / 1.055) ** 2.4) @ [0.2126, 0.7152, 0.0722])
