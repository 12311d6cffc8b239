"""A learner's own cache policy on recorded routing: one function, replayed by layer. Knows no checks and no figures."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from mixoff.trace.simulate import simulate
from mixoff.trace.trace import Trace

Victim = Callable[[dict[int, int], dict[int, int]], int]


def misses(trace: Trace, victim: Victim, slots: int) -> int:
    """Misses of a cache with `slots` per layer that evicts what `victim(ages, uses)` names; ValueError for others.

    ages: requests of the layer since each candidate was last used; uses: how often it was used so far, evicted or not.
    Experts of the same call cannot be evicted. Tested against the simulator's LRU.
    """
    return sum(layer_misses(calls, victim, slots) for calls in trace.experts.transpose(1, 0, 2).tolist())


def layer_misses(calls: Iterable[list[int]], victim: Victim, slots: int) -> int:
    """`misses` of one layer; each call lists K experts."""
    held: set[int] = set()
    last: dict[int, int] = {}
    uses: dict[int, int] = {}
    now = count = 0
    for chosen in calls:
        for e in [e for e in chosen if e not in held]:
            count += 1
            if len(held) == slots:
                held.remove(named(victim, sorted(held - set(chosen)), last, uses, now))
            held.add(e)
        for e in chosen:
            now += 1
            last[e], uses[e] = now, uses.get(e, 0) + 1
    return count


def named(victim: Victim, candidates: list[int], last: dict[int, int], uses: dict[int, int], now: int) -> int:
    """The candidate that `victim` names."""
    expert = victim({e: now - last.get(e, now) for e in candidates}, {e: uses.get(e, 0) for e in candidates})
    if expert not in candidates:
        raise ValueError(f"victim named {expert!r}, the candidates are {candidates}: return one of them")
    return expert


def gap_share(traces: Iterable[Trace], victim: Victim, slots: int) -> float:
    """Share of the gap between LRU's misses and the optimum's that `victim` closes over all `traces`."""
    own = lru = best = 0
    for trace in traces:
        own += misses(trace, victim, slots)
        lru += simulate(trace, "lru", slots=slots).misses
        best += simulate(trace, "belady", slots=slots).misses
    return (lru - own) / (lru - best)
