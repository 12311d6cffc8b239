"""The course site and the slides: built once, followed link by link, and opened from the disk as their readers do."""

import re

import pytest

import badges
import chapter_rules
import widget_states
from widget_page import contrasts

pytestmark = pytest.mark.e2e

STORED = re.compile(r"(\d+) tokens: (\d+) hits, (\d+) misses")


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """Folder of a site that was just built; a warning fails the build."""
    pytest.importorskip("myst_nb", reason="the extra site is not installed")
    import make_site

    out = tmp_path_factory.mktemp("course") / "site"
    assert make_site.build(out) == 0
    return out


@pytest.fixture
def open_page(site, new_page):
    """A function that opens a page of the site from the disk, and notes complaints and whatever asks a network."""

    def open_file(name, theme="light"):
        page = new_page(1300, 1000, theme == "dark")
        local = ("file:", "data:", "blob:")
        page.on("request", lambda r: None if r.url.startswith(local) else page.complaints.append(r.url))
        page.goto((site / name).as_uri())
        return page

    return open_file


# ---------------------------------------------------------------- pages


def test_every_chapter_has_a_page_and_a_deck(site):
    for path in badges.chapters():
        page = (site / "notebooks" / f"{path.stem}.html").read_text(encoding="utf-8")
        assert "Open in Colab" in page and f"../slides/{path.stem}.html" in page
        assert (site / "slides" / f"{path.stem}.html").exists()
    for name in ("index", "docs/glossary", "docs/teach", "docs/schedule", "docs/benchmarks"):
        assert (site / f"{name}.html").exists()


def test_links_inside_lead_somewhere_and_nothing_is_loaded_from_a_network(site):
    import links

    found = links.check(site)
    assert found.problems == [] and found.internal > 300
    assert badges.colab_link("00_start_here.ipynb") in found.external
    for style in site.rglob("*.css"):
        assert not re.search(r"(?:url\(|@import)\s*[\"']?(?:https?:)?//", style.read_text(encoding="utf-8")), style


def test_the_check_of_links_sees_each_kind_of_fault(tmp_path):
    import links

    (tmp_path / "b.html").write_text('<h1 id="there">B</h1>')
    (tmp_path / "a.html").write_text("""
        <a href="b.html#there">good</a> <a href="b.html">good</a> <a href="https://example.invalid/x">outside</a>
        <a href="c.html">no file</a> <a href="b.html#gone">no place</a> <script src="https://cdn.invalid/x.js"></script>
    """)
    found = links.check(tmp_path)
    assert found.problems == [
        "a.html: c.html leads to no file",
        "a.html: b.html#gone leads to no place in b.html",
        "a.html loads https://cdn.invalid/x.js from a network",
    ]
    assert found.external == ["https://example.invalid/x"]


def test_links_of_the_repository_become_links_of_the_site(site):
    import make_site

    shown = make_site.places()
    made = make_site.relink("[a](../notebooks/01_router.ipynb) [b](kernels.md#limit)", "docs/glossary.md", shown)
    assert made == "[a](../notebooks/01_router.ipynb) [b](kernels.md#limit)"
    assert make_site.relink("[a](kernels.md)", "docs/index.md", shown) == "[a](docs/kernels.md)"
    made = make_site.relink("[a](../go.py) [b](https://x.invalid/a) [c](gone.md)", "docs/index.md", shown)
    assert made == f"[a]({badges.repository()}/blob/main/go.py) [b](https://x.invalid/a) [c](gone.md)"


def test_chapters_show_stored_outputs_folded_solutions_and_described_figures(site):
    page = (site / "notebooks" / "09_live_cache.html").read_text(encoding="utf-8")
    assert STORED.search(page) and "Show the solution" in page
    images = re.findall(r"<img[^>]*>", page)
    assert len(images) >= 3 and all(re.search(r'alt="[^"]{20,}"', image) for image in images)
    assert "Notes for instructors" in page and "<math" in (site / "notebooks" / "04_hqq.html").read_text("utf-8")


def test_state_of_widgets_is_of_the_same_run_as_the_outputs():
    import nb

    shown = [path for path in badges.chapters() if list(widget_states.views(nb.read(path)))]
    assert {"08_cache_policies", "09_live_cache"} <= {path.stem for path in shown}
    assert [problem for path in shown for problem in widget_states.problems(nb.read(path), path)] == []


