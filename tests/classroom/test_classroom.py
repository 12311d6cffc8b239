"""What notebooks lean on: checks that never raise, figures that carry their captions, a setup that can be repeated."""

import functools
import subprocess
import sys
from dataclasses import asdict, replace

import matplotlib
import numpy as np
import pytest

matplotlib.use("Agg")

import mixoff
from mixoff.classroom import check, setup
from mixoff.classroom.checks import Check, difference
from mixoff.widgets import PlanExplorer
from mixoff.widgets.plan_explorer import CONTEXTS, Choice, explore, lacking_nbytes, smallest_change

double = Check((((2,), 4), ((5,), 10)))
pair = Check(((([1, 2], 3), np.array([[1, 2]] * 3)),))


def broken(*_):
    raise ZeroDivisionError("division by zero")


def unattempted(*_):
    raise NotImplementedError


@pytest.mark.parametrize(
    ("exercise", "answer", "line"),
    [
        (double, lambda x: 2 * x, "[ ok ] 2 cases"),
        (double, lambda x: np.float64(2 * x), "[ ok ] 2 cases"),
        (double, lambda x: 4, "[FAIL] case 2: 4, expected 10"),
        (double, unattempted, "[ .. ] not attempted yet"),
        (double, broken, "[FAIL] case 1: raised ZeroDivisionError: division by zero"),
        (double, lambda x: None, "[FAIL] case 1: returned nothing, expected 4"),
        (double, lambda x: "four", "[FAIL] case 1: 'four' is not a number, expected 4"),
        (double, lambda: 4, "[FAIL] case 1: raised TypeError: <lambda>() takes 0 positional arguments but 1 was given"),
        (double, lambda x: [1, [2]], "[FAIL] case 1: raised ValueError"),
        (double, 4, "[FAIL] pass the function itself, not 4"),
        (double, lambda x: float("nan"), "[FAIL] case 1: nan, expected 4"),
        (pair, lambda row, n: np.array([row] * n), "[ ok ] 1 cases"),
        (pair, lambda row, n: np.zeros((3, 8)), "[FAIL] case 1: shape (3, 8), expected (3, 2)"),
        (pair, lambda row, n: [[1, 2], [1, 2], [1, 9]], "[FAIL] case 1: position (2, 1) is 9, expected 2"),
    ],
)
def test_check_says(exercise, answer, line, capsys):
    assert exercise(answer) is None
    assert capsys.readouterr().out.startswith(line)


def test_cases_survive_a_learner_who_changes_arguments_and_is_told(capsys):
    sort = Check(((([3, 1],), [1, 3]), (([3, 1],), [1, 3])))
    sort(lambda x: x.sort() or x)
    sort(sorted)
    told, passed = capsys.readouterr().out.strip().rsplit("\n", 1)
    assert told.startswith("[FAIL] case 1: right, but the call changed its arguments") and passed == "[ ok ] 2 cases"


def test_a_function_without_a_name_is_handed_back_too(capsys):
    double = Check((((2,), 4),))
    mine = double.mine(functools.partial(lambda by, x: by * x, 2), lambda x: x + x)
    assert mine(5) == 10 and "from here on your function is used" in capsys.readouterr().out


@pytest.mark.parametrize(("answer", "expected"), [("a", "b"), (True, False), ({1}, {2}), ({"a": 1}, {}), ([], [1])])
def test_other_kinds_of_answers(answer, expected):
    assert difference(answer, expected) and difference(expected, expected) is None


def test_chapter_00_lru_hits_are_those_of_the_package():
    """The cases' answers against the package's own cache, one request at a time."""
    from mixoff.cache.cache import ExpertCache
    from mixoff.cache.events import HIT

    def hits(wanted, slots):
        cache = ExpertCache([slots], "lru")
        return sum(grant.kind == HIT for e in wanted for grant in cache.access(0, [(0, e)], False))

    assert check.lru_hits.verdict(hits) == "[ ok ] 6 cases"


# ---------------------------------------------------------------- the plan to play with

OLMOE = "allenai/OLMoE-1B-7B-0924"  # read in less than a second
LONG = "microsoft/Phi-3.5-MoE-instruct"  # made for 131,072 tokens
LARGE = "mistralai/Mixtral-8x22B-Instruct-v0.1"
CHOICES = {
    "all that fit": Choice(OLMOE),
    "two slots": Choice(OLMOE, slots=2, experts=16),
    "a small card": Choice(OLMOE, hardware="rtx-4060-laptop", experts=16, attention=16, context=4096),
    "no card": Choice(OLMOE, hardware="laptop", experts=8, group=64),
    "no card, few slots": Choice(OLMOE, hardware="laptop", experts=16, slots=5),
}


@pytest.mark.parametrize("choice", CHOICES.values(), ids=CHOICES)
def test_explorer_shows_the_plan(choice):
    outcome = explore(choice)
    plan, fast = outcome.plan, outcome.tiers[0]
    assert outcome.fits and plan.fits and outcome.change == ""
    assert outcome.slots == plan.slots_per_layer == (choice.slots or plan.slots_per_layer)
    assert fast.nbytes == plan.tiers["fast"] + plan.hardware.reserved_nbytes <= fast.limit
    assert {tier.name: tier.nbytes for tier in outcome.tiers[1:]}.items() <= {
        "RAM": plan.tiers["ram"],
        "disk": plan.tiers["disk"],
    }.items()
    asked = {"context": choice.context, "scheme": choice.scheme, "hardware": choice.hardware}
    if not choice.slots:
        assert plan.to_dict() == mixoff.plan(OLMOE, **asked).to_dict() | {"scheme": plan.scheme}


