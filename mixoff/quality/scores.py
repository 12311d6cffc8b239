"""How good a model's predictions are: perplexity, distance to another model, agreement, each with its error.

Letters: **D** domains, **W** windows of a domain, **T** tokens of a window, **V** vocabulary, **N**, **K** outputs and
inputs of a weight.
The sampling units are windows, not tokens, which are far from independent; domains are fixed (stratified).
Variants see the same windows, so their differences are paired, and have much smaller errors than the figures
themselves. Works with any causal language model.
"""

from __future__ import annotations

import html
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from mixoff.errors import MixoffError
from mixoff.quantize.scheme import ROLES, Scheme
from mixoff.shapes import config
from mixoff.units import format_nbytes

LENGTH = 256  # tokens per window
MOST_NBYTES = 4 << 30  # limit on a reference's predictions, which stay in memory


@dataclass(frozen=True)
class Estimate:
    """A mean and its standard error.

    >>> print(Estimate(18.98, 1.62))
    18.98 ± 1.62
    """

    mean: float
    error: float

    def __str__(self) -> str:
        return f"{self.mean:.2f} ± {self.error:.2f}"

    def scaled(self, factor: float) -> Estimate:
        """The estimate in another unit: 1000 for millinats."""
        return Estimate(self.mean * factor, self.error * abs(factor))


def estimate(values: Tensor) -> Estimate:
    """Mean of values (D, W) and its standard error, with fixed domains.

    >>> estimate(torch.tensor([[1.0, 3.0], [5.0, 5.0]]))
    Estimate(mean=3.5, error=0.5)
    """
    D, W = values.shape
    return Estimate(values.mean().item(), (values.var(1) / W).sum().sqrt().item() / D)


@dataclass(frozen=True, eq=False)
class Windows:
    """Token ids, int (D, W, T), and the names of the domains."""

    ids: Tensor
    domains: tuple[str, ...]


def windows(
    tokenizer: Any, texts: str | Sequence[str] | Mapping[str, str], count: int = 8, length: int = LENGTH
) -> Windows:
    """`count` windows per text, evenly spread; texts may have names. Raises MixoffError for a short text."""
    named = texts if isinstance(texts, Mapping) else dict(enumerate([texts] if isinstance(texts, str) else texts))
    if not named or count < 2:
        raise MixoffError("a standard error needs at least one text, and two windows of each: raise count to 2 or more")
    chosen = []
    for name, text in named.items():
        ids = torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
        if len(ids) < length * count:
            raise MixoffError(
                f"text {name!r} has {len(ids):,} tokens, and {count} windows of {length} need {length * count:,}: "
                "use fewer or shorter windows, or longer texts"
            )
        starts = torch.linspace(0, len(ids) - length, count).long()
        chosen.append(torch.stack([ids[start : start + length] for start in starts]))
    return Windows(torch.stack(chosen), tuple(map(str, named)))


def as_windows(tokenizer_or_ids: Any, texts: Any = None, count: int = 8, length: int = LENGTH) -> Windows:
    """Windows from Windows, from token ids (W, T) or (D, W, T), or from a tokenizer with texts."""
    if isinstance(tokenizer_or_ids, Windows):
        return tokenizer_or_ids
    if isinstance(tokenizer_or_ids, Tensor):
        ids = tokenizer_or_ids[None] if tokenizer_or_ids.ndim == 2 else tokenizer_or_ids
        if ids.ndim != 3 or ids.shape[1] < 2 or ids.shape[2] < 2:
            raise MixoffError(
                f"token ids have shape {tuple(tokenizer_or_ids.shape)}: give (windows, tokens), or (domains, windows, "
                "tokens), with at least two windows and two tokens"
            )
        return Windows(ids, tuple(map(str, range(len(ids)))))
    if texts is None:
        raise MixoffError("a tokenizer needs texts: give them too, or token ids (windows, tokens)")
    return windows(tokenizer_or_ids, texts, count, length)


@torch.inference_mode()
def predictions(model: nn.Module, over: Windows) -> list[Tensor]:
    """Log-probabilities of the next token, fp32 (T, V), of every window in order: a reference for `measure`."""
    rows: list[Tensor] = []
    for window in over.ids.flatten(0, 1):
        rows.append(model(window[None]).logits[0].float().log_softmax(-1))
        if (nbytes := rows[0].nbytes * over.ids.shape[0] * over.ids.shape[1]) > MOST_NBYTES:
            raise MixoffError(
                f"the reference's predictions take {format_nbytes(nbytes)}, more than {format_nbytes(MOST_NBYTES)}: "
                "use fewer or shorter windows"
            )
    return rows


