"""Measures what quantizing and the lossy knobs cost in quality, and writes the tables of docs/quantization.md.

    python benchmarks/quality_table.py schemes [--windows 8]     # bits, groups, solvers, presets
    python benchmarks/quality_table.py knobs [--windows 8]       # fewer experts, skipped, pruned, coarse ones

Both on the bundled model and its held-out texts, unless told otherwise: MODEL is a folder, `--texts` a folder of text
files, one a domain. With `--checkpoint FILE` every finished row is kept there, and a second run goes on where the first
stopped. Weights are quantized and dequantized again, then transformers computes in fp32; knobs act through the runtime
that serves the model, all experts resident, and the bytes are what the simulator counts of the choices they leave.
"""

import json
import math
import sys
import warnings
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

import _table
import mixoff
from mixoff import models, quality
from mixoff.quality import Comparison, Scores, Windows, estimate, measure, predictions, quantized, windows
from mixoff.quantize.layout import BITS, DEFAULT_SOLVER, GROUP_SIZES, SOLVERS, packed_nbytes
from mixoff.quantize.scheme import PRESETS, Precision, Scheme

OTHERS = [solver for solver in SOLVERS if solver != DEFAULT_SOLVER]
BASE = "16 bits"
PAGE = Path(__file__).resolve().parents[1] / "docs" / "quantization.md"
MARKS = "<!-- measured: begin (benchmarks/quality_table.py {}) -->\n", "<!-- measured: end -->\n"


class Results:
    """Rows by name, kept in a file of JSON if there is one, so that a row is made once."""

    def __init__(self, file, over):
        self.file, self.rows, self.key = file, {}, f"{tuple(over.ids.shape)} {int(over.ids.sum())}"
        if file and file.exists() and (found := json.loads(file.read_text()))["windows"] == self.key:
            self.rows = found["rows"]

    def get(self, name, make):
        """The row of that name, `make() -> (scores, columns)` if it is new."""
        if name not in self.rows:
            scores, columns = make()
            self.rows[name] = {"scores": scores.to_dict(), "columns": columns}
            if self.file:
                self.file.write_text(json.dumps({"windows": self.key, "rows": self.rows}))
            print(name, scores, file=sys.stderr, flush=True)
        row = self.rows[name]
        return Scores.from_dict(row["scores"]), row["columns"]


def comparison(rows):
    """A comparison of `rows`, by name `(scores, columns)`."""
    titles = dict.fromkeys(title for _, columns in rows.values() for title in columns)
    columns = {title: {name: c[title] for name, (_, c) in rows.items() if title in c} for title in titles}
    return Comparison({name: scores for name, (scores, _) in rows.items()}, columns)


# Schemes -------------------------------------------------------------------------------------------------------------


def variants(width):
    """Name and schemes of every row: experts in all ways that their width allows, attention alone, and the presets."""
    four = Precision(4, max(size for size in (16, 32, 64) if width % size == 0))
    attention = Scheme(attention=four)
    for bits in BITS:
        for size in (size for size in GROUP_SIZES if width % size == 0):
            for solver in SOLVERS:
                experts = Scheme(experts=Precision(bits, size), solver=solver)
                yield f"{bits} bits g{size} {solver}", {"experts": experts, "attention": attention}
    for solver in SOLVERS:
        yield f"attention alone {solver}", {"attention": Scheme(attention=four, solver=solver)}
    for name, scheme in PRESETS.items():
        yield f"preset `{name}`", scheme


def scheme_row(model, over, reference, schemes):
    with quantized(model, schemes) as sizes:
        scores = measure(model, over, reference)
    bits = 8 * sizes["experts"][0] / sizes["experts"][1]
    nbytes = sizes["experts"][0] + sizes["attention"][0]
    return scores, {"bits/weight (experts)": f"{bits:.3f}", "MB*": f"{nbytes / 1e6:.2f}"}


