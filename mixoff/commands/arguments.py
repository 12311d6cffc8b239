"""Values on the command line, read and checked before torch is imported, so that a typo is answered at once.

Functions named after a kind of value are types of argparse options: they return the value or raise
`argparse.ArgumentTypeError`.
"""

from __future__ import annotations

import argparse
import errno
import math
import os
import re
import stat
import tempfile
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from mixoff import models
from mixoff.checkpoints.model_files import refuse_gguf
from mixoff.checkpoints.names import GGUF, full, missing, parse
from mixoff.commands import terminal
from mixoff.errors import CheckpointError, MixoffError, suggestion
from mixoff.units import parse_nbytes

# copies of names that are defined where torch is imported; tests/commands/test_cli.py compares them
SCHEMES = ("mixed", "paper", "small", "quality", "none", "keep")
HEADS = ("head8", "head4")
DTYPES = ("auto", "float32", "bfloat16", "float16")
SHORT = {
    "fp32": "float32", "f32": "float32", "float": "float32", "bf16": "bfloat16",
    "fp16": "float16", "f16": "float16", "half": "float16",
}  # fmt: skip
IO = ("auto", "direct", "buffered")
PREFETCH = ("auto", "none", "next-router")
DECODE = ("compiled", "modules")
SCOPES = ("layer", "global")
MOST = 10**12  # largest count of anything
T = TypeVar("T")


def choice(what: str, names: Iterable[str], short: dict[str, str] | None = None) -> Callable[[str], str]:
    """One of `names`, or a key of `short`. An error about an unknown `what` lists the names and suggests one."""
    return _Choice(what, list(names), short or {})


@dataclass(frozen=True, eq=False)
class _Choice:
    """A type of argparse options: one of `names`, which shells can complete."""

    what: str
    names: list[str]
    short: dict[str, str]

    def __call__(self, text: str) -> str:
        if (name := self.short.get(text.lower(), text)) in (*self.names, *self.short.values()):
            return name
        known = f"unknown {self.what} {text!r}: choose one of {', '.join(self.names)}"
        raise argparse.ArgumentTypeError(known + suggestion(text, [*self.names, *self.short]))


def names_of(kind: object) -> list[str]:
    """The names that an option of this type takes, for completion in a shell; empty if they cannot be listed."""
    from mixoff.cache.policies import POLICIES
    from mixoff.planning.hardware import NAMED

    if isinstance(kind, _Choice):
        return kind.names
    by_hand: dict[object, list[str]] = {
        policy: [*sorted(POLICIES), "none"],
        machine: [*NAMED, "here"],
        device: ["auto", "cpu", "cuda"],
        kv_bits: ["4", "8", "16"],
    }
    return by_hand.get(kind, [])


def policy(text: str) -> str:
    """A cache policy of the runtime."""
    from mixoff.cache.policies import POLICIES

    return choice("policy", [*sorted(POLICIES), "none"])(text)


def simulated_policy(text: str) -> str:
    """A cache policy of the simulator, or `all`."""
    from mixoff.trace.replay import CODES

    return choice("policy", [*sorted(CODES), "all"])(text)


def machine(text: str) -> str:
    """The name of a machine, in any spelling."""
    from mixoff.planning import hardware

    return _explained(lambda: hardware.named_as(text))


def size(text: str) -> str:
    """Bytes, as in 500MB or 6GiB."""
    _explained(lambda: parse_nbytes(text))
    return text


def size_or_auto(text: str) -> str:
    """Bytes, or `auto`."""
    return text if text == "auto" else size(text)


def _explained(work: Callable[[], T]) -> T:
    try:
        return work()
    except MixoffError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def device(text: str) -> str:
    """A name of a torch device."""
    if re.fullmatch(r"auto|cpu|cuda(:\d{1,3})?", text):
        return text
    raise argparse.ArgumentTypeError(f"unknown device {text!r}: choose auto, cpu, cuda or cuda:N")


def whole(name: str, way_out: str, least: int = 1, most: int = MOST) -> Callable[[str], int]:
    """A whole number from `least` to `most`."""

    def read(text: str) -> int:
        if not re.fullmatch(r"\s*[+-]?[0-9]{1,25}\s*", text):
            raise argparse.ArgumentTypeError(f"{name} is {text[:40]!r}, which is not a whole number: {way_out}")
        if not least <= (number := int(text)) <= most:
            raise argparse.ArgumentTypeError(f"{name} is {number}: {way_out}")
        return number

    return read


