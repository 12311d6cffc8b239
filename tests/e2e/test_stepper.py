"""EvictionStepper in Chromium, without Jupyter: it asks, keeps the score, and tells why."""

import pytest

from mixoff.classroom.widgets import EvictionStepper

pytestmark = pytest.mark.e2e


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
