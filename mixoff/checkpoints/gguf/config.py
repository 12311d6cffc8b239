"""From the metadata of a GGUF file to a configuration of transformers.

transformers has a mapping of its own for few Mixture-of-Experts models: it reads a Mixtral as a dense Llama, and leaves
out the width of Qwen's experts. So the table is here. Widths come from the tensors themselves where they can.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from mixoff.checkpoints.gguf.header import Array, Tensor
from mixoff.errors import CheckpointError, one_line, suggestion

BF16_KINDS = ("BF16", "MXFP4", "NVFP4")  # exact in bfloat16, and not in float16
EXPERT = re.compile(r"^blk\.(?P<layer>\d+)\.ffn_(?P<matrix>gate_up|gate|up|down)_exps\.(?P<role>weight|bias)$")
NULLS = ("q_lora_rank",)  # settings whose null is not what transformers takes where there is none
SIGMOID = 2  # `expert_gating_func` of llama.cpp
DEFAULT_THETA = 10000.0


@dataclass(frozen=True)
class Facts:
    """What files say of a model.

    - name: name of the file, in errors.
    - metadata: as in the header of the first file.
    - tensors: tensors of all files by name.
    """

    name: str
    metadata: Mapping[str, Any]
    tensors: Mapping[str, Tensor]

    @property
    def arch(self) -> str:
        """The architecture by llama.cpp's name."""
        arch = self.metadata.get("general.architecture")
        if not isinstance(arch, str):
            raise CheckpointError(f"{self.name} does not name its architecture, so it is not a model: fetch a model")
        return arch

    def get(self, key: str, default: Any = None) -> Any:
        """A value of the architecture; a list for an array."""
        value = self.metadata.get(f"{self.arch}.{key}", default)
        return value.read() if isinstance(value, Array) else value

    def number(self, key: str, default: float | None = None) -> Any:
        """A number of the architecture, one for all layers. Raises CheckpointError if it is missing."""
        value = self.get(key, default)
        if isinstance(value, list) and value and len(set(value)) == 1:
            value = value[0]
        if type(value) not in (int, float):
            what = "lacks it" if value is None else f"has {str(value)[:50]}"
            raise CheckpointError(
                f"mixoff needs the number {self.arch}.{key}, and {self.name} {what}: convert the model with a current "
                "llama.cpp, or use its safetensors"
            )
        return value

    @property
    def layers(self) -> int:
        """Layers of the model, without blocks that predict further tokens."""
        count = self.number("block_count") - self.number("nextn_predict_layers", 0)
        if type(count) is not int or not 0 < count <= len(self.tensors):
            raise CheckpointError(
                f"{self.name} says that it has {count} layers, and has {len(self.tensors)} tensors: fetch it again"
            )
        return count

    def has(self, ending: str) -> bool:
        """Whether any tensor has this ending."""
        return any(name.endswith(ending) for name in self.tensors)

    def rows(self, ending: str) -> int | None:
        """Rows of the first tensor with this ending."""
        return next((t.shape[-2] for n, t in self.tensors.items() if n.endswith(ending) and len(t.shape) > 1), None)


def experts_of(tensors: Mapping[str, Tensor]) -> dict[str, re.Match]:
    """Names of the experts' tensors, taken apart."""
    return {name: m for name in tensors if (m := EXPERT.match(name))}


def natural_dtype(kind: str) -> str:
    """The dtype, by safetensors' name, that holds the numbers of a type of tensor best: 16 bits, but for fp32."""
    return "F32" if kind == "F32" else "BF16" if kind in BF16_KINDS else "F16"


def expert_dtype(tensors: Mapping[str, Tensor]) -> str:
    """The dtype for all experts, by safetensors' name: fp32, which holds all others, if they need several."""
    dtypes = {natural_dtype(tensors[name].kind) for name, m in experts_of(tensors).items() if m["role"] == "weight"}
    return dtypes.pop() if len(dtypes) == 1 else "F32"


