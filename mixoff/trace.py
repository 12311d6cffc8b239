"""Which experts a model asked for, token by token: recorded, stored, imported, counted.

Letters: **T** tokens, **L** MoE layers, **K** experts a token, **E** experts a layer, **P** passes.
A pass is one forward pass of the model: a whole prompt, or one token of decoding (several, in a batch). Files are
`.npz` with a version, read without pickle and checked before use; CSV and JSONL come in too.

Does not know caches, nor models beyond the runtime's hook.
"""

from __future__ import annotations

import csv
import functools
import json
import math
import os
import time
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from mixoff import models
from mixoff.errors import MixoffError, suggestion
from mixoff.jit import jit

VERSION = 1
OPTIONAL = ("weights", "times_s", "predicted", "scores")  # by token; what a trace may or may not know
BESIDE = ("weights", "predicted")  # what `load_domains` reads beside a trace
FORMATS = (".npz", ".csv", ".jsonl", ".ndjson")
NO_EXPERT = -1  # a place in a token's choice that names nobody
MAX_EXPERTS = 2**15 - 1  # experts are stored as int16 at most
PHASES = ("decode", "prompt")
# what zipfile and numpy raise for a file that is none, is damaged, or lies about its size
UNREADABLE = (zipfile.BadZipFile, zlib.error, OSError, ValueError, EOFError, KeyError, RuntimeError, MemoryError)


@dataclass(frozen=True, eq=False)
class Requests:
    """Calls of MoE layers in the order in which a model makes them.

    keys: int (R,), layer * E + expert; call c asks for `keys[starts[c]:starts[c + 1]]`. starts: int (P * L + 1,).
    site: int (P * L,), which of the L layers calls. is_prompt: bool (P * L,). named: int (P * L, M), keys that a
    predictor named before each call, -1 for none, or None. scores: float32 (P * L, E), the router's, or None.
    """

    keys: np.ndarray
    starts: np.ndarray
    site: np.ndarray
    is_prompt: np.ndarray
    named: np.ndarray | None = None
    scores: np.ndarray | None = None


