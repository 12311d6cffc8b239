"""Chapters as their readers meet them: opened in JupyterLab, run from top to bottom, looked at.

python3 go.py e2e --basetemp=SOMEWHERE      keeps the screenshots
"""

import re

import pytest

import badges
import chapter_rules
import nb
from chapters import often

pytestmark = pytest.mark.e2e

RUN_TIMEOUT_MS = 180_000
RUN_ALL = "() => { window.jupyterapp.commands.execute('notebook:run-all-cells'); }"
CODE_CELLS = """() => window.jupyterapp.shell.currentWidget.content.model.toJSON().cells
    .filter(cell => cell.cell_type === 'code')
    .map(cell => ({count: cell.execution_count, tags: cell.metadata.tags || [],
                   errors: cell.outputs.filter(out => out.output_type === 'error').map(out => out.ename),
                   figures: cell.outputs.filter(out => out.data?.['text/html']?.includes('<figure')).length}))"""
CLEAR = "() => { window.jupyterapp.commands.execute('notebook:clear-all-cell-outputs'); }"
ALL_COUNTED = f"""() => {{
    const kernel = window.jupyterapp.shell.currentWidget.context.sessionContext.session.kernel;
    const cells = ({CODE_CELLS})();
    return kernel.status === 'idle' && cells.every(cell => cell.count !== null);
}}"""
TO_TOP = """() => {
    document.querySelector('.jp-WindowedPanel-outer').scrollTop = 0;
    const last = [...document.querySelectorAll('.jp-Notebook .jp-Cell')].pop();
    return Math.ceil(last.getBoundingClientRect().bottom) + 60;
}"""
FIGURES = """() => [...document.querySelectorAll('.jp-OutputArea figure img')]
    .map(image => ({alt: image.alt, width: image.naturalWidth, shown: image.getBoundingClientRect().width}))"""
WIDTH_PX, TALLEST_PX = 1200, 16_000  # 16,384 is Chromium's limit for one screenshot


def run_all(page):
    """Clears stored outputs, runs every cell, waits for the last one."""
    page.evaluate(CLEAR)
    page.wait_for_function(f"() => ({CODE_CELLS})().every(cell => cell.count === null)")
    page.evaluate(RUN_ALL)
    page.wait_for_function(ALL_COUNTED, timeout=RUN_TIMEOUT_MS)
    return page.evaluate(CODE_CELLS)


def photograph(page, path):
    """One tall screenshot of the whole chapter."""
    for _ in range(2):  # a taller window may change the height of what is in it
        page.set_viewport_size({"width": WIDTH_PX, "height": min(page.evaluate(TO_TOP), TALLEST_PX)})
        page.wait_for_timeout(500)
    page.screenshot(path=path)


WATCH = """() => {
    window.seen = [];
    window.said = [];
    new MutationObserver((changes) => changes.forEach(({target}) => {
        if (target.dataset.mode === 'replay' || !target.dataset.token) return;
        window.seen.push(Number(target.dataset.token));
        window.said.push(target.querySelector('.words').innerText);
    })).observe(document.body, {subtree: true, attributes: true, attributeFilter: ['data-token']});
}"""


def drive_view(page):
    """Chapter 09: frames came while the cell ran; the widget says what the kernel printed; replay plays and scrubs."""
    assert len(set(page.evaluate("window.seen"))) > 5, "the grid moved while the model wrote"
    assert len(set(page.evaluate("window.said"))) > 5, "and the text grew beside it"
    view = page.locator(".mixoff-cache")
    printed = page.locator(".jp-OutputArea-output", has_text="hit rate").filter(has_text="tokens:").first.inner_text()
    tokens, hits, misses = map(int, re.search(r"(\d+) tokens: (\d+) hits, (\d+) misses", printed).groups())
    assert [view.get_attribute(f"data-{name}") for name in ("tokens", "hits", "misses", "token")] == [
        *map(str, (tokens, hits, misses, tokens - 1))
    ]
    scrub = view.locator(".scrub")
    scrub.evaluate("e => { e.value = 10; e.dispatchEvent(new Event('input')); }")
    view.locator(".step").click()
    scrub.focus()
    page.keyboard.press("ArrowRight")
    assert view.get_attribute("data-token") == "12", "JupyterLab leaves the arrow keys to the widget"
    view.locator(".speed").select_option("30")
    view.locator(".play").click()
    page.wait_for_function(f"() => document.querySelector('.mixoff-cache').dataset.token === '{tokens - 1}'")
    assert view.get_attribute("data-hits") == str(hits)