def config_of(facts: Facts) -> dict[str, Any]:
    """config.json of the model in a GGUF file. Raises CheckpointError for an architecture that mixoff does not know."""
    if not experts_of(facts.tensors):
        raise CheckpointError(
            f"{facts.name} holds no experts ({one_line(facts.arch)[:50]}), so there is nothing to offload: "
            "run it with llama.cpp"
        )
    if facts.arch not in ARCHITECTURES:
        raise CheckpointError(
            f"{facts.name} is of the architecture {one_line(facts.arch)[:50]!r}, and mixoff reads "
            f"{', '.join(sorted(ARCHITECTURES))} from GGUF{suggestion(facts.arch, ARCHITECTURES)}: give mixoff the "
            "model's safetensors, or run the file with llama.cpp"
        )
    try:
        config = _common(facts) | ARCHITECTURES[facts.arch](facts)
    except CheckpointError:
        raise
    except (ArithmeticError, LookupError, TypeError, ValueError) as error:
        reason = one_line(f"{type(error).__name__}: {error}")[:200]
        raise CheckpointError(f"{facts.name} has metadata that make no model ({reason}): fetch it again") from error
    return {key: value for key, value in config.items() if value is not None or key in NULLS}


def _common(facts: Facts) -> dict[str, Any]:
    heads = facts.number("attention.head_count")
    names = {"bos": "bos", "eos": "eos", "pad": "padding"}
    ids = {f"{k}_token_id": facts.metadata.get(f"tokenizer.ggml.{v}_token_id") for k, v in names.items()}
    return ids | {
        "vocab_size": _shape(facts, "token_embd.weight")[0],
        "hidden_size": _shape(facts, "token_embd.weight")[1],
        "num_hidden_layers": facts.layers,
        "num_attention_heads": heads,
        "num_key_value_heads": facts.number("attention.head_count_kv", heads),
        "head_dim": facts.get("attention.key_length"),
        "intermediate_size": facts.get("feed_forward_length"),
        "max_position_embeddings": facts.number("context_length"),
        "rms_norm_eps": facts.number("attention.layer_norm_rms_epsilon"),
        "rope_parameters": _rope(facts),
        "num_experts_per_tok": facts.number("expert_used_count"),
        "tie_word_embeddings": "output.weight" not in facts.tensors,
        "dtype": {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}[expert_dtype(facts.tensors)],
    }


def _shape(facts: Facts, name: str) -> tuple[int, ...]:
    if name not in facts.tensors or len(facts.tensors[name].shape) != 2:
        raise CheckpointError(f"{facts.name} has no matrix {name}: it is incomplete, fetch it again")
    return facts.tensors[name].shape


def _rope(facts: Facts) -> dict[str, Any]:
    """Rotary positions, with their scaling."""
    theta = {"rope_theta": facts.number("rope.freq_base", DEFAULT_THETA)}
    kind = facts.get("rope.scaling.type", "none")
    if "rope_freqs.weight" in facts.tensors or kind not in ("none", "linear", "yarn"):
        raise CheckpointError(
            f"{facts.name} scales its positions in a way that mixoff does not read from GGUF (rope_freqs, or "
            f"{one_line(kind)[:50]}): give mixoff the model's safetensors"
        )
    if kind == "none":
        return theta | {"rope_type": "default"}
    scaled = theta | {"rope_type": kind, "factor": facts.number("rope.scaling.factor")}
    if kind == "linear":
        return scaled
    names = {"attention_factor": "yarn_attn_factor", "beta_fast": "yarn_beta_fast", "beta_slow": "yarn_beta_slow"}
    given = {key: facts.get(f"rope.scaling.{name}") for key, name in names.items()}
    original = facts.number("rope.scaling.original_context_length")
    return scaled | {"original_max_position_embeddings": original} | {k: v for k, v in given.items() if v is not None}


