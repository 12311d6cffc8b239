#!/usr/bin/env python3
"""Tokens/s against slots per layer, threads and model size: docs/scaling.svg, and a table on standard output.

    python benchmarks/scaling.py FOLDER [--tokens 16] [--rounds 1] [--record FILE]    # stores of `mixoff bench --shape`
    python benchmarks/scaling.py FOLDER --draw FILE...                                # only draw what was recorded

Misses are read past the page cache (`--io direct`), so that a slot short of all is a read of the disk.
"""

import itertools
import json
import sys
from pathlib import Path

import _table
from mixoff.bench import compare, synthetic
from mixoff.classroom import plots
from mixoff.kernels import reference
from mixoff.shapes.sites import slot_nbytes, torch_dtype
from mixoff.store.source import open_source

SLOTS = (2, 4, 6, 8)
THREADS = (1, 2)
SVG = Path(__file__).parents[1] / "docs" / "scaling.svg"
MARKS = {"mixtral-700m": "o", "mixtral-3b": "s", "mixtral-8x7b": "D"}


def budget(path, slots):
    """`fast_bytes` for so many slots per layer, and not one more."""
    source = open_source(path)
    source.close()
    scratch = reference.scratch_nbytes(source.sites, torch_dtype(source.dtype))
    return slots * len(source.sites) * slot_nbytes(source.sites) + scratch


def measure(folder, shapes, tokens, rounds, record):
    """Points: shape, threads, slots, and a report each; kept after every one of them, since this takes minutes."""
    points = []
    for shape in shapes:
        path = synthetic.write_store(shape, "mixed", Path(folder) / f"{shape}-mixed")
        for threads, slots in itertools.product(THREADS, SLOTS):
            settings = compare.Settings(
                str(path), threads, 8, tokens, rounds, fast_bytes=budget(path, slots), io="direct"
            )
            report = compare.compare(settings, lambda line: print(line, file=sys.stderr))
            points.append({"shape": shape, "threads": threads, "slots": slots} | report.to_dict())
            if record:
                Path(record).write_text(json.dumps(points) + "\n", encoding="utf-8")
    return points


def table(points):
    """Markdown, measured and modelled apart."""
    names = ["model", "threads", "slots per layer of 8", "hit rate", "tokens/s (measured)", "tokens/s (modelled)"]
    rows = (
        [p["shape"], p["threads"], p["slots"], f"{p['hit_rate']:.3f}", f"{p['decode_tokens_per_s']:.2f}",
         f"{p['predicted_tokens_per_s']:.2f}", f"{p['ms_p50']:.0f} / {p['ms_p95']:.0f}"]
        for p in points
    )  # fmt: skip
    return _table.table([*names, "ms p50 / p95"], rows)


def draw(points, path):
    """Measured solid, modelled dashed; one panel per number of threads."""
    _table.use_svg()
    import matplotlib.pyplot as plt

    plots.use_style()
    kinds = {"measured": ("decode_tokens_per_s", "-"), "modelled": ("predicted_tokens_per_s", "--")}
    fig, axes = plt.subplots(1, len(THREADS), figsize=(9, 4.2), sharey=True, layout="constrained")
    for ax, threads in zip(axes, THREADS, strict=True):
        for (shape, mark), colour in zip(MARKS.items(), plots.OKABE_ITO.values(), strict=False):
            mine = [p for p in points if p["shape"] == shape and p["threads"] == threads]
            for kind, (speed, dashes) in kinds.items() if mine else ():
                marker = mark if kind == "measured" else ""
                x, y = [p["slots"] for p in mine], [p[speed] for p in mine]
                ax.plot(x, y, color=colour, linestyle=dashes, marker=marker, label=f"{shape}, {kind}")
        ax.set(title=f"{threads} thread(s)", xlabel="slots per layer, of 8", yscale="log", xticks=SLOTS)
    axes[0].set_ylabel("decoded tokens/s")
    fig.legend(*axes[-1].get_legend_handles_labels(), loc="outside lower center", ncols=len(MARKS), fontsize=8)
    _table.save_svg(fig, path)


def main(argv=None):
    parser = _table.parser(__doc__)
    parser.add_argument("folder")
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--shapes", default=",".join(MARKS))
    parser.add_argument("--record", metavar="FILE")
    parser.add_argument("--draw", metavar="FILE", nargs="+", default=[])
    args = parser.parse_args(argv)
    if args.draw:
        points = [p for file in args.draw for p in json.loads(Path(file).read_text(encoding="utf-8"))]
    else:
        points = measure(args.folder, args.shapes.split(","), args.tokens, args.rounds, args.record)
    draw(points, SVG)
    print(table(points))


if __name__ == "__main__":
    main()
