"""The small widgets of 01, 03 and 05 in Chromium: driven by pointer and keyboard, and equal to what Python computes."""

import numpy as np
import pytest
import torch
from transformers import MixtralConfig, MixtralForCausalLM

from mixoff.widgets import BlindVote, OutlierRuler, RouterSwap
from mixoff.widgets.outlier import error_of_others, rounded
from widget_page import contrasts, slide, told

pytestmark = pytest.mark.e2e
WEIGHTS = np.random.default_rng(5).normal(size=16).round(4).tolist()
ROUNDS = [(f"Once {i}", f" full {i}", f" fewer {i}") for i in range(4)]


@pytest.fixture(scope="module")
def swap():
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 16, "num_attention_heads": 2, "num_key_value_heads": 1}
    config = MixtralConfig(vocab_size=64, num_hidden_layers=1, num_local_experts=4, num_experts_per_tok=2, **sizes)
    ids = torch.arange(24).reshape(2, 12)
    return RouterSwap(
        MixtralForCausalLM(config).eval(), ids, ids[:1, :3], lambda ids, **_: "".join(f" {int(i)}" for i in ids)
    )


# ---------------------------------------------------------------- ranks


def test_ranks_are_chosen_by_keys_and_every_pair_has_its_loss(mount, swap):
    page = mount(swap)
    for one in range(1, 5):
        for two in range(1, 5):
            slide(page, ".one", one)
            slide(page, ".two", two)
            ranks = tuple(sorted({one, two}))
            shown = told(page, ".mixoff-swap")
            assert (shown["ranks"], float(shown["loss"])) == (",".join(map(str, ranks)), swap.losses[ranks])
            assert page.locator(".ranks .used").all_inner_texts() == [str(rank) for rank in ranks]
    page.get_by_role("button", name="As trained").click()
    assert page.locator(".loss").inner_text().endswith("as trained.")
    page.get_by_role("slider", name="rank of the other expert").focus()
    page.keyboard.press("ArrowRight")
    text = {tuple(ranks): text for ranks, _, text in swap.rows}[1, 3]
    assert page.locator(".text").inner_text() == " 0 1 2" + text
    change = swap.losses[1, 3] - swap.losses[1, 2]
    assert f"{abs(change):.2f} against the trained router" in page.locator(".loss").inner_text()
    width = page.locator(".scale i").bounding_box()["width"] / page.locator(".scale").bounding_box()["width"]
    assert width == pytest.approx(swap.losses[1, 3] / (1.04 * max(swap.uniform, *swap.losses.values())), abs=0.01)
    assert page.complaints == []


# ---------------------------------------------------------------- the ruler


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("value", [-4.0, -0.5, 0.0, 2.5])
def test_the_browser_rounds_as_python_does(mount, bits, value):
    ruler = OutlierRuler(WEIGHTS)
    page = mount(ruler)
    page.get_by_role("combobox", name="bits").select_option(str(bits))
    slide(page, ".value", value)
    shown = told(page, ".mixoff-outlier")
    weights = [float(shown["value"]) if i == ruler.at else w for i, w in enumerate(WEIGHTS)]
    assert float(shown["value"]) == pytest.approx(value, abs=0.1)
    restored, step = rounded(weights, bits)
    assert float(shown["scale"]) == pytest.approx(step) and page.complaints == []
    codes = np.round((restored - min(weights)) / step).astype(int)
    assert [int(code) for code in shown["codes"].split(",")] == codes.tolist()
    assert float(shown["error"]) == pytest.approx(error_of_others(weights, ruler.at, bits))


def test_the_outlier_is_dragged_by_hand_and_moved_by_keys(mount):
    page = mount(OutlierRuler(WEIGHTS))
    before = told(page, ".mixoff-outlier")
    box = page.locator("svg .outlier").bounding_box()
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    page.mouse.down()
    page.mouse.move(860, box["y"], steps=5)
    page.mouse.up()
    dragged = told(page, ".mixoff-outlier")
    assert float(dragged["value"]) > 3 and float(dragged["scale"]) > float(before["scale"])
    page.mouse.move(200, box["y"])
    assert told(page, ".mixoff-outlier") == dragged, "let go"
    page.get_by_role("slider", name="value of the outlier").focus()
    page.keyboard.press("ArrowLeft")
    assert float(told(page, ".mixoff-outlier")["value"]) < float(dragged["value"])
    page.get_by_role("button", name="As it is in the model").click()
    assert told(page, ".mixoff-outlier") == before and page.complaints == []


# ---------------------------------------------------------------- the vote


def test_a_vote_is_blind_until_it_is_given_and_ends_with_a_coins_chance(mount):
    vote = BlindVote(ROUNDS)
    page, right = mount(vote), 0
    for i, each in enumerate(vote.rounds):
        assert page.locator(".fewer").count() == 0 and page.locator(".said").inner_text() == ""
        assert page.locator(".texts small").all_inner_texts() == ["left", "right"]
        side = "left" if i % 2 else each["side"]
        right += side == each["side"]
        page.get_by_role("button", name=side.title()).focus()
        page.keyboard.press("Enter")
        assert (
            page.locator(".fewer").inner_text().startswith("2-bit")
            and f"fewer {i}" in page.locator(".fewer").inner_text()
        )
        assert page.locator(".vote").first.is_disabled(), "one vote a round"
        if i < 3:
            page.keyboard.press("Enter")  # Next has the focus
    shown = told(page, ".mixoff-vote")
    assert (shown["votes"], shown["right"]) == ("4", str(right))
    assert page.locator(".score").inner_text().endswith(f"with a chance of {100 * vote.chances[right]:.0f} %.")
    page.get_by_role("button", name="Vote again").click()
    assert told(page, ".mixoff-vote")["votes"] == "0" and page.complaints == []


# ---------------------------------------------------------------- all three


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("kind", ["swap", "outlier", "vote"])
def test_marks_stand_out_and_nothing_is_wider_than_a_telephone(mount, swap, kind, dark):
    widget = {"swap": swap, "outlier": OutlierRuler(WEIGHTS), "vote": BlindVote(ROUNDS)}[kind]
    page = mount(widget, dark=dark, width=390)
    if kind == "swap":
        slide(page, ".one", 3)
    if kind == "vote":
        page.locator(".vote").first.click()
    found = contrasts(page, f".mixoff-{kind}")
    expected = {
        "swap": {"loss", "wrong", "used"},
        "outlier": {"line", "tick", "way", "weight", "outlier"},
        "vote": {"frame"},
    }
    assert expected[kind] <= set(found) and {name: x for name, x in found.items() if x < 3} == {}
    assert found["text"] >= 4.5 and page.evaluate("document.documentElement.scrollWidth") <= 390
