"""What chapters say of bytes, bits and errors, computed with the package."""

import functools
import math
import re

import pytest
import torch
from safetensors import safe_open
from transformers import MixtralConfig

import badges
import chapter_rules
import mixoff
import nb
from claims import words
from mixoff.classroom import table2
from mixoff.quantize import quantize
from mixoff.store import describe
from mixoff.widgets import PlanExplorer

# ---------------------------------------------------------------- chapter 02: memory arithmetic

DEEPSEEK, MIXTRAL = "deepseek-ai/DeepSeek-V2-Lite", "mistralai/Mixtral-8x7B-Instruct-v0.1"
GPT_OSS = "openai/gpt-oss-20b"
shape_of = functools.cache(describe.shape_of)


@pytest.mark.parametrize(
    ("model", "without_nbytes"),
    [(DEEPSEEK, 27 * 16 * (192 + 128) * 2), (MIXTRAL, 2 * 32 * 32 * 128 * 2), (GPT_OSS, 2 * 24 * 8 * 64 * 2)],
)
def test_02_factor_that_a_trick_saves_within_its_model(model, without_nbytes):
    """Bytes per token without the trick, from the configuration, over what the package counts with it."""
    factor = without_nbytes * 32768 / shape_of(model).kv_nbytes(32768)
    assert f"by a factor of {factor:.1f}" in words("02") or f"by {factor:.1f}" in words("02")


def test_02_compression_saves_most_and_a_window_at_most_two():
    saved = {t: 2 * 24 * 8 * 64 * 2 * t / shape_of(GPT_OSS).kv_nbytes(t) for t in (128, 32768, 131072)}
    assert 1 <= saved[128] < 1.05 and saved[32768] < saved[131072] < 2


def test_02_deepseek_is_exact_with_its_own_attention():
    """Also the trap: with the dense layer alone the total looks fine, while attention is far off."""
    shape = shape_of(DEEPSEEK)
    config = shape.config
    D, H, head = config.hidden_size, config.num_attention_heads, config.qk_nope_head_dim + config.qk_rope_head_dim
    latent, value = config.kv_lora_rank, config.v_head_dim
    own = D * H * head + D * (latent + config.qk_rope_head_dim)
    own += latent * H * (config.qk_nope_head_dim + value) + H * value * D
    plain = 2 * D * config.head_dim * (H + config.num_key_value_heads)
    assert 27 * own == shape.parameters["attention"]
    rest = 26 * 66 * 3 * D * config.moe_intermediate_size + 3 * D * config.intermediate_size + 2 * config.vocab_size * D
    assert f"with all three: {(rest + 27 * own) / shape.total - 1:+.2%}" in words("02")
    assert f"{1 - (rest + 27 * plain) / shape.total:.2%} off".replace("%", " %") in words("02")
    assert f"attention is off by {1 - plain / own:.0%}".replace("%", " %") in words("02")


def test_02_answers_to_the_explorers_questions():
    def slots(model, bits, hardware):
        return PlanExplorer(model, experts=bits, group=64, hardware=hardware).outcome.slots

    assert slots(MIXTRAL, 2, "t4") == 8 > slots(MIXTRAL, 3, "t4")
    assert [slots(DEEPSEEK, bits, "rtx-4060-laptop") for bits in (2, 3)] == [64, 64]
    assert slots(DEEPSEEK, 4, "rtx-4060-laptop") < 64
    assert f"gpt-oss-20b in 2 bits keeps {slots(GPT_OSS, 2, 'rtx-4060-laptop')} of 32" in words("02")
    assert shape_of(GPT_OSS).total > shape_of(DEEPSEEK).total


def test_02_embeddings_of_gpt_oss_are_larger_than_its_attention():
    config = shape_of(GPT_OSS).config
    embeddings = 2 * config.vocab_size * config.hidden_size
    attention = 24 * 2 * config.hidden_size * config.head_dim * (64 + 8)
    assert f"embeddings, {embeddings / 1e9:.2f} billion" in words("02")
    assert f"its attention, {attention / 1e9:.2f} billion" in words("02") and embeddings > 1.7 * attention


# ---------------------------------------------------------------- chapter 03: quantization


def expert():
    """The matrix of an expert, (192, 192), that chapters 03 and 04 quantize."""
    folder = mixoff.models.path()
    key = "model.layers.4.block_sparse_moe.experts.2.w1.weight"
    files = [safe_open(path, "pt") for path in sorted(folder.glob("*.safetensors"))]
    return next(file.get_tensor(key) for file in files if key in file.keys()).float()


