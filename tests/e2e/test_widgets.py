"""The widgets' own modules in Chromium, without Jupyter: what Python computed is what the page says.

A fake model stands for the kernel. The chapters' tests drive the same widgets in JupyterLab.
"""

import json

import numpy as np
import pytest

import mixoff
from mixoff import models
from mixoff.classroom.widgets import BatchStepper, CacheView, EvictionStepper, PlanExplorer, WordStepper
from mixoff.trace.batches import Job, schedule

pytestmark = pytest.mark.e2e
HOME = "http://widgets.invalid/"
MOUNT = """async ([source, css, state]) => {
    const module = (await import(URL.createObjectURL(new Blob([source], {type: "text/javascript"})))).default;
    const handlers = {};
    window.model = {
        get: (name) => state[name],
        set: (name, value) => { state[name] = value; (handlers["change:" + name] || []).forEach((fn) => fn()); },
        on: (name, fn) => (handlers[name] ??= []).push(fn), off: () => {}, save_changes: () => {},
    };
    document.head.insertAdjacentHTML("beforeend", `<style>${css}</style>`);
    await module.render({model: window.model, el: document.getElementById("widget")});
    await new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)));
}"""
BODY = '<!doctype html><html lang="en"><body><div id="widget"></div></body></html>'


@pytest.fixture
def mount(new_page):
    """A function that shows a widget in an empty page and returns the page, with its complaints."""

    def show(widget, dark=False):
        page = new_page(900, 500, dark)
        page.route("**/*", lambda route: route.fulfill(body=BODY, content_type="text/html"))
        page.goto(HOME)
        names = [
            name
            for name in widget.traits(sync=True)
            if not name.startswith("_") and name not in ("layout", "tabbable", "tooltip")
        ]
        state = json.loads(json.dumps({name: getattr(widget, name) for name in names}))
        page.evaluate(MOUNT, [str(widget._esm), str(widget._css), state])
        return page

    return show


def figures(page, root=".mixoff-cache"):
    """What the widget's element says of the frame that it shows."""
    return {
        name: int(value)
        for name, value in page.locator(root).evaluate("e => ({...e.dataset})").items()
        if value.isdigit()
    }


@pytest.fixture(scope="module")
def novel():
    trace = mixoff.trace.load_domains(models.path() / "traces.npz")["novel"]
    return trace.select(np.arange(60))


def test_replay_shows_what_the_simulator_counts(mount, novel):
    page = mount(CacheView.replay(novel, slots=4, words=[f" w{t}" for t in range(60)]))
    for token in (0, 1, 30, 59):
        page.locator(".scrub").evaluate("(e, t) => { e.value = t; e.dispatchEvent(new Event('input')); }", token)
        counted = mixoff.simulate(novel.select(np.arange(token + 1)), slots=4)
        shown = figures(page)
        assert (shown["token"], shown["hits"], shown["misses"]) == (token, counted.hits, counted.misses)
        assert shown["resident"] == counted.misses - counted.evictions
        assert page.locator(".words b").inner_text().strip() == f"w{token}"
    assert shown["tokens"] == 60 and page.complaints == []


def test_replay_plays_steps_and_obeys_the_keyboard(mount, novel):
    page = mount(CacheView.replay(novel, slots=3))
    page.locator(".step").click()
    page.locator(".step").click()
    page.locator(".back").click()
    assert figures(page)["token"] == 1
    page.locator(".scrub").focus()
    page.keyboard.press("ArrowRight")
    assert figures(page)["token"] == 2
    page.locator(".speed").select_option("30")
    page.locator(".scrub").evaluate("e => { e.value = 55; e.dispatchEvent(new Event('input')); }")
    page.locator(".play").focus()
    page.keyboard.press("Enter")
    page.wait_for_function("() => document.querySelector('.mixoff-cache').dataset.token === '59'", timeout=5000)
    page.wait_for_function("() => document.querySelector('.play').textContent === 'Play'", timeout=5000)
    assert page.locator(".step").is_disabled() and page.complaints == []


