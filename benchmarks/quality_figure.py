"""Draws docs/quality.svg from the tables of docs/quantization.md: bits per weight of experts against KL.

    python benchmarks/quality_figure.py [--svg docs/quality.svg]

Of each kind the line joins the rows that no other row of it beats in both bits and KL.
"""

import re
from pathlib import Path

import _table
from mixoff.classroom import plots

DOCS = Path(__file__).resolve().parents[1] / "docs"
KL = "KL, millinats"
HQQ, FREE = "hqq, without a text", "mixoff, without a text"
LLAMA, CALIBRATED = "llama.cpp, importance matrix", "mixoff, calibrated"
LOOKS = {  # colour, marker, line
    HQQ: ("orange", "s", ":"),
    FREE: ("sky", "o", "--"),
    LLAMA: ("vermillion", "^", "-."),
    CALIBRATED: ("blue", "D", "-"),
}
MOST_BITS = 4.7


def kind(name):
    """The kind of a row by its name, None for what is not drawn."""
    if name.startswith("llama.cpp"):
        return LLAMA
    if re.search(r"\brtn\b|preset|alone|16 bits", name):
        return None
    if re.fullmatch(r"\d bits g\d+ hqq", name):
        return HQQ
    return FREE if name.endswith(("lsq", "data-free")) else CALIBRATED


def tables(page):
    """The tables of a page in Markdown, each a list of rows with their columns by name."""
    for block in re.findall(r"(?:^\|.*\|$\n?){3,}", page, re.M):
        names, _, *rows = ([cell.strip() for cell in row.strip("|").split(" | ")] for row in block.splitlines())
        yield [dict(zip(["name", *names[1:]], row, strict=False)) for row in rows]


def points(page):
    """Bits and KL in millinats of every row that has both, by kind, sorted."""
    found = {name: set() for name in LOOKS}
    for row in (row for table in tables(page) for row in table if KL in row):
        bits = next((float(row[title]) for title in row if title.startswith("bits")), None)
        which = kind(row["name"].strip())
        if bits and which and bits <= MOST_BITS:
            found[which].add((bits, float(row[KL].split(" ± ")[0])))
    return {name: sorted(values) for name, values in found.items()}


def best(values):
    """Those of sorted points that no other beats in both."""
    return [(bits, kl) for i, (bits, kl) in enumerate(values) if all(kl < other for _, other in values[:i])]


def draw(found, path):
    """One panel: KL in logarithmic steps."""
    _table.use_svg()
    import matplotlib.pyplot as plt

    plots.use_style()
    fig, ax = plt.subplots(figsize=(7, 4), layout="constrained")
    for name, values in found.items():
        colour, marker, dashes = LOOKS[name]
        look = {"color": plots.OKABE_ITO[colour], "markersize": 5}
        ax.plot(*zip(*values, strict=True), marker, alpha=0.45, markeredgewidth=0, **look)
        ax.plot(*zip(*best(values), strict=True), marker=marker, linestyle=dashes, label=name, **look)
    ticks = [10, 20, 50, 100, 200, 400]
    ax.set(xlabel="bits per weight of experts, metadata included", ylabel=f"{KL} per token (measured)", yscale="log")
    ax.set_yticks(ticks, map(str, ticks))
    ax.minorticks_off()
    ax.grid(alpha=0.3)
    ax.legend(frameon=False)
    _table.save_svg(fig, path)


def main(argv=None):
    parser = _table.parser(__doc__)
    parser.add_argument("--svg", type=Path, default=DOCS / "quality.svg")
    arguments = parser.parse_args(argv)
    found = points((DOCS / "quantization.md").read_text(encoding="utf-8"))
    for name, values in found.items():
        print(f"{name}: {', '.join(f'{bits:.3f} bits {kl:.1f}' for bits, kl in best(values))}")
    draw(found, arguments.svg)


if __name__ == "__main__":
    main()
