"""What chapters say of routing and caches, computed from the bundled model and its traces."""

import itertools

import numpy as np
import pytest
import torch

import mixoff
from claims import plain, traces, words
from mixoff.trace.routers import preset

# ---------------------------------------------------------------- chapter 01: the router


@pytest.fixture(scope="module")
def ladder():
    """Loss of 128 tokens per domain, (5,) each, by the ranks of the experts to which every router sends its tokens."""
    model, tokenizer = plain()
    texts = [text[:3000] for text in mixoff.models.heldout().values()]
    windows = [tokenizer(text, return_tensors="pt")["input_ids"][:, :128] for text in texts]
    generator = torch.Generator().manual_seed(0)

    def drawn(tokens):
        return 2 + torch.rand(tokens, 6, generator=generator).topk(2).indices

    def losses(ranks):
        def elsewhere(router, args, out):
            order = out[0].topk(8).indices
            places = drawn(len(order)) if ranks == "drawn" else torch.tensor(ranks).expand(len(order), -1) - 1
            picked = order.gather(1, places)
            weights = out[0].softmax(-1).gather(-1, picked)
            return out[0], weights / weights.sum(-1, keepdim=True), picked

        hooks = [layer.mlp.gate.register_forward_hook(elsewhere) for layer in model.model.layers]
        with torch.no_grad():
            found = np.array([model(x, labels=x).loss.item() for x in windows])
        for hook in hooks:
            hook.remove()
        return found

    return {ranks: losses(ranks) for ranks in ((1, 2), (1, 3), (1,), (2, 3), (3, 4), "drawn", (7, 8))}


def test_01_the_second_expert_may_be_swapped_and_the_first_may_not(ladder):
    rise = {ranks: row - ladder[1, 2] for ranks, row in ladder.items()}
    assert (rise[1, 3] > 0).all() and rise[1, 3].mean() < rise[(1,)].mean() < 0.2
    assert (rise[2, 3] > 2).all()


def test_01_near_misses_are_the_best_of_the_wrong_pairs(ladder):
    assert (ladder[2, 3] < ladder[3, 4]).all()
    assert (ladder[3, 4] < ladder["drawn"]).all()
    assert (ladder["drawn"] < ladder[7, 8]).all()


def test_01_two_of_all_eight_often_draw_a_chosen_expert():
    """Why they are no fair control."""
    pairs = list(itertools.combinations(range(8), 2))
    share = sum(0 in pair or 1 in pair for pair in pairs) / len(pairs)
    assert share == pytest.approx(1 - 6 * 5 / (8 * 7)) and f"in {share:.0%}".replace("%", " %") in words("01")


def test_01_sixty_four_tokens_do_not_always_touch_all_eight():
    touched = {
        name: np.array(
            [len(np.unique(rows[:, layer])) for rows in np.split(trace.experts, 32) for layer in range(8)]
        )
        for name, trace in traces().items()
    }
    means, full = [t.mean() for t in touched.values()], [100 * (t == 8).mean() for t in touched.values()]
    said = f"touch {min(means):.1f} to {max(means):.1f} on average, and all eight in {min(full):.0f} to {max(full):.0f} %"
    assert said in words("01")
    chance = preset("uniform").trace(64 * 100, 1).experts.reshape(100, -1)
    assert min(len(np.unique(row)) for row in chance) == 8


def test_01_experts_lean_but_serve_every_domain():
    load = np.stack([trace.counts() / trace.tokens for trace in traces().values()])  # (5, L, E)
    assert f"{(load.max(0) > 0.9).sum()} of 64 experts serve more than 0.90" in words("01")
    assert load.min() > 0


def test_01_hits_are_never_more_than_repeats():
    for trace in traces().values():
        served = mixoff.simulate(trace, "lru", slots=2)
        for layer, repeats in enumerate(both for _, both in trace.repeat_rates()[:, :2]):
            counts = served.per_layer[layer]
            assert counts.hits / (counts.hits + counts.misses) <= repeats