@dataclass(frozen=True, eq=False)
class Trace:
    """Choices of a router. Make one with `from_array`, `load` or a runtime's `trace()`; all of them check it.

    experts: int (T, L, K), in router order; -1 where a token has fewer than K. num_experts: E, of every layer.
    is_prompt: bool (T,). passes: int (T,), ascending; tokens of equal number went through the model together.
    layers: (L,) numbers of the MoE layers in the model. weights: float32 (T, L, K), what the router gave each choice,
    or None. times_s: float64 (T,), when the pass of each token began, or None. expert_nbytes: of one expert, or None.
    predicted: int (T, L, M), experts that a prefetcher named before each call, best first, -1 for none, at the first
    token of a pass, or None. scores: float16 (T, L, E), how the router liked every expert, from 0 to 1, or None.
    """

    experts: np.ndarray
    num_experts: int
    is_prompt: np.ndarray
    passes: np.ndarray
    layers: tuple[int, ...]
    weights: np.ndarray | None = None
    times_s: np.ndarray | None = None
    expert_nbytes: int | None = None
    predicted: np.ndarray | None = None
    scores: np.ndarray | None = None

    # --- where traces come from

    @classmethod
    def from_array(
        cls,
        experts: np.ndarray,
        num_experts: int = 8,
        *,
        is_prompt: np.ndarray | None = None,
        passes: np.ndarray | None = None,
        layers: Iterable[int] | None = None,
        weights: np.ndarray | None = None,
        times_s: np.ndarray | None = None,
        expert_nbytes: int | None = None,
        predicted: np.ndarray | None = None,
        scores: np.ndarray | None = None,
    ) -> Trace:
        """A trace of `experts`, int (T, L, K). Without `is_prompt` all is decoding, one token a pass.

        Without `passes` every run of prompt tokens is one pass. Raises MixoffError for what cannot be a trace.

        >>> Trace.from_array([[[0, 3], [1, 2]], [[0, 1], [2, 5]]])
        Trace(2 tokens, 2 layers, top-2 of 8 experts, 0 of a prompt)
        """
        experts = _experts(experts, num_experts)
        T, L, _ = experts.shape
        is_prompt = _column("is_prompt", np.zeros(T, bool) if is_prompt is None else is_prompt, (T,), "b")
        passes = _default_passes(is_prompt) if passes is None else _column("passes", passes, (T,), "iu")
        layers = _column("layers", np.arange(L) if layers is None else np.asarray([*layers]), (L,), "iu")
        if weights is not None:
            weights = _column("weights", weights, experts.shape, "f").astype(np.float32)
        if times_s is not None:
            times_s = _column("times_s", times_s, (T,), "fiu").astype(np.float64)
        if expert_nbytes is not None and int(expert_nbytes) < 1:
            raise MixoffError(f"expert_nbytes is {expert_nbytes}: one expert has at least one byte")
        _check_passes(passes, is_prompt)
        if predicted is not None:
            predicted = _predicted(predicted, num_experts, (T, L))
        if scores is not None:
            scores = _column("scores", scores, (T, L, int(num_experts)), "f").astype(np.float16)
        nbytes = None if expert_nbytes is None else int(expert_nbytes)
        return cls(
            experts,
            int(num_experts),
            is_prompt,
            passes.astype(np.int64),
            tuple(layers.tolist()),
            weights,
            times_s,
            nbytes,
            predicted,
            scores,
        )

    @classmethod
    def load(cls, path: str | Path) -> Trace:
        """Read `.npz` as `save` wrote it, import `.csv` or `.jsonl`, or take a bundled one by its name.

        Bundled are five domains of held-out text: novel, scripture, spanish, code, facts. Raises MixoffError.

        >>> Trace.load("tiny-mixtral/novel")
        Trace(2,048 tokens, 8 layers, top-2 of 8 experts, 0 of a prompt)
        """
        path = Path(path)
        if not os.path.isfile(path) and path.parts and path.parts[0] in models.names():
            return _bundled(path)
        if not os.path.isfile(path):
            known = [f"{name}/{domain}" for name in models.names() for domain in models.heldout()]
            with suppress(OSError, ValueError):
                known += [str(beside) for beside in path.parent.iterdir() if beside.suffix in FORMATS]
            way_out = f"record one with `mixoff trace`, or check the path{suggestion(str(path), known)}"
            raise MixoffError(f"no trace at {path}: {way_out}")
        if path.suffix.lower() == ".csv":
            return cls.from_csv(path)
        if path.suffix.lower() in (".jsonl", ".ndjson"):
            return cls.from_jsonl(path)
        return _load_npz(path)

    @classmethod
    def from_csv(cls, path: str | Path, num_experts: int | None = None) -> Trace:
        """Import a table with a header: `token,layer,expert`, and if known `weight,phase,pass,time_s`.

        One row an expert, those of a token and layer in router order. num_experts: None takes the highest number + 1.
        """
        with _readable(path) as file, _naming(path):
            table = csv.DictReader(file)
            if not {"token", "layer", "expert"} <= set(table.fieldnames or ()):
                raise MixoffError("the first line must name the columns token, layer and expert")
            return _from_rows(((table.line_num, row) for row in table), num_experts)

    @classmethod
    def from_jsonl(cls, path: str | Path, num_experts: int | None = None) -> Trace:
        """Import one JSON object a line: `{"token": 0, "layer": 3, "experts": [5, 1]}`, router order.

        If known with `"weights": [...]`, `"phase": "prompt"`, `"pass"`, `"time_s"`; `"expert"` may be a single number.
        """
        with _readable(path) as file, _naming(path):
            return _from_rows(_json_rows(file), num_experts)

    def save(self, path: str | Path) -> Path:
        """Write the trace as compressed `.npz`; returns the path, which gets that suffix where it has none.

        The file appears under its name when it is complete. Raises MixoffError, also for another suffix.
        """
        path = Path(path) if Path(path).suffix else Path(f"{path}.npz")
        if path.suffix != ".npz":
            raise MixoffError(f"cannot write {path}: a trace is an .npz file, name it {path.stem}.npz")
        arrays = {"experts": self.experts, "is_prompt": self.is_prompt, "passes": self.passes}
        arrays |= {"layers": np.asarray(self.layers), "num_experts": np.int64(self.num_experts)}
        optional = {name: getattr(self, name) for name in (*OPTIONAL, "expert_nbytes")}
        arrays |= {name: np.asarray(value) for name, value in optional.items() if value is not None}
        partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
        try:
            with open(partial, "wb") as file:
                np.savez_compressed(file, version=np.int64(VERSION), **arrays)
            os.replace(partial, path)
        except OSError as error:
            raise MixoffError(f"cannot write {path}: {error.strerror or error}") from error
        finally:
            with suppress(OSError):
                partial.unlink()
        return path

    # --- its parts

    @property
    def tokens(self) -> int:
        """T, prompts included."""
        return self.experts.shape[0]

    @property
    def top_k(self) -> int:
        """K, experts a token in each layer."""
        return self.experts.shape[2]

    @property
    def phase(self) -> np.ndarray:
        """`prompt` or `decode` of each token, str (T,)."""
        return np.asarray(PHASES)[self.is_prompt.astype(int)]

    def select(self, which: np.ndarray | slice) -> Trace:
        """The tokens of a mask (T,) or slice, as a trace of their own."""
        cut = {name: getattr(self, name) for name in ("experts", "is_prompt", "passes", *OPTIONAL)}
        return replace(self, **{name: None if value is None else value[which] for name, value in cut.items()})

    def decode(self) -> Trace:
        """Decoding alone, prompts left out."""
        return self.select(~self.is_prompt)

    def shuffled(self, seed: int = 0) -> Trace:
        """The same choices in each layer with the order of tokens drawn at random: popularity stays, locality goes."""
        rng = np.random.default_rng(seed)
        orders = np.stack([rng.permutation(self.tokens) for _ in self.layers], axis=1)  # (T, L)
        drawn = {name: getattr(self, name) for name in ("experts", "weights", "scores")}
        drawn = {n: None if x is None else np.take_along_axis(x, orders[..., None], 0) for n, x in drawn.items()}
        return replace(self, **drawn, predicted=None)  # guesses belong to a token's layers together

    # --- what can be said of it

    def counts(self) -> np.ndarray:
        """How often each expert was chosen: int (L, E)."""
        L, E = len(self.layers), self.num_experts
        cells = np.arange(L)[:, None] * E + self.experts  # (T, L, K)
        return np.bincount(cells[self.experts >= 0], minlength=L * E).reshape(L, E)

    def reuse_distances(self) -> np.ndarray:
        """How many other experts of the layer were used since an expert's last use: int (L, E + 1), a histogram.

        Column d counts uses at distance d, looked up before the pass changes anything; the last column, first uses. So
        the columns below S are the hits of LRU with S slots a layer.
        """
        return depths(self.requests(), len(self.layers), self.num_experts, "layer")

    def working_sets(self, window: int = 16) -> np.ndarray:
        """Distinct experts in `window` consecutive tokens, the mean over all such windows: float (L,)."""
        if not 1 <= window <= self.tokens:
            raise MixoffError(f"window is {window}: choose 1 to {self.tokens} tokens, the length of the trace")
        used = self._used()  # (T, L, E)
        summed = np.concatenate([np.zeros((1, *used.shape[1:]), np.int64), used.cumsum(0, dtype=np.int64)])
        return (summed[window:] > summed[:-window]).sum(2).mean(0)

    def repeat_rates(self) -> np.ndarray:
        """Share of consecutive tokens that repeat an expert: float (L, 2).

        Columns: the same first choice; at least one expert among both tokens' first two choices. Uniform routing over 8
        experts gives 0.125 and 0.464. Source: Mixtral of Experts (arXiv 2401.04088), Table 5.
        """
        if self.tokens < 2:
            raise MixoffError(f"repeat rates need two tokens, this trace has {self.tokens}")
        before, after = self.experts[:-1, :, :2], self.experts[1:, :, :2]
        first = (before[:, :, 0] == after[:, :, 0]) & (after[:, :, 0] >= 0)
        either = ((before[..., None] == after[:, :, None, :]) & (after[:, :, None, :] >= 0)).any((2, 3))
        return np.stack([first.mean(0), either.mean(0)], axis=1)

    def random_repeat_rates(self) -> tuple[float, float]:
        """`repeat_rates` of routing without memory or favourites: 1 / E, and 1 - C(E - k, k) / C(E, k), k = 2 choices.

        >>> Trace.from_array([[[0, 1]]], num_experts=8).random_repeat_rates()
        (0.125, 0.4642857142857143)
        """
        E, k = self.num_experts, min(self.top_k, 2)
        return 1 / E, 1 - math.comb(E - k, k) / math.comb(E, k)

    def balance(self) -> dict[str, np.ndarray]:
        """How evenly experts are used, by layer (L,).

        entropy_bits: of the shares of use, log2(E) when even. effective: 2 ** entropy, experts as if evenly used.
        largest_share: of the busiest expert. unused: experts that nobody asked for, a sign of collapse.
        """
        counts = self.counts()
        shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)  # (L, E)
        bits = -(shares * np.log2(np.where(shares > 0, shares, 1))).sum(1)
        largest, unused = shares.max(1), (counts == 0).sum(1)
        return {"entropy_bits": bits, "effective": 2**bits, "largest_share": largest, "unused": unused}

    def overlap(self) -> np.ndarray:
        """Requests that a pass of several tokens saves, as tokens share experts: 1 - distinct / asked for, float (L,).

        0 when every pass is a single token.
        """
        calls = np.unique(self.passes, return_inverse=True)[1]
        used = np.zeros((calls.max(initial=-1) + 1, *self._used().shape[1:]), bool)
        np.logical_or.at(used, calls, self._used())
        asked = (self.experts >= 0).sum((0, 2))
        return 1 - used.sum((0, 2)) / np.maximum(asked, 1)

    def requests(self) -> Requests:
        """What a cache is asked for: each distinct expert once a pass and layer, in router order."""
        L, E = len(self.layers), self.num_experts
        calls = np.unique(self.passes, return_inverse=True)[1]  # (T,)
        P = int(calls.max(initial=-1)) + 1
        call = np.broadcast_to(calls[:, None, None] * L + np.arange(L)[:, None], self.experts.shape).reshape(-1)
        expert = self.experts.reshape(-1).astype(np.int64)
        if self.tokens > P:  # tokens of a pass come layer by layer, and ask once for what they share
            order = np.argsort(call, kind="stable")
            call, expert = call[order], expert[order]
            first = np.sort(np.unique(call * (E + 1) + expert, return_index=True)[1])
            call, expert = call[first], expert[first]
        call, expert = call[expert >= 0], expert[expert >= 0]
        starts = np.concatenate([[0], np.cumsum(np.bincount(call, minlength=P * L))])
        is_prompt = np.zeros(P, bool)
        is_prompt[calls] = self.is_prompt
        begins = np.unique(calls, return_index=True)[1]  # (P,) first token of each pass
        named = None if self.predicted is None else _keys(self.predicted[begins], E)
        scores = None if self.scores is None else np.maximum.reduceat(self.scores, begins).astype(np.float32)
        if scores is not None:
            scores = scores.reshape(P * L, E)
        site = np.tile(np.arange(L), P)
        return Requests(call % L * E + expert, starts, site, np.repeat(is_prompt, L), named, scores)

    def _used(self) -> np.ndarray:
        """Whether a token asked for an expert: bool (T, L, E)."""
        used = np.zeros((*self.experts.shape[:2], self.num_experts + 1), bool)  # NO_EXPERT is the last column
        np.put_along_axis(used, self.experts.astype(np.int64), True, axis=2)
        return used[:, :, :-1]

    def __len__(self) -> int:
        return self.tokens

    def __repr__(self) -> str:
        what = f"{self.tokens:,} tokens, {len(self.layers)} layers, top-{self.top_k} of {self.num_experts} experts"
        return f"Trace({what}, {int(self.is_prompt.sum())} of a prompt)"

    def _repr_html_(self) -> str:
        counts, balance = self.counts(), self.balance()["entropy_bits"]
        most = max(int(counts.max(initial=0)), 1)
        head = "".join(f"<th>{e}</th>" for e in range(self.num_experts))
        rows = [
            f"<tr><th>layer {layer}</th>{''.join(_shaded(n, most) for n in row)}<td>{bits:.2f} bits</td></tr>"
            for layer, row, bits in zip(self.layers, counts, balance, strict=True)
        ]
        return f"<p>{self!r}: requests by layer and expert</p><table><tr><th></th>{head}</tr>{''.join(rows)}</table>"


