"""The figure of docs/quantization.md comes from its tables; llama.cpp gets the importance matrix that it defines."""

import pytest
import torch
from transformers import AutoModelForCausalLM

import _llama
import quality_figure
from mixoff.shapes import config
from tiny import config_of


def test_rows_of_the_page_are_found_by_kind(root):
    found = quality_figure.points((root / "docs" / "quantization.md").read_text(encoding="utf-8"))
    assert min(map(len, found.values())) >= 4
    for values in found.values():
        best = quality_figure.best(values)
        assert all(a[0] < b[0] and a[1] > b[1] for a, b in zip(best, best[1:], strict=False))
        assert all(any(bits <= b and kl <= k for bits, kl in best) for b, k in values)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("llama.cpp IQ2_S", quality_figure.LLAMA),
        ("2 bits g32 hqq", quality_figure.HQQ),
        ("2 bits g32 lsq", quality_figure.FREE),
        ("`mixed`, data-free", quality_figure.FREE),
        ("`mixed`", quality_figure.CALIBRATED),
        ("preset `mixed`", None),
        ("attention alone hqq", None),
    ],
)
def test_kinds(name, kind):
    assert quality_figure.kind(name) == kind


def test_importance_is_the_mean_square_of_what_an_expert_gets():
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config_of("mixtral")).eval()
    calls, ids = [], torch.randint(3, 128, (3, 20))
    module = list(config.expert_modules(model).values())[1]
    hook = module.register_forward_pre_hook(lambda _, inputs: calls.append(inputs))
    seen = _llama.importance(model, ids)[module]
    hook.remove()
    x, index = (torch.cat([call[i] for call in calls]) for i in (0, 1))
    for e in range(module.num_experts):
        mine = x[(index == e).any(-1)].double()
        gate, up = (mine @ module.gate_up_proj[e].double().t()).chunk(2, -1)
        h = torch.nn.functional.silu(gate) * up
        for name, inputs in (("gate_up_proj", mine), ("down_proj", h)):
            assert torch.allclose(seen[name][e].double(), inputs.square().mean(0), rtol=1e-5)
