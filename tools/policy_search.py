#!/usr/bin/env python3
"""Print the attempts of docs/simulator.md: ways to say which resident is needed least, and the gap that each closes.

    python tools/policy_search.py

Letters: **T** tokens, **N** layers of all traces side by side, **E** experts, **K** experts a token, **H** half-lives.
An attempt is a function of a `Text` that returns `score(t)`, float (N, E), after token t was seen: of the residents
that token t does not need, those of least score leave. A bench for ideas: slots by layer, decoding only, no pools.
"""

import sys

import numpy as np

from policy_table import SHAPES, domains_of_tiny, table

HALF_LIVES = 2.0 ** np.arange(9)


class Text:
    """Traces as masks: asked (T, N, E), the router's weights, its scores (or None), and calls until the next use."""

    def __init__(self, traces):
        self.top_k = traces[0].top_k
        self.asked = np.concatenate([t._used() for t in traces], axis=1)
        self.scores = None if traces[0].scores is None else np.concatenate([t.scores for t in traces], 1).astype(float)
        self.order = np.concatenate([t.experts for t in traces], axis=1)  # (T, N, K)
        self.next_use = np.empty(self.asked.shape, int)
        upcoming = np.full(self.asked.shape[1:], 10**9)
        for t in reversed(range(len(self.asked))):
            self.next_use[t] = upcoming
            upcoming = np.where(self.asked[t], t, upcoming)


def hit_rate(text, attempt, slots):
    """Share of requests that find their expert, from an empty cache."""
    score, resident, hits = attempt(text), np.zeros(text.asked.shape[1:], bool), 0
    for t, asked in enumerate(text.asked):
        hits += (asked & resident).sum()
        value = np.where(asked, np.inf, np.where(resident, score(t), -np.inf))
        keep = np.argpartition(-value, slots - 1, axis=1)[:, :slots]
        kept = np.zeros_like(resident)
        np.put_along_axis(kept, keep, True, axis=1)
        resident = kept & (resident | asked)
    return hits / text.asked.sum()


def lru(text):
    """Time of the last use, later choices of a token last."""
    last, ranks = np.full(text.asked.shape[1:], -1.0), np.arange(text.top_k) / text.top_k

    def score(t):
        np.put_along_axis(last, text.order[t].astype(int), t + np.broadcast_to(ranks, text.order[t].shape), axis=1)
        return last

    return score


def lru_2(text):
    """Time of the use before the last (O'Neil et al., 1993)."""
    last, before = (np.full(text.asked.shape[1:], -1.0) for _ in range(2))

    def score(t):
        before[text.asked[t]] = last[text.asked[t]]
        last[text.asked[t]] = t
        return before + 1e-6 * last

    return score


def belady(text):
    """The future itself."""
    return lambda t: -text.next_use[t]


def decayed(seen, powers):
    """Sum over half-lives of `powers` times the decayed mean of `seen(t)`, float (N, E)."""

    def attempt(text):
        fades = 0.5 ** (1 / HALF_LIVES)[:, None, None]
        rates = np.zeros((len(HALF_LIVES), *text.asked.shape[1:]))

        def score(t):
            rates[:] = rates * fades + (1 - fades) * seen(text, t)
            return np.tensordot(powers, rates, 1)

        return score

    return attempt


def asked(text, t):
    """Requests count one each."""
    return text.asked[t].astype(float)


def liked(text, t):
    """The router's scores count, those of experts not chosen too."""
    return text.scores[t]


def ladder(seen):
    """Decayed means by all half-lives: a function of text that returns `rates(t)`, float (H, N, E)."""

    def rates_of(text):
        fades = 0.5 ** (1 / HALF_LIVES)[:, None, None]
        rates = np.zeros((len(HALF_LIVES), *text.asked.shape[1:]))

        def step(t):
            rates[:] = rates * fades + (1 - fades) * seen(text, t)
            return rates

        return step

    return rates_of


def by_brier(*sources):
    """The forecast with the least squared error lately, of all half-lives and sources: `half-life`."""

    def attempt(text):
        steps, lanes = [ladder(seen)(text) for seen in sources], np.arange(text.asked.shape[1])
        rates = np.zeros((len(sources) * len(HALF_LIVES), *text.asked.shape[1:]))
        error = np.zeros(rates.shape[:2])

        def score(t):
            error[:] = error * 0.99 + ((rates - text.asked[t]) ** 2).sum(2)
            rates[:] = np.concatenate([step(t) for step in steps])
            return rates[error.argmin(0), lanes]

        return score

    return attempt


def by_shadow(slots):
    """The half-life whose shadow cache of as many slots hit most lately (after LeCaR and ARC)."""

    def attempt(text):
        step, lanes = ladder(asked)(text), np.arange(text.asked.shape[1])
        inside = np.zeros((len(HALF_LIVES), *text.asked.shape[1:]), bool)
        record = np.zeros(inside.shape[:2])

        def score(t):
            record[:] = record * 0.995 + (inside & text.asked[t]).sum(2)
            rates = step(t)
            value = np.where(text.asked[t], np.inf, np.where(inside, rates, -np.inf))
            kept = np.zeros_like(inside)
            np.put_along_axis(kept, np.argpartition(-value, slots - 1, axis=2)[:, :, :slots], True, axis=2)
            inside[:] = kept & (inside | text.asked[t])
            return rates[record.argmax(0), lanes]

        return score

    return attempt


def only(calls):
    """Weight on one half-life."""
    return np.equal(HALF_LIVES, calls).astype(float)


def attempts(slots, scored):
    """Attempts by name; those that need scores where there are some."""
    found = {f"requests, half-life {h}": decayed(asked, only(h)) for h in (1, 4, 16, 64, 256)}
    found |= {f"requests, power law {a}": decayed(asked, HALF_LIVES**-a) for a in (-0.5, 0.25)}
    found |= {"LRU-2": lru_2, "half-life by shadow caches": by_shadow(slots), "half-life by Brier": by_brier(asked)}
    if scored:
        found |= {f"scores, half-life {h}": decayed(liked, only(h)) for h in (1, 4, 16)}
        found |= {"half-life by Brier, scores alone": by_brier(liked)}
        found |= {"half-life by Brier, requests and scores": by_brier(asked, liked)}
    return found


def shares(traces, slots):
    """Share of the gap from LRU to Belady that each attempt closes."""
    text = Text(traces)
    worst, best = hit_rate(text, lru, slots), hit_rate(text, belady, slots)
    found = attempts(slots, text.scores is not None)
    return {name: (hit_rate(text, attempt, slots) - worst) / (best - worst) for name, attempt in found.items()}


def main():
    """Print the table."""
    columns = {"tiny, held out, 4 slots": shares([*domains_of_tiny().values()], 4)}
    for name, (router, slots, seed) in SHAPES.items():
        columns[name] = shares([router.trace(600, layers=4, seed=seed, scores=True)], slots)
    names = dict.fromkeys(n for column in columns.values() for n in column)
    cells = [(n, [f"{100 * c[n]:.0f} %" if n in c else "" for c in columns.values()]) for n in names]
    print(table(["attempt", *columns], cells))
    return 0


if __name__ == "__main__":
    sys.exit(main())
