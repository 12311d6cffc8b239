"""Small models whose weights follow from their names, and the same as GGUF files that llama.cpp's converter made.

`tests/support/gguf/FAMILY.gguf` are the models of `plain`, converted by `convert_hf_to_gguf.py --outtype bf16` of
llama.cpp b11434. `python tests/support/gguf_models.py FOLDER` writes the models that it read, and prints the commands.
The converter was told that the pre-tokenizer is gpt-2's, and to take GLM's vocabulary as any other.
"""

import sys
import zlib
from pathlib import Path

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from tiny import FAMILIES

FOLDER = Path(__file__).parent / "gguf"
SHAPE = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 264,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "use_cache": True,
}
HEADS = {"head_dim": 16}  # not hidden_size / num_attention_heads
OWN = {
    "mixtral": {"num_local_experts": 4, "intermediate_size": 48, "num_experts_per_tok": 2} | HEADS,
    "qwen2_moe": {"num_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 48, "moe_intermediate_size": 24,
                  "shared_expert_intermediate_size": 40, "norm_topk_prob": False},
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 48, "moe_intermediate_size": 24,
                  "norm_topk_prob": True} | HEADS,
    "gpt_oss": {"num_local_experts": 4, "intermediate_size": 48, "num_experts_per_tok": 2} | HEADS,
    "olmoe": {"intermediate_size": 48, "num_experts": 4, "num_experts_per_tok": 2},
    "granitemoe": {"num_local_experts": 4, "intermediate_size": 48, "num_experts_per_tok": 2, "logits_scaling": 2.0,
                   "embedding_multiplier": 3.0, "attention_multiplier": 0.25, "residual_multiplier": 0.5},
    "glm4_moe": {"n_routed_experts": 4, "moe_intermediate_size": 24, "intermediate_size": 48, "num_experts_per_tok": 2,
                 "first_k_dense_replace": 1, "routed_scaling_factor": 1.5, "use_qk_norm": True} | HEADS,
    "deepseek_v2": {"n_routed_experts": 4, "moe_intermediate_size": 24, "intermediate_size": 48, "n_group": 1,
                    "num_experts_per_tok": 2, "n_shared_experts": 1, "kv_lora_rank": 16, "q_lora_rank": None,
                    "qk_rope_head_dim": 8, "qk_nope_head_dim": 12, "v_head_dim": 10, "num_key_value_heads": 4,
                    "topk_group": 1, "first_k_dense_replace": 1, "routed_scaling_factor": 1.5},
    "deepseek_v3": {"n_routed_experts": 4, "moe_intermediate_size": 24, "intermediate_size": 48, "n_group": 2,
                    "num_experts_per_tok": 2, "n_shared_experts": 1, "kv_lora_rank": 16, "q_lora_rank": 20,
                    "qk_rope_head_dim": 8, "qk_nope_head_dim": 12, "v_head_dim": 10, "num_key_value_heads": 4,
                    "topk_group": 1, "first_k_dense_replace": 1},
}  # fmt: skip


def config_of(family):
    """The configuration of a small model of the family."""
    return getattr(transformers, f"{FAMILIES[family][0]}Config")(**(SHAPE | OWN[family]))


def weight_of(name, shape):
    """Numbers of bf16 that follow from the name: some 0.25 wide, or near 1 for a norm."""
    numbers = torch.arange(torch.Size(shape).numel(), dtype=torch.int64)
    mixed = (numbers * 2654435761 + zlib.crc32(name.encode())) % 65521
    spread = (mixed.double() / 32760 - 1) * 0.25
    return (spread + ("norm" in name)).to(torch.bfloat16).view(shape)


def quantized_mixtral(path, kind="Q8_0"):
    """The Mixtral of the fixtures with wider experts, random, its attention and experts in blocks of 32 of a type."""
    import numpy as np

    import gguf

    reader, rng = gguf.GGUFReader(FOLDER / "mixtral.gguf"), np.random.default_rng(0)
    writer = gguf.GGUFWriter(path, "llama")
    for field in reader.fields.values():
        if field.name.startswith(("llama.", "tokenizer.")):
            kinds = [*field.types, None]
            value = 64 if field.name == "llama.feed_forward_length" else field.contents()
            writer.add_key_value(field.name, value, kinds[0], sub_type=kinds[1])
    for t in reader.tensors:
        shape = [64 if n == 48 else n for n in reversed(t.shape.tolist())]
        values = rng.standard_normal(shape).astype(np.float32) * 0.1 + ("norm" in t.name)
        if (
            "_exps" in t.name
            or ".attn_q." in t.name
            or ".attn_k." in t.name
            or ".attn_v." in t.name
            or "output.w" in t.name
        ):
            of = gguf.GGMLQuantizationType[kind]
            writer.add_tensor(t.name, gguf.quantize(values, of), raw_dtype=of)
        else:
            writer.add_tensor(t.name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def plain(family, folder):
    """Write the model as transformers saves it, with a tokenizer of bytes; returns the folder."""
    model = AutoModelForCausalLM.from_config(config_of(family)).to(torch.bfloat16)
    state = {name: weight_of(name, w.shape) if w.is_floating_point() else w for name, w in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    model.load_state_dict(state)
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def tokenizer():
    """Three special tokens, all bytes, and a few pairs of bytes."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    pairs = [("t", "h"), ("th", "e"), ("a", "n"), ("Ġ", "the"), ("i", "n")]
    vocab = {token: i for i, token in enumerate(["<unk>", "<s>", "</s>", *alphabet, *("".join(p) for p in pairs)])}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=pairs))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=backend, **special)


if __name__ == "__main__":
    for family in OWN:
        out = plain(family, Path(sys.argv[1]) / family)
        print(f"convert_hf_to_gguf.py {out} --outtype bf16 --outfile {FOLDER / family}.gguf")
