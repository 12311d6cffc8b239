#!/usr/bin/env python3
"""Print the tables of docs/time.md: the time model fitted to the paper's Table 2, and write its figure.

python benchmarks/time_table.py                      # tables only, a minute
python benchmarks/time_table.py --svg docs/time.svg
"""

import argparse
import sys

import matplotlib

from mixoff import timeline
from mixoff.timeline import MODES, TABLE_2

SHOWN = 3  # layers of a time line
SEED = 4  # of a token whose layers miss nothing, one and two experts


def fitted(made):
    """Cells of the table: reported, modelled, error; and the error of a fit that never saw the cell."""
    lines = ["| chip | run | reported tokens/s | modelled tokens/s | error, % | error when left out, % |"]
    lines += ["|" + "---|" * 6]
    for chip, speeds in TABLE_2.items():
        for mode, reported in zip(MODES, speeds, strict=True):
            inside = made.tokens_per_s(chip, mode)
            outside = timeline.calibrate((chip, mode)).tokens_per_s(chip, mode)
            errors = " | ".join(f"{100 * (found / reported - 1):+.1f}" for found in (inside, outside))
            lines.append(f"| {chip} | {mode} | {reported:.3f} | {inside:.3f} | {errors} |")
    return "\n".join(lines)


def worst(made):
    """The largest error of a cell, in percent."""
    cells = ((chip, i, mode) for chip in TABLE_2 for i, mode in enumerate(MODES))
    return max(abs(100 * (made.tokens_per_s(chip, mode) / TABLE_2[chip][i] - 1)) for chip, i, mode in cells)


def parameters(made):
    """What was fitted, by name."""
    lines = ["| chip | compute, ms a token (fitted) | link, GB/s (fitted, but for the A100's) |", "|---|---|---|"]
    lines += [f"| {chip} | {made.compute_ms[chip]:.0f} | {made.link_GBps[chip]:.1f} |" for chip in TABLE_2]
    rates = ", ".join(f"{rate:.2f} with {slots} slots" for slots, rate in made.hit_rate.items())
    return "\n".join(lines) + (
        f"\n\nFor all chips: host {made.host_ms:.0f} ms a token, hit rate {rates}, recall of the pre-loading "
        f"{made.recall:.2f}, the naive run moves {100 * made.naive_share:.0f} % of all experts' bytes a token."
    )


def gains(made):
    """What pre-loading brings: in the paper, in the model, and in an engine with fused kernels."""
    fast = timeline.fast_engine(made)
    lines = ["| chip | reported | modelled | modelled, fused kernels |", "|---|---|---|---|"]
    for chip, speeds in TABLE_2.items():
        modelled = timeline.gain(made, chip), timeline.gain(fast, chip)
        lines.append(f"| {chip} | {speeds[0] / speeds[1]:.2f} | {modelled[0]:.2f} | {modelled[1]:.2f} |")
    return "\n".join(lines)


def draw(made, path):
    """Gains as bars, and below them three layers of a token in time lines."""
    import matplotlib.pyplot as plt

    plt.rcParams.update({"svg.hashsalt": "mixoff", "font.size": 9, "svg.fonttype": "none"})
    fast = timeline.fast_engine(made)
    rows = [("T4", made, "the paper's engine on a T4"), ("A100", made, "the paper's engine on an A100")]
    rows.append(("T4", fast, "fused kernels on a T4"))
    fig, (top, *axes) = plt.subplots(4, 1, figsize=(8, 7.2), layout="constrained", height_ratios=[2, 1, 1, 1])
    bars(top, made, fast)
    for ax, (chip, engine, title) in zip(axes, rows, strict=True):
        events = engine.step(chip, MODES[0]).events(seed=SEED)
        first = [e for e in events if 4 <= e.layer < 4 + SHOWN]
        timeline.gantt(first, ax, f"{title}: {SHOWN} layers with pre-loading ({timeline.gain(engine, chip):.2f}x)")
    fig.legend(*axes[0].get_legend_handles_labels(), ncols=5, loc="outside lower center", frameon=False)
    fig.savefig(path, metadata={"Date": None})


def bars(ax, made, fast):
    """Reported hollow, modelled filled."""
    kinds = {
        "reported": [speeds[0] / speeds[1] for speeds in TABLE_2.values()],
        "modelled": [timeline.gain(made, chip) for chip in TABLE_2],
        "modelled, fused kernels": [timeline.gain(fast, chip) for chip in TABLE_2],
    }
    looks = {"reported": ("none", ""), "modelled": ("#56B4E9", ""), "modelled, fused kernels": ("#E69F00", "//")}
    for i, (kind, values) in enumerate(kinds.items()):
        at = [x + 0.27 * (i - 1) for x in range(len(values))]
        made_bars = ax.bar(at, values, 0.25, facecolor=looks[kind][0], hatch=looks[kind][1], edgecolor="k", label=kind)
        ax.bar_label(made_bars, fmt="%.2f", fontsize=8)
    ax.set(xticks=range(len(TABLE_2)), xticklabels=TABLE_2, ylim=(0.9, 1.45), ylabel="times faster with pre-loading")
    ax.legend(frameon=False, loc="upper left")


def main(argv=None):
    """Print the tables, and write the figure where asked."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--svg", metavar="FILE", help="also write the figure")
    args = parser.parse_args(argv)
    made = timeline.calibrate()
    print(f"{made.free} parameters, 16 cells; largest error {worst(made):.1f} %\n")
    print(parameters(made), gains(made), fitted(made), sep="\n\n")
    if args.svg:
        matplotlib.use("Agg")
        draw(made, args.svg)
    return 0


if __name__ == "__main__":
    sys.exit(main())
