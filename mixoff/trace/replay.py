"""The rules of `cache.ExpertCache`, the policies and the prefetcher again, on arrays, so that they compile.

Letters: **L** MoE layers, **E** experts per layer, **R** requests, **M** guesses per call, **F** forecasts.
Keys are `layer * E + expert`. A call first looks up residents, then fetches guesses outside the cache. Then each miss
takes a free slot, or that of a victim outside the call; recency follows router order. Every loop runs in plain Python
too, with equal results. Tested against the cache, the policies and the runtime themselves.
"""

from __future__ import annotations

import numpy as np

from mixoff.cache.policies import FADES, MASK, TRUST, scramble
from mixoff.jit import compiled
from mixoff.trace.requests import Requests

LRU, FIFO, LFU, LFUDA, LFRU, RANDOM, LEAST_STALE, STATIC, BELADY, HALF_LIFE = range(10)
CODES = {"lru": LRU, "fifo": FIFO, "lfu": LFU, "lfuda": LFUDA, "lfru": LFRU, "random": RANDOM}
CODES |= {"least-stale": LEAST_STALE, "half-life": HALF_LIFE, "static": STATIC, "belady": BELADY}
NEVER = 2**62  # next use of a key that is not used again
NONE, NAMED, POPULAR = range(3)  # source of guesses: none, a list, or the most requested experts so far
COUNTERS = ("hits", "misses", "evictions", "prompt_hits", "prompt_misses", "restores")  # the cache's, int (L,) each
OF_GUESSES = ("prefetches", "prefetch_hits", "predictions", "predictions_right")  # counters of `prefetch.Guesses`


