"""Divides a budget of bits among layers and matrices, where they lower the damage most.

Letters: **T** tokens, **N** outputs, **K** inputs, **E** experts.

The damage to a model's predictions is close to 1.3 nats per token for each unit of relative error in the residual
stream: the sum over layers of E|dMoE|^2 / E|x|^2 (reported by a prototype on the bundled model: 0.98 to 1.53 times
that, by layer and matrix). A pass over the text measures these errors for each form, on a few experts and rows; a
Lagrange multiplier then picks a form for each layer and matrix. Forms are the same for all experts of a layer: slots of
one size for each layer, and hardly worse than a form for each expert.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from mixoff import kernels
from mixoff.conversion.weights import Inputs, decoder_of, matrices, metric, read_expert
from mixoff.errors import MixoffError
from mixoff.quantize import rotation
from mixoff.quantize.calibrated import quantize_calibrated
from mixoff.quantize.hessian import Metric
from mixoff.quantize.layout import BLOCK, packed_nbytes
from mixoff.quantize.scheme import LAST, Precision
from mixoff.runtime.experts import activated
from mixoff.shapes.config import expert_modules, layers_of
from mixoff.shapes.sites import Part, Site

FORMS = ((2, 64), (2, 32), (3, 64), (3, 32), (4, 64), (4, 32))  # bits and group sizes to choose from
NATS = 1.3  # damage of one unit of relative error
EXPERTS, ROWS = 4, 4  # experts of a layer, and blocks of 128 outputs of each matrix, that are looked at
TOKENS = 1024  # of an expert, for errors of its gate and up
STEPS = 60  # of a bisection
Choice = dict[tuple[int, str], Precision]  # by layer with experts and name of a matrix


def divide(
    model: PreTrainedModel, ids: Tensor, bits: float, metadata_bits: int
) -> tuple[tuple[Precision, Precision], ...]:
    """Precisions of the first matrices and of the last, for each layer with experts.

    - model: the original, its experts served by a runtime, in fp32.
    - ids: windows of tokens (B, T).
    - bits: bits per weight of experts, metadata included, at most.

    Raises MixoffError for a budget below the least that there is, and for widths that no form suits.
    """
    sites = model.mixoff.source.sites
    damage = Damage(model, metadata_bits)
    damage.measure(ids)
    if narrow := sorted({name for (_, name), forms in damage.found.items() if not forms}):
        least = min(size for _, size in FORMS)
        raise MixoffError(f"the inputs of {', '.join(narrow)} are no multiple of {least}: leave the budget of bits out")
    nbytes = partial(nbytes_of, sites, metadata_bits)
    chosen = cheapest(damage.found, nbytes, bits * _weights(sites) / 8)
    if chosen is None:
        least = sum(min(nbytes(key, p) for p in forms) for key, forms in damage.found.items())
        need = 8 * least / _weights(sites)
        raise MixoffError(f"{bits} bits per weight are too few: this model's experts take {need:.3f} at least")
    return tuple((chosen[i, _first(site)], chosen[i, LAST]) for i, site in enumerate(sites))


def cheapest(
    damage: dict[tuple[int, str], dict[Precision, float]],
    nbytes: Callable[[tuple[int, str], Precision], int],
    budget: float,
) -> Choice | None:
    """The choice with the least damage within `budget` bytes; None if there is none."""

    def choose(price: float) -> Choice:
        return {key: min(forms, key=lambda p: forms[p] + price * nbytes(key, p)) for key, forms in damage.items()}

    def total(choice: Choice) -> int:
        return sum(nbytes(*item) for item in choice.items())

    low, high = 1e-18, 1.0  # nats per byte
    best = choose(high)
    if total(best) > budget:
        return None
    for _ in range(STEPS):
        price = (low * high) ** 0.5
        choice = choose(price)
        if total(choice) > budget:
            low = price
        else:
            high, best = price, choice
    return _filled(best, damage, nbytes, budget - total(best))


def _filled(best: Choice, damage: dict, nbytes: Callable, rest: float) -> Choice:
    """The choice with what is left of the budget spent, the best use first."""
    while True:
        gains = [
            ((damage[key][now] - lost) / cost, key, p, cost)
            for key, now in best.items()
            for p, lost in damage[key].items()
            if 0 < (cost := nbytes(key, p) - nbytes(key, now)) <= rest and lost < damage[key][now]
        ]
        if not gains:
            return best
        _, key, precision, cost = max(gains, key=lambda gain: gain[0])
        best, rest = best | {key: precision}, rest - cost


def nbytes_of(sites: tuple[Site, ...], metadata_bits: int, key: tuple[int, str], precision: Precision) -> int:
    """Bytes of one matrix of all experts of a layer."""
    site = sites[key[0]]
    part = next(part for part in site.parts if part.name == key[1])
    shape = _shape(site, part)
    return site.num_experts * packed_nbytes(shape, precision.bits, precision.group_size, metadata_bits)


def _shape(site: Site, part: Part) -> tuple[int, int]:
    rows, columns = part.shape
    return (columns, rows) if site.transposed else (rows, columns)


def _first(site: Site) -> str:
    return next(part.name for part in site.parts if len(part.shape) == 2 and part.name != LAST)


def _weights(sites: tuple[Site, ...]) -> int:
    return sum(s.num_experts * part.shape[0] * part.shape[1] for s in sites for part in s.parts if len(part.shape) == 2)


class Damage:
    """What each form of each matrix costs, nats per token, in `found`."""

    def __init__(self, model: PreTrainedModel, metadata_bits: int) -> None:
        self.model, self.metadata_bits = model, metadata_bits
        self.found: dict[tuple[int, str], dict[Precision, float]] = {}
        self.waiting: set[int] = set()  # layers with experts whose size of the residual stream is not known yet

    @torch.inference_mode()
    def measure(self, ids: Tensor) -> None:
        """Pass the windows `ids` (B, T) through the model."""
        with self._watching():
            decoder_of(self.model)(input_ids=ids, use_cache=False)

    @contextmanager
    def _watching(self) -> Iterator[None]:
        layers = self.model.get_submodule(layers_of(self.model)).children()
        hooks = [layer.register_forward_hook(self._layer) for layer in layers]
        for site, module in enumerate(expert_modules(self.model).values()):
            hooks.append(module.register_forward_pre_hook(partial(self._experts, site)))
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _layer(self, _: nn.Module, args: tuple[Any, ...], out: Any) -> None:
        """Relate the errors of a layer's experts to the residual stream that they end in."""
        size = (out[0] if isinstance(out, tuple) else out).square().sum().item()  # T E|x|^2
        for key in [key for key in self.found if key[0] in self.waiting]:
            self.found[key] = {precision: error / size for precision, error in self.found[key].items()}
        self.waiting.clear()

    def _experts(self, site: int, module: nn.Module, args: tuple[Any, ...]) -> None:
        x, index, weights = args
        self.waiting.add(site)
        counts = torch.bincount(index[index < module.num_experts].flatten(), minlength=module.num_experts)
        looked_at = counts.argsort(descending=True)[:EXPERTS].tolist()
        share = sum(counts[e] for e in looked_at).item() / counts.sum().item()  # of all tokens, that these experts got
        for e in looked_at:
            rows, k = (index == e).nonzero(as_tuple=True)
            for name, errors in self._expert(site, e, module, x[rows], weights[rows, k]).items():
                sums = self.found.setdefault((site, name), dict.fromkeys(errors, 0.0))
                for precision, error in errors.items():
                    sums[precision] += NATS * error / share

    def _expert(
        self, site: int, e: int, module: nn.Module, x: Tensor, gate: Tensor
    ) -> dict[str, dict[Precision, float]]:
        """Errors of one expert's output, sums over tokens, by matrix and form."""
        source = self.model.mixoff.source
        parts, first = read_expert(source, site, e), _first(source.sites[site])
        turned = matrices(parts, module.is_transposed)
        bias = parts[f"{first}_bias"].float() if module.has_bias else torch.zeros(len(turned[first]))
        h = activated(module, kernels.linear(x, turned[first]) + bias, None)  # (T, F)
        rows = _sample(len(turned[LAST]), 1)
        last = rotation.rotate(turned[LAST]) if turned[LAST].shape[1] % rotation.BLOCK == 0 else turned[LAST]
        rotated = last is not turned[LAST]
        errors = self._errors(last[rows], Inputs(rotation.rotate(h) if rotated else h, gate=gate), rotated)
        scaled = {p: error * len(last) / len(rows) for p, error in errors.items()}
        return {LAST: scaled, first: self._through(module, x, gate, turned[first], bias, turned[LAST])}

    def _errors(self, w: Tensor, given: Inputs, rotated: bool) -> dict[Precision, float]:
        """tr(dW H dW^T) of `w` (N, K) in every form that suits it."""
        measure, _ = metric(given)
        return {p: measure.error(weights - w) for p, weights in self._quantized(w, measure, rotated)}

    def _quantized(self, w: Tensor, measure: Metric, rotated: bool) -> Iterator[tuple[Precision, Tensor]]:
        for bits, size in FORMS:
            if w.shape[1] % size == 0:
                p = Precision(bits, size, rotated)
                yield p, quantize_calibrated(w.contiguous(), measure, p, self.metadata_bits).dequantize()

    def _through(
        self, module: nn.Module, x: Tensor, gate: Tensor, w: Tensor, bias: Tensor, last: Tensor
    ) -> dict[Precision, float]:
        """The same for gate and up: what their errors become in the output, by way of some of the hidden neurons."""
        F = last.shape[1]
        neurons = _sample(F, 2 if module.has_gate else 1)
        rows = neurons
        if module.has_gate:
            rows = torch.cat([neurons, F + neurons]) if module.is_concatenated else _both(neurons)
        few = slice(0, None, -(-len(x) // TOKENS))
        some, measure = x[few], metric(Inputs(x, gate=gate))[0]
        true = activated(module, some @ w[rows].T + bias[rows], None)
        errors = {}
        for p, weights in self._quantized(w[rows], measure, False):
            lost = activated(module, some @ weights.T + bias[rows], None) - true  # (T, neurons)
            lost = lost @ last[:, neurons].T * gate[few, None]
            errors[p] = lost.square().sum().item() * F / len(neurons) * len(x) / len(some)
        return errors


def _sample(N: int, parts: int) -> Tensor:
    """Rows of a few blocks spread over N, whole ones where there are as many."""
    count = min(ROWS // parts, N // BLOCK)
    if count == 0 or BLOCK * ROWS // parts >= N:
        return torch.arange(N)
    starts = torch.linspace(0, N // BLOCK - 1, count).long() * BLOCK
    return (starts[:, None] + torch.arange(BLOCK)).flatten()


def _both(neurons: Tensor) -> Tensor:
    """Rows of interleaved gate and up."""
    return torch.stack([2 * neurons, 2 * neurons + 1], 1).flatten()
