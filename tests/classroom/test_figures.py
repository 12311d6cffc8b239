"""Figures that can be read on white and on black pages, with captions and alternative texts that reach the page."""

import base64
import html
import io
import re

import matplotlib
import numpy as np
import pytest

matplotlib.use("Agg")

from matplotlib.colors import to_rgb
from PIL import Image

import badges
import chapter_rules
import nb
from mixoff.classroom import plots, show
from mixoff.planning import plan

WCAG = 3.0  # the least contrast of a graphical object: Web Content Accessibility Guidelines 2.1, 1.4.11
MARKS = {
    **plots.OKABE_ITO,
    "ink": plots.INK,
    "line": plots.LINE,
    **{name: colour for name, _, colour in plots.STATES if colour != "none"},
    **{f"time line: {kind}": colour for kind, (colour, _) in plots.LOOKS.items()},
    **{f"plan: {part}": colour for part, colour in plan.COLOURS.items()},
}


def luminance(colour):
    """Relative luminance by WCAG 2.1."""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in to_rgb(colour)]
    return float(np.dot(linear, (0.2126, 0.7152, 0.0722)))


def contrast(one, other):
    """From 1 to 21."""
    dark, light = sorted((luminance(one), luminance(other)))
    return (light + 0.05) / (dark + 0.05)


def test_contrast_is_that_of_the_guidelines():
    assert contrast("white", "black") == pytest.approx(21) and contrast("#767676", "white") == pytest.approx(
        4.54, abs=0.01
    )


@pytest.mark.parametrize("page", plots.THEMES.values(), ids=plots.THEMES)
@pytest.mark.parametrize("colour", MARKS.values(), ids=MARKS)
def test_every_mark_stands_out_from_the_page(colour, page):
    assert contrast(colour, page) >= WCAG


def test_text_stands_out_more():
    """4.5:1 on white; no grey has that on black pages too."""
    assert (
        contrast(plots.INK, "white") >= 4.5 and min(contrast(plots.INK, page) for page in plots.THEMES.values()) > 3.6
    )


def test_letters_and_hatches_stand_out_from_what_they_are_on():
    for _, letter, colour in plots.STATES:
        assert not letter or colour == "none" or contrast("white", colour) >= WCAG
    assert all(contrast("black", colour) >= WCAG for colour, _ in plots.LOOKS.values())
    assert all(contrast("white", colour) >= WCAG for colour in plots.OKABE_ITO.values())


def test_chapters_draw_with_these_colours_alone():
    """A colour written into a chapter would escape the tests above; white is for what is written on a bar."""
    literal = re.compile(r"""["'](?:#[0-9A-Fa-f]{3,8}|black|gr[ae]y|[.os^v-]*k[-.:os^v]*)["']""")
    for path in badges.chapters():
        for i, cell in chapter_rules.code_cells(nb.read(path)):
            if "figure" in chapter_rules.tags(cell):
                assert not literal.findall(cell.source), f"{path.name}, cell {i}"


@pytest.fixture
def shown(monkeypatch):
    """What would have been displayed."""
    found = []
    monkeypatch.setattr("IPython.display.display", lambda data, raw: found.append(data))
    return found


def pixels(page):
    """The image inside an HTML figure, (height, width, 4)."""
    data = re.search(r"data:image/png;base64,([A-Za-z0-9+/=]+)", page)[1]
    return np.array(Image.open(io.BytesIO(base64.b64decode(data))).convert("RGBA"))


def test_show_gives_image_caption_and_alternative_text_in_one_piece(shown):
    plots.use_style()
    fig = plots.byte_bars({"experts": 6.0, "rest": 2.0}, {"limit": 3.0}, "MB")
    show(fig, "Experts < all", alt='A "bar"')
    (data,) = shown
    assert set(data) == {"text/html", "text/plain"} and data["text/plain"] == "Experts < all"
    assert f'alt="{html.escape(chr(65) + " " + chr(34) + "bar" + chr(34))}"' in data["text/html"]
    assert "<figcaption" in data["text/html"] and "Experts &lt; all</em></figcaption>" in data["text/html"]
    assert not matplotlib.pyplot.fignum_exists(fig.number), "a closed figure is not shown twice"
    image = pixels(data["text/html"])
    assert (image[[0, 0, -1, -1], [0, -1, 0, -1], 3] == 0).all(), "the page is seen through it"
    assert 0.5 < (image[..., 3] == 0).mean() < 1


@pytest.mark.parametrize("path", badges.chapters(), ids=lambda path: path.stem)
def test_stored_figures_have_no_background_and_a_text_of_their_own(path):
    figures = [output for _, cell in chapter_rules.code_cells(nb.read(path)) for output in chapter_rules.figures(cell)]
    assert len(figures) >= 2
    for output in figures:
        page = output.data["text/html"]
        alt, caption = re.search(r'alt="([^"]{20,})"', page)[1], html.escape(output.data["text/plain"])
        assert caption in page and alt != caption, "the alternative text says what is drawn, the caption what it means"
        assert (pixels(page)[..., 3] == 0).mean() > 0.2


def test_states_differ_without_colour():
    """By letter, and what has none by lightness too, for readers who see no colours and for printers."""
    letters = [letter for _, letter, _ in plots.STATES if letter]
    assert len(set(letters)) == len(letters) == 4
    states = plots.STATES[: plots.MISS + 1]  # a prefetched or evicted expert is told by its letter alone
    fills = ["white" if colour == "none" else colour for _, _, colour in states]
    lightness = sorted(np.dot(to_rgb(colour), (0.299, 0.587, 0.114)) for colour in fills)
    assert min(np.diff(lightness)) > 0.08


def test_grids_are_drawn_with_a_letter_for_each_hit_and_miss():
    grid = np.array([[plots.HIT, plots.MISS, plots.AWAY], [plots.RESIDENT, plots.MISS, plots.AWAY]])
    fig = plots.expert_grids([grid, grid], ["token 1", "token 2"], columns=2)
    for ax in fig.axes:
        assert sorted(t.get_text() for t in ax.texts if t.get_text()) == ["M", "M", "h"]
    matplotlib.pyplot.close(fig)


def test_the_picture_of_a_cache_has_a_shelf_slots_and_what_is_asked_for():
    fig = plots.tiers_picture(range(8), [2, 5, 1], asked=7, below={2: "next in 3"})
    words = [text.get_text() for text in fig.axes[0].texts]
    assert words.count("2") == 2 and words.count("7") == 1 and "next in 3" in words
    assert {"link", "the router asks for expert 7", "fast tier: 3 slots"} <= set(words)
    matplotlib.pyplot.close(fig)
