"""The race in Chromium: four panes type at the speeds that Python computed, and stop when told."""

import numpy as np
import pytest
from transformers import MixtralConfig

import mixoff
from mixoff import models
from mixoff.widgets import Race
from widget_page import contrasts, slide, told

pytestmark = pytest.mark.e2e
ROOT = ".mixoff-race"
T = 40


@pytest.fixture(scope="module")
def race():
    trace = mixoff.trace.load_domains(models.path() / "traces.npz")["novel"].select(np.arange(T))
    return Race(trace, [f" w{t}" for t in range(T)], "Lead:", shape=MixtralConfig())


def typed(page):
    return [int(n) for n in page.locator(".pane").evaluate_all("es => es.map(e => e.dataset.typed)")]


@pytest.mark.parametrize("ms", [0, 1500, 5000, 600_000])
def test_each_pane_has_typed_what_its_times_say(mount, race, ms):
    page = mount(race)
    slide(page, ".scrub", ms)
    seconds = min(ms, int(page.locator(".scrub").get_attribute("max"))) / 1000
    expected = [int((np.cumsum(lane.seconds) <= seconds + 1e-9).sum()) for lane in race.lanes]
    assert typed(page) == expected
    texts = page.locator(".typed").all_inner_texts()
    assert texts == ["Lead:" + "".join(f" w{t}" for t in range(n)) for n in expected]
    assert page.complaints == []


def test_speeds_and_the_end_are_told_in_words(mount, race):
    page = mount(race)
    heads = page.locator("h4").all_inner_texts()
    assert [f"{lane.tokens_per_s:.1f} tokens/s" in head for lane, head in zip(race.lanes, heads, strict=True)] == [
        True
    ] * 4
    assert all("modelled" in head for head in heads)
    slide(page, ".scrub", 600_000)
    ends = [f"{lane.name} {sum(lane.seconds):.1f} s" for lane in reversed(race.lanes)]
    assert page.locator(".result").inner_text().startswith(", ".join(ends) + " (modelled)")
    assert page.locator(".pane.done").count() == 4


@pytest.mark.parametrize("still", [False, True])
def test_the_clock_runs_pauses_and_starts_over_by_keyboard(mount, race, still):
    page = mount(race, still=still)
    page.get_by_role("combobox", name="speed").select_option("4")
    page.get_by_role("button", name="Start the race").focus()
    page.keyboard.press("Enter")
    page.wait_for_function("() => Number(document.querySelector('.mixoff-race').dataset.clock) > 1000")
    page.keyboard.press("Space")
    stopped = told(page, ROOT)
    assert stopped["playing"] == "false"
    page.wait_for_timeout(300)
    assert told(page, ROOT)["clock"] == stopped["clock"]
    page.get_by_role("slider", name="time").focus()
    page.keyboard.press("ArrowLeft")
    assert int(told(page, ROOT)["clock"]) < int(stopped["clock"])
    page.get_by_role("button", name="Start over").click()
    assert typed(page) == [0, 0, 0, 0] and page.complaints == []


def test_it_does_not_start_by_itself_and_ends_by_itself(mount, race):
    page = mount(race)
    page.wait_for_timeout(300)
    assert told(page, ROOT)["clock"] == "0"
    slide(page, ".scrub", int(page.locator(".scrub").get_attribute("max")) - 200)
    page.locator(".play").click()
    page.wait_for_function("() => document.querySelector('.mixoff-race').dataset.playing === 'false'")
    assert typed(page) == [T] * 4


@pytest.mark.parametrize("dark", [False, True])
def test_marks_stand_out_and_nothing_is_wider_than_a_telephone(mount, race, dark):
    page = mount(race, dark=dark, width=390)
    found = contrasts(page, ROOT)
    assert {"hit", "miss"} <= set(found) and {name: x for name, x in found.items() if x < 3} == {}
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
