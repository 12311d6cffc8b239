"""Traces in files: .npz, .csv and .jsonl, read as data and checked before use."""

from __future__ import annotations

import csv
import json
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from mixoff.errors import MixoffError

VERSION = 1
OPTIONAL = ("weights", "times_s", "predicted", "scores")  # arrays by token that a trace may lack
FORMATS = (".npz", ".csv", ".jsonl", ".ndjson")
NO_EXPERT = -1  # an empty place in a token's choice
PHASES = ("decode", "prompt")
# what zipfile and numpy raise for a file that is not a .npz, is damaged, or states a false size
UNREADABLE = (zipfile.BadZipFile, zlib.error, OSError, ValueError, EOFError, KeyError, RuntimeError, MemoryError)


def npz_arguments(path: Path) -> dict[str, Any]:
    """The arguments of `Trace.from_array` in a trace that mixoff saved. Raises MixoffError."""
    arrays = read_arrays(path)
    if "version" not in arrays:
        raise MixoffError(
            f"{path} is not a mixoff trace: it has no version (arrays found: {', '.join(arrays) or 'none'}); "
            "build one with mixoff.Trace.from_array"
        )
    if arrays["version"].shape != () or arrays["version"] != VERSION:
        raise MixoffError(f"{path} has version {arrays['version']}, this mixoff reads {VERSION}: update mixoff")
    scalars = {name: arrays.pop(name) for name in ("version", "num_experts", "expert_nbytes") if name in arrays}
    known = {"experts", "is_prompt", "passes", "layers", *OPTIONAL}
    if lacking := {"experts", "is_prompt", "passes", "layers", "num_experts"} - arrays.keys() - scalars.keys():
        raise MixoffError(f"{path} lacks {', '.join(sorted(lacking))}: record or convert the trace again")
    if unknown := arrays.keys() - known:
        raise MixoffError(f"{path} has unknown arrays {', '.join(sorted(unknown))}: it is damaged or not ours")
    for name, value in scalars.items():
        if value.shape != () or value.dtype.kind not in "iu":
            raise MixoffError(f"{path}: {name} is {value.dtype} {value.shape}, not one integer")
    numbers = {name: int(value) for name, value in scalars.items() if name != "version"}
    return arrays | numbers


def read_arrays(path: str | Path) -> dict[str, np.ndarray]:
    """Every array of a `.npz`, each header checked against the bytes in the file; never unpickles."""
    try:
        with zipfile.ZipFile(path) as archive:
            return {info.filename.removesuffix(".npy"): _read_member(archive, info) for info in archive.infolist()}
    except UNREADABLE as error:
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        raise MixoffError(f"cannot read {path} as .npz: {reason}") from error


def _read_member(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> np.ndarray:
    with archive.open(info) as file:
        version = np.lib.format.read_magic(file)
        read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}.get(version)
        if read is None:
            raise ValueError(f"{info.filename} has .npy version {version}")
        shape, fortran, dtype = read(file)
        if dtype.kind not in "biuf":
            raise ValueError(f"{info.filename} holds {dtype}, not numbers")
        count, left = int(np.prod(shape, dtype=object)), info.file_size - file.tell()
        if count * dtype.itemsize != left:
            raise ValueError(f"{info.filename} says {shape} {dtype}, but has {left:,} bytes")
        flat = np.frombuffer(file.read(left), dtype, count)
    return flat.reshape(shape, order="F" if fortran else "C")


def readable(path: str | Path) -> Any:
    """The file opened as UTF-8 text, without a byte-order mark. Raises MixoffError, with the reason."""
    try:
        return open(path, newline="", encoding="utf-8-sig")
    except OSError as error:
        raise MixoffError(f"cannot read {path}: {error.strerror or error}") from error


@contextmanager
def naming(path: str | Path) -> Iterator[None]:
    """Put the file's name before every error of its content."""
    try:
        yield
    except (UnicodeDecodeError, csv.Error) as error:
        raise MixoffError(f"cannot read {path} as text: {error}") from error
    except MixoffError as error:
        raise MixoffError(f"{path}: {error}") from error


