"""The files of the page at `/`, and those of the course's grid, which it shows.

The widget's JavaScript and CSS are read where they are; the classroom's Python, which needs Jupyter, is not imported.
"""

from __future__ import annotations

from pathlib import Path

HERE = Path(__file__).parent
WIDGETS = HERE.parents[1] / "widgets"
FILES = {
    "/": ("text/html", (HERE / "index.html",)),
    "/page.js": ("text/javascript", (HERE / "page.js",)),
    "/page.css": ("text/css", (HERE / "page.css",)),
    "/grid.js": ("text/javascript", (WIDGETS / "theme.js", WIDGETS / "cache_view.js")),
    "/grid.css": ("text/css", (WIDGETS / "theme.css", WIDGETS / "cache_view.css")),
}
# nothing from elsewhere, and no frame of another site around the page
POLICY = "default-src 'self'; style-src 'self' 'unsafe-inline'; img-src 'self' data:; frame-ancestors 'none'"
HEADERS = {"Content-Security-Policy": POLICY, "X-Content-Type-Options": "nosniff", "Cache-Control": "no-cache"}


def read(path: str) -> tuple[str, str]:
    """Media type and text of the file at `path`."""
    media_type, files = FILES[path]
    return media_type, "".join(file.read_text("utf-8") for file in files)
