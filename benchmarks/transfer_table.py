"""Bandwidth of transfers from a disk, beside that of plain large direct reads in the same run.

    python3 benchmarks/transfer_table.py FOLDER [--gib 2] [--rounds 5]

Writes a file of noise to FOLDER, reads experts from random places of it, and removes it. Plain reads are 64 MiB each,
one behind the other, by one thread and by as many as the transfer has. All in turns, each round with other places; the
table gives medians and best, all measured.
"""

import argparse
import os
import random
import statistics
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from mixoff.checkpoint import Extent
from mixoff.pages import pages
from mixoff.readers import DirectReader, ExpertReader, past_page_cache
from mixoff.tiers import WORKERS, open_transfer

LARGE = 64 << 20  # bytes of a plain read
SIZES = (1 << 18, 1 << 20, 4_720_000, 55_363_584)  # bytes of an expert: small ones, Qwen3-30B-A3B's and Mixtral's
IN_FLIGHT = 2  # experts at once, as a token of top-2 asks for


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--gib", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    with tempfile.NamedTemporaryFile(dir=arguments.folder, prefix=".mixoff-transfer-") as file:
        for _ in range(arguments.gib * 16):
            file.write(os.urandom(64 << 20))
        file.flush()
        os.fsync(file.fileno())
        measure(Path(file.name), arguments.gib << 30, arguments.rounds)


def measure(path: Path, nbytes: int, rounds: int) -> None:
    """Every way in turns, then a row each."""
    ways = {"plain 64 MiB, 1 thread": lambda r: plain(path, nbytes, 1, r)}
    ways[f"plain 64 MiB, {WORKERS} threads"] = lambda r: plain(path, nbytes, WORKERS, r)
    for size in SIZES:
        ways[f"transfer, experts of {size:,} B"] = lambda r, size=size: experts(path, nbytes, size, r)
    found = {name: [] for name in ways}
    for r in range(rounds):
        for name, way in ways.items():
            found[name].append(way(r))
    best = max(statistics.median(found[name]) for name in list(ways)[:2])
    print("| reads (measured) | median GB/s | best GB/s | of the plain read |\n|---|---|---|---|")
    for name, got in found.items():
        print(f"| {name} | {statistics.median(got):.2f} | {max(got):.2f} | {statistics.median(got) / best:.2f} |")


def plain(path: Path, nbytes: int, threads: int, seed: int) -> float:
    """GB/s of large direct reads at random places, without anything of ours around them."""
    fd, buffers = os.open(path, os.O_RDONLY | os.O_DIRECT), [pages(LARGE) for _ in range(threads)]
    offsets = random.Random(seed).sample(range(0, nbytes, LARGE), min(16, nbytes // LARGE))
    start = time.perf_counter()
    with ThreadPoolExecutor(threads) as pool:
        read = list(
            pool.map(lambda i: sum(os.preadv(fd, [buffers[i]], at) for at in offsets[i::threads]), range(threads))
        )
    took = time.perf_counter() - start
    os.close(fd)
    return sum(read) / took / 1e9


def experts(path: Path, nbytes: int, size: int, seed: int) -> float:
    """GB/s of a transfer that has two experts on their way at any time, 1 GiB in all."""
    stride = -(-size // 4096) * 4096
    count = nbytes // stride
    extents = {(0, e): [Extent(path.name, e * stride, 0, size)] for e in range(count)}
    reader = past_page_cache(ExpertReader(path.parent, extents), WORKERS)
    assert isinstance(reader, DirectReader), "this filesystem has no direct I/O: choose another folder"
    transfer = open_transfer(reader, [memoryview(pages(stride)) for _ in range(IN_FLIGHT)], [size])
    order = random.Random(seed).sample(range(count), min(count, max((1 << 30) // size, IN_FLIGHT)))
    start = time.perf_counter()
    for slot in range(IN_FLIGHT):
        transfer.fetch((0, order[slot]), slot)
    for e in order[IN_FLIGHT:]:
        transfer.fetch((0, e), transfer.wait(range(IN_FLIGHT)).slot)
    for slot in range(IN_FLIGHT):
        transfer.wait([slot])
    took = time.perf_counter() - start
    transfer.close()
    reader.close()
    return len(order) * size / took / 1e9


if __name__ == "__main__":
    main()
