"""The interactive price list: what it says without a script, and that its data is what it was given."""

import html
import json
import re
from xml.etree import ElementTree

import pytest

from mixoff.classroom import prices

ROWS = {"exact": (0.8, 0.0, 0.0), "<skip> & 'wait'": (0.2, 27.0, 2.0), "prune": (0.0, 900.0, 30.0)}


@pytest.fixture
def shown(monkeypatch):
    found = []
    monkeypatch.setattr("IPython.display.display", lambda data, raw: found.append(data))
    return found


@pytest.mark.parametrize(("value", "best"), [(0, "exact"), (23, "<skip> & 'wait'"), (60, "prune")])
def test_it_begins_with_the_best_that_can_be_paid(shown, value, best):
    prices.show_prices(ROWS, value)
    page, text = shown[0]["text/html"], shown[0]["text/plain"]
    assert best in text and html.escape(best) in page and f'value="{value}"' in page
    assert json.loads(html.unescape(re.search(r'data-rows="(.*?)"', page)[1])) == [[n, *row] for n, row in ROWS.items()]
    drawing = ElementTree.fromstring(re.search(r"<svg.*</svg>", page)[0])
    dots = drawing.findall("circle")
    assert len(dots) == 3 and [d.get("r") for d in dots].count("9") == 1
    assert best in next(d.find("title").text for d in dots if d.get("r") == "9")
    assert [float(d.get("fill-opacity")) < 1 for d in dots] == [row[1] > 10 ** (value / 15) for row in ROWS.values()]


def test_the_script_computes_what_python_does(shown):
    """The same formula for the price, and the same comparison; no script element, no address of another site."""
    prices.show_prices(ROWS)
    page = shown[0]["text/html"]
    assert "<script" not in page and "http" not in page and "this.value / 15" in html.unescape(page)
    assert "r[2] &lt;= most" in page
