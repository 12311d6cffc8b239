"""Metadata of a GGUF file, from config.json and tokenizer.json: what llama.cpp has to know besides the weights."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mixoff.errors import MixoffError
from mixoff.export.model import Model
from mixoff.shapes.sites import Site

if TYPE_CHECKING:
    from transformers import PretrainedConfig

ELSE = "export to hf, and convert that with llama.cpp's convert_hf_to_gguf.py"
FILE_TYPES = {
    "Q4_0": 2,
    "Q5_0": 8,
    "Q8_0": 7,
    "BF16": 32,
    "F16": 1,
    "F32": 0,
}  # llama.cpp's `general.file_type`, by the first type there is
NORMAL, UNKNOWN, CONTROL, USER, UNUSED, BYTE = range(1, 7)  # llama.cpp's types of tokens
# llama.cpp's names of the patterns that cut a text into words, by patterns of tokenizer.json
WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
PATTERNS = {WORDS % r"\p{N}": "qwen2", WORDS % r"\p{N}{1,3}": "dbrx"}
IGNORING = {"dbrx": "llama-bpe"}  # the same patterns where words are looked up before merges


# Architectures --------------------------------------------------------------------------------------------------------


def architecture_of(config: PretrainedConfig, sites: tuple[Site, ...]) -> str:
    """llama.cpp's name for the model. Raises MixoffError for one that this export, or llama.cpp, computes otherwise."""
    text = config.get_text_config()
    if text.model_type not in ARCHITECTURES:
        known = ", ".join(ARCHITECTURES)
        raise MixoffError(f"mixoff writes GGUF for {known}, not for {text.model_type}: {ELSE}")
    arch, norm, _ = ARCHITECTURES[text.model_type]
    rope = text.rope_parameters or {}
    odd = {
        "rope_type": rope.get("rope_type", "default") != "default",
        "hidden_act": text.hidden_act != "silu",
        "norm_topk_prob": norm is not None and bool(text.norm_topk_prob) != norm,
        "sliding_window": bool(getattr(text, "sliding_window", None)) and getattr(text, "use_sliding_window", True),
        "layers without experts": len(sites) != text.num_hidden_layers,
    }
    if first := next((name for name, found in odd.items() if found), None):
        raise MixoffError(f"this model has {first} as llama.cpp's {arch} does not compute it here: {ELSE}")
    return arch


def _wide(writer: Any, text: Any) -> None:
    writer.add_feed_forward_length(text.intermediate_size)


def _qwen2(writer: Any, text: Any) -> None:
    _wide(writer, text)
    writer.add_expert_feed_forward_length(text.moe_intermediate_size)
    writer.add_expert_shared_feed_forward_length(text.shared_expert_intermediate_size)


def _qwen3(writer: Any, text: Any) -> None:
    _wide(writer, text)
    writer.add_expert_feed_forward_length(text.moe_intermediate_size)


def _olmoe(writer: Any, text: Any) -> None:
    _wide(writer, text)
    if text.clip_qkv:
        writer.add_clamp_kqv(text.clip_qkv)


def _granite(writer: Any, text: Any) -> None:
    _wide(writer, text)
    writer.add_attention_scale(text.attention_multiplier)
    writer.add_embedding_scale(text.embedding_multiplier)
    writer.add_residual_scale(text.residual_multiplier)
    writer.add_logit_scale(text.logits_scaling)


# llama.cpp's name, whether it normalizes the router's weights (None: as any model of this type), and what is special
ARCHITECTURES: dict[str, tuple[str, bool | None, Callable[[Any, Any], None]]] = {
    "mixtral": ("llama", None, _wide),
    "qwen2_moe": ("qwen2moe", False, _qwen2),
    "qwen3_moe": ("qwen3moe", True, _qwen3),
    "olmoe": ("olmoe", False, _olmoe),
    "granitemoe": ("granitemoe", None, _granite),
}


def write_metadata(writer: Any, model: Model, arch: str, kinds: set[str]) -> None:
    """Add all metadata to the gguf package's writer. Raises MixoffError where llama.cpp would need others."""
    from mixoff.shapes.config import read_config

    text = read_config(model.checkpoint.folder).get_text_config()
    heads = text.num_attention_heads
    head = getattr(text, "head_dim", None) or text.hidden_size // heads
    writer.add_file_type(next(number for kind, number in FILE_TYPES.items() if kind in kinds))
    writer.add_quantization_version(2)
    writer.add_block_count(text.num_hidden_layers)
    writer.add_context_length(text.max_position_embeddings)
    writer.add_embedding_length(text.hidden_size)
    writer.add_vocab_size(text.vocab_size)
    writer.add_head_count(heads)
    writer.add_head_count_kv(text.num_key_value_heads)
    writer.add_key_length(head)
    writer.add_value_length(head)
    writer.add_layer_norm_rms_eps(text.rms_norm_eps)
    writer.add_rope_freq_base((text.rope_parameters or {}).get("rope_theta", 10000.0))
    writer.add_rope_dimension_count(head)
    writer.add_expert_count(model.sites[0].num_experts)
    writer.add_expert_used_count(text.num_experts_per_tok)
    next(write for name, _, write in ARCHITECTURES.values() if name == arch)(writer, text)
    _write_tokenizer(writer, model.side_files(), text)


