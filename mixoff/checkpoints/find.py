"""Finds the folder or the shards of a model by path or Hub id, and fetches them if needed."""

from __future__ import annotations

import os
from pathlib import Path

from mixoff import models
from mixoff.checkpoints.hub import HubShards, snapshot
from mixoff.checkpoints.names import parse
from mixoff.checkpoints.shards import LocalShards, Shards


def local_folder(path: str | Path) -> Path:
    """The folder of a model: a path, a bundled model's folder, or a Hub model's in the Hub cache, fetched if needed."""
    if str(path) in models.names():
        return models.path(str(path))
    model = parse(path)
    return Path(os.path.expanduser(path)) if model is None else snapshot(model)


def open_shards(source: str | Path, downloads: Path) -> Shards:
    """The shards of a checkpoint.

    - source: a folder, a bundled model, or a Hub id; in offline mode the model has to be in the Hub cache.
    - downloads: folder for shards that are fetched; created with the first one.
    """
    model = parse(source)
    if model is None:
        return LocalShards(local_folder(source))
    from huggingface_hub import constants

    return LocalShards(snapshot(model)) if constants.HF_HUB_OFFLINE else HubShards(model, downloads)
