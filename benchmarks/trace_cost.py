#!/usr/bin/env python3
"""Measure what recording a trace costs: neighbouring tokens of one text, with and without a recorder.

    python benchmarks/trace_cost.py --triples 600

Of three tokens in a row one is recorded, and two are not, in an order that is drawn for each triple. A ratio of two
neighbours does not care how fast the machine is just then; the median of all ratios and its standard error (bootstrap)
are printed. The ratio of the two that were not recorded should be 1.
"""

import argparse
import sys
import time

import numpy as np
import torch

import mixoff
from mixoff import models
from mixoff.generation import advance

CONTEXT = 240  # tokens, then a new text begins
DRAWS = 2000  # of the bootstrap


class Text:
    """Feeds a model token by token."""

    def __init__(self, model, seed=0):
        self.model, self.rng, self.cache, self.length = model, np.random.default_rng(seed), None, CONTEXT

    def step(self):
        """Seconds of one token."""
        if self.length >= CONTEXT:
            self.cache, self.length = None, 0
            self._pass()
        start = time.perf_counter()
        self._pass()
        return time.perf_counter() - start

    def _pass(self):
        ids = torch.from_numpy(self.rng.integers(300, self.model.config.vocab_size, (1, 1)))
        _, self.cache = advance(self.model, ids, self.cache)
        self.length += 1


def triple(text, recorder, rng):
    """Seconds of a token that was recorded, and of two that were not; float (3,)."""
    seconds = np.empty(3)
    for kind in rng.permutation(3):
        if kind == 0:
            with recorder:
                seconds[kind] = text.step()
        else:
            seconds[kind] = text.step()
    return seconds


def report(name, ratios, rng):
    """A row: median, its standard error, quartiles, all in percent."""
    drawn = np.median(rng.choice(ratios, (DRAWS, len(ratios))), 1)
    low, middle, high = 100 * (np.percentile(ratios, (25, 50, 75)) - 1)
    print(f"| {name} | {middle:+.2f} % | {100 * drawn.std():.2f} | {low:+.1f} to {high:+.1f} % |")


def main(argv=None):
    """Print one table of measured ratios."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--triples", type=int, default=600)
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    rng = np.random.default_rng(1)
    with torch.inference_mode(), mixoff.load(models.path(), fast_bytes="6MB") as model:
        text, recorder = Text(model), model.mixoff.trace()
        for _ in range(20):
            triple(text, recorder, rng)
        seconds = np.stack([triple(text, recorder, rng) for _ in range(args.triples)])  # (triples, 3)
    print(f"{args.triples} triples; a token takes {1000 * np.median(seconds[:, 1:]):.1f} ms (measured, median)\n")
    print("| tokens compared (measured) | median of ratios | its standard error | quartiles |\n|---|---|---|---|")
    report("recorded, with not recorded", seconds[:, 0] / seconds[:, 1], rng)
    report("not recorded, with each other", seconds[:, 1] / seconds[:, 2], rng)
    return 0


if __name__ == "__main__":
    sys.exit(main())