def test_explorer_begins_with_the_preset_mixed():
    assert Choice().scheme == mixoff.Scheme.preset("mixed")
    plan = explore(Choice(OLMOE)).plan
    assert plan.to_dict() == mixoff.plan(OLMOE).to_dict()


@pytest.mark.parametrize(
    ("choice", "changed"),
    [
        (Choice(LONG, context=131072), "context"),
        (Choice(LONG, experts=16, context=65536, hardware="rtx-4060-laptop"), "context"),
        (Choice(OLMOE, experts=16, slots=40, hardware="rtx-4060-laptop"), "slots"),
        (Choice(LARGE, experts=16, attention=16, hardware="rtx-4060-laptop"), "hardware"),
    ],
)
def test_smallest_change_fits_and_less_of_it_does_not(choice, changed):
    """One control alone has moved, and the step before its new value is still too large."""
    moved = smallest_change(choice)
    different = {name for name, value in asdict(moved).items() if value != getattr(choice, name)}
    assert different == {changed} and explore(moved).fits and not explore(choice).fits
    assert explore(choice).change
    if changed == "context":
        assert lacking_nbytes(replace(moved, context=2 * moved.context)) > 0


def test_explorer_says_when_one_change_is_not_enough():
    outcome = explore(Choice(LARGE, experts=16, attention=16, slots=8, hardware="rtx-4060-laptop"))
    assert outcome.change == "no single control is enough: move several" and "GiB too much" in outcome.verdict
    assert outcome.rates == {} and "does not run" in outcome.speed


@pytest.mark.parametrize(("model", "limit"), [(OLMOE, 4096), (LARGE, 32768), (LONG, 131072)])
def test_explorer_keeps_to_the_context_that_a_model_was_made_for(model, limit):
    with pytest.raises(mixoff.MixoffError, match=f"longer than {model} was made for: give {limit:,} tokens or fewer"):
        explore(Choice(model, context=2 * limit))
    explorer = PlanExplorer(model, context=limit)
    assert CONTEXTS[explorer.answer["contexts"] - 1] == limit and explorer.answer["lowered"] == 0
    explorer.choice = explorer.choice | {"model": OLMOE, "asked": 1}
    assert explorer.outcome.choice.context == 4096
    assert explorer.answer["lowered"] == (4096 if limit > 4096 else 0)


def test_explorer_calls_slow_what_takes_more_than_a_second_per_token():
    slow, quick = explore(Choice(experts=16)), explore(Choice(OLMOE))
    assert slow.fits and slow.slow and slow.rates["expected"] < 1 < quick.rates["expected"]
    assert slow.verdict.endswith(f", but is slow: a token takes {1 / slow.rates['expected']:.2g} s")
    assert not quick.slow and "slow" not in quick.verdict


def test_explorer_answers_a_browser_with_figures_or_a_reason():
    explorer = PlanExplorer(OLMOE)
    explorer.choice = explorer.choice | {"experts": 16, "slots": 999, "asked": 7}
    assert (explorer.answer["asked"], explorer.answer["slots"], explorer.answer["fits"]) == (7, 64, True)
    explorer.choice = explorer.choice | {"experts": 5, "asked": 8}
    assert explorer.answer == {"error": explorer.summary(), "asked": 8} and "5" in explorer.summary()
    with pytest.raises(mixoff.MixoffError, match="choose one of"):
        PlanExplorer(OLMOE, experts=5)


def test_still_plan_has_every_part_and_every_limit():
    explorer = PlanExplorer(OLMOE, experts=16)
    fig = explorer.figure()
    (ax,) = fig.axes
    assert [label.get_text().split("\n")[0] for label in ax.get_yticklabels()] == ["VRAM", "RAM", "disk"]
    assert sum(text.get_text().startswith("has") for text in ax.texts) == 2, "the disk's size is not known"
    drawn = sum(bar.get_width() for bar in ax.patches) * 2**30
    assert drawn == pytest.approx(sum(tier.nbytes for tier in explorer.outcome.tiers))
    matplotlib.pyplot.close(fig)


# ---------------------------------------------------------------- setup


def test_setup_is_quiet_repeatable_and_the_same_twice():
    code = (
        "from mixoff.classroom import setup; setup(); import torch; a = torch.rand(3); setup(); b = torch.rand(3);"
        "assert torch.equal(a, b) and torch.get_num_threads() == 1"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.stdout, done.stderr, done.returncode) == ("mixoff is ready\n" * 2, "", 0)


def test_setup_hides_gpus_where_a_chapter_says_so():
    code = (
        "import os; from mixoff.classroom import setup; setup(gpu=False); import torch; "
        "assert os.environ['CUDA_VISIBLE_DEVICES'] == '' and not torch.cuda.is_available()"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_setup_quiets_transformers():
    from transformers.utils import logging

    logging.set_verbosity_info()
    setup()
    assert logging.get_verbosity() == logging.ERROR
