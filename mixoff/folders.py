"""Folders on the disk: where mixoff keeps things for a user, and when they are safe."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """Where figures of this machine and converted models are kept: `MIXOFF_CACHE`, or `mixoff` in the user's cache."""
    if own := os.environ.get("MIXOFF_CACHE"):
        return Path(own)
    user = os.environ.get("XDG_CACHE_HOME") or os.environ.get("LOCALAPPDATA") or os.path.expanduser("~/.cache")
    return Path(user) / "mixoff"


def sync(path: Path) -> None:
    """Wait until a file's bytes, or a folder's names, are on the disk."""
    folder = path.is_dir()
    if os.name == "nt" and folder:  # Windows opens no folders
        return
    fd = os.open(path, os.O_RDONLY if folder else os.O_RDWR)  # and syncs only what is open for writing
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
