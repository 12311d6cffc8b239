"""Makes a model choose the experts of a trace, and records the experts that it chose.

Letters: **T** tokens, **L** MoE layers, **K** experts per token.
Random weights route almost at random. A forced model uses the experts of the trace, with the weights of its own router.
Works on any transformers model with an experts interface, offloaded or not.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import nn

from mixoff.bench.spec import SEED, repeat_rate
from mixoff.errors import MixoffError
from mixoff.shapes import config

if TYPE_CHECKING:
    from mixoff.runtime.prefetch import Guesses
    from mixoff.runtime.runtime import Runtime


class Routing:
    """Replaces a model's choice of experts: by the runtime's `reroute`, or by hooks on a model without a runtime.

    trace: experts (T, L, K) to use, repeated from the start when it ends; None leaves the choice to the model.
    guesses: experts (T, L, K) that prefetching expects, in place of those of random routers.
    chosen: experts (L, K) of each pass of one token.
    """

    def __init__(self, model: nn.Module, trace: np.ndarray | None, guesses: np.ndarray | None = None) -> None:
        modules = config.expert_modules(model).values()
        if trace is not None and trace.shape[1] != len(modules):
            raise MixoffError(f"the trace has {trace.shape[1]} layers, the model {len(modules)}: they must agree")
        self.table = None if trace is None else torch.from_numpy(trace)[:, :, None]  # (T, L, 1, K)
        self.next, self.layers = 0, len(modules)
        self.now: list[torch.Tensor] = []  # choices (1, K) in the layers of the current token
        self.chosen: list[np.ndarray] = []
        self.forced: tuple[int, Sequence[torch.Tensor]] = (-1, ())  # a token, and its experts (1, K) by layer
        self.undo = ExitStack()
        if hasattr(model, "mixoff"):
            self._take_over(model.mixoff)
            if guesses is not None:
                self._guess(model.mixoff.guesses, guesses)
            return
        for i, module in enumerate(modules):
            hook = module.register_forward_pre_hook(self._hook(i), with_kwargs=True)
            self.undo.callback(hook.remove)

    def detach(self) -> None:
        """Give the choice back to the model."""
        self.undo.close()

    def _take_over(self, runtime: Runtime) -> None:
        def reroute(site: int, choice: torch.Tensor, weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return self._choose(site, choice), weights

        self.undo.callback(setattr, runtime, "reroute", runtime.reroute)
        runtime.reroute = reroute

    def _choose(self, layer: int, original: torch.Tensor) -> torch.Tensor:
        """The choice in a layer, which is recorded; `original` is the model's own."""
        choice = original if self.table is None else self._forced(self.table, layer, original)
        self._record(layer, choice)
        return choice

    def _hook(self, layer: int) -> Callable:
        def hook(_: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
            original = args[1] if len(args) > 1 else kwargs["top_k_index"]
            choice = self._choose(layer, original)
            if len(args) > 1:
                return (args[0], choice, *args[2:]), kwargs
            return args, kwargs | {"top_k_index": choice}

        return hook

    def _forced(self, table: torch.Tensor, layer: int, original: torch.Tensor) -> torch.Tensor:
        first = self.next % len(table)
        if len(original) > 1:
            tokens = np.arange(first, first + len(original)) % len(table)
            return table[tokens, layer, 0].to(original)  # (T, K)
        if self.forced[0] != self.next:  # hooks count as the model's time, so a token is split into layers once
            self.forced = self.next, table[first].to(original).unbind()
        return self.forced[1][layer]  # (1, K)

    def _record(self, layer: int, choice: torch.Tensor) -> None:
        if len(choice) == 1:
            self.now.append(choice)
        if layer == self.layers - 1:
            self.next += len(choice)
            if self.now:
                self.chosen.append(torch.cat(self.now).cpu().numpy())
            self.now = []

    def _guess(self, target: Guesses, guesses: np.ndarray) -> None:
        expect_next = target.expect

        def expect(site: int, experts: Sequence[int]) -> None:
            expect_next(site, guesses[self.next % len(guesses), site].tolist())

        target.expect = expect  # type: ignore[method-assign]  # until `detach`
        self.undo.callback(setattr, target, "expect", expect_next)


def guessed(trace: np.ndarray, num_experts: int, recall: float) -> np.ndarray:
    """Guesses (T, L, K): a share `recall` of them are in the trace, and the others are not.

    >>> trace = synthetic("uniform", None, 8, 2, layers=4, tokens=2000)
    >>> float((guessed(trace, 8, 0.5) == trace).mean().round(1))
    0.5
    """
    rng = np.random.default_rng(SEED)
    scores = rng.random((*trace.shape[:2], num_experts))  # (T, L, E)
    np.put_along_axis(scores, trace, -1.0, 2)
    others = np.argsort(-scores, axis=2)[:, :, : trace.shape[2]]  # (T, L, K) at random, none of the chosen
    return np.where(rng.random(trace.shape) < recall, trace, others)


def synthetic(preset: str, repeat: float | None, num_experts: int, top_k: int, layers: int, tokens: int) -> np.ndarray:
    """Experts (T, L, K) of a synthetic router: a preset of `mixoff.trace.routers`, its locality tuned to a repeat rate.

    repeat: share of experts that the previous token used too, to within 0.01; None keeps the preset's.
    """
    from mixoff.trace import routers

    router = replace(routers.preset(preset), num_experts=num_experts, top_k=top_k, layers=layers)

    def draw(weight: float | tuple) -> np.ndarray:
        return replace(router, weight=weight).trace(tokens, layers, SEED).experts.astype(np.int64)

    return draw(router.weight) if repeat is None else _tuned(draw, repeat)


def every_expert(num_experts: int, top_k: int, layers: int) -> np.ndarray:
    """Experts (T, L, K) of the fewest tokens that use every expert.

    >>> every_expert(4, 2, layers=1).tolist()
    [[[0, 1]], [[2, 3]]]
    """
    tokens = -(-num_experts // top_k)
    each = (np.arange(tokens * top_k) % num_experts).reshape(tokens, 1, top_k)
    return np.repeat(each, layers, 1)


def _tuned(draw: Callable[[float], np.ndarray], repeat: float) -> np.ndarray:
    """Bisection over the weight of the topic: the repeat rate grows with it."""
    low, high = 0.0, 16.0
    for _ in range(12):
        middle = (low + high) / 2
        low, high = (middle, high) if (repeat_rate(draw(middle)) or 0.0) < repeat else (low, middle)
    return draw(low)
