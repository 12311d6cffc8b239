"""Folders on the disk: where mixoff keeps things for a user, and when they are safe."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """The folder for measurements of this machine and converted models: `MIXOFF_CACHE`, or one in the user's cache."""
    if configured := os.environ.get("MIXOFF_CACHE"):
        return Path(configured)
    user = os.environ.get("XDG_CACHE_HOME") or os.environ.get("LOCALAPPDATA") or os.path.expanduser("~/.cache")
    return Path(user) / "mixoff"


def sync(path: Path) -> None:
    """Wait until a file's bytes, or a folder's names, are on the disk."""
    folder = path.is_dir()
    if os.name == "nt" and folder:  # Windows cannot open folders
        return
    fd = os.open(path, os.O_RDONLY if folder else os.O_RDWR)  # Windows syncs only files that are open for writing
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
