"""Each exercise of each chapter, not attempted, done wrong and done right: checks never raise, and say what is wrong.

Stubs and solutions are taken from the notebooks; mistakes are those that learners make.
"""

import ast
import re
from functools import cache

import numpy as np
import pytest

import badges
import chapter_rules
import nb
from mixoff.classroom import check

CALL = re.compile(r"^check\.(\w+)\((\w+)\)", re.M)
NEEDED = {"numpy", "math", "itertools", "collections"}  # what solutions may import


def definitions(source):
    """Functions, constants and light imports of a cell, without what it runs."""
    for node in ast.parse(source).body:
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names = [node.module] if isinstance(node, ast.ImportFrom) else names
        if isinstance(node, ast.FunctionDef) or (names and {name.partition(".")[0] for name in names} <= NEEDED):
            yield node


@cache
def functions(path):
    """Every function of a chapter's exercises, stubs and solutions, by name."""
    scope = {"np": np}
    for _, cell in chapter_rules.code_cells(nb.read(path)):
        if {"exercise", "solution"} & chapter_rules.tags(cell):
            exec(compile(ast.Module(list(definitions(cell.source)), []), path.name, "exec"), scope)
    return scope


def exercises():
    """Chapter, name of the check and name of the stub, of every exercise."""
    for path in badges.chapters():
        for _, cell in chapter_rules.code_cells(nb.read(path)):
            if "check" in chapter_rules.tags(cell):
                for found in CALL.findall(cell.source):
                    yield pytest.param(path, *found, id=f"{path.stem[:2]}-{found[0]}")


EXERCISES = list(exercises())


@pytest.mark.parametrize(("path", "name", "stub"), EXERCISES)
def test_stub_is_not_attempted_and_solution_is_right(path, name, stub):
    assert getattr(check, name).verdict(functions(path)[stub]) == "[ .. ] not attempted yet"
    assert getattr(check, name).verdict(functions(path)[f"{stub}_solution"]).startswith("[ ok ]")


def nothing(*_):
    return None


def constant(*_):
    return 12345


def text(*_):
    return "twelve"


def ragged(*_):
    return [1, [2, 3]]


def raises(*_):
    raise ZeroDivisionError("division by zero")


def no_arguments():
    return 1


@pytest.mark.parametrize("attempt", [nothing, constant, text, ragged, raises, no_arguments], ids=lambda f: f.__name__)
@pytest.mark.parametrize(("path", "name", "stub"), EXERCISES)
def test_wrong_attempts_fail_in_words(path, name, stub, attempt):
    verdict = getattr(check, name).verdict(attempt)
    assert re.match(r"\[FAIL\] case \d+: \S", verdict), verdict


# ---------------------------------------------------------------- what learners get wrong


def first_in_first_out(wanted, slots):
    held, hits = [], 0
    for expert in wanted:
        hits += expert in held
        held = held if expert in held else [*held, expert][-slots:]
    return hits


def without_rescaling(scores, k):
    order = np.argsort(-scores, axis=1)[:, :k]
    p = np.exp(scores - scores.max(1, keepdims=True))
    return order, np.take_along_axis(p / p.sum(1, keepdims=True), order, 1)


def unweighted(x, experts, weights, expert_fn):
    out = np.zeros_like(x)
    for e in np.unique(experts):
        tokens, _ = np.where(experts == e)
        out[tokens] += expert_fn(e, x[tokens])
    return out


def rounding_down(w, bits):
    scale = (w.max() - w.min()) / (2**bits - 1)
    return np.floor((w - w.min()) / scale), scale, w.min()


