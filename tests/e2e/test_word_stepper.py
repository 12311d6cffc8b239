"""WordStepper in Chromium, without Jupyter: a packed word becomes a product, by keyboard."""

import pytest

from mixoff.widgets import WordStepper

pytestmark = pytest.mark.e2e
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
