"""Replay a trace through a policy: the hits, misses and bytes that a run would have, without the model.

Letters: **L** MoE layers, **E** experts per layer.
The rules are those of `cache.ExpertCache` and `prefetch.Guesses`, on the arrays of `replay`. Tests check that it counts
exactly what the runtime counts. `mixoff.simulate` is the function below.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from mixoff.cache.cache import SCOPES
from mixoff.errors import BudgetError, MixoffError
from mixoff.trace.replay import CODES, COUNTERS, NAMED, NONE, OF_GUESSES, POPULAR, replay, with_recall
from mixoff.trace.requests import Requests, depths
from mixoff.trace.trace import Trace
from mixoff.units import format_nbytes

OFFLINE = ("static", "belady")  # these need the whole trace, so no runtime can offer them
PREFETCH = ("none", "next-router", "popularity", "oracle", "recall=0.86")


@dataclass(frozen=True)
class LayerCounts:
    """Decoding's requests of one layer."""

    layer: int
    hits: int
    misses: int


@dataclass(frozen=True)
class Simulation:
    """The counts of a run over a trace.

    Attributes
    ----------
    policy, scope, prefetch: as given to `simulate`
    slots: slots per layer, in both scopes
    hits, misses, evictions: requests of decoding
    prompt_hits, prompt_misses: requests of prompts
    restores: experts that lent their slot to a prompt and were fetched again
    per_layer: hits and misses of decoding in each layer
    expert_nbytes: bytes of one expert, or None if unknown; then all properties in bytes are None
    prefetches: experts fetched on a guess
    prefetch_hits: the part of prefetches that was then asked for, counted in hits
    predictions: experts that the predictor named, cached ones included
    predictions_right: the part of predictions that was asked for
    """

    policy: str
    scope: str
    slots: int
    hits: int
    misses: int
    evictions: int
    prompt_hits: int
    prompt_misses: int
    restores: int
    per_layer: tuple[LayerCounts, ...]
    expert_nbytes: int | None = None
    prefetch: str = "none"
    prefetches: int = 0
    prefetch_hits: int = 0
    predictions: int = 0
    predictions_right: int = 0

    @property
    def hit_rate(self) -> float | None:
        """Share of decoding's requests that found their expert in the fast tier; None before the first."""
        return self.hits / (self.hits + self.misses) if self.hits + self.misses else None

    @property
    def bytes_moved(self) -> int | None:
        """Bytes from the slow tier while decoding: one fetch per miss, and one per guess."""
        return None if self.expert_nbytes is None else (self.misses + self.prefetches) * self.expert_nbytes

    @property
    def prefetch_used_bytes(self) -> int | None:
        """Bytes fetched on guesses that proved right."""
        return None if self.expert_nbytes is None else self.prefetch_hits * self.expert_nbytes

    @property
    def prefetch_wasted_bytes(self) -> int | None:
        """Bytes fetched on guesses that proved wrong."""
        return None if self.expert_nbytes is None else (self.prefetches - self.prefetch_hits) * self.expert_nbytes

    @property
    def prompt_bytes_moved(self) -> int | None:
        """Bytes from the slow tier for prompts, restores included."""
        return None if self.expert_nbytes is None else (self.prompt_misses + self.restores) * self.expert_nbytes

    def to_dict(self) -> dict:
        """All figures under their names, ready for JSON."""
        out = {name: value for name, value in vars(self).items() if name != "per_layer"}
        computed = ("hit_rate", "bytes_moved", "prefetch_used_bytes", "prefetch_wasted_bytes", "prompt_bytes_moved")
        out |= {name: getattr(self, name) for name in computed}
        return out | {"per_layer": [vars(x).copy() for x in self.per_layer]}

    def __str__(self) -> str:
        rate = "no decoding" if self.hit_rate is None else f"hit rate {self.hit_rate:.3f}"
        moved = "" if self.bytes_moved is None else f", {format_nbytes(self.bytes_moved)} moved"
        where = "per layer" if self.scope == "layer" else "per layer in one pool"
        guessed = f", {self.prefetch_hits:,} of {self.prefetches:,} prefetches used" if self.prefetch != "none" else ""
        return (
            f"{self.policy}, {self.slots} slots {where}: {self.hits:,} hits, {self.misses:,} misses ({rate}), "
            f"{self.evictions:,} evictions{guessed}{moved}"
        )

    __repr__ = __str__

    def _repr_html_(self) -> str:
        rows = "".join(f"<tr><td>{x.layer}</td><td>{x.hits:,}</td><td>{x.misses:,}</td></tr>" for x in self.per_layer)
        head = "<tr><th>layer</th><th>hits (modelled)</th><th>misses (modelled)</th></tr>"
        return f"<p>{self}</p><table>{head}{rows}</table>"