def drive_stepper(page):
    """Chapter 08: the reader is asked whom to give up, and the steps end with the hits that the kernel printed."""
    stepper = page.locator(".mixoff-stepper")
    printed = page.locator(".jp-OutputArea-output", has_text="lru: 3 hits of 11").first.inner_text()
    while stepper.locator(".step").is_enabled():
        stepper.locator(".step").focus()
        page.keyboard.press("Enter")
        if stepper.get_attribute("data-asking") == "true":
            stepper.locator(".slots button").first.click()
    hits = int(re.search(r"lru: (\d+) hits", printed)[1])
    assert stepper.get_attribute("data-hits") == str(hits) and "guesses right" in stepper.inner_text()


def drive_word(page):
    """Chapter 11: the four steps end with the sum that the kernel printed."""
    word = page.locator(".mixoff-word")
    printed = page.locator(".jp-OutputArea-output", has_text="shift 6: codes").first.inner_text()
    word.locator(".step").focus()
    for _ in range(4):
        page.keyboard.press("Enter")
    assert word.locator(".step").is_disabled()
    assert word.get_attribute("data-total") == re.findall(r"sum (-?\d+)", printed)[-1]


def drive_map(page):
    """A faster processor makes splitting the best way on the marked machine."""
    engines = page.locator(".mixoff-engines").first
    engines.scroll_into_view_if_needed()
    assert engines.get_attribute("data-way") == "copied"
    dial = engines.locator("input[name=ram_Bps]")
    dial.evaluate("e => { e.value = 50; e.dispatchEvent(new Event('input')); }")
    assert engines.get_attribute("data-way") == "split"
    engines.locator("table").focus()
    page.keyboard.press("ArrowUp")
    assert engines.get_attribute("data-vram") == "16"


def drive_batch(page):
    """Chapter 12: each run has the passes that the kernel printed; arrow keys move through them."""
    batch = page.locator(".mixoff-batch")
    printed = page.locator(".jp-OutputArea-output", has_text="continuous: 28 passes").first.inner_text()
    for name, passes in re.findall(r"([\w ]+): (\d+) passes", printed):
        batch.locator(".run").select_option(name.strip())
        assert batch.get_attribute("data-passes") == passes
        batch.locator(".scrub").focus()
        page.keyboard.press("End")
        assert batch.get_attribute("data-at") == str(int(passes) - 1) and batch.locator(".step").is_disabled()


ANSWERED = """() => {
    const {asked, answered} = document.querySelector('.mixoff-explorer').dataset;
    return asked !== undefined && asked === answered;
}"""


def drive_explorer(page):
    """Chapter 02: sliders moved by keys; after each the page shows what the kernel printed for the same choice."""
    explorer = page.locator(".mixoff-explorer")
    assert explorer.get_attribute("data-slots") == "4" and explorer.get_attribute("data-fits") == "true"

    def press(slider, *keys):
        explorer.locator(f"[data-name={slider}]").focus()
        for key in keys:
            page.keyboard.press(key)
        page.wait_for_function(ANSWERED)
        return explorer.evaluate("e => ({...e.dataset})")

    shown = press("experts", "ArrowLeft", "ArrowLeft", "ArrowLeft")  # 3, 2.33, 2 bits
    printed = page.locator(".jp-OutputArea-output", has_text="experts in  2 bits").first.inner_text()
    slots, vram = re.search(r"2 bits: (\d) of 8 slots per layer, VRAM +([\d.]+)", printed).groups()
    assert (shown["slots"], f"{int(shown['fastBytes']) / 2**30:.1f}") == (slots, vram) and shown["resident"] == "true"
    shown = press("context", "End")
    assert shown["fits"] == "true" and int(shown["slots"]) < 8, "Mixtral's own limit is the slider's end"
    shown = press("slots", "End")
    assert shown["fits"] == "false" and shown["change"] in explorer.locator(".change").inner_text() != ""