def _shaded(count: int, most: int) -> str:
    return f'<td style="background: rgba(0, 114, 178, {0.6 * count / most:.2f})">{count}</td>'


# --- checks ----------------------------------------------------------------------------------------------------------


def _experts(experts: np.ndarray, num_experts: int) -> np.ndarray:
    """`experts` as the smallest signed integers that hold them, (T, L, K), once everything about them is right."""
    experts, E = np.asarray(experts), int(num_experts)
    if not 1 <= E <= MAX_EXPERTS:
        raise MixoffError(f"num_experts is {num_experts}: a trace holds 1 to {MAX_EXPERTS:,} experts a layer")
    if experts.dtype.kind not in "iu" or experts.ndim != 3 or experts.shape[1] < 1 or experts.shape[2] < 1:
        raise MixoffError(
            f"experts is {experts.dtype} {experts.shape}: give integers of shape (tokens, layers, experts a token)"
        )
    if experts.size and (experts.min() < NO_EXPERT or experts.max() >= E):
        worst = experts.max() if experts.max() >= E else experts.min()
        raise MixoffError(f"experts names expert {worst} of {E}: numbers go from 0 to {E - 1}, or raise num_experts")
    ordered = np.sort(experts, axis=2)
    twice = (ordered[:, :, 1:] == ordered[:, :, :-1]) & (ordered[:, :, 1:] >= 0)
    if twice.any():
        token, layer, _ = np.argwhere(twice)[0]
        chosen = experts[token, layer].tolist()
        raise MixoffError(f"token {token} chose {chosen} in layer {layer}: each expert can be chosen once")
    return experts.astype(np.int8 if E <= 127 else np.int16)


