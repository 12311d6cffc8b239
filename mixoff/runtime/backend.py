"""What transformers calls for the experts of a layer."""

from __future__ import annotations

import functools

import torch
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from mixoff.runtime.experts import by_expert, expert_mlp, expert_mlps, grouped_mlps, groups
from mixoff.transfer.arena import Weight

NAME = "mixoff"  # of the backend, in transformers' `experts_implementation`


class _Untrainable(torch.autograd.Function):
    """Identity in the forward pass; its backward pass raises an error that says why there is no gradient.

    Freezing the backbone instead would change bits: for weights without a gradient ATen computes products another way.
    """

    @staticmethod
    def forward(ctx: object, out: torch.Tensor, hidden_states: torch.Tensor) -> torch.Tensor:
        return out.view_as(out)

    @staticmethod
    def backward(ctx: object, grad: torch.Tensor) -> None:
        raise RuntimeError("offloaded experts can run but not train: load the model with transformers to train it")


def experts_forward(
    self: torch.nn.Module, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """The experts backend of transformers: hidden_states (T, D), choice and weights (T, K) -> (T, D).

    All rows of an expert are one product, in the order of transformers' `grouped_mm`, and so is the sum over K.
    `grouped_mm` itself computes models without a runtime, made from the configuration of a served one.
    """
    backend = _forward if "_mixoff" in vars(self) else ALL_EXPERTS_FUNCTIONS["grouped_mm"]
    return backend(self, hidden_states, top_k_index, top_k_weights)


@torch.compiler.disable
def _forward(
    self: torch.nn.Module, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    if not torch.is_grad_enabled():
        return _served(self, hidden_states, top_k_index, top_k_weights)
    with torch.no_grad():
        out = _served(self, hidden_states, top_k_index, top_k_weights)
    return _Untrainable.apply(out, hidden_states) if hidden_states.requires_grad else out


def _served(
    self: torch.nn.Module, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    runtime, site = self._mixoff
    if runtime.reroute is not None:
        top_k_index, top_k_weights = runtime.reroute(site, top_k_index, top_k_weights)
    out = runtime.residents.compute(self, hidden_states, top_k_index)
    if out is None:
        out = runtime.ranks.joined(_looked_at(self, hidden_states, top_k_index, top_k_weights))
    weighted = out.view(*top_k_index.shape, -1) * top_k_weights.unsqueeze(-1)  # (T, K, D)
    return weighted.sum(dim=1).to(hidden_states.dtype)  # (T, D)


def _looked_at(
    self: torch.nn.Module, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """Rows of hidden_states (T, D) through their experts -> (T * K, D) or (K, 1, D); the host reads the choice."""
    runtime, site = self._mixoff
    chosen, given = runtime.look(site, top_k_index, top_k_weights)
    runtime.note_routing(site, chosen, given)
    alone = None if runtime.ranks.count > 1 else _of_one_token(chosen, given, self.num_experts)
    if alone:
        return _one_row(self, hidden_states, alone)
    return _rows(self, hidden_states, by_expert(chosen, self.num_experts), given)


def _of_one_token(top_k_index: torch.Tensor, top_k_weights: torch.Tensor, num_experts: int) -> dict[int, float] | None:
    """One token's choice (1, K) as weight by expert, 0 for NaN.

    None for several tokens, or if the choice has a repeated index or one that means "no expert".
    """
    if len(top_k_index) != 1:
        return None
    (experts,), (given,) = top_k_index.tolist(), top_k_weights.tolist()
    weights = {expert: w if w == w else 0.0 for expert, w in zip(experts, given, strict=True)}
    return weights if len(weights) == len(experts) and max(experts) < num_experts else None


def _one_row(self: torch.nn.Module, x: torch.Tensor, weights: dict[int, float]) -> torch.Tensor:
    """One token x (1, D) through each of its experts -> (K, 1, D), in router order. weights: the router's."""
    (runtime, site), experts = self._mixoff, list(weights)
    parts: list[torch.Tensor] = []
    order: list[int] = []

    def place(expert: int) -> tuple[int, int]:
        return sum(other < expert for other in experts), len(experts)

    def compute(loaded: dict[int, dict[str, Weight]]) -> None:
        mine = {expert: loaded[expert] for expert in loaded if expert in experts}  # whole layers bring others too
        if mine:
            parts.append(expert_mlps(self, x, mine, runtime.scratch, runtime.exact, place))
            order.extend(mine)

    runtime.serve(site, experts, compute, None if runtime.in_prompt() else list(weights.values()))
    out = parts[0] if len(parts) == 1 else torch.cat(parts)
    if order != experts:  # row by row: building an index tensor would make the host wait for the device
        rows = dict(zip(order, out.unbind(), strict=True))
        out = torch.stack([rows[expert] for expert in experts])
    return out


def _rows(
    self: torch.nn.Module, hidden_states: torch.Tensor, where: dict[int, torch.Tensor], given: torch.Tensor
) -> torch.Tensor:
    """Rows of hidden_states (T, D) through their experts -> (T * K, D), zeros where this rank has no expert.

    where: positions (R,) of each expert's rows in the flattened choice of the router
    given: the router's weights (T, K)
    """
    runtime, site = self._mixoff
    K, by_policy = given.shape[1], None if runtime.in_prompt() else _given(where, given)
    out, where = hidden_states.new_zeros(given.numel(), hidden_states.shape[1]), _rows_on(hidden_states.device, where)
    held = runtime.ranks.held[site]
    asked = [expert for expert in where if expert in held]

    def compute(loaded: dict[int, dict[str, Weight]]) -> None:
        mine = {expert: loaded[expert] for expert in loaded if expert in where}  # whole layers bring others too
        if len(mine) > 1 and groups(self, hidden_states, mine, runtime.exact):
            rows = torch.cat([where[expert] for expert in mine])
            counts = [len(where[expert]) for expert in mine]
            out[rows] = grouped_mlps(self, hidden_states[rows // K], counts, mine)
            return
        for expert, weights in mine.items():
            rows, at = where[expert], functools.partial(_place, where, len(out), expert)
            out[rows] = expert_mlp(self, hidden_states[rows // K], weights, runtime.scratch, runtime.exact, at)

    runtime.serve(site, asked, compute, None if by_policy is None else [by_policy[e] for e in asked])
    return out


def _place(where: dict[int, torch.Tensor], rows: int, expert: int) -> tuple[int, int]:
    """(rows of the call that belong to experts of a lower index, `rows`)."""
    return sum(len(r) for other, r in where.items() if other < expert), rows


def _rows_on(device: torch.device, where: dict[int, torch.Tensor]) -> dict[int, torch.Tensor]:
    """Positions of rows on the computing device, in one copy that the host does not wait for."""
    if device.type == "cpu" or not where:
        return where
    counts = [len(rows) for rows in where.values()]
    rows = torch.cat(list(where.values())).to(device, non_blocking=True).split(counts)
    return dict(zip(where, rows, strict=True))


def _given(where: dict[int, torch.Tensor], top_k_weights: torch.Tensor) -> dict[int, float]:
    """The router's weights by expert, summed over the tokens; NaN counts as 0."""
    weights = top_k_weights.flatten().nan_to_num()
    return {expert: float(weights[rows].sum()) for expert, rows in where.items()}


ALL_EXPERTS_FUNCTIONS.register(NAME, experts_forward)
