"""CacheView in Chromium, without Jupyter: what Python counted is what the page says, and everything can be driven."""

import base64

import numpy as np
import pytest

import mixoff
from mixoff import models
from mixoff.widgets import CacheView
from widget_page import contrasts, slide, told

pytestmark = pytest.mark.e2e
ROOT = ".mixoff-cache"


@pytest.fixture(scope="module")
def novel():
    trace = mixoff.trace.load_domains(models.path() / "traces.npz")["novel"]
    return trace.select(np.arange(60))


@pytest.fixture
def replay(mount, novel):
    """A function that shows a replay of 60 words."""
    words = [f" w{t}" for t in range(60)]
    return lambda **how: mount(CacheView.replay(novel, slots=how.pop("slots", 4), words=words), **how)


def figures(page):
    return {name: int(value) for name, value in told(page, ROOT).items() if value.isdigit()}


def misses(novel, slots=4):
    """Misses up to each token, by the simulator."""
    return [mixoff.simulate(novel.select(np.arange(t + 1)), slots=slots).misses for t in range(novel.tokens)]


def test_replay_shows_what_the_simulator_counts(replay, novel):
    page = replay()
    for token in (0, 1, 30, 59):
        slide(page, ".scrub", token)
        counted = mixoff.simulate(novel.select(np.arange(token + 1)), slots=4)
        shown = figures(page)
        assert (shown["token"], shown["hits"], shown["misses"]) == (token, counted.hits, counted.misses)
        assert shown["resident"] == counted.misses - counted.evictions
        assert page.locator(".words .now").inner_text().strip() == f"w{token}"
    assert shown["tokens"] == 60 and page.complaints == []


def test_replay_plays_steps_and_obeys_the_keyboard(replay):
    page = replay(slots=3)
    page.locator(".step").click()
    page.locator(".step").click()
    page.locator(".back").click()
    assert figures(page)["token"] == 1
    page.locator(".scrub").focus()
    page.keyboard.press("ArrowRight")
    assert figures(page)["token"] == 2
    page.locator(".words .now").focus()
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    assert figures(page)["token"] == 4 and page.evaluate("document.activeElement.textContent") == " w4"
    page.locator(".speed").select_option("30")
    slide(page, ".scrub", 55)
    page.locator(".play").focus()
    page.keyboard.press("Enter")
    page.wait_for_function("() => document.querySelector('.mixoff-cache').dataset.token === '59'", timeout=5000)
    page.wait_for_function("() => document.querySelector('.play').textContent === 'Play'", timeout=5000)
    assert page.locator(".step").is_disabled() and page.complaints == []


def test_words_and_bars_lead_to_their_token_and_tell_its_misses(replay, novel):
    page, upto = replay(), misses(novel)
    page.locator(".words span", has_text="w17").click()
    assert figures(page)["token"] == 17
    each = np.diff([0, *upto])
    heats = page.locator(".words span").evaluate_all("es => es.map(e => Number(e.style.getPropertyValue('--heat')))")
    np.testing.assert_allclose(heats, each / each.max(), atol=1e-3)
    lines = page.locator(".words span").evaluate_all(
        "es => es.map(e => parseFloat(getComputedStyle(e).borderBottomWidth))"
    )
    assert lines[each.argmax()] >= 5 > lines[each.argmin()], "a word with more misses has the thicker line"
    assert page.locator(".words span").nth(17).get_attribute("title") == f"{each[17]} misses of 16 requests"
    box = page.locator(".chart").bounding_box()
    step = min(16, box["width"] / 60)
    page.locator(".chart").click(position={"x": 40.5 * step, "y": 30})
    assert figures(page)["token"] == 40


PIXEL = """([x, y]) => { const c = document.querySelector('.chart'), s = window.devicePixelRatio || 1;
    const seen = c.getContext('2d').getImageData(Math.round(x * s), Math.round(y * s), 1, 1).data;
    return [...seen].slice(0, 3).join(); }"""


def test_a_bar_is_as_high_as_its_tokens_misses(replay, novel):
    page, each = replay(), np.diff([0, *misses(novel)])
    step = min(16, page.locator(".chart").bounding_box()["width"] / 60)
    miss, hit = "213,94,0", "0,114,178"
    for token in (0, 5, 59):
        high = 56 * each[token] / 16  # of 64 px, 8 are margins
        x = (token + 0.4) * step
        if each[token]:
            assert page.evaluate(PIXEL, [x, 60 - high / 2]) == miss
        if each[token] < 16:
            assert page.evaluate(PIXEL, [x, (4 + 60 - high) / 2]) == hit


