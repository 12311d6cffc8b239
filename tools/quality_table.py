"""Measures what quantizing the experts costs in quality, and writes the tables of docs/quantization.md.

    python tools/quality_table.py mixoff/models/tiny-mixtral HELDOUT [--windows 16]

HELDOUT is a folder of text files, one a domain. Each gives the same number of windows of 256 tokens, evenly spread over
it; a token is predicted from those before it in its window. Every variant sees the same windows, so differences are
paired. Standard errors take windows, not tokens, as independent, and the domains as given (stratified).

The weights are quantized and dequantized again, then transformers computes in fp32. Letters: **T** tokens of a window,
**V** vocabulary, **E** experts, **D** domains, **W** windows of a domain. Does not know stores or offloading.
"""

import argparse
import math
import sys
from pathlib import Path

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

from mixoff.quantize import BITS, DEFAULT_SOLVER, GROUP_SIZES, PRESETS, SOLVERS, Precision, Scheme

WINDOW = 256
OTHERS = [solver for solver in SOLVERS if solver != DEFAULT_SOLVER]
PAGE = Path(__file__).resolve().parents[1] / "docs" / "quantization.md"
MARKS = "<!-- measured: begin (tools/quality_table.py) -->\n", "<!-- measured: end -->\n"


def windows(folder, tokenizer, count):
    """Token ids (D, W, T): `count` windows of each text file, evenly spread."""
    chosen = []
    for file in sorted(folder.glob("*.txt")):
        ids = torch.tensor(tokenizer(file.read_text(encoding="utf-8"), add_special_tokens=False)["input_ids"])
        if len(ids) < WINDOW * count:
            sys.exit(f"{file} has {len(ids)} tokens, and {count} windows need {WINDOW * count}: ask for fewer windows")
        starts = torch.linspace(0, len(ids) - WINDOW, count).long()
        chosen.append(torch.stack([ids[start : start + WINDOW] for start in starts]))
    if not chosen:
        sys.exit(f"{folder} holds no .txt files")
    return torch.stack(chosen)


def matrices(model):
    """Role and a view (N, K) of every weight that a scheme may quantize here: experts and attention."""
    for name, parameter in model.named_parameters():
        if parameter.dim() == 3:  # (E, N, K), gate and up as one matrix, as a store keeps them
            yield from (("experts", matrix) for matrix in parameter.data)
        elif "self_attn" in name and parameter.dim() == 2:
            yield "attention", parameter.data


@torch.inference_mode()
def measure(model, ids, reference):
    """Loss and KL to the reference, nats a token, (D, W) each; an empty `reference` is filled with what is found."""
    losses, divergences, fill = [], [], not reference
    for n, window in enumerate(ids.flatten(0, 1)):
        found = model(window[None]).logits[0].log_softmax(-1)  # (T, V)
        if fill:
            reference.append(found)
        losses.append(-found[:-1].gather(1, window[1:, None]).mean())
        divergences.append((reference[n].exp() * (reference[n] - found)).sum(-1).mean())
    return (torch.stack(values).double().view(ids.shape[:2]) for values in (losses, divergences))


def quantized(model, weights, schemes):
    """Put `weights` through the scheme of their role into the model; return bits a weight by role, and MB in all."""
    nbytes, counts = dict.fromkeys(schemes, 0), dict.fromkeys(schemes, 0)
    for (role, matrix), original in zip(matrices(model), weights, strict=True):
        q = schemes[role].quantize(original, role)
        matrix.copy_(original if q is None else q.dequantize())
        nbytes[role] += original.numel() * 2 if q is None else q.nbytes
        counts[role] += original.numel()
    return {role: 8 * nbytes[role] / counts[role] for role in schemes}, sum(nbytes.values()) / 1e6


def variants(width):
    """Key and schemes of every row: experts in all ways that their width allows, attention alone, and the presets."""
    four = Precision(4, max(size for size in (16, 32, 64) if width % size == 0))
    default = Scheme(attention=four)
    for bits in BITS:
        for size in (size for size in GROUP_SIZES if width % size == 0):
            for solver in SOLVERS:
                scheme = Scheme(experts=Precision(bits, size), solver=solver)
                yield (f"experts {bits} bits", str(size), solver), {"experts": scheme, "attention": default}
    for solver in SOLVERS:
        scheme = Scheme(attention=four, solver=solver)
        yield ("attention alone", str(four.group_size), solver), {"experts": scheme, "attention": scheme}
    for name, scheme in PRESETS.items():
        yield (f"preset `{name}`", "", ""), {"experts": scheme, "attention": scheme}


