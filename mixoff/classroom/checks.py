"""Checks of exercises: `check.name(fn)` runs the learner's function on a few cases and prints one line. Never raises.

    [ .. ] not attempted yet
    [ ok ] 6 cases
    [FAIL] case 2: shape (3, 8), expected (3, 2)

One check per exercise stands at the end of this file, with the cases it tries. Does not know how answers are found.
"""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from dataclasses import dataclass
from itertools import zip_longest

import numpy as np

REL_TOL = 1e-6  # answers are sums and quotients of a few exact numbers: double precision leaves room to spare
SHOWN = 60  # characters of a wrong answer


@dataclass(frozen=True)
class Check:
    """The cases of one exercise: pairs of arguments and the answer that is expected for them.

    ask: `ask(fn, *arguments)` gets the answer out of the learner's function, where calling it is not all.
    """

    cases: tuple[tuple[tuple, object], ...]
    ask: Callable = lambda fn, *arguments: fn(*arguments)

    def __call__(self, fn: Callable) -> None:
        """Prints how `fn` does; stops at the first case that is wrong."""
        print(self.verdict(fn))

    def verdict(self, fn: Callable) -> str:
        """The line to print."""
        if not callable(fn):
            return f"[FAIL] pass the function itself, not {describe(fn)}"
        for n, (arguments, expected) in enumerate(self.cases, start=1):
            try:
                answer = self.ask(fn, *copy.deepcopy(arguments))
                complaint = difference(answer, expected)
            except NotImplementedError:
                return "[ .. ] not attempted yet"
            except Exception as error:  # whatever the learner's code raises is an answer of a kind
                complaint = f"raised {type(error).__name__}: {error}"
            if complaint:
                return f"[FAIL] case {n}: {complaint}"
        return f"[ ok ] {len(self.cases)} cases"


def describe(value: object) -> str:
    """A value in at most SHOWN characters."""
    text = repr(value)
    return text if len(text) <= SHOWN else text[: SHOWN - 1] + "…"


def difference(answer: object, expected: object) -> str | None:
    """What is wrong with an answer, in words; None where it is right.

    >>> difference([1, 2], [1, 3])
    'position 1 is 2, expected 3'
    >>> difference(0.1 + 0.2, 0.3) is None
    True
    """
    if answer is None:
        return f"returned nothing, expected {describe(expected)}"
    if isinstance(expected, (str, bool, set)):
        return None if answer == expected else f"{describe(answer)}, expected {describe(expected)}"
    if isinstance(expected, dict):
        return dict_difference(answer, expected)
    if isinstance(expected, list) and any(isinstance(x, str) for x in expected):
        return words_difference(answer, expected)
    if isinstance(expected, tuple):
        return tuple_difference(answer, expected)
    return array_difference(np.asarray(answer), np.asarray(expected))


def tuple_difference(answer: object, expected: tuple) -> str | None:
    """The same for several answers at once, which are named by their place: first, second, third."""
    if not isinstance(answer, (tuple, list)) or len(answer) != len(expected):
        return f"{describe(answer)}, expected {len(expected)} things"
    for name, one, want in zip(("first", "second", "third"), answer, expected, strict=False):
        if complaint := difference(one, want):
            return f"{name} answer: {complaint}"
    return None


def dict_difference(answer: object, expected: dict) -> str | None:
    """The same for answers with names: the first name whose answer is wrong."""
    if not isinstance(answer, dict) or answer.keys() != expected.keys():
        return f"{describe(answer)}, expected {describe(expected)}"
    complaints = ((name, difference(answer[name], want)) for name, want in expected.items())
    return next((f"{name}: {complaint}" for name, complaint in complaints if complaint), None)


def words_difference(answer: object, expected: list) -> str | None:
    """The same for lists of words, the first place where they differ.

    >>> words_difference(["fetch 3"], ["fetch 3", "compute 3"])
    'position 1 is nothing, expected compute 3'
    """
    if not isinstance(answer, (list, tuple)):
        return f"{describe(answer)}, expected {describe(expected)}"
    pairs = enumerate(zip_longest(answer, expected, fillvalue="nothing"))
    return next((f"position {n} is {one}, expected {want}" for n, (one, want) in pairs if one != want), None)