def schemes(arguments, tokenizer, texts):
    """Lines of the tables of schemes and of solvers."""
    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32).eval()
    over = windows(tokenizer, texts, arguments.windows)
    results, reference = Results(arguments.checkpoint, over), predictions(model, over)
    width = min(w.shape[1] for role, w in quality.matrices(model) if role in ("experts", "attention"))
    named = {BASE: Scheme()} | dict(variants(width))
    rows = {
        name: results.get(name, lambda scheme=scheme: scheme_row(model, over, reference, scheme))
        for name, scheme in named.items()
    }
    compared = comparison(rows)
    head = [f"{solver}: {what}" for solver in OTHERS for what in ("KL", "loss")]
    yield f"""{intro(arguments, over)}
bits and MB are exact.

{compared.markdown()}

*experts and attention, metadata included. Where experts are quantized, attention is 4-bit, `{DEFAULT_SOLVER}`.

What the others have more than `{DEFAULT_SOLVER}`, millinats per token, paired window by window (measured):
"""
    yield _table.table(["what", *head, "least KL, within two errors"], solver_rows(compared))


def intro(arguments, over):
    """What all rows of a table share."""
    D, W, T = over.ids.shape
    return f"""Model `{arguments.model.name}`, {D * W * T} held-out tokens of {D} domains, {W} windows of {T} each.
Perplexity, ratio, KL and top-1 are measured, ± is one standard error. Ratio and KL are paired with {BASE};"""


def solver_rows(compared):
    """What the other solvers have more than the default one in each form, paired, and those with the least KL."""
    last = f" {DEFAULT_SOLVER}"
    for form in (name.removesuffix(last) for name in compared.scores if name.endswith(last)):
        names, cells = {solver: f"{form} {solver}" for solver in SOLVERS}, []
        for solver in OTHERS:
            more = compared.difference(names[solver], names[DEFAULT_SOLVER])
            cells += [str(more[what].scaled(1000)) for what in ("kl", "loss")]
        least = min(names.values(), key=lambda name: estimate(compared.scores[name].kl).mean)
        close = [solver for solver in SOLVERS if not clearly_above(compared, names[solver], least)]
        yield [form, *cells, ", ".join(close)]


def clearly_above(compared, name, least):
    """Whether the KL of `name` exceeds that of `least` by more than two standard errors of the difference."""
    more = compared.difference(name, least)["kl"]
    return more.mean > 2 * more.error


# Knobs ---------------------------------------------------------------------------------------------------------------

FINE, COARSE = Scheme(experts=Precision(4, 64)), Scheme(experts=Precision(2, 32))


def knobs(arguments, tokenizer, texts):
    """Lines of the table of lossy knobs, at `--slots` slots per layer."""
    both = windows(tokenizer, texts, 2 * arguments.windows - 1)  # every second one is for counting, not for judging
    over, other = (Windows(both.ids[:, start::2], both.domains) for start in (0, 1))
    rows, results = {}, Results(arguments.checkpoint, over)
    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32).eval()
    reference = predictions(model, over)
    with served(model):
        counts = run(model, other, None, None)[1].counts()
    for name, knob in {BASE: None, **dict(choices(counts, arguments.slots))}.items():
        rows[name] = results.get(name, lambda knob=knob: knob_row(model, over, reference, knob, arguments.slots, 2))
    for name, make in coarse(model, over, reference, arguments.slots).items():
        rows[name] = results.get(name, make)
    yield f"""{intro(arguments, over)}
experts, how many a token asks for in a layer, are counted. MB per token are modelled: what misses move in
the simulator, with LRU and {arguments.slots} slots per layer, over the choices that were left.
Weights have 16 bits unless the row says otherwise; attention always has.
"""
    yield comparison(rows).markdown()


