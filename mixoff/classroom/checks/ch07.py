"""Exercises of notebooks/07_overlap_and_prefetch.ipynb."""

from __future__ import annotations

from collections.abc import Callable

from mixoff.classroom.checks.machinery import Check


def order_of(serve: Callable, experts: list, resident: set) -> list[str]:
    """The fetches, waits and computations of the learner's `serve`, in order."""
    done: list[str] = []

    def fetch(e: int) -> Callable:
        done.append(f"fetch {e}")
        return lambda: done.append(f"wait {e}")

    serve(experts, resident, fetch, lambda e: done.append(f"compute {e}"))
    return done


def waits_at_once(experts: list, resident: set, fetch: Callable, compute: Callable) -> None:
    """One expert after the other."""
    for e in experts:
        if e not in resident:
            fetch(e)()
        compute(e)


# (experts used, residents) -> the order of fetches, waits and computations
serve = Check(
    (
        (([1, 2], {1, 2}), ["compute 1", "compute 2"]),
        (([5], set()), ["fetch 5", "wait 5", "compute 5"]),
        (([3, 1], {1, 7}), ["fetch 3", "compute 1", "wait 3", "compute 3"]),
        (
            ([3, 1, 4, 0], {0, 1}),
            ["fetch 3", "fetch 4", "compute 1", "compute 0", "wait 3", "compute 3", "wait 4", "compute 4"],
        ),
    ),
    order_of,
    slips={"It waits at once: start every copy before you compute or wait.": waits_at_once},
)

# (misses, hits, seconds of a copy, seconds of an expert) -> seconds from the router's choice to the last expert
layer_s = Check(
    (
        ((0, 2, 1.0, 1.0), 2.0),
        ((1, 0, 3.0, 1.0), 4.0),
        ((1, 1, 3.0, 1.0), 4.0),
        ((1, 3, 2.0, 1.0), 4.0),
        ((2, 1, 2.0, 3.0), 9.0),
        ((3, 0, 1.0, 0.5), 3.5),
    ),
    slips={
        "This is one after the other: copies run while residents are computed.": lambda misses, hits, copy, compute: (
            misses * copy + (misses + hits) * compute
        ),
        "Copies run one after the other too: number i lands at i * copy_s.": lambda misses, hits, copy, compute: (
            max(hits * compute, copy * (misses > 0)) + misses * compute
        ),
    },
)

# (share of right guesses, seconds of a copy, seconds that hide it) -> seconds that one guess saves
guess_gain = Check(
    (
        ((1.0, 2.0, 3.0), 2.0),
        ((0.5, 2.0, 3.0), 1.0),
        ((1.0, 4.0, 1.0), 1.0),
        ((0.0, 4.0, 1.0), -3.0),
        ((0.5, 4.0, 1.0), -1.0),
        ((0.75, 4.0, 1.0), 0.0),
    ),
    slips={
        "A wrong guess costs only what is left of its copy when the layer asks.": lambda p, copy, hide: (
            p * min(copy, hide) - (1 - p) * copy
        ),
        "A wrong guess costs something too: what is left of its copy.": lambda p, copy, hide: p * min(copy, hide),
        "A copy cannot save more than it takes, nor more than what hides it: the smaller of the two.": lambda p, c, h: (
            p * h - (1 - p) * max(0.0, c - h)
        ),
    },
)