def replay(
    requests: Requests, L: int, E: int, capacity: np.ndarray, code: int, guesses: int, spare: int, named: np.ndarray
) -> np.ndarray:
    """COUNTERS and OF_GUESSES of each layer, int (10, L), after all requests went through pools of `capacity` slots.

    code: policy, one of CODES
    guesses: NONE, NAMED (keys in `named`, int (calls, M), -1 for none) or POPULAR
    spare: guesses that are fetched per call, at most
    """
    R, counters = requests.keys.size, np.zeros((len(COUNTERS + OF_GUESSES), L), np.int64)
    future, known = np.zeros(R, np.int64), np.zeros(L * E, np.int64)
    if code == BELADY:
        compiled(next_use_loop, R)(requests.keys, requests.starts, requests.is_prompt, known + NEVER, future)
    if code == STATIC:
        decoded = np.repeat(~requests.is_prompt, np.diff(requests.starts))
        known = np.bincount(requests.keys[decoded], minlength=L * E)
    scores = np.zeros((0, E), np.float32) if requests.scores is None else requests.scores
    steps = R * (E * len(FADES) // 4 if code == HALF_LIFE else 1)  # numba pays earlier if a request is more work
    run = compiled(
        replay_loop, steps, (scramble, settled, arrive, touch, choose, admit, evict, forecast, guess, popular)
    )
    run(
        requests.keys, requests.starts, requests.site, requests.is_prompt, capacity, code, future, known,
        np.array(FADES), scores, guesses, spare, named, counters,
    )  # fmt: skip
    return counters


def with_recall(requests: Requests, L: int, E: int, recall: float) -> np.ndarray:
    """Guesses int (calls, M) that name each requested expert with chance `recall`, else a wrong one."""
    most = int(np.diff(requests.starts).max(initial=1))
    named = np.full((len(requests.site), min(most, E)), -1, np.int64)
    run = compiled(recall_loop, requests.keys.size, (scramble,))
    run(requests.keys, requests.starts, requests.site, E, int(recall * (MASK + 1)), np.zeros(L * E, np.int64), named)
    return named


def recall_loop(
    keys: np.ndarray, starts: np.ndarray, site: np.ndarray, E: int, below: int, called: np.ndarray, named: np.ndarray
) -> None:
    """Fill `named`; draws come from `scramble`, so they are the same on every machine."""
    for c in range(len(starts) - 1):
        for i in range(starts[c], starts[c + 1]):
            called[keys[i]] = c + 1
        for i in range(starts[c], starts[c + 1]):
            key, tries = keys[i], 0
            if scramble(c, i) >= below:
                key = site[c] * E + scramble(i, c) % E
                while called[key] == c + 1 and tries < E:
                    key, tries = site[c] * E + (key + 1) % E, tries + 1
                called[key] = c + 1  # no expert is named twice
            named[c, i - starts[c]] = key


# rows of the state of each key, and of each pool; HITS to RIGHT are the rows of `counters`
COUNT, LAST, SERIAL, USED, DUE, RESIDENT, CALLED, MISSED, SCORE, GUESSED, ASKED = range(11)
SIZE, CLOCK, INSERTED, REMOVED, AGE, PASSES, SITE = range(7)
HITS, MISSES, EVICTIONS, PROMPT_HITS, PROMPT_MISSES, RESTORES, FETCHED, TAKEN, NAMES, RIGHT = range(10)


def replay_loop(
    keys: np.ndarray,
    starts: np.ndarray,
    site: np.ndarray,
    is_prompt: np.ndarray,
    capacity: np.ndarray,
    code: int,
    future: np.ndarray,
    known: np.ndarray,
    fades: np.ndarray,
    scores: np.ndarray,
    guesses: int,
    spare: int,
    named: np.ndarray,
    counters: np.ndarray,
) -> None:
    """Run all calls, adding to `counters`, int (10, L). future: next use of each request; known: uses of each key."""
    L = counters.shape[1]
    E = len(known) // L
    state = np.zeros((11, len(known)), np.int64)
    F = len(fades) * (2 if len(scores) else 1)
    rates, error = np.zeros((F, len(known))), np.zeros((F, L))  # of HALF_LIFE
    chance = np.zeros(len(known))
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
        if not is_prompt[c] and guesses != NONE and layer > 0:  # no guess is possible before the first router
            guess(c, layer, E, guesses, spare, named, state, counters)
        if not is_prompt[c] and code == HALF_LIFE:
            forecast(c, layer, E, fades, scores, rates, error, state, chance)
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
                    evict(code, c + 1, layer, E, state, pools[p], members[p], chance)
                admit(code, keys[i], state, pools[p], members[p])
        for i in range(starts[c], starts[c + 1]):
            if not is_prompt[c]:
                counters[TAKEN, layer] += state[MISSED, keys[i]] and state[GUESSED, keys[i]] == c + 1
                state[ASKED, keys[i]] += 1
                if state[RESIDENT, keys[i]]:
                    touch(code, keys[i], layer, state, pools[p])


def guess(
    c: int, layer: int, E: int, guesses: int, spare: int, named: np.ndarray, state: np.ndarray, counters: np.ndarray
) -> None:
    """Fetch at most `spare` guesses for call `c` outside the cache, best first, unless they are resident."""
    for i in range(named.shape[1] if guesses == NAMED else spare):
        key = named[c, i] if guesses == NAMED else popular(c, layer, E, state)
        if key < 0:
            continue
        counters[NAMES, layer] += 1
        counters[RIGHT, layer] += state[CALLED, key] == c + 1
        if spare > 0 and not state[RESIDENT, key]:
            spare -= 1
            state[GUESSED, key] = c + 1
            counters[FETCHED, layer] += 1


def popular(c: int, layer: int, E: int, state: np.ndarray) -> int:
    """The most requested expert of decoding so far that is neither resident nor guessed; -1 if none."""
    best = -1
    for key in range(layer * E, layer * E + E):
        known = state[ASKED, key] > (state[ASKED, best] if best >= 0 else 0)
        if known and not state[RESIDENT, key] and state[GUESSED, key] != c + 1:
            best = key
    return best


def forecast(
    c: int,
    layer: int,
    E: int,
    fades: np.ndarray,
    scores: np.ndarray,
    rates: np.ndarray,
    error: np.ndarray,
    state: np.ndarray,
    chance: np.ndarray,
) -> None:
    """`half-life`: judge the layer's forecasts by this call, update them, and put the best into `chance`.

    rates: (F, keys), forecasts from scores after those from requests, as in `policies.HalfLife`
    error: (F, L)
    """
    best, first = 0, layer * E
    for f in range(len(rates)):
        fade, wrong = fades[f % len(fades)], 0.0
        for e in range(E):
            asked = 1.0 if state[CALLED, first + e] == c + 1 else 0.0
            off = rates[f, first + e] - asked
            wrong += off * off
            seen = asked if f < len(fades) else np.float64(scores[c, e])
            rates[f, first + e] = rates[f, first + e] * fade + (1 - fade) * seen
        error[f, layer] = error[f, layer] * TRUST + wrong
        if error[f, layer] < error[best, layer]:
            best = f
    for key in range(first, first + E):
        chance[key] = rates[best, key]


def evict(
    code: int,
    call: int,
    layer: int,
    E: int,
    state: np.ndarray,
    pool: np.ndarray,
    members: np.ndarray,
    chance: np.ndarray,
) -> None:
    """Evict a member that this call did not ask for or, if there is none (waves), any member."""
    arrive(layer, pool)
    at = choose(code, call, E, state, pool, members, chance)
    if at < 0:
        at = choose(code, 0, E, state, pool, members, chance)
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
    """Note which layer calls; a new pass begins when layer numbers start again."""
    if layer < pool[SITE]:
        pool[PASSES] += 1
    pool[SITE] = layer


def settled(code: int, key: int, state: np.ndarray) -> int:
    """Score of a member until its next use; the lowest is evicted. LRU's is 0: age decides among equals."""
    if code == FIFO:
        return state[SERIAL, key]
    if code == BELADY:
        return -state[DUE, key]
    return state[COUNT, key] if code in (LFU, LFUDA, STATIC) else 0


def choose(
    code: int, call: int, E: int, state: np.ndarray, pool: np.ndarray, members: np.ndarray, chance: np.ndarray
) -> int:
    """Index of the lowest-scored member that `call` did not ask for, oldest use first; -1 if none."""
    best, least, oldest = -1, 0.0, 0
    for i in range(pool[SIZE]):
        key = members[i]
        if state[CALLED, key] == call:
            continue
        value = float(state[SCORE, key])
        if code == LFRU:
            value = state[COUNT, key] / (pool[CLOCK] - state[LAST, key] + 1)
        elif code == HALF_LIFE:
            value = chance[key]
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
    """Put into `future` the decoding call that asks for each request's key next, going backwards from NEVER."""
    for c in range(len(starts) - 2, -1, -1):
        for i in range(starts[c], starts[c + 1]):
            future[i] = upcoming[keys[i]]
            if not is_prompt[c]:
                upcoming[keys[i]] = c