def first_code_on_top(codes, bits):
    shifts = np.arange(8 // bits)[::-1] * bits
    return (codes.reshape(-1, 8 // bits) << shifts).sum(1)


def read_from_the_start(file, e, stride, nbytes):
    return file.read(nbytes)


def no_look_at_the_end(file, e, stride, nbytes):
    file.seek(e * stride)
    return file.read(nbytes)


def age_is_not_renewed(slots, fetch):
    held = {}

    def get(key):
        if key not in held:
            if len(held) == slots:
                del held[next(iter(held))]
            held[key] = fetch(key)
        return held[key]

    return get


def waits_at_once(experts, resident, fetch, compute):
    for e in experts:
        if e not in resident:
            fetch(e)()
        compute(e)


def forgets_to_compute(experts, resident, fetch, compute):
    waits = [fetch(e) for e in experts if e not in resident]
    for e in experts:
        if e in resident:
            compute(e)
    for wait in waits:
        wait()


def ignores_prefetches(events):
    here = set()
    for kind, expert in events:
        (here.add if kind == "miss" else here.discard if kind == "evict" else id)(expert)
    return here


MISTAKES = [
    ("slots_per_layer", lambda budget, nbytes, L, E: budget // nbytes // L, "case 4: 565, expected 8"),
    ("lru_hits", first_in_first_out, "case 5: 1, expected 2"),
    ("copy_s_per_token", lambda n, nbytes, hit_rate, Bps: n * nbytes * hit_rate / Bps, "case 1: 0.0, expected 0.354"),
    ("route", without_rescaling, "case 1: second answer: position (0, 0) is 0.64"),
    ("moe_layer", unweighted, "case 1: position (0, 0) is 3.0, expected 1.5"),
    ("repeat_rate", lambda rows: sum(bool({*a} & {*b}) for a, b in zip(rows[1:], rows)) / len(rows), "case 1: 0.5"),  # noqa: B905
    ("quantize_group", rounding_down, "case 2: first answer: position 2 is 1.0, expected 2"),
    ("pack", first_code_on_top, "case 1: position 0 is 64, expected 1"),
    ("unpack", lambda packed, bits: packed, "case 1: shape (1,), expected (4,)"),
    ("bits_per_weight", lambda bits, group, metadata: bits + metadata / group, "case 1: 3.0, expected 4.0"),
    ("threshold", lambda beta, p: 1 / beta, "case 1: 0.1, expected 0.17"),
    ("best_zero", lambda w, codes, scale: np.mean(w / scale - codes), "case 1: -1.0, expected 1.0"),
    ("unit_gain", lambda w, r: r * (w * w).sum() / (w * r).sum(), "case 2: position (0, 0) is 1.5"),
    ("perplexity", lambda logp, ids: np.exp(-logp[np.arange(len(ids)), ids].mean()), "case 2"),
    ("paired", lambda a, b: ((b - a).mean(), (b - a).std() / len(a) ** 0.5), "case 2: second answer: 0.47"),
    ("worth_having", lambda sizes, losses: [int(np.argmin(losses))], "case 1: shape (1,), expected (2,)"),
    ("read_expert", read_from_the_start, "case 2: position 0 is 1, expected 4"),
    ("read_expert", no_look_at_the_end, "case 3: [7], expected 'EOFError'"),
    ("make_cache", age_is_not_renewed, "case 4: fetched: position 3 is a, expected b"),
    ("bytes_per_token", lambda L, k, n, hit_rate, back: L * k * n * (1 - hit_rate), "case 2: 1699998208.0"),
    ("serve", waits_at_once, "case 3: position 1 is wait 3, expected compute 1"),
    ("serve", forgets_to_compute, "case 2: position 2 is nothing, expected compute 5"),
    ("layer_s", lambda m, h, copy, compute: m * copy + (m + h) * compute, "case 3: 5.0, expected 4.0"),
    ("guess_gain", lambda p, copy, hide: p * hide - (1 - p) * copy, "case 1: 3.0, expected 2.0"),
    ("belady_victim", lambda here, future: min(here, key=(*future, *here).index), "case 1: 2, expected 1"),
    ("fifo_misses", lambda wanted, slots: len(set(wanted)), "case 3: 3, expected 4"),
    ("gap_closed", lambda misses, lru, optimum: (misses - optimum) / (lru - optimum), "case 1: 1.0, expected 0.0"),
    ("hit_rate", lambda kinds: kinds.count("hit") / len(kinds), "case 2: 0.33"),
    ("residents", ignores_prefetches, "case 4: {1}, expected {1, 4}"),
    ("stays", lambda events: [t for t, kind, _ in events if kind == "evict"], "case 2: position 0 is 4, expected 3"),
    ("tiers", lambda vram, ram, nbytes, L, E: (n := vram // nbytes, m := min(ram // nbytes, L * E - n), L * E - n - m),
     "case 1: first answer: 197, expected 192"),
    ("recent", lambda lengths, room: sum(sum(lengths[i:]) <= room for i in range(len(lengths))), "case 3: 2"),
    ("what_binds", lambda n, touched, moved, flops, memory, link: ("link", 1e3 * moved / link), "case 2: first answer"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "attempt", "words"), MISTAKES)
def test_first_difference_is_named(name, attempt, words):
    verdict = getattr(check, name).verdict(attempt)
    assert verdict.startswith(f"[FAIL] {words}"), verdict
