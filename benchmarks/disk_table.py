#!/usr/bin/env python3
"""Print the table of direct reads in docs/benchmarks.md: GB/s by size of a request and requests in flight.

python benchmarks/disk_table.py FOLDER [--rounds 3]
"""

import argparse

from mixoff import hardware

REQUESTS = (128 << 10, 1 << 20, 4 << 20, 16 << 20)
DEPTHS = (1, 2, 4, 8)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder")
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args(argv)
    best = dict.fromkeys(((r, d) for r in REQUESTS for d in DEPTHS), 0.0)
    for _ in range(args.rounds):  # in turns, so that a noisy minute does not hit one of them alone
        for request, depth in best:
            best[request, depth] = max(best[request, depth], hardware.disk_bandwidth(args.folder, request, depth))
    print("| request | " + " | ".join(f"{depth} in flight" for depth in DEPTHS) + " |")
    print("|" + "---|" * (len(DEPTHS) + 1))
    for request in REQUESTS:
        cells = [f"{best[request, depth] / 1e9:.2f}" for depth in DEPTHS]
        print(f"| {request >> 10} KiB | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
