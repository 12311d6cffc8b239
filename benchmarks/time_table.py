#!/usr/bin/env python3
"""Prints the tables of docs/time.md, the time model fitted to the paper's Table 2, and writes its figure.

python benchmarks/time_table.py                      # tables only, a minute
python benchmarks/time_table.py --svg docs/time.svg
"""

import sys

import _table
from mixoff.classroom import plots, table2
from mixoff.classroom.table2 import MODES, TABLE_2

SHOWN = 3  # layers of a time line
SEED = 4  # of a token whose layers miss nothing, one and two experts


def fitted(made):
    """Every cell of Table 2 as reported and modelled, and the error of a fit that left the cell out."""
    for chip, speeds in TABLE_2.items():
        for mode, reported in zip(MODES, speeds, strict=True):
            inside = made.tokens_per_s(chip, mode)
            outside = table2.calibrate((chip, mode)).tokens_per_s(chip, mode)
            errors = (f"{100 * (speed / reported - 1):+.1f}" for speed in (inside, outside))
            yield [chip, mode, f"{reported:.3f}", f"{inside:.3f}", *errors]


def worst(made):
    """The largest error of a cell, in percent."""
    cells = ((chip, i, mode) for chip in TABLE_2 for i, mode in enumerate(MODES))
    return max(abs(100 * (made.tokens_per_s(chip, mode) / TABLE_2[chip][i] - 1)) for chip, i, mode in cells)


def parameters(made):
    """What was fitted, by name."""
    rows = ([chip, f"{made.compute_ms[chip]:.0f}", f"{made.link_GBps[chip]:.1f}"] for chip in TABLE_2)
    rates = ", ".join(f"{rate:.2f} with {slots} slots" for slots, rate in made.hit_rate.items())
    return _table.table(["chip", "compute, ms per token (fitted)", "link, GB/s (fitted, but for the A100's)"], rows) + (
        f"\n\nFor all chips: host {made.host_ms:.0f} ms per token, hit rate {rates}, recall of the pre-loading "
        f"{made.recall:.2f}, the naive run moves {100 * made.naive_share:.0f} % of all experts' bytes per token."
    )


def gains(made, fast):
    """Speed-up by pre-loading, by chip: in the paper, in the model, and in an engine with fused kernels."""
    return {
        "reported": [speeds[0] / speeds[1] for speeds in TABLE_2.values()],
        "modelled": [table2.gain(made, chip) for chip in TABLE_2],
        "modelled, fused kernels": [table2.gain(fast, chip) for chip in TABLE_2],
    }


def draw(made, fast, path):
    """Gains as bars, and below them three layers of a token in time lines."""
    _table.use_svg()
    import matplotlib.pyplot as plt

    rows = [("T4", made, "the paper's engine on a T4"), ("A100", made, "the paper's engine on an A100")]
    rows.append(("T4", fast, "fused kernels on a T4"))
    fig, (top, *axes) = plt.subplots(4, 1, figsize=(8, 7.2), layout="constrained", height_ratios=[2, 1, 1, 1])
    bars(top, gains(made, fast))
    for ax, (chip, engine, title) in zip(axes, rows, strict=True):
        events = engine.step(chip, MODES[0]).events(seed=SEED)
        first = [e for e in events if 4 <= e.layer < 4 + SHOWN]
        plots.gantt(first, ax, f"{title}: {SHOWN} layers with pre-loading ({table2.gain(engine, chip):.2f}x)")
    fig.legend(*axes[0].get_legend_handles_labels(), ncols=5, loc="outside lower center", frameon=False)
    _table.save_svg(fig, path)


def bars(ax, kinds):
    """Reported hollow, modelled filled."""
    looks = [("none", ""), ("#56B4E9", ""), ("#E69F00", "//")]
    for i, ((kind, values), (colour, hatch)) in enumerate(zip(kinds.items(), looks, strict=True)):
        at = [x + 0.27 * (i - 1) for x in range(len(values))]
        drawn = ax.bar(at, values, 0.25, facecolor=colour, hatch=hatch, edgecolor="k", label=kind)
        ax.bar_label(drawn, fmt="%.2f", fontsize=8)
    ax.set(xticks=range(len(TABLE_2)), xticklabels=TABLE_2, ylim=(0.9, 1.45), ylabel="times faster with pre-loading")
    ax.legend(frameon=False, loc="upper left")


def main(argv=None):
    """Print the tables, and write the figure where asked."""
    parser = _table.parser(__doc__)
    parser.add_argument("--svg", metavar="FILE", help="also write the figure")
    args = parser.parse_args(argv)
    made = table2.calibrate()
    fast, errors = table2.fast_engine(made), ["error, %", "error when left out, %"]
    print(f"{made.free} parameters, 16 cells; largest error {worst(made):.1f} %\n\n{parameters(made)}\n")
    by_chip = zip(TABLE_2, *([f"{gain:.2f}" for gain in kind] for kind in gains(made, fast).values()), strict=True)
    print(_table.table(["chip", *gains(made, fast)], by_chip), end="\n\n")
    print(_table.table(["chip", "run", "reported tokens/s", "modelled tokens/s", *errors], fitted(made)))
    if args.svg:
        draw(made, fast, args.svg)
    return 0


if __name__ == "__main__":
    sys.exit(main())
