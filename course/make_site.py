#!/usr/bin/env python3
"""Builds the course site into build/site: chapters from their stored outputs, pages, glossary, schedule, slides.

    make_site.py [FOLDER]     then open FOLDER/index.html; it needs no server and no network

Sphinx reads a copy of docs/ and notebooks/ that is made here: links lead to pages, or to the repository's address where
a file has no page; solutions are folded; widgets carry their state (docs/widgets) and live on without a kernel.
A warning, a link that leads nowhere inside, or anything that would be loaded from a network is an error.
"""

from __future__ import annotations

import importlib
import json
import os
import pathlib
import posixpath
import re
import shutil
import sys

import nbformat
from sphinx.cmd.build import build_main

import badges
import chapter_rules
import links
import schedule
import slides
import widget_states

ROOT = pathlib.Path(__file__).resolve().parents[1]
HOST = (pathlib.Path(__file__).parent / "widget_host.js").read_text(encoding="utf-8")
LINK = re.compile(r"(?<=\]\()(?![a-z]+:)([^)\s#]+)(#[^)\s]*)?(?=\))")
CHAPTERS = "<!-- chapters -->"  # in docs/index.md
ASKING = ("PlanExplorer",)  # asks the kernel for each figure; all other widgets carry everything that they show
ASLEEP = (
    "A still picture of the chapter's last run. In JupyterLab and in Colab it has controls, which a kernel answers."
)
PAGES_FIRST = ("teach", "schedule", "glossary")
PAGES_OF_USERS = ("daily", "serving", "recipes", "architecture", "api", "plan", "conversion", "gpu", "engines")


# ---------------------------------------------------------------- links


def places(root: pathlib.Path = ROOT) -> dict[str, str]:
    """Where each file of the repository that the site shows lies in the copy: path in the one to path in the other."""
    files = [*badges.chapters(root / "notebooks"), *(root / "docs").glob("*.md"), *(root / "docs").glob("*.svg")]
    found = {path.relative_to(root).as_posix(): path.relative_to(root).as_posix() for path in files}
    return found | {"docs/index.md": "index.md", "docs/schedule.md": "docs/schedule.md"}


def relink(text: str, source: str, shown: dict[str, str]) -> str:
    """Markdown of the file `source` with its links made for the copy; files without a page get their whole address."""

    def target(match: re.Match) -> str:
        path, fragment = posixpath.normpath(posixpath.join(posixpath.dirname(source), match[1])), match[2] or ""
        if path in shown:
            return posixpath.relpath(shown[path], posixpath.dirname(shown[source]) or ".") + fragment
        return f"{badges.repository()}/blob/{badges.BRANCH}/{path}{fragment}" if (ROOT / path).exists() else match[0]

    return LINK.sub(target, text)


# ---------------------------------------------------------------- chapters


def page_of(path: pathlib.Path, shown: dict[str, str]):
    """A chapter as the site shows it; links to Colab and slides below title, promise and practical line."""
    nb, states = nbformat.read(path, as_version=4), widget_states.kept(path)
    nb.cells = [cell for cell in nb.cells if "generated" not in chapter_rules.tags(cell)]
    for cell in nb.cells:
        if cell.cell_type == "markdown":
            cell.source = relink(cell.source, f"notebooks/{path.name}", shown)
        else:
            dress(cell)
    for output, name in widget_states.views(nb):
        if name in states:
            output["data"] = nbformat.from_dict({"text/html": widget_html(name, **states[name])})
    elsewhere = f'[Open in Colab]({badges.colab_link(path.name)}) · <a href="../slides/{path.stem}.html">Slides</a>'
    opening = re.match(r"(?:.+\n*){3}", nb.cells[0].source)[0]
    nb.cells[0].source = f"{opening.rstrip()}\n\n{elsewhere}\n\n{nb.cells[0].source[len(opening) :]}"
    return nb


def dress(cell) -> None:
    """Folds what opens folded."""
    if folded := chapter_rules.FOLDED_TAGS & chapter_rules.tags(cell):
        cell.metadata["tags"] = [*cell.metadata["tags"], "hide-input"]
        shown = "solution" if "solution" in folded else "code"
        cell.metadata["mystnb"] = {"code_prompt_show": f"Show the {shown}", "code_prompt_hide": "Hide it"}