def array_difference(answer: np.ndarray, expected: np.ndarray) -> str | None:
    """The same for numbers, lists of numbers and arrays: shape first, then the first value that differs."""
    if answer.shape != expected.shape:
        return f"shape {answer.shape}, expected {expected.shape}"
    if not np.issubdtype(answer.dtype, np.number):
        return f"{describe(answer.tolist())} is not a number, expected {describe(expected.tolist())}"
    wrong = np.argwhere(~np.isclose(answer, expected, rtol=REL_TOL, atol=0, equal_nan=True))
    if not len(wrong):
        return None
    where = tuple(int(i) for i in wrong[0])
    have, want = answer[where].item(), expected[where].item()
    if not where:
        return f"{have}, expected {want}"
    return f"position {where[0] if len(where) == 1 else where} is {have}, expected {want}"


# ---------------------------------------------------------------- chapter 00

# (budget in bytes, bytes of one expert, MoE layers, experts a layer) -> experts that fit, the same number in each layer
slots_per_layer = Check(
    (
        ((6_000_000, 221_184, 8, 8), 3),
        ((221_184 * 8, 221_184, 8, 8), 1),
        ((221_184 * 8 - 1, 221_184, 8, 8), 0),
        ((10**9, 221_184, 8, 8), 8),
        ((12 * 2**30, 66_406_180, 32, 8), 6),
    )
)

# (experts asked for, number of slots) -> hits of a least-recently-used cache
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

# (experts asked for a token, bytes of one expert, hit rate, bytes/s of the link) -> seconds a token spent on copies
copy_s_per_token = Check(
    (
        ((64, 66_406_180, 0.0, 12e9), 64 * 66_406_180 / 12e9),
        ((64, 66_406_180, 0.6, 12e9), 64 * 66_406_180 * 0.4 / 12e9),
        ((64, 66_406_180, 1.0, 12e9), 0.0),
        ((16, 221_184, 0.5, 1e9), 16 * 221_184 * 0.5 / 1e9),
    )
)


# ---------------------------------------------------------------- chapter 01

# (scores (T, E), experts a token) -> experts, weights, both (T, k)
route = Check(
    (
        ((np.array([[0.0, 2.0, 1.0, -1.0]]), 1), ([[1]], [[1.0]])),
        ((np.log([[1.0, 3.0, 2.0]]), 2), ([[1, 2]], [[0.6, 0.4]])),
        ((np.log([[6.0, 1.0, 3.0], [1.0, 0.5, 4.0]]), 2), ([[0, 2], [2, 0]], [[2 / 3, 1 / 3], [0.8, 0.2]])),
        ((1000 + np.log([[4.0, 1.0]]), 2), ([[0, 1]], [[0.8, 0.2]])),
    )
)


def scale_by(e: int, rows: np.ndarray) -> np.ndarray:
    """An expert for tests: multiplies by its number plus one."""
    return (e + 1) * rows


# (x (T, D), experts (T, K), weights (T, K), expert_fn) -> (T, D)
moe_layer = Check(
    (
        ((np.ones((1, 3)), np.array([[0, 1]]), np.array([[0.5, 0.5]]), scale_by), [[1.5, 1.5, 1.5]]),
        ((np.array([[1.0], [2.0]]), np.array([[3], [3]]), np.ones((2, 1)), scale_by), [[4.0], [8.0]]),
        (
            (np.array([[1.0], [2.0]]), np.array([[0, 7], [7, 2]]), np.array([[0.75, 0.25], [0.5, 0.5]]), scale_by),
            [[2.75], [11.0]],
        ),
    )
)

# choices of one layer (T, K) -> share of tokens that repeat an expert of the token before
repeat_rate = Check(
    (
        (([[0, 1], [1, 2]],), 1.0),
        (([[0, 1], [2, 3], [3, 2]],), 0.5),
        (([[0, 1], [2, 3], [4, 5], [0, 4], [1, 2]],), 0.25),
    )
)


# ---------------------------------------------------------------- chapter 03

# (weights (G,), bits) -> codes (G,), scale, minimum
quantize_group = Check(
    (
        ((np.array([0.0, 1.0, 2.0, 3.0]), 2), ([0, 1, 2, 3], 1.0, 0.0)),
        ((np.array([-1.0, 0.45, 0.6, 2.0]), 2), ([0, 1, 2, 3], 1.0, -1.0)),
        ((np.array([0.5, -0.25, 0.1]), 4), ([15, 0, 7], 0.05, -0.25)),
        ((np.array([0.7, 0.7]), 2), ([0, 0], 1.0, 0.7)),
    )
)

