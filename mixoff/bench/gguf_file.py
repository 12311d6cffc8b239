"""A GGUF file with the exact shape of a Mixtral or a Qwen3-MoE and random weights, for llama.cpp and its forks.

Experts are in Q2_K, attention in Q4_K, embeddings and head in Q6_K, as in llama.cpp's Q2_K mixture. Blocks are random
codes with scales that give weights of mean zero and a standard deviation of about 0.02. Tensors are windows of one pool
of blocks.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from mixoff.checkpoints.gguf.header import library
from mixoff.errors import MixoffError

if TYPE_CHECKING:
    from gguf import GGUFWriter

POOL_BLOCKS = 1 << 18
BLOCK = 256  # weights per block
NBYTES = {"Q2_K": 84, "Q4_K": 144, "Q6_K": 210}  # bytes per block
MOSTLY_Q2_K = 10
SEED = 0
ARCHITECTURES = {"mixtral": "llama", "qwen3_moe": "qwen3moe"}  # by transformers' model_type


def pool(kind: str) -> np.ndarray:
    """Random blocks of one kind, uint8 (POOL_BLOCKS, bytes per block)."""
    rng = np.random.default_rng((SEED, NBYTES[kind]))
    blocks = rng.integers(0, 256, (POOL_BLOCKS, NBYTES[kind]), np.uint8)
    FILL[kind](blocks, 0.8 + 0.4 * rng.random((POOL_BLOCKS, 1), np.float32))
    return blocks


def _halves(values: np.ndarray) -> np.ndarray:
    """fp16 numbers (n, 1) as bytes (n, 2)."""
    return values.astype(np.float16).view(np.uint8)


def _fill_q2(blocks: np.ndarray, spread: np.ndarray) -> None:
    """16 bytes of scale (low) and minimum (high nibble), 64 of codes, d, dmin: w = d * scale * q - dmin * minimum."""
    scale = blocks[:, :16] & 15
    blocks[:, :16] = scale | scale << 4
    blocks[:, 80:82], blocks[:, 82:84] = _halves(0.002 * spread), _halves(0.003 * spread)


def _fill_q4(blocks: np.ndarray, spread: np.ndarray) -> None:
    """d, dmin, 12 bytes of scales and minima in 6 bits, 128 of codes."""
    blocks[:, 0:2], blocks[:, 2:4] = _halves(1.0e-4 * spread), _halves(7.5e-4 * spread)


def _fill_q6(blocks: np.ndarray, spread: np.ndarray) -> None:
    """192 bytes of codes around 32, 16 signed scales, d."""
    blocks[:, 192:208] = (blocks[:, 192:208] & 31) + 16
    blocks[:, 208:210] = _halves(3.0e-5 * spread)


FILL = {"Q2_K": _fill_q2, "Q4_K": _fill_q4, "Q6_K": _fill_q6}


def tensors(c: dict) -> Iterator[tuple[str, tuple[int, ...], str]]:
    """Name, shape and kind of each tensor of a model with configuration `c`."""
    D, F, E, V, H = c["hidden_size"], _expert_width(c), c["num_local_experts"], c["vocab_size"], _head_width(c)
    wide, narrow = H * c["num_attention_heads"], H * c["num_key_value_heads"]
    norms = (("attn_q_norm", (H,), "F32"), ("attn_k_norm", (H,), "F32")) if c["model_type"] == "qwen3_moe" else ()
    yield "token_embd.weight", (V, D), "Q6_K"
    for i in range(c["num_hidden_layers"]):
        for name, shape, kind in (
            ("attn_norm", (D,), "F32"), ("attn_q", (wide, D), "Q4_K"), ("attn_k", (narrow, D), "Q4_K"),
            ("attn_v", (narrow, D), "Q4_K"), ("attn_output", (D, wide), "Q4_K"), *norms, ("ffn_norm", (D,), "F32"),
            ("ffn_gate_inp", (E, D), "F32"), ("ffn_gate_exps", (E, F, D), "Q2_K"),
            ("ffn_down_exps", (E, D, F), "Q2_K"), ("ffn_up_exps", (E, F, D), "Q2_K"),
        ):  # fmt: skip
            yield f"blk.{i}.{name}.weight", shape, kind
    yield "output_norm.weight", (D,), "F32"
    yield "output.weight", (V, D), "Q6_K"


def _expert_width(c: dict) -> int:
    return c.get("moe_intermediate_size") or c["intermediate_size"]


def _head_width(c: dict) -> int:
    return c.get("head_dim") or c["hidden_size"] // c["num_attention_heads"]


def nbytes(shape: tuple[int, ...], kind: str) -> int:
    """Bytes of a tensor in the file."""
    return 4 * math.prod(shape) if kind == "F32" else math.prod(shape) // BLOCK * NBYTES[kind]


def write(out: Path, c: dict) -> None:
    """Write the file, under its name only when it is complete; an existing file is kept.

    c: configuration as a dict. Raises MixoffError for a family that is not in ARCHITECTURES.
    """
    if out.exists():
        return
    if c["model_type"] not in ARCHITECTURES:
        raise MixoffError(f"no GGUF for {c['model_type']}: llama.cpp is measured on {' and '.join(ARCHITECTURES)} only")
    library()
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_name(out.name + ".partial")
    writer = _header(str(partial), c)
    pools, rng = {kind: pool(kind) for kind in FILL}, np.random.default_rng(SEED)
    for name, shape, kind in tensors(c):
        if kind == "F32":
            values = np.ones(shape) if "norm" in name else rng.standard_normal(shape) * 0.02
            writer.write_tensor_data(values.astype(np.float32))
        else:
            writer.write_tensor_data(_window(pools[kind], math.prod(shape) // BLOCK, rng))
    writer.close()
    os.replace(partial, out)


def _window(blocks: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
    """`count` blocks: windows of half the pool, at random offsets."""
    half, pieces = len(blocks) // 2, []
    while count > 0:
        start, size = int(rng.integers(half)), min(half, count)
        pieces.append(blocks[start : start + size])
        count -= size
    return np.concatenate(pieces).reshape(-1)


def _header(path: str, c: dict) -> GGUFWriter:
    from gguf import GGMLQuantizationType, GGUFWriter

    w, V = GGUFWriter(path, ARCHITECTURES[c["model_type"]]), c["vocab_size"]
    w.add_name("random weights")
    w.add_context_length(c["max_position_embeddings"])
    w.add_embedding_length(c["hidden_size"])
    w.add_block_count(c["num_hidden_layers"])
    w.add_feed_forward_length(c["intermediate_size"])
    w.add_expert_feed_forward_length(_expert_width(c))
    w.add_head_count(c["num_attention_heads"])
    w.add_head_count_kv(c["num_key_value_heads"])
    w.add_key_length(_head_width(c))
    w.add_value_length(_head_width(c))
    w.add_rope_dimension_count(_head_width(c))
    w.add_layer_norm_rms_eps(c["rms_norm_eps"])
    w.add_rope_freq_base(1e6)
    w.add_expert_count(c["num_local_experts"])
    w.add_expert_used_count(c["num_experts_per_tok"])
    w.add_vocab_size(V)
    w.add_file_type(MOSTLY_Q2_K)
    _vocabulary(w, V)
    for name, shape, kind in tensors(c):
        if kind == "F32":
            w.add_tensor_info(name, shape, np.dtype(np.float32), nbytes(shape, kind))
        else:
            packed = (*shape[:-1], shape[-1] // BLOCK * NBYTES[kind])
            w.add_tensor_info(
                name, packed, np.dtype(np.uint8), nbytes(shape, kind), raw_dtype=GGMLQuantizationType[kind]
            )
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_ti_data_to_file()
    return w


def _vocabulary(w: GGUFWriter, size: int) -> None:
    """Three special tokens, 256 bytes and invented words, because llama.cpp requires a tokenizer."""
    special = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256))]
    rest = size - len(special)
    w.add_tokenizer_model("llama")
    w.add_token_list(special + [f"\u2581t{i}" for i in range(rest)])
    w.add_token_scores([0.0] * len(special) + [-float(i) for i in range(rest)])
    w.add_token_types([2, 3, 3] + [6] * 256 + [1] * rest)
    w.add_bos_token_id(1)
    w.add_eos_token_id(2)
    w.add_unk_token_id(0)