# One function per architecture: what it has in addition to, or instead of, `_common` -------------------------------


def _expert_width(facts: Facts) -> int | None:
    """Width F of an expert, from the first matrix that leads to it."""
    return _down(facts)[-1]


def _expert_count(facts: Facts) -> int:
    return _down(facts)[0]


def _down(facts: Facts) -> tuple[int, ...]:
    """Shape (E, D, F) of the first stack of experts' last matrices."""
    stacks = (t.shape for n, t in facts.tensors.items() if n.endswith(".ffn_down_exps.weight") and len(t.shape) == 3)
    if (shape := next(stacks, None)) is None:
        raise CheckpointError(
            f"{facts.name} has no stacked experts (…ffn_down_exps.weight), as files of early 2024 do not: convert the "
            "model with a current llama.cpp"
        )
    return shape


def _dense_layers(facts: Facts) -> list[int]:
    """Layers without experts."""
    sparse = {int(m["layer"]) for m in experts_of(facts.tensors).values()}
    return [i for i in range(facts.layers) if i not in sparse]


def _mixtral(facts: Facts) -> dict[str, Any]:
    return {
        "model_type": "mixtral",
        "architectures": ["MixtralForCausalLM"],
        "num_local_experts": _expert_count(facts),
        "intermediate_size": _expert_width(facts),
        "head_dim": facts.get("attention.key_length", facts.get("rope.dimension_count")),
        "sliding_window": facts.get("attention.sliding_window"),
    }


def _qwen2(facts: Facts) -> dict[str, Any]:
    return {
        "model_type": "qwen2_moe",
        "architectures": ["Qwen2MoeForCausalLM"],
        "num_experts": _expert_count(facts),
        "moe_intermediate_size": _expert_width(facts),
        "shared_expert_intermediate_size": facts.rows(".ffn_up_shexp.weight"),
        "mlp_only_layers": _dense_layers(facts),
        "norm_topk_prob": False,  # as llama.cpp computes it
        "qkv_bias": facts.has(".attn_q.bias"),
    }


def _qwen3(facts: Facts) -> dict[str, Any]:
    return {
        "model_type": "qwen3_moe",
        "architectures": ["Qwen3MoeForCausalLM"],
        "num_experts": _expert_count(facts),
        "moe_intermediate_size": _expert_width(facts),
        "mlp_only_layers": _dense_layers(facts),
        "norm_topk_prob": True,  # as llama.cpp computes it
        "attention_bias": facts.has(".attn_q.bias"),
    }


def _gpt_oss(facts: Facts) -> dict[str, Any]:
    return {
        "model_type": "gpt_oss",
        "architectures": ["GptOssForCausalLM"],
        "num_local_experts": _expert_count(facts),
        "intermediate_size": _expert_width(facts),
        "sliding_window": facts.number("attention.sliding_window"),
        "attention_bias": facts.has(".attn_q.bias"),
        "rope_parameters": _rope(facts) | {"truncate": False},
    }


def _olmoe(facts: Facts) -> dict[str, Any]:
    return {
        "model_type": "olmoe",
        "architectures": ["OlmoeForCausalLM"],
        "num_experts": _expert_count(facts),
        "intermediate_size": _expert_width(facts),
        "norm_topk_prob": False,  # as llama.cpp computes it
        "clip_qkv": facts.get("attention.clamp_kqv"),
    }


def _granite(facts: Facts) -> dict[str, Any]:
    shared = facts.rows(".ffn_up_shexp.weight")
    head = facts.number("embedding_length") // facts.number("attention.head_count")
    return {
        "model_type": "granitemoeshared" if shared else "granitemoe",
        "architectures": ["GraniteMoeSharedForCausalLM" if shared else "GraniteMoeForCausalLM"],
        "num_local_experts": _expert_count(facts),
        "intermediate_size": _expert_width(facts),
        "shared_intermediate_size": shared,
        "attention_multiplier": facts.number("attention.scale", head**-0.5),
        "embedding_multiplier": facts.number("embedding_scale", 1.0),
        "residual_multiplier": facts.number("residual_scale", 1.0),
        "logits_scaling": facts.number("logit_scale", 1.0),
    }