def json_rows(file: Iterable[str]) -> Iterator[tuple[int, dict]]:
    """(line, row with one expert) of each expert of each line."""
    for number, line in enumerate(file, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise MixoffError(f"line {number}: not JSON: {error.msg}") from error
        if not isinstance(row, dict):
            raise MixoffError(f"line {number}: give an object with token, layer and experts")
        experts, weights = row.pop("experts", None), row.pop("weights", None)
        if experts is None:
            yield number, row
            continue
        if not isinstance(experts, list) or (weights is not None and len(weights) != len(experts)):
            raise MixoffError(f"line {number}: experts must be a list, and weights a list of the same length")
        for k, expert in enumerate(experts):
            yield number, row | {"expert": expert} | ({} if weights is None else {"weight": weights[k]})


def row_arguments(rows: Iterable[tuple[int, dict]], num_experts: int | None) -> dict[str, Any]:
    """The arguments of `Trace.from_array` for rows with `token`, `layer`, `expert` and optional columns."""
    table = [_parsed(number, row) for number, row in rows]
    if not table:
        raise MixoffError("no rows: a trace has at least one token")
    token, T = _numbered([row["token"] for row in table])
    layer, L = _numbered([row["layer"] for row in table])
    place = _places(token * L + layer)
    experts = np.full((T, L, int(place.max()) + 1), NO_EXPERT, np.int64)
    experts[token, layer, place] = [row["expert"] for row in table]
    if (experts[:, :, 0] < 0).any():
        t, at = np.argwhere(experts[:, :, 0] < 0)[0]
        names = np.unique([row["token"] for row in table])[t], np.unique([row["layer"] for row in table])[at]
        raise MixoffError(f"token {names[0]} has no expert in layer {names[1]}")
    highest = int(experts.max()) + 1
    known = {name: _by_token(name, table, token, T) for name in ("pass", "phase", "time_s")}
    weights = None
    if all(row["weight"] is not None for row in table):
        weights = np.zeros(experts.shape)
        weights[token, layer, place] = [row["weight"] for row in table]
    return {
        "experts": experts,
        "num_experts": highest if num_experts is None else num_experts,
        "is_prompt": None if known["phase"] is None else known["phase"] == "prompt",
        "passes": known["pass"],
        "layers": np.unique([row["layer"] for row in table]),
        "weights": weights,
        "times_s": known["time_s"],
    }


NUMBERS = {"token": int, "layer": int, "expert": int, "weight": float, "pass": int, "time_s": float}


def _parsed(number: int, row: dict) -> dict:
    """A row's values as numbers; None for missing ones."""
    row = {name: value for name, value in row.items() if value not in (None, "")}
    if lacking := [name for name in ("token", "layer", "expert") if name not in row]:
        raise MixoffError(f"line {number}: {' and '.join(lacking)} missing")
    out = {name: _number(number, name, row[name], kind) if name in row else None for name, kind in NUMBERS.items()}
    if row.get("phase") not in (None, *PHASES):
        raise MixoffError(f"line {number}: phase is {row['phase']!r}, not one of {', '.join(PHASES)}")
    return out | {"phase": row.get("phase")}


def _number(line: int, name: str, value: Any, kind: type) -> int | float:
    """`value` as a whole number of at least 0, or as a float. Raises MixoffError."""
    try:
        parsed = kind(value)
        right = isinstance(value, str) or (not isinstance(value, bool) and parsed == value)
    except (TypeError, ValueError, OverflowError):
        right = False
    if not right or (kind is int and not 0 <= parsed < 2**31):
        raise MixoffError(
            f"line {line}: {name} is {value!r}, not a {'whole number from 0' if kind is int else 'number'}"
        )
    return parsed


def _numbered(values: list[int]) -> tuple[np.ndarray, int]:
    """Each value's rank among the distinct ones, and how many there are."""
    distinct, rank = np.unique(values, return_inverse=True)
    return rank, len(distinct)


def _places(group: np.ndarray) -> np.ndarray:
    """Each row's place within its group, in order of appearance."""
    order = np.argsort(group, kind="stable")
    starts = np.searchsorted(group[order], group[order])
    place = np.empty_like(order)
    place[order] = np.arange(len(group)) - starts
    return place


def _by_token(name: str, table: list[dict], token: np.ndarray, T: int) -> np.ndarray | None:
    """One value per token, or None if no row has it; rows of a token must agree."""
    given = [row[name] for row in table]
    if all(value is None for value in given):
        return None
    if any(value is None for value in given):
        raise MixoffError(f"some rows have no {name}: give it in every row or in none")
    given, column = np.asarray(given), np.empty(T, np.asarray(given).dtype)
    column[token] = given
    if (column[token] != given).any() and name != "time_s":
        raise MixoffError(f"rows of one token differ in {name}")
    return column
