#!/usr/bin/env python3
"""Measure what recording a trace costs: the same decoding with and without a recorder, in turns.

    python tools/trace_cost.py --rounds 9 --tokens 64

Prints the medians, and the median of the pairs' ratios with its quartiles: neighbours in time share what else the
machine does. Two runs without a recorder, taken as a pair, say how much of that is noise. The time within the recorder
itself is measured as well: it is all that recording adds, and less in the noise's hands.
"""

import argparse
import statistics
import sys
import time
from contextlib import nullcontext

import torch

import mixoff
from mixoff import models
from mixoff.trace import Recorder


def seconds(model, ids, tokens, record):
    """Time of `tokens` of greedy decoding after the first."""
    marks = []
    with model.mixoff.trace() if record else nullcontext(), Clock(model, marks):
        model.generate(ids, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False)
    return marks[-1] - marks[0]


class Timed(Recorder):
    """A recorder that adds up the time within itself, in `spent_s`."""

    spent_s = 0.0

    def _note(self, *args):
        start = time.perf_counter()
        super()._note(*args)
        self.spent_s += time.perf_counter() - start


def within(model, ids, tokens):
    """Share of decoding that is spent within the recorder, prompt included on one side only: never too small."""
    marks = []
    with Timed(model.mixoff) as recorder, Clock(model, marks):
        model.generate(ids, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False)
    return recorder.spent_s / (marks[-1] - marks[0])


class Clock:
    """Notes when each pass of a model ends."""

    def __init__(self, model, marks):
        self.handle = model.register_forward_hook(lambda *_: marks.append(time.perf_counter()))

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        self.handle.remove()


def main(argv=None):
    """Print one table of measured times."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--tokens", type=int, default=64)
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    ids, times = torch.arange(3, 9)[None], {"plain": [], "plain again": [], "recording": []}
    with mixoff.load(models.path(), fast_bytes="6MB") as model:
        seconds(model, ids, args.tokens, record=True)
        for turn in range(args.rounds):
            order = list(times) if turn % 2 else list(times)[::-1]
            for name in order:
                times[name].append(1000 * seconds(model, ids, args.tokens, name == "recording") / (args.tokens - 1))
        inside = [within(model, ids, args.tokens) for _ in range(args.rounds)]
    report(times)
    print(f"\nWithin the recorder: {statistics.median(inside):.1%} of the time of decoding (measured, median)")
    return 0


def report(times):
    """Markdown: ms a token, and the ratio to the plain run of the same turn."""
    print("| run | ms a token (measured) | over plain, median and quartiles of pairs (measured) |\n|---|---|---|")
    for name, values in times.items():
        low, middle, high = statistics.quantiles([v / p - 1 for v, p in zip(values, times["plain"], strict=True)], n=4)
        print(f"| {name} | {statistics.median(values):.2f} | {middle:+.1%} ({low:+.1%} to {high:+.1%}) |")


if __name__ == "__main__":
    sys.exit(main())
