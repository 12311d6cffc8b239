"""Replay a trace through a policy: the hits, misses and bytes that a run would have, without the model.

Letters: **L** MoE layers, **E** experts a layer, **S** slots a layer, **R** requests.
The rules are those of `cache.ExpertCache`, written in arrays so that they compile: a call's residents are found first,
then each miss takes a free slot or that of a victim outside the call; recency follows router order; a prompt fills free
slots and evicts nothing. So it counts what the runtime counts, to the last hit; tests hold it to both.

`mixoff.simulate` is the function below. Does not know torch, files or time.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from mixoff.errors import BudgetError, MixoffError
from mixoff.policies import scramble
from mixoff.trace import Requests, Trace, compiled, depths
from mixoff.units import format_nbytes

SCOPES = ("layer", "global")
LRU, FIFO, LFU, LFUDA, LFRU, RANDOM, LEAST_STALE, STATIC, BELADY = range(9)
CODES = {"lru": LRU, "fifo": FIFO, "lfu": LFU, "lfuda": LFUDA, "lfru": LFRU, "random": RANDOM}
CODES |= {"least-stale": LEAST_STALE, "static": STATIC, "belady": BELADY}
OFFLINE = ("static", "belady")  # these know the trace, so no runtime can offer them
NEVER = 2**62  # the next use of what is not used again


@dataclass(frozen=True)
class LayerCounts:
    """Decoding's requests of one layer."""

    layer: int
    hits: int
    misses: int


@dataclass(frozen=True)
class Simulation:
    """What a run over the trace would count. hits, misses, evictions: of decoding; prompts stand apart.

    slots: a layer, in both scopes. restores: experts that lent their slot to a prompt and were fetched again.
    expert_nbytes: of one expert, or None where the trace does not know it; then no bytes are known either.
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

    @property
    def hit_rate(self) -> float | None:
        """Share of decoding's requests that found their expert in the fast tier; None before the first."""
        return self.hits / (self.hits + self.misses) if self.hits + self.misses else None

    @property
    def bytes_moved(self) -> int | None:
        """Bytes from the slow tier while decoding: one fetch a miss."""
        return None if self.expert_nbytes is None else self.misses * self.expert_nbytes

    @property
    def prompt_bytes_moved(self) -> int | None:
        """Bytes from the slow tier for prompts, restores included."""
        return None if self.expert_nbytes is None else (self.prompt_misses + self.restores) * self.expert_nbytes

    def to_dict(self) -> dict:
        """All figures under their names, ready for JSON."""
        out = {name: value for name, value in vars(self).items() if name != "per_layer"}
        out |= {"hit_rate": self.hit_rate, "bytes_moved": self.bytes_moved}
        out |= {"prompt_bytes_moved": self.prompt_bytes_moved, "per_layer": [vars(x).copy() for x in self.per_layer]}
        return out

    def __str__(self) -> str:
        rate = "no decoding" if self.hit_rate is None else f"hit rate {self.hit_rate:.3f}"
        moved = "" if self.bytes_moved is None else f", {format_nbytes(self.bytes_moved)} moved"
        where = "a layer" if self.scope == "layer" else "a layer in one pool"
        return (
            f"{self.policy}, {self.slots} slots {where}: {self.hits:,} hits, {self.misses:,} misses ({rate}), "
            f"{self.evictions:,} evictions{moved}"
        )

    __repr__ = __str__

    def _repr_html_(self) -> str:
        rows = "".join(f"<tr><td>{x.layer}</td><td>{x.hits:,}</td><td>{x.misses:,}</td></tr>" for x in self.per_layer)
        head = "<tr><th>layer</th><th>hits (modelled)</th><th>misses (modelled)</th></tr>"
        return f"<p>{self}</p><table>{head}{rows}</table>"


