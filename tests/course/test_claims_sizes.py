"""What chapters say of bytes, bits and errors, computed with the package."""

import functools

import pytest

from claims import words
from mixoff.classroom.widgets import PlanExplorer
from mixoff.store import describe

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