def _predicted(predicted: np.ndarray, num_experts: int, shape: tuple[int, int]) -> np.ndarray:
    """`predicted` (T, L, M), checked as experts are."""
    predicted = np.asarray(predicted)
    if predicted.ndim != 3 or predicted.shape[:2] != shape:
        raise MixoffError(f"predicted has shape {predicted.shape}: give {shape} and guesses, -1 for none")
    return _experts(predicted, num_experts)


def _keys(experts: np.ndarray, E: int) -> np.ndarray:
    """Keys (P * L, M) of experts (P, L, M); -1 stays."""
    keys = experts.astype(np.int64) + np.arange(experts.shape[1])[:, None] * E
    return np.where(experts < 0, NO_EXPERT, keys).reshape(-1, experts.shape[2])


def _column(name: str, values: np.ndarray, shape: tuple[int, ...], kinds: str) -> np.ndarray:
    values = np.asarray(values)
    if values.shape != shape or (values.dtype.kind not in kinds and values.size):
        words = {"b": "booleans", "iu": "integers", "f": "floats", "fiu": "numbers"}[kinds]
        raise MixoffError(f"{name} is {values.dtype} {values.shape}: give {words} of shape {shape}")
    if values.dtype.kind == "f" and not np.isfinite(values).all():
        raise MixoffError(f"{name} holds values that are not finite: leave {name} out where it is not known")
    return values


