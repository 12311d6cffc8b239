"""What the widgets of a chapter held when it was last executed, kept in docs/widgets/ for the course site.

Saved widgets break GitHub's viewer, so no notebook carries them; the site needs them, since it executes nothing. They
come from the same run as the stored outputs: an output names its widget by an id, and so does the file here.
Does not know what a widget shows.
"""

from __future__ import annotations

import json
import pathlib
from collections.abc import Iterator

STATE = "application/vnd.jupyter.widget-state+json"
VIEW = "application/vnd.jupyter.widget-view+json"
OURS = "mixoff."
HOUSEKEEPING = {"layout", "tabbable", "tooltip"}  # of every ipywidget; nothing that ours draw


def file_of(chapter: pathlib.Path) -> pathlib.Path:
    """Where the widgets of a chapter are kept, whether it has any or not."""
    return chapter.resolve().parents[1] / "docs" / "widgets" / f"{chapter.stem}.json"


def views(nb) -> Iterator[tuple[dict, str]]:
    """Each output that shows a widget, with the widget's id."""
    for cell in nb.cells:
        for output in cell.get("outputs", ()):
            if VIEW in output.get("data", {}):
                yield output, output["data"][VIEW]["model_id"]


def states(nb) -> dict[str, dict]:
    """Class and traits of each widget of ours that the notebook shows, by id; from the metadata of its execution."""
    saved = nb.metadata.get("widgets", {}).get(STATE, {}).get("state", {})
    found = {}
    for _, name in views(nb):
        traits = saved.get(name, {}).get("state", {})
        if traits.get("_anywidget_id", "").startswith(OURS):
            plain = {k: v for k, v in traits.items() if not k.startswith("_") and k not in HOUSEKEEPING}
            found[name] = {"class": traits["_anywidget_id"], "state": plain}
    return found


def keep(nb, chapter: pathlib.Path) -> None:
    """Writes the file of a chapter that was just executed; removes it where the chapter shows no widget."""
    path, found = file_of(chapter), states(nb)
    if found:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(found, ensure_ascii=False) + "\n", encoding="utf-8")
    else:
        path.unlink(missing_ok=True)


def kept(chapter: pathlib.Path) -> dict[str, dict]:
    """What `keep` wrote; empty for a chapter without widgets."""
    path = file_of(chapter)
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def problems(nb, chapter: pathlib.Path) -> Iterator[str]:
    """A sentence where file and stored outputs are of different runs."""
    shown = {name for _, name in views(nb)}
    if shown != set(kept(chapter)):
        yield f"{file_of(chapter).name} in docs/widgets is of another run: run course/nb.py run, commit both"
