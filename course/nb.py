#!/usr/bin/env python3
"""Housekeeping of the chapters in notebooks/.

    nb.py check [FILES]           every rule of course/chapter_rules.py, and that generated text is up to date
    nb.py run [FILES]             executes in a fresh kernel, stores outputs, tidies
    nb.py tidy [FILES]            first cell, metadata and README badges made anew; nothing is executed
    nb.py new NN_name "Title"     a chapter to start from

Without FILES: all chapters. Does not know what a chapter is about.
"""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import re
import sys
import tempfile
import time

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

import badges
import chapter_rules
import widget_states

ROOT = pathlib.Path(__file__).resolve().parents[1]
CELL_TIMEOUT_S = 300
KERNELSPEC = {"display_name": "Python 3", "language": "python", "name": "python3"}
KEPT_OF_NOTEBOOK = ("mixoff",)
KEPT_OF_CELL = ("tags", "slideshow")
COLOURS = re.compile(r"\x1b\[[0-9;]*m")  # with which IPython marks a traceback


# ---------------------------------------------------------------- reading and writing


def read(path: pathlib.Path):
    """A notebook in format 4, validated."""
    nb = nbformat.read(path, as_version=4)
    nbformat.validate(nb)
    return nb


def write(nb, path: pathlib.Path) -> None:
    """Stores a notebook with a stable layout, one space of indent."""
    path.write_text(nbformat.writes(nb, indent=1) + "\n", encoding="utf-8")


# ---------------------------------------------------------------- tidy


def tidy_cell(cell) -> None:
    """Keeps tags and slides, folds what opens folded, drops what editors leave behind."""
    kept = {name: cell.metadata[name] for name in KEPT_OF_CELL if cell.metadata.get(name)}
    if cell.cell_type == "code" and chapter_rules.FOLDED_TAGS & set(kept.get("tags", ())):
        kept["jupyter"] = {"source_hidden": True}
    cell.metadata = nbformat.from_dict(kept)
    for output in cell.get("outputs", ()):
        if "execution_count" in output:
            output.execution_count = cell.execution_count
        if "metadata" in output:  # what belongs to a piece of data, such as an image's alternative text, stays
            output.metadata = nbformat.from_dict({k: v for k, v in output.metadata.items() if k in output.data})


def put_header(nb, path: pathlib.Path) -> None:
    """Writes the generated first cell, in place of an older one if there is one."""
    if nb.cells and "generated" in chapter_rules.tags(nb.cells[0]):
        nb.cells[0].source = badges.header(path)
    else:
        cell = nbformat.v4.new_markdown_cell(badges.header(path), id="badges", metadata={"tags": ["generated"]})
        nb.cells.insert(0, cell)


def tidy(nb, path: pathlib.Path) -> None:
    """Standard metadata and the generated cell; keeps `mixoff`, which tells teachers the minutes."""
    kept = {name: nb.metadata[name] for name in KEPT_OF_NOTEBOOK if name in nb.metadata}
    standard = {"kernelspec": KERNELSPEC, "language_info": {"name": "python"}}
    nb.metadata = nbformat.from_dict({**standard, **kept})
    nb.nbformat, nb.nbformat_minor = 4, 5
    for cell in nb.cells:
        tidy_cell(cell)
    put_header(nb, path)


def tidy_readme(root: pathlib.Path = ROOT) -> None:
    """Puts the current badges between the marks of README.md."""
    readme = root / "README.md"
    if readme.exists():
        readme.write_text(badges.with_badges(readme.read_text(encoding="utf-8")), encoding="utf-8")


# ---------------------------------------------------------------- run


@contextlib.contextmanager
def this_python(folder: str | None = None):
    """Makes kernel `python3` mean this interpreter, whatever kernels the user has installed, with a bare profile."""
    with tempfile.TemporaryDirectory() as temporary:
        spec = pathlib.Path(temporary, "kernels", "python3")
        spec.mkdir(parents=True)
        argv = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
        (spec / "kernel.json").write_text(json.dumps({"argv": argv, **KERNELSPEC}), encoding="utf-8")
        ours = {"JUPYTER_PATH": temporary, "IPYTHONDIR": folder or temporary, "MPLBACKEND": None}
        before = {name: os.environ.get(name) for name in ours}
        set_environment(ours)
        try:
            yield
        finally:
            set_environment(before)


def set_environment(values: dict[str, str | None]) -> None:
    """Sets variables of this process, which kernels inherit; None removes one."""
    for name, value in values.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


def execute(nb, folder: pathlib.Path) -> None:
    """Runs every cell in a fresh kernel that starts in `folder`; outputs land in `nb`."""
    for cell in nb.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    where = {"metadata": {"path": str(folder)}}
    options = {"timeout": CELL_TIMEOUT_S, "kernel_name": "python3", "coalesce_streams": True}
    options["skip_cells_with_tag"] = chapter_rules.SKIPPED  # as nbval does: what they show differs by machine
    NotebookClient(nb, resources=where, store_widget_state=True, record_timing=False, **options).execute()


