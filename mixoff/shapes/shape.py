"""Shapes of models: parameters by part, experts per token, and the growth of the KV cache, for any configuration.

Everything is read off a skeleton on the meta device, which has shapes and no memory. Experts per token and the cache
come from a rehearsal: one forward pass of that skeleton, with experts that compute nothing.
"""

from __future__ import annotations

import copy
import functools
import math
import re
from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from mixoff.errors import CheckpointError
from mixoff.shapes.config import backbone_roles, configured_top_k, dtype_name, expert_modules, expert_sites
from mixoff.shapes.config import skeleton as skeleton_of
from mixoff.shapes.kv_cache import CacheLayer, quantized, rehearse
from mixoff.shapes.sites import Site

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig, PreTrainedModel


PARTS = ("experts", "attention", "embeddings", "router", "norms", "shared", "other")
PATTERNS = (  # of parameters' names; the first match counts, so the order matters: `shared_expert` contains `expert`
    ("shared", re.compile(r"shared_(expert|mlp)")),
    ("experts", re.compile(r"\.experts?\.|\.experts\b|\bexperts?\.(in|out)put")),
    ("attention", re.compile(r"(^|\.)(self_attn|attention|attn|self_attention|linear_attn)\.")),
    ("embeddings", re.compile(r"(^|\.)(embed_tokens|lm_head|wte|embeddings?|embed_out|word_embeddings)\b")),
    ("router", re.compile(r"\.(gate|router|gating)(\.|$)|e_score_correction_bias")),
)


@dataclass(frozen=True)
class Tensor:
    """One parameter or stored buffer of the backbone, which is all but the experts.

    - name, shape, dtype: as in the model's state dict.
    - part: part of the model, one of PARTS.
    - role: role in a scheme, as in `quantize.scheme.ROLES`; None is never quantized.
    - wide: 16-bit dtypes of the model for which transformers keeps this tensor in fp32.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    part: str
    role: str | None
    wide: tuple[str, ...] = ()

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class Stored:
    """One tensor of the backbone in a model's files; `role` as in `Tensor`."""

    shape: tuple[int, ...]
    nbytes: int
    role: str | None


@dataclass(frozen=True)
class ModelShape:
    """A model in plain numbers, from its configuration.

    - name: name in messages.
    - config: the configuration.
    - dtype: dtype of the published weights, by torch's name.
    - parameters: number of parameters by part; a weight that two layers share counts once.
    - active: parameters per token, including only the experts that a token uses.
    - backbone: all tensors that do not belong to experts.
    - buffers_nbytes: bytes of buffers that are in no file, such as rotary frequencies.
    - sites: sets of experts; empty for a family that mixoff does not serve.
    - top_k: experts per token of each site.
    - cache: tensors of the KV cache in `dtype`.
    - refusal: reason why mixoff does not serve this family; None if it does.
    - files: tensors of the backbone as stored in a folder; None without a folder.
    """

    name: str
    config: PretrainedConfig
    dtype: str
    parameters: dict[str, int]
    active: int
    backbone: tuple[Tensor, ...]
    buffers_nbytes: int
    sites: tuple[Site, ...]
    top_k: tuple[int, ...]
    cache: tuple[CacheLayer, ...]
    refusal: str | None = None
    files: tuple[Stored, ...] | None = None

    @property
    def total(self) -> int:
        """Total number of parameters."""
        return sum(self.parameters.values())

    def kv_nbytes(self, context: int, batch: int = 1) -> int:
        """Bytes of the KV cache in `dtype`, for `batch` sequences of `context` tokens."""
        return batch * sum(layer.nbytes(context) for layer in self.cache)

    def with_dtype(self, dtype: str) -> ModelShape:
        """The same model with weights and cache in another dtype."""
        return self if dtype == self.dtype else from_config(self.config, self.name, dtype)

    def with_kv_bits(self, bits: int | None) -> ModelShape:
        """The same model with keys and values in 4 or 8 bits; None leaves them. Raises MixoffError if it cannot."""
        return self if bits is None else replace(self, cache=quantized(self.cache, self.config, bits))

    def quantized_only(self, names: Collection[str]) -> ModelShape:
        """The same model if only tensors of these names can be quantized; others stay in 16 bits.

        Embeddings and heads are recognized under any name.
        """
        roles = [t.role if t.name in names or t.role in ("embeddings", "head") else None for t in self.backbone]
        return replace(self, backbone=tuple(replace(t, role=r) for t, r in zip(self.backbone, roles, strict=True)))

    def __str__(self) -> str:
        experts = f"{self.sites[0].num_experts} experts in {len(self.sites)} layers" if self.sites else "no experts"
        return f"{self.name}: {self.total / 1e9:.3f} B parameters, {self.active / 1e9:.2f} B active, {experts}"


