"""Small models for tests: the bundled one, and random ones of other shapes, dtypes and families, made in a moment."""

import torch
import transformers
from transformers import AutoModelForCausalLM

import mixoff
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
DEEPSEEK = {"n_shared_experts": 1, "kv_lora_rank": 32, "q_lora_rank": 32, "qk_rope_head_dim": 8, "qk_nope_head_dim": 16}
DEEPSEEK |= {"v_head_dim": 16, "num_key_value_heads": 4, "topk_group": 1, "first_k_dense_replace": 1}
ROUTED = {"n_routed_experts": 8, "moe_intermediate_size": 48, "intermediate_size": 96, "num_experts_per_tok": 2}
LOCAL = {"num_local_experts": 8, "intermediate_size": 48, "num_experts_per_tok": 2}
COUNTED = {"num_experts": 8, "num_experts_per_tok": 2}
MAMBA = {"mamba_d_state": 8, "mamba_dt_rank": 8, "attn_layer_period": 2, "attn_layer_offset": 1}
FAMILIES = {
    "deepseek_v2": ("DeepseekV2", ROUTED | DEEPSEEK | {"n_group": 1}),  # first layer dense, experts beside shared ones
    "deepseek_v3": ("DeepseekV3", ROUTED | DEEPSEEK | {"n_group": 2}),
    "ernie4_5_moe": ("Ernie4_5_Moe", {"intermediate_size": 96, "moe_intermediate_size": 48, "moe_num_experts": 8,
                                      "moe_k": 2, "moe_layer_start_index": 1, "moe_num_shared_experts": 1}),
    "glm4_moe": ("Glm4Moe", ROUTED | {"first_k_dense_replace": 1, "head_dim": 16}),
    "gpt_oss": ("GptOss", LOCAL | {"head_dim": 16}),  # transposed, biases, its own gate, all experts in one tensor
    "granitemoe": ("GraniteMoe", LOCAL),  # all experts in one tensor, under names of its own
    "jamba": ("Jamba", COUNTED | MAMBA | {"intermediate_size": 48, "num_hidden_layers": 4,
                                          "expert_layer_period": 2, "expert_layer_offset": 1}),
    "minimax": ("MiniMax", LOCAL | {"head_dim": 16}),
    "mixtral": ("Mixtral", LOCAL | {"num_local_experts": 4, "intermediate_size": 96}),
    "nemotron_h": ("NemotronH", ROUTED | {"layers_block_type": ["mamba", "moe", "attention", "moe"], "head_dim": 16,
                                          "moe_shared_expert_intermediate_size": 48, "mamba_num_heads": 8,
                                          "mamba_head_dim": 16, "ssm_state_size": 16, "n_groups": 1}),  # no gate
    "olmoe": ("Olmoe", {"intermediate_size": 48, "num_experts": 16, "num_experts_per_tok": 4}),
    "phimoe": ("Phimoe", LOCAL),
    "qwen2_moe": ("Qwen2Moe", COUNTED | {"intermediate_size": 96, "moe_intermediate_size": 48,
                                         "shared_expert_intermediate_size": 64}),
    # 72 is no multiple of the block in which weights are widened
    "qwen3_moe": ("Qwen3Moe", COUNTED | {"intermediate_size": 96, "moe_intermediate_size": 72, "mlp_only_layers": [0]}),
}  # fmt: skip
VARIED = ("gpt_oss", "mixtral", "nemotron_h", "olmoe", "qwen3_moe")  # where one of each kind is enough


def config_of(family):
    """A tiny configuration of `family`."""
    name, own = FAMILIES[family]
    shape = {k: v for k, v in SHAPE.items() if not (family == "nemotron_h" and k == "num_hidden_layers")}
    return getattr(transformers, f"{name}Config")(**(shape | own))


def save_random(folder, family="mixtral", dtype=torch.float32, **kwargs):
    """Write a random model of `family` to `folder` as its own `save_pretrained` does, per-expert keys and all."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config_of(family)).to(dtype)
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


def budget(path, slots, **kwargs):
    """`fast_bytes` that hold exactly `slots` experts of the model at `path`, loaded with `kwargs`."""
    with mixoff.load(path, fast_bytes="1GiB", **kwargs) as model:
        runtime = model.mixoff
        return runtime.allocated_nbytes - (runtime.slots - slots) * runtime.arena.slot_nbytes