# (codes (n,), bits) -> bytes, the first code in the lowest bits
pack = Check(
    (
        ((np.array([1, 0, 0, 0]), 2), [1]),
        ((np.array([0, 1, 2, 3]), 2), [228]),
        ((np.array([3, 3, 3, 3, 0, 0, 0, 2]), 2), [255, 128]),
        ((np.array([15, 1, 4, 10]), 4), [31, 164]),
    )
)

# (bytes, bits) -> codes
unpack = Check(
    (
        ((np.array([228], np.uint8), 2), [0, 1, 2, 3]),
        ((np.array([255, 128], np.uint8), 2), [3, 3, 3, 3, 0, 0, 0, 2]),
        ((np.array([31, 164], np.uint8), 4), [15, 1, 4, 10]),
    )
)

# (bits, group size, bits of metadata) -> bits that a weight costs
bits_per_weight = Check(
    (
        ((2, 16, 16), 4.0),
        ((4, 64, 16), 4.5),
        ((2, 16, 8), 2 + 1 + 0.03125),
        ((4, 64, 8), 4 + 0.25 + 0.0078125),
    )
)


# ---------------------------------------------------------------- chapter 04

# (beta, p) -> size of the error that HQQ's shrinkage sets to zero at the latest
threshold = Check((((10.0, 0.7), 10 ** (-1 / 1.3)), ((4.0, 0.0), 0.5), ((2.0, 1.0), 0.5)))

# (weights (G,), codes (G,), scale) -> zero
best_zero = Check(
    (
        ((np.array([0.0, 1.0]), np.array([1, 2]), 1.0), 1.0),
        ((np.array([-1.0, 0.5, 2.0]), np.array([0, 1, 3]), 1.0), 5 / 6),
        ((np.array([0.1, 0.3]), np.array([1, 4]), 0.1), 0.5),
        ((np.array([-0.04, 0.02]), np.array([0, 3]), 0.02), 2.0),
    )
)

# (original (N, K), restored (N, K)) -> restored, each row stretched to unit gain
unit_gain = Check(
    (
        ((np.array([[1.0, 1.0]]), np.array([[0.5, 0.5]])), [[1.0, 1.0]]),
        ((np.array([[1.0, 2.0], [3.0, 0.0]]), np.array([[1.0, 1.0], [2.0, 1.0]])), [[5 / 3, 5 / 3], [3.0, 1.5]]),
    )
)


# ---------------------------------------------------------------- chapter 08

# (residents, requests to come) -> whom Belady's policy gives up
belady_victim = Check(
    (
        (([1, 2], [2, 1]), 1),
        (([1, 2, 3], [3, 1, 2, 3]), 2),
        (([1, 2, 3], [2, 3]), 1),
        (([4, 5, 6], []), 4),
        (([4, 5, 6], [4, 9, 4, 5]), 6),
    )
)

# (experts asked for, slots) -> misses of a first-in first-out cache
fifo_misses = Check(
    (
        (([], 2), 0),
        (([1, 1, 2, 1], 2), 2),
        (([1, 2, 1, 3, 1], 2), 4),
        (([1, 2, 3, 4, 1, 2, 5, 1, 2, 3, 4, 5], 3), 9),
        (([1, 2, 3, 4, 1, 2, 5, 1, 2, 3, 4, 5], 4), 10),
    )
)

# (misses, misses of LRU, misses of the optimum) -> share of the gap that was closed
gap_closed = Check((((100, 100, 60), 0.0), ((60, 100, 60), 1.0), ((90, 100, 60), 0.25), ((110, 100, 60), -0.25)))


# ---------------------------------------------------------------- chapter 09

# kinds of events -> hits over requests
hit_rate = Check(
    (
        ((["hit", "miss"],), 0.5),
        ((["miss", "evict", "miss", "prefetch", "hit", "hit"],), 0.5),
        ((["hit"],), 1.0),
        ((["miss", "evict", "miss"],), 0.0),
    )
)

# (kind, expert) of one layer -> residents at the end
residents = Check(
    (
        (([],), set()),
        (([("miss", 1), ("miss", 2), ("hit", 1)],), {1, 2}),
        (([("miss", 1), ("miss", 2), ("evict", 1), ("miss", 3)],), {2, 3}),
        (([("miss", 1), ("prefetch", 4), ("evict", 1), ("miss", 1)],), {1, 4}),
    )
)

