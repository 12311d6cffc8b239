"""Exercises of notebooks/08_cache_policies.ipynb."""

from mixoff.classroom.checks.ch00 import lru
from mixoff.classroom.checks.machinery import Check

# (residents, future requests) -> the expert that Belady's policy evicts
belady_victim = Check(
    (
        (([1, 2], [2, 1]), 1),
        (([1, 2, 3], [3, 1, 2, 3]), 2),
        (([1, 2, 3], [2, 3]), 1),
        (([4, 5, 6], []), 4),
        (([4, 5, 6], [4, 9, 4, 5]), 6),
        (([7, 8, 9], [8]), 7),
    ),
    slips={
        "This is the expert needed first: Belady's rule wants the one needed last.": lambda here, future: min(
            here, key=(*future, *here).index
        )
    },
)

# (experts used, slots) -> misses of a first-in first-out cache
fifo_misses = Check(
    (
        (([], 2), 0),
        (([1, 1, 2, 1], 2), 2),
        (([1, 2, 1, 3, 1], 2), 4),
        (([1, 2, 3, 4, 1, 2, 5, 1, 2, 3, 4, 5], 3), 9),
        (([1, 2, 3, 4, 1, 2, 5, 1, 2, 3, 4, 5], 4), 10),
    ),
    slips={"This is LRU: in FIFO a hit changes nothing.": lambda wanted, slots: len(wanted) - lru(wanted, slots)},
)

# (misses, misses of LRU, misses of the optimum) -> share of the gap that is closed
gap_closed = Check(
    (((100, 100, 60), 0.0), ((60, 100, 60), 1.0), ((90, 100, 60), 0.25), ((110, 100, 60), -0.25)),
    slips={"This is the share that is left: 1 minus it.": lambda m, lru, best: (m - best) / (lru - best)},
)

# (requests since the last use, uses so far, of each candidate) -> whether a candidate is named
victim = Check(
    (
        (({1: 4, 2: 1}, {1: 9, 2: 1}), True),
        (({5: 0}, {5: 1}), True),
        (({0: 3, 3: 3, 7: 3}, {0: 2, 3: 2, 7: 2}), True),
    ),
    lambda victim, ages, uses: victim(ages, uses) in ages,
)
