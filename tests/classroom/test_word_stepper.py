"""A packed word, step by step: the steps are those of the package's packing, and end in the product."""

import random

import matplotlib
import pytest

matplotlib.use("Agg")

import torch

from mixoff.errors import MixoffError
from mixoff.quantize.layout import pack
from mixoff.widgets import WordStepper


@pytest.mark.parametrize("seed", range(5))
def test_four_steps_meet_every_code_once(seed):
    draw = random.Random(seed)
    codes, activations = [draw.randrange(4) for _ in range(16)], [draw.randrange(-9, 10) for _ in range(16)]
    stepper = WordStepper(codes, activations)
    assert stepper.word == pack(torch.tensor([codes], dtype=torch.int32), 2, 16).item() % 2**32
    met = {i: code for step in stepper.steps for code, i in zip(step["codes"], step["inputs"], strict=True)}
    assert met == dict(enumerate(codes))
    assert stepper.steps[-1]["total"] == sum(q * x for q, x in zip(codes, activations, strict=True))
    assert [step["shift"] for step in stepper.steps] == [0, 2, 4, 6]


def test_what_is_no_word_is_refused():
    with pytest.raises(MixoffError, match="16 codes of 0 to 3"):
        WordStepper([0, 1, 2, 4] * 4, [1] * 16)
    with pytest.raises(MixoffError, match="16 codes of 0 to 3"):
        WordStepper([0] * 15, [1] * 16)
    with pytest.raises(MixoffError, match="16 activations, not 3"):
        WordStepper([0] * 16, [1] * 3)


def test_the_still_twin_shows_every_bit():
    stepper = WordStepper([3, 1] * 8, list(range(16)))
    fig = stepper.figure()
    drawn = [text.get_text() for text in fig.axes[0].texts]
    assert len([text for text in drawn if text in ("0", "1")]) == 4 * 32
    assert drawn[-1].endswith(f"sum {stepper.steps[-1]['total']}")
    assert repr(stepper) == f"WordStepper(16 codes, sum {stepper.steps[-1]['total']})"
    matplotlib.pyplot.close(fig)
