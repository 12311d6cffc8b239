"""PlanExplorer in Chromium, without Jupyter: what Python planned is what the page says."""

import pytest

import mixoff
from mixoff.widgets import PlanExplorer
from widget_page import PALETTE, contrasts, told

pytestmark = pytest.mark.e2e
ROOT = ".mixoff-explorer"
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


LONG = "microsoft/Phi-3.5-MoE-instruct"  # made for 131,072 tokens


@pytest.mark.parametrize("dark", [False, True])
def test_explorer_says_what_does_not_fit_and_why(mount, dark):
    explorer = PlanExplorer(LONG)
    page = mount(explorer, dark)
    page.locator("[data-name=context]").focus()
    page.keyboard.press("End")
    shown = answer(page, explorer)
    assert (shown["fits"], shown["change"], shown["low"]) == ("false", explorer.outcome.change, "")
    assert (
        shown["change"] in page.locator(".change").inner_text() and "too much" in page.locator(".verdict").inner_text()
    )
    found = contrasts(page, ".mixoff-explorer", [*PALETTE, "--warn"])
    assert {name: x for name, x in found.items() if x < 3} == {} and found["--warn"] >= 4.5
    named = page.locator(".bar").first.get_attribute("aria-label")
    assert named.startswith("VRAM") and "KV cache" in named, "a bar is read out with its parts"


def test_explorer_shows_a_refusal_and_recovers(mount):
    explorer = PlanExplorer(OLMOE)
    page = mount(explorer)
    refused = explorer.choice | {"group": 128, "model": "openai/gpt-oss-20b", "asked": 1}
    explorer.choice = refused
    page.evaluate("answer => window.model.set('answer', answer)", explorer.answer)
    assert page.locator(".verdict").inner_text() == explorer.answer["error"] and "2880" in explorer.answer["error"]
    assert page.locator(".tier").count() == 0 and page.locator(".band").is_hidden(), "nothing of the former plan"
    assert not {"fits", "slots", "expected"} & set(told(page, ROOT))
    page.locator("[data-name=group]").focus()
    page.keyboard.press("Home")
    assert answer(page, explorer)["error"] == "" and page.complaints == []
    assert page.locator(".tier").count() == 3 and page.locator(".band").is_visible()


def test_the_context_ends_where_the_model_ends_and_follows_the_model(mount):
    explorer = PlanExplorer(LONG, context=131072)
    page = mount(explorer)
    assert page.locator("[data-name=context]").get_attribute("max") == "8"
    page.locator("[data-name=model]").select_option(OLMOE)
    answer(page, explorer)
    context = page.locator("[data-name=context]")
    assert context.get_attribute("aria-valuetext") == "4,096 tokens" and context.get_attribute("max") == "3"
    assert "The context is 4,096, the longest here" in page.locator(".change").inner_text()
    context.focus()
    page.keyboard.press("ArrowLeft")
    assert "longest" not in (answer(page, explorer)["change"] + page.locator(".change").inner_text())
    assert explorer.outcome.choice.context == 2048 and page.complaints == []


def test_less_than_a_token_per_second_is_not_praised(mount):
    page = mount(PlanExplorer("mistralai/Mixtral-8x7B-Instruct-v0.1", experts=16, group=64))
    assert ", but is slow: a token takes " in page.locator(".verdict").inner_text()
    assert "wrong" in page.locator(ROOT).get_attribute("class")


def test_where_no_kernel_is_it_shows_what_was_chosen_and_no_controls(mount):
    page = mount(PlanExplorer(OLMOE, experts=8), inert=True)
    assert [page.locator(f"[data-name={name}]").is_visible() for name in ("model", "experts", "context")] == [False] * 3
    shown = page.locator(".controls label").all_inner_texts()
    assert [" ".join(text.split()) for text in shown[:3]] == [
        "Model OLMoE-1B-7B-0924",
        "Machine t4",
        "Bits of experts 8 bits",
    ]
    assert page.locator(".tier").count() == 3


def test_a_slow_answer_is_announced(mount):
    page = mount(PlanExplorer(OLMOE))
    page.locator("[data-name=context]").focus()
    page.keyboard.press("Home")
    page.wait_for_function("() => document.querySelector('.verdict').textContent === 'Working it out …'")


@pytest.mark.parametrize("dark", [False, True])
def test_explorer_can_be_used_on_a_telephone(mount, dark):
    page = mount(PlanExplorer(OLMOE), dark, width=390)
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    right = page.locator(f"{ROOT} *").evaluate_all("es => Math.max(...es.map(e => e.getBoundingClientRect().right))")
    assert right <= 390
    assert page.locator("[data-name=experts]").bounding_box()["width"] >= 80