def test_live_frames_are_drawn_as_they_come(mount):
    view = CacheView(layers=[0, 1], experts=3)
    page = mount(view)
    frame = {
        "token": 7,
        "stats": [3, 1, 2048, 4],
        "cells": "AQIDBAUA",
        "words": ["so", " it", " goes"],
        "rates": [0.5, 0.75],
    }
    page.evaluate("frame => window.model.set('live', frame)", frame)
    assert figures(page) | {"paints": 0} == {
        "token": 7,
        "hits": 3,
        "misses": 1,
        "resident": 4,
        "bytes": 2048,
        "paints": 0,
    }
    assert (
        page.locator(".stats").inner_text()
        == "token 7: hit rate 0.750, 3 hits, 1 misses, 4 of 6 experts resident, 2.0 KiB moved"
    )
    assert page.locator(".words").inner_text() == "so it goes"
    assert page.locator(".bar").is_hidden(), "a live view has nothing to replay yet"
    assert "2 layers by 3 experts" in page.locator(".grid canvas").get_attribute("aria-label")


@pytest.mark.parametrize("dark", [False, True])
def test_states_differ_in_greyscale_and_stand_out_from_the_page(mount, novel, dark):
    """Letters are drawn on every asked cell, and text is legible on its ground: contrast of at least 4.5 to 1."""
    page = mount(CacheView.replay(novel, slots=4), dark)
    colours = page.locator(".mixoff-cache").evaluate(
        "e => { const s = getComputedStyle(e); return [s.color, s.backgroundColor]; }"
    )
    luminance = [relative_luminance([int(x) for x in c[c.index("(") + 1 : -1].split(",")[:3]]) for c in colours]
    assert (max(luminance) + 0.05) / (min(luminance) + 0.05) >= 4.5
    inked = page.evaluate(INKED)
    assert all(inked[state] for state in ("hit", "miss", "prefetched", "evicted")) and not inked["resident"]


INKED = """() => Object.fromEntries([...document.querySelectorAll('.legend span')].map((span) => {
    const c = span.querySelector('canvas'), d = c.getContext('2d').getImageData(2, 2, c.width - 4, c.height - 4).data;
    const first = [d[0], d[1], d[2]].join();
    let inked = false;
    for (let i = 0; i < d.length; i += 4) inked ||= [d[i], d[i + 1], d[i + 2]].join() !== first;
    return [span.textContent.split(' (')[0], inked];
}))"""


def relative_luminance(rgb):
    """As WCAG 2 defines it."""
    linear = [c / 255 / 12.92 if c / 255 <= 0.04045 else ((c / 255 + 0.055) / 1.055) ** 2.4 for c in rgb]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_large_grid_is_painted_in_time(mount):
    """48 layers of 128 experts: 40 random frames, each painted; a time limit that only a mistake of kind breaks."""
    rng = np.random.default_rng(0)
    view = CacheView(layers=list(range(48)), experts=128)
    page = mount(view)
    import base64

    frames = [base64.b64encode(rng.integers(0, 6, 48 * 128, dtype=np.uint8).tobytes()).decode() for _ in range(40)]
    page.evaluate(
        """frames => frames.forEach((cells, token) =>
        window.model.set('live', {token, stats: [1, 1, 1, 1], cells, words: [], rates: []}))""",
        frames,
    )
    assert figures(page)["token"] == 39 and figures(page)["paints"] >= 40


@pytest.mark.parametrize("policy", ["lru", "belady"])
def test_stepper_asks_and_keeps_score(mount, policy):
    stepper = EvictionStepper([1, 2, 3, 1, 2, 4, 1], slots=2, policies=("lru", "belady"))
    page = mount(stepper)
    page.locator(".policy").select_option(policy)
    for step in stepper.steps[policy]:
        page.locator(".step").click()
        if step["evicted"] is not None:
            assert page.locator(".mixoff-stepper").get_attribute("data-asking") == "true"
            page.locator(".slots button", has_text=str(step["evicted"])).click()
        assert page.locator(".mixoff-stepper").get_attribute("data-asking") == "false"
    root = page.locator(".mixoff-stepper")
    hits = sum(step["hit"] for step in stepper.steps[policy])
    assert int(root.get_attribute("data-hits")) == hits and int(root.get_attribute("data-misses")) == 7 - hits
    evictions = sum(step["evicted"] is not None for step in stepper.steps[policy])
    assert page.locator(".score").inner_text() == f"{evictions} of {evictions} guesses right"
    assert page.locator(".step").is_disabled() and page.complaints == []


def test_stepper_says_what_was_wrong(mount):
    page = mount(EvictionStepper([1, 2, 3], slots=2, policies=("lru",)))
    for _ in range(3):
        page.locator(".step").click()
    page.locator(".slots button", has_text="2").click()
    assert page.locator(".said").inner_text() == "No: lru keeps 2. Expert 3 takes the place of expert 1: a miss."
    assert page.locator(".score").inner_text() == "0 of 1 guesses right"


