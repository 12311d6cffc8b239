"""EvictionStepper in Chromium, without Jupyter: it asks, keeps the score, gives reasons and lets two policies race."""

import pytest

from mixoff.widgets import EvictionStepper
from widget_page import PALETTE, contrasts, told

pytestmark = pytest.mark.e2e
ROOT = ".mixoff-stepper"
REQUESTS = [2, 5, 2, 7, 5, 1, 2, 5, 7, 1, 2]


@pytest.fixture(scope="module")
def stepper():
    return EvictionStepper(REQUESTS, slots=3, policies=("lru", "belady", "fifo"))


def to_first_question(page, policy):
    """Steps until the reader is asked: request 5 asks for expert 1."""
    page.locator(".policy").select_option(policy)
    for _ in range(6):
        page.locator(".step").click()
    assert told(page, ROOT)["asking"] == "true"


def slot(page, expert):
    return page.locator(".mine .slots button", has_text=str(expert))


@pytest.mark.parametrize("policy", ["lru", "belady", "fifo"])
def test_it_asks_and_keeps_score_against_another_policy(mount, stepper, policy):
    page = mount(stepper)
    page.locator(".policy").select_option(policy)
    rival = "fifo" if policy != "fifo" else "lru"
    page.locator(".rival").select_option(rival)
    for step in stepper.steps[policy]:
        page.locator(".step").click()
        if step["evicted"] is not None:
            assert told(page, ROOT)["asking"] == "true"
            slot(page, step["evicted"]).click()
        assert told(page, ROOT)["asking"] == "false"
    hits = {name: sum(step["hit"] for step in steps) for name, steps in stepper.steps.items()}
    shown = told(page, ROOT)
    assert [int(shown[key]) for key in ("hits", "misses", "rivalHits")] == [
        hits[policy],
        11 - hits[policy],
        hits[rival],
    ]
    evictions = sum(step["evicted"] is not None for step in stepper.steps[policy])
    assert page.locator(".score").inner_text() == f"{evictions} of {evictions} guesses right"
    ends = f"The end: {stepper.names[policy]} {hits[policy]} hits, {stepper.names[rival]} {hits[rival]}."
    assert page.locator(".said").inner_text().endswith(ends)
    marks = page.locator("svg rect.hit, svg rect.miss").evaluate_all("es => es.map(e => e.classList.contains('hit'))")
    assert marks == [step["hit"] for name in (policy, rival) for step in stepper.steps[name]]
    assert page.locator(".step").is_disabled() and page.complaints == []


REASONS = {
    "belady": "Bélády evicts 7: its next use is 3 steps away, the farthest.",
    "lru": "LRU evicts 2: its last use was 3 steps ago, the longest.",
    "fifo": "FIFO evicts 2: it came 5 steps ago, before the others.",
}


@pytest.mark.parametrize("policy", REASONS)
def test_a_wrong_guess_gets_the_reason_and_the_arcs(mount, stepper, policy):
    page = mount(stepper)
    to_first_question(page, policy)
    assert told(page, ROOT)["arcs"] == "0", "the arcs would give the answer away"
    page.get_by_role("button", name="Show arcs").click()
    assert told(page, ROOT)["arcs"] == "3" and page.locator("path.gone").count() == 0
    slot(page, 5).click()
    keeps = f"No: {stepper.names[policy]} keeps 5. {REASONS[policy]} Expert 1 takes its slot: a miss."
    assert page.locator(".said").inner_text() == keeps
    assert page.locator("path").count() == 3 and page.locator("path.gone").count() == 1
    assert page.locator(".score").inner_text() == "0 of 1 guesses right"


def test_the_first_answer_counts_and_no_later_one(mount, stepper):
    page = mount(stepper)
    to_first_question(page, "belady")
    slot(page, 5).click()
    page.locator(".back").click()
    page.locator(".step").click()
    slot(page, 7).click()
    assert page.locator(".said").inner_text().startswith("Right. ")
    assert "Your first answer counts." in page.locator(".said").inner_text()
    assert page.locator(".score").inner_text() == "0 of 1 guesses right"
    page.get_by_role("button", name="Start over").click()
    assert page.locator(".score").inner_text() == ""


def test_a_policy_does_not_race_against_itself(mount, stepper):
    page = mount(stepper)
    assert page.locator(".rival").input_value() == "belady"
    page.locator(".policy").select_option("belady")
    assert page.locator(".rival").input_value() == "lru"
    page.locator(".rival").select_option("")
    assert page.locator(".other").is_hidden() and page.complaints == []


def test_what_is_never_used_again_has_an_open_arc(mount):
    page = mount(EvictionStepper([1, 2, 3], slots=2, policies=("belady",)))
    for _ in range(3):
        page.locator(".step").click()
    slot(page, 1).click()
    assert page.locator(".said").inner_text().startswith("Right. Bélády evicts 1: it is never used again.")
    assert page.locator("path.never").count() == 2


def test_the_keyboard_is_enough_and_slots_have_names(mount):
    page = mount(EvictionStepper([1, 2, 3], slots=2, policies=("lru",)))
    page.locator(".step").focus()
    for _ in range(3):
        page.keyboard.press("Enter")
    assert page.get_by_role("button", name="evict expert 2").is_enabled()
    page.get_by_role("button", name="evict expert 1").focus()
    page.keyboard.press("Space")
    assert page.locator(".said").inner_text().startswith("Right.")
    assert page.get_by_role("button", name="slot 1: expert 3, miss").count() == 1
    assert page.locator(".said").get_attribute("aria-live") == "polite"
    assert "no more requests; so far LRU 0 hits and 3 misses" in page.locator("svg").get_attribute("aria-label")


@pytest.mark.parametrize("dark", [False, True])
def test_marks_stand_out_and_nothing_is_wider_than_a_telephone(mount, stepper, dark):
    page = mount(stepper, dark=dark, width=390)
    to_first_question(page, "lru")
    slot(page, 2).click()
    found = contrasts(page, ROOT, PALETTE)
    assert {"hit", "miss", "gone", "kept"} <= set(found) and {name: x for name, x in found.items() if x < 3} == {}
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    assert page.locator(".queue").evaluate("e => e.scrollWidth <= e.clientWidth"), "eleven requests fit"
