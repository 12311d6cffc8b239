"""Time of one product with quantized weights next to the bandwidth of memory: the tables in docs/kernels.md.

    python benchmarks/kernel_table.py [--threads 1 2] [--runs 100] [--part gemv rows errors]

`gemv`: one row, weights rotating through four times the last cache (144 MiB to 1 GiB), as experts do; the probe of
read bandwidth runs before, between and after. `rows`: several rows through every kernel, which shows where they cross.
`errors`: what int8 activations cost. Prints markdown; times are the best of all runs.
"""

from __future__ import annotations

import pathlib
import time
from collections.abc import Callable

import torch

import _table
from mixoff import kernels
from mixoff.planning.probe import read_bandwidth
from mixoff.quantize.layout import packed_nbytes
from mixoff.quantize.solve import quantize
from mixoff.quantize.tensor import QTensor

SHAPES = ((14336, 4096), (4096, 14336))
FORMS = ((2, 16), (2, 32), (2, 64), (3, 64), (4, 64), (8, 64))
ROWS = (1, 2, 4, 8, 16, 32, 64, 256)
LEAST_COLD, MOST_COLD = 144 << 20, 1 << 30  # bytes of weights that rotate
CACHE = "/sys/devices/system/cpu/cpu0/cache/index3/size"  # of the last cache, as Linux tells it: "32768K"


def timed(fn: Callable[[int], object], call: int) -> float:
    """Seconds of one call; `fn` gets its number."""
    start = time.perf_counter()
    fn(call)
    return time.perf_counter() - start


def best(fn: Callable[[int], object], runs: int) -> float:
    """Seconds of the fastest of `runs` calls, after one that is not counted."""
    return _table.best(lambda i: timed(fn, i), runs)


def cold_nbytes() -> int:
    """Four times the last cache, within bounds: some virtual machines see 480 MiB, which they share with others."""
    try:
        cache = int(pathlib.Path(CACHE).read_text().strip().removesuffix("K")) << 10
    except (OSError, ValueError):
        cache = 0
    return min(max(4 * cache, LEAST_COLD), MOST_COLD)


def cold_weights(shape: tuple[int, int], bits: int, group: int, nbytes: int | None = None) -> list[QTensor]:
    """So many weights that a round through all `nbytes` or more leaves none in a cache: random codes, plain grids."""
    weights, nbytes = [], nbytes or cold_nbytes()
    for _ in range(-(-nbytes // packed_nbytes(shape, bits, group))):
        w = QTensor.empty(shape, bits, group)
        for name, part in w.parts.items():
            if part.is_floating_point():
                part.fill_(-0.02 if name == "min_top" else 0.02)
            else:
                part.view(torch.uint8).random_(0, 256)
        weights.append(w)
    return weights


def gemv_table(threads: int, runs: int) -> None:
    """Cold products of one row, both shapes and all forms, with the share of what memory gives in the same run."""
    print(f"\n{threads} thread(s), all measured\n")
    print(_table.head("weights", "shape", "ms", "GB/s", "memory reads, GB/s", "share", "fp32 activations, ms"))
    torch.set_num_threads(threads)
    for bits, group in FORMS:
        for shape in SHAPES:
            weights, x = cold_weights(shape, bits, group), torch.randn(1, shape[1])
            before = read_bandwidth(threads, rounds=2)
            took = best(lambda i, ws=weights, x=x: kernels.linear(x, ws[i % len(ws)]), runs)
            limit = max(before, read_bandwidth(threads, rounds=2))
            slow = best(lambda i, ws=weights, x=x: kernels.linear(x, ws[i % len(ws)], exact=True), runs // 10)
            rate = weights[0].nbytes / took
            cells = [f"{bits}-bit g{group}", f"{shape[0]}x{shape[1]}", f"{1e3 * took:.2f}", f"{rate / 1e9:.1f}"]
            cells += [f"{limit / 1e9:.1f}", f"{rate / limit:.0%}", f"{1e3 * slow:.1f}"]
            print(_table.line(cells), flush=True)


def rows_table(threads: int) -> None:
    """Products of several rows through each kernel, 4096x4096."""
    torch.set_num_threads(threads)
    print(f"\n4096x4096, {threads} thread(s), ms, all measured\n")
    print(_table.head("weights", "kernel", *(f"{rows} rows" for rows in ROWS)))
    for bits, group in ((2, 32), (3, 64), (4, 64), (8, 64)):
        weights = cold_weights((4096, 4096), bits, group)
        for kernel in ("int8", "fp32", "dense"):
            cells = []
            for rows in ROWS:
                x = torch.randn(rows, 4096)
                took = best(lambda i, ws=weights, x=x, k=kernel: kernels.linear(x, ws[i % len(ws)], kernel=k), 3)
                cells.append(f"{1e3 * took:.1f}")
            print(_table.line([f"{bits}-bit g{group}", kernel, *cells]), flush=True)


def error_table() -> None:
    """Relative error of int8 activations in a product with Gaussian weights and activations."""
    print("\n" + _table.head("weights", "relative error of a product, Gaussian activations (measured)"))
    for bits, group in FORMS:
        torch.manual_seed(0)
        w, x = quantize(torch.randn(1024, 1024) * 0.02, bits, group), torch.randn(16, 1024)
        true = x.double() @ w.dequantize().double().t()
        print(f"| {bits}-bit g{group} | {float((kernels.linear(x, w) - true).norm() / true.norm()):.2%} |")


def main() -> None:
    """Measure and print."""
    parser = _table.parser(__doc__)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--runs", type=int, default=100)
    parser.add_argument("--part", nargs="+", choices=("gemv", "rows", "errors"), default=["gemv", "rows", "errors"])
    arguments = parser.parse_args()
    torch.manual_seed(0)
    for threads in arguments.threads:
        if "gemv" in arguments.part:
            gemv_table(threads, arguments.runs)
    if "rows" in arguments.part:
        rows_table(1)
    if "errors" in arguments.part:
        error_table()


if __name__ == "__main__":
    main()
