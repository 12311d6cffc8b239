"""Shapes of models: parameters by part, experts a token, and what the KV cache grows by, for any configuration.

Everything is read off a skeleton on the meta device, which has shapes and no memory; experts a token and the cache come
from a rehearsal, one forward pass of that skeleton with experts that compute nothing. `PRESETS` holds configurations
of well-known models, so that their Hub ids mean something without a network.

Does not know bytes of a store, budgets or speeds.
"""

from __future__ import annotations

import copy
import math
import os
import re
from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from mixoff import hub, model_files, models, shapes
from mixoff.checkpoint import DTYPES
from mixoff.errors import CheckpointError, MixoffError
from mixoff.generation import advance

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig, PreTrainedModel

PARTS = ("experts", "attention", "embeddings", "router", "norms", "shared", "other")
PATTERNS = (  # of parameters' names, the first that fits; layers named like these are told apart by it in all families
    ("shared", re.compile(r"shared_(expert|mlp)")),
    ("experts", re.compile(r"\.experts?\.|\.experts\b|\bexperts?\.(in|out)put")),
    ("attention", re.compile(r"(^|\.)(self_attn|attention|attn|self_attention|linear_attn)\.")),
    ("embeddings", re.compile(r"(^|\.)(embed_tokens|lm_head|wte|embeddings?|embed_out|word_embeddings)\b")),
    ("router", re.compile(r"\.(gate|router|gating)(\.|$)|e_score_correction_bias")),
)
REHEARSED = 97  # tokens of the rehearsal: a prime that is no width of any layer, so it marks the dimension of tokens


@dataclass(frozen=True)
class Tensor:
    """One parameter or stored buffer of the backbone: all but the experts.

    role: as in `quantize.ROLES`, or None. wide: 16-bit dtypes of the model in which transformers keeps it in fp32.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    part: str
    role: str | None
    wide: tuple[str, ...] = ()

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True)
class Stored:
    """One tensor of the backbone in a model's files: its shape, bytes, and role as in `Tensor`."""

    shape: tuple[int, ...]
    nbytes: int
    role: str | None


@dataclass(frozen=True)
class CacheLayer:
    """One tensor of the KV cache of one sequence: bytes that are fixed, bytes a token, and the tokens it keeps."""

    fixed: int
    per_token: int
    window: int | None

    def nbytes(self, context: int) -> int:
        """Bytes after `context` tokens."""
        return self.fixed + self.per_token * min(context, self.window or context)


@dataclass(frozen=True)
class ModelShape:
    """What a configuration says of a model, in plain numbers. dtype: of the weights as published, by torch's name.

    parameters: numbers by part, each weight counted once, also where two layers share it. active: parameters of one
    token: all but the experts, and the experts it is sent to. backbone: every tensor that is not an expert's, and
    buffers_nbytes: bytes of what no file holds, such as rotary frequencies. sites: where experts are, empty for a
    family that mixoff does not serve; then `refusal` says why. top_k: experts a token of each site. cache: the KV cache
    in `dtype`. files: the backbone as a folder's files have it, None where there are none: then `backbone` is it.
    """

    name: str
    config: PretrainedConfig
    dtype: str
    parameters: dict[str, int]
    active: int
    backbone: tuple[Tensor, ...]
    buffers_nbytes: int
    sites: tuple[shapes.Site, ...]
    top_k: tuple[int, ...]
    cache: tuple[CacheLayer, ...]
    refusal: str | None = None
    files: tuple[Stored, ...] | None = None

    @property
    def total(self) -> int:
        """Parameters in all."""
        return sum(self.parameters.values())

    def kv_nbytes(self, context: int, batch: int = 1) -> int:
        """Bytes of the KV cache, in `dtype`, of `batch` sequences of `context` tokens."""
        return batch * sum(layer.nbytes(context) for layer in self.cache)

    def with_dtype(self, dtype: str) -> ModelShape:
        """The same model with weights and cache in another dtype."""
        return self if dtype == self.dtype else from_config(self.config, self.name, dtype)

    def in_files(self, folder: Path) -> ModelShape:
        """The same model as the safetensors files of `folder` have it, in whichever names and dtypes.

        Raises CheckpointError for what could not be loaded either.
        """
        from mixoff import published, store

        backbone = store.survey(published.open_checkpoint(folder)).backbone
        roles = {tensor.name: tensor.role for tensor in self.backbone}
        files = tuple(Stored(tuple(t.shape), t.nbytes, roles.get(name)) for name, t in backbone.items())
        return replace(self, files=files).quantized_only(backbone)

    def quantized_only(self, names: Collection[str]) -> ModelShape:
        """The same model where a scheme reaches the tensors of these names alone; others stay in 16 bits.

        Tables of embeddings and heads are known as such under any name.
        """
        roles = [t.role if t.name in names or t.role in ("embeddings", "head") else None for t in self.backbone]
        return replace(self, backbone=tuple(replace(t, role=r) for t, r in zip(self.backbone, roles, strict=True)))

    def __str__(self) -> str:
        experts = f"{self.sites[0].num_experts} experts in {len(self.sites)} layers" if self.sites else "no experts"
        return f"{self.name}: {self.total / 1e9:.3f} B parameters, {self.active / 1e9:.2f} B active, {experts}"


