"""Generation: text streams as it decodes whole, and what a model's own files ask for ends in words or is left out."""

import random

import pytest
import torch

import mixoff
from mixoff import MixoffError, models
from mixoff.text import generation

PROMPT = "And the LORD said unto Moses,"


@pytest.fixture(scope="module")
def tokenizer():
    return generation.load_tokenizer(models.path())


@pytest.fixture
def model():
    with mixoff.load("tiny-mixtral", "1GiB", prefetch="none") as loaded:
        yield loaded


def test_pieces_are_the_text_of_all_tokens(tokenizer):
    """Random tokens: halves of characters, special tokens, spaces that decoding strips or merges."""
    rng = random.Random(0)
    for _ in range(400):
        ids = [rng.randrange(len(tokenizer)) for _ in range(rng.randrange(1, 60))]
        decoder = generation.Decoder(tokenizer)
        pieces = [decoder.add([i]) for i in ids]
        assert "".join([*pieces, decoder.end()]) == tokenizer.decode(ids, skip_special_tokens=True) == decoder.text


def test_a_character_of_several_tokens_comes_whole(tokenizer):
    decoder, text = generation.Decoder(tokenizer), "a 🙂 é 漢字 b"
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    pieces = [decoder.add([i]) for i in ids]
    assert not any("\ufffd" in piece for piece in pieces) and "".join(pieces) + decoder.end() == text
    assert len(ids) > len(text), "the bundled tokenizer spells these by bytes"


def test_work_of_a_token_does_not_grow_with_the_text(tokenizer):
    """Counted, not timed: tokens that are decoded again for each new one."""

    class Counting:
        def __init__(self):
            self.most = 0

        def decode(self, ids, **how):
            self.most = max(self.most, len(ids))
            return tokenizer.decode(ids, **how)

    counting = Counting()
    decoder, text = generation.Decoder(counting), "It was a fine morning 🙂 in the spring. " * 100
    for i in tokenizer(text, add_special_tokens=False)["input_ids"]:
        decoder.add([i])
    assert len(decoder.ids) > 1000 and counting.most < 16


BAD = [("temperature", float("nan")), ("temperature", -1), ("temperature", float("inf")), ("seed", 2**64)]
BAD += [("seed", 1.5), ("top_p", 0), ("top_p", 1.5), ("top_k", 0)]


@pytest.mark.parametrize(("name", "value"), BAD)
def test_sampling_out_of_range_is_refused(model, tokenizer, name, value):
    with pytest.raises(MixoffError, match=f"{name} is "):
        generation.generate(model, tokenizer, PROMPT, 2, **{name: value})


OWN = [{"num_beams": 4}, {"stop_strings": ["zzz"]}, {"num_return_sequences": 2, "num_beams": 2}]
OWN += [{"prompt_lookup_num_tokens": 3}, {"return_dict_in_generate": True}]


@pytest.mark.parametrize("own", OWN)
def test_what_a_generation_config_asks_for_is_left_out_or_served(model, tokenizer, own):
    want = generation.generate(model, tokenizer, PROMPT, 5).token_ids
    for name, value in own.items():
        setattr(model.generation_config, name, value)
    assert generation.generate(model, tokenizer, PROMPT, 5).token_ids == want


def test_a_generation_config_that_transformers_refuses_is_one_sentence(model, tokenizer):
    model.generation_config.cache_implementation = "nonsense"
    with pytest.raises(MixoffError, match=r"refuses this model's generation_config.json \(.*nonsense"):
        generation.generate(model, tokenizer, PROMPT, 2)


def test_an_error_of_a_listener_comes_out_as_itself(model, tokenizer):
    def fail(piece):
        raise ValueError("of the listener")

    with pytest.raises(ValueError, match="^of the listener$"):
        generation.generate(model, tokenizer, PROMPT, 2, on_text=fail)


def test_prompts_that_the_model_cannot_read_are_refused(model):
    tokenizer = generation.load_tokenizer(models.path())
    with pytest.raises(MixoffError, match="character 3 of the prompt is not valid Unicode"):
        generation.generate(model, tokenizer, "ab\ud800", 2)
    tokenizer.add_tokens(["<new>"])
    known = model.config.vocab_size
    with pytest.raises(MixoffError, match=f"token {known} .'<new>'., and the model has embeddings for {known}"):
        generation.generate(model, tokenizer, "a <new>", 2)


def test_a_start_token_that_the_prompt_spells_out_is_not_doubled(model, tokenizer):
    ids = generation.encode(model, tokenizer, f"{tokenizer.bos_token}{PROMPT}")["input_ids"][0].tolist()
    assert ids == tokenizer(PROMPT)["input_ids"] and ids.count(tokenizer.bos_token_id) == 1


@pytest.mark.parametrize("where", ["model.layers.3.input_layernorm", "model.layers.5.self_attn.v_proj", "model.norm"])
def test_numbers_that_are_not_finite_end_generation_and_are_named(model, tokenizer, where):
    weight = model.get_submodule(where).weight
    with torch.no_grad():
        weight[..., 0] = float("nan")
    with pytest.raises(MixoffError, match=f"not finite for new token 1, first in {where}: its weights are damaged"):
        generation.generate(model, tokenizer, PROMPT, 4)


def test_numbers_of_an_expert_that_are_not_finite_are_named_too(tmp_path, tokenizer):
    from safetensors.torch import load_file, save_file

    import tiny

    folder = tiny.save_random(tmp_path / "model")
    weights = load_file(folder / "model.safetensors")
    for name in weights:
        if "layers.1" in name and "experts" in name:
            weights[name][:] = float("inf")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with mixoff.load(folder, "1GiB", prefetch="none") as loaded, torch.no_grad():
        found = generation.first_not_finite(loaded, torch.tensor([[1, 5, 9]]))
    assert found.startswith("model.layers.1.mlp.experts")


def test_a_configuration_that_transformers_cannot_run_is_one_sentence(tmp_path, tokenizer):
    import json
    import shutil

    folder = shutil.copytree(models.path(), tmp_path / "model")
    config = json.loads((folder / "config.json").read_text()) | {"sliding_window": 0}
    (folder / "config.json").write_text(json.dumps(config))
    refusal = pytest.raises(MixoffError, match="cannot run a model with this config.json .*size of tensor")
    with mixoff.load(folder, "1GiB", prefetch="none") as loaded, refusal:
        generation.generate(loaded, tokenizer, PROMPT, 2)
