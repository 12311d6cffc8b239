"""Small models for tests: the bundled one, and random ones of other shapes, dtypes and families, made in a moment."""

import torch
from transformers import AutoModelForCausalLM, MixtralConfig, OlmoeConfig, Qwen3MoeConfig

from mixoff import models

BUNDLED = models.path()
SHAPE = {
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 128,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
FAMILIES = {
    "mixtral": lambda: MixtralConfig(**SHAPE, intermediate_size=96, num_local_experts=4, num_experts_per_tok=2),
    # its first layer is dense, and 72 is no multiple of the block in which weights are widened
    "qwen3_moe": lambda: Qwen3MoeConfig(
        **SHAPE,
        intermediate_size=96,
        moe_intermediate_size=72,
        num_experts=8,
        num_experts_per_tok=2,
        mlp_only_layers=[0],
    ),
    "olmoe": lambda: OlmoeConfig(**SHAPE, intermediate_size=48, num_experts=16, num_experts_per_tok=4),
}


def save_random(folder, family="mixtral", dtype=torch.float32, **kwargs):
    """Write a random model of `family` to `folder` as its own `save_pretrained` does, per-expert keys and all."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(FAMILIES[family]()).to(dtype)
    model.save_pretrained(folder, **kwargs)
    return folder


def resident(folder, dtype=torch.float32):
    """The oracle: the model in plain transformers with every expert resident, computed by `grouped_mm`."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, experts_implementation="grouped_mm").eval()


def decode(model, ids, new_tokens=10, **kwargs):
    """Greedy tokens, and the logits of every step, of a batch: `(B, new_tokens)`, `(new_tokens, B, V)`."""
    out = model.generate(
        ids,
        max_new_tokens=new_tokens,
        min_new_tokens=new_tokens,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
        pad_token_id=0,
        **kwargs,
    )
    return out.sequences, torch.stack(out.logits)