def simulate(
    trace: Trace, policy: str = "lru", slots: int = 4, scope: str = "layer", expert_nbytes: int | None = None
) -> Simulation:
    """Count hits, misses and evictions of `policy` over `trace`, from an empty cache.

    slots: of each layer; scope `global` puts slots x layers into one pool. Policies: those of the runtime, `static`
    (keeps what the whole trace asks for most) and `belady` (gives up what is needed last: no policy has fewer misses,
    shown by brute force in the tests). A call's experts are kept while it computes. Raises MixoffError; fewer slots
    than experts a token is a BudgetError.

    >>> trace = Trace.from_array([[[0, 1]], [[0, 2]], [[0, 1]]])
    >>> simulate(trace, "lru", slots=2), simulate(trace, "belady", slots=3).hits
    (lru, 2 slots a layer: 2 hits, 4 misses (hit rate 0.333), 2 evictions, 3)
    """
    _check(trace, policy, slots, scope)
    requests, L, E = trace.requests(), len(trace.layers), trace.num_experts
    capacity = [min(slots, E)] * L if scope == "layer" else [min(slots, E) * L]
    counters = _replay(requests, L, E, np.array(capacity), CODES[policy])
    per_layer = tuple(LayerCounts(*row) for row in zip(trace.layers, *counters[:2].tolist(), strict=True))
    totals = dict(zip(COUNTERS, counters.sum(1).tolist(), strict=True))
    nbytes = trace.expert_nbytes if expert_nbytes is None else expert_nbytes
    return Simulation(policy, scope, slots, **totals, per_layer=per_layer, expert_nbytes=nbytes)


def curve(trace: Trace, policy: str = "lru", scope: str = "layer") -> dict[int, float]:
    """Hit rate of decoding by slots a layer, from top-k to all experts; for LRU without prompts in one pass.

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
        raise BudgetError(f"slots is {slots!r}: give a whole number, of each layer")
    if slots < trace.top_k:
        raise BudgetError(
            f"{slots} slots a layer cannot hold the {trace.top_k} experts of a token at once: give {trace.top_k}"
        )


# --- the replay, in arrays -------------------------------------------------------------------------------------------

COUNTERS = ("hits", "misses", "evictions", "prompt_hits", "prompt_misses", "restores")  # int (L,) each


def _replay(requests: Requests, L: int, E: int, capacity: np.ndarray, code: int) -> np.ndarray:
    """COUNTERS of each layer, int (6, L), after all requests went through pools of `capacity` slots."""
    R, counters = requests.keys.size, np.zeros((len(COUNTERS), L), np.int64)
    future, known = np.zeros(R, np.int64), np.zeros(L * E, np.int64)
    if code == BELADY:
        compiled(next_use_loop, R)(requests.keys, requests.starts, requests.is_prompt, known + NEVER, future)
    if code == STATIC:
        decoded = np.repeat(~requests.is_prompt, np.diff(requests.starts))
        known = np.bincount(requests.keys[decoded], minlength=L * E)
    run = compiled(replay_loop, R, (scramble, settled, arrive, touch, choose, admit, evict))
    run(requests.keys, requests.starts, requests.site, requests.is_prompt, capacity, code, future, known, counters)
    return counters


# rows of the state of each key, and of each pool; HITS to RESTORES are the rows of `counters`
COUNT, LAST, SERIAL, USED, DUE, RESIDENT, CALLED, MISSED, SCORE = range(9)
SIZE, CLOCK, INSERTED, REMOVED, AGE, PASSES, SITE = range(7)
HITS, MISSES, EVICTIONS, PROMPT_HITS, PROMPT_MISSES, RESTORES = range(6)


def replay_loop(
    keys: np.ndarray,
    starts: np.ndarray,
    site: np.ndarray,
    is_prompt: np.ndarray,
    capacity: np.ndarray,
    code: int,
    future: np.ndarray,
    known: np.ndarray,
    counters: np.ndarray,
) -> None:
    """Run all calls, adding to `counters`, int (6, L). future: next use of each request; known: uses of each key."""
    E = len(known) // counters.shape[1]
    state = np.zeros((9, len(known)), np.int64)
    state[COUNT] = known
    pools = np.zeros((len(capacity), 7), np.int64)
    members = np.zeros((len(capacity), capacity.max()), np.int64)
    for c in range(len(starts) - 1):
        layer, p = site[c], min(site[c], len(capacity) - 1)
        missed = 0
        for i in range(starts[c], starts[c + 1]):
            key = keys[i]
            state[CALLED, key], state[DUE, key], state[MISSED, key] = c + 1, future[i], 1 - state[RESIDENT, key]
            missed += state[MISSED, key]
        free = capacity[p] - pools[p, SIZE]
        hits = starts[c + 1] - starts[c] - missed
        if is_prompt[c]:
            counters[PROMPT_HITS, layer] += hits
            counters[PROMPT_MISSES, layer] += missed
            counters[RESTORES, layer] += free == 0 and missed > 0
        else:
            counters[HITS, layer] += hits
            counters[MISSES, layer] += missed
            counters[EVICTIONS, layer] += max(missed - free, 0)
        admitted = min(missed, free) if is_prompt[c] else missed
        for i in range(starts[c], starts[c + 1]):
            if state[MISSED, keys[i]] and admitted > 0:
                admitted -= 1
                if pools[p, SIZE] == capacity[p]:
                    evict(code, c + 1, layer, E, state, pools[p], members[p])
                admit(code, keys[i], state, pools[p], members[p])
        for i in range(starts[c], starts[c + 1]):
            if state[RESIDENT, keys[i]] and not is_prompt[c]:
                touch(code, keys[i], layer, state, pools[p])


def evict(code: int, call: int, layer: int, E: int, state: np.ndarray, pool: np.ndarray, members: np.ndarray) -> None:
    """Take a victim's place from it: of those that this call did not ask for or else, in waves, of all."""
    arrive(layer, pool)
    at = choose(code, call, E, state, pool, members)
    if at < 0:
        at = choose(code, 0, E, state, pool, members)
    victim = members[at]
    if code == LFUDA:
        pool[AGE] = max(pool[AGE], state[COUNT, victim])
    state[RESIDENT, victim] = 0
    pool[REMOVED] += 1
    pool[SIZE] -= 1
    members[at] = members[pool[SIZE]]


