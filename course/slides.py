#!/usr/bin/env python3
"""Makes a deck of slides of every chapter: ideas, formulas, figures, predictions, exercises and summaries.

    slides.py [FOLDER]        default build/slides; open NN_name.html, no network is needed

Which cell becomes which slide follows from tags, headings and outputs, on a copy; a slide type that an author has set
in a cell's metadata wins. nbconvert makes the deck; reveal.js is copied from the package sphinx-revealjs, so that the
repository carries none of it. Does not know what a chapter is about.
"""

from __future__ import annotations

import html
import pathlib
import re
import shutil
import sys
from importlib.resources import files

import nbformat
from latex2mathml.converter import convert as mathml
from nbconvert import SlidesExporter

import badges
import chapter_rules

ROOT = pathlib.Path(__file__).resolve().parents[1]
HERE = pathlib.Path(__file__).parent
REVEAL = ("reveal.js", "reveal.css")
LEFT_OUT = ("You will be able to", "What this leaves out", "The map of the course", "Five questions", "Further reading")
LEFT_OUT += ("Notes for instructors",)
HEADING = re.compile(r"^#{1,3} +(.+)$", re.M)
FENCE = re.compile(r"^```.*?^```$", re.M | re.S)
MINUTES = re.compile(r"^Difficulty.*$", re.M)
CLAIM = re.compile(r"(?:^>.*\n?)+", re.M)
DISPLAYED = re.compile(r"\$\$(.+?)\$\$", re.S)
FORMULA = re.compile(r"(?<![\\$\w])\$([^$\n]+)\$(?![\d$])")
INSIDE = re.compile(r"\[([^\]]+)\]\(\.\./[^)]*\)")  # a link to a file of the repository, which a deck lacks
DETAILS = re.compile(r"<details>.*?</details>", re.S)
MOST_WORDS = 70  # of an idea
MOST_LINES = 14  # of printed text on a slide


# ---------------------------------------------------------------- cells of a deck


def slide(source: str, kind: str = "slide"):
    """A Markdown cell that opens a slide, or goes on with one (kind `-`)."""
    source = INSIDE.sub(r"\1", source)
    source = DISPLAYED.sub(lambda match: mathml(match[1], display="block"), source)
    source = FORMULA.sub(lambda match: mathml(match[1]), source)
    return nbformat.v4.new_markdown_cell(source, metadata={"slideshow": {"slide_type": kind}})


def printed(cell) -> str:
    """What a code cell printed, as far as it fits on a slide."""
    text = "".join(output.text for output in cell.outputs if output.output_type == "stream")
    lines = text.rstrip().splitlines()
    return "\n".join(lines[:MOST_LINES] + ["…"] * (len(lines) > MOST_LINES))


def idea(body: str) -> str:
    """The first paragraphs of a section, as far as they fit on a slide; empty where it begins with something else."""
    found, words = [], 0
    for paragraph in DETAILS.sub("", body).strip().split("\n\n"):
        words += len(paragraph.split())
        if (found and words > MOST_WORDS) or paragraph.startswith(("**Predict.**", "> ", "| ")):
            break
        found.append(paragraph)
    return "\n\n".join(found).strip()


