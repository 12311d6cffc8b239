"""Measures what calibration gains: the table of docs/quantization.md.

    python benchmarks/calibration_table.py [--bits 2.515 3.05 4.26] [--folder FOLDER]

Stores of the bundled model, converted with and without calibration, read on the held-out texts with activations in
fp32. KL is that from the 16-bit model's predictions, by domain at the end of a row; seconds are of one thread.
"""

import argparse
import shutil
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch

import _table
import mixoff
from mixoff import models, quality
from mixoff.quantize import Precision, Scheme
from mixoff.text.generation import load_tokenizer

BEFORE = replace(Scheme.preset("mixed"), experts=Precision(2, 32), down=None)  # `mixed` until December 2026


def rows(bits):
    """Name, scheme and options of each row."""
    for name, scheme in (("2 bits g32", BEFORE), ("`small`", "small"), ("`mixed`", "mixed")):
        yield f"{name}, data-free", scheme, {}
        yield name, scheme, {"calibrate": "default"}
    for budget in bits:
        yield f"`--bits {budget}`", "mixed", {"calibrate": "default", "bits": budget}


def cells(folder, base, over, reference):
    """Bits per weight of experts, KL, ratio of perplexities, and KL by domain, of the store in `folder`."""
    with mixoff.load(folder, "1GiB", dtype="float32", exact=True) as model:
        sites = model.mixoff.source.sites
        taken = sum(site.num_experts * part.nbytes for site in sites for part in site.parts)
        weights = sum(site.num_experts * part.shape[0] * part.shape[1] for site in sites for part in site.parts)
        scores = quality.measure(model, over, reference)
    ratio = quality.estimate(scores.loss - base.loss).mean
    domains = " ".join(f"{1000 * kl:.0f}" for kl in scores.kl.mean(1).tolist())
    kl = quality.estimate(scores.kl).scaled(1000)
    return [f"{8 * taken / weights:.3f}", kl, f"{torch.tensor(ratio).exp():.3f}", domains], weights


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--bits", type=float, nargs="*", default=[2.515, 3.05, 4.26])
    parser.add_argument("--folder", type=Path, help="where stores are kept; a temporary folder by default")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    over = quality.windows(load_tokenizer(models.path()), models.heldout())
    with mixoff.load(models.path(), "1GiB", dtype="float32") as original:
        reference = quality.predictions(original, over)
        base = quality.measure(original, over, reference)
    names = ["experts", "bits per weight", "KL, millinats", "ratio", f"KL by domain ({', '.join(over.domains)})"]
    print(_table.head(*names, "s per million weights"))
    with tempfile.TemporaryDirectory() as temporary:
        for i, (name, scheme, options) in enumerate(rows(arguments.bits)):
            folder = (arguments.folder or Path(temporary)) / f"store-{i}"
            shutil.rmtree(folder, ignore_errors=True)
            started = time.process_time()
            mixoff.convert(models.path(), folder, scheme, jobs=1, progress=False, **options)
            seconds = time.process_time() - started
            row, weights = cells(folder, base, over, reference)
            print(_table.line([name, *row, f"{1e6 * seconds / weights:.2f}"]), flush=True)


if __name__ == "__main__":
    main()