def test_missing_experts_fly_over_the_link_unless_the_reader_wants_no_motion(replay, novel):
    page, each = replay(), np.diff([0, *misses(novel)])
    for _ in range(3):
        page.locator(".step").click()
    page.wait_for_function(f"() => document.querySelector('.mixoff-cache').dataset.flown === '{each[1:4].sum()}'")
    assert figures(page)["linkPx"] == 48, "12 GB/s, 4 px for each"
    page = replay(still=True)
    page.locator(".step").click()
    page.wait_for_timeout(300)
    assert figures(page).get("flown", 0) == 0, "nothing moves"


def test_an_expert_tells_its_history_to_pointer_and_keyboard(replay, novel):
    page = replay()
    slide(page, ".scrub", 20)
    page.locator(".board").focus()
    page.keyboard.press("ArrowRight")  # to the first expert
    for key in ("ArrowRight", "ArrowRight", "ArrowDown"):
        page.keyboard.press(key)
    asked = (novel.experts[:, 1] == 2).any(1).sum()
    told_by_keys = page.locator(".told").inner_text()
    assert told_by_keys.startswith("Layer 1, expert 2:") and f"Of 60 tokens {asked} asked for it" in told_by_keys
    assert page.locator(".past").is_visible()
    page.locator(".board").blur()
    assert page.locator(".past").is_hidden()
    side = 34
    page.locator(".board").hover(position={"x": 50 + 2.5 * side, "y": 22 + 44 + 18 + 1.5 * side})
    assert page.locator(".told").inner_text() == told_by_keys


def test_live_frames_are_drawn_as_they_come(mount):
    page = mount(CacheView(layers=[0, 1], experts=3))
    frame = {"token": 7, "stats": [3, 1, 2048, 4], "cells": "AQIDBAUA", "words": ["so", " it", " goes"]}
    frame |= {"counts": [[0, 0], [1, 1], [2, 0]], "lead": "", "prompt": [2, 512]}
    page.evaluate("frame => window.model.set('live', frame)", frame)
    shown = figures(page)
    assert {"token": 7, "hits": 3, "misses": 1, "resident": 4, "bytes": 2048}.items() <= shown.items()
    assert shown["paints"] == 1
    expected = "token 7: hit rate 0.750, 3 hits, 1 misses, 4 of 6 experts resident, 2.0 KiB moved"
    assert page.locator(".stats").inner_text() == expected
    assert page.locator(".words").inner_text() == "so it goes"
    assert page.locator(".bar").is_hidden(), "a live view has nothing to replay yet"
    assert "2 layers by 3 experts" in page.locator(".board").get_attribute("aria-label")


def test_the_first_frame_is_the_prompt_and_says_so(mount):
    page = mount(CacheView(layers=[0], experts=2))
    recording = {"cells": "AwMCAgIC", "stats": [[0, 0, 0, 2], [2, 0, 0, 2], [4, 0, 0, 2]], "words": [" a", " b", " c"]}
    recording |= {"first": 0, "lead": "Once upon", "prompt": [2, 4096]}
    page.evaluate("recording => window.model.set('recording', recording)", recording)
    expected = (
        "token 0, the prompt, read at once: 2 misses, 4.0 KiB moved, outside the hit rate; 2 of 2 experts resident"
    )
    assert page.locator(".stats").inner_text() == expected
    assert page.locator(".words").inner_text() == "Once upon a b c"
    page.locator(".step").click()
    assert page.locator(".stats").inner_text().startswith("token 1: hit rate 1.000, 2 hits")


def test_of_a_long_run_the_first_tokens_are_gone_not_renamed(mount):
    page = mount(CacheView(layers=[0], experts=2))
    recording = {"cells": "AAAAAAAA", "stats": [[7, 9, 0, 0], [8, 10, 0, 2], [9, 10, 0, 2]], "words": [], "first": 40}
    page.evaluate("recording => window.model.set('recording', recording)", recording | {"lead": "", "prompt": [0, 0]})
    assert "and 0" in page.locator(".chart").get_attribute("aria-label"), "nothing is known of the first token's share"
    page.locator(".step").click()
    assert page.locator(".chart").get_attribute("aria-label").endswith("this one: 1 and 1")
    page.locator(".step").click()
    assert figures(page)["token"] == 42


