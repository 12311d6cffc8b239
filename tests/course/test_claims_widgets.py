"""What chapters say about their widgets, computed from what the widgets held and from the package."""

import re

import badges
import widget_states
from claims import words
from mixoff.planning import planner, probe
from mixoff.planning.needs import Needs
from mixoff.shapes.sizes import sizes_of
from mixoff.store import describe
from mixoff.widgets import blind_vote, outlier, plan_explorer


def held(number, kind):
    """Traits of a chapter's widget of this class, as stored."""
    path = next(path for path in badges.chapters() if path.name.startswith(number))
    (state,) = [it["state"] for it in widget_states.kept(path).values() if it["class"].endswith(f".{kind}")]
    return state


def test_00_half_of_the_experts_in_four_bits_is_what_a_t4_holds():
    """The race and the README give each layer four slots, as a plan of this scheme does."""
    machine = probe.named("t4")
    sizes = sizes_of(describe.shape_of("mistralai/Mixtral-8x7B-Instruct-v0.1"), "quality")
    needs = Needs.of(sizes, machine, 4096, 1)
    fits = [planner.needed_fast_nbytes(needs, machine, slots) <= machine.fast_bytes for slots in (4, 5)]
    assert fits == [True, False]
    race = held("00", "Race")
    assert [pane["note"].count("4 of 8") for pane in race["panes"]] == [0, 1, 1, 0]
    speeds = [len(pane["misses"]) / sum(pane["waiting_s"] + pane["computing_s"]) for pane in race["panes"]]
    printed = re.search(r"tokens/s, modelled: ([^`]*?hit rate 1\.00\))", words("00"))[1]
    assert [f"{speed:.1f}" for speed in speeds] == re.findall(r"(\d+\.\d) \(hit rate", printed)


def test_01_a_grid_of_ranks_is_low_in_its_first_row_and_twice_as_high_elsewhere():
    rows = {tuple(ranks): loss for ranks, loss, _ in held("01", "RouterSwap")["rows"]}
    first = [loss for ranks, loss in rows.items() if 1 in ranks and len(ranks) == 2]
    others = [loss for ranks, loss in rows.items() if 1 not in ranks]
    assert 1.8 < sum(others) / len(others) / (sum(first) / len(first)) < 2.6, "about twice as high"
    assert f"With rank 1 it is {min(first):.1f} to {max(first):.1f} nats" in words("01")
    assert f"without it {min(others):.1f} to {max(others):.1f}" in words("01")


def test_02_the_slider_ends_where_a_model_does():
    assert plan_explorer.context_limit("mistralai/Mixtral-8x7B-Instruct-v0.1") == 32768
    assert "32,768 tokens for Mixtral" in words("02")


def test_03_marks_move_apart_when_the_outlier_does():
    state = held("03", "OutlierRuler")
    moved = [[w * f if i == state["at"] else w for i, w in enumerate(state["weights"])] for f in (1, 3)]
    near, far = (outlier.rounded(weights, 2)[1] for weights in moved)
    assert 1.8 < far / near < 2.3 and "twice as far apart" in words("03")
    assert f"as it is: scale {near:.3f}" in words("03") and f"three times as far out: scale {far:.3f}" in words("03")


def test_05_seven_of_eight_are_the_fewest_that_a_coin_seldom_reaches():
    assert blind_vote.chance_of(7, 8) < 0.05 < blind_vote.chance_of(6, 8)
    assert "Seven right votes of eight are the fewest" in words("05")
    vote = held("05", "BlindVote")
    assert len(vote["rounds"]) == 8 and all(each["left"] != each["right"] for each in vote["rounds"])
