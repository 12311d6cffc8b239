"""The files of a GGUF model, one or a split set, and the folder of small files that is made of their metadata.

The rest of mixoff reads configuration and tokenizer from a folder, as models on the Hub have one. That of a GGUF is
kept in the user's cache folder. Its name follows from the files and this version, so a changed file gets another one.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

from mixoff import folders
from mixoff._version import __version__
from mixoff.checkpoints.gguf.config import Facts, config_of
from mixoff.checkpoints.gguf.header import Header, Tensor, read_header
from mixoff.checkpoints.gguf.tokenizer import tokenizer_files
from mixoff.checkpoints.names import GGUF
from mixoff.errors import CheckpointError, MixoffError

PART = re.compile(r"^(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf$")
TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")


def is_gguf(path: Path) -> bool:
    """Whether a file is named like a GGUF."""
    return path.suffix.lower() == GGUF and os.path.isfile(path)


def parts(path: Path) -> list[Path]:
    """The files of the set that `path` belongs to, in order. Raises CheckpointError if one is missing."""
    if (m := PART.match(path.name)) is None:
        return [path]
    count = int(m["count"])
    present = {p.name for p in path.parent.glob("*.gguf")}
    names = (f"{m['stem']}-{i + 1:05d}-of-{m['count']}.gguf" for i in range(count))
    paths = []
    for name in names:
        if name not in present:
            raise CheckpointError(f"{path.parent} lacks {name}, one of {count} parts of this model: fetch it too")
        paths.append(path.parent / name)
    return paths


@dataclass(frozen=True)
class GgufFiles:
    """The headers of a model's files by name of file, and what they say together."""

    headers: dict[str, Header]
    facts: Facts


def open_files(path: Path) -> GgufFiles:
    """Read the headers of the model that `path` is, or is a part of. Raises CheckpointError."""
    headers = {part.name: read_header(part) for part in parts(path)}
    first = next(iter(headers.values()))
    tensors: dict[str, Tensor] = {}
    for i, header in enumerate(headers.values()):
        count, number = header.metadata.get("split.count", 1) or 1, header.metadata.get("split.no", 0)
        if (count, number) != (len(headers), i):
            raise CheckpointError(
                f"{header.path} says that it is part {number} of {count} (from 0), and its name says otherwise: "
                "give the parts the names that llama.cpp gave them"
            )
        if twice := tensors.keys() & header.tensors.keys():
            raise CheckpointError(f"{header.path} holds {min(twice)}, as an earlier part does: fetch the set again")
        tensors |= header.tensors
    total = first.metadata.get("split.tensors.count", len(tensors))
    if total != len(tensors):
        raise CheckpointError(f"{path} and its parts hold {len(tensors)} tensors of {total}: fetch the set again")
    return GgufFiles(headers, Facts(str(path), first.metadata, tensors))


def small_files(files: GgufFiles) -> dict[str, bytes]:
    """config.json, generation_config.json and the tokenizer's files."""
    config = config_of(files.facts)
    generation = {key: config[key] for key in TOKENS if key in config}
    jsons = {"config.json": config, "generation_config.json": generation}
    small = {name: (json.dumps(value, indent=1) + "\n").encode() for name, value in jsons.items()}
    return small | tokenizer_files(files.facts.name, files.facts.metadata)


def folder_of(path: Path) -> Path:
    """The folder of small files of the model at `path`, made if it is not there yet.

    Raises CheckpointError for a file that cannot be read, MixoffError if the cache folder cannot be written.
    """
    stats = [(part.name, (s := part.stat()).st_size, s.st_mtime_ns) for part in parts(path)]
    facts = __version__, str(path.parent.resolve()), stats
    name = f"{path.stem[:80]}-{hashlib.sha256(repr(facts).encode()).hexdigest()[:16]}"
    folder = folders.cache_folder() / "gguf" / name
    if (folder / "config.json").exists():
        return folder
    small = small_files(open_files(path))
    try:
        _write(folder, small)
    except OSError as error:
        raise MixoffError(
            f"cannot keep the configuration of {path} in {folder.parent} ({error.strerror or error}): name another "
            "folder in MIXOFF_CACHE"
        ) from error
    return folder


def _write(folder: Path, small: dict[str, bytes]) -> None:
    """Write a folder that appears as a whole; another process may have been faster."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    made = Path(tempfile.mkdtemp(dir=folder.parent))
    try:
        for name, content in small.items():
            (made / name).write_bytes(content)
        os.replace(made, folder)
    except OSError:
        shutil.rmtree(made, ignore_errors=True)
        if not (folder / "config.json").exists():
            raise