def from_config(config: PretrainedConfig, name: str, dtype: str | None = None) -> ModelShape:
    """The shape of a configuration; `dtype` None is the configuration's dtype, or bf16 if it has none."""
    config = copy.deepcopy(config)
    config.dtype = dtype = dtype or dtype_name(config)
    shape = _described(_Configured(type(config), config.to_json_string(use_diff=False), dtype, config))
    return replace(shape, name=name, config=config, parameters=dict(shape.parameters))


@dataclass(frozen=True)
class _Configured:
    """A configuration by what it says, so that the same one is described once: a skeleton's pass takes a second."""

    kind: type
    text: str
    dtype: str
    config: PretrainedConfig = field(compare=False)


@functools.lru_cache(maxsize=16)
def _described(asked: _Configured) -> ModelShape:
    config, dtype = asked.config, asked.dtype
    skeleton = skeleton_of(config)
    parts = parts_by_name(skeleton)
    sites, refusal = _sites(skeleton, dtype)
    chosen, cache = rehearse(skeleton)
    sizes = {id(p): (parts[n], p.numel()) for n, p in skeleton.named_parameters()}
    counts = Counter(dict.fromkeys(PARTS, 0))
    for part, numel in sizes.values():
        counts[part] += numel
    top_k = tuple(chosen.get(site.name, configured_top_k(config)) for site in sites)
    idle = sum(_idle(site, k) for site, k in zip(sites, top_k, strict=True))
    stored = skeleton.state_dict()
    buffers = sum(b.nbytes for n, b in skeleton.named_buffers() if n not in stored)
    return ModelShape(
        name="",
        config=config,
        dtype=dtype,
        parameters=dict(counts),
        active=sum(counts.values()) - idle,
        backbone=tuple(_backbone(skeleton, parts)),
        buffers_nbytes=buffers,
        sites=sites,
        top_k=top_k,
        cache=cache,
        refusal=refusal,
    )


def _sites(skeleton: PreTrainedModel, dtype: str) -> tuple[tuple[Site, ...], str | None]:
    try:
        return expert_sites(skeleton, dtype), None
    except CheckpointError as error:
        return (), str(error)


def _idle(site: Site, top_k: int) -> int:
    """Parameters of a site that one token does not use."""
    return (site.num_experts - min(top_k, site.num_experts)) * sum(math.prod(part.shape) for part in site.parts)


def parts_by_name(skeleton: PreTrainedModel) -> dict[str, str]:
    """The part, one of PARTS, of every parameter and buffer, by its name.

    Experts are the parameters of modules that transformers marks as such, and norms are recognized by their class. All
    others go by their names, and then by the classes of the modules around them.
    """
    owners = dict(skeleton.named_modules())
    marked = set(expert_modules(skeleton))
    return {name: _part(name, owners, marked) for name, _ in (*skeleton.named_parameters(), *skeleton.named_buffers())}


def _part(name: str, owners: dict[str, torch.nn.Module], marked: set[str]) -> str:
    owner = name.rpartition(".")[0]
    if owner in marked or type(owners[owner]).__name__.endswith("Experts"):
        return "experts"
    if "norm" in type(owners[owner]).__name__.lower():
        return "norms"
    part = next((part for part, pattern in PATTERNS if pattern.search(name)), "other")
    return "attention" if part == "other" and _in_attention(owner, owners) else part


def _in_attention(owner: str, owners: dict[str, torch.nn.Module]) -> bool:
    """Whether a module is inside one whose class is an attention, even if its name is not (`mixer`)."""
    steps = owner.split(".")
    return any("Attention" in type(owners[".".join(steps[: i + 1])]).__name__ for i in range(len(steps)))


def _backbone(skeleton: PreTrainedModel, parts: dict[str, str]) -> Iterator[Tensor]:
    """Every tensor that a checkpoint stores, except the experts'; tied tensors once."""
    roles = backbone_roles(skeleton)
    seen = set()
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
