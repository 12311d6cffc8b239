"""Exercises of notebooks/06_offloading.ipynb."""

from __future__ import annotations

import io
import weakref
from collections.abc import Callable

from mixoff.classroom.checks.machinery import Check

EXPERTS_FILE = bytes(range(1, 4)) + bytes(5) + bytes(range(4, 7)) + bytes(5) + bytes([7])  # 3 bytes each, a stride of 8


def read_all(read_expert: Callable, e: int) -> object:
    """What the learner's `read_expert` returns for EXPERTS_FILE, as a list; "EOFError" if it raises that."""
    try:
        return list(read_expert(io.BytesIO(EXPERTS_FILE), e, 8, 3))
    except EOFError:
        return "EOFError"


def without_a_look(file: io.BytesIO, e: int, stride: int, nbytes: int) -> bytes:
    """What the file has, however little."""
    file.seek(e * stride)
    return file.read(nbytes)


read_expert = Check(
    (((0,), [1, 2, 3]), ((1,), [4, 5, 6]), ((2,), "EOFError")),
    read_all,
    slips={
        "A file that ends returns fewer bytes without an error: compare lengths.": without_a_look,
        "Expert e begins at e * stride: `file.seek` first.": lambda file, e, stride, nbytes: file.read(nbytes),
    },
)


class Weights:
    """What a fetch returns; one that nobody holds is gone."""

    def __init__(self, key: object):
        self.key = key


def log_of(make_cache: Callable, slots: int, keys: list) -> dict:
    """What a cache of `slots` slots returns for `keys`, which of them it fetches, and how many it holds at most."""
    fetched: list = []
    alive: weakref.WeakSet = weakref.WeakSet()
    most = 0

    def fetch(key: object) -> Weights:
        nonlocal most
        fetched.append(key)
        weights = Weights(key)
        alive.add(weights)
        most = max(most, len(alive))
        return weights

    get = make_cache(slots, fetch)
    right = all(get(key).key == key for key in keys)
    return {"fetched": fetched, "each get returned its weights": right, "within its slots": most <= slots}


def first_in_first_out(slots: int, fetch: Callable) -> Callable:
    """A cache whose hits do not renew a key's age."""
    held: dict = {}

    def get(key: object) -> object:
        if key not in held:
            if len(held) == slots:
                del held[next(iter(held))]
            held[key] = fetch(key)
        return held[key]

    return get


SOUND = {"each get returned its weights": True, "within its slots": True}

make_cache = Check(
    (
        ((2, ["a", "a"]), {"fetched": ["a"], **SOUND}),
        ((2, ["a", "b", "a", "b"]), {"fetched": ["a", "b"], **SOUND}),
        ((2, ["a", "b", "c", "a"]), {"fetched": ["a", "b", "c", "a"], **SOUND}),
        ((2, ["a", "b", "a", "c", "a", "b"]), {"fetched": ["a", "b", "c", "b"], **SOUND}),
        ((1, ["a", "b", "b", "a"]), {"fetched": ["a", "b", "a"], **SOUND}),
    ),
    log_of,
    slips={"This is FIFO: a hit must make the key the newest.": first_in_first_out},
)

# (layers, experts per token, bytes of an expert, hit rate, write back?) -> bytes over the link, per token
bytes_per_token = Check(
    (
        ((32, 2, 66_406_180, 0.6, False), 64 * 0.4 * 66_406_180),
        ((32, 2, 66_406_180, 0.6, True), 128 * 0.4 * 66_406_180),
        ((8, 2, 100, 1.0, True), 0.0),
        ((8, 1, 100, 0.0, False), 800),
    ),
    slips={"Hits move nothing: count misses.": lambda L, k, n, h, back: L * k * n * h * (2 if back else 1)},
)
