"""Exercises of notebooks/10_roofline.ipynb."""

from mixoff.classroom.checks.machinery import Check

# (seconds of fixed work, pairs of bytes and bytes/s) -> seconds per token
token_s = Check(
    (
        ((0.5, []), 0.5),
        ((0.0, [(10, 5.0)]), 2.0),
        ((0.008, [(55e6, 11e9), (11e6, 11e9), (9e6, 4.5e9)]), 0.016),
    ),
    slips={
        "The fixed seconds belong to the sum.": lambda fixed_s, parts: sum(n / Bps for n, Bps in parts),
        "Times add up, bandwidths do not.": lambda fixed_s, parts: (
            fixed_s + sum(n for n, _ in parts) / (sum(Bps for _, Bps in parts) or 1)
        ),
    },
)

# (tokens/s, seconds without misses, bytes used, bytes/s of the link) -> hit rate, NaN if none is enough
hit_rate_for = Check(
    (
        ((1.0, 0.5, 100, 100.0), 0.5),
        ((1.0, 0.1, 50, 100.0), 0.0),
        ((2.0, 0.5, 50, 100.0), 1.0),
        ((4.0, 0.5, 50, 100.0), float("nan")),
        ((2.0, 0.1, 8_500_000_000, 12e9), 1 - 0.4 * 12 / 8.5),
    ),
    slips={
        "Where there is time to spare without any hit, the answer is 0, not less.": lambda speed, s, n, Bps: (
            float("nan") if 1 / speed < s else 1 - (1 / speed - s) * Bps / n
        ),
        "This is the share of misses that one can afford: the hit rate is the rest.": lambda speed, s, n, Bps: (
            (1 / speed - s) * Bps / n
        ),
    },
)

# (seconds by term, name of a term, factor) -> time before over time after
gain = Check(
    (
        (({"a": 1.0, "b": 1.0}, "a", 2), 4 / 3),
        (({"a": 3.0, "b": 1.0}, "a", 3), 2.0),
        (({"a": 1.0, "b": 0.0}, "b", 10), 1.0),
    ),
    slips={
        "The other terms stay as they are: this is Amdahl's law.": lambda terms, name, factor: factor,
        "By how much it gets faster is the time before over the time after.": lambda terms, name, factor: (
            (sum(terms.values()) - terms[name] * (1 - 1 / factor)) / sum(terms.values())
        ),
    },
)
