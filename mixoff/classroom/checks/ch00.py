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
    )
)

# (experts used, number of slots) -> hits of a least-recently-used cache
lru_hits = Check(
    (
        (([], 2), 0),
        (([1, 1, 1], 1), 2),
        (([1, 2, 1, 2], 1), 0),
        (([1, 2, 1, 2], 2), 2),
        (([1, 2, 1, 3, 1, 2], 2), 2),
        (([0, 1, 2, 0, 1, 2], 2), 0),
    )
)

# (experts used per token, bytes of one expert, hit rate, bytes/s of the link) -> seconds of copies per token
copy_s_per_token = Check(
    (
        ((64, 66_406_180, 0.0, 12e9), 64 * 66_406_180 / 12e9),
        ((64, 66_406_180, 0.6, 12e9), 64 * 66_406_180 * 0.4 / 12e9),
        ((64, 66_406_180, 1.0, 12e9), 0.0),
        ((16, 221_184, 0.5, 1e9), 16 * 221_184 * 0.5 / 1e9),
    )
)
