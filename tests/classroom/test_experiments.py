"""Arithmetic of the small widgets: rounding as in the package, a router swapped and put back, the chances of a coin."""

import json

import matplotlib
import numpy as np
import pytest
import torch

matplotlib.use("Agg")

import mixoff
from mixoff.quantize import quantize
from mixoff.widgets import BlindVote, OutlierRuler, RouterSwap, blind_vote, outlier, router_swap


@pytest.fixture(scope="module")
def model():
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 16, "num_attention_heads": 2, "num_key_value_heads": 1}
    config = MixtralConfig(vocab_size=64, num_hidden_layers=2, num_local_experts=4, num_experts_per_tok=2, **sizes)
    return MixtralForCausalLM(config).eval()


IDS = torch.arange(24).reshape(2, 12)


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


def test_ranks_1_and_2_are_the_trained_router_and_every_router_is_put_back(model):
    before = logits(model)
    with router_swap.swapped(model, (1, 2)):
        assert torch.equal(logits(model), before)
    with pytest.raises(KeyboardInterrupt), router_swap.swapped(model, (3, 4)):
        assert not torch.equal(logits(model), before)
        raise KeyboardInterrupt
    assert torch.equal(logits(model), before)


def test_the_tokens_go_to_the_ranks_that_were_chosen(model):
    seen = []
    gate = model.model.layers[0].mlp.gate
    with router_swap.swapped(model, (2, 4)):
        hook = gate.register_forward_hook(lambda module, args, out: seen.append(out))
        logits(model)
        hook.remove()
    scores, weights, chosen = seen[0]
    assert torch.equal(chosen, scores.argsort(-1, descending=True)[:, [1, 3]])
    chances = scores.softmax(-1).gather(-1, chosen)
    torch.testing.assert_close(weights, chances / chances.sum(-1, keepdim=True))


def test_a_swap_knows_the_loss_of_every_pair_and_of_each_alone(model):
    def decode(ids, skip_special_tokens):
        return "".join(f" {int(i)}" for i in ids)

    swap = RouterSwap(model, IDS, IDS[:1, :3], decode)
    assert len(swap.rows) == 6 + 4 and swap.lead == " 0 1 2" and swap.uniform == pytest.approx(np.log(64))
    with torch.no_grad():
        assert swap.losses[1, 2] == pytest.approx(float(model(IDS, labels=IDS).loss), abs=1e-3)
    assert all(len(text.split()) == router_swap.WORDS for _, _, text in swap.rows)
    assert f"as trained, ranks 1 and 2: {swap.losses[1, 2]:.2f}" in swap.summary() and "2 windows of 12" in swap.about
    assert json.loads(json.dumps(swap.rows)) == swap.rows and len(swap.figure().axes[0].texts) == 16
    matplotlib.pyplot.close("all")


@pytest.mark.parametrize("bits", outlier.BITS)
def test_rounding_is_the_packages(bits):
    w = np.random.default_rng(bits).normal(size=32)
    ours, _ = outlier.rounded(w, bits)
    theirs = quantize(
        torch.tensor(w, dtype=torch.float32)[None], bits=bits, group_size=32, solver="rtn", metadata_bits=16
    )
    np.testing.assert_allclose(ours, theirs.dequantize()[0].double(), atol=5e-3)


def test_an_outlier_hurts_the_others_and_more_bits_help():
    weights = [0.1, -0.2, 0.15, -0.5, 0.05, 0.3]
    ruler = OutlierRuler(weights, bits=2)
    assert ruler.at == 3 and ruler.moved(2)[3] == -1.0
    near, far = (outlier.error_of_others(ruler.moved(factor), 3, 2) for factor in (1, 3))
    assert near < far and outlier.error_of_others(ruler.moved(3), 3, 4) < far
    assert f"three times as far out: scale {(0.3 + 1.5) / 3:.3f}, error of the others {far:.2f}" in ruler.summary()
    assert outlier.rounded([1.0, 1.0, 1.0], 2)[1] == 1.0, "equal weights have a ruler too"
    assert len(ruler.figure().axes) == 2 and repr(ruler) == "OutlierRuler(6 weights, 2 bits)"
    matplotlib.pyplot.close("all")
    for wrong in (([1.0, 2.0], 2), (weights, 8)):
        with pytest.raises(mixoff.MixoffError, match="give three weights or more, and 2, 3 or 4 bits"):
            OutlierRuler(*wrong)


def test_a_vote_hides_the_sides_evenly_and_knows_a_coins_chances():
    rounds = [(f"p{i}", f"full {i}", f"fewer {i}") for i in range(100)]
    vote = BlindVote(rounds)
    assert vote.rounds == BlindVote(rounds).rounds, "the same in every run"
    assert all(each[each["side"]].startswith("fewer") for each in vote.rounds)
    sides = [each["side"] for each in vote.rounds]
    assert sides.count("left") == 50 and sides != ["left", "right"] * 50, "no side and no rhythm is a good guess"
    votes = np.random.default_rng(0).integers(0, 2, (20_000, 6)).sum(1)
    for right in range(7):  # within four standard errors: a false alarm in less than one of 2,000 runs
        assert abs(blind_vote.chance_of(right, 6) - (votes >= right).mean()) < 4 * 0.5 / 20_000**0.5
    assert (
        BlindVote([("a", "b", "b"), ("c", "d", "e")]).summary() == "2 rounds, 2-bit against 16 bits; the same text in 1"
    )
    with pytest.raises(mixoff.MixoffError, match="needs a round"):
        BlindVote([])