def _glm4(facts: Facts) -> dict[str, Any]:
    rope = _rope(facts) | {"partial_rotary_factor": facts.number("rope.dimension_count") / _head_dim(facts)}
    return _routed(facts) | {
        "model_type": "glm4_moe",
        "architectures": ["Glm4MoeForCausalLM"],
        "head_dim": _head_dim(facts),
        "rope_parameters": rope,
        "attention_bias": facts.has(".attn_q.bias"),
        "use_qk_norm": facts.has(".attn_q_norm.weight"),
        "num_nextn_predict_layers": None,
    }


def _head_dim(facts: Facts) -> int:
    return facts.number(
        "attention.key_length", _shape(facts, "token_embd.weight")[1] // facts.number("attention.head_count")
    )


def _routed(facts: Facts) -> dict[str, Any]:
    """The router of DeepSeek-V3 and its kin."""
    return {
        "n_routed_experts": _expert_count(facts),
        "n_shared_experts": facts.number("expert_shared_count", 0),
        "moe_intermediate_size": _expert_width(facts),
        "first_k_dense_replace": facts.number("leading_dense_block_count", 0),
        "routed_scaling_factor": facts.number("expert_weights_scale", 1.0),
        "norm_topk_prob": bool(facts.get("expert_weights_norm", False)),
        "n_group": facts.number("expert_group_count", 1),
        "topk_group": facts.number("expert_group_used_count", 1),
    }


def _deepseek(facts: Facts) -> dict[str, Any]:
    """DeepSeek-V2, or V3 and its kin, whose router has a bias."""
    v3 = facts.has(".exp_probs_b.bias")
    rotated = facts.number("rope.dimension_count")
    key = facts.number("attention.key_length_mla", facts.get("attention.key_length"))
    own = _routed(facts) | {
        "model_type": "deepseek_v3" if v3 else "deepseek_v2",
        "architectures": ["DeepseekV3ForCausalLM" if v3 else "DeepseekV2ForCausalLM"],
        "num_key_value_heads": facts.number("attention.head_count"),
        "head_dim": None,
        "q_lora_rank": facts.get("attention.q_lora_rank"),
        "kv_lora_rank": facts.number("attention.kv_lora_rank"),
        "qk_rope_head_dim": rotated,
        "qk_nope_head_dim": key - rotated,
        "v_head_dim": facts.number("attention.value_length_mla", facts.get("attention.value_length")),
        "rope_parameters": _deepseek_rope(facts),
        "topk_method": None
        if v3
        else "greedy"
        if facts.number("expert_group_count", 1) < 2
        else "group_limited_greedy",
    }
    if not v3 and (own["norm_topk_prob"] or facts.get("expert_gating_func") == SIGMOID):
        raise CheckpointError(
            f"{facts.name} is a DeepSeek whose router is neither that of V2 nor that of V3: give mixoff the model's "
            "safetensors"
        )
    return own


def _deepseek_rope(facts: Facts) -> dict[str, Any]:
    rope = _rope(facts)
    if rope["rope_type"] != "yarn":
        return rope
    scale = facts.number("rope.scaling.yarn_log_multiplier", 0.0) / 0.1  # the published models have one value for both
    return rope | ({"mscale": scale, "mscale_all_dim": scale} if scale else {})


ARCHITECTURES: dict[str, Callable[[Facts], dict[str, Any]]] = {
    "llama": _mixtral,
    "qwen2moe": _qwen2,
    "qwen3moe": _qwen3,
    "gpt-oss": _gpt_oss,
    "olmoe": _olmoe,
    "granitemoe": _granite,
    "glm4moe": _glm4,
    "deepseek2": _deepseek,
}