def _default_passes(is_prompt: np.ndarray) -> np.ndarray:
    """A new pass with every token, but for one that goes on with a prompt."""
    goes_on = is_prompt[1:] & is_prompt[:-1]
    return np.concatenate([[0][: len(is_prompt)], np.cumsum(~goes_on)]).astype(np.int64)


def _check_passes(passes: np.ndarray, is_prompt: np.ndarray) -> None:
    step = np.diff(passes.astype(np.int64))
    if (step < 0).any():
        raise MixoffError(f"passes go down at token {np.argmax(step < 0) + 1}: order tokens by their pass")
    mixed = (step == 0) & (is_prompt[1:] != is_prompt[:-1])
    if mixed.any():
        raise MixoffError(f"pass {passes[np.argmax(mixed)]} is prompt and decode at once: give each its own pass")


# --- files -----------------------------------------------------------------------------------------------------------


def _load_npz(path: Path) -> Trace:
    arrays = read_arrays(path)
    if "version" not in arrays:
        raise MixoffError(
            f"{path} holds the arrays {', '.join(arrays) or 'none'} and no version: it is no trace of mixoff; "
            "build one with mixoff.Trace.from_array"
        )
    if arrays["version"].shape != () or arrays["version"] != VERSION:
        raise MixoffError(f"{path} has version {arrays['version']}, this mixoff reads {VERSION}: update mixoff")
    scalars = {name: arrays.pop(name) for name in ("version", "num_experts", "expert_nbytes") if name in arrays}
    known = {"experts", "is_prompt", "passes", "layers", *OPTIONAL}
    if lacking := {"experts", "is_prompt", "passes", "layers", "num_experts"} - arrays.keys() - scalars.keys():
        raise MixoffError(f"{path} lacks {', '.join(sorted(lacking))}: record or convert the trace again")
    if unknown := arrays.keys() - known:
        raise MixoffError(f"{path} holds {', '.join(sorted(unknown))}, which no trace has: it is damaged or not ours")
    for name, value in scalars.items():
        if value.shape != () or value.dtype.kind not in "iu":
            raise MixoffError(f"{path}: {name} is {value.dtype} {value.shape}, not one integer")
    numbers = {name: int(value) for name, value in scalars.items() if name != "version"}
    with _naming(path):
        return Trace.from_array(arrays.pop("experts"), **arrays, **numbers)