# (token, kind, expert) of one layer -> tokens that each evicted expert stayed
stays = Check(
    (
        (([(1, "miss", 0), (2, "hit", 0)],), []),
        (([(1, "miss", 0), (4, "evict", 0), (4, "miss", 2)],), [3]),
        (
            ([(1, "miss", 0), (1, "miss", 1), (2, "evict", 1), (5, "miss", 1), (9, "evict", 0), (9, "evict", 1)],),
            [1, 8, 4],
        ),
    )
)


# ---------------------------------------------------------------- chapter 06

EXPERTS_FILE = bytes(range(1, 4)) + bytes(5) + bytes(range(4, 7)) + bytes(5) + bytes([7])  # 3 bytes each, a stride of 8


def read_all(read_expert: Callable, e: int) -> object:
    """What the learner's `read_expert` returns of EXPERTS_FILE, as a list; whether it notices that the file ends."""
    try:
        return list(read_expert(io.BytesIO(EXPERTS_FILE), e, 8, 3))
    except EOFError:
        return "EOFError"


read_expert = Check((((0,), [1, 2, 3]), ((1,), [4, 5, 6]), ((2,), "EOFError")), read_all)


def log_of(make_cache: Callable, slots: int, keys: list) -> dict:
    """What a cache with `slots` slots returns for `keys`, and which of them it fetches."""
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

# (layers, experts a token, bytes of an expert, hit rate, write back?) -> bytes over the link
bytes_per_token = Check(
    (
        ((32, 2, 66_406_180, 0.6, False), 64 * 0.4 * 66_406_180),
        ((32, 2, 66_406_180, 0.6, True), 128 * 0.4 * 66_406_180),
        ((8, 2, 100, 1.0, True), 0.0),
        ((8, 1, 100, 0.0, False), 800),
    )
)


# ---------------------------------------------------------------- chapter 05

# (log-probabilities (T, V), row t for the token after t; tokens (T,)) -> perplexity
perplexity = Check(
    (
        ((np.log([[0.5, 0.5], [0.5, 0.5]]), np.array([0, 1])), 2.0),
        ((np.log([[0.25, 0.75], [0.9, 0.1], [0.5, 0.5]]), np.array([0, 1, 1])), (0.75 * 0.1) ** -0.5),
        ((np.log(np.full((5, 4), 0.25)), np.array([3, 1, 0, 2, 2])), 4.0),
        ((np.log([[0.2, 0.8], [0.6, 0.4], [0.3, 0.7], [0.9, 0.1]]), np.array([0, 0, 1, 0])), 0.024 ** (-1 / 3)),
    )
)

# (losses of a (W,), losses of b (W,)) -> mean of b - a, its standard error
paired = Check(
    (
        ((np.array([1.0, 2.0]), np.array([2.0, 3.0])), (1.0, 0.0)),
        ((np.array([1.0, 5.0, 3.0]), np.array([1.0, 6.0, 5.0])), (1.0, 3**-0.5)),
        ((np.array([2.0, 2.0, 2.0, 2.0]), np.array([1.0, 2.0, 1.0, 2.0])), (-0.5, 12**-0.5)),
    )
)

# (sizes, losses) -> indices of the points that no other beats
worth_having = Check(
    (
        (([1, 2], [5, 3]), [0, 1]),
        (([1, 2, 2], [5, 3, 4]), [0, 1]),
        (([3, 1, 2], [1, 4, 4]), [0, 1]),
        (([5, 4, 3, 3], [0, 2, 3, 1]), [0, 3]),
        (([2, 2], [7, 7]), [0, 1]),
    )
)


# ---------------------------------------------------------------- chapter 07


def order_of(serve: Callable, experts: list, resident: set) -> list[str]:
    """What the learner's `serve` does, in its order: fetch, wait for and compute which expert."""
    done: list[str] = []

    def fetch(e: int) -> Callable:
        done.append(f"fetch {e}")
        return lambda: done.append(f"wait {e}")

    serve(experts, resident, fetch, lambda e: done.append(f"compute {e}"))
    return done


# (experts asked for, residents) -> the order of fetches, waits and computations
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
    )
)

# (share of right guesses, seconds of a copy, seconds that hide it) -> seconds that a guess saves
guess_gain = Check(
    (
        ((1.0, 2.0, 3.0), 2.0),
        ((0.5, 2.0, 3.0), 1.0),
        ((1.0, 4.0, 1.0), 1.0),
        ((0.0, 4.0, 1.0), -3.0),
        ((0.5, 4.0, 1.0), -1.0),
        ((0.75, 4.0, 1.0), 0.0),
    )
)


# ---------------------------------------------------------------- chapter 02

