"""Exercises of notebooks/06_offloading.ipynb."""

from __future__ import annotations

import io
from collections.abc import Callable

from mixoff.classroom.checks.machinery import Check

EXPERTS_FILE = bytes(range(1, 4)) + bytes(5) + bytes(range(4, 7)) + bytes(5) + bytes([7])  # 3 bytes each, a stride of 8


def read_all(read_expert: Callable, e: int) -> object:
    """What the learner's `read_expert` returns for EXPERTS_FILE, as a list; "EOFError" if it raises that."""
    try:
        return list(read_expert(io.BytesIO(EXPERTS_FILE), e, 8, 3))
    except EOFError:
        return "EOFError"


read_expert = Check((((0,), [1, 2, 3]), ((1,), [4, 5, 6]), ((2,), "EOFError")), read_all)


def log_of(make_cache: Callable, slots: int, keys: list) -> dict:
    """What a cache of `slots` slots returns for `keys`, and which of them it fetches."""
    fetched: list = []

    def fetch(key: object) -> str:
        fetched.append(key)
        return f"weights of {key}"

    get = make_cache(slots, fetch)
    right = all(get(key) == f"weights of {key}" for key in keys)
    return {"fetched": fetched, "each get returned its weights": right}


make_cache = Check(
    (
        ((2, ["a", "a"]), {"fetched": ["a"], "each get returned its weights": True}),
        ((2, ["a", "b", "a", "b"]), {"fetched": ["a", "b"], "each get returned its weights": True}),
        ((2, ["a", "b", "c", "a"]), {"fetched": ["a", "b", "c", "a"], "each get returned its weights": True}),
        ((2, ["a", "b", "a", "c", "a", "b"]), {"fetched": ["a", "b", "c", "b"], "each get returned its weights": True}),
        ((1, ["a", "b", "b", "a"]), {"fetched": ["a", "b", "a"], "each get returned its weights": True}),
    ),
    log_of,
)

# (layers, experts per token, bytes of an expert, hit rate, write back?) -> bytes over the link, per token
bytes_per_token = Check(
    (
        ((32, 2, 66_406_180, 0.6, False), 64 * 0.4 * 66_406_180),
        ((32, 2, 66_406_180, 0.6, True), 128 * 0.4 * 66_406_180),
        ((8, 2, 100, 1.0, True), 0.0),
        ((8, 1, 100, 0.0, False), 800),
    )
)
