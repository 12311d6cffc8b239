"""Layers of the backbone that keep their weight quantized: a linear layer and an embedding.

Letters: **N** outputs or vocabulary, **K** inputs or model width.
They replace layers of a model that is about to be loaded: created empty, and filled afterwards.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn

from mixoff import kernels
from mixoff.errors import CheckpointError
from mixoff.loading import together

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from mixoff.quantize.strided import StridedTensor
    from mixoff.quantize.tensor import QTensor


CPU = torch.device("cpu")


class QuantizedLinear(nn.Module):
    """`x @ w.T + bias` for a quantized w (N, K). Made from the layer that it replaces; `fill` sets the weight."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.shape = (linear.out_features, linear.in_features)
        self.bias = linear.bias
        self.quantized: QTensor | None = None
        self.exact = False
        self.together: tuple[together.Together, int] | None = None  # the product that this layer is a part of

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x (..., K) -> (..., N), in x's dtype."""
        if self.together is None:
            out = kernels.linear(x, self.quantized, exact=self.exact)
        else:
            out = self.together[0].product(self.together[1], x)
        return out if self.bias is None else out + self.bias

    def extra_repr(self) -> str:
        return repr(self.quantized) if self.quantized else f"{self.shape}, empty"


class QuantizedEmbedding(nn.Module):
    """Rows of a quantized w (N, K) by token id."""

    def __init__(self, embedding: nn.Embedding) -> None:
        super().__init__()
        self.shape = (embedding.num_embeddings, embedding.embedding_dim)
        self.dtype = torch.get_default_dtype()
        self.quantized: QTensor | None = None

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """ids (...) -> (..., K)."""
        assert self.quantized is not None  # after `fill`
        out = torch.empty(*ids.shape, self.shape[1], dtype=self.dtype, device=ids.device)
        for start, stop in self.quantized.blocks():
            inside = (ids >= start) & (ids < stop)  # (...)
            if inside.any():
                out[inside] = self.quantized.block_weights(start, stop)[ids[inside] - start].to(self.dtype)
        return out

    def extra_repr(self) -> str:
        return repr(self.quantized) if self.quantized else f"{self.shape}, empty"


def untie(config: PretrainedConfig, weights: dict[str, QTensor | StridedTensor]) -> None:
    """If the head is tied to a quantized embedding, let both layers hold the same quantized weight."""
    shared = next((q for name, q in weights.items() if name.endswith("embed_tokens.weight")), None)
    if shared is not None and config.tie_word_embeddings:
        config.tie_word_embeddings = False
        weights["lm_head.weight"] = shared


def hollow(model: nn.Module, names: list[str]) -> None:
    """Replace the layer of each tensor in `names` (`….q_proj.weight`) by an empty quantized layer."""
    modules = dict(model.named_modules())
    for name in names:
        parent, _, child = name.removesuffix(".weight").rpartition(".")
        layer = modules.get(name.removesuffix(".weight"))
        if not isinstance(layer, (nn.Linear, nn.Embedding)):
            raise CheckpointError(
                f"{name} is quantized in the store, but the model has no such layer: convert it again"
            )
        kind = QuantizedLinear if isinstance(layer, nn.Linear) else QuantizedEmbedding
        setattr(modules[parent], child, kind(layer))


def fill(
    model: nn.Module,
    weights: Mapping[str, QTensor | StridedTensor],
    dtype: torch.dtype,
    exact: bool = False,
    where: torch.device = CPU,
) -> None:
    """Give each hollow layer its weight, on the device `where`. exact: activations stay fp32.

    Raises CheckpointError when a shape is not the layer's.
    """
    modules = {name: model.get_submodule(name.removesuffix(".weight")) for name in weights}
    for name, q in weights.items():
        if modules[name].shape != q.shape:
            raise CheckpointError(f"{name} has shape {q.shape} in the store, config.json says {modules[name].shape}")
    joined = _joined(modules, weights, exact, where) if where.type in together.DEVICES else {}
    alone = {id(q): q.to(where) for q in weights.values() if id(q) not in joined}
    for name, q in weights.items():
        modules[name].quantized = joined.get(id(q)) or alone[id(q)]
        modules[name].dtype, modules[name].exact = dtype, exact


def _joined(
    modules: Mapping[str, Any], weights: Mapping[str, QTensor | StridedTensor], exact: bool, where: torch.device
) -> dict[int, QTensor]:
    """Give layers with the same input one product; their weights on the device, by the identity of those given."""
    found = {}
    for names in together.groups(weights):
        matrices = [cast("QTensor", weights[name]) for name in names]
        whole, rows = together.join(matrices).to(where), [q.shape[0] for q in matrices]
        shared = together.Together(whole, rows, exact)
        for i, q in enumerate(together.split(whole, rows)):
            modules[names[i]].together = shared, i
            found[id(matrices[i])] = q
    return found