def read_arrays(path: str | Path) -> dict[str, np.ndarray]:
    """Every array of a `.npz`, each header checked against the bytes that are there; never unpickles."""
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
            raise ValueError(f"{info.filename} says {shape} {dtype} and has {left:,} bytes of it")
        flat = np.frombuffer(file.read(left), dtype, count)
    return flat.reshape(shape, order="F" if fortran else "C")


def load_domains(path: str | Path, num_experts: int = 8) -> dict[str, Trace]:
    """Traces by name from a `.npz` of plain arrays (L, T, K), as the bundled model has for its five domains.

    NAME.weights and NAME.predicted, of the same order, may stand beside NAME. Raises MixoffError.
    """
    traces, beside = {}, {}
    for name, array in read_arrays(path).items():
        array = np.moveaxis(array, 0, 1) if array.ndim == 3 else array
        of, _, what = name.rpartition(".")
        if what in BESIDE:
            beside.setdefault(of, {})[what] = array
        else:
            traces[name] = array
    if strange := sorted(beside.keys() - traces.keys()):
        raise MixoffError(f"{path} knows {' and '.join(beside[strange[0]])} of {strange[0]}, but not its experts")
    return {name: Trace.from_array(array, num_experts, **beside.get(name, {})) for name, array in traces.items()}


def _bundled(path: Path) -> Trace:
    """The trace MODEL/DOMAIN that ships with the package, with the bytes of that model's experts."""
    folder = models.path(path.parts[0])
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    domains = load_domains(folder / "traces.npz", config["num_local_experts"])
    if (domain := "/".join(path.parts[1:])) not in domains:
        known = [f"{path.parts[0]}/{name}" for name in domains]
        way_out = f"there are {', '.join(known)}{suggestion(str(path), known)}"
        raise MixoffError(f"{path} is not a bundled trace: {way_out}")
    matrices, nbytes = 3 * config["hidden_size"] * config["intermediate_size"], 2  # fp16
    return replace(domains[domain], expert_nbytes=matrices * nbytes)


def _readable(path: str | Path) -> Any:
    try:
        return open(path, newline="", encoding="utf-8-sig")
    except OSError as error:
        raise MixoffError(f"cannot read {path}: {error.strerror or error}") from error


@contextmanager
def _naming(path: str | Path) -> Iterator[None]:
    """Put the file's name before every error of its content."""
    try:
        yield
    except (UnicodeDecodeError, csv.Error) as error:
        raise MixoffError(f"cannot read {path} as text: {error}") from error
    except MixoffError as error:
        raise MixoffError(f"{path}: {error}") from error


def _json_rows(file: Iterable[str]) -> Iterator[tuple[int, dict]]:
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
            raise MixoffError(f"line {number}: experts is a list, and weights are as many")
        for k, expert in enumerate(experts):
            yield number, row | {"expert": expert} | ({} if weights is None else {"weight": weights[k]})


