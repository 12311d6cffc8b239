"""Time of one product with quantized weights, compiled and dequantized: the table in docs/benchmarks.md.

    python tools/kernel_table.py [--threads 1] [--runs 7]

The weights rotate through more memory than the caches hold, as experts do. Prints markdown; best of all runs.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch

from mixoff.kernels import cpu, reference
from mixoff.quantize import QTensor, quantize

SHAPE = (4096, 4096)
FORMS = ((2, 16), (2, 32), (2, 64), (4, 64), (8, 64))
ROWS = (1, 2, 4, 8)
COLD_NBYTES = 128 << 20


def read_bandwidth(runs: int) -> float:
    """Bytes a second of summing 256 MiB of fp32: what memory gives in this run."""
    x = torch.ones(1 << 26)
    return x.nbytes / best(lambda i: x.sum(), runs)


def best(fn: Callable[[int], object], runs: int) -> float:
    """Seconds of the fastest of `runs` calls, after one that is not counted; `fn` gets the number of the call."""
    fn(0)
    times = []
    for i in range(runs):
        start = time.perf_counter()
        fn(i + 1)
        times.append(time.perf_counter() - start)
    return min(times)


def copies(w: QTensor) -> list[QTensor]:
    """So many copies of a weight that a round through them leaves none in a cache."""
    n = -(-COLD_NBYTES // w.nbytes)
    return [
        QTensor(w.shape, w.bits, w.group_size, w.metadata_bits, {k: v.clone() for k, v in w.parts.items()})
        for _ in range(n)
    ]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--runs", type=int, default=7)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    limit = read_bandwidth(arguments.runs)
    print(f"{SHAPE[0]}x{SHAPE[1]}, {arguments.threads} thread(s), memory reads {limit / 1e9:.1f} GB/s (measured)\n")
    heads = [f"{rows} row{'s' * (rows > 1)}" for rows in ROWS]
    print(f"| weights | {' | '.join(f'{h}: compiled / dequantized, ms' for h in heads)} | 1 row: GB/s | of the limit |")
    print("|---" * (len(ROWS) + 3) + "|")
    for bits, group in FORMS:
        weights = copies(quantize(torch.randn(SHAPE) * 0.02, bits, group, solver="rtn"))
        cells = []
        for rows in ROWS:
            x = torch.randn(rows, SHAPE[1])
            compiled = best(lambda i, x=x: cpu.linear(x, weights[i % len(weights)]), arguments.runs)  # noqa: B023
            dense = best(lambda i, x=x: reference.linear(x, weights[i % len(weights)]), 3)  # noqa: B023
            cells.append(f"{1000 * compiled:.1f} / {1000 * dense:.0f}")
            if rows == 1:
                rate = weights[0].nbytes / compiled
        print(f"| {bits}-bit g{group} | {' | '.join(cells)} | {rate / 1e9:.2f} | {rate / limit:.0%} |", flush=True)


if __name__ == "__main__":
    main()