# Tokenizer ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Vocabulary:
    """Tokens by id, their types, and merges as pairs; `bytes_fall_back` as in sentencepiece's BPE."""

    tokens: list[str]
    types: list[int]
    merges: list[tuple[str, str]]
    bytes_fall_back: bool


def _write_tokenizer(writer: Any, side: dict[str, bytes], text: Any) -> None:
    if "tokenizer.json" not in side:
        raise MixoffError("there is no tokenizer.json in this folder, which llama.cpp needs: copy that of the original")
    given = json.loads(side["tokenizer.json"])
    vocabulary = _vocabulary(given, text.vocab_size)
    if vocabulary.bytes_fall_back:
        writer.add_tokenizer_model("llama")
        writer.add_tokenizer_pre("default")
        ranks: dict[str, int] = {}
        for rank, (left, right) in enumerate(vocabulary.merges):
            ranks.setdefault(left + right, rank)
        writer.add_token_list(vocabulary.tokens)
        writer.add_token_scores([-float(ranks.get(token, len(ranks))) for token in vocabulary.tokens])
    else:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(_pattern(given))
        writer.add_token_list(vocabulary.tokens)
        writer.add_token_merges([" ".join(pair) for pair in vocabulary.merges])
    writer.add_token_types(vocabulary.types)
    settings = json.loads(side.get("tokenizer_config.json", b"{}"))
    for name in ("bos", "eos", "unk", "pad"):
        number = _special(name, getattr(text, f"{name}_token_id", None), settings, vocabulary)
        if number is not None:
            getattr(writer, f"add_{name}_token_id")(number)
    first, last = _surrounded(given.get("post_processor"))
    writer.add_add_bos_token(first)
    writer.add_add_eos_token(last)
    template = side["chat_template.jinja"].decode() if "chat_template.jinja" in side else settings.get("chat_template")
    if isinstance(template, str):
        writer.add_chat_template(template)


def _special(name: str, number: object, settings: dict[str, Any], vocabulary: Vocabulary) -> int | None:
    """The number of a token by its name: of the configuration, or of the tokenizer's."""
    number = number[0] if isinstance(number, list) and number else number
    if type(number) is int and 0 <= number < len(vocabulary.tokens):
        return number
    token = settings.get(f"{name}_token")
    token = token.get("content") if isinstance(token, dict) else token
    return vocabulary.tokens.index(token) if token in vocabulary.tokens else None


def _vocabulary(given: dict[str, Any], size: int) -> Vocabulary:
    model = given["model"]
    if model.get("type") != "BPE":
        raise MixoffError(f"a tokenizer of the type {model.get('type')} is not written into GGUF here: {ELSE}")
    fall_back = bool(model.get("byte_fallback"))
    tokens, types = [f"[PAD{i}]" for i in range(size)], [UNUSED] * size
    for token, number in model["vocab"].items():
        if number < size:
            byte = fall_back and len(token) == 6 and token.startswith("<0x") and token.endswith(">")
            tokens[number], types[number] = token, BYTE if byte else NORMAL
    for added in given.get("added_tokens") or []:
        if added["id"] < size:
            tokens[added["id"]], types[added["id"]] = added["content"], CONTROL if added["special"] else USER
    if (unknown := model.get("unk_token")) in model["vocab"] and fall_back:
        types[model["vocab"][unknown]] = UNKNOWN
    pairs = (pair.split(" ", 1) if isinstance(pair, str) else pair for pair in model["merges"])
    return Vocabulary(tokens, types, [(left, right) for left, right in pairs], fall_back)


def _pattern(given: dict[str, Any]) -> str:
    """llama.cpp's name for the way in which a text is cut into words."""
    cutter = given.get("pre_tokenizer") or {}
    steps = cutter.get("pretokenizers", [cutter])
    if any(step.get("type") == "ByteLevel" and step.get("use_regex", True) for step in steps):
        return "gpt-2"
    patterns = [step["pattern"].get("Regex") for step in steps if step.get("type") == "Split"]
    name = PATTERNS.get(patterns[0]) if len(patterns) == 1 else None
    if name is None:
        raise MixoffError(f"llama.cpp's name for the pre-tokenizer of this model is not known here: {ELSE}")
    return IGNORING.get(name, name) if given["model"].get("ignore_merges") else name


def _surrounded(processor: dict[str, Any] | None) -> tuple[bool, bool]:
    """Whether a token is added at the beginning of a text, and at its end."""
    steps = processor.get("processors", [processor]) if processor else []
    single: list[dict] = next((step["single"] for step in steps if step.get("type") == "TemplateProcessing"), [{}])
    return "SpecialToken" in single[0], "SpecialToken" in single[-1]
