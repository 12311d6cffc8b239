"""Configurations of well-known models, so that their Hub ids can be planned without a network."""

from __future__ import annotations

import json
import os
from pathlib import Path

from mixoff import models

DEMO = "lavawolfiee/Mixtral-8x7B-Instruct-v0.1-offloading-demo"  # Mixtral in 2 bits, published with the paper
PRESETS: dict[str, dict] = json.loads(Path(__file__).with_name("known.json").read_bytes())


def named_as(source: str | Path) -> str:
    """The name in PRESETS that `source` abbreviates, unless a folder or bundled model has that name; else `source`.

    >>> named_as("mixtral-8x7b"), named_as("qwen3-30b-a3b"), named_as("tiny-mixtral")
    ('mistralai/Mixtral-8x7B-Instruct-v0.1', 'Qwen/Qwen3-30B-A3B', 'tiny-mixtral')
    """
    word = str(source).lower()
    if not word or word in models.names() or os.path.exists(source):
        return str(source)
    short = {name: name.lower().partition("/")[2] for name in PRESETS}
    equal = (name for name in PRESETS if word in (name.lower(), short[name]))
    return next(equal, next((name for name in PRESETS if short[name].startswith(f"{word}-")), str(source)))