def _from_rows(rows: Iterable[tuple[int, dict]], num_experts: int | None) -> Trace:
    """A trace of rows with `token`, `layer`, `expert` and what else is known."""
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
    return Trace.from_array(
        experts,
        highest if num_experts is None else num_experts,
        is_prompt=None if known["phase"] is None else known["phase"] == "prompt",
        passes=known["pass"],
        layers=np.unique([row["layer"] for row in table]),
        weights=weights,
        times_s=known["time_s"],
    )


NUMBERS = {"token": int, "layer": int, "expert": int, "weight": float, "pass": int, "time_s": float}


def _parsed(number: int, row: dict) -> dict:
    """A row's values as numbers; None for what is not there."""
    row = {name: value for name, value in row.items() if value not in (None, "")}
    if lacking := [name for name in ("token", "layer", "expert") if name not in row]:
        raise MixoffError(f"line {number}: {' and '.join(lacking)} missing")
    out = {name: _number(number, name, row[name], kind) if name in row else None for name, kind in NUMBERS.items()}
    if row.get("phase") not in (None, *PHASES):
        raise MixoffError(f"line {number}: phase is {row['phase']!r}, not one of {', '.join(PHASES)}")
    return out | {"phase": row.get("phase")}


def _number(line: int, name: str, value: Any, kind: type) -> int | float:
    """`value` as a whole number from 0, or as a float. Raises MixoffError."""
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
    """One value a token, or None when no row has it; rows of a token must agree."""
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


# --- recording -------------------------------------------------------------------------------------------------------


class Recorder:
    """Collects what the router chooses, between `with` and its end; then `recorder.trace` is the `Trace`.

    A pass that began before the recording, or did not end, is left out.
    """

    def __init__(self, runtime: Any) -> None:
        self.runtime, self.calls = runtime, {}
        self._stop: Callable[[], None] | None = None

    def __enter__(self) -> Recorder:
        self._start, self._stop = time.perf_counter(), self.runtime.on_routing(self._note)
        return self

    def __exit__(self, *exc: object) -> None:
        self._stop()

    def _note(self, token: int, is_prompt: bool, site: int, experts: Any, weights: Any) -> None:
        """One call of a layer: tensors (T, K), copied at once, made arrays later. `token` tells passes apart."""
        now = time.perf_counter() - self._start
        calls = self.calls.setdefault(token, (is_prompt, now, {}))[2]
        named = self.runtime.guesses.expected.get(site, ())
        calls[site] = experts.detach().clone(), weights.detach().clone(), named

    @property
    def trace(self) -> Trace:
        """All complete passes so far. Raises MixoffError when there is none."""
        sites = self.runtime.source.sites
        whole = [self.calls[token] for token in sorted(self.calls) if len(self.calls[token][2]) == len(sites)]
        if not whole:
            raise MixoffError("nothing was recorded: generate within `with model.mixoff.trace() as recorder:`")
        stacked = [
            [np.stack([_array(calls[i][part], kind) for i in range(len(sites))], 1) for _, _, calls in whole]
            for part, kind in enumerate((np.int16, np.float32))
        ]
        rows = [len(part) for part in stacked[0]]
        named = [[calls[i][2] for i in range(len(sites))] for _, _, calls in whole]
        E = max(site.num_experts for site in sites)
        experts = np.concatenate(stacked[0])  # (T, L, K)
        return Trace.from_array(
            np.where(experts < E, experts, NO_EXPERT),
            E,
            is_prompt=np.repeat([is_prompt for is_prompt, _, _ in whole], rows),
            passes=np.repeat(np.arange(len(whole)), rows),
            layers=[site.layer for site in sites],
            weights=np.nan_to_num(np.concatenate(stacked[1])),  # padding may be routed by NaN
            times_s=np.repeat([now for _, now, _ in whole], rows),
            expert_nbytes=self.runtime.source.expert_nbytes,
            predicted=_padded(named, rows),
        )


def _array(values: Any, kind: type) -> np.ndarray:
    """A tensor's values, from any device; NumPy knows no bfloat16."""
    values = values.float() if values.is_floating_point() else values
    return values.numpy(force=True).astype(kind)


