"""An interactive figure: how much would you pay, and which knob moves the fewest bytes for it?

Plain HTML and SVG with one line of script, so it also works on a page without a kernel. Does not know how prices were
measured.
"""

from __future__ import annotations

import html
import json
import math
from collections.abc import Mapping

WIDTH, HEIGHT, LEFT, BOTTOM = 640, 260, 52, 40  # of the drawing, in its own units
STEPS = 60  # of the slider
ON, OFF = "#D55E00", "#56B4E9"  # Okabe and Ito's vermillion and sky

# What the slider runs: `this` is it, and `rows` are lists of name, MB per token, millinats and their error.
SCRIPT = """
const box = this.closest('[data-rows]'), rows = JSON.parse(box.dataset.rows);
const most = +this.value ? Math.pow(10, this.value / 15) - 1 : 0;
const can = rows.filter(r => r[2] <= most), best = can.reduce((a, b) => (b[1] - a[1] || b[2] - a[2]) < 0 ? b : a);
box.querySelector('output').textContent = most < 10 ? most.toFixed(1) : most.toFixed(0);
box.querySelectorAll('circle').forEach((dot, i) => {
  dot.setAttribute('fill', rows[i] === best ? '@on' : '@off'); dot.setAttribute('r', rows[i] === best ? 9 : 5);
  dot.setAttribute('fill-opacity', rows[i][2] <= most ? 1 : 0.25); });
box.querySelector('[data-answer]').textContent = `${best[0]}: ${best[1].toFixed(3)} MB per token for ` +
  `${best[2].toFixed(1)} ± ${best[3].toFixed(1)} millinats`;
"""


def cheapest(rows: Mapping[str, tuple[float, float, float]], most: float) -> str:
    """The name of the row that moves the fewest MB among those that cost at most `most` millinats.

    rows: MB per token, millinats and their standard error, by name. Raises ValueError if none is that cheap.

    >>> cheapest({"exact": (0.8, 0, 0), "skip": (0.2, 27, 2), "prune": (0, 900, 30)}, most=30)
    'skip'
    """
    affordable = {name: row[:2] for name, row in rows.items() if row[1] <= most}
    if not affordable:
        raise ValueError(f"nothing costs at most {most} millinats: give an exact row too")
    return min(affordable, key=affordable.__getitem__)  # of equals, the cheaper one


def show_prices(rows: Mapping[str, tuple[float, float, float]], value: int = 23) -> None:
    """Display the figure: a slider for the price, a dot for each row, and the best of those that can be paid.

    rows: as for `cheapest`. value: where the slider begins, 0 to STEPS; 15 steps are a factor of ten.
    """
    from IPython.display import display

    most = 10 ** (value / 15) - 1 if value else 0.0
    best = cheapest(rows, most)
    said = sentence(best, rows[best])
    table = [[name, *map(float, row)] for name, row in rows.items()]
    script = SCRIPT.replace("@on", ON).replace("@off", OFF)
    page = (
        f'<div data-rows="{html.escape(json.dumps(table))}" style="max-width: {WIDTH}px">'
        f'<label>I would pay at most <output>{most:.0f}</output> millinats<br><input type="range" min="0" '
        f'max="{STEPS}" value="{value}" style="width: 100%" aria-label="millinats at most" '
        f'oninput="{html.escape(" ".join(script.split()))}"></label>'
        f"{drawing(rows, best, most)}"
        f'<p aria-live="polite"><b data-answer>{html.escape(said)}</b></p></div>'
    )
    display({"text/html": page, "text/plain": f"For at most {most:.0f} millinats, {said}"}, raw=True)


def sentence(name: str, row: tuple[float, float, float]) -> str:
    """What a row moves and costs."""
    return f"{name}: {row[0]:.3f} MB per token for {row[1]:.1f} ± {row[2]:.1f} millinats"


def drawing(rows: Mapping[str, tuple[float, float, float]], best: str, most: float) -> str:
    """Dots over MB per token and log(1 + millinats), in SVG; each says its row when a mouse rests on it."""
    right = max(row[0] for row in rows.values()) or 1.0
    top = math.log10(1 + max(row[1] for row in rows.values())) or 1.0
    dots = []
    for name, row in rows.items():
        x = LEFT + (WIDTH - LEFT - 20) * row[0] / right
        y = (HEIGHT - BOTTOM) - (HEIGHT - BOTTOM - 20) * math.log10(1 + row[1]) / top
        look = f'fill="{ON}" r="9"' if name == best else f'fill="{OFF}" r="5"'
        shade = 1 if row[1] <= most else 0.25
        title = html.escape(sentence(name, row))
        dots.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" {look} fill-opacity="{shade}"><title>{title}</title></circle>')
    axes = f'<path d="M{LEFT} 10V{HEIGHT - BOTTOM}H{WIDTH}" fill="none" stroke="currentColor"/>'
    words = (
        f'<text x="{LEFT}" y="{HEIGHT - 14}" fill="currentColor">0</text>'
        f'<text x="{WIDTH - 16}" y="{HEIGHT - 14}" fill="currentColor" text-anchor="end">'
        f"{right:.2f} MB moved per token</text>"
        f'<text x="14" y="{HEIGHT - BOTTOM}" fill="currentColor" transform="rotate(-90 14 {HEIGHT - BOTTOM})">'
        "millinats, log →</text>"
    )
    start = f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" width="100%" role="img" aria-label="prices">'
    return f"{start}{axes}{''.join(dots)}{words}</svg>"