@dataclass(frozen=True, eq=False)
class Scores:
    """Scores of one model by window, (D, W) each, in fp64; kl and top1 are None without a reference.

    loss: cross-entropy, nats per token
    kl: Kullback-Leibler divergence from the reference's predictions to the model's, nats per token
    top1: share of tokens where both models give the highest probability to the same token
    domains: names of the domains
    """

    loss: Tensor
    kl: Tensor | None = None
    top1: Tensor | None = None
    domains: tuple[str, ...] = ()

    @property
    def perplexity(self) -> Estimate:
        """exp of the loss, with its error to first order."""
        return _exponential(estimate(self.loss))

    def to_dict(self) -> dict:
        """All values as lists, and `domains`, for `from_dict`."""
        values = {name: getattr(self, name) for name in ("loss", "kl", "top1")}
        return {name: None if x is None else x.tolist() for name, x in values.items()} | {"domains": list(self.domains)}

    @classmethod
    def from_dict(cls, values: dict) -> Scores:
        """The inverse of `to_dict`."""
        kept = {
            k: v if v is None else torch.tensor(v, dtype=torch.float64) for k, v in values.items() if k != "domains"
        }
        return cls(**kept, domains=tuple(values["domains"]))

    def __repr__(self) -> str:
        D, W = self.loss.shape
        return f"Scores(perplexity {self.perplexity}, {D} domains x {W} windows)"


def _exponential(x: Estimate) -> Estimate:
    return Estimate(math.exp(x.mean), math.exp(x.mean) * x.error)


@torch.inference_mode()
def measure(model: nn.Module, over: Windows, reference: list[Tensor] | None = None) -> Scores:
    """Scores of `model` over the windows, with KL and agreement to `reference`, another model's `predictions`."""
    rows = []
    for n, window in enumerate(over.ids.flatten(0, 1)):
        predicted = model(window[None]).logits[0].float().log_softmax(-1)  # (T, V)
        loss = -predicted[:-1].gather(1, window[1:, None]).mean()
        if reference is None:
            rows.append((loss, loss, loss))
            continue
        true = reference[n]
        kl = (true.exp() * (true - predicted)).sum(-1).mean()
        rows.append((loss, kl, (true.argmax(-1) == predicted.argmax(-1)).float().mean()))
    loss, kl, top1 = torch.tensor(rows, dtype=torch.float64).t().view(3, *over.ids.shape[:2])
    if reference is None:
        return Scores(loss, domains=over.domains)
    return Scores(loss, kl=kl, top1=top1, domains=over.domains)


def perplexity(
    model: nn.Module, tokenizer_or_ids: Any, texts: Any = None, *, count: int = 8, length: int = LENGTH
) -> Estimate:
    """Perplexity of `model` with its standard error, over one text, several, or a dict by name.

    `perplexity(model, tokenizer, mixoff.models.heldout())`, or token ids (windows, tokens) in place of both.
    """
    return measure(model, as_windows(tokenizer_or_ids, texts, count, length)).perplexity


# Comparisons ---------------------------------------------------------------------------------------------------------

COLUMNS = ("perplexity", "ratio", "KL, millinats", "top-1, %")


@dataclass(eq=False)
class Comparison:
    """Several models over the same windows. Displays itself; `to_dict` has all figures.

    scores: scores by name of model; the first is the base that others are compared to
    columns: further texts to show, by title, then by name of model
    """

    scores: dict[str, Scores]
    columns: dict[str, dict[str, str]] = field(default_factory=dict)

    @property
    def base(self) -> str:
        """Name of the model that others are compared to."""
        return next(iter(self.scores))

    def difference(self, name: str, other: str | None = None) -> dict[str, Estimate]:
        """Scores of `name` minus those of `other` (the base), paired: loss and KL in nats per token, top1 a share."""
        a, b = self.scores[name], self.scores[self.base if other is None else other]
        pairs = {score: (getattr(a, score), getattr(b, score)) for score in ("loss", "kl", "top1")}
        return {score: estimate(x - y) for score, (x, y) in pairs.items() if x is not None and y is not None}

    def rows(self) -> Iterator[dict[str, str]]:
        """One row per model, as text by title of the column."""
        for name, scores in self.scores.items():
            ratio = _exponential(self.difference(name)["loss"])
            row = {"": name} | {title: values.get(name, "") for title, values in self.columns.items()}
            row |= {"perplexity": str(scores.perplexity), "ratio": f"{ratio.mean:.4f} ± {ratio.error:.4f}"}
            if scores.kl is not None:
                row["KL, millinats"] = str(estimate(scores.kl).scaled(1000))
                row["top-1, %"] = str(estimate(scores.top1).scaled(100))
            yield row

    def to_dict(self) -> dict:
        """By name: mean and error of perplexity, ratio to the base, KL (nats) and top1, and the further columns."""
        out: dict[str, dict] = {}
        for name, scores in self.scores.items():
            figures = {"perplexity": scores.perplexity, "ratio": _exponential(self.difference(name)["loss"])}
            if scores.kl is not None:
                figures |= {"kl": estimate(scores.kl), "top1": estimate(scores.top1)}
            out[name] = {key: {"mean": x.mean, "error": x.error} for key, x in figures.items()}
            out[name] |= {title: values[name] for title, values in self.columns.items() if name in values}
        return out

    def markdown(self) -> str:
        """The table in Markdown."""
        rows = list(self.rows())
        return "\n".join(
            "| " + " | ".join(cells) + " |" for cells in (rows[0], ["---"] * len(rows[0]), *(r.values() for r in rows))
        )

    def __str__(self) -> str:
        rows = list(self.rows())
        table = [list(rows[0]), *(list(row.values()) for row in rows)]
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        return "\n".join("  ".join(map(str.ljust, cells, widths)).rstrip() for cells in table)

    __repr__ = __str__

    def _repr_html_(self) -> str:
        rows = list(self.rows())
        lines = [("th", rows[0]), *(("td", row.values()) for row in rows)]
        cells = ("".join(f"<{tag}>{html.escape(x)}</{tag}>" for x in values) for tag, values in lines)
        return f"<table>{''.join(f'<tr>{row}</tr>' for row in cells)}</table>"


