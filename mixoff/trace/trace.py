"""Which experts a model asked for, token by token: recorded, stored, imported, counted.

Letters: **T** tokens, **L** MoE layers, **K** experts per token, **E** experts per layer, **P** passes.
A pass is one forward pass of the model: a whole prompt, or one token of decoding (several, in a batch). Files are
`.npz` with a version, read without pickle and checked before use; CSV and JSONL can be imported.
"""

from __future__ import annotations

import csv
import json
import math
import os
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from mixoff import models
from mixoff.errors import MixoffError, suggestion
from mixoff.trace.files import (
    FORMATS,
    NO_EXPERT,
    OPTIONAL,
    PHASES,
    VERSION,
    json_rows,
    naming,
    npz_arguments,
    read_arrays,
    readable,
    row_arguments,
)
from mixoff.trace.requests import Requests, depths

EXTRAS = ("weights", "predicted")  # what `load_domains` reads in addition to a trace
MAX_EXPERTS = 2**15 - 1  # experts are stored as int16 at most


@dataclass(frozen=True, eq=False)
class Trace:
    """Choices of a model's routers. Make one with `from_array`, `load` or a runtime's `trace()`: all of them check it.

    Attributes
    ----------
    experts: int (T, L, K), in router order; -1 where a token has fewer than K
    num_experts: E, the same in every layer
    is_prompt: bool (T,)
    passes: int (T,), ascending; tokens with the same number went through the model together
    layers: (L,), numbers of the MoE layers in the model
    weights: float32 (T, L, K), the router's weight of each choice; or None
    times_s: float64 (T,), when the pass of each token began; or None
    expert_nbytes: bytes of one expert; or None
    predicted: int (T, L, M), experts that a prefetcher named before each call, best first, -1 for none, in the row of
        the first token of a pass; or None
    scores: float16 (T, L, E), the router's score of every expert, from 0 to 1; or None
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

    # --- making traces

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
        """A trace of `experts`, int (T, L, K). Without `is_prompt` all is decoding, one token per pass.

        Without `passes` every run of prompt tokens is one pass. Raises MixoffError for invalid values.

        >>> Trace.from_array([[[0, 3], [1, 2]], [[0, 1], [2, 5]]])
        Trace(2 tokens, 2 layers, top-2 of 8 experts, 0 of a prompt)
        """
        experts = _experts(experts, num_experts)
        T, L, _ = experts.shape
        is_prompt = _column("is_prompt", np.zeros(T, bool) if is_prompt is None else is_prompt, (T,), "b")
        passes = _default_passes(is_prompt) if passes is None else _column("passes", passes, (T,), "iu")
        numbers = _column("layers", np.arange(L) if layers is None else np.asarray([*layers]), (L,), "iu")
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
            experts=experts,
            num_experts=int(num_experts),
            is_prompt=is_prompt,
            passes=passes.astype(np.int64),
            layers=tuple(numbers.tolist()),
            weights=weights,
            times_s=times_s,
            expert_nbytes=nbytes,
            predicted=predicted,
            scores=scores,
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
                known += [str(file) for file in path.parent.iterdir() if file.suffix in FORMATS]
            way_out = f"record one with `mixoff trace`, or check the path{suggestion(str(path), known)}"
            raise MixoffError(f"no trace at {path}: {way_out}")
        if path.suffix.lower() == ".csv":
            return cls.from_csv(path)
        if path.suffix.lower() in (".jsonl", ".ndjson"):
            return cls.from_jsonl(path)
        arguments = npz_arguments(path)
        with naming(path):
            return cls.from_array(**arguments)

    @classmethod
    def from_csv(cls, path: str | Path, num_experts: int | None = None) -> Trace:
        """Import a table with a header: `token,layer,expert`, and if known `weight,phase,pass,time_s`.

        One row per expert, those of a token and layer in router order. num_experts: None takes the highest number + 1.
        """
        with readable(path) as file, naming(path):
            table = csv.DictReader(file)
            if not {"token", "layer", "expert"} <= set(table.fieldnames or ()):
                raise MixoffError("the first line must name the columns token, layer and expert")
            rows = ((table.line_num, row) for row in table)
            return cls.from_array(**row_arguments(rows, num_experts))

    @classmethod
    def from_jsonl(cls, path: str | Path, num_experts: int | None = None) -> Trace:
        """Import one JSON object per line: `{"token": 0, "layer": 3, "experts": [5, 1]}`, router order.

        Optional: `"weights": [...]`, `"phase": "prompt"`, `"pass"`, `"time_s"`; `"expert"` may be a single number.
        """
        with readable(path) as file, naming(path):
            return cls.from_array(**row_arguments(json_rows(file), num_experts))

    def save(self, path: str | Path) -> Path:
        """Write the trace as compressed `.npz`; returns the path, with that suffix added if it has none.

        The file appears under its name only when complete. Raises MixoffError, also for another suffix.
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
        """K, experts per token in each layer."""
        return self.experts.shape[2]

    @property
    def phase(self) -> np.ndarray:
        """`prompt` or `decode` of each token, str (T,)."""
        return np.asarray(PHASES)[self.is_prompt.astype(int)]

    def select(self, which: np.ndarray | slice) -> Trace:
        """The tokens of a mask (T,) or slice, as a new trace."""
        arrays = {name: getattr(self, name) for name in ("experts", "is_prompt", "passes", *OPTIONAL)}
        cut: dict[str, Any] = {name: None if array is None else array[which] for name, array in arrays.items()}
        return replace(self, **cut)

    def decode(self) -> Trace:
        """Decoding alone, prompts left out."""
        return self.select(~self.is_prompt)

    def shuffled(self, seed: int = 0) -> Trace:
        """The same choices with tokens shuffled in each layer: popularity stays, locality is lost."""
        rng = np.random.default_rng(seed)
        orders = np.stack([rng.permutation(self.tokens) for _ in self.layers], axis=1)  # (T, L)
        drawn = {name: getattr(self, name) for name in ("experts", "weights", "scores")}
        drawn = {n: None if x is None else np.take_along_axis(x, orders[..., None], 0) for n, x in drawn.items()}
        return replace(self, **drawn, predicted=None)  # guesses belong to a token's layers together

    # --- statistics

    def counts(self) -> np.ndarray:
        """How often each expert was chosen: int (L, E)."""
        L, E = len(self.layers), self.num_experts
        cells = np.arange(L)[:, None] * E + self.experts  # (T, L, K)
        return np.bincount(cells[self.experts >= 0], minlength=L * E).reshape(L, E)

    def reuse_distances(self) -> np.ndarray:
        """Histogram of the number of other experts of the layer used since an expert's last use: int (L, E + 1).

        Column d counts uses at distance d, looked up before the pass changes anything; the last column counts first
        uses. So the columns below S are the hits of LRU with S slots per layer.
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
        """How evenly experts are used: arrays by layer, (L,).

        entropy_bits: entropy of the shares of use, log2(E) if even
        effective: 2 ** entropy, the number of evenly used experts with this entropy
        largest_share: share of the most used expert
        unused: number of experts never asked for, a sign of collapse
        """
        counts = self.counts()
        shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)  # (L, E)
        bits = -(shares * np.log2(np.where(shares > 0, shares, 1))).sum(1)
        largest, unused = shares.max(1), (counts == 0).sum(1)
        return {"entropy_bits": bits, "effective": 2**bits, "largest_share": largest, "unused": unused}

    def overlap(self) -> np.ndarray:
        """Share of requests that passes save because their tokens share experts: 1 - distinct / asked for, float (L,).

        0 if every pass is a single token.
        """
        calls = np.unique(self.passes, return_inverse=True)[1]
        used = np.zeros((calls.max(initial=-1) + 1, *self._used().shape[1:]), bool)
        np.logical_or.at(used, calls, self._used())
        asked = (self.experts >= 0).sum((0, 2))
        return 1 - used.sum((0, 2)) / np.maximum(asked, 1)

    def requests(self) -> Requests:
        """The requests to a cache: each distinct expert once per pass and layer, in router order."""
        L, E = len(self.layers), self.num_experts
        calls = np.unique(self.passes, return_inverse=True)[1]  # (T,)
        P = int(calls.max(initial=-1)) + 1
        call = np.broadcast_to(calls[:, None, None] * L + np.arange(L)[:, None], self.experts.shape).reshape(-1)
        expert = self.experts.reshape(-1).astype(np.int64)
        if self.tokens > P:  # the tokens of a pass go through a layer together, and ask once for shared experts
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
    """`experts` (T, L, K), checked, as the smallest signed integers that hold them."""
    experts, E = np.asarray(experts), int(num_experts)
    if not 1 <= E <= MAX_EXPERTS:
        raise MixoffError(f"num_experts is {num_experts}: a trace holds 1 to {MAX_EXPERTS:,} experts per layer")
    if experts.dtype.kind not in "iu" or experts.ndim != 3 or experts.shape[1] < 1 or experts.shape[2] < 1:
        raise MixoffError(
            f"experts is {experts.dtype} {experts.shape}: give integers of shape (tokens, layers, experts per token)"
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
    """`predicted` (T, L, M), checked like `experts`."""
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
    """A new pass for every token, except one that continues a prompt."""
    goes_on = is_prompt[1:] & is_prompt[:-1]
    return np.concatenate([[0][: len(is_prompt)], np.cumsum(~goes_on)]).astype(np.int64)


def _check_passes(passes: np.ndarray, is_prompt: np.ndarray) -> None:
    step = np.diff(passes.astype(np.int64))
    if (step < 0).any():
        raise MixoffError(f"passes go down at token {np.argmax(step < 0) + 1}: order tokens by their pass")
    mixed = (step == 0) & (is_prompt[1:] != is_prompt[:-1])
    if mixed.any():
        raise MixoffError(f"pass {passes[np.argmax(mixed)]} is prompt and decode at once: give each its own pass")


def load_domains(path: str | Path, num_experts: int = 8) -> dict[str, Trace]:
    """Traces by name from a `.npz` of plain arrays (L, T, K), as the bundled model has for its five domains.

    NAME.weights and NAME.predicted, in the same order, are optional. Raises MixoffError.
    """
    traces: dict[str, np.ndarray] = {}
    extras: dict[str, dict[str, np.ndarray]] = {}
    for name, array in read_arrays(path).items():
        array = np.moveaxis(array, 0, 1) if array.ndim == 3 else array
        of, _, what = name.rpartition(".")
        if what in EXTRAS:
            extras.setdefault(of, {})[what] = array
        else:
            traces[name] = array
    if strange := sorted(extras.keys() - traces.keys()):
        raise MixoffError(f"{path} has {' and '.join(extras[strange[0]])} of {strange[0]}, but not its experts")
    return {name: Trace.from_array(array, num_experts, **extras.get(name, {})) for name, array in traces.items()}


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
