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
    return _texts("heldout")


def calibration() -> dict[str, str]:
    """Text by domain from which quantization learns what inputs matrices get; none of it is in `heldout`.

    >>> {name: len(text.encode()) // 1000 for name, text in calibration().items()}  # kB
    {'code': 27, 'facts': 26, 'novel': 26, 'scripture': 26, 'spanish': 27}
    """
    return _texts("calibration")


def _texts(folder: str) -> dict[str, str]:
    return {p.stem: p.read_text(encoding="utf-8") for p in sorted((HERE / folder).glob("*.txt"))}


def path(name: str = "tiny-mixtral") -> Path:
    """Folder of a bundled model, in the layout of the Hugging Face Hub. Raises CheckpointError for an unknown name."""
    if name not in names():
        raise CheckpointError(f"no bundled model is called {name!r}; there are: {', '.join(names())}")
    return HERE / name


def students() -> dict[str, Path]:
    """Stores of models that were distilled from `tiny-mixtral` by `training/distil.py`; they have its tokenizer.

    >>> sorted(students())
    ['dense', 'four']
    """
    return {p.parent.name: p.parent for p in (HERE / "students").glob("*/config.json")}
