"""From a configuration to a skeleton without memory, and to the experts that transformers finds in it."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from mixoff.errors import CheckpointError, MixoffError
from mixoff.shapes.sites import DTYPES, Part, Site, dtype_nbytes, place

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig, PreTrainedModel


def read_config(folder: Path) -> PretrainedConfig:
    """The configuration in `folder`, never running code from it. Raises CheckpointError."""
    from transformers import AutoConfig

    _refuse_absurd(folder / "config.json")
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except Exception as error:  # transformers raises many kinds here; to the user all of them are one
        reason = str(error).strip().split("\n")[0]
        raise CheckpointError(
            f"{folder / 'config.json'} is not a configuration that transformers can read: {reason}"
        ) from error
    config._experts_implementation = None  # a store's value is for mixoff alone: `store.manifest.marked`
    return config


MOST = {"layers": 10_000, "experts": 100_000, "": 2**40}  # by words in a key, far beyond any model; "" is in all keys


def _refuse_absurd(path: Path) -> None:
    """Refuse numbers that no model has, before anything is built from them: 10**9 layers would take forever."""
    try:
        config = json.loads(path.read_bytes())
        holders = [config, *(value for value in config.values() if isinstance(value, dict))]
    except (OSError, ValueError, AttributeError, RecursionError):
        return  # transformers explains what is wrong
    for key, value in (item for holder in holders for item in holder.items()):
        most = next(n for part, n in MOST.items() if part in key)
        if type(value) is int and abs(value) > most:
            raise CheckpointError(f"{path} has {key} = {value:.3g}, more than any model: copy it again from its source")


def model_class(config: PretrainedConfig) -> type[PreTrainedModel]:
    """transformers' class of language model for `config`, with its image or sound encoder if it has one.

    Raises CheckpointError if there is none.
    """
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoModelForMultimodalLM

    for auto in (AutoModelForCausalLM, AutoModelForImageTextToText, AutoModelForMultimodalLM):
        if type(config) in auto._model_mapping:
            return auto._model_mapping[type(config)]
    raise CheckpointError(
        f"{config.model_type} is not supported, because transformers has no class for it that continues a text "
        "(a causal language model, with or without an image encoder): run it with transformers itself"
    )


def skeleton(config: PretrainedConfig) -> PreTrainedModel:
    """The causal language model of `config` on the meta device: shapes without memory."""
    import torch

    base = model_class(config)
    try:
        with torch.device("meta"):
            return base._from_config(config)
    except Exception as error:  # transformers raises many kinds here; to the user all of them are one
        reason = str(error).strip().split("\n")[0]
        raise CheckpointError(f"transformers cannot build a language model from this config.json: {reason}") from error


def expert_modules(model: PreTrainedModel) -> dict[str, torch.nn.Module]:
    """The modules that hold experts, by name: those that transformers decorates with `use_experts_implementation`."""
    return {n: m for n, m in model.named_modules() if hasattr(m, "_apply_gate") and hasattr(m, "is_transposed")}


def layers_of(model: PreTrainedModel) -> str:
    """The name of the list of decoder layers: `model.layers` where experts are `model.layers.0.mlp.experts`."""
    return re.split(r"\.\d+\.", next(iter(expert_modules(model))))[0]


def expert_sites(model: PreTrainedModel, dtype: str) -> tuple[Site, ...]:
    """The sites of `model`, in layer order, for experts stored as `dtype`. Raises CheckpointError for a dense model."""
    modules = expert_modules(model)
    if not modules:
        _refuse_without_experts(model)
    sites = tuple(_site(name, module, dtype) for name, module in modules.items())
    if (k := top_k(model.config)) is not None:
        _refuse_top_k(k, sites)
    return sites


# names of K, the experts per token, in configurations
TOP_K = ("num_experts_per_tok", "moe_k", "moe_topk", "top_k_experts", "num_experts_per_token")


def top_k(config: PretrainedConfig) -> int | None:
    """Experts per token, K; None if the configuration has it under none of the known names."""
    text = config.get_text_config()
    return next((value for name in TOP_K if isinstance(value := getattr(text, name, None), int)), None)


def _refuse_top_k(k: int, sites: Iterable[Site]) -> None:
    if site := next((site for site in sites if not 1 <= k <= site.num_experts), None):
        raise CheckpointError(
            f"config.json sends each token to {k} experts, and layer {site.layer} has {site.num_experts}: "
            "copy config.json again from the source of the weights"
        )


OWN_EXPERTS = re.compile(r"Experts?(V\d+)?$|MoE$|Moe$|MoeBlock$|SparseMLP$")  # names of classes


def _refuse_without_experts(model: PreTrainedModel) -> NoReturn:
    """Say whether `model` is dense, or has experts that transformers computes in a way of its own."""
    name = type(model).__name__
    experts = next((type(m).__name__ for m in model.modules() if OWN_EXPERTS.search(type(m).__name__)), None)
    if experts:
        raise CheckpointError(
            f"{name} is not supported, because its experts ({experts}) are not behind the interface of transformers "
            "that lets others compute them (use_experts_implementation): run it with transformers itself"
        )
    raise CheckpointError(
        f"{name} has no experts, so there is nothing to offload: "
        "mixoff runs Mixture-of-Experts models, such as Mixtral; run a dense model with transformers itself"
    )


def _site(name: str, module: torch.nn.Module, dtype: str) -> Site:
    _refuse_unserved(module)
    parts = [
        Part(key, tuple(weight.shape[1:]), dtype, 0, math.prod(weight.shape[1:]) * dtype_nbytes(dtype))
        for key, weight in module.named_parameters(recurse=False)
    ]
    layer = re.search(r"layers\.(\d+)\.", name)
    return Site(name, int(layer[1]) if layer else 0, module.num_experts, place(parts), module.is_transposed)


# flags of `use_experts_implementation` that mixoff serves; experts with any other flag are refused
FLAGS = {"has_gate", "has_bias", "has_post_expert_norm", "is_transposed", "is_concatenated"}
LIBRARY_FLAGS = {"_is_hf_initialized", "_is_expert_parallel", "_is_full_backward_hook"}


def _refuse_unserved(module: torch.nn.Module) -> None:
    """Refuse experts that would be computed wrongly: unknown flags, or weights that are not one slice per expert."""
    flags = {k for k, v in vars(module).items() if k.startswith(("has_", "is_", "_is_")) and isinstance(v, bool)}
    unknown = flags - FLAGS - LIBRARY_FLAGS
    first = "gate_up_proj" if module.has_gate else "up_proj"
    wanted = {first, "down_proj"} | ({f"{first}_bias", "down_proj_bias"} if module.has_bias else set())
    weights = dict(module.named_parameters(recurse=False))
    sliced = all(w.dim() >= 2 and w.shape[0] == module.num_experts for w in weights.values())
    if unknown or set(weights) != wanted or not sliced:
        what = f"flags {sorted(unknown)}" if unknown else f"weights {sorted(weights)}"
        raise CheckpointError(
            f"{type(module).__name__} is not served: mixoff does not know its {what}; "
            "run it with transformers, or ask for it with the name of this class"
        )


ROLES = (  # parts of the backbone that a scheme may quantize, by names of layers
    ("attention", re.compile(r"\.(self_attn|attention|attn)\.")),
    ("shared_experts", re.compile(r"\.(shared_experts?|shared_mlp)\.")),
    ("head", re.compile(r"^lm_head$")),
    ("embeddings", re.compile(r"\bembed_tokens$")),
)


def backbone_roles(model: PreTrainedModel) -> dict[str, str]:
    """Roles of the backbone's weights that a scheme may quantize, by the weight's name."""
    from torch import nn

    roles = {}
    for name, module in model.named_modules():
        role = next((role for role, pattern in ROLES if pattern.search(name)), None)
        if role and isinstance(module, nn.Embedding if role == "embeddings" else nn.Linear):
            roles[f"{name}.weight"] = role
    return roles


def dtype_name(config: PretrainedConfig) -> str:
    """The dtype of the weights by torch's name, bfloat16 where there is none. Raises CheckpointError for any other."""
    nested = config.get_text_config()
    name = str(config.dtype or nested.dtype or "bfloat16").removeprefix("torch.")
    if name not in DTYPES.values():
        raise CheckpointError(f"config.json gives {name} as dtype: change it to one of {', '.join(DTYPES.values())}")
    return name


def likely_top_k(config: PretrainedConfig) -> int:
    """K for the number of spare slots: 2, which most routers choose, where the configuration has no name for it."""
    return top_k(config) or 2


def configured_top_k(config: PretrainedConfig) -> int:
    """K for counting bytes and time. Raises MixoffError where the configuration has no name for it that we know."""
    if (k := top_k(config)) is None:
        raise MixoffError(f"the configuration of {config.model_type} does not say how many experts a token uses")
    return k