class Deck:
    """Slides in the making. A heading waits for what belongs on its slide; where nothing does, its idea is shown."""

    def __init__(self) -> None:
        self.cells: list = []
        self.heading, self.idea, self.waiting, self.asked, self.summing = "", "", False, False, False

    def flush(self) -> None:
        """Puts a waiting heading on a slide with the idea of its section; a heading without one is left out."""
        if self.waiting and self.idea:
            self.add(self.idea)
        self.waiting = False

    def add(self, source: str = "") -> None:
        """A slide below the current heading."""
        self.cells.append(slide(f"## {self.heading}\n\n{source}".rstrip()))
        self.waiting = False

    def section(self, title: str, body: str) -> None:
        """A heading with the text below it: an exercise's contract, a formula, a claim, else the idea."""
        self.flush()
        if minutes := MINUTES.search(body):  # what follows an exercise belongs to the section again
            self.cells.append(slide(f"## {title}\n\n{body[: minutes.start()].strip()}\n\n{minutes[0]}"))
            return
        self.heading, self.waiting, self.idea = title, not title.startswith(LEFT_OUT), idea(body)
        for formula in DISPLAYED.findall(body):
            self.add(f"$${formula}$$")
        self.summing = title == "Summary"  # made by the next cell, or written below the heading
        if self.summing and body.strip():
            self.add(body.strip())
        if title.startswith("Audit a claim") and (claim := CLAIM.search(body)):
            self.add(claim[0])

    def markdown(self, cell) -> None:
        """Headings and predictions."""
        if "predict" in chapter_rules.tags(cell):
            self.add(cell.source)
            self.asked = True
            return
        parts = HEADING.split(FENCE.sub("", cell.source))
        for title, body in zip(parts[1::2], parts[2::2], strict=True):
            self.section(title, body)

    def figure(self, output) -> None:
        """A figure, which has its caption inside."""
        self.add()
        self.cells.append(nbformat.v4.new_code_cell("", outputs=[output], metadata={"slideshow": {"slide_type": "-"}}))

    def code(self, cell) -> None:
        """Figures, what answers a prediction, and the summary."""
        data = [output.get("data", {}) for output in cell.outputs]
        figures = chapter_rules.figures(cell)
        for output in figures:
            self.figure(output)
        if self.summing:
            self.add("\n".join(d["text/markdown"] for d in data if "text/markdown" in d))
        elif self.asked and not figures and printed(cell):
            self.cells.append(slide(f"<pre>{html.escape(printed(cell))}</pre>", "fragment"))
        self.asked = self.summing = False


def deck(nb):
    """The notebook that nbconvert turns into slides; the first has title, promise and minutes."""
    made, opened = Deck(), False
    for cell in nb.cells:
        own = cell.metadata.get("slideshow", {}).get("slide_type")
        if own == "skip" or chapter_rules.tags(cell) & {"generated", "instructor"}:
            continue
        if own:
            made.flush()
            made.cells.append(cell)
        elif not opened and cell.source.startswith("# "):
            made.cells.append(slide("\n\n".join([line for line in cell.source.splitlines() if line.strip()][:3])))
            opened = True
        else:
            getattr(made, cell.cell_type)(cell)
    made.flush()
    return nbformat.v4.new_notebook(cells=made.cells)


# ---------------------------------------------------------------- files


def exporter() -> SlidesExporter:
    """nbconvert's, with our page around the slides; dear to make, so one makes all decks."""
    without = {"exclude_input": True, "exclude_input_prompt": True, "exclude_output_prompt": True}
    return SlidesExporter(template_file=str(HERE / "slides.html.j2"), exclude_anchor_links=True, **without)


def page(path: pathlib.Path, converter: SlidesExporter) -> str:
    """The deck of a chapter as HTML."""
    nb = deck(nbformat.read(path, as_version=4))
    nb.metadata["title"] = badges.title(path)
    return converter.from_notebook_node(nb)[0]


def build(out: pathlib.Path, chapters: list[pathlib.Path] | None = None) -> list[pathlib.Path]:
    """Writes the decks of all chapters, or of some, and the reveal.js that they share; returns their files."""
    shutil.rmtree(out, ignore_errors=True)
    (out / "reveal").mkdir(parents=True)
    for name in REVEAL:
        (out / "reveal" / name).write_bytes((files("sphinx_revealjs") / "_static/revealjs/dist" / name).read_bytes())
    shutil.copy(HERE / "slides.css", out / "reveal" / "deck.css")
    made, converter = [], exporter()
    for path in badges.chapters() if chapters is None else chapters:
        made.append(out / f"{path.stem}.html")
        made[-1].write_text(page(path, converter), encoding="utf-8")
    return made


def main(argv: list[str]) -> int:
    """Builds, and says where."""
    out = pathlib.Path(argv[0] if argv else ROOT / "build" / "slides")
    for path in build(out):
        print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