def test_03_four_bit_codes_against_two_bit_codes_in_small_groups():
    w = expert()
    made = {
        bits: quantize(w, bits=bits, group_size=group, solver="rtn", metadata_bits=8)
        for bits, group in ((2, 16), (4, 64))
    }
    error = {bits: ((w - q.dequantize()).norm() / w.norm()).item() for bits, q in made.items()}
    assert f"For {made[4].bits_per_weight:.2f} bits you can have 4-bit codes" in words("03")
    assert f"{error[2] / error[4]:.1f} times smaller" in words("03")


# ---------------------------------------------------------------- chapter 15: the capstone


def test_15_the_host_of_the_papers_engine_is_above_all_floors_but_one():
    fit = table2.calibrate()
    assert f"host of the paper's engine {fit.host_ms:.0f}, its chip {fit.compute_ms['T4']:.0f} ms" in words("15")
    assert 200 < fit.host_ms < 300 and 0.7 < fit.compute_ms["T4"] / fit.host_ms < 1
    plans = {name: mixoff.plan(MIXTRAL, scheme=name, hardware="t4") for name in ("small", "mixed", "quality")}
    floors = {name: max(plan.floors_ms["memory"], plan.floors_ms["transfer"]) for name, plan in plans.items()}
    assert floors["small"] < floors["mixed"] < fit.host_ms < floors["quality"]


# ---------------------------------------------------------------- docs/teach.md


@pytest.mark.parametrize("path", badges.chapters(), ids=lambda path: path.stem)
def test_later_cells_use_the_solutions_function(path):
    cells = [cell for _, cell in chapter_rules.code_cells(nb.read(path))]
    stubs = {
        name
        for cell in cells
        if "exercise" in chapter_rules.tags(cell)
        for name in re.findall(r"^def (\w+)", cell.source, re.M)
    }
    free = [cell.source for cell in cells if not {"exercise", "check"} & chapter_rules.tags(cell)]
    assert stubs and not [name for name in stubs for source in free if re.search(rf"(?<![.\w]){name}\(", source)]


# ---------------------------------------------------------------- chapter 04: HQQ


def first_rounding(w, group=32, top=3):
    """Restored weights of 2-bit rounding with one ruler per group, as HQQ starts."""
    w = w.reshape(-1, group).double()
    low, high = w.min(1, keepdim=True).values, w.max(1, keepdim=True).values
    scale = (high - low) / top
    return low + ((w - low) / scale).round() * scale


def test_04_few_errors_are_above_the_threshold():
    w, threshold = expert(), 10 ** (-1 / 1.3)
    errors = (w.reshape(-1, 32).double() - first_rounding(w)).abs()
    share = (errors > threshold).double().mean().item()
    assert f"{share:.3%} are above it, the largest {errors.max():.3f}" in words("04") and share < 1e-3
    gaussian = torch.randn(192, 192, generator=torch.Generator().manual_seed(0)) * 0.02
    assert (gaussian.reshape(-1, 32).double() - first_rounding(gaussian)).abs().max() < threshold / 4
    assert MixtralConfig().initializer_range == 0.02


def test_04_a_least_squares_fit_shrinks_by_its_squared_error():
    w = expert().reshape(-1, 32).double()
    codes = (
        (w - w.min(1, keepdim=True).values) / (w.max(1, keepdim=True).values - w.min(1, keepdim=True).values) * 3
    ).round()
    centred = codes - codes.mean(1, keepdim=True)
    scale = (centred * w).sum(1, keepdim=True) / (centred**2).sum(1, keepdim=True)
    fitted = w.mean(1, keepdim=True) + scale * centred
    gain, error = (w * fitted).sum() / (w * w).sum(), (w - fitted).norm() / w.norm()
    assert gain.item() == pytest.approx(1 - error.item() ** 2, abs=1e-12)
    said = re.search(r"1 - error² is ([\d.]+), the gain ([\d.]+)", words("04"))
    assert said and said[1] == said[2]


# ---------------------------------------------------------------- chapter 07: overlap


def test_07_what_the_fit_of_table_2_says_and_cannot_say():
    fit = table2.calibrate()
    cells = sum(len(row) for row in table2.TABLE_2.values())
    assert f"fits {fit.free} parameters to {cells} cells" in words("07")
    assert f"the processor that runs Python, {fit.host_ms:.0f} ms per token" in words("07")
    assert f"the T4 computed for {fit.compute_ms['T4']:.0f} ms per token" in words("07")
    began = 1 / (1 + math.exp(-table2._START[9]))  # recall
    assert fit.recall == pytest.approx(began, abs=0.005)
