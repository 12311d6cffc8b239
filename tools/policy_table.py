#!/usr/bin/env python3
"""Print the tables of docs/simulator.md: hit rates of decoding by policy and slots, over traces of the tiny model.

python tools/policy_table.py TRACES.npz      # int8 (layers, tokens, 2) for each domain
"""

import argparse
import sys

import numpy as np

from mixoff import simulate, simulator, trace

SLOTS = (2, 3, 4, 5, 6)
ONLINE = [name for name in simulator.CODES if name not in simulator.OFFLINE]


def mean_rates(traces, policy, scope):
    """Hit rate by slots, the mean over traces."""
    return [float(np.mean([simulate(t, policy, slots, scope).hit_rate for t in traces])) for slots in SLOTS]


def uniform_like(example, seed=0):
    """A trace of the same shape whose router draws experts evenly."""
    scores = np.random.default_rng(seed).random((*example.experts.shape[:2], example.num_experts))
    return trace.Trace.from_array(np.argsort(scores, axis=2)[:, :, : example.top_k], example.num_experts)


def table(head, rows):
    """Markdown of names and numbers."""
    lines = [f"| {' | '.join(map(str, head))} |", "|" + "---|" * len(head)]
    lines += [
        f"| {name} | {' | '.join(cell if isinstance(cell, str) else f'{cell:.3f}' for cell in cells)} |"
        for name, cells in rows
    ]
    return "\n".join(lines) + "\n"


def by_policy(traces, scope):
    """Policies, then LRU on routing without order and without preference; the share of the gap closed at 4 slots."""
    lru, best = mean_rates(traces, "lru", scope), mean_rates(traces, "belady", scope)
    rows = []
    for name in [*ONLINE, *simulator.OFFLINE]:
        rates = mean_rates(traces, name, scope)
        share = (rates[2] - lru[2]) / (best[2] - lru[2])
        rows.append((f"`{name}`", [*rates, f"{100 * share:.0f} %"]))
    rows.append(("`lru`, tokens shuffled", [*mean_rates([t.shuffled() for t in traces], "lru", scope), ""]))
    rows.append(("`lru`, uniform routing", [*mean_rates([uniform_like(traces[0])], "lru", scope), ""]))
    return table(["policy", *(f"{s} slots" for s in SLOTS), "gap closed at 4"], rows)


def by_domain(domains):
    """The five domains at 4 slots a layer."""
    names = ["lru", "lfuda", "lfru", "static", "belady"]
    rows = [(name, [simulate(t, policy, 4).hit_rate for policy in names]) for name, t in domains.items()]
    return table(["domain", *(f"`{name}`" for name in names)], rows)


def main(argv=None):
    """Print all tables."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("traces", metavar="TRACES", help=".npz with an array (layers, tokens, top-k) for each domain")
    domains = trace.load_domains(parser.parse_args(argv).traces)
    trace.COMPILE_FROM = 0  # many replays of one size: compiling pays
    traces = list(domains.values())
    print(
        "One pool a layer\n",
        by_policy(traces, "layer"),
        "One pool for all layers\n",
        by_policy(traces, "global"),
        sep="\n",
    )
    print("Four slots a layer\n", by_domain(domains), sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
