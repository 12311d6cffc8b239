"""Stores that `load` makes of a checkpoint in another scheme: kept in the user's cache folder, and found again.

The name of a kept store follows from the checkpoint's files, the scheme and this version, so a changed checkpoint is
converted again. A conversion that was killed continues where it stopped.
"""

from __future__ import annotations

import hashlib
import logging
from pathlib import Path
from typing import TYPE_CHECKING

from mixoff import folders
from mixoff._version import __version__
from mixoff.checkpoints.shards import LocalShards
from mixoff.errors import MixoffError
from mixoff.store import convert
from mixoff.store.inventory import nbytes_of
from mixoff.store.manifest import FORMAT, MANIFEST, VERSION
from mixoff.units import format_nbytes

if TYPE_CHECKING:
    from mixoff.checkpoints.find import Folder
    from mixoff.quantize.scheme import Scheme


log = logging.getLogger("mixoff")


def stores() -> Path:
    """The folder of kept stores: `stores` in the cache folder, which `MIXOFF_CACHE` sets."""
    return folders.cache_folder() / "stores"


def store_of(folder: Folder, scheme: Scheme) -> Path:
    """The store of the checkpoint in `folder` in `scheme`, converted if it is not there yet.

    A second process that asks for the same store waits until the first has converted it. Raises CheckpointError for
    what cannot be converted, MixoffError if the cache folder cannot be written.
    """
    from filelock import FileLock

    target = stores() / name_of(folder, scheme)
    if (target / MANIFEST).exists():
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{target}.lock"):
            if not (target / MANIFEST).exists():
                convert.run(folder, target, scheme)
                size = format_nbytes(nbytes_of(target))
                log.warning("kept %s in %s for the next time: delete that folder to free it", size, target)
    except OSError as error:
        raise MixoffError(
            f"cannot keep the converted model in {target.parent} ({error.strerror or error}): name another folder in "
            "MIXOFF_CACHE, or write a store of your own with `mixoff convert`"
        ) from error
    return target


def name_of(folder: Folder, scheme: Scheme) -> str:
    """A name for the checkpoint in `folder` in `scheme`, another one for changed files."""
    shards = LocalShards(folder.checkpoint())
    path = (folder.gguf or folder.path).resolve()
    facts = __version__, FORMAT, VERSION, scheme, str(path), shards.identity(), shards.side_files()
    return f"{path.name}-{hashlib.sha256(repr(facts).encode()).hexdigest()[:16]}"
