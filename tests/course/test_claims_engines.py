"""What chapter 14 and docs/engines.md say, computed."""

import functools

import pytest
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

import mixoff
from mixoff import models
from mixoff.classroom.engines import workload
from mixoff.shapes.sizes import sizes_of
from mixoff.store import describe
from mixoff.trace.routers import preset

MIXTRAL = "mistralai/Mixtral-8x7B-Instruct-v0.1"


@functools.cache
def mixtral():
    return workload(sizes_of(describe.shape_of(MIXTRAL), "quality"), preset("mixtral-8x7b"))


def test_bitsandbytes_leaves_the_experts_of_a_mixtral_of_today_in_16_bits():
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    config = BitsAndBytesConfig(load_in_4bit=True)
    model = AutoModelForCausalLM.from_pretrained(models.path(), quantization_config=config)
    weights = {name: weight.dtype for name, weight in model.named_parameters()}
    assert {dtype for name, dtype in weights.items() if ".experts." in name} == {torch.float16}
    assert {dtype for name, dtype in weights.items() if "self_attn" in name} == {torch.uint8}
    with pytest.raises(TypeError, match="load_in_4bit"):
        AutoModelForCausalLM.from_pretrained(models.path(), load_in_4bit=True)


def test_what_4_bits_then_take():
    shape = describe.shape_of(MIXTRAL)
    attention, experts = shape.parameters["attention"], shape.parameters["experts"]
    found = [2 * (shape.total - n) + 0.5625 * n for n in (attention, attention + experts)]
    assert [round(nbytes / 1e9) for nbytes in found] == [91, 27]


def test_sixteen_layers_of_experts_stay_in_ram_on_a_t4():
    of = mixtral()
    on_card = {n: of.backbone + (1 - n / 32) * of.experts for n in (12, 13, 14, 15, 16)}
    assert on_card[16] < 14.3e9 < on_card[12] and 11e9 < of.experts / 2 < 12.1e9


def test_links_that_break_even():
    of = mixtral()

    def link(share, cpu):
        return (1 - of.hits(share)) / ((1 - share) * (1 / cpu - 1 / 320e9)) / 1e9

    assert link(0.5, 10e9) == pytest.approx(8.7, abs=0.05)
    assert [round(link(0.5, cpu)) for cpu in (25e9, 50e9)] == [23, 50]
    assert min(link(n / 8, 50e9) for n in range(1, 8)) > 25  # no PCIe 4.0 link


def test_slots_of_two_ranks_are_one_cache():
    """Misses of 2 and of 4 slots per layer, as the second answer to question 3 says them."""
    tokens = torch.tensor([[1, 5, 9, 33, 7, 80, 12, 44, 10]])
    rates = []
    for slots in (2, 4):
        with mixoff.load(models.path(), "1GiB") as model:
            size, rest = model.mixoff.arena.slot_nbytes, model.mixoff.allocated_nbytes
            budget = rest - (model.mixoff.slots - 8 * slots) * size
        with mixoff.load(models.path(), budget, prefetch="none") as model:
            model.generate(tokens, max_new_tokens=160, do_sample=False, attention_mask=torch.ones_like(tokens))
            rates.append(1 - model.mixoff.info().hit_rate)
    assert rates[0] > 2 * rates[1]
