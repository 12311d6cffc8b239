"""The parts of a widget that run in the browser: its module and its style, with what all widgets share before them."""

from __future__ import annotations

from pathlib import Path

HERE = Path(__file__).parent


def module(name: str) -> str:
    """JavaScript of the widget `name`, complete in itself."""
    return _joined("theme.js", f"{name}.js")


def style(name: str) -> str:
    """CSS of the widget `name`, with the course's palette for light and dark themes."""
    return _joined("theme.css", f"{name}.css")


def _joined(*names: str) -> str:
    return "".join((HERE / name).read_text("utf-8") for name in names)
