"""Where mixoff keeps things for a user."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """Where figures of this machine and converted models are kept: `MIXOFF_CACHE`, or `mixoff` in the user's cache."""
    if own := os.environ.get("MIXOFF_CACHE"):
        return Path(own)
    user = os.environ.get("XDG_CACHE_HOME") or os.environ.get("LOCALAPPDATA") or os.path.expanduser("~/.cache")
    return Path(user) / "mixoff"
