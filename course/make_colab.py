#!/usr/bin/env python3
"""Writes colab/*.ipynb from notebooks/*.ipynb; `--check` only reports what is out of step.

The chapter on Colab is the chapter at home without outputs, plus one cell that installs mixoff and leaves Colab's own
packages alone: nothing asks for a restart of the runtime. The same input gives the same bytes.
"""

from __future__ import annotations

import copy
import hashlib
import json
import pathlib
import re
import sys

import nbformat

import badges

ROOT = pathlib.Path(__file__).resolve().parents[1]
HELD = ("torch", "transformers", "numpy", "ipywidgets", "traitlets", "pillow")  # Colab has imported them, or needs them
PAGE = re.compile(r"\]\(\.\./(?=\w)")  # a link from a chapter to a file of the repository
FORMS = {
    "solution": "Solution",
    "figure": "The code of this figure",
    "hidden": "Preparations",
}  # titles of what is folded
INSTALL = """\
#@title Install mixoff (about a minute) { display-mode: "form" }
#@markdown Colab's own torch, transformers and ipywidgets stay as they are; nothing needs a restart.
import importlib.util, os, pathlib, subprocess, sys
from importlib.metadata import PackageNotFoundError, version

def held(names):
    for name in names:
        try:
            yield f"{name}=={version(name)}\\n"
        except PackageNotFoundError:
            pass

if importlib.util.find_spec("mixoff") is None:
    pathlib.Path("mixoff-constraints.txt").write_text("".join(held(@@HELD@@)))
    source = os.environ.get("MIXOFF_SOURCE", "@@REQUIREMENT@@")
    if not source:
        raise SystemExit(
            "This course has no public address yet, so there is nothing to install from. Put the address of your copy, "
            "a folder or a wheel into the variable MIXOFF_SOURCE and run this cell again, for example "
            "import os; os.environ['MIXOFF_SOURCE'] = 'git+https://...'"
        )
    pip = [sys.executable, "-m", "pip", "install", "-q", "-c", "mixoff-constraints.txt", source]
    subprocess.run(pip, check=True)
"""


def install_cell():
    """The cell that makes a bare Colab machine ready."""
    source = INSTALL.replace("@@HELD@@", repr(HELD)).replace("@@REQUIREMENT@@", badges.requirement())
    cell = nbformat.v4.new_code_cell(source.rstrip("\n"))
    cell.metadata["cellView"] = "form"
    return cell


def colab_cell(cell, path: pathlib.Path):
    """A copy for Colab: no outputs, and code that opens folded as a form."""
    cell = copy.deepcopy(cell)
    tags = cell.metadata.get("tags", [])
    cell.metadata = nbformat.from_dict({"tags": tags} if tags else {})
    if "generated" in tags:
        cell.source = badges.colab_header(path)
    elif cell.cell_type == "markdown":
        cell.source = PAGE.sub(f"]({badges.repository()}/blob/{badges.BRANCH}/", cell.source)
    if cell.cell_type == "code":
        cell.outputs, cell.execution_count = [], None
        if folded := [title for tag, title in FORMS.items() if tag in tags]:  # the first of several, every time
            cell.source = f"#@title {folded[0]}: open to read\n{cell.source}"
            cell.metadata["cellView"] = "form"
    return cell


def metadata(path: pathlib.Path, gpu: bool) -> dict:
    """What Colab reads: a T4 if the chapter has use for it, a table of contents, where the chapter comes from."""
    made = {
        "colab": {"name": path.name, "provenance": [], "toc_visible": True},
        "kernelspec": {"display_name": "Python 3", "name": "python3"},
        "language_info": {"name": "python"},
        "mixoff": {"generated_from": f"notebooks/{path.name}"},
    }
    if gpu:
        made["accelerator"] = "GPU"
        made["colab"]["gpuType"] = "T4"
    return made


def convert(path: pathlib.Path) -> str:
    """The text of the Colab notebook for one chapter."""
    header, *rest = nbformat.read(path, as_version=4).cells
    nb = nbformat.v4.new_notebook(metadata=metadata(path, gpu="no GPU" not in rest[0].source))
    nb.nbformat_minor = 5
    nb.cells = [colab_cell(header, path), install_cell(), *(colab_cell(cell, path) for cell in rest)]
    for i, cell in enumerate(nb.cells):
        cell["id"] = hashlib.sha256(f"{path.name}:{i}:{cell.source}".encode()).hexdigest()[:8]
    nbformat.validate(nb)
    return json.dumps(nb, indent=1, ensure_ascii=False, sort_keys=True) + "\n"


def drift(root: pathlib.Path = ROOT) -> dict[pathlib.Path, str | None]:
    """Files of colab/ that differ from what would be written; None where one has no chapter any more."""
    want = {root / "colab" / path.name: convert(path) for path in badges.chapters(root / "notebooks")}
    have = {path: path.read_text(encoding="utf-8") for path in (root / "colab").glob("*.ipynb")}
    return {path: want.get(path) for path in sorted({*want, *have}) if want.get(path) != have.get(path)}


def apply(changes: dict[pathlib.Path, str | None]) -> None:
    """Writes or removes files."""
    for path, text in changes.items():
        path.parent.mkdir(exist_ok=True)
        path.unlink(missing_ok=True) if text is None else path.write_text(text, encoding="utf-8")


def main(argv: list[str] | None = None) -> int:
    """With `--check`, 1 where something is out of step; else writes and returns 0."""
    check, changes = "--check" in (sys.argv[1:] if argv is None else argv), drift()
    names = ", ".join(path.name for path in changes)
    if check and changes:
        print(f"colab/ is out of step, run course/make_colab.py: {names}")
        return 1
    apply(changes)
    print(f"wrote {names}" if changes else "colab/ is in step with notebooks/")
    return 0


if __name__ == "__main__":
    sys.exit(main())
