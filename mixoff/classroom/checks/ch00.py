"""Exercises of notebooks/00_start_here.ipynb."""

from mixoff.classroom.checks.machinery import Check

# (budget in bytes, bytes of one expert, MoE layers, experts per layer) -> experts per layer that fit
slots_per_layer = Check(
    (
        ((6_000_000, 221_184, 8, 8), 3),
        ((221_184 * 8, 221_184, 8, 8), 1),
        ((221_184 * 8 - 1, 221_184, 8, 8), 0),
        ((10**9, 221_184, 8, 8), 8),
        ((12 * 2**30, 66_406_180, 32, 8), 6),
    ),
    slips={"A layer has only so many experts: take the smaller number.": lambda budget, n, L, E: budget // n // L},
)


def lru(wanted: list, slots: int, renew: bool = True) -> int:
    """Hits of a cache that evicts the expert unused for longest, or with `renew=False` the one that came first."""
    held: list = []
    hits = 0
    for expert in wanted:
        hits += expert in held
        if renew or expert not in held:
            held = [*(e for e in held if e != expert), expert][-slots:]
    return hits


def first_in_first_out(wanted: list, slots: int) -> int:
    """Hits of FIFO."""
    return lru(wanted, slots, renew=False)


# (experts used, number of slots) -> hits of a least-recently-used cache
lru_hits = Check(
    (
        (([], 2), 0),
        (([1, 1, 1], 1), 2),
        (([1, 2, 1, 2], 1), 0),
        (([1, 2, 1, 2], 2), 2),
        (([1, 2, 1, 3, 1, 2], 2), 2),
        (([0, 1, 2, 0, 1, 2], 2), 0),
    ),
    slips={
        "This is FIFO: a hit must renew the expert's age.": first_in_first_out,
        "These are misses: hits are the rest.": lambda wanted, slots: len(wanted) - lru(wanted, slots),
    },
)

# (experts used per token, bytes of one expert, hit rate, bytes/s of the link) -> seconds of copies per token
copy_s_per_token = Check(
    (
        ((64, 66_406_180, 0.0, 12e9), 64 * 66_406_180 / 12e9),
        ((64, 66_406_180, 0.6, 12e9), 64 * 66_406_180 * 0.4 / 12e9),
        ((64, 66_406_180, 1.0, 12e9), 0.0),
        ((16, 221_184, 0.5, 1e9), 16 * 221_184 * 0.5 / 1e9),
    ),
    slips={"Hits are not copied, misses are.": lambda n, nbytes, hit_rate, Bps: n * nbytes * hit_rate / Bps},
)