# ---------------------------------------------------------------- widgets without a kernel


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_replay_lives_in_a_page_from_the_disk(open_page, theme):
    page = open_page("notebooks/09_live_cache.html", theme)
    view = page.locator(".mixoff-cache")
    tokens, hits, misses = map(int, STORED.search(page.locator("pre", has_text="tokens:").first.inner_text()).groups())
    assert [view.get_attribute(f"data-{name}") for name in ("tokens", "hits", "misses")] == [
        *map(str, (tokens, hits, misses))
    ]
    view.locator(".scrub").evaluate("e => { e.value = 10; e.dispatchEvent(new Event('input')); }")
    view.locator(".step").click()
    assert view.get_attribute("data-token") == "11"
    view.locator(".scrub").focus()
    page.keyboard.press("ArrowLeft")
    assert view.get_attribute("data-token") == "10"
    view.locator(".speed").select_option("30")
    view.locator(".play").click()
    page.wait_for_function(f"() => document.querySelector('.mixoff-cache').dataset.token === '{tokens - 1}'")
    assert view.get_attribute("data-hits") == str(hits)
    assert ("mixoff-dark" in view.get_attribute("class")) == (theme == "dark")
    assert page.complaints == []


def test_widgets_follow_the_page_from_light_to_dark(open_page):
    page = open_page("notebooks/09_live_cache.html")
    view, paper = page.locator(".mixoff-cache"), "e => getComputedStyle(e).backgroundColor"
    before = view.evaluate(paper)
    page.evaluate("() => { document.body.dataset.theme = 'dark'; }")  # what Furo's button does
    page.wait_for_function("() => document.querySelector('.mixoff-cache').classList.contains('mixoff-dark')")
    assert view.evaluate(paper) != before
    page.evaluate("() => { document.body.dataset.theme = 'auto'; }")
    page.wait_for_function("() => !document.querySelector('.mixoff-cache').classList.contains('mixoff-dark')")
    page.emulate_media(color_scheme="dark")
    page.wait_for_function("() => document.querySelector('.mixoff-cache').classList.contains('mixoff-dark')")


def test_stepper_lives_in_a_page_from_the_disk(open_page):
    page = open_page("notebooks/08_cache_policies.html")
    stepper = page.locator(".mixoff-stepper")
    assert stepper.get_attribute("data-policy") == "lru", "policies keep their order"
    while stepper.locator(".step").is_enabled():
        stepper.locator(".step").click()
        if stepper.get_attribute("data-asking") == "true":
            stepper.locator(".slots button").first.click()
    assert stepper.get_attribute("data-hits") == "3" and "guesses right" in stepper.inner_text()
    assert page.complaints == []


def test_the_race_runs_in_a_page_from_the_disk(open_page):
    page = open_page("notebooks/00_start_here.html")
    race = page.locator(".mixoff-race")
    race.get_by_role("combobox", name="speed").select_option("4")
    race.get_by_role("button", name="Start the race").focus()
    page.keyboard.press("Enter")
    page.wait_for_function("() => document.querySelectorAll('.mixoff-race .pane.done').length === 3")
    assert race.locator(".pane").first.get_attribute("class") == "pane", "without a cache it still types"
    assert page.locator(".mixoff-cache").get_attribute("data-mode") == "replay" and page.complaints == []


EXPERIMENTS = {
    "01_router": (".mixoff-swap", "rank of one expert", "ranks"),
    "03_quantization": (".mixoff-outlier", "value of the outlier", "scale"),
}


@pytest.mark.parametrize("chapter", EXPERIMENTS)
def test_experiments_answer_in_a_page_from_the_disk(open_page, chapter):
    root, slider, figure = EXPERIMENTS[chapter]
    page = open_page(f"notebooks/{chapter}.html")
    before = page.locator(root).get_attribute(f"data-{figure}")
    page.locator(root).get_by_role("slider", name=slider).focus()
    page.keyboard.press("End")
    assert page.locator(root).get_attribute(f"data-{figure}") != before and page.complaints == []


def test_a_vote_is_held_in_a_page_from_the_disk(open_page):
    page = open_page("notebooks/05_mixed_quantization.html")
    for _ in range(8):
        page.locator(".mixoff-vote").get_by_role("button", name="Left").click()
        if page.locator(".mixoff-vote .next").is_enabled():
            page.locator(".mixoff-vote .next").click()
    assert page.locator(".mixoff-vote").get_attribute("data-right") == "4", "half of the sides are left"


def test_what_asks_a_kernel_is_a_still_picture_and_says_so(open_page):
    page = open_page("notebooks/02_vram_arithmetic.html")
    explorer = page.locator(".mixoff-explorer")
    assert explorer.locator("input:visible, select:visible").count() == 0 and explorer.locator(".tier").count() == 3
    assert page.locator(".widget-note").bounding_box()["y"] < explorer.bounding_box()["y"]
    assert "A still picture" in page.locator(".widget-note").inner_text() and page.complaints == []


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("chapter", ["00_start_here", "08_cache_policies", "09_live_cache"])
def test_widgets_of_the_site_have_marks_that_stand_out_on_a_telephone_too(site, new_page, chapter, theme):
    page = new_page(390, 800, theme == "dark")
    page.goto((site / f"notebooks/{chapter}.html").as_uri())
    roots = page.locator(".mixoff").evaluate_all("es => es.map(e => `.${e.classList[0]}`)")
    assert roots
    for root in roots:
        found = contrasts(page, root)
        assert {name: x for name, x in found.items() if x < 3} == {}, root
        assert page.locator(root).evaluate("e => e.scrollWidth <= e.clientWidth && e.clientWidth <= 390"), root


