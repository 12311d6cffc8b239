#!/usr/bin/env python3
"""Measure a model's anonymous memory beside what its plan says: python benchmarks/plan_memory.py MODEL [--fast 2GB]

The plan is made first, for a machine with that much fast memory; then the model is loaded with the plan's `fast_bytes`
in this process, reads a prompt of half the context and writes a few tokens. Linux only.
"""

import argparse
import sys
import threading
import time
from dataclasses import replace

import torch

from mixoff import hardware, loading, planner
from mixoff.units import format_nbytes, parse_nbytes

NEW_TOKENS = 4


def resident_nbytes():
    """Bytes of this process in memory: those that no file backs, and those of mapped files."""
    with open("/proc/self/status", encoding="ascii") as file:
        found = {line.split()[0]: 1024 * int(line.split()[1]) for line in file if line.startswith("Rss")}
    return found["RssAnon:"], found["RssFile:"]


class Peak(threading.Thread):
    """Looks at the memory every millisecond; `with Peak() as peak: ...`, then `peak.anonymous` and `peak.mapped`."""

    def __enter__(self):
        self.anonymous, self.mapped, self.ended = 0, 0, threading.Event()
        self.start()
        return self

    def run(self):
        while not self.ended.is_set():
            anonymous, mapped = resident_nbytes()
            self.anonymous, self.mapped = max(self.anonymous, anonymous), max(self.mapped, mapped)
            time.sleep(0.001)

    def __exit__(self, *exc):
        self.ended.set()
        self.join()


def mapped_nbytes(model):
    """Bytes of a model's tensors that lie in mapped files: pages of them are in memory once they are read."""
    with open("/proc/self/maps", encoding="ascii") as file:
        ranges = [line.split()[0].split("-") for line in file if line.rstrip().endswith(".safetensors")]
    ranges = [(int(first, 16), int(last, 16)) for first, last in ranges]
    tensors = {t.data_ptr(): t.nbytes for t in (*model.parameters(), *model.buffers())}
    return sum(n for at, n in tensors.items() if any(first <= at < last for first, last in ranges))


def warm_up(context):
    """Load and run the bundled model, so that libraries and compiled kernels are there before we count."""
    with loading.load("tiny-mixtral", "4MB", scheme="mixed") as model:
        generate(model, min(context, 256))


def generate(model, context):
    """A prompt of half the context, and a few tokens."""
    ids = torch.randint(3, model.config.vocab_size, (1, max(context // 2, 1)))
    model.generate(ids, max_new_tokens=NEW_TOKENS, do_sample=False, pad_token_id=0)


def main(argv=None):
    """Print planned and measured bytes."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model", metavar="MODEL", help="a store, a checkpoint, or a bundled model")
    parser.add_argument("--fast", default="2GB", help="the whole fast memory, without the interpreter (2GB)")
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--scheme", default=None)
    args = parser.parse_args(argv)
    machine = replace(hardware.named("laptop"), fast_bytes=parse_nbytes(args.fast), reserved_nbytes=0)
    plan = planner.plan(args.model, hardware=machine, context=args.context, scheme=args.scheme)
    torch.set_num_threads(1)
    warm_up(args.context)
    before = resident_nbytes()
    with Peak() as peak, loading.load(args.model, plan.fast_bytes, scheme=args.scheme) as model:
        generate(model, args.context)
        allocated, in_files = model.mixoff.allocated_nbytes, mapped_nbytes(model)
    anonymous, mapped = peak.anonymous - before[0], peak.mapped - before[1]
    planned = plan.tiers["fast"]
    print(f"{args.model}, {plan.scheme}, context {args.context}: {plan.slots_per_layer} slots a layer")
    print(f"planned {planned:,} bytes: {plan.bytes}, slots {allocated:,} (allocated)")
    own = planned - in_files
    print(f"anonymous: planned {own:,}, measured {anonymous:,} ({anonymous / own - 1:+.1%})")
    print(f"measured peaks: anonymous {anonymous:,}, mapped files {mapped:,}; interpreter before {before[0]:,}")
    print(f"both {format_nbytes(anonymous + mapped)}, planned {format_nbytes(planned)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