@pytest.mark.parametrize("dark", [False, True])
def test_every_mark_stands_out_from_the_page(replay, dark):
    page = replay(dark=dark)
    found = contrasts(page, ROOT)
    assert len(found) == 6 + 6 + 1 and {name: round(x, 2) for name, x in found.items() if x < 3} == {}
    assert found["text"] >= 4.5
    inked = page.evaluate(INKED)
    assert all(inked[state] for state in ("hit", "miss", "prefetched", "evicted")) and not inked["resident"]


INKED = """() => Object.fromEntries([...document.querySelectorAll('.legend span')].map((span) => {
    const c = span.querySelector('canvas'), d = c.getContext('2d').getImageData(3, 3, c.width - 6, c.height - 6).data;
    const first = [d[0], d[1], d[2]].join();
    let inked = false;
    for (let i = 0; i < d.length; i += 4) inked ||= [d[i], d[i + 1], d[i + 2]].join() !== first;
    return [span.textContent.split(' (')[0], inked];
}))"""


@pytest.mark.parametrize("width", [390, 900])
def test_a_large_grid_uses_the_whole_width_and_is_painted_in_time(mount, width):
    """48 layers of 128 experts: cells of 6 px, 40 random frames; a time limit that only a mistake of kind breaks."""
    rng = np.random.default_rng(0)
    page = mount(CacheView(layers=list(range(48)), experts=128), width=width)
    box, room = page.locator(".board").bounding_box(), page.locator(ROOT).bounding_box()["width"]
    cells = 48 if width == 390 else 128
    assert (box["width"] - 52) / cells >= 5.9 and box["width"] > 0.88 * room and box["x"] + box["width"] <= width
    frames = [base64.b64encode(rng.integers(0, 6, 48 * 128, dtype=np.uint8).tobytes()).decode() for _ in range(40)]
    page.evaluate(
        """frames => frames.forEach((cells, token) => window.model.set('live',
        {token, stats: [1, 1, 1, 1], cells, words: [], counts: [[1, 1]], prompt: [0, 0], lead: ''}))""",
        frames,
    )
    assert figures(page)["token"] == 39 and figures(page)["paints"] >= 40


def test_experts_of_a_large_grid_can_be_sorted_by_use(mount):
    rng = np.random.default_rng(0)
    experts = rng.permuted(np.tile(np.arange(40), (12, 1, 1)), axis=2)[:, :, :4]
    experts[:, 0, 0] = 31  # every token asks layer 0 for expert 31
    experts[:, 0, 1:] = np.arange(3)
    page = mount(CacheView.replay(mixoff.Trace.from_array(experts, 40), slots=8))
    at = {"x": 50 + 3, "y": 22 + 44 + 18 + 3}
    assert page.get_by_role("checkbox", name="most used first").is_checked()
    page.locator(".board").hover(position=at)
    assert "of 12 tokens 12 asked" in page.locator(".told").inner_text().lower()
    page.get_by_role("checkbox", name="most used first").uncheck()
    page.locator(".board").hover(position=at | {"x": at["x"] + 1})
    assert page.locator(".told").inner_text().startswith("Layer 0, expert 0:")


def test_a_theme_that_is_still_loading_does_not_shrink_the_grid(replay):
    """JupyterLab changes the theme's name before its style is there: for a moment, everything has another width."""
    page = replay()
    before = page.locator(".board").bounding_box(), page.locator(".chart").bounding_box()
    page.evaluate("""async () => {
        const place = document.getElementById("widget");
        place.style.width = "200px";
        document.body.dataset.theme = "dark";
        await null;
        place.style.width = "";
    }""")
    page.wait_for_function("() => document.querySelector('.mixoff-cache').classList.contains('mixoff-dark')")
    page.evaluate("() => new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")
    assert (page.locator(".board").bounding_box(), page.locator(".chart").bounding_box()) == before


def test_nothing_is_wider_than_a_telephone(replay):
    page = replay(width=390)
    assert page.evaluate("document.documentElement.scrollWidth") <= 390


def test_every_control_has_a_name_and_the_grid_is_told_in_words(replay):
    page = replay()
    page.locator(".step").click()
    for name in ("Play", "one token back", "one token on"):
        assert page.get_by_role("button", name=name).count() == 1
    assert page.get_by_role("slider", name="token").get_attribute("aria-valuetext") == "token 1, w1"
    assert page.get_by_role("combobox", name="tokens per second").count() == 1
    assert "token 1: hit rate" in page.get_by_role("img", name="Grid of 8 layers").get_attribute("aria-label")
