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
from mixoff.classroom.programs import tl

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
    scope = {"np": np, "tl": tl}
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
    assert getattr(check, name).verdict(functions(path)[f"{stub}_solution"]).startswith("[ ok ] solution, ")


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


def words_again_and_again(words, x, scale, minimum, out, W, G):
    n, j = tl.program_id(0), tl.arange(0, W)
    group, total = n * (16 * W // G) + 16 * j // G, tl.zeros((W,), tl.float32)
    for i in range(16):
        q = (tl.load(words + n * W + j) >> 2 * i) & 3
        total += (q * tl.load(scale + group) + tl.load(minimum + group)) * tl.load(x + 16 * j + i)
    tl.store(out + n, tl.sum(total))


def no_minimum(words, x, scale, minimum, out, W, G):
    n, j = tl.program_id(0), tl.arange(0, W)
    word, total = tl.load(words + n * W + j), tl.zeros((W,), tl.float32)
    for i in range(16):
        total += ((word >> 2 * i) & 3) * tl.load(x + 16 * j + i)
    tl.store(out + n, tl.sum(total * tl.load(scale + n * (16 * W // G) + 16 * j // G)))


def scales_of_the_first_row(words, x, scale, minimum, out, W, G):
    n, j = tl.program_id(0), tl.arange(0, W)
    word, total = tl.load(words + n * W + j), tl.zeros((W,), tl.float32)
    for i in range(16):
        q = (word >> 2 * i) & 3
        total += (q * tl.load(scale + 16 * j // G) + tl.load(minimum + 16 * j // G)) * tl.load(x + 16 * j + i)
    tl.store(out + n, tl.sum(total))


def past_the_end(words, x, scale, minimum, out, W, G):
    tl.store(out + tl.program_id(0), tl.sum(tl.load(words + tl.program_id(0) * W + tl.arange(0, 16 * W))))


def in_order_of_arrival(experts):
    found = {}
    for token, row in enumerate(experts):
        for e in row:
            found.setdefault(e, []).append(token)
    return found


def chunks_alone(prompt, chunk, running):
    return [f"read {start} to {min(start + chunk, prompt)}" for start in range(0, prompt, chunk)]


def past_the_prompt(prompt, chunk, running):
    reads = [f"read {start} to {start + chunk}" for start in range(0, prompt, chunk)]
    return [one for read in reads for one in ("decode", read)][1:] if running else reads


def decodes_after_the_last(prompt, chunk, running):
    return [one for read in chunks_alone(prompt, chunk, running) for one in (read, "decode")[: 1 + running]]


def kl_of_softmax(teacher, student):
    p, q = (np.exp(x) / np.exp(x).sum(-1, keepdims=True) for x in (teacher, student))
    return (p * np.log(p / q)).sum(-1).mean()


MISTAKES = [
    ("slots_per_layer", lambda budget, nbytes, L, E: budget // nbytes // L, "case 4: 565, expected 8"),
    ("lru_hits", first_in_first_out, "case 5: 1, expected 2"),
    ("copy_s_per_token", lambda n, nbytes, hit_rate, Bps: n * nbytes * hit_rate / Bps, "case 1: 0.0, expected 0.354"),
    ("route", without_rescaling, "case 1: second answer: position (0, 0) is 0.64"),
    ("moe_layer", unweighted, "case 1: output: position (0, 0) is 3.0, expected 1.5"),
    ("repeat_rate", lambda rows: sum(bool({*a} & {*b}) for a, b in zip(rows[1:], rows)) / len(rows), "case 1: 0.5"),  # noqa: B905
    ("quantize_group", rounding_down, "case 2: first answer: position 2 is 1.0, expected 2"),
    ("pack", first_code_on_top, "case 1: bytes: position 0 is 64, expected 1"),
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
    ("codes_at", lambda words, i: words >> 2 * i, "case 1: position 0 is 960051513, expected 1"),
    ("folded", lambda q, x, scale, low: scale @ (q * x).sum(1), "case 1: product: 10.0, expected 0.0"),
    ("matvec", no_minimum, "case 1: out: position 0"),
    ("matvec", scales_of_the_first_row, "case 1: out: position 1"),
    ("matvec", past_the_end, "case 1: raised IndexError: words has 4 numbers, and number 4 is asked for"),
    ("instructions_per_weight", lambda a, b, c, size, outputs: a / b, "case 2: 0.1171875, expected 0.134765625"),
    ("placed", lambda layers, n, backbone, experts: (experts, backbone), "case 1: first answer: 24000000000.0"),
    ("break_even", lambda hit, share, cpu, card: cpu * (1 - share), "case 1: 25000000000.0, expected 50000000000.0"),
    ("exchanged", lambda ranks, layers, k, width, nbytes: layers * k * width * nbytes, "case 1: 1048576, expected 0"),
    ("experts_touched", lambda E, K, T: min(E, K * T), "case 2: 4, expected 3.5"),
    ("by_expert", lambda experts: dict(enumerate(experts)), "case 1: {'order': [0]"),
    ("dropped", lambda x, E, factor: np.maximum(np.bincount(x.ravel()) - x.size / E, 0).sum(), "case 3: 2.0, expected"),
    ("chunked", chunks_alone, "case 2: position 1 is read 4 to 8, expected decode"),
    ("dynamic_top_k", lambda weights, mass: (weights.cumsum(1) < mass).sum(1), "case 1: position 0 is 0, expected 1"),
    ("dynamic_top_k", lambda weights, mass: (weights >= 1 - mass).sum(1), "case 1: position 0 is 2, expected 1"),
    ("skip_misses", lambda w, here, keep: w * (here | (w == w.max())), "case 2: position 0 is 0.75, expected 1.0"),
    ("skip_misses", lambda w, here, keep: w * here / max((w * here).sum(), 1e-9) * w.sum(), "case 3: position 0 is 0"),
    ("greedy", lambda loss, experts, keep: sorted(experts, key=lambda e: loss({e}))[len(experts) - keep :],
     "case 3: position 0 is 2, expected 1"),
    ("distil_loss", lambda t, s: kl_of_softmax(s, t), "case 2: 0.13"),
    ("distil_loss", lambda t, s: ((t - s) ** 2).mean(), "case 2: 0.6"),
    ("tiers", lambda vram, ram, nbytes, L, E: (n := vram // nbytes, m := min(ram // nbytes, L * E - n), L * E - n - m),
     "case 1: first answer: 197, expected 192"),
    ("recent", lambda lengths, room: sum(sum(lengths[i:]) <= room for i in range(len(lengths))), "case 3: 2"),
    ("what_binds", lambda n, touched, moved, flops, memory, link: ("link", 1e3 * moved / link), "case 2: first answer"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "attempt", "words"), MISTAKES)
def test_first_difference_is_named(name, attempt, words):
    verdict = getattr(check, name).verdict(attempt)
    assert verdict.startswith(f"[FAIL] {words}"), verdict


# ---------------------------------------------------------------- what contracts refuse


def token_by_token(x, experts, weights, expert_fn):
    rows = [
        sum(w * expert_fn(e, row[None])[0] for e, w in zip(chosen, shares, strict=True))
        for row, chosen, shares in zip(x, experts, weights, strict=True)
    ]
    return np.array(rows)


def all_eight(x, experts, weights, expert_fn):
    shares = [(weights * (experts == e)).sum(1, keepdims=True) for e in range(8)]
    return sum(share * expert_fn(e, x) for e, share in enumerate(shares))


def wide_bytes(codes, bits):
    return (codes.reshape(-1, 8 // bits) << np.arange(8 // bits) * bits).sum(1)


def fetches_before_it_frees(slots, fetch):
    held = {}

    def get(key):
        if key in held:
            held[key] = held.pop(key)
            return held[key]
        weights = fetch(key)
        if len(held) == slots:
            del held[next(iter(held))]
        held[key] = weights
        return weights

    return get


def keeps_everything(slots, fetch):
    return cache(fetch)


def divides_by_nothing(kinds):
    return kinds.count("hit") / (kinds.count("hit") + kinds.count("miss"))


def zero_without_requests(kinds):
    return kinds.count("hit") / max(1, kinds.count("hit") + kinds.count("miss"))


def renewed_by_hits(events):
    used, found = {}, []
    for token, kind, expert in events:
        if kind == "evict":
            found.append(token - used.pop(expert))
        else:
            used[expert] = token
    return found


def changes_its_input(terms, name, factor):
    before = sum(terms.values())
    terms[name] /= factor
    return before / sum(terms.values())


def overflows(scores, k):
    order = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    p = np.exp(np.take_along_axis(scores, order, 1))
    return order, p / p.sum(1, keepdims=True)


def in_order_of_number(scores, k):
    order = np.sort(np.argsort(-scores, axis=1)[:, :k], axis=1)
    p = np.exp(np.take_along_axis(scores, order, 1) - scores.max())
    return order, p / p.sum(1, keepdims=True)


def padded(file, e, stride, nbytes):
    file.seek(e * stride)
    return file.read(nbytes).ljust(nbytes, b"\0")


def misses_first(experts, resident, fetch, compute):
    waits = {e: fetch(e) for e in experts if e not in resident}
    for e, wait in waits.items():
        wait()
        compute(e)
    for e in experts:
        if e in resident:
            compute(e)


def least_recently_used(wanted, slots):
    held, misses = [], 0
    for expert in wanted:
        misses += expert not in held
        held = [*(e for e in held if e != expert), expert][-slots:]
    return misses


def last_of_equals(residents, future):
    return max(reversed(residents), key=lambda e: future.index(e) if e in future else len(future))


def same_place(rows):
    return sum(any(a == b for a, b in zip(x, y, strict=True)) for x, y in zip(rows, rows[1:])) / (len(rows) - 1)  # noqa: B905


def divides_a_flat_group(w, bits):
    scale = (w.max() - w.min()) / (2**bits - 1)
    return np.round((w - w.min()) / scale), scale, w.min()


REFUSED = [
    ("best_zero", lambda w, codes, scale: np.mean(codes) - w[0] / scale, "case"),
    ("bytes_per_token", lambda L, k, n, h, back: L * n * (1 - h) * (2 if back else 1), "case 1"),
    ("copy_s_per_token", lambda n, nbytes, h, Bps: n * nbytes / Bps, "case 2"),
    ("greedy", lambda loss, experts, keep: experts[:keep], "case 2"),
    ("kv_nbytes", lambda layers, heads, width, tokens: 4 * layers * width * tokens, "case 1"),
    ("residents", lambda events: {e for kind, e in events if kind in ("miss", "prefetch")}, "case 3"),
    ("slots_per_layer", lambda budget, n, L, E: min(-(-budget // n // L), E), "case 1"),
    ("threshold", lambda beta, p: beta ** (1 / (p - 2)) * p, "case 1"),
    ("tiers", lambda vram, ram, n, L, E: (x := vram // n // L * L, L * E - x, 0), "case 2"),
    ("token_s", lambda fixed_s, parts: fixed_s + max((n / Bps for n, Bps in parts), default=0.0), "case 3"),
    ("stored_nbytes", lambda counts, bits: sum(n * b // 8 for n, b in zip(counts, bits, strict=True)), "drops"),
    ("stored_nbytes", lambda counts, bits: sum(n * b for n, b in zip(counts, bits, strict=True)) // 8, "drops"),
    ("fit", lambda w, codes: (*np.polyfit(codes, w, 1), 1.0), "third answer"),
    ("fit", lambda w, codes: (*np.polyfit(codes, w, 1), np.corrcoef(codes, w)[0, 1] ** 2), "third answer"),
    ("experts_touched", lambda E, K, T: E * (1 - (1 - 1 / E) ** (K * T)), "A token's experts differ"),
    ("experts_touched", lambda E, K, T: E * (1 - K / E) ** T, "nobody asks for"),
    ("by_expert", in_order_of_arrival, "order: position 0 is 3, expected 1"),
    ("dropped", lambda x, E, f: np.maximum(np.bincount(x.ravel(), minlength=E) - int(f * len(x) / E), 0).sum(),
     "Each token sends K requests"),
    ("dropped", lambda x, E, f: np.maximum(np.bincount(x.ravel(), minlength=E) - f * x.size / E, 0).sum(),
     "case 4: 1.75, expected 2"),
    ("chunked", past_the_prompt, "position 4 is read 8 to 12, expected read 8 to 10"),
    ("chunked", decodes_after_the_last, "position 1 is decode, expected nothing"),
    ("codes_at", lambda words, i: words >> i & 3, "A code takes two bits"),
    ("codes_at", lambda words, i: (words & 3) >> 2 * i, "before the shift"),
    ("codes_at", lambda words, i: words / 4**i % 4, "expected 0"),
    ("folded", lambda q, x, scale, low: ((q * scale[:, None] + low[:, None]) * x).sum(), "every weight was made"),
    ("folded", lambda q, x, scale, low: scale @ (q * x).sum(1) + low.sum() * x.shape[1], "not their number"),
    ("folded", lambda q, x, scale, low: (scale[:, None] * (q * x)).sum() + low @ x.sum(1), "minima: 5, expected 2"),
    ("matvec", words_again_and_again, "bytes of codes read: 256, expected 16"),
    ("instructions_per_weight", lambda a, b, c, size, outputs: a / b + c / size, "group_size * outputs"),
    ("placed", lambda L, n, b, x: (b + n / L * x, x - n / L * x), "case 1: first answer"),
    ("placed", lambda L, n, b, x: (b + min(n, L) / L * x, x - min(n, L) / L * x), "whose experts stay in RAM"),
    ("placed", lambda L, n, b, x: (b + x - n / L * x, n / L * x), "may exceed the number of layers"),
    ("placed", lambda L, n, b, x: (x - min(n, L) / L * x, min(n, L) / L * x), "The backbone is on the card too"),
    ("break_even", lambda h, s, cpu, card: (1 - h) / (1 - s) * cpu, "that takes time too"),
    ("break_even", lambda h, s, cpu, card: 1 / (1 / cpu - 1 / card), "misses with 1 - hit rate"),
    ("break_even", lambda h, s, cpu, card: h / s * cpu, "case 2"),
    ("exchanged", lambda r, L, k, w, n: 2 * L * k * w * n, "keeps one part"),
    ("exchanged", lambda r, L, k, w, n: 2 * (r - 1) * L * w * n // r, "not their sum"),
    ("exchanged", lambda r, L, k, w, n: (r - 1) * L * k * w * n, "case 3"),
    ("moe_layer", token_by_token, "calls of experts: '3 3', expected '3'"),
    ("moe_layer", all_eight, "calls of experts: '0 1 2 3 4 5 6 7', expected '0 1'"),
    ("pack", wide_bytes, "type: 'int64', expected 'uint8'"),
    ("make_cache", fetches_before_it_frees, "within its slots: False"),
    ("make_cache", keeps_everything, "fetched"),
    ("hit_rate", divides_by_nothing, "raised ZeroDivisionError"),
    ("hit_rate", zero_without_requests, "expected None"),
    ("stays", renewed_by_hits, "A hit does not renew the arrival."),
    ("gain", changes_its_input, "right, but the call changed its arguments"),
    ("lru_hits", first_in_first_out, "This is FIFO"),
    ("lru_hits", least_recently_used, "These are misses"),
    ("route", overflows, "second answer"),
    ("route", in_order_of_number, "first answer"),
    ("repeat_rate", same_place, "case 1"),
    ("quantize_group", divides_a_flat_group, "case 4"),
    ("read_expert", padded, "expected 'EOFError'"),
    ("serve", misses_first, "expected compute 1"),
    ("fifo_misses", least_recently_used, "This is LRU"),
    ("belady_victim", last_of_equals, "case 4"),
    ("kv_nbytes", lambda layers, heads, width, tokens: layers * heads * width * tokens * 2, "expected 131072"),
    ("gap_closed", lambda misses, lru, best: (misses - best) / (lru - best), "1 minus it"),
    ("hit_rate_for", lambda speed, s, n, Bps: 1 - (1 / speed - s) * Bps / n, "case 2"),
    ("guess_gain", lambda p, copy, hide: p * min(copy, hide), "case 4"),
    ("what_binds", lambda n, a, b, flops, m, x: max(("compute", 1e3 * n / flops), ("memory", 1e3 * a / m),
     ("link", 1e3 * b / x), key=lambda t: t[1]), "case 3"),
]  # fmt: skip


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize(("name", "attempt", "words"), REFUSED)
def test_contract_refuses(name, attempt, words):
    verdict = getattr(check, name).verdict(attempt)
    assert verdict.startswith("[FAIL]") and words in verdict, verdict


def test_a_failed_check_shows_the_call_and_both_answers():
    lines = check.lru_hits.verdict(first_in_first_out).splitlines()
    assert [line.strip() for line in lines] == [
        "[FAIL] case 5: 1, expected 2",
        "call     first_in_first_out([1, 2, 1, 3, 1, 2], 2)",
        "returned 1",
        "expected 2",
        "This is FIFO: a hit must renew the expert's age.",
    ]


SLIPS = [
    (name, sentence) for name, made in vars(check).items() if isinstance(made, check.Check) for sentence in made.slips
]


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize(("name", "sentence"), SLIPS)
def test_a_typical_mistake_is_named(name, sentence):
    verdict = getattr(check, name).verdict(getattr(check, name).slips[sentence])
    assert verdict.startswith("[FAIL]") and verdict.endswith(sentence), verdict


def test_every_exercise_with_one_answer_names_a_typical_mistake():
    assert {param.values[1] for param in EXERCISES} - {name for name, _ in SLIPS} == {
        "victim",  # any policy is right
        "matvec",  # its case counts what is read, which names the mistake
    }


# ---------------------------------------------------------------- whose function figures use


@pytest.mark.parametrize(("path", "name", "stub"), EXERCISES)
def test_figures_use_the_solution_until_the_exercise_is_solved(path, name, stub, capsys):
    unsolved, solution = functions(path)[stub], functions(path)[f"{stub}_solution"]
    assert getattr(check, name).mine(unsolved, solution) is solution
    assert capsys.readouterr().out.startswith("[ ok ] solution, ")


def test_figures_use_the_learners_function_once_it_passes(capsys):
    def gap_closed(misses, lru, optimum):
        seen.append(misses)
        return 1 - (misses - optimum) / (lru - optimum)

    seen = []
    mine = check.gap_closed.mine(gap_closed, lambda misses, lru, optimum: (lru - misses) / (lru - optimum))
    assert mine(80, 100, 60) == 0.5 and seen[-1] == 80
    assert "your gap_closed is used" in capsys.readouterr().out
    assert check.gap_closed.mine(nothing, constant) is constant


def test_the_solution_answers_where_the_learners_function_raises():
    def gap_closed(misses, lru, optimum):
        if misses == 7:
            raise ValueError("not these")
        return (lru - misses) / (lru - optimum)

    assert check.gap_closed.mine(gap_closed, lambda *_: "the solution's")(7, 9, 5) == "the solution's"


@pytest.mark.parametrize("path", badges.chapters(), ids=lambda path: path.stem)
def test_no_later_cell_calls_a_solution_past_the_learner(path):
    cells = [cell for _, cell in chapter_rules.code_cells(nb.read(path)) if "solution" not in chapter_rules.tags(cell)]
    assert not [found for cell in cells for found in re.findall(r"\w+_solution\b", cell.source)]
