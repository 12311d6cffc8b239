"""Runs the original model and the one quantized so far side by side, layer by layer, and quantizes on the way.

Letters: **T** tokens of all windows, **D** model width, **E** experts, **K** inputs of a matrix.

One forward pass of transformers' own model does it all. Each decoder layer is called twice, with the original hidden
states and with those of the quantized model:

    x  ──> original layer  ──> x'      each matrix notes its inputs
    x̂  ──> quantized layer ──> x̂'      each matrix is quantized when it is called, for both of its inputs

So whatever comes before a matrix is already quantized when its turn comes, in any family that transformers has. Experts
are read one at a time. A conversion that was killed runs again through what is done, with the weights of the store, and
goes on to the same bytes.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from mixoff import kernels
from mixoff.conversion.weights import Inputs, calibrated, decoder_of, matrices, metric, moment, read_expert
from mixoff.errors import MixoffError
from mixoff.quantize.scheme import LAST, Precision
from mixoff.quantize.tensor import QTensor
from mixoff.runtime.experts import activated, expert_mlp
from mixoff.shapes.config import backbone_roles, expert_modules, layers_of
from mixoff.store.blueprint import Weight
from mixoff.store.making import Making
from mixoff.transfer.arena import view

NAMED = 8  # layers whose unreached experts a warning names
EXTRA_TOKENS = 2048  # other tokens of the layer, for an expert that got few
log = logging.getLogger("mixoff")


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

        for layer in self.model.get_submodule(self.prefix).children():
            change(layer, self._layer)
            for child in layer.children():
                if "norm" in type(child).__name__.lower():
                    change(child, self._norm)
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
        self.x = hidden if self.x is None else self.x
        self.original = True
        after = forward(self.x, *args, **kwargs)
        self.original = False
        out = forward(hidden, *args, **kwargs)
        self.x = after[0] if isinstance(after, tuple) else after
        self.noted.clear()
        self.shared = None
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
        linear.weight.data = linear.weight.data.new_empty(0)  # it is not needed any more
        out = kernels.linear(x, q, exact=True)
        return out if linear.bias is None else out + linear.bias

    def _experts(
        self, site: int, module: nn.Module, forward: Callable, x: Tensor, index: Tensor, weights: Tensor
    ) -> Tensor:
        """Experts of a layer: x (T, D), and the router's choice and weights (T, top k)."""
        if self.original:
            self.noted[site] = x, index, weights, self.entered.get(True)
            return forward(x, index, weights)
        out = torch.zeros_like(x)
        for e, image in self._quantize_experts(site, module, x):
            rows, k = (index == e).nonzero(as_tuple=True)
            if len(rows):
                parts = {part.name: view(image, part) for part in self.sites[site].parts}
                out.index_add_(0, rows, expert_mlp(module, x[rows], parts, None, True) * weights[rows, k, None])
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

    def _quantize_experts(self, site: int, module: nn.Module, x: Tensor) -> Iterator[tuple[int, Tensor]]:
        """Every expert of a layer with its quantized image, for inputs x (T, D) of the quantized stream."""
        before, index, gates, entered = self.noted.pop(site)
        now = self.entered.get(False)
        residual = None if entered is None else (entered - now).flatten(0, -2)
        source, common = self.model.mixoff.source, None
        for e in range(self.sites[site].num_experts):
            parts = self.sites[site].parts
            names = {part.name: f"{self.sites[site].name}.{e}.{part.name}" for part in parts}
            image = torch.zeros(self.sites[site].expert_nbytes, dtype=torch.uint8)
            done = all(name in self.making.journal.done for name in names.values())
            if done:
                for part in parts:
                    image[part.offset : part.offset + part.nbytes] = self._bytes(self.weights[names[part.name]])
                yield e, image
                continue
            if common is None:
                common = moment(x, x)
            originals = read_expert(source, site, e)
            rows, k = (index == e).nonzero(as_tuple=True)
            if len(rows) < x.shape[1]:
                self.few.setdefault(site, {})[e] = len(rows)
            lacking = None if residual is None else residual[rows]
            quantized = self._expert(site, e, module, originals, (x, before, rows, gates[rows, k], lacking, common))
            for part in parts:
                place = image[part.offset : part.offset + part.nbytes]
                made = quantized.get(part.name)
                old = originals[part.name].contiguous()
                place.copy_(old.view(-1).view(torch.uint8) if made is None else made.to_buffer())
                if made is not None:
                    self._put(self.weights[names[part.name]], place)
            yield e, image

    def _expert(
        self, site: int, e: int, module: nn.Module, originals: dict[str, Tensor], given: tuple
    ) -> dict[str, QTensor]:
        """The quantized matrices of one expert."""
        x, before, rows, gate, lacking, common = given
        turned = matrices(originals, module.is_transposed)
        first = next(name for name in turned if name != LAST)
        scheme, place = self.scheme, f"{self.sites[site].name}.{e}"

        def hidden(x: Tensor, w: Any) -> Tensor:
            out = kernels.linear(x, w, exact=True)
            if module.has_bias:
                out = out + originals[f"{first}_bias"].float()
            return activated(module, out, None)

        with _named(self.weights[f"{place}.{first}"]):
            inputs = Inputs(x[rows], before[rows], gate)
            q = calibrated(
                turned[first], inputs, _precision(self.weights[f"{place}.{first}"]), scheme, self.pool.map, common
            )
        others = None
        if len(rows) < turned[LAST].shape[1]:
            others = hidden(x[:: max(1, len(x) // EXTRA_TOKENS)], q)
        inputs = Inputs(hidden(x[rows], q), hidden(before[rows], turned[first]), gate, lacking, others)
        with _named(self.weights[f"{place}.{LAST}"]):
            last = calibrated(turned[LAST], inputs, _precision(self.weights[f"{place}.{LAST}"]), scheme, self.pool.map)
        return {first: q, LAST: last}

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
