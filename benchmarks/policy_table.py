#!/usr/bin/env python3
"""Print the tables of docs/simulator.md: hit rates and the gap closed by policy, prefetch, and the fit of routers.

python benchmarks/policy_table.py   # bundled traces; or TRACES.npz, int8 (layers, tokens, 2) by domain
"""

import sys

import numpy as np

import _table
from mixoff import jit, models, simulate
from mixoff.trace import routers, trace
from mixoff.trace.routers import Router, preset
from mixoff.trace.simulate import CODES, OFFLINE

SLOTS = (2, 3, 4, 5, 6)
ONLINE = [name for name in CODES if name not in OFFLINE]
SHAPES = {  # router, slots, seed; none of the seeds was used while `half-life` was made
    "8/2, Mixtral, 4 slots": (preset("mixtral-8x7b"), 4, 101),
    "8/2, more local, 4 slots": (Router(8, 2, 1.0, 0.97), 4, 102),
    "64/8, 16 slots": (Router(64, 8, 1.0, 0.95), 16, 103),
    "128/8, Qwen3, 16 slots": (preset("qwen3-235b"), 16, 104),
    "128/8, Qwen3, 32 slots": (preset("qwen3-235b"), 32, 105),
    "128/8, Qwen3, 64 slots": (preset("qwen3-235b"), 64, 106),
}


def mean_rates(traces, policy, scope):
    """Hit rate by slots, the mean over traces."""
    return [float(np.mean([simulate(t, policy, slots, scope).hit_rate for t in traces])) for slots in SLOTS]


def uniform_like(example, seed=0):
    """A trace of the same shape whose router draws experts evenly."""
    scores = np.random.default_rng(seed).random((*example.experts.shape[:2], example.num_experts))
    return trace.Trace.from_array(np.argsort(scores, axis=2)[:, :, : example.top_k], example.num_experts)


def table(head, rows):
    """Markdown of names and numbers."""
    printed = ([name, *(c if isinstance(c, str) else f"{c:.3f}" for c in cells)] for name, cells in rows)
    return _table.table(head, printed) + "\n"


def by_policy(traces, scope):
    """Policies, then LRU on routing without order and without preference; the share of the gap closed at 4 slots."""
    lru, best = mean_rates(traces, "lru", scope), mean_rates(traces, "belady", scope)
    rows = []
    for name in [*ONLINE, *OFFLINE]:
        rates = mean_rates(traces, name, scope)
        share = (rates[2] - lru[2]) / (best[2] - lru[2])
        rows.append((f"`{name}`", [*rates, f"{100 * share:.0f} %"]))
    rows.append(("`lru`, tokens shuffled", [*mean_rates([t.shuffled() for t in traces], "lru", scope), ""]))
    rows.append(("`lru`, uniform routing", [*mean_rates([uniform_like(traces[0])], "lru", scope), ""]))
    return table(["policy", *(f"{s} slots" for s in SLOTS), "gap closed at 4"], rows)


def by_domain(domains):
    """The five domains at 4 slots per layer, and the share of the gap that our own policy closes."""
    names, rows = ["lru", "lfuda", "lfru", "half-life", "static", "belady"], []
    for domain, t in domains.items():
        rates = {policy: simulate(t, policy, 4).hit_rate for policy in names}
        share = (rates["half-life"] - rates["lru"]) / (rates["belady"] - rates["lru"])
        rows.append((domain, [*rates.values(), f"{100 * share:.0f} %"]))
    return table(["domain", *(f"`{name}`" for name in names), "gap closed by `half-life`"], rows)


def by_shape(tokens=2_000, layers=4):
    """Share of the gap from LRU to Belady on synthetic routers, and the two hit rates that it lies between."""
    columns = {}
    for shape, (router, slots, seed) in SHAPES.items():
        scored = router.trace(tokens, layers, seed, scores=True)
        plain = trace.Trace.from_array(scored.experts, scored.num_experts)
        rates = {f"`{name}`": simulate(plain, name, slots).hit_rate for name in CODES}
        lru, best = rates["`lru`"], rates["`belady`"]
        rates["`half-life`, with scores"] = simulate(scored, "half-life", slots).hit_rate
        shares = {name: f"{100 * (rate - lru) / (best - lru):.0f} %" for name, rate in rates.items()}
        columns[shape] = {"hit rate of LRU": lru, "hit rate of Belady": best} | shares
    rows = [(name, [column[name] for column in columns.values()]) for name in next(iter(columns.values()))]
    return table(["", *columns], rows)


def by_prefetch(domains, slots=4):
    """What prefetch adds on the tiny model's traces, mean over domains: hit rate, and bytes in experts per token."""
    rows = []
    names = ["none", "next-router", "popularity", "recall=0.5", "recall=0.86", "oracle"]
    for name in names if all(t.predicted is not None for t in domains.values()) else [names[0], *names[2:]]:
        runs = [simulate(t, "lru", slots, prefetch=name, expert_nbytes=1) for t in domains.values()]
        tokens = sum(len(t) for t in domains.values())
        parts = ("bytes_moved", "prefetch_used_bytes", "prefetch_wasted_bytes")
        moved = [f"{sum(getattr(r, part) for r in runs) / tokens:.2f}" for part in parts]
        rows.append((f"`{name}`", [float(np.mean([r.hit_rate for r in runs])), *moved]))
    return table(["guesses", "hit rate", "experts moved a token", "used guesses", "wasted"], rows)


def fits():
    """Presets of routers next to what was reported."""
    rows = []
    for name, rates in (("qwen3-235b", routers.QWEN3_235B_RATES), ("glm-5.2", routers.GLM_5_2_RATES)):
        router = preset(name)
        for share, rate in rates.items():
            found = router.hit_rate(router.num_experts * share)
            rows.append((f"`{name}`, LRU hit rate, {share:.0%} resident", [f"{rate:.3f}", found]))
    repeats = preset("mixtral-8x7b").trace(12_000).repeat_rates()
    for layer, wanted in routers.MIXTRAL_REPEATS.items():
        for k, what in enumerate(("first choice", "first or second")):
            rows.append((f"`mixtral-8x7b`, layer {layer}, same {what}", [f"{wanted[k]:.3f}", float(repeats[layer, k])]))
    return table(["", "reported", "modelled"], rows)


def main(argv=None):
    """Print all tables."""
    parser = _table.parser(__doc__)
    bundled = models.path() / "traces.npz"
    parser.add_argument("traces", nargs="?", default=bundled, help=".npz of arrays (layers, tokens, top-k) by domain")
    args = parser.parse_args(argv)
    domains = trace.load_domains(args.traces)
    jit.COMPILE_FROM = 0  # many replays of one size: compiling pays
    traces = list(domains.values())
    parts = {
        "One pool per layer": by_policy(traces, "layer"),
        "One pool for all layers": by_policy(traces, "global"),
        "Four slots per layer": by_domain(domains),
        "Synthetic routers, slots per layer, share of the gap closed": by_shape(),
        "Prefetch, LRU, four slots per layer and two spare ones": by_prefetch(domains),
        "Routers": fits(),
    }
    print(*(f"{title}\n\n{text}" for title, text in parts.items()), sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