def _padded(named: list[list[Sequence[int]]], rows: list[int]) -> np.ndarray | None:
    """What was named before each call of each pass, as `Trace.predicted`; passes have `rows` tokens."""
    most = max(len(experts) for calls in named for experts in calls)
    if not most:
        return None
    out = np.full((sum(rows), len(named[0]), most), NO_EXPERT, np.int16)
    for t, calls in zip(np.cumsum([0, *rows[:-1]]), named, strict=True):
        for layer, experts in enumerate(calls):
            out[t, layer, : len(experts)] = experts
    return out


# --- loops, compiled by numba where that pays ------------------------------------------------------------------------

COMPILE_FROM = 20_000  # requests, two seconds in Python; numba starts in one once it has compiled, which takes ten


def compiled(loop: Callable, requests: int = COMPILE_FROM, helpers: tuple[Callable, ...] = ()) -> Callable:
    """`loop`, or its compiled twin with equal results when there are many requests and numba is installed."""
    return loop if requests < COMPILE_FROM else _compile(loop, helpers)


@functools.cache
def _compile(loop: Callable, helpers: tuple[Callable, ...]) -> Callable:
    try:
        import numba
    except ImportError:
        return loop
    for helper in helpers:
        numba.extending.register_jitable(helper)
    return jit(loop)


def depths(requests: Requests, L: int, E: int, scope: str) -> np.ndarray:
    """Histogram of the depth of each request in its pool's list of keys by last use: int (L, keys a pool + 1).

    scope: `layer`, a list a layer, or `global`, one for all. Last column: first uses.
    Source: Mattson et al., Evaluation techniques for storage hierarchies (1970): one pass gives LRU for all sizes.
    Marks at each key's last use stand in a tree of sums (Fenwick, 1994), after Bennett and Kruskal (1975).
    """
    pools, size = (L, E) if scope == "layer" else (1, L * E)
    histogram, room = np.zeros((L, size + 1), np.int64), 2 * size
    tree, owner = np.zeros((pools, room + 1), np.int64), np.full((pools, room), -1, np.int64)
    run = compiled(depths_loop, requests.keys.size, (marked, mark, renumber))
    run(requests.keys, requests.starts, requests.site, tree, owner, np.full(L * E, -1, np.int64), histogram)
    return histogram


def depths_loop(
    keys: np.ndarray,
    starts: np.ndarray,
    site: np.ndarray,
    tree: np.ndarray,
    owner: np.ndarray,
    used: np.ndarray,
    histogram: np.ndarray,
) -> None:
    """All depths of a call are looked up before any of its keys moves to the front, as a cache serves a token.

    used: time of each key's last use, -1 for never; owner: the key last used at each time of a pool's, or -1.
    """
    clock, held = np.zeros(len(tree), np.int64), np.zeros(len(tree), np.int64)
    for c in range(len(starts) - 1):
        p = min(site[c], len(tree) - 1)
        for i in range(starts[c], starts[c + 1]):
            when = used[keys[i]]
            histogram[site[c], histogram.shape[1] - 1 if when < 0 else held[p] - marked(tree[p], when)] += 1
        for i in range(starts[c], starts[c + 1]):
            key = keys[i]
            if clock[p] == owner.shape[1]:
                clock[p] = renumber(tree[p], owner[p], used)
            if used[key] >= 0:
                mark(tree[p], used[key], -1)
                owner[p, used[key]] = -1
            else:
                held[p] += 1
            used[key], owner[p, clock[p]] = clock[p], key
            mark(tree[p], clock[p], 1)
            clock[p] += 1


def marked(tree: np.ndarray, when: int) -> int:
    """Marks up to and with the time `when`."""
    total, i = 0, when + 1
    while i > 0:
        total += tree[i]
        i -= i & -i
    return total


def mark(tree: np.ndarray, when: int, by: int) -> None:
    """Set a mark at the time `when`, or take it away."""
    i = when + 1
    while i < len(tree):
        tree[i] += by
        i += i & -i


def renumber(tree: np.ndarray, owner: np.ndarray, used: np.ndarray) -> int:
    """Times from 0 again, in the same order; returns the first that is free."""
    free = 0
    tree[:] = 0
    for when in range(len(owner)):
        key = owner[when]
        owner[when] = -1
        if key >= 0:
            owner[free], used[key] = key, free
            mark(tree, free, 1)
            free += 1
    return free
