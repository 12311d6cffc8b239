"""The price list of chapter 13 in a browser: its one line of script names what Python does, wide or narrow."""

import pytest

from mixoff.classroom import prices

pytestmark = pytest.mark.e2e
ROWS = {"exact": (0.8, 0.0, 0.0), "skip": (0.2, 27.0, 2.0), "prune": (0.0, 900.0, 30.0), "train": (0.0, 300.0, 9.0)}


@pytest.mark.parametrize(("width", "dark"), [(1000, False), (390, True)])
def test_the_slider_names_what_python_does(new_page, monkeypatch, width, dark):
    shown = []
    monkeypatch.setattr("IPython.display.display", lambda data, raw: shown.append(data["text/html"]))
    prices.show_prices(ROWS)
    page = new_page(width, 500, dark)
    page.set_content(f"<body>{shown[0]}</body>")
    for value in (0, 10, 23, 40, 60):
        page.locator("input").evaluate(
            "(i, v) => { i.value = v; i.dispatchEvent(new Event('input', { bubbles: true })); }", value
        )
        most = 10 ** (value / 15) - 1
        best = prices.cheapest(ROWS, most)
        assert page.locator("[data-answer]").inner_text() == prices.sentence(best, ROWS[best])
        assert page.locator("circle[r='9'] title").text_content().startswith(best)
    assert page.evaluate("document.documentElement.scrollWidth") <= width and page.complaints == []