CODES, WHOLE = [2, 0, 3, 1] * 4, [1, -2, 0, 3, 2, 2, -1, 0, 5, 1, -3, 1, 0, 2, 4, -1]


def test_a_word_is_stepped_through_by_keyboard_to_its_product(mount):
    stepper = WordStepper(CODES, WHOLE)
    page = mount(stepper)
    root, step = page.locator(".mixoff-word"), page.locator(".step")
    step.focus()
    for n, want in enumerate(stepper.steps, start=1):
        page.keyboard.press("Enter")
        assert (root.get_attribute("data-at"), root.get_attribute("data-total")) == (str(n), str(want["total"]))
        masked = page.locator(".line").nth(2)
        kept = masked.locator(".kept").all_inner_texts()
        assert [int(kept[i] + kept[i + 1], 2) for i in (6, 4, 2, 0)] == want["codes"]
        assert masked.locator("i").count() == 32
    assert root.get_attribute("data-total") == str(sum(q * x for q, x in zip(CODES, WHOLE, strict=True)))
    assert step.is_disabled() and page.locator(".said").get_attribute("aria-live") == "polite"
    page.get_by_role("button", name="Start over").click()
    assert root.get_attribute("data-at") == "0" and page.complaints == []


@pytest.mark.parametrize("dark", [False, True])
def test_a_batch_is_stepped_through_pass_by_pass(mount, novel, dark):
    jobs = [Job(6, 4), Job(3, 5), Job(9, 2, arrives=2)]
    runs = {"continuous": schedule(jobs, rows=2), "chunks": schedule(jobs, rows=2, chunk=4)}
    stepper = BatchStepper(runs, [novel] * 3, layer=4)
    page = mount(stepper, dark)
    root = page.locator(".mixoff-batch")
    for name, frames in stepper.runs.items():
        page.locator(".run").select_option(name)
        assert root.get_attribute("data-passes") == str(len(frames))
        page.locator(".step").focus()
        for at, frame in enumerate(frames):
            counts = [int(text) for text in page.locator(".count").all_inner_texts()]
            assert counts == [len(jobs) for jobs in frame["wanted"]]
            assert page.locator(".ball").count() == sum(counts) == 2 * len(frame["jobs"])
            shown = (root.get_attribute("data-at"), root.get_attribute("data-touched"))
            assert shown == (str(at), str(sum(map(bool, counts))))
            assert page.locator(".cell.now.read, .cell.now.decode").count() == len(set(frame["jobs"]))
            page.keyboard.press("Enter")
        assert page.locator(".step").is_disabled()
    assert "prompt tokens of C" in page.locator(".said").inner_text() or "decodes" in page.locator(".said").inner_text()
    assert page.get_by_role("slider", name="pass").get_attribute("aria-valuetext").endswith(f"of {len(frames)}")
    assert page.complaints == []


OLMOE = "allenai/OLMoE-1B-7B-0924"  # read in less than a second


def answer(page, explorer):
    """Stands for the kernel: what the page asks goes to Python, and Python's answer to the page."""
    explorer.choice = page.evaluate("window.model.get('choice')")
    page.evaluate("answer => window.model.set('answer', answer)", explorer.answer)
    return page.locator(".mixoff-explorer").evaluate("e => ({...e.dataset})")


def check_explorer(shown, plan):
    """The page's figures are those of a plan, which knows nothing of widgets."""
    fast = plan.tiers["fast"] + plan.hardware.reserved_nbytes
    figures = {"fastBytes": fast, "ramBytes": plan.tiers["ram"], "diskBytes": plan.tiers["disk"]}
    figures |= {"fastLimit": plan.hardware.fast_bytes, "storeBytes": plan.bytes["store"], "slots": plan.slots_per_layer}
    assert {name: int(shown[name]) for name in figures} == figures
    assert [float(shown[name]) for name in ("low", "expected", "high")] == list(plan.tokens_per_s.values())