def drive_race(page):
    """Chapter 00: the grid moved while the model wrote; the race has the speeds that the kernel printed, and ends."""
    assert len(set(page.evaluate("window.seen"))) > 5, "the grid moved"
    race = page.locator(".mixoff-race")
    printed = page.locator(".jp-OutputArea-output", has_text="tokens/s, modelled:").first.inner_text()
    speeds = re.findall(r"(\d+\.\d) \(hit rate", printed)
    assert [head.split("\n")[-1].split()[0] for head in race.locator("h4").all_inner_texts()] == speeds
    race.get_by_role("combobox", name="speed").select_option("4")
    race.get_by_role("button", name="Start the race").focus()
    page.keyboard.press("Enter")
    page.wait_for_function("() => document.querySelectorAll('.mixoff-race .pane.done').length === 4")
    assert "(modelled)" in race.locator(".result").inner_text()


def drive_slider(root, slider, figure):
    """A function that moves a slider of a small widget to its end by key, and sees its figure change."""

    def drive(page):
        before = page.locator(root).get_attribute(f"data-{figure}")
        page.locator(root).get_by_role("slider", name=slider).focus()
        page.keyboard.press("End")
        assert page.locator(root).get_attribute(f"data-{figure}") != before

    return drive


def drive_vote(page):
    """Chapter 05: eight votes by key, and the score at the end."""
    vote = page.locator(".mixoff-vote")
    vote.get_by_role("button", name="Left").focus()
    for _ in range(15):  # Left and Next in turns, which get the focus
        page.keyboard.press("Enter")
    assert vote.get_attribute("data-votes") == "8" and vote.get_attribute("data-right") == "4", "half of them are left"


THEMES = {"light": "JupyterLab Light", "dark": "JupyterLab Dark"}


def photograph_themes(page, folder, chapter):
    """The chapter and each of its widgets in the light and in the dark theme, which a widget must notice."""
    for name, theme in THEMES.items():
        page.evaluate("theme => window.jupyterapp.commands.execute('apputils:change-theme', {theme})", theme)
        page.wait_for_function(
            """dark => [...document.querySelectorAll('[class^=mixoff-]:not(.mixoff-plan)')].every(
                e => e.classList.contains('mixoff-dark') === dark)
                && document.body.dataset.jpThemeLight === String(!dark)""",
            arg=name == "dark",
        )
        page.wait_for_timeout(500)
        for i, widget in enumerate(page.locator("[class^=mixoff-]:not(.mixoff-plan)").all()):
            widget.screenshot(path=folder / f"widget-{i}-{name}.png")
        photograph(page, folder / f"{chapter.stem}-{name}.png")


def assert_figures_are_read_aloud(page, count):
    """Every figure is an image with an alternative text in the page, whole and no wider than the page."""
    figures = page.evaluate(FIGURES)
    assert len(figures) == count > 0
    assert all(len(figure["alt"]) > 20 and figure["width"] >= figure["shown"] > 100 for figure in figures), figures


DRIVERS = {
    "00_start_here": drive_race,
    "01_router": drive_slider(".mixoff-swap", "rank of one expert", "loss"),
    "02_vram_arithmetic": drive_explorer,
    "03_quantization": drive_slider(".mixoff-outlier", "value of the outlier", "scale"),
    "05_mixed_quantization": drive_vote,
    "08_cache_policies": drive_stepper,
    "09_live_cache": drive_view,
    "11_kernels": drive_word,
    "12_batches_and_balance": drive_batch,
    "14_engines": drive_map,
}


@pytest.mark.parametrize("chapter", often(badges.chapters()))
def test_chapter_runs_from_top_to_bottom(chapter, open_notebook, tmp_path):
    page = open_notebook(chapter)
    stored = sum(len(chapter_rules.figures(cell)) for _, cell in chapter_rules.code_cells(nb.read(chapter)))
    assert_figures_are_read_aloud(page, stored)  # the notebook is not trusted yet, so JupyterLab cleans its HTML
    page.evaluate(WATCH)
    cells = run_all(page)
    assert [cell["count"] for cell in cells] == list(range(1, len(cells) + 1))
    assert [cell for cell in cells if cell["errors"] and "raises-exception" not in cell["tags"]] == []
    assert_figures_are_read_aloud(page, sum(cell["figures"] for cell in cells))
    if chapter.stem in DRIVERS:
        DRIVERS[chapter.stem](page)
    photograph_themes(page, tmp_path, chapter)
    assert page.complaints == []