def shape_of(source: ModelShape | PretrainedConfig | str | Path) -> ModelShape:
    """The shape of a configuration, a model folder, its `config.json`, a bundled model, or a Hub id.

    A Hub id that is not in PRESETS is looked up in the local Hub cache, then on the Hub (one small file). Raises
    CheckpointError, also for a model that transformers cannot build.
    """
    from transformers import PretrainedConfig

    if isinstance(source, ModelShape):
        return source
    if isinstance(source, PretrainedConfig):
        return from_config(source, source.model_type)
    return from_config(read(source), named_as(source))


def named_as(source: str | Path) -> str:
    """The name in PRESETS that `source` is short for, where no folder or bundled model has it; else `source`.

    >>> named_as("mixtral-8x7b"), named_as("qwen3-30b-a3b"), named_as("tiny-mixtral")
    ('mistralai/Mixtral-8x7B-Instruct-v0.1', 'Qwen/Qwen3-30B-A3B', 'tiny-mixtral')
    """
    word = str(source).lower()
    if not word or word in models.names() or os.path.exists(source):
        return str(source)
    short = {name: name.lower().partition("/")[2] for name in PRESETS}
    equal = (name for name in PRESETS if word in (name.lower(), short[name]))
    return next(equal, next((name for name in PRESETS if short[name].startswith(f"{word}-")), str(source)))


def read(source: str | Path) -> PretrainedConfig:
    """The configuration that `source` names; see `shape_of`."""
    from transformers import AutoConfig

    if (name := named_as(source)) in PRESETS:
        values = dict(PRESETS[name])
        return AutoConfig.for_model(values.pop("model_type"), **values)
    path = folder_of(source)
    if path is None and (model := hub.parse(source)) is not None:
        path = _from_hub(model)
    if path is None or not (path / "config.json").exists():
        if path is not None:
            model_files.refuse_adapter([p.name for p in path.iterdir()], path, path)
        raise CheckpointError(f"no config.json in {source}: give a model folder, or one of {', '.join(PRESETS)}")
    return shapes.read_config(path)


def folder_of(source: object) -> Path | None:
    """The local folder that `source` names, a bundled model's for its name; None for anything else."""
    if not isinstance(source, (str, Path)) or str(source) in PRESETS:
        return None
    if str(source) in models.names():
        return models.path(str(source))
    path = Path(os.path.expanduser(source))
    return path.parent if path.is_file() else path if path.is_dir() else None


def _from_hub(model: hub.HubId) -> Path:
    try:
        return hub.config_folder(model)
    except CheckpointError as error:
        raise CheckpointError(
            f"{model} is not built in, and its config.json could not be fetched ({error}): give a local folder, "
            f"or one of {', '.join(PRESETS)}"
        ) from error


def from_config(config: PretrainedConfig, name: str, dtype: str | None = None) -> ModelShape:
    """The shape of a configuration. dtype: of its weights; None takes the configuration's, bf16 where it has none."""
    config = copy.deepcopy(config)
    config.dtype = dtype = dtype or _dtype_name(config)
    skeleton = shapes.skeleton(config)
    parts = parts_by_name(skeleton)
    sites, refusal = _sites(skeleton, dtype)
    chosen, cache = rehearse(skeleton)
    sizes = {id(p): (parts[n], p.numel()) for n, p in skeleton.named_parameters()}
    counts = Counter(dict.fromkeys(PARTS, 0))
    for part, numel in sizes.values():
        counts[part] += numel
    top_k = tuple(chosen.get(site.name, _configured_top_k(config)) for site in sites)
    idle = sum(_idle(site, k) for site, k in zip(sites, top_k, strict=True))
    stored = skeleton.state_dict()
    buffers = sum(b.nbytes for n, b in skeleton.named_buffers() if n not in stored)
    figures = dict(counts), sum(counts.values()) - idle, tuple(_backbone(skeleton, parts)), buffers
    return ModelShape(name, config, dtype, *figures, sites, top_k, cache, refusal)