def test_explorer_obeys_the_keyboard_and_shows_the_plan(mount):
    explorer = PlanExplorer(OLMOE, hardware="rtx-4060-laptop", experts=8)
    page = mount(explorer)
    before = page.locator(".mixoff-explorer").evaluate("e => ({...e.dataset})")
    check_explorer(before, explorer.outcome.plan)
    page.locator("[data-name=experts]").focus()
    page.keyboard.press("ArrowRight")
    assert page.locator("[data-name=experts]").get_attribute("aria-valuetext") == "16 bits"
    page.locator("[data-name=context]").focus()
    page.keyboard.press("Home")
    shown = answer(page, explorer)
    assert (shown["asked"], shown["answered"], shown["fits"]) == ("2", "2", "true")
    scheme = mixoff.Scheme(**{role: mixoff.quantize.Precision(4, 64) for role in ("attention", "shared_experts")})
    check_explorer(shown, mixoff.plan(OLMOE, context=512, scheme=scheme, hardware="rtx-4060-laptop"))
    page.locator("[data-name=slots]").focus()
    page.keyboard.press("ArrowRight")
    assert answer(page, explorer)["slots"] == "1" and page.complaints == []


@pytest.mark.parametrize("dark", [False, True])
def test_explorer_says_what_does_not_fit_and_why(mount, dark):
    explorer = PlanExplorer(OLMOE)
    page = mount(explorer, dark)
    page.locator("[data-name=context]").focus()
    page.keyboard.press("End")
    shown = answer(page, explorer)
    assert (shown["fits"], shown["change"], shown["low"]) == ("false", explorer.outcome.change, "")
    assert (
        shown["change"] in page.locator(".change").inner_text() and "too much" in page.locator(".verdict").inner_text()
    )
    colours = page.locator(".verdict").evaluate(
        "e => [getComputedStyle(e).color, getComputedStyle(e.closest('.mixoff-explorer')).backgroundColor]"
    )
    luminance = [relative_luminance([int(x) for x in c[c.index("(") + 1 : -1].split(",")[:3]]) for c in colours]
    assert (max(luminance) + 0.05) / (min(luminance) + 0.05) >= 4.5
    named = page.locator(".bar").first.get_attribute("aria-label")
    assert named.startswith("VRAM") and "KV cache" in named, "a bar is read out with its parts"


def test_explorer_shows_a_refusal_and_recovers(mount):
    explorer = PlanExplorer(OLMOE)
    page = mount(explorer)
    refused = explorer.choice | {"group": 128, "model": "openai/gpt-oss-20b", "asked": 1}
    explorer.choice = refused
    page.evaluate("answer => window.model.set('answer', answer)", explorer.answer)
    assert page.locator(".verdict").inner_text() == explorer.answer["error"] and "2880" in explorer.answer["error"]
    page.locator("[data-name=group]").focus()
    page.keyboard.press("Home")
    assert answer(page, explorer)["error"] == "" and page.complaints == []


# ---------------------------------------------------------------- without a mouse, without sight


def test_every_control_has_a_name_and_the_grid_is_told_in_words(mount, novel):
    page = mount(CacheView.replay(novel, slots=4, words=[f" w{t}" for t in range(60)]))
    page.locator(".step").click()
    for name in ("Play", "one token back", "one token on"):
        assert page.get_by_role("button", name=name).count() == 1
    assert page.get_by_role("slider", name="token").get_attribute("aria-valuetext") == "token 1, w1"
    assert page.get_by_role("combobox", name="tokens a second").count() == 1
    assert "token 1: hit rate" in page.get_by_role("img", name="Grid of 8 layers").get_attribute("aria-label")


def test_the_line_of_hit_rates_begins_with_the_first_request(mount, novel):
    page = mount(CacheView(layers=[0], experts=2))
    recording = {"cells": "AAAAAAAA", "stats": [[0, 0, 0, 0], [1, 1, 0, 2], [2, 1, 0, 2]], "words": [], "first": 40}
    page.evaluate("recording => window.model.set('recording', recording)", recording)
    page.locator(".step").click()
    page.locator(".step").click()
    assert figures(page)["token"] == 42, "of a long run the first tokens are gone, not renamed"
    assert page.locator("polyline").get_attribute("points").split()[0] == "0.0,28.0", "0.5, not 0 for the prompt"


def test_stepper_obeys_the_keyboard_and_names_its_slots(mount):
    page = mount(EvictionStepper([1, 2, 3], slots=2, policies=("lru",)))
    page.locator(".step").focus()
    for _ in range(3):
        page.keyboard.press("Enter")
    assert page.get_by_role("button", name="give up expert 2").is_enabled()
    page.get_by_role("button", name="give up expert 1").focus()
    page.keyboard.press("Space")
    assert page.locator(".said").inner_text().startswith("Right.")
    assert page.get_by_role("button", name="slot 1: expert 3, miss").count() == 1
    assert page.locator(".said").get_attribute("aria-live") == "polite"
