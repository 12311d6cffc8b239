"""Records the choices of a runtime's routers as a trace."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from mixoff.errors import MixoffError
from mixoff.trace.files import NO_EXPERT
from mixoff.trace.trace import Trace


class Recorder:
    """Collects the routers' choices inside a `with` block; afterwards `recorder.trace` is the `Trace`.

    Passes that began before the block, or did not finish, are left out.
    """

    def __init__(self, runtime: Any) -> None:
        self.runtime = runtime
        self.calls: dict[int, tuple[bool, float, dict]] = {}  # of each pass: prompt or not, time, its layers by site

    def __enter__(self) -> Recorder:
        self._start, self._stop = time.perf_counter(), self.runtime.on_routing(self._note)
        return self

    def __exit__(self, *exc: object) -> None:
        self._stop()

    def _note(self, token: int, is_prompt: bool, site: int, experts: Any, weights: Any) -> None:
        """One call of a layer: tensors (T, K), copied now, converted later. `token` identifies the pass."""
        now = time.perf_counter() - self._start
        calls = self.calls.setdefault(token, (is_prompt, now, {}))[2]
        named = self.runtime.guesses.expected.get(site, ())
        calls[site] = experts.detach().clone(), weights.detach().clone(), named

    @property
    def trace(self) -> Trace:
        """All complete passes so far. Raises MixoffError when there is none."""
        sites = self.runtime.ranks.whole
        whole = [self.calls[token] for token in sorted(self.calls) if len(self.calls[token][2]) == len(sites)]
        if not whole:
            raise MixoffError("nothing was recorded: generate within `with model.mixoff.trace() as recorder:`")
        stacked = [
            [np.stack([_array(calls[i][part], kind) for i in range(len(sites))], 1) for _, _, calls in whole]
            for part, kind in enumerate((np.int16, np.float32))
        ]
        rows = [len(part) for part in stacked[0]]
        named = [[calls[i][2] for i in range(len(sites))] for _, _, calls in whole]
        E = max(site.num_experts for site in sites)
        experts = np.concatenate(stacked[0])  # (T, L, K)
        return Trace.from_array(
            np.where(experts < E, experts, NO_EXPERT),
            E,
            is_prompt=np.repeat([is_prompt for is_prompt, _, _ in whole], rows),
            passes=np.repeat(np.arange(len(whole)), rows),
            layers=[site.layer for site in sites],
            weights=np.nan_to_num(np.concatenate(stacked[1])),  # padding may be routed by NaN
            times_s=np.repeat([now for _, now, _ in whole], rows),
            expert_nbytes=self.runtime.source.expert_nbytes,
            predicted=_padded(named, rows),
        )


def _array(values: Any, kind: type) -> np.ndarray:
    """A tensor's values, from any device; NumPy has no bfloat16."""
    values = values.float() if values.is_floating_point() else values
    return values.numpy(force=True).astype(kind)


def _padded(named: list[list[Sequence[int]]], rows: list[int]) -> np.ndarray | None:
    """Experts predicted before each call of each pass, as `Trace.predicted`; passes have `rows` tokens."""
    most = max(len(experts) for calls in named for experts in calls)
    if not most:
        return None
    out = np.full((sum(rows), len(named[0]), most), NO_EXPERT, np.int16)
    for t, calls in zip(np.cumsum([0, *rows[:-1]]), named, strict=True):
        for layer, experts in enumerate(calls):
            out[t, layer, : len(experts)] = experts
    return out