def widget_html(name: str, state: dict, **about: str) -> str:
    """A widget of ours as a piece of a page, complete in itself: module, style, state, and what stands for a kernel."""
    module, _, kind = about["class"].rpartition(".")
    widget = getattr(importlib.import_module(module), kind)
    place, alive = json.dumps(f"widget-{name}"), kind not in ASKING
    source = str(widget._esm)
    if source.count("export default") != 1 or "</script" in source:
        raise ValueError(f"{kind}: its module must have one 'export default' and no '</script'")
    saved = json.dumps(state, ensure_ascii=False).replace("<", "\\u003c")
    script = f"{source.replace('export default', 'const widget =')}\nconst place = {place}, state = {saved};\n{HOST}"
    note = "" if alive else f'<p class="widget-note">{ASLEEP}</p>\n'
    return (
        f"<style>{widget._css}</style>\n{note}<div class='mixoff-widget' id={place}{'' if alive else ' inert'}></div>\n"
        f'<script type="module">\n{script}</script>'
    )


# ---------------------------------------------------------------- pages


def chapter_list(root: pathlib.Path = ROOT) -> str:
    """One line a chapter: title, promise and minutes."""
    rows = []
    for path in badges.chapters(root / "notebooks"):
        nb = nbformat.read(path, as_version=4)
        promise = next(re.findall(r"^\*\*(.+)\*\*$", c.source, re.M)[0] for c in nb.cells if c.source.startswith("# "))
        minutes = nb.metadata["mixoff"]
        total = f"{minutes['teach_min']} min and {minutes['exercise_min']} for exercises"
        rows.append(f"- **{path.name[:2]}** [{badges.title(path)}](notebooks/{path.name}): {promise} *{total}*")
    return "\n".join(rows)


def contents(shown: dict[str, str], root: pathlib.Path = ROOT) -> str:
    """Tables of contents for the side of each page: chapters, what a teacher and a user need, everything else."""
    pages = sorted(place[:-3] for place in shown.values() if place.startswith("docs/") and place.endswith(".md"))
    first, of_users = (
        [page for name in names if (page := f"docs/{name}") in pages] for names in (PAGES_FIRST, PAGES_OF_USERS)
    )
    chapters = badges.chapters(root / "notebooks")
    parts = {
        "Chapters": [f"{p.name[:2]} {badges.title(p).split(':')[0]} <notebooks/{p.stem}>" for p in chapters],
        "Around the course": first,
        "Using mixoff": of_users,
        "Measurements": [page for page in pages if page not in (*first, *of_users)],
    }
    tree = "```{{toctree}}\n:hidden:\n:caption: {}\n:maxdepth: 1\n\n{}\n```"
    return "\n\n".join(tree.format(caption, "\n".join(names)) for caption, names in parts.items())


def copy_for_sphinx(target: pathlib.Path, root: pathlib.Path = ROOT) -> None:
    """Lays out everything that Sphinx reads in `target`, which is made from scratch."""
    shutil.rmtree(target, ignore_errors=True)
    shown = places(root)
    for source, place in shown.items():
        (target / place).parent.mkdir(parents=True, exist_ok=True)
        if place.endswith(".ipynb"):
            nbformat.write(page_of(root / source, shown), target / place)
        elif place.endswith(".svg"):
            shutil.copy(root / source, target / place)
        else:
            text = schedule.page() if place == "docs/schedule.md" else (root / source).read_text(encoding="utf-8")
            (target / place).write_text(relink(text, source, shown), encoding="utf-8")
    index = target / "index.md"
    text = index.read_text(encoding="utf-8").replace(CHAPTERS, chapter_list(root))
    index.write_text(f"{text}\n{contents(shown, root)}\n", encoding="utf-8")


# ---------------------------------------------------------------- building


def build(out: pathlib.Path, work: pathlib.Path | None = None) -> int:
    """Builds the site into `out`; `work` holds copies and caches. Returns 0, or 1 with what is wrong printed."""
    work = work or out.with_name(f"{out.name}-work")
    copy_for_sphinx(work / "source")
    shutil.rmtree(out, ignore_errors=True)
    options = ["-b", "html", "-W", "--keep-going", "-q", "-c", str(ROOT / "docs"), "-d", str(work / "doctrees")]
    if build_main([*options, str(work / "source"), str(out)]):
        return 1
    slides.build(out / "slides")
    found = links.check(out)
    (work / "external-links.txt").write_text("\n".join(found.external) + "\n", encoding="utf-8")
    print("\n".join(found.problems) or f"{found.internal} links inside lead somewhere")
    print(f"{len(found.external)} addresses outside, not asked: {os.path.relpath(work / 'external-links.txt')}")
    return 1 if found.problems else 0


def main(argv: list[str]) -> int:
    """Exit code 0 where the site is built and whole."""
    out = pathlib.Path(argv[0] if argv else ROOT / "build" / "site").resolve()
    code = build(out)
    print(f"open {os.path.relpath(out / 'index.html')}" if not code else "the site is not whole: see above")
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