def simulate(
    trace: Trace,
    policy: str = "lru",
    slots: int = 4,
    scope: str = "layer",
    expert_nbytes: int | None = None,
    *,
    prefetch: str = "none",
    prefetch_nbytes: int | None = None,
) -> Simulation:
    """Count hits, misses and evictions of `policy` over `trace`, from an empty cache.

    A call's experts are kept while it computes. Raises MixoffError, and BudgetError for fewer slots than experts per
    token.

    Parameters
    ----------
    trace: experts that routers asked for
    policy: a policy of the runtime, `static` (keeps the most requested experts of the whole trace), or `belady` (evicts
        what is needed last: no policy has fewer misses, which the tests check by brute force)
    slots: slots per layer
    scope: `layer`, or `global`, which puts slots x layers into one pool
    expert_nbytes: bytes of one expert; None takes the trace's
    prefetch: source of the guesses, fetched outside the cache while the layer before computes: `none`,
        `next-router` (the trace's `predicted`), `popularity` (the most requested experts so far), `oracle`, or
        `recall=R`. The last is synthetic: it names each expert with chance R, and a wrong one otherwise
    prefetch_nbytes: bytes of guesses per layer, at most; None means K experts, the runtime's rule

    >>> trace = Trace.from_array([[[0, 1]], [[0, 2]], [[0, 1]]])
    >>> simulate(trace, "lru", slots=2), simulate(trace, "belady", slots=3).hits
    (lru, 2 slots per layer: 2 hits, 4 misses (hit rate 0.333), 2 evictions, 3)
    """
    _check(trace, policy, slots, scope)
    requests, L, E = trace.requests(), len(trace.layers), trace.num_experts
    capacity = [min(slots, E)] * L if scope == "layer" else [min(slots, E) * L]
    nbytes = trace.expert_nbytes if expert_nbytes is None else expert_nbytes
    guesses, named = _guesses(prefetch, requests, L, E)
    spare = _spare(prefetch_nbytes, nbytes, trace.top_k)
    counters = replay(requests, L, E, np.array(capacity), CODES[policy], guesses, spare, named)
    totals = dict(zip(COUNTERS + OF_GUESSES, counters.sum(1).tolist(), strict=True))
    used = counters[len(COUNTERS) + OF_GUESSES.index("prefetch_hits")]
    hits, misses = counters[0] + used, counters[1] - used  # as the runtime counts them
    totals |= {"hits": int(hits.sum()), "misses": int(misses.sum())}
    rows = zip(trace.layers, hits.tolist(), misses.tolist(), strict=True)
    per_layer = tuple(LayerCounts(*row) for row in rows)
    return Simulation(policy, scope, slots, **totals, per_layer=per_layer, expert_nbytes=nbytes, prefetch=prefetch)


def _guesses(prefetch: str, requests: Requests, L: int, E: int) -> tuple[int, np.ndarray]:
    """Source of guesses, and the keys that are named, int (calls, M); empty unless the source is a list."""
    if prefetch == "none" or prefetch == "popularity":
        return NONE if prefetch == "none" else POPULAR, np.zeros((0, 0), np.int64)
    if prefetch == "next-router":
        if requests.named is None:
            raise MixoffError(
                "this trace holds no guesses of the next router: record it with prefetch next-router, in a budget that "
                "does not hold all experts, or use recall=0.86"
            )
        return NAMED, requests.named
    try:
        recall = 1.0 if prefetch == "oracle" else float(str(prefetch).removeprefix("recall="))
    except ValueError:
        recall = -1.0
    if not 0 <= recall <= 1:
        raise MixoffError(f"unknown prefetch {prefetch!r}: choose one of {', '.join(PREFETCH)} (a share of 0 to 1)")
    return NAMED, with_recall(requests, L, E, recall)