def choices(counts, slots):
    """The knobs by name."""
    E = counts.shape[1]
    yield from ((f"dynamic top-k, mass {mass}", quality.dynamic_top_k(mass)) for mass in (0.9, 0.8, 0.7, 0.6))
    yield from ((f"skip below {share}", quality.skip_light(share)) for share in (0.25, 0.4))
    yield f"skip misses but the heaviest, {slots} slots", quality.skip_misses(quality.Shadow(slots))
    yield from ((f"prune to {keep} of {E}", quality.prune(counts, keep)) for keep in (E - 1, E - 2, E // 2))


@contextmanager
def served(model):
    """Within `with`, the model's experts are served by a runtime that holds all of them."""
    with warnings.catch_warnings(action="ignore"):  # that memory is not freed
        mixoff.offload(model, "64GiB")
    try:
        yield model.mixoff
    finally:
        mixoff.restore(model)


def run(model, over, reference, knob):
    """Scores with a knob, and the trace of the choices it left, each token a pass of its own."""
    model.mixoff.reroute = knob
    with model.mixoff.trace() as recorder:
        scores = measure(model, over, reference)
    trace = recorder.trace
    return scores, mixoff.Trace.from_array(trace.experts, trace.num_experts)


def knob_row(model, over, reference, knob, slots, weight_nbytes):
    """A row's scores and columns; weight_nbytes: of one weight, on average."""
    with served(model) as runtime:
        scores, trace = run(model, over, reference, knob)
        weights = sum(math.prod(part.shape) for part in runtime.source.sites[0].parts)
    E = model.config.num_local_experts
    trace = mixoff.Trace.from_array(np.where(trace.experts < 0, -1, trace.experts % E), E)  # a twin is its expert
    asked = (trace.experts >= 0).mean() * trace.top_k
    moved = mixoff.simulate(trace, "lru", slots, expert_nbytes=round(weights * weight_nbytes)).bytes_moved
    return scores, {"experts": f"{asked:.2f}", "MB per token": f"{moved / trace.tokens / 1e6:.3f}"}


def coarse(model, over, reference, slots):
    """Rows by name: experts in 4 bits, in 2 bits, and residents in 4 with misses computed in 2."""

    def row(scheme, twin=None):
        with quantized(model, {"experts": scheme}) as sizes:
            per_weight = sizes["experts"][0] / sizes["experts"][1]
            if twin is None:
                return knob_row(model, over, reference, None, slots, per_weight)
            knob = quality.coarse_misses(quality.Shadow(slots), model.config.num_local_experts)
            with quality.with_twins(model, twin):
                return knob_row(model, over, reference, knob, slots, packed_nbytes((1024, 1024), 2, 32) / 2**20)

    return {
        "experts in 4 bits": lambda: row(FINE),
        "experts in 4 bits, misses in 2": lambda: row(FINE, COARSE),
        "experts in 2 bits": lambda: row(COARSE),
    }


def main():
    parser = _table.parser(__doc__)
    parser.add_argument("what", choices=["schemes", "knobs"])
    parser.add_argument("--model", type=Path, default=models.path())
    parser.add_argument("--texts", type=Path, help="folder of .txt files; the bundled held-out texts by default")
    parser.add_argument("--windows", type=int, default=8, help="of each domain")
    parser.add_argument("--slots", type=int, default=4, help="a layer, for what knobs move")
    parser.add_argument("--checkpoint", type=Path, help="file for finished rows")
    parser.add_argument("--page", type=Path, default=PAGE)
    arguments = parser.parse_args()
    transformers.utils.logging.set_verbosity_error()  # texts are longer than the model's context, windows are not
    texts = models.heldout()
    if arguments.texts:
        texts = {file.stem: file.read_text(encoding="utf-8") for file in sorted(arguments.texts.glob("*.txt"))}
    make = {"schemes": schemes, "knobs": knobs}[arguments.what]
    lines = make(arguments, AutoTokenizer.from_pretrained(arguments.model), texts)
    _table.write_between(arguments.page, MARKS[0].format(arguments.what), MARKS[1], "\n".join(lines))


if __name__ == "__main__":
    main()
