"""Names of models: a folder, a bundled model, a Hub id, its address on the Hub, or a well-known model's short name."""

from __future__ import annotations

import contextlib
import os
import re
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote

from mixoff import models
from mixoff.errors import CheckpointError, suggestion
from mixoff.shapes import known

PAGE = re.compile(  # a model's page on the Hub, or the page of a branch, a folder or a file of it
    r"^(?:https?://)?(?:www\.)?(?:huggingface\.co|hf\.co)/(?P<repo>[^/?#]+/[^/?#]+)"
    r"(?:/(?:tree|blob|resolve)/(?P<revision>[^/?#]+))?(?:[/?#].*)?$"
)
GGUF = ".gguf"
SIZE = re.compile(r"\d+(x\d+)?b(-|$)")  # a short name says how large the model is: `gpt` alone fetches nothing
NAME = re.compile(r"^(?P<repo>\w[\w.-]*/\w[\w.-]*)(?:@(?P<revision>[\w./-]+))?$")


@dataclass(frozen=True)
class HubId:
    """A model on the Hub; without a revision, its default branch."""

    repo: str
    revision: str | None = None

    def __str__(self) -> str:
        return f"{self.repo}@{self.revision}" if self.revision else self.repo


def full(source: str | Path) -> str:
    """The Hub id that an address on the Hub or a well-known model's short name stands for; any other name as it is.

    >>> full("https://huggingface.co/org/model/tree/v1.0"), full("qwen3-30b-a3b"), full("./org/model")
    ('org/model@v1.0', 'Qwen/Qwen3-30B-A3B', './org/model')
    """
    if page := PAGE.match(str(source)):
        revision = page["revision"] if page["revision"] != "main" else None
        return f"{page['repo']}@{unquote(revision)}" if revision else page["repo"]
    return known.named_as(source) if SIZE.search(str(source).lower()) else str(source)


def parse(path: str | Path, revision: str | None = None) -> HubId | None:
    """The model on the Hub that `path` names; None for an existing folder, a bundled model, or any other path.

    `a/b` without a revision counts as a path if a folder `a` exists, so a mistyped path is never looked up on the Hub.

    >>> parse("org/model@v1.0"), parse("./org/model"), parse("org/model", revision="refs/pr/1").revision
    (HubId(repo='org/model', revision='v1.0'), None, 'refs/pr/1')
    """
    m = NAME.match(name := full(path))
    if not m or str(path) in models.names() or os.path.exists(path):  # os.path.exists raises nothing, whatever the name
        return None
    if name.lower().endswith(GGUF):  # a file; no model on the Hub is named like one that mixoff opens there
        return None
    revision = revision or m["revision"]
    plain = name == str(path) and os.path.isdir(m["repo"].split("/")[0])
    return HubId(m["repo"], revision) if revision or not plain else None


def missing(path: str | Path) -> str:
    """The message about a path that is not a folder, with suggestions."""
    parent = Path(os.path.expanduser(path)).parent
    known = models.names()
    with contextlib.suppress(OSError, ValueError):
        known = [*known, *(str(p) for p in parent.iterdir() if p.is_dir() or p.suffix == GGUF)]
    if str(path).lower().endswith(GGUF):
        return f"no GGUF file at {path}: give the path of a file, or of the first part of a split one" + suggestion(
            str(path), known
        )
    text = f"no model folder at {path}: give the folder that holds config.json and *.safetensors"
    m = NAME.match(str(path))
    hub = f"; {m['repo']}@main is the model of that name on the Hub" if m else ""
    return text + hub + suggestion(str(path), known)


def pinned(path: str | Path, revision: str | None) -> str | Path:
    """`path` with the revision of an argument. Raises CheckpointError if `path` is not a Hub id."""
    if revision is None:
        return path
    if (model := parse(path, revision)) is None:
        raise CheckpointError(f"{path} is not a Hub model id, so revision {revision!r} does not apply: leave it out")
    return str(model)
