"""Where the model that a path or a Hub id names is, fetched if need be."""

from __future__ import annotations

import os
from pathlib import Path

from mixoff import models
from mixoff.checkpoints.hub import HubShards, snapshot
from mixoff.checkpoints.names import parse
from mixoff.checkpoints.shards import LocalShards, Shards


def local_folder(path: str | Path) -> Path:
    """The folder of a model: itself, a bundled model's, or in the Hub's cache that of a model on the Hub, fetched."""
    if str(path) in models.names():
        return models.path(str(path))
    model = parse(path)
    return Path(os.path.expanduser(path)) if model is None else snapshot(model)


def open_shards(source: str | Path, downloads: Path) -> Shards:
    """The shards of a checkpoint: a folder, a bundled model, or a model on the Hub.

    downloads: the folder for shards that have to be fetched, made when the first one is. Without a connection, the
    shards in the Hub's cache have to do.
    """
    model = parse(source)
    if model is None:
        return LocalShards(local_folder(source))
    from huggingface_hub import constants

    return LocalShards(snapshot(model)) if constants.HF_HUB_OFFLINE else HubShards(model, downloads)
