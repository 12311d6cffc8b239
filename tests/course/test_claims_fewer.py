"""Statements of chapter 13: each is computed again, from other text or by other means than the chapter's cells."""

import json
import re

import pytest
import torch
from torch.nn import functional

import mixoff
from mixoff import models, quality
from mixoff.classroom.prices import cheapest
from mixoff.text.generation import load_tokenizer
from tiny import BUNDLED, resident

CHAPTER = "13_fewer_experts.ipynb"


@pytest.fixture(scope="module")
def over():
    return quality.windows(load_tokenizer(BUNDLED), models.heldout(), count=2, length=64)


@pytest.fixture(scope="module")
def table(root):
    """Rows of the chapter's table as stored: MB per token, millinats and their error, by name."""
    nb = json.loads((root / "notebooks" / CHAPTER).read_text(encoding="utf-8"))
    text = "".join("".join(o.get("text", "")) for c in nb["cells"] for o in c.get("outputs", ()))
    row = re.compile(r"^(\S.*?)\s{2,}([\d.]+)\s+([\d.]+) ± ([\d.]+)\s+[\d.]+ ± [\d.]+$", re.M)
    return {name: tuple(map(float, values)) for name, *values in row.findall(text)}


def test_most_experts_are_nearer_to_nothing_than_to_each_other(over):
    """By hooks on the experts' outputs one at a time, where the chapter computes all at once."""
    model, better = resident(BUNDLED), 0
    model.set_experts_implementation("eager")
    inputs = {}
    for i, layer in enumerate(model.model.layers):
        layer.mlp.experts.register_forward_pre_hook(lambda m, args, i=i: inputs.__setitem__(i, args[:2]))
    with torch.no_grad():
        model(over.ids[:, 0], use_cache=False)
        for i, layer in enumerate(model.model.layers):
            x, chosen = inputs[i]
            gate_up, down = layer.mlp.experts.gate_up_proj, layer.mlp.experts.down_proj
            for e in range(8):
                rows = x[(chosen == e).any(1)]
                if not len(rows):
                    continue
                outputs = []
                for other in range(8):
                    gate, up = functional.linear(rows, gate_up[other]).chunk(2, -1)
                    outputs.append(functional.linear(functional.silu(gate) * up, down[other]))
                wrong = [float((y - outputs[e]).norm() / outputs[e].norm()) for y in outputs]
                better += min(w for n, w in enumerate(wrong) if n != e) < 1
    assert better <= 8  # of 64


def test_substitution_buys_nothing_over_skipping(table):
    """At about the same bytes KL is not lower by two errors."""
    skip, replace = table["skip"], table["replace 0.5"]
    assert abs(skip[0] - replace[0]) < 0.03 and replace[1] > skip[1] - 2 * skip[2]


def test_prices_are_in_three_groups(table):
    """Token by token, gone, and trained: each group apart from the next by more than its errors."""
    assert table["exact"][1:] == (0.0, 0.0) and len(table) == 13
    by_token = max(table[name][1] for name in ("top-k 0.9", "top-k 0.8", "top-k 0.7", "skip", "replace 0.5"))
    trained = [table[name][1] for name in ("student, four", "student, dense")]
    gone = [table[name][1] for name in ("4 by loss", "4 by counts", "4 merged")]
    assert 10 * by_token < 1000 and by_token < trained[0] / 3 < trained[1] and max(trained) < min(gone)
    assert table["4 by loss"][1] + 3 * table["4 by loss"][2] < table["4 by counts"][1] < table["4 merged"][1]
    assert table["7 by counts"][1] > 3 * table["skip"][1]
    assert table["4 by loss"][1] > 50 * 14.16  # docs/quantization.md, experts in 4 bits


def test_light_experts_are_missed_more_often():
    """Question 2: in an LRU cache of 4 slots a token's lighter expert misses more often than its heavier one."""
    from mixoff.cache.cache import ExpertCache

    missed = [0, 0]
    for trace in mixoff.trace.load_domains(BUNDLED / "traces.npz").values():
        for layer in range(trace.experts.shape[1]):
            cache = ExpertCache([4], "lru")
            for row in trace.experts[:600, layer].tolist():
                here = set(cache.slot_of)
                for k, e in enumerate(row):
                    missed[k] += (0, e) not in here
                list(cache.access(0, [(0, e) for e in row]))
    assert missed[1] > 1.3 * missed[0]


@pytest.mark.parametrize("name", ["four", "dense"])
def test_students_load_like_any_model_and_beat_what_they_began_as(name, over, table):
    """Small, sound to the byte, with little memory as with much; on other windows they are the better half too."""
    store = models.students()[name]
    assert sum(path.stat().st_size for path in store.iterdir()) < 5e6
    assert mixoff.verify(store, full=True)["experts"] == {"four": 32, "dense": 8}[name]
    teacher = resident(BUNDLED)
    reference = quality.predictions(teacher, over)
    with mixoff.load(store, "64MB") as student:
        scores = quality.measure(student, over, reference)
        assert student.config.num_local_experts == {"four": 4, "dense": 1}[name]
    assert 1000 * scores.kl.mean() < table["4 by loss"][1]


def test_the_students_card_is_that_of_their_runs(root):
    """Tokens and minutes on the card are those in training.json; a run is less than an hour of one core."""
    card = (models.HERE / "students" / "README.md").read_text(encoding="utf-8")
    for name, store in models.students().items():
        run = json.loads((store / "training.json").read_text(encoding="utf-8"))
        assert f"| {name} | {run['tokens'] / 1e6:.2f} M | {run['cpu_s'] / 60:.0f} |" in card and run["cpu_s"] < 3600
        assert run["history"][-1]["mean"] < run["history"][0]["mean"]


def test_the_page_has_the_chapters_prices(root, table):
    page = (root / "docs" / "quantization.md").read_text(encoding="utf-8")
    for name, (moved, kl, error) in table.items():
        assert f"| {name} | {moved:.3f} | {kl:.1f} ± {error:.1f} |" in page, name


def test_the_slider_names_what_brute_force_does(table):
    for most in (0, 4, 20, 40, 700, 5000):
        can = [name for name, row in table.items() if row[1] <= most]
        assert cheapest(table, most) == min(can, key=lambda name: table[name][0])
    with pytest.raises(ValueError, match="give an exact row"):
        cheapest({"prune": (0.0, 900.0, 3.0)}, 10)
