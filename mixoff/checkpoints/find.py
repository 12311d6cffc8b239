"""The one door to a model: what a path, a bundled model's name or a Hub id names, found out once."""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from mixoff import models
from mixoff.checkpoints import model_files
from mixoff.checkpoints.checkpoint import Checkpoint
from mixoff.checkpoints.gguf import files as gguf_files
from mixoff.checkpoints.hub import HubShards, config_folder, snapshot
from mixoff.checkpoints.names import missing, parse, pinned
from mixoff.checkpoints.published import checkpoint_class, open_checkpoint
from mixoff.checkpoints.shards import LocalShards, Shards
from mixoff.errors import CheckpointError


@dataclass(frozen=True)
class Folder:
    """A model's folder on this machine.

    - path: the folder, in the Hub cache for a model on the Hub.
    - name: a bundled model's name or a Hub id; None for any other folder.
    - gguf: the GGUF file, or any part of a split one, whose configuration and tokenizer are in the folder.
    """

    path: Path
    name: str | None = None
    gguf: Path | None = None

    def __str__(self) -> str:
        return self.name or str(self.gguf or self.path)

    @cached_property
    def kind(self) -> str:
        """`"store"`, `"config"` for a configuration without weights, or the kind of its checkpoint.

        Kinds of checkpoints: `"plain"`, `"published"` (see `checkpoints.published`), and the encoded ones, `"fp8"`,
        `"mxfp4"`, `"gptq"`, `"awq"`, `"compressed-tensors"`, `"bitsandbytes"`, `"modelopt"` and `"gguf"`.
        """
        if self.gguf:
            return "gguf"
        if (self.path / model_files.MANIFEST).exists():
            return "store"
        return checkpoint_class(self.path).kind if model_files.begun(self.path) else "config"

    @property
    def is_store(self) -> bool:
        """Whether mixoff converted this model."""
        return self.kind == "store"

    @property
    def is_quantized(self) -> bool:
        """Whether the files are quantized already, so that no scheme can be chosen for them."""
        return self.kind in ("store", "published")

    def checkpoint(self) -> Checkpoint:
        """The checkpoint in this folder. Raises CheckpointError."""
        if self.gguf:
            from mixoff.checkpoints.gguf.checkpoint import GgufCheckpoint

            return GgufCheckpoint(self.gguf)
        return open_checkpoint(self.path)


def here(source: object) -> Folder | None:
    """The folder on this machine that `source` names, without a look at the Hub; a file names its folder.

    A GGUF names a folder in the cache, made of its metadata. Raises CheckpointError for one that cannot be read.
    """
    if not isinstance(source, (str, Path)):
        return None
    if str(source) in models.names():
        return Folder(models.path(str(source)), str(source))
    path = Path(os.path.expanduser(source))
    if gguf_files.is_gguf(path):
        first = gguf_files.parts(path)[0]
        return Folder(gguf_files.folder_of(first), gguf=first)
    if os.path.isfile(path):
        return Folder(path.parent)
    return Folder(path) if os.path.isdir(path) else None


def find(source: str | Path | Folder, revision: str | None = None, config_only: bool = False) -> Folder:
    """The folder of a model, fetched into the Hub cache if needed.

    - source: a folder, a bundled model, or a Hub id.
    - revision: branch, tag or commit of a model on the Hub.
    - config_only: whether config.json is all that is fetched.

    Raises CheckpointError.
    """
    if isinstance(source, Folder):
        return source
    source = pinned(source, revision)
    if (model := parse(source)) is not None:
        return Folder(config_folder(model) if config_only else snapshot(model), str(model))
    folder = here(source)
    if folder is None or (not folder.name and not folder.gguf and os.path.isfile(os.path.expanduser(source))):
        raise CheckpointError(missing(source))
    return folder


def open_shards(source: str | Path | Folder, revision: str | None, downloads: Path) -> Shards:
    """The shards of a checkpoint.

    - source, revision: as in `find`; in offline mode a model on the Hub has to be in the Hub cache.
    - downloads: folder for shards that are fetched; created with the first one.
    """
    from huggingface_hub import constants

    if not isinstance(source, Folder):
        source = pinned(source, revision)
        if (model := parse(source)) is not None and not constants.HF_HUB_OFFLINE:
            return HubShards(model, downloads)
    folder = find(source)
    if folder.is_store:
        raise CheckpointError(f"{source} is already a store: load it as it is, or copy the folder")
    return LocalShards(folder.checkpoint())