def admit(code: int, key: int, state: np.ndarray, pool: np.ndarray, members: np.ndarray) -> None:
    """Make `key` a member of its pool, which has room."""
    members[pool[SIZE]] = key
    pool[SIZE] += 1
    pool[CLOCK] += 1
    pool[INSERTED] += 1
    state[RESIDENT, key], state[LAST, key], state[SERIAL, key] = 1, pool[CLOCK], pool[INSERTED]
    state[USED, key] = pool[PASSES]
    if code != STATIC:
        state[COUNT, key] = pool[AGE]
    state[SCORE, key] = settled(code, key, state)


def touch(code: int, key: int, layer: int, state: np.ndarray, pool: np.ndarray) -> None:
    """Note a use of a resident."""
    arrive(layer, pool)
    pool[CLOCK] += 1
    state[LAST, key], state[USED, key] = pool[CLOCK], pool[PASSES]
    if code != STATIC:
        state[COUNT, key] += 1
    state[SCORE, key] = settled(code, key, state)


def arrive(layer: int, pool: np.ndarray) -> None:
    """Note which layer is at work; a new pass when layers start over."""
    if layer < pool[SITE]:
        pool[PASSES] += 1
    pool[SITE] = layer


def settled(code: int, key: int, state: np.ndarray) -> int:
    """Score of a member until it is used again: the least leaves. LRU's is 0, as age decides among equals."""
    if code == FIFO:
        return state[SERIAL, key]
    if code == BELADY:
        return -state[DUE, key]
    return state[COUNT, key] if code in (LFU, LFUDA, STATIC) else 0


def choose(code: int, call: int, E: int, state: np.ndarray, pool: np.ndarray, members: np.ndarray) -> int:
    """Place of the member of least score that `call` did not ask for, the longest unused of equals; -1 if none."""
    best, least, oldest = -1, 0.0, 0
    for i in range(pool[SIZE]):
        key = members[i]
        if state[CALLED, key] == call:
            continue
        value = float(state[SCORE, key])
        if code == LFRU:
            value = state[COUNT, key] / (pool[CLOCK] - state[LAST, key] + 1)
        elif code == RANDOM:
            value = float(scramble(pool[REMOVED], state[SERIAL, key]))
        elif code == LEAST_STALE:
            value = 2.0 * (state[USED, key] == pool[PASSES]) + (key // E > pool[SITE])
        if best < 0 or value < least or (value == least and state[LAST, key] < oldest):
            best, least, oldest = i, value, state[LAST, key]
    return best


def next_use_loop(
    keys: np.ndarray, starts: np.ndarray, is_prompt: np.ndarray, upcoming: np.ndarray, future: np.ndarray
) -> None:
    """For each request, the call of decoding that asks for its key next, into `future`; backwards, from NEVER."""
    for c in range(len(starts) - 2, -1, -1):
        for i in range(starts[c], starts[c + 1]):
            future[i] = upcoming[keys[i]]
            if not is_prompt[c]:
                upcoming[keys[i]] = c