def _spare(prefetch_nbytes: int | None, expert_nbytes: int | None, top_k: int) -> int:
    """Experts that may be fetched on guesses, per layer."""
    if prefetch_nbytes is None:
        return top_k
    if expert_nbytes is None:
        raise MixoffError("prefetch_nbytes needs the size of an expert: give expert_nbytes")
    return prefetch_nbytes // expert_nbytes


@dataclass(frozen=True)
class Comparison:
    """All policies over one trace, and how far each gets from LRU towards the optimum."""

    results: tuple[Simulation, ...]

    def gap_closed(self, policy: str) -> float | None:
        """Share of LRU's misses above Belady's that `policy` saves, before prefetch; None if there are none to save.

        Below 0 for a policy that is worse than LRU.
        """
        misses = {r.policy: r.misses + r.prefetch_hits for r in self.results}
        gap = misses["lru"] - misses["belady"]
        return (misses["lru"] - misses[policy]) / gap if gap else None

    def to_dict(self) -> dict:
        """One object per policy, with `gap_closed`."""
        return {"results": [r.to_dict() | {"gap_closed": self.gap_closed(r.policy)} for r in self.results]}

    def __str__(self) -> str:
        lines = [f"{'policy':12} {'hit rate':>8} {'misses':>10} {'evictions':>10} {'gap closed':>10}  (modelled)"]
        for r in self.results:
            rate, share = r.hit_rate, self.gap_closed(r.policy)
            cells = "-" if rate is None else f"{rate:.3f}", "-" if share is None else f"{share:.0%}"
            lines.append(f"{r.policy:12} {cells[0]:>8} {r.misses:>10,} {r.evictions:>10,} {cells[1]:>10}")
        return "\n".join(lines)


def compare(
    trace: Trace, slots: int = 4, scope: str = "layer", expert_nbytes: int | None = None, **options: Any
) -> Comparison:
    """`simulate` with every policy. options: its prefetch arguments."""
    return Comparison(tuple(simulate(trace, policy, slots, scope, expert_nbytes, **options) for policy in CODES))


def curve(trace: Trace, policy: str = "lru", scope: str = "layer") -> dict[int, float | None]:
    """Hit rate of decoding by slots per layer, from top-k to all experts; one pass for LRU without prompts.

    >>> curve(Trace.from_array([[[0, 1]], [[0, 2]], [[0, 1]]], num_experts=4))
    {2: 0.3333333333333333, 3: 0.5, 4: 0.5}
    """
    sizes = range(trace.top_k, trace.num_experts + 1)
    _check(trace, policy, trace.num_experts, scope)
    if policy != "lru" or trace.is_prompt.any() or len(np.unique(trace.passes)) < trace.tokens:
        return {slots: simulate(trace, policy, slots, scope).hit_rate for slots in sizes}
    L = len(trace.layers)
    histogram = depths(trace.requests(), L, trace.num_experts, scope).sum(0)
    hits, pool = histogram[:-1].cumsum(), 1 if scope == "layer" else L
    return {slots: float(hits[slots * pool - 1] / histogram.sum()) for slots in sizes}


def _check(trace: Trace, policy: str, slots: int, scope: str) -> None:
    if not isinstance(trace, Trace):
        raise MixoffError(
            f"cannot replay {type(trace).__name__}: make it a mixoff.Trace with Trace.from_array or Trace.load"
        )
    if policy not in CODES:
        raise MixoffError(f"unknown policy {policy!r}: choose one of {', '.join(sorted(CODES))}")
    if scope not in SCOPES:
        raise MixoffError(f"unknown scope {scope!r}: choose one of {', '.join(SCOPES)}")
    if isinstance(slots, bool) or not isinstance(slots, (int, np.integer)):
        raise BudgetError(f"slots is {slots!r}: give a whole number of slots per layer")
    if slots < trace.top_k:
        raise BudgetError(
            f"{slots} slots per layer cannot hold the {trace.top_k} experts of a token at once: give {trace.top_k}"
        )
