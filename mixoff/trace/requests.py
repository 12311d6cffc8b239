"""The requests of a trace as flat arrays, and stack distances over them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from mixoff.jit import compiled


@dataclass(frozen=True, eq=False)
class Requests:
    """Calls of MoE layers in the order in which a model makes them.

    Attributes
    ----------
    keys: int (R,), layer * E + expert; call c asks for `keys[starts[c]:starts[c + 1]]`
    starts: int (P * L + 1,)
    site: int (P * L,), index of the layer that calls
    is_prompt: bool (P * L,)
    named: int (P * L, M), keys that a predictor named before each call, -1 for none; or None
    scores: float32 (P * L, E), the router's scores; or None
    """

    keys: np.ndarray
    starts: np.ndarray
    site: np.ndarray
    is_prompt: np.ndarray
    named: np.ndarray | None = None
    scores: np.ndarray | None = None


def depths(requests: Requests, L: int, E: int, scope: str) -> np.ndarray:
    """Histogram of the depth of each request in its pool's list of keys by last use: int (L, keys per pool + 1).

    The last column counts first uses. scope: `layer` (one list per layer) or `global` (one list).
    Source: Mattson et al., Evaluation techniques for storage hierarchies (1970): one pass gives LRU for all sizes.
    A tree of sums (Fenwick, 1994) has a mark at each key's last use, after Bennett and Kruskal (1975).
    """
    pools, size = (L, E) if scope == "layer" else (1, L * E)
    histogram, room = np.zeros((L, size + 1), np.int64), 2 * size
    tree, owner = np.zeros((pools, room + 1), np.int64), np.full((pools, room), -1, np.int64)
    run = compiled(depths_loop, requests.keys.size, (marked, mark, renumber))
    run(requests.keys, requests.starts, requests.site, tree, owner, np.full(L * E, -1, np.int64), histogram)
    return histogram


def depths_loop(
    keys: np.ndarray,
    starts: np.ndarray,
    site: np.ndarray,
    tree: np.ndarray,
    owner: np.ndarray,
    used: np.ndarray,
    histogram: np.ndarray,
) -> None:
    """All depths of a call are looked up before any of its keys moves to the front, as a cache serves a token.

    used: time of each key's last use, -1 for never
    owner: key last used at each time of a pool, or -1
    """
    clock, held = np.zeros(len(tree), np.int64), np.zeros(len(tree), np.int64)
    for c in range(len(starts) - 1):
        p = min(site[c], len(tree) - 1)
        for i in range(starts[c], starts[c + 1]):
            when = used[keys[i]]
            histogram[site[c], histogram.shape[1] - 1 if when < 0 else held[p] - marked(tree[p], when)] += 1
        for i in range(starts[c], starts[c + 1]):
            key = keys[i]
            if clock[p] == owner.shape[1]:
                clock[p] = renumber(tree[p], owner[p], used)
            if used[key] >= 0:
                mark(tree[p], used[key], -1)
                owner[p, used[key]] = -1
            else:
                held[p] += 1
            used[key], owner[p, clock[p]] = clock[p], key
            mark(tree[p], clock[p], 1)
            clock[p] += 1


def marked(tree: np.ndarray, when: int) -> int:
    """Number of marks up to and including the time `when`."""
    total, i = 0, when + 1
    while i > 0:
        total += tree[i]
        i -= i & -i
    return total


def mark(tree: np.ndarray, when: int, by: int) -> None:
    """Set a mark at the time `when` (by = 1), or remove it (-1)."""
    i = when + 1
    while i < len(tree):
        tree[i] += by
        i += i & -i


def renumber(tree: np.ndarray, owner: np.ndarray, used: np.ndarray) -> int:
    """Renumber times from 0, in the same order; returns the first free one."""
    free = 0
    tree[:] = 0
    for when in range(len(owner)):
        key = owner[when]
        owner[when] = -1
        if key >= 0:
            owner[free], used[key] = key, free
            mark(tree, free, 1)
            free += 1
    return free
