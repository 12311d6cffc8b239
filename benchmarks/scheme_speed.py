"""Measures how fast experts in different forms decode: stores of one shape, in turns.

    python benchmarks/scheme_speed.py [--shape mixtral-3b] [--tokens 16] [--rounds 9]

Everything is resident and weights are random, so that only the forms differ. The first row is the preset `mixed` as it
was until December 2026. One thread computes, and its CPU time is taken, so that other work on the machine disturbs
little. Shares are of the first row.
"""

import argparse
import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch

import _table
import mixoff
from calibration_table import BEFORE
from mixoff.bench import synthetic
from mixoff.quantize import Precision, Scheme

MIXED = Scheme.preset("mixed")
FORMS = {
    "2 bits g32": BEFORE,
    "`mixed`: 2 bits g64, down 3 bits g64 rotated": MIXED,
    "the same, not rotated": replace(MIXED, down=Precision(3, 64)),
    "`small`: 2 bits g64, down rotated": Scheme.preset("small"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", default="mixtral-3b")
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=9)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary:
        models, sizes = {}, {}
        for i, (name, scheme) in enumerate(FORMS.items()):
            folder = synthetic.write_store(arguments.shape, scheme, Path(temporary) / str(i))
            models[name] = mixoff.load(folder, "100GiB")
            sites = models[name].mixoff.source.sites
            sizes[name] = sum(site.num_experts * site.expert_nbytes for site in sites)
        rates = {name: [] for name in FORMS}
        for round_number in range(arguments.rounds + 1):
            for name, model in models.items():
                rate = speed(model, arguments.tokens)
                if round_number:  # the first compiles
                    rates[name].append(rate)
    print(_table.head("experts", "GB", "share of bytes", "tokens per CPU second, best", "median", "share of the best"))
    first, *_ = FORMS
    for name, found in rates.items():
        share = max(found) / max(rates[first])
        cells = [f"{sizes[name] / 1e9:.2f}", f"{sizes[name] / sizes[first]:.3f}", f"{max(found):.2f}"]
        print(_table.line([name, *cells, f"{statistics.median(found):.2f}", f"{share:.3f}"]))


def speed(model: torch.nn.Module, tokens: int) -> float:
    """Tokens per second of CPU time, greedy decoding."""
    ids = torch.arange(5, 13)[None]
    model.generate(ids, max_new_tokens=2, do_sample=False)
    started = time.process_time()
    model.generate(ids, max_new_tokens=2 + tokens, min_new_tokens=2 + tokens, do_sample=False)
    return (2 + tokens) / (time.process_time() - started)


if __name__ == "__main__":
    main()
