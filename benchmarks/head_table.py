"""Prices a head in 8 or 4 bits on the bundled model: divergence from the original, on top of the preset `mixed`.

    python benchmarks/head_table.py [--windows 8]

The head is read whole for every token: 622 MB in 16 bits for Qwen3-30B-A3B, as much as 27 of its layers in `mixed`.
A tied head shares its bits with the embedding. Differences are paired window by window.
"""

import argparse
from dataclasses import replace

import torch

import _table
from mixoff import models
from mixoff.bench.budgets import resident_model
from mixoff.quality.scores import Comparison, measure, predictions, quantized, windows
from mixoff.quantize import Precision, Scheme
from mixoff.text.generation import load_tokenizer

MIXED = Scheme.preset("mixed")
HEADS = {"16 bits": None, "8 bits g64": Precision(8, 64), "4 bits g64": Precision(4, 64)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--windows", type=int, default=8, help="windows per domain")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    model, tokenizer = resident_model().float(), load_tokenizer(models.path())
    over = windows(tokenizer, models.heldout(), arguments.windows)
    reference, scores, bits = predictions(model, over), {}, {}
    for name, precision in HEADS.items():
        scheme = replace(MIXED, head=precision, embeddings=precision if model.config.tie_word_embeddings else None)
        with quantized(model, scheme) as sizes:
            scores[name] = measure(model, over, reference)
        role = "head" if "head" in sizes else "embeddings"
        bits[name] = 8 * sizes[role][0] / sizes[role][1]
    compared = Comparison(scores)
    print(_table.head("head", "bits per weight", "KL, millinats", "more than with 16 bits, paired"))
    for name in scores:
        more = compared.difference(name, next(iter(HEADS)))["kl"].scaled(1000) if HEADS[name] else "-"
        total = compared.scores[name].kl.mean().item() * 1000
        print(_table.line([name, f"{bits[name]:.2f}", f"{total:.1f}", str(more)]))


if __name__ == "__main__":
    main()
