#!/usr/bin/env python3
"""Housekeeping of the chapters in notebooks/.

    nb.py check [FILES]           every rule of course/chapter_rules.py, and that generated text is up to date
    nb.py run [FILES]             executes in a fresh kernel, stores outputs, tidies
    nb.py tidy [FILES]            first cell, metadata and README badges made again; nothing is executed
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
from unittest import mock

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

import badges
import chapter_rules
import widget_states

ROOT = pathlib.Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
TEMPLATE = pathlib.Path(__file__).parent / "template.ipynb"
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
        if "metadata" in output:
            output.metadata = nbformat.from_dict({})


def tidy(nb, path: pathlib.Path) -> None:
    """Standard metadata and the generated cell; keeps `mixoff`, which tells teachers the minutes."""
    kept = {name: nb.metadata[name] for name in KEPT_OF_NOTEBOOK if name in nb.metadata}
    standard = {"kernelspec": KERNELSPEC, "language_info": {"name": "python"}}
    nb.metadata = nbformat.from_dict({**standard, **kept})
    nb.nbformat, nb.nbformat_minor = 4, 5
    for cell in nb.cells:
        tidy_cell(cell)
    if not nb.cells or "generated" not in chapter_rules.tags(nb.cells[0]):
        nb.cells.insert(0, nbformat.v4.new_markdown_cell("", id="badges", metadata={"tags": ["generated"]}))
    nb.cells[0].source = badges.header(path)


def tidy_readme() -> None:
    """Puts the current badges between the marks of README.md."""
    README.write_text(badges.with_badges(README.read_text(encoding="utf-8")), encoding="utf-8")


# ---------------------------------------------------------------- run


@contextlib.contextmanager
def this_python(folder: str | None = None):
    """Makes kernel `python3` mean this interpreter, whatever kernels the user has installed, with a bare profile."""
    with tempfile.TemporaryDirectory() as temporary, mock.patch.dict(os.environ):
        spec = pathlib.Path(temporary, "kernels", "python3")
        spec.mkdir(parents=True)
        argv = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
        (spec / "kernel.json").write_text(json.dumps({"argv": argv, **KERNELSPEC}), encoding="utf-8")
        os.environ.update(JUPYTER_PATH=temporary, IPYTHONDIR=folder or temporary)
        os.environ.pop("MPLBACKEND", None)
        yield


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


def check(paths: list[pathlib.Path]) -> int:
    """Prints every problem; returns how many there are."""
    found = [f"{path.name}: {problem}" for path in paths for problem in problems(path)]
    if badges.readme_block() not in README.read_text(encoding="utf-8"):
        found.append(f"README.md: badges are out of date below {badges.README_BEGIN}: run course/nb.py tidy")
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


def skeleton(title: str):
    """A chapter with every part in its place and nothing in it."""
    nb = read(TEMPLATE)
    nb.cells[0].source = nb.cells[0].source.replace("TITLE", title)
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


def run_files(paths: list[pathlib.Path]) -> int:
    """Runs chapters one after the other; returns how many failed, with the cell's error shown."""
    failed = 0
    for path in paths:
        try:
            run(path)
        except CellExecutionError as error:
            print(f"{path.name}: {COLOURS.sub('', str(error))}")
            failed += 1
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
        for path in paths:
            nb = read(path)
            tidy(nb, path)
            write(nb, path)
    failed = run_files(paths) if job == "run" else 0
    if job != "check":
        tidy_readme()
    return 1 if failed or (job != "tidy" and check(paths)) else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