MIXTRAL_NUMBERS = {
    "layers": 32, "width": 4096, "expert_width": 14336, "experts": 8, "shared": 0, "heads": 32, "kv_heads": 8,
    "head_dim": 128, "vocab": 32000, "tables": 2,
}  # fmt: skip

# ten numbers of a configuration -> parameters of experts, attention, embeddings
parameters = Check(
    (
        ((MIXTRAL_NUMBERS,), (45_097_156_608, 1_342_177_280, 262_144_000)),
        ((MIXTRAL_NUMBERS | {"tables": 1},), (45_097_156_608, 1_342_177_280, 131_072_000)),
        (
            (MIXTRAL_NUMBERS | {"layers": 48, "width": 2048, "expert_width": 768, "experts": 128, "kv_heads": 4},),
            (28_991_029_248, 905_969_664, 131_072_000),
        ),
        (
            (MIXTRAL_NUMBERS | {"layers": 1, "width": 2048, "expert_width": 1408, "experts": 64, "shared": 2},),
            (570_949_632, 20_971_520, 131_072_000),
        ),
    )
)

# (parameters of each part, bits of a weight of each part) -> bytes
stored_nbytes = Check(
    (
        (((8,), (16,)), 16),
        (((100, 20, 4), (4, 8, 16)), 78),
        (((45_097_156_608, 1_342_177_280, 262_144_000), (4.25, 4.25, 16)), 25_195_184_128),
    )
)

# (layers, key-value heads, width of a head, tokens) -> bytes in 16 bits
kv_nbytes = Check((((32, 8, 128, 1), 131_072), ((32, 8, 128, 4096), 2**29), ((1, 1, 64, 10), 2560)))


# ---------------------------------------------------------------- chapter 15

# (bytes of VRAM, of RAM, of an expert, layers, experts a layer) -> experts in VRAM, in RAM, on disk
tiers = Check(
    (
        ((13_112_374_272, 10_194_693_632, 66_404_420, 32, 8), (192, 64, 0)),
        ((100, 45, 10, 4, 4), (8, 4, 4)),
        ((39, 1000, 10, 4, 4), (0, 16, 0)),
        ((1000, 1000, 10, 4, 4), (16, 0, 0)),
        ((85, 0, 10, 4, 4), (8, 0, 8)),
    )
)

# (tokens of each turn, question first; room) -> how many of the latest turns are sent
recent = Check(
    (
        (([5], 10), 1),
        (([5, 20, 5], 30), 3),
        (([5, 20, 5], 29), 1),
        (([3, 9, 3, 4, 3], 12), 3),
        (([3, 2, 3, 2, 30], 12), 1),
    )
)

# (active parameters, bytes touched, bytes moved, operations/s, bytes/s of memory, of the link) -> what, ms a token
what_binds = Check(
    (
        ((12.9e9, 5.2e9, 0.78e9, 8.1e12, 320e9, 12e9), ("link", 65.0)),
        ((12.9e9, 4.2e9, 0.0, 8.1e12, 320e9, 12e9), ("memory", 13.125)),
        ((10e9, 1e9, 0.0, 1e12, 320e9, 12e9), ("compute", 20.0)),
    )
)


# ---------------------------------------------------------------- chapter 10

# (seconds of fixed work, pairs of bytes and bytes a second) -> seconds of a token
token_s = Check(
    (
        ((0.5, []), 0.5),
        ((0.0, [(10, 5.0)]), 2.0),
        ((0.008, [(55e6, 11e9), (11e6, 11e9), (9e6, 4.5e9)]), 0.016),
    )
)

# (tokens/s, seconds without misses, bytes asked for, bytes a second of the link) -> hit rate, nan where none is enough
hit_rate_for = Check(
    (
        ((1.0, 0.5, 100, 100.0), 0.5),
        ((1.0, 0.1, 50, 100.0), 0.0),
        ((2.0, 0.5, 50, 100.0), 1.0),
        ((4.0, 0.5, 50, 100.0), float("nan")),
        ((2.0, 0.1, 8_500_000_000, 12e9), 1 - 0.4 * 12 / 8.5),
    )
)

# (seconds by term, name of a term, factor) -> time before over time after
gain = Check(
    (
        (({"a": 1.0, "b": 1.0}, "a", 2), 4 / 3),
        (({"a": 3.0, "b": 1.0}, "a", 3), 2.0),
        (({"a": 1.0, "b": 0.0}, "b", 10), 1.0),
    )
)