def _dtype_name(config: PretrainedConfig) -> str:
    nested = config.get_text_config()
    name = str(config.dtype or nested.dtype or "bfloat16").removeprefix("torch.")
    if name not in DTYPES.values():
        raise CheckpointError(f"config.json gives {name} as dtype: change it to one of {', '.join(DTYPES.values())}")
    return name


def _sites(skeleton: PreTrainedModel, dtype: str) -> tuple[tuple[shapes.Site, ...], str | None]:
    try:
        return shapes.expert_sites(skeleton, dtype), None
    except CheckpointError as error:
        return (), str(error)


def _idle(site: shapes.Site, top_k: int) -> int:
    """Parameters of a site that one token leaves alone."""
    return (site.num_experts - min(top_k, site.num_experts)) * sum(math.prod(part.shape) for part in site.parts)


def parts_by_name(skeleton: PreTrainedModel) -> dict[str, str]:
    """The part, one of PARTS, of every parameter and buffer by its name.

    Experts are what lies directly in a module that transformers marks as such; the others go by names, then by the
    class of what they lie in. Norms are known by their class, wherever they stand.
    """
    owners = dict(skeleton.named_modules())
    marked = set(shapes.expert_modules(skeleton))
    return {name: _part(name, owners, marked) for name, _ in (*skeleton.named_parameters(), *skeleton.named_buffers())}


def _part(name: str, owners: dict[str, torch.nn.Module], marked: set[str]) -> str:
    owner = name.rpartition(".")[0]
    if owner in marked or type(owners[owner]).__name__.endswith("Experts"):
        return "experts"
    if "norm" in type(owners[owner]).__name__.lower():
        return "norms"
    found = next((part for part, pattern in PATTERNS if pattern.search(name)), "other")
    return "attention" if found == "other" and _in_attention(owner, owners) else found


def _in_attention(owner: str, owners: dict[str, torch.nn.Module]) -> bool:
    """Whether a module lies in one whose class is an attention, where its name does not say so (`mixer`)."""
    steps = owner.split(".")
    return any("Attention" in type(owners[".".join(steps[: i + 1])]).__name__ for i in range(len(steps)))


def _backbone(skeleton: PreTrainedModel, parts: dict[str, str]) -> Iterator[Tensor]:
    """Every tensor but the experts' that a checkpoint stores, tied ones once."""
    roles, seen = shapes.backbone_roles(skeleton), set()
    for name, tensor in skeleton.state_dict(keep_vars=True).items():
        if id(tensor) not in seen and parts[name] != "experts":
            dtype = str(tensor.dtype).removeprefix("torch.")
            yield Tensor(name, tuple(tensor.shape), dtype, parts[name], roles.get(name), _wide(skeleton, name))
        seen.add(id(tensor))


def _wide(skeleton: PreTrainedModel, name: str) -> tuple[str, ...]:
    """`_keep_in_fp32_modules` of transformers: the strict ones in both 16-bit dtypes, others in fp16 only."""

    def listed(modules: set[str] | None) -> bool:
        return any(re.search(rf"(^|\.){module}(\.|$)", name) for module in modules or ())

    if listed(skeleton._keep_in_fp32_modules_strict):
        return ("float16", "bfloat16")
    return ("float16",) if listed(skeleton._keep_in_fp32_modules) else ()


# The rehearsal --------------------------------------------------------------------------------------------------------


def rehearse(skeleton: PreTrainedModel) -> tuple[dict[str, int], tuple[CacheLayer, ...]]:
    """Experts a token of each site, by name, and the tensors of the KV cache, from one forward pass on the meta device.

    A model that cannot be rehearsed (its forward looks at values) gets neither experts a token nor a rehearsed cache:
    the configuration has to do. The skeleton's experts compute nothing afterwards.
    """
    import torch

    chosen: dict[str, int] = {}
    for name, module in shapes.expert_modules(skeleton).items():
        module.forward = _absent(name, chosen)
    try:
        with torch.no_grad():
            ids = torch.zeros(1, REHEARSED, dtype=torch.long, device="meta")
            _, cache = advance(skeleton, ids)
    except Exception:  # any of a hundred models' forwards may fail here, in any way
        return chosen, _formula(skeleton.config)
    return chosen, tuple(_measured(cache))