# ---------------------------------------------------------------- slides

OUTSIDE = """() => Reveal.getSlides().filter(s => { Reveal.slide(Reveal.getIndices(s).h);
    return s.scrollHeight > 730 || s.scrollWidth > 1110; }).map(s => s.innerText.slice(0, 60))"""


def test_no_slide_is_a_bare_heading_and_exercises_have_their_contract():
    pytest.importorskip("nbconvert", reason="the extra site is not installed")
    import nb
    import slides

    for path in badges.chapters():
        cells, chapter = slides.deck(nb.read(path)).cells, nb.read(path)
        for cell, following in zip(cells, [*cells[1:], None], strict=True):
            bare = len([line for line in cell.source.splitlines() if line.strip()]) < 2
            goes_on = following is not None and following.metadata.slideshow.slide_type == "-"
            assert not bare or goes_on or cell.cell_type == "code" or cell.source.startswith("<pre>"), cell.source
        text = "\n".join(cell.source for cell in cells)
        for i in chapter_rules.tagged(chapter, "exercise"):
            name = re.search(r"`[^`]+`", chapter.cells[i - 1].source.rpartition("### ")[2])[0]
            assert name in text, f"{path.name}: the contract of {name}"
    roofline = slides.deck(nb.read(next(path for path in badges.chapters() if path.name.startswith("10"))))
    assert any('display="block"' in cell.source for cell in roofline.cells), "the key formula of chapter 10"


def test_decks_hold_ideas_figures_predictions_exercises_and_summaries_alone():
    pytest.importorskip("nbconvert", reason="the extra site is not installed")
    import nb
    import slides

    for path in badges.chapters():
        chapter = nb.read(path)
        deck = slides.deck(chapter)
        images = [output for cell in chapter.cells for output in chapter_rules.figures(cell)]
        shown = [o for c in deck.cells for o in c.get("outputs", ())]
        assert shown == images, "every figure once, in order, and no other output"
        text = "\n".join(cell.source for cell in deck.cells)
        asked = [c.source for c in chapter.cells if "predict" in nb.chapter_rules.tags(c)]
        assert text.count("**Predict.**") == len(asked)
        assert "## Summary\n\n-" in text and text.startswith(f"# {badges.title(path)}")
        assert not any(word in text for word in (*slides.LEFT_OUT, "raise NotImplementedError", "check."))


def test_slide_types_follow_from_tags_unless_an_author_set_them():
    pytest.importorskip("nbconvert", reason="the extra site is not installed")
    import nb
    import slides

    own = nb.text("## Mine\n\nAll of it.")
    own.metadata["slideshow"] = {"slide_type": "subslide"}
    hidden = nb.text("## Hidden")
    hidden.metadata["slideshow"] = {"slide_type": "skip"}
    answer = nb.code("x", tag="setup")
    answer.outputs = [nb.nbformat.v4.new_output("stream", text="4 of 8\n")]
    book = nb.nbformat.v4.new_notebook()
    question = nb.text("**Predict.** How many?", tag="predict")
    book.cells = [nb.text("# T", "**P.**", "5 min"), nb.text("## A", "Prose."), question, answer, own, hidden]
    cells = slides.deck(book).cells
    assert [(c.metadata.slideshow.slide_type, c.source) for c in cells] == [
        ("slide", "# T\n\n**P.**\n\n5 min"),
        ("slide", "## A\n\n**Predict.** How many?"),
        ("fragment", "<pre>4 of 8</pre>"),
        ("subslide", "## Mine\n\nAll of it."),
    ]


@pytest.mark.parametrize("path", badges.chapters(), ids=lambda path: path.stem)
def test_everything_fits_its_slide(open_page, path):
    page = open_page(f"slides/{path.stem}.html")
    page.wait_for_function("() => window.Reveal && Reveal.isReady()")
    assert page.evaluate(OUTSIDE) == []


def test_a_deck_opens_from_the_disk_and_turns_its_pages(open_page):
    page = open_page("slides/09_live_cache.html")
    page.wait_for_function("() => window.Reveal && Reveal.isReady()")
    assert page.locator("section.present h1").inner_text().startswith("A live cache")
    for _ in range(3):
        page.keyboard.press("ArrowRight")
    assert page.evaluate("Reveal.getIndices().h") == 3
    assert page.complaints == []
