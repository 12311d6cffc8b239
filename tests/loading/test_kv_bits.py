"""Keys and values in 4 and 8 bits: `generate` uses transformers' quantized cache, and a plan counts its bytes."""

import json

import pytest
import torch
from transformers.cache_utils import Cache, QuantizedCache

import mixoff
import tiny
from mixoff import MixoffError
from mixoff.commands.cli import main
from mixoff.shapes import kv_cache
from mixoff.shapes.kv_cache import advance
from mixoff.shapes.shape import from_config
from mixoff.text.generation import generate, load_tokenizer
from tiny import BUNDLED

PROMPT = "And the LORD said unto Moses,"


@pytest.fixture(autouse=True)
def hqq():
    pytest.importorskip("hqq", reason="hqq is not installed")


@pytest.mark.parametrize("bits", kv_cache.BITS)
@pytest.mark.parametrize(("heads", "width"), [(2, 16), (1, 24)])
def test_the_bytes_of_the_cache_are_what_a_plan_counts(bits, heads, width):
    """Odd numbers of tokens and a single head too: hqq packs two values into a byte."""
    torch.set_num_threads(1)
    shape = {"num_key_value_heads": heads, "head_dim": width, "num_attention_heads": 2}
    config = tiny.config_of("mixtral").__class__(**tiny.SHAPE | tiny.LOCAL | shape)
    model = mixoff_free_model(config)
    cache = QuantizedCache(config=config, **kv_cache.cache_options(config, bits))
    with torch.no_grad():
        for tokens in (37, 1, 1):
            _, cache = advance(model, torch.ones(1, tokens, dtype=torch.long), cache)
    held = sum(tensor.nbytes for tensor, _ in kv_cache._tensors(cache, None, set()))
    plain = from_config(config, "tiny", "float32")
    packed, working = plain.with_kv_bits(bits).cache
    residual = 2 * sum(layer.per_token for layer in plain.cache)  # two tokens came after the prompt
    # the last token's keys and values may be held by the cache and as the layers' newest tensors, never more
    assert packed.per_token * 37 <= held <= packed.per_token * 37 + residual + 16 * len(cache.layers) * 4
    assert packed.fixed == kv_cache.RESIDUAL * residual // 2 and working.per_token < residual


def mixoff_free_model(config):
    import transformers

    return transformers.AutoModelForCausalLM.from_config(config).eval()


def test_generate_keeps_keys_and_values_in_the_bits_that_were_asked_for():
    with mixoff.load(BUNDLED, "6MB", kv_bits=8, prefetch="none") as model:
        tokenizer = load_tokenizer(BUNDLED)
        ids = tokenizer(PROMPT, return_tensors="pt", return_token_type_ids=False)
        out = model.generate(**ids, max_new_tokens=3, do_sample=False, return_dict_in_generate=True)
        cache = next(value for value in out.values() if isinstance(value, Cache))
        assert isinstance(cache, QuantizedCache) and {layer.nbits for layer in cache.layers} == {8}
        coarse = [generate(model, tokenizer, PROMPT, 12).token_ids for _ in range(2)]
    with mixoff.load(BUNDLED, "6MB", prefetch="none") as model:
        exact = generate(model, tokenizer, PROMPT, 12).token_ids
    assert coarse[0] == coarse[1] and coarse[0][:2] == exact[:2], "eight bits change little"


def test_a_plan_and_its_command_count_fewer_bytes(capsys):
    nbytes = {}
    for bits in ("16", "8", "4"):
        words = ["plan", "mixtral-8x7b", "--hardware", "t4", "--scheme", "mixed", "--context", "32768"]
        assert main([*words, "--kv-bits", bits, "--json"]) == 0
        nbytes[bits] = json.loads(capsys.readouterr().out)["bytes"]["kv_cache"]
    per_token = 2 * 8 * 128 * 32  # values
    scales = 2 * (per_token // 64) * 2
    packed = {bits: per_token * int(bits) // 8 + scales for bits in ("8", "4")}
    full, working = 2 * per_token, 2 * 2 * per_token // 32
    assert nbytes == {"16": full * 32768} | {b: (packed[b] + working) * 32768 + 128 * full for b in packed}


@pytest.mark.parametrize("family", ["gpt_oss", "deepseek_v3", "jamba"])
def test_caches_of_another_form_are_refused(family):
    with pytest.raises(MixoffError, match="keeps states, windows or compressed keys"):
        mixoff.plan(tiny.config_of(family), hardware="t4", scheme="none", kv_bits=4)


def test_other_bits_and_a_missing_package_are_one_sentence(monkeypatch, capsys):
    with pytest.raises(MixoffError, match="kv_bits is 3: choose one of 4, 8"):
        mixoff.load(BUNDLED, "6MB", kv_bits=3)
    assert main(["run", "tiny-mixtral", "--prompt", "a", "--kv-bits", "5"]) == 2
    assert "unknown kv_bits '5': choose one of 4, 8, 16" in capsys.readouterr().err
    monkeypatch.setattr("mixoff.loading.kv_bits.find_spec", lambda name: None)
    with pytest.raises(MixoffError, match="pip install 'mixoff"):
        mixoff.load(BUNDLED, "6MB", kv_bits=4)