def compare(
    models: Mapping[str, nn.Module | Callable[[], nn.Module]],
    tokenizer_or_ids: Any,
    texts: Any = None,
    *,
    count: int = 8,
    length: int = LENGTH,
) -> Comparison:
    """A table of `models` by name; the first is the reference for KL and agreement.

    A function in place of a model is called when it is needed, so that only one model at a time is in memory.
    """
    over = as_windows(tokenizer_or_ids, texts, count, length)
    reference, scores = None, {}
    for name, model in models.items():
        model = model if isinstance(model, nn.Module) else model()
        reference = predictions(model, over) if reference is None else reference
        scores[name] = measure(model, over, reference)
    return Comparison(scores)


# Quantization without a store ----------------------------------------------------------------------------------------


def matrices(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Role and view (N, K) of every weight that a scheme may quantize; gate and up are one matrix, as in a store."""
    return ((role, w) for role, _, w in _placed(model))


def _placed(model: nn.Module) -> Iterator[tuple[str, tuple[str, int] | None, Tensor]]:
    """`matrices` with the place of each: an expert's by its name and the number of its layer with experts, or None."""
    for site, module in enumerate(config.expert_modules(model).values()):
        for name, weight in module.named_parameters(recurse=False):
            if weight.dim() == 3:
                yield from (("experts", (name, site), w.t() if module.is_transposed else w) for w in weight.data)
    modules = dict(model.named_modules())
    for name, role in config.backbone_roles(model).items():
        yield role, None, modules[name.removesuffix(".weight")].weight.data


@contextmanager
def quantized(model: nn.Module, schemes: Scheme | Mapping[str, Scheme]) -> Iterator[dict[str, tuple[int, int]]]:
    """Replace the model's weights by their quantized values inside `with`, and restore the originals afterwards.

    Yields `(bytes, weights)` by role, including metadata; weights that are not quantized count 16 bits.

    schemes: one scheme for all roles, or schemes by role
    """
    by_role = schemes if isinstance(schemes, Mapping) else dict.fromkeys(ROLES, schemes)
    for scheme in by_role.values():
        scheme.check_layers(len(config.expert_modules(model)))
    sizes: dict[str, tuple[int, int]] = {}
    originals: dict[int, tuple[Tensor, Tensor | None]] = {}
    try:
        for role, place, w in _placed(model):
            if w.data_ptr() in originals:  # a tied head: its embedding came first
                continue
            scheme = by_role.get(role, Scheme())
            precision = scheme.expert(*place) if place else scheme.precision(role)
            q = None if precision is None else scheme.quantize_as(w, precision)
            nbytes, weights = sizes.get(role, (0, 0))
            sizes[role] = nbytes + (2 * w.numel() if q is None else q.nbytes), weights + w.numel()
            originals[w.data_ptr()] = w, None if q is None else w.clone()
            if q is not None:
                w.copy_(q.dequantize())
        yield sizes
    finally:
        for w, original in originals.values():
            if original is not None:
                w.copy_(original)


@contextmanager
def with_twins(model: nn.Module, coarse: Scheme) -> Iterator[nn.Module]:
    """Inside `with`, every expert has a twin, number + E, quantized by `coarse`: for `coarse_misses`."""
    modules = list(config.expert_modules(model).values())
    kept = [dict(module.named_parameters(recurse=False)) for module in modules]
    with quantized(model, {"experts": coarse}):
        twins = [{name: w.data.clone() for name, w in weights.items()} for weights in kept]
    try:
        for module, weights, others in zip(modules, kept, twins, strict=True):
            for name, w in weights.items():
                both = torch.cat([w.data, others[name]])  # (2 E, ...)
                setattr(module, name, nn.Parameter(both, requires_grad=False))
            module.num_experts = len(both)
        yield model
    finally:
        for module, weights in zip(modules, kept, strict=True):
            for name, weight in weights.items():
                setattr(module, name, weight)
            module.num_experts = len(weight)
