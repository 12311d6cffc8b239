"""Exercises of notebooks/14_engines.ipynb."""

from __future__ import annotations

from mixoff.classroom.checks.machinery import Check


def _counted_from_the_card(layers: int, n: int, backbone: float, experts: float) -> tuple[float, float]:
    share = min(n, layers) / layers
    return backbone + share * experts, (1 - share) * experts


# (layers, N, bytes of the backbone, bytes of all experts) -> bytes on the card, bytes in RAM
placed = Check(
    (
        ((32, 0, 1.5e9, 24e9), (25.5e9, 0.0)),
        ((32, 32, 1.5e9, 24e9), (1.5e9, 24e9)),
        ((32, 12, 1.5e9, 24e9), (16.5e9, 9e9)),
        ((48, 60, 1.0e9, 48e9), (1.0e9, 48e9)),
    ),
    slips={
        "`--n-cpu-moe N` counts the layers whose experts stay in RAM.": _counted_from_the_card,
        "N may exceed the number of layers.": lambda layers, n, backbone, experts: (
            backbone + (1 - n / layers) * experts,
            n / layers * experts,
        ),
        "The backbone is on the card too.": lambda layers, n, backbone, experts: (
            (1 - min(n, layers) / layers) * experts,
            min(n, layers) / layers * experts,
        ),
    },
)

# (hit rate, share of the experts on the card, bytes/s of the CPU, of the card) -> bytes/s of the link
break_even = Check(
    (
        ((0.5, 0.5, 50e9, float("inf")), 50e9),
        ((0.75, 0.5, 10e9, float("inf")), 5e9),
        ((1.0, 0.5, 50e9, 300e9), 0.0),
        ((0.6, 0.5, 50e9, 300e9), 48e9),
    ),
    slips={
        "The card computes what was copied, and that takes time too.": lambda hit, share, cpu, card: (
            (1 - hit) / (1 - share) * cpu
        ),
        "A cache misses with 1 - hit rate; only the fixed placement misses with 1 - share.": (
            lambda hit, share, cpu, card: 1 / (1 / cpu - 1 / card)
        ),
    },
)

# (ranks, layers, experts per token, width, bytes of a number) -> bytes that a rank sends per token
exchanged = Check(
    (
        ((1, 32, 2, 4096, 4), 0),
        ((2, 32, 2, 4096, 4), 1_048_576),
        ((4, 32, 2, 4096, 4), 1_572_864),
        ((2, 48, 8, 2048, 2), 1_572_864),
    ),
    slips={
        "Each rank sends its part twice, but keeps one part of `ranks`.": lambda ranks, layers, k, width, nbytes: (
            2 * layers * k * width * nbytes
        ),
        "Rows of all K experts are exchanged, not their sum.": lambda ranks, layers, k, width, nbytes: (
            2 * (ranks - 1) * layers * width * nbytes // ranks
        ),
    },
)
