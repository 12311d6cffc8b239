"""What one MoE layer computes: which rows go to which expert, and one expert's steps, for any family.

Letters: **T** tokens of a call, **K** experts per token, **R** rows of one expert, **D** model width, **F** expert
width.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import torch

from mixoff import kernels
from mixoff.kernels.cpu import grouped
from mixoff.quantize.tensor import QTensor

SILU = ("SiLU", "SiLUActivation")  # classes of torch and of transformers
LANES = 64  # most elements that ATen computes at once: two vectors of bf16 with AVX-512


def by_expert(top_k_index: torch.Tensor, num_experts: int) -> dict[int, torch.Tensor]:
    """Positions of each expert in the flattened (T, K) choice, experts in router order.

    The sort is that of transformers' `grouped_mm`, which is not stable. On several threads a row's last bit may depend
    on its place among the rows of a product, so rows keep that order. An index of `num_experts` or more is
    transformers' mark for "no expert" and is left out.

    >>> by_expert(torch.tensor([[3, 1], [1, 9]]), 8)
    {3: tensor([0]), 1: tensor([1, 2])}
    """
    flat = top_k_index.flatten()  # (T * K,)
    router_order = dict.fromkeys(flat.tolist())  # the only read of the router's choice
    experts, order = torch.sort(flat)
    distinct, counts = torch.unique_consecutive(experts, return_counts=True)
    positions = dict(zip(distinct.tolist(), order.split(counts.tolist()), strict=True))
    return {expert: positions[expert] for expert in router_order if expert < num_experts}


def expert_mlp(
    module: torch.nn.Module,
    x: torch.Tensor,
    weights: dict[str, torch.Tensor | QTensor],
    scratch: torch.Tensor,
    exact: bool = False,
    place: Callable[[], tuple[int, int]] | None = None,
) -> torch.Tensor:
    """One expert of any family that transformers decorates: x (R, D) -> (R, D), the steps of `grouped_mm` in order.

    exact: activations stay fp32 in products with quantized weights
    place: returns (rows of the call that belong to experts of a lower index, rows of the call); None: x is all rows
    """
    if fuses(module, x, weights, exact):
        return normed(module, kernels.gated_mlps(x, [_pair(weights)], exact)[0])

    def linear(x: torch.Tensor, name: str) -> torch.Tensor:
        out = kernels.linear(x, weights[name], scratch, module.is_transposed, exact)
        return out.add_(weights[f"{name}_bias"].to(out.dtype)) if module.has_bias else out

    h = linear(x, "gate_up_proj" if module.has_gate else "up_proj")
    h = activated(module, h, place)  # (R, F)
    h = linear(h, "down_proj")  # (R, D)
    return normed(module, h)


def expert_mlps(
    module: torch.nn.Module,
    x: torch.Tensor,
    experts: dict[int, dict[str, torch.Tensor | QTensor]],
    scratch: torch.Tensor,
    exact: bool = False,
    place: Callable[[int], tuple[int, int]] | None = None,
) -> torch.Tensor:
    """One row through each of E experts, by index: x (1, D) -> (E, 1, D), bit for bit what `expert_mlp` computes.

    place: as there, for an expert's index
    """
    if fuses(module, x, next(iter(experts.values())), exact):
        return normed(module, kernels.gated_mlps(x, [_pair(weights) for weights in experts.values()], exact))
    places = {expert: place and functools.partial(place, expert) for expert in experts}
    return torch.stack([expert_mlp(module, x, w, scratch, exact, places[e]) for e, w in experts.items()])


def groups(
    module: torch.nn.Module, x: torch.Tensor, experts: dict[int, dict[str, torch.Tensor | QTensor]], exact: bool
) -> bool:
    """Whether all rows of these experts can be one compiled call."""
    return x.is_cpu and not exact and fuses(module, x, next(iter(experts.values())), exact)


def grouped_mlps(
    module: torch.nn.Module,
    x: torch.Tensor,
    counts: list[int],
    experts: dict[int, dict[str, torch.Tensor | QTensor]],
) -> torch.Tensor:
    """Rows x (R, D) sorted by expert, so many of each -> (R, D), bit for bit what `expert_mlp` computes."""
    return normed(module, grouped.gated_mlps(x, counts, [_pair(weights) for weights in experts.values()]))


def _pair(weights: dict[str, torch.Tensor | QTensor]) -> tuple[QTensor, QTensor]:
    return weights["gate_up_proj"], weights["down_proj"]


def activated(module: torch.nn.Module, h: torch.Tensor, place: Callable[[], tuple[int, int]] | None) -> torch.Tensor:
    """`h` through the gate or the activation -> (R, F), with the bits of `grouped_mm`, which passes all rows at once.

    On a CPU, ATen computes the last elements of a tensor, fewer than LANES, one by one. Its scalar `exp` may differ
    from the vectorized one in the last bit. So if LANES does not divide F, rows of zeros replace other experts' rows.
    """
    activate = module._apply_gate if module.has_gate else module.act_fn
    even = LANES // math.gcd(LANES, h.shape[1] // 2 if module.has_gate else h.shape[1])  # rows that fill whole vectors
    if even == 1 or h.device.type != "cpu":
        return activate(h)
    R = len(h)
    before, rows = place() if place else (0, R)
    before, after = before % even, rows - before - R
    after = min(after, even + after % even)
    return activate(torch.nn.functional.pad(h, (0, 0, before, after)))[before : before + R]


def normed(module: torch.nn.Module, h: torch.Tensor) -> torch.Tensor:
    """`h` after the norm that ends an expert in some families; Colab's transformers 5.15 does not have the flag yet."""
    return module.post_expert_norm(h) if getattr(module, "has_post_expert_norm", False) else h


def fuses(module: torch.nn.Module, x: torch.Tensor, weights: dict[str, torch.Tensor | QTensor], exact: bool) -> bool:
    """Whether the activation is part of a compiled call: quantized weights, and the gate is plain silu."""
    down = weights["down_proj"]
    if not isinstance(down, QTensor) or not is_silu_gated(module):
        return False
    return all(kernels.choose(x, w, exact) in kernels.FUSED for w in (weights["gate_up_proj"], down))


def is_silu_gated(module: torch.nn.Module) -> bool:
    """Whether the expert computes `silu(gate) * up`, gate before up, no bias: transformers' default gate."""
    if not module.has_gate or not module.is_concatenated or module.has_bias:
        return False
    default = type(module)._apply_gate.__name__ == "_default_apply_gate"
    return default and type(getattr(module, "act_fn", None)).__name__ in SILU
