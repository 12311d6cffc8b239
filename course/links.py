"""Reads built pages and says which of their links lead nowhere, and what they would load from a network.

Links to other sites are listed, never asked. Does not know how the pages were made.
"""

from __future__ import annotations

import functools
import pathlib
from collections.abc import Iterator
from dataclasses import dataclass
from html.parser import HTMLParser
from urllib.parse import unquote, urlsplit

LOADED = {"script": "src", "img": "src", "link": "href", "iframe": "src", "source": "src"}
INLINE = ("data", "blob", "mailto", "javascript")


class Page(HTMLParser):
    """What a page links to, what it loads, and the places in it that can be linked to."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.linked: list[str] = []
        self.loaded: list[str] = []
        self.ids: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Notes one element."""
        given = {name: value for name, value in attrs if value}
        self.ids |= {given[name] for name in ("id", "name") if name in given}
        if tag == "a" and "href" in given:
            self.linked.append(given["href"])
        if LOADED.get(tag) in given and given.get("rel") != "canonical":
            self.loaded.append(given[LOADED[tag]])


@dataclass
class Found:
    """internal: links that were followed. external: addresses of other sites. problems: a sentence each."""

    internal: int
    external: list[str]
    problems: list[str]


@functools.cache
def read(path: pathlib.Path) -> Page:
    """A page; each is read once."""
    return Page(path.read_text(encoding="utf-8"))


def missing(address: str, page: pathlib.Path) -> Iterator[str]:
    """A sentence if an address inside the site names no file, or no place in it."""
    parts = urlsplit(address)
    target = page.parent / unquote(parts.path) if parts.path else page
    target = target / "index.html" if target.is_dir() else target
    if not target.exists():
        yield f"{page.name}: {address} leads to no file"
    elif parts.fragment and target.suffix == ".html" and unquote(parts.fragment) not in read(target.resolve()).ids:
        yield f"{page.name}: {address} leads to no place in {target.name}"


def check(folder: pathlib.Path) -> Found:
    """Follows every link between the pages of a folder."""
    read.cache_clear()
    internal, external, problems = 0, set(), []
    for path in sorted(folder.resolve().rglob("*.html")):
        page = read(path)
        for address in page.linked + page.loaded:
            scheme, host = urlsplit(address)[:2]
            if scheme in INLINE:
                continue
            if not scheme and not host:
                internal += 1
                problems += missing(address, path)
            elif address in page.loaded:
                problems.append(f"{path.name} loads {address} from a network")
            else:
                external.add(address)
    return Found(internal, sorted(external), problems)