def run(path: pathlib.Path) -> None:
    """Executes one chapter, tidies it and stores it; a failing cell leaves the file as it was."""
    nb, start = read(path), time.monotonic()
    with this_python():
        execute(nb, path.parent)
    widget_states.keep(nb, path)
    tidy(nb, path)
    write(nb, path)
    print(f"ran {path.name} in {time.monotonic() - start:.0f} s")


# ---------------------------------------------------------------- check


def problems(path: pathlib.Path) -> list[str]:
    """What is wrong with one chapter, a sentence each."""
    nb = read(path)
    found = [*chapter_rules.problems(nb), *widget_states.problems(nb, path)]
    nbytes = path.stat().st_size
    if nbytes > chapter_rules.MAX_FILE_NBYTES:
        found.append(f"{nbytes} bytes, at most {chapter_rules.MAX_FILE_NBYTES}")
    tidied = read(path)
    tidy(tidied, path)
    if tidied != read(path):
        found.append("metadata or the generated first cell is out of date: run course/nb.py tidy")
    return found


def readme_problems(root: pathlib.Path = ROOT) -> list[str]:
    """Whether README.md carries the badges that would be made now."""
    readme = root / "README.md"
    text = readme.read_text(encoding="utf-8") if readme.exists() else ""
    if badges.readme_block() in text:
        return []
    marks = f"{badges.README_BEGIN} and {badges.README_END}"
    return [f"badges are missing or out of date: put {marks} in, run course/nb.py tidy"]


def check(paths: list[pathlib.Path]) -> int:
    """Prints every problem; returns how many there are."""
    found = [f"{path.name}: {problem}" for path in paths for problem in problems(path)]
    found += [f"README.md: {problem}" for problem in readme_problems()]
    print("\n".join(found) if found else f"{len(paths)} chapters are executed and clean")
    return len(found)


# ---------------------------------------------------------------- new


def text(*paragraphs: str, tag: str | None = None):
    """A Markdown cell."""
    metadata = {"tags": [tag]} if tag else {}
    return nbformat.v4.new_markdown_cell("\n\n".join(paragraphs), metadata=metadata)


def code(*lines: str, tag: str):
    """A code cell."""
    return nbformat.v4.new_code_cell("\n".join(lines), metadata={"tags": [tag]})


def folded(summary: str) -> str:
    """Something that opens on a click."""
    return f"<details><summary>{summary}</summary>\n\n…\n\n</details>"


def skeleton(title: str):
    """A chapter with every part in its place and nothing in it."""
    nb = nbformat.v4.new_notebook()
    nb.metadata["mixoff"] = {"teach_min": 25, "exercise_min": 20, "needs": [], "workshops": []}
    nb.cells = [
        text(f"# {title}", "**Promise.**", "25 min · exercises 20 min · Prerequisites: none · Hardware: any"),
        text("## You will be able to", "- compute\n- build\n- explain", "## What this leaves out", "- …"),
        code("from mixoff.classroom import check, setup, show", "", "setup()", tag="setup"),
        text("### Exercise 1", "Contract.", "Difficulty ●○○ · Importance ●●○ · 5 min", folded("Hint")),
        code("def name(x):", "    raise NotImplementedError", tag="exercise"),
        code("check.name(name)", tag="check"),
        code("def name_solution(x):", "    return x", "", "check.name(name_solution)", tag="solution"),
        text("## Audit a claim", "…"),
        text("## Summary", "- …"),
        text("## Five questions", *["?\n\n" + folded("Answer")] * 5),
        text("## Further reading", "- …"),
        text("## Notes for instructors", folded("Open"), tag="instructor"),
    ]
    return nb


def new(name: str, title: str) -> int:
    """Writes notebooks/NAME.ipynb unless it is there."""
    path = ROOT / "notebooks" / f"{name}.ipynb"
    if path.exists():
        print(f"{path.name} exists already")
        return 1
    nb = skeleton(title)
    write(nb, path)  # the file must stand in the folder before links between chapters can be made
    tidy(nb, path)
    write(nb, path)
    return 0


# ---------------------------------------------------------------- command line


def tidy_files(paths: list[pathlib.Path]) -> None:
    """Tidies chapters and README.md in place."""
    for path in paths:
        nb = read(path)
        tidy(nb, path)
        write(nb, path)
    tidy_readme()


def run_files(paths: list[pathlib.Path]) -> int:
    """Runs chapters one after the other; returns how many failed, with the cell's error shown."""
    failed = 0
    for path in paths:
        try:
            run(path)
        except CellExecutionError as error:
            print(f"{path.name}: {COLOURS.sub('', str(error))}")
            failed += 1
    tidy_readme()
    return failed


def main(argv: list[str]) -> int:
    """Exit code 0 where all is well."""
    job, *rest = argv or ["help"]
    if job == "new" and len(rest) == 2:
        return new(*rest)
    if job not in ("check", "run", "tidy"):
        print(__doc__)
        return 2
    paths = [pathlib.Path(name).resolve() for name in rest] or badges.chapters()
    if job == "tidy":
        tidy_files(paths)
        return 0
    if job == "run" and run_files(paths):
        return 1
    return 1 if check(paths) else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
