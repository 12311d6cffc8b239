"""Measures what calibration gains: the table of docs/quantization.md.

    python benchmarks/calibration_table.py [--bits 2.515 3.05 4.26] [--folder FOLDER]
    python benchmarks/calibration_table.py --llama [LIBGGML-BASE]     # llama.cpp's forms instead

Stores of the bundled model, converted with and without calibration, read on the held-out texts with activations in
fp32. KL is that from the 16-bit model's predictions, by domain at the end of a row; seconds are of one thread. Rows of
llama.cpp have the attention of a calibrated store, so that experts alone differ.
"""

import argparse
import shutil
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

import _table
import mixoff
from mixoff import models, quality
from mixoff.loading.layers import QuantizedLinear
from mixoff.quantize import Precision, Scheme
from mixoff.text import calibration as text
from mixoff.text.generation import load_tokenizer

ATTENTION = Scheme(attention=Precision(4, 64))
BEFORE = replace(Scheme.preset("mixed"), experts=Precision(2, 32), down=None)  # `mixed` until December 2026


def rows(bits):
    """Name, scheme and options of each row."""
    for name, scheme in (("2 bits g32", BEFORE), ("`small`", "small"), ("`mixed`", "mixed")):
        yield f"{name}, data-free", scheme, {}
        yield name, scheme, {"calibrate": "default"}
    for budget in bits:
        yield f"`--bits {budget}`", "mixed", {"calibrate": "default", "bits": budget}


def cells(folder, base, over, reference):
    """Columns of the store in `folder`, and the number of its experts' weights."""
    with mixoff.load(folder, "1GiB", dtype="float32", exact=True) as model:
        sites = model.mixoff.source.sites
        taken = sum(site.num_experts * part.nbytes for site in sites for part in site.parts)
        weights = sum(site.num_experts * part.shape[0] * part.shape[1] for site in sites for part in site.parts)
        scores = quality.measure(model, over, reference)
    return columns(8 * taken / weights, scores, base), weights


def columns(bits, scores, base):
    """Bits per weight of experts, KL, ratio of perplexities, and KL by domain."""
    ratio = quality.estimate(scores.loss - base.loss).mean
    domains = " ".join(f"{1000 * kl:.0f}" for kl in scores.kl.mean(1).tolist())
    kl = quality.estimate(scores.kl).scaled(1000)
    return [f"{bits:.3f}", kl, f"{torch.tensor(ratio).exp():.3f}", domains]


def ours(folder, bits, read):
    """Rows of stores, made in `folder`. read: base, windows and reference."""
    for i, (name, scheme, options) in enumerate(rows(bits)):
        store = folder / f"store-{i}"
        shutil.rmtree(store, ignore_errors=True)
        started = time.process_time()
        mixoff.convert(models.path(), store, scheme, jobs=1, progress=False, **options)
        seconds = time.process_time() - started
        row, weights = cells(store, *read)
        yield [name, *row, f"{1e6 * seconds / weights:.2f}"]


def theirs(folder, library, base, over, reference):
    """Rows of llama.cpp's forms, with importance from the text that calibrates ours."""
    import _llama

    model = AutoModelForCausalLM.from_pretrained(models.path(), dtype=torch.float32).eval()
    lib, seen = _llama.library(library), _llama.importance(model, text.read(text.DEFAULT, models.path()).ids)
    store = mixoff.convert(models.path(), folder / "attention", ATTENTION, calibrate="default", progress=False)
    with mixoff.load(store, "1GiB", dtype="float32") as calibrated:
        for name, layer in calibrated.named_modules():
            if isinstance(layer, QuantizedLinear):
                model.get_submodule(name).weight.data.copy_(layer.quantized.dequantize())
    weights = sum(w.numel() for role, w in quality.matrices(model) if role == "experts")
    for name, forms in _llama.FORMS.items():
        started = time.process_time()
        with _llama.quantized(model, lib, seen, forms) as bits:
            seconds = time.process_time() - started
            row = columns(bits, quality.measure(model, over, reference), base)
        yield [f"llama.cpp {name}", *row, f"{1e6 * seconds / weights:.2f}"]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--bits", type=float, nargs="*", default=[2.515, 3.05, 4.26])
    parser.add_argument("--folder", type=Path, help="where stores are kept; a temporary folder by default")
    words = "rows of llama.cpp instead; its libggml-base, by default that of the package llama-cpp-python"
    parser.add_argument("--llama", type=Path, nargs="?", const=Path(), metavar="FILE", help=words)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    over = quality.windows(load_tokenizer(models.path()), models.heldout())
    with mixoff.load(models.path(), "1GiB", dtype="float32") as original:
        reference = quality.predictions(original, over)
        read = quality.measure(original, over, reference), over, reference
    names = ["experts", "bits per weight", "KL, millinats", "ratio", f"KL by domain ({', '.join(over.domains)})"]
    print(_table.head(*names, "s per million weights"))
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.folder or Path(temporary)
        peer = arguments.llama is not None
        for row in theirs(folder, arguments.llama, *read) if peer else ours(folder, arguments.bits, read):
            print(_table.line(row), flush=True)


if __name__ == "__main__":
    main()
