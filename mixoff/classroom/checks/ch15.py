"""Exercises of notebooks/15_mixtral_on_a_t4.ipynb."""

from mixoff.classroom.checks.machinery import Check

# (bytes of VRAM, of RAM, of an expert, layers, experts per layer) -> experts in VRAM, in RAM, on disk
tiers = Check(
    (
        ((13_112_374_272, 10_194_693_632, 66_404_420, 32, 8), (192, 64, 0)),
        ((100, 45, 10, 4, 4), (8, 4, 4)),
        ((39, 1000, 10, 4, 4), (0, 16, 0)),
        ((1000, 1000, 10, 4, 4), (16, 0, 0)),
        ((85, 0, 10, 4, 4), (8, 0, 8)),
    )
)

# (tokens of each turn, question first; room) -> number of latest turns that are sent
recent = Check(
    (
        (([5], 10), 1),
        (([5, 20, 5], 30), 3),
        (([5, 20, 5], 29), 1),
        (([3, 9, 3, 4, 3], 12), 3),
        (([3, 2, 3, 2, 30], 12), 1),
    )
)

# (active parameters, bytes touched, bytes moved, operations/s, bytes/s of memory, of the link) -> limit, ms per token
what_binds = Check(
    (
        ((12.9e9, 5.2e9, 0.78e9, 8.1e12, 320e9, 12e9), ("link", 65.0)),
        ((12.9e9, 4.2e9, 0.0, 8.1e12, 320e9, 12e9), ("memory", 13.125)),
        ((10e9, 1e9, 0.0, 1e12, 320e9, 12e9), ("compute", 20.0)),
    )
)