def real(name: str, way_out: str, least: float = 0.0, most: float = 1e6) -> Callable[[str], float]:
    """A number from `least` to `most`."""

    def read(text: str) -> float:
        try:
            number = float(text)
        except ValueError:
            number = math.nan
        if not least <= number <= most:
            raise argparse.ArgumentTypeError(f"{name} is {text[:40]!r}: {way_out}")
        return number

    return read


def kv_bits(text: str) -> int | None:
    """Bits of keys and values; None is 16."""
    bits = choice("kv_bits", ("4", "8", "16"))(text)
    return None if bits == "16" else int(bits)


def words(text: str) -> str:
    """Text that can be encoded as UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise argparse.ArgumentTypeError(f"character {error.start + 1} is not valid UTF-8: pass UTF-8 text") from None
    return text


# Files, folders, names of models --------------------------------------------------------------------------------------


def model(path: str) -> None:
    """Check that `path` can be a model, and announce a look-up on the Hub. Raises MixoffError."""
    if path in models.names():
        return
    if (repository := parse(path)) is not None:
        if os.environ.get("HF_HUB_OFFLINE", "").upper() not in ("1", "ON", "YES", "TRUE"):
            given = f"no folder at {path}" if path == str(repository) else f"{path} is {repository}"
            terminal.say(f"{given}: looking for it on the Hugging Face Hub")
        return
    folder = Path(os.path.expanduser(path))
    if os.path.isfile(folder) and folder.suffix.lower() == GGUF:
        return
    if os.path.isfile(folder):
        raise CheckpointError(f"{path} is a file: give the folder that holds config.json and *.safetensors")
    if not os.path.isdir(folder):
        raise CheckpointError(missing(path))
    if not os.path.isfile(folder / "config.json"):
        refuse_gguf(os.listdir(folder), folder)
        raise CheckpointError(f"{path} has no config.json: a model folder holds config.json and *.safetensors")


def plan_source(path: str) -> str:
    """A model to plan: what `model` takes, a config.json, or the name of a well-known model, returned in full."""
    from mixoff.shapes.known import PRESETS, named_as

    if os.path.isfile(path) or (path := named_as(full(path))) in PRESETS:
        return path
    try:
        model(path)
    except CheckpointError as error:
        raise CheckpointError(f"{error}; or one of {', '.join(PRESETS)}") from None
    return path


def text_of(path: str) -> str:
    """The text of a file in UTF-8. Raises MixoffError."""
    try:
        with open(path, encoding="utf-8") as file:
            return file.read()
    except (OSError, UnicodeDecodeError) as error:
        raise MixoffError(f"cannot read {path} as text: {getattr(error, 'strerror', None) or error}") from error
    except ValueError as error:  # a name that no file can have
        raise MixoffError(f"cannot read {path!r} as text: {error}") from error


def new_file(path: str, *suffixes: str) -> None:
    """Check, before the work starts, that a file can be written. Raises MixoffError."""
    if suffixes and Path(path).suffix not in suffixes:
        raise MixoffError(f"cannot write {path}: name it {Path(path).stem or 'trace'}{suffixes[0]}")
    if os.path.isdir(path):
        raise MixoffError(f"cannot write {path}: it is a folder; name a file in it")
    _writable(path, Path(path).absolute().parent)


def new_folder(path: str) -> None:
    """Check that a folder does not exist and can be created. Raises MixoffError."""
    target = Path(path).absolute()
    if os.path.lexists(target) and not os.path.isfile(f"{target}.partial/journal"):
        raise CheckpointError(f"{path} already exists: choose another folder, or remove it first")
    _writable(path, next(parent for parent in target.parents if os.path.lexists(parent)))


def _writable(path: str, folder: Path) -> None:
    """Write a temporary file: permissions do not show read-only disks, or folders that are not on a disk."""
    try:
        with suppress(FileNotFoundError):
            if stat.S_ISREG(os.lstat(path).st_mode) and not os.access(path, os.W_OK):
                raise PermissionError(errno.EACCES, "the file there is read-only")
        with tempfile.TemporaryFile(dir=folder):
            pass
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise MixoffError(f"cannot write {path}: {reason}; choose a folder that you can write to") from error
