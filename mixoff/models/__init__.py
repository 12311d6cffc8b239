"""Models that ship with the package, so that everything runs without a network."""

from __future__ import annotations

from pathlib import Path

from mixoff.errors import CheckpointError

HERE = Path(__file__).parent


def names() -> list[str]:
    """Names of the bundled models.

    >>> names()
    ['tiny-mixtral']
    """
    return sorted(p.parent.name for p in HERE.glob("*/config.json"))


def heldout() -> dict[str, str]:
    """Held-out text by domain, which no bundled model was trained on; sources and licences are next to the files.

    >>> sorted(heldout())
    ['code', 'facts', 'novel', 'scripture', 'spanish']
    """
    return {p.stem: p.read_text(encoding="utf-8") for p in (HERE / "heldout").glob("*.txt")}


def path(name: str = "tiny-mixtral") -> Path:
    """Folder of a bundled model, in the layout of the Hugging Face Hub. Raises CheckpointError for an unknown name."""
    if name not in names():
        raise CheckpointError(f"no bundled model is called {name!r}; there are: {', '.join(names())}")
    return HERE / name
