"""Runs the original model and the one quantized so far side by side, layer by layer, and quantizes on the way.

Letters: **T** tokens of all windows, **D** model width, **E** experts, **K** inputs of a matrix.

One forward pass of transformers' own model does it all. Each decoder layer is called twice, with the original hidden
states and with those of the quantized model:

    x  ──> original layer  ──> x'      each matrix notes its inputs
    x̂  ──> quantized layer ──> x̂'      each matrix is quantized when it is called, for both of its inputs

So whatever comes before a matrix is already quantized when its turn comes, in any family that transformers has. Experts
are read one at a time, and each computes for both streams while it is in memory; the original layer is then called
again, with what its parts put out the first time, to go on from what its experts put out. A conversion that was killed
runs again through what is done, with the weights of the store, and goes on to the same bytes.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from mixoff import kernels
from mixoff.conversion.weights import NARROW, Inputs, calibrated, decoder_of, matrices, metric, moment, read_expert
from mixoff.errors import MixoffError
from mixoff.quantize.scheme import LAST, Precision
from mixoff.quantize.tensor import QTensor
from mixoff.runtime.experts import activated, normed
from mixoff.shapes.config import backbone_roles, expert_modules, layers_of
from mixoff.store.blueprint import Weight
from mixoff.store.making import Making

NAMED = 8  # layers whose unreached experts a warning names
EXTRA_TOKENS = 512  # other tokens of the layer, for an expert that got few; more gain nothing: docs/log.md
log = logging.getLogger("mixoff")


@dataclass
class Layer:
    """The experts of a layer while they are quantized: x (T, D) is what all of them get, in the quantized stream."""

    site: int
    module: nn.Module
    x: Tensor

    @cached_property
    def moment(self) -> Tensor:
        """Second moment of x (D, D)."""
        return moment(self.x, self.x)


class Streams:
    """A model whose matrices are quantized while it computes.

    - model: the original, its experts served from the checkpoint, in fp32.
    - making: the store in the making; what its journal names is read from it.
    - advance: called with each weight that was quantized.
    """

    def __init__(self, model: PreTrainedModel, making: Making, pool: ThreadPoolExecutor, advance: Callable) -> None:
        self.model, self.making, self.pool, self.advance = model, making, pool, advance
        self.scheme, self.sites = making.plan.scheme, making.plan.sites
        self.weights = {weight.name: weight for weight in making.plan.weights}
        self.prefix = layers_of(model)
        self.original = False  # which of the two streams is computed
        self.x: Tensor | None = None  # hidden states of the original stream
        self.noted: dict[Any, Any] = {}  # inputs in the original stream, of one layer
        self.entered: dict[
            bool, Tensor
        ] = {}  # inputs of the last norm, by stream: what the experts' output is added to
        self.shared: tuple[tuple, Any] | None = None  # Hessian of the last inputs, which q, k and v have in common
        self.answer: Tensor | None = None  # what a layer's experts put out in the original stream
        self.before: dict[nn.Module, list] = {}  # what its other parts put out there, call by call
        self.spent: list[nn.Linear] = []  # matrices of the layer that are quantized
        self.few: dict[int, dict[int, int]] = {}  # tokens of the experts that got few, by layer

    @torch.inference_mode()
    def run(self, ids: Tensor) -> None:
        """Pass the windows `ids` (B, T) through both models."""
        with self._watching():
            hidden = decoder_of(self.model)(input_ids=ids, use_cache=False)[0]
            for name, linear in self._linears().items():
                if not name.startswith(self.prefix):
                    self._quantize_linear(name, linear, hidden.flatten(0, -2))
        self._report()

    @property
    def names(self) -> set[str]:
        """The weights that are quantized here."""
        experts = {f"{site.name}.{e}" for site in self.sites for e in range(site.num_experts)}
        of_experts = {name for name, w in self.weights.items() if w.precision and name.rpartition(".")[0] in experts}
        return of_experts | set(self._linears())

    def _linears(self) -> dict[str, nn.Linear]:
        """The linear layers that are quantized here, by their weight's name: those of decoder layers, and the head."""
        modules, found = dict(self.model.named_modules()), {}
        for name, role in backbone_roles(self.model).items():
            module, weight = modules[name.removesuffix(".weight")], self.weights.get(name)
            inside = name.startswith(self.prefix) or role == "head"
            if inside and isinstance(module, nn.Linear) and weight is not None and weight.precision:
                found[name] = module
        return found

    @contextmanager
    def _watching(self) -> Iterator[None]:
        """Inside `with`, layers, matrices, norms and experts of the model pass through this object."""
        changed: list[nn.Module] = []

        def change(module: nn.Module, method: Callable) -> None:
            module.forward = partial(method, module, module.forward)  # type: ignore[method-assign]
            changed.append(module)

        experts = set(expert_modules(self.model).values())
        for layer in self.model.get_submodule(self.prefix).children():
            change(layer, self._layer)
            for child in layer.children():
                if "norm" in type(child).__name__.lower():
                    change(child, self._norm)
                elif not experts & set(child.modules()):
                    change(child, self._part)
        for site, module in enumerate(expert_modules(self.model).values()):
            change(module, partial(self._experts, site))
        for name, linear in self._linears().items():
            if name.startswith(self.prefix):
                change(linear, partial(self._linear, name))
        try:
            yield
        finally:
            for module in changed:
                del module.forward

    # One call of each kind of module

    def _layer(self, layer: nn.Module, forward: Callable, hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        self.noted.clear()
        self.answer = None
        self.x = hidden if self.x is None else self.x
        after = self._in_original(forward, *args, **kwargs)
        out = forward(hidden, *args, **kwargs)
        if self.answer is not None:  # what experts put out in the original was not known the first time
            after = self._in_original(forward, *args, **kwargs)
        self.x = after[0] if isinstance(after, tuple) else after
        for linear in self.spent:
            linear.weight.data = linear.weight.data.new_empty(0)  # it is not needed any more
        self.spent.clear()
        self.noted.clear()
        self.before.clear()
        self.shared = None
        return out

    def _in_original(self, forward: Callable, *args: Any, **kwargs: Any) -> Any:
        self.original = True
        try:
            return forward(self.x, *args, **kwargs)
        finally:
            self.original = False

    def _part(self, part: nn.Module, forward: Callable, *args: Any, **kwargs: Any) -> Any:
        """Attention, or whatever else a layer has beside its experts: computed once in the original stream."""
        if not self.original:
            return forward(*args, **kwargs)
        if self.answer is not None:
            return self.before[part].pop(0)
        out = forward(*args, **kwargs)
        self.before.setdefault(part, []).append(out)
        return out

    def _norm(self, norm: nn.Module, forward: Callable, hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        self.entered[self.original] = hidden
        return forward(hidden, *args, **kwargs)

    def _linear(self, name: str, linear: nn.Linear, forward: Callable, x: Tensor) -> Tensor:
        if self.original:
            self.noted[name] = x.flatten(0, -2)
            return forward(x)
        if name not in self.noted:  # a second call
            raise MixoffError(
                f"{name} is called twice per layer: this model cannot be calibrated, leave --calibrate out"
            )
        q = self._quantize_linear(name, linear, x.flatten(0, -2))
        self.spent.append(linear)
        out = kernels.linear(x, q, exact=True)
        return out if linear.bias is None else out + linear.bias

    def _experts(
        self, site: int, module: nn.Module, forward: Callable, x: Tensor, index: Tensor, weights: Tensor
    ) -> Tensor:
        """Experts of a layer: x (T, D), and the router's choice and weights (T, top k).

        In both streams tokens go where the original's router sends them, so that products serve twice: to quantize, and
        to go on.
        """
        if self.original and self.answer is None:
            self.noted[site] = x, index, weights, self.entered.get(True)
            return torch.zeros_like(x)
        if self.original:
            return self.answer
        before, index, weights, entered = self.noted.pop(site)
        lacking = None if entered is None else (entered - self.entered[False]).flatten(0, -2)
        layer, out, self.answer = Layer(site, module, x), torch.zeros_like(x), torch.zeros_like(x)
        for e in range(self.sites[site].num_experts):
            rows, k = (index == e).nonzero(as_tuple=True)
            gate = weights[rows, k]
            given = Inputs(x[rows], before[rows], gate, None if lacking is None else lacking[rows])
            quantized, original = self._expert(layer, e, given)
            out.index_add_(0, rows, quantized * gate[:, None])
            self.answer.index_add_(0, rows, original * gate[:, None])
        return out

    # Quantizing

    def _quantize_linear(self, name: str, linear: nn.Linear, x: Tensor) -> QTensor:
        weight, noted = self.weights[name], self.noted.pop(name, None)
        if name in self.making.journal.done:
            return self._stored(weight, (linear.out_features, linear.in_features))
        given = Inputs(x, noted)
        key = x.data_ptr(), x.shape
        if self.shared is None or self.shared[0] != key:
            self.shared = key, metric(given)
        with _named(weight):
            q = calibrated(linear.weight, given, _precision(weight), self.scheme, self.pool.map, None, self.shared[1])
        self._put(weight, q.to_buffer())
        return q

    def _expert(self, layer: Layer, e: int, given: Inputs) -> tuple[Tensor, Tensor]:
        """Quantize an expert, or read it from the store; returns what it puts out, quantized and original, (T, D)."""
        place = f"{self.sites[layer.site].name}.{e}"
        parts = {part.name: self.weights[f"{place}.{part.name}"] for part in self.sites[layer.site].parts}
        originals = read_expert(self.model.mixoff.source, layer.site, e)
        turned = matrices(originals, layer.module.is_transposed)
        first = next(name for name in turned if name != LAST)
        biases = {name.removesuffix("_bias"): w.float() for name, w in originals.items() if w.dim() == 1}

        def passed(x: Tensor, name: str, w: Tensor | QTensor) -> Tensor:
            out = kernels.linear(x, w, exact=True)
            out = out.add_(biases[name]) if name in biases else out
            return normed(layer.module, out) if name == LAST else activated(layer.module, out, None)

        if len(given.quantized) < layer.x.shape[1]:
            self.few.setdefault(layer.site, {})[e] = len(given.quantized)
        q = self._matrix(parts[first], turned[first], given, layer)
        h, before = passed(given.quantized, first, q), passed(given.original, first, turned[first])
        others = None
        if len(h) < h.shape[1]:
            others = passed(layer.x[:: max(1, len(layer.x) // EXTRA_TOKENS)], first, q)
        inputs = replace(given, quantized=h, original=before, others=others)
        last = self._matrix(parts[LAST], turned[LAST], inputs)
        return passed(h, LAST, last), passed(before, LAST, turned[LAST])

    def _matrix(self, weight: Weight, w: Tensor, given: Inputs, layer: Layer | None = None) -> QTensor | Tensor:
        """A matrix (N, K) of an expert, quantized or read from the store; as it is, if it stays so.

        layer: for a matrix that gets the inputs of the layer
        """
        if weight.precision is None:
            return w
        if weight.name in self.making.journal.done:
            return self._stored(weight, tuple(w.shape))
        common = None
        if layer:  # a target for a wide one would cost more than all the rest, and gains little: docs/log.md
            common = layer.moment
            given = replace(given, residual=None, original=given.original if w.shape[1] <= NARROW else None)
        with _named(weight):
            q = calibrated(w, given, weight.precision, self.scheme, self.pool.map, common)
        self._put(weight, q.to_buffer())
        return q

    # The store in the making

    def _put(self, weight: Weight, image: Tensor) -> None:
        self.making.put(weight, image.numpy())
        self.advance(weight)

    def _stored(self, weight: Weight, shape: tuple[int, int]) -> QTensor:
        """A matrix of the backbone that was quantized before."""
        p = _precision(weight)
        form = p.bits, p.group_size, self.scheme.metadata_bits, p.rotated
        return QTensor.from_buffer(self._bytes(weight), 0, shape, *form)

    def _bytes(self, weight: Weight) -> Tensor:
        """The bytes of a weight in the store, uint8 (nbytes,)."""
        pieces = [np.fromfile(self.making.folder / o.file, np.uint8, o.nbytes, offset=o.offset) for o in weight.outputs]
        return torch.from_numpy(np.concatenate(pieces))

    def _report(self) -> None:
        """Name the experts that calibration hardly reached."""
        if not self.few:
            return
        counts = [n for experts in self.few.values() for n in experts.values()]
        never = {site: [e for e, n in experts.items() if n == 0] for site, experts in self.few.items()}
        named = [f"layer {self.sites[i].layer}: {', '.join(map(str, es))}" for i, es in never.items() if es]
        log.warning(
            "%d experts got fewer tokens than they have inputs (the least: %d), and were quantized for the inputs of "
            "their layer too; without any token: %s. More text of the kind that the model will read helps",
            len(counts), min(counts), "; ".join(named[:NAMED]) + " …" * (len(named) > NAMED) or "none",
        )  # fmt: skip


def _precision(weight: Weight) -> Precision:
    assert weight.precision is not None
    return weight.precision


@contextmanager
def _named(weight: Weight) -> Iterator[None]:
    """Errors name the weight."""
    try:
        yield
    except MixoffError as error:
        raise MixoffError(f"{weight.where}: {error}") from None