def _absent(name: str, chosen: dict[str, int]) -> object:
    """Stands in for the experts' forward: notes K of the choice (T, K), returns zeros (T, D)."""

    def forward(hidden_states: torch.Tensor, top_k_index: torch.Tensor, *_: object) -> torch.Tensor:
        chosen[name] = top_k_index.shape[-1]
        return hidden_states.new_zeros(hidden_states.shape)

    return forward


def _measured(cache: object) -> Iterator[CacheLayer]:
    for tensor, window in _tensors(cache, None, set()):
        nbytes = tensor.numel() * tensor.element_size()
        if REHEARSED in tensor.shape:
            yield CacheLayer(0, nbytes // REHEARSED, window)
        elif window in tensor.shape:
            yield CacheLayer(0, nbytes // window, window)
        else:
            yield CacheLayer(nbytes, 0, None)


def _tensors(thing: object, window: int | None, seen: set[int]) -> Iterator[tuple[torch.Tensor, int | None]]:
    """Every tensor that a cache holds, however its class nests them, with the tokens that its layer keeps."""
    import torch

    if id(thing) in seen:
        return
    seen.add(id(thing))
    if isinstance(thing, torch.Tensor):
        yield thing, window
    elif isinstance(thing, (list, tuple, dict)):
        for item in thing.values() if isinstance(thing, dict) else thing:
            yield from _tensors(item, window, seen)
    elif hasattr(thing, "__dict__") and type(thing).__module__.startswith("transformers"):
        size = getattr(thing, "sliding_window", None)
        yield from _tensors(vars(thing), size - 1 if size else window, seen)


def cache_nbytes(cache: object) -> int:
    """Bytes of all tensors that one of transformers' caches holds."""
    return sum(tensor.numel() * tensor.element_size() for tensor, _ in _tensors(cache, None, set()))


def _formula(config: PretrainedConfig) -> tuple[CacheLayer, ...]:
    """Keys and values of every layer: what a model has that is neither compressed nor windowed."""
    text = config.get_text_config()
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    item = shapes.dtype_nbytes(_dtype_name(config))
    return tuple(CacheLayer(0, 2 * heads * width * item, None) for _ in range(text.num_hidden_layers))


def _configured_top_k(config: PretrainedConfig) -> int:
    if (k := shapes.top_k(config)) is None:
        raise MixoffError(f"the configuration of {config.model_type} does not say how many experts a token is sent to")
    return k


# Well-known models ----------------------------------------------------------------------------------------------------


def _mixtral(**own: object) -> dict:
    values = {
        "model_type": "mixtral", "dtype": "bfloat16", "hidden_size": 4096, "intermediate_size": 14336,
        "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 32000,
        "num_local_experts": 8, "num_experts_per_tok": 2, "rope_theta": 1e6, "max_position_embeddings": 32768,
        "sliding_window": None, "rms_norm_eps": 1e-5, "tie_word_embeddings": False,
    }  # fmt: skip
    return values | own


def _qwen3(**own: object) -> dict:
    values = {
        "model_type": "qwen3_moe", "dtype": "bfloat16", "hidden_size": 2048, "intermediate_size": 6144,
        "moe_intermediate_size": 768, "num_hidden_layers": 48, "num_attention_heads": 32, "num_key_value_heads": 4,
        "head_dim": 128, "vocab_size": 151936, "num_experts": 128, "num_experts_per_tok": 8,
        "max_position_embeddings": 40960, "tie_word_embeddings": False,
    }  # fmt: skip
    return values | own


def _gpt_oss(**own: object) -> dict:
    values = {
        "model_type": "gpt_oss", "dtype": "bfloat16", "hidden_size": 2880, "intermediate_size": 2880,
        "num_attention_heads": 64, "num_key_value_heads": 8, "head_dim": 64, "vocab_size": 201088,
        "num_experts_per_tok": 4, "sliding_window": 128, "max_position_embeddings": 131072,
        "tie_word_embeddings": False,
    }  # fmt: skip
    return values | own


PHI = {
    "model_type": "phimoe", "dtype": "bfloat16", "hidden_size": 4096, "intermediate_size": 6400,
    "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 32064,
    "num_local_experts": 16, "num_experts_per_tok": 2, "attention_bias": True, "lm_head_bias": True,
    "max_position_embeddings": 131072, "sliding_window": None, "tie_word_embeddings": False,
}  # fmt: skip
OLMOE = {
    "model_type": "olmoe", "dtype": "bfloat16", "hidden_size": 2048, "intermediate_size": 1024,
    "num_hidden_layers": 16, "num_attention_heads": 16, "num_key_value_heads": 16, "vocab_size": 50304,
    "num_experts": 64, "num_experts_per_tok": 8, "max_position_embeddings": 4096, "tie_word_embeddings": False,
}  # fmt: skip
DEEPSEEK_LITE = {
    "model_type": "deepseek_v2", "dtype": "bfloat16", "hidden_size": 2048, "intermediate_size": 10944,
    "moe_intermediate_size": 1408, "num_hidden_layers": 27, "num_attention_heads": 16, "num_key_value_heads": 16,
    "kv_lora_rank": 512, "q_lora_rank": None, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128,
    "n_routed_experts": 64, "n_shared_experts": 2, "num_experts_per_tok": 6, "first_k_dense_replace": 1,
    "vocab_size": 102400, "n_group": 1, "topk_group": 1, "max_position_embeddings": 163840,
    "tie_word_embeddings": False,
}  # fmt: skip
GRANITE = {
    "model_type": "granitemoe", "dtype": "bfloat16", "hidden_size": 1024, "intermediate_size": 512,
    "num_hidden_layers": 24, "num_attention_heads": 16, "num_key_value_heads": 8, "vocab_size": 49155,
    "num_local_experts": 32, "num_experts_per_tok": 8, "max_position_embeddings": 131072, "tie_word_embeddings": True,
}  # fmt: skip
QWEN15 = {
    "model_type": "qwen2_moe", "dtype": "bfloat16", "hidden_size": 2048, "intermediate_size": 5632,
    "moe_intermediate_size": 1408, "shared_expert_intermediate_size": 5632, "num_hidden_layers": 24,
    "num_attention_heads": 16, "num_key_value_heads": 16, "vocab_size": 151936, "num_experts": 60,
    "num_experts_per_tok": 4, "max_position_embeddings": 8192, "tie_word_embeddings": False,
}  # fmt: skip
MIXTRAL_22B = _mixtral(
    hidden_size=6144, intermediate_size=16384, num_hidden_layers=56, num_attention_heads=48, vocab_size=32768
)
QWEN3_235B = _qwen3(
    hidden_size=4096, intermediate_size=12288, moe_intermediate_size=1536, num_hidden_layers=94, num_attention_heads=64
)
DEMO = "lavawolfiee/Mixtral-8x7B-Instruct-v0.1-offloading-demo"  # Mixtral in 2 bits, published with the paper
PRESETS = {
    "mistralai/Mixtral-8x7B-Instruct-v0.1": _mixtral(),
    "mistralai/Mixtral-8x7B-v0.1": _mixtral(),
    DEMO: _mixtral(dtype="float16"),
    "mistralai/Mixtral-8x22B-Instruct-v0.1": MIXTRAL_22B,
    "microsoft/Phi-3.5-MoE-instruct": PHI,
    "allenai/OLMoE-1B-7B-0924": OLMOE,
    "allenai/OLMoE-1B-7B-0924-Instruct": OLMOE,
    "Qwen/Qwen3-30B-A3B": _qwen3(),
    "Qwen/Qwen3-235B-A22B": QWEN3_235B,
    "Qwen/Qwen1.5-MoE-A2.7B": QWEN15,
    "openai/gpt-oss-20b": _gpt_oss(num_hidden_layers=24, num_local_experts=32),
    "openai/gpt-oss-120b": _gpt_oss(num_hidden_layers=36, num_local_experts=128),
    "deepseek-ai/DeepSeek-V2-Lite": DEEPSEEK_LITE,
    "deepseek-ai/DeepSeek-V2-Lite-Chat": DEEPSEEK_LITE,
    "ibm-granite/granite-3.1-1b-a400m-instruct": GRANITE,
}