def mean_and_error(values):
    """Mean of values (D, W) and its standard error, the domains being given."""
    return values.mean().item(), (values.var(1) / values.shape[1]).sum().sqrt().item() / len(values)


def millinats(values):
    return "{:.2f} ± {:.2f}".format(*(1000 * value for value in mean_and_error(values)))


def table(head, rows):
    """Lines of a Markdown table."""
    return ["| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *rows)]


def quality_rows(results, base):
    """One row a variant: bits, perplexity with its error, ratio to 16 bits and KL with their paired errors."""
    for key, (bits, nbytes, loss, kl) in results.items():
        perplexity, error = (f(value) for f, value in zip((math.exp, float), mean_and_error(loss), strict=True))
        ratio, paired = (f(value) for f, value in zip((math.exp, float), mean_and_error(loss - base), strict=True))
        yield [
            *key,
            f"{bits['experts']:.3f}",
            f"{nbytes:.2f}",
            f"{perplexity:.2f} ± {perplexity * error:.2f}",
            f"{ratio:.4f} ± {ratio * paired:.4f}",
            millinats(kl),
        ]


def solver_rows(results):
    """What the other solvers have more than the default one in each form, paired, and those with the least KL."""
    for what, size in dict.fromkeys(key[:2] for key in results if key[2]):
        found = {solver: results[what, size, solver][2:] for solver in SOLVERS}  # loss and KL
        (loss, kl), cells = found[DEFAULT_SOLVER], []
        for other_loss, other_kl in (found[solver] for solver in OTHERS):
            cells += [millinats(other_kl - kl), millinats(other_loss - loss)]
        least = min((values for _, values in found.values()), key=lambda values: values.mean())
        close = [solver for solver, (_, values) in found.items() if not clearly_above(values, least)]
        yield [what, size, *cells, ", ".join(close)]


def clearly_above(values, least):
    """Whether values (D, W) exceed others in the mean by more than two standard errors of the difference."""
    mean, error = mean_and_error(values - least)
    return mean > 2 * error


def report(results, base, ids, model_name):
    """Everything between the marks of the page."""
    yield f"Model `{model_name}`, {ids.numel()} held-out tokens of {len(ids)} domains in windows of {WINDOW}. All is"
    yield "measured, but bits and MB are exact. ± is one standard error; ratio and KL are paired with 16 bits."
    yield ""
    head = [
        "what",
        "group",
        "solver",
        "bits/weight (experts)",
        "MB*",
        "perplexity",
        "ratio to 16 bits",
        "KL, millinats",
    ]
    yield from table(head, quality_rows(results, base))
    yield ""
    yield f"*experts and attention, metadata included. Beside quantized experts attention is 4-bit, `{DEFAULT_SOLVER}`."
    yield ""
    yield f"What the others have more than `{DEFAULT_SOLVER}`, millinats a token, paired window by window (measured):"
    yield ""
    head = [f"{solver}: {what}" for solver in OTHERS for what in ("KL", "loss")]
    yield from table(["what", "group", *head, "least KL, within two errors"], solver_rows(results))


def write(page, lines):
    """Replace what stands between the marks of the page."""
    before, _, rest = page.read_text(encoding="utf-8").partition(MARKS[0])
    _, found, after = rest.partition(MARKS[1])
    if not found:
        sys.exit(f"{page} lacks the marks {MARKS[0].strip()} and {MARKS[1].strip()}")
    page.write_text(before + MARKS[0] + "\n" + "\n".join(lines) + "\n\n" + MARKS[1] + after, encoding="utf-8")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("heldout", type=Path)
    parser.add_argument("--windows", type=int, default=16, help="of each domain")
    parser.add_argument("--page", type=Path, default=PAGE)
    arguments = parser.parse_args()
    transformers.utils.logging.set_verbosity_error()  # texts are longer than the model's context, windows are not
    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32).eval()
    ids = windows(arguments.heldout, AutoTokenizer.from_pretrained(arguments.model), arguments.windows)
    weights, reference, results = [matrix.clone() for _, matrix in matrices(model)], [], {}
    base, _ = measure(model, ids, reference)
    for key, schemes in variants(min(w.shape[1] for w in weights)):
        bits, nbytes = quantized(model, weights, schemes)
        loss, kl = measure(model, ids, reference)
        results[key] = bits, nbytes, loss, kl
        print(*key, f"KL {kl.mean():.5f}", file=sys.stderr, flush=True)
    write(arguments.page, report(results, base, ids, arguments.model.name))


if __name__ == "__main__":
    main()
