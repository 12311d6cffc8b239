"""Compiles what a model or a conversion needs before anything is timed, and announces it if that takes long.

numba keeps compiled code on disk, so this takes half a minute once per machine, and milliseconds afterwards. One
product is computed for each form of weight in the model, on empty matrices: the model's tiers and counters stay as
they are.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

import torch

from mixoff import kernels
from mixoff.kernels.cpu import products, program
from mixoff.kernels.triton.tiles import MOST_ROWS
from mixoff.loading import layers
from mixoff.quantize import solve
from mixoff.quantize.scheme import Scheme
from mixoff.quantize.tensor import QTensor
from mixoff.transfer.arena import view

if TYPE_CHECKING:
    from transformers import PreTrainedModel


WIDTH = 1024  # width of the matrices: enough that several threads share a product
ROWS = (1, 2, 4)  # numbers of rows that one loop computes together
CARD = ("triton", "triton-dense")
CARD_ROWS = (*ROWS, MOST_ROWS + 1)  # the last one is computed by way of dequantized weights
PATIENCE_S = 0.5  # compiling for less than this is not announced
LINE = "compiling kernels for this CPU, once: about half a minute of its time"


def compile_for(model: PreTrainedModel, say: Callable[[str], object]) -> float:
    """Compile the loops that `model`, served by a runtime, uses on a CPU; returns the seconds. `say` gets LINE."""
    if model.device.type != "cpu" or products.loops() is None:
        return 0.0
    modules = [m for m in model.modules() if isinstance(m, layers.QuantizedLinear)]
    backbone = {(type(w), _form(w)): w for m in modules if (w := m.quantized) is not None}
    parts = (part for site in model.mixoff.source.sites for part in site.parts)
    experts = {tuple(part.form) for part in parts if part.form and isinstance(part.form[0], int)}
    if not backbone and not experts:
        return 0.0
    step = model.mixoff.step is not None
    exact = model.mixoff.exact
    with _announced(say) as started, torch.inference_mode():
        for w in backbone.values():
            for rows in _rows(w, exact):
                kernels.linear(torch.zeros(rows, w.shape[1], dtype=model.dtype), w, exact=exact)
        for form in experts:
            _expert(form, model.dtype, exact)
        if step:
            program.stages()
    return time.perf_counter() - started


def compile_on_card(model: PreTrainedModel) -> int:
    """Compile the Triton kernels of `model` on its card, for every shape; returns the number of products computed.

    Each product is computed once, from the backbone's own weights and from an expert's memory that holds noise. What
    does not compile is left to its first use, and so is everything if the memory is lacking.
    """
    modules = [m for m in model.modules() if isinstance(m, layers.QuantizedLinear)]
    backbone = [m.together[0].whole if m.together else m.quantized for m in modules]
    distinct = {(type(w), _form(w), tuple(w.shape)): w for w in backbone if w is not None}
    sites, done = {site.parts: site for site in model.mixoff.source.sites}, 0
    with suppress(Exception), torch.inference_mode():
        for site in sites.values():
            image = torch.empty(site.expert_nbytes, dtype=torch.uint8, device=model.device)
            weights = [view(image, part) for part in site.parts if part.form is not None]
            done += sum(_on_card(w, model) for w in weights)
            if len(weights) == 2 and all(isinstance(w, QTensor) for w in weights):
                done += _pair_on_card(weights, model)
        done += sum(_on_card(w, model) for w in distinct.values())
    return done


def _on_card(w: Any, model: PreTrainedModel) -> int:
    """Compute the products of every kind with a weight; returns how many."""
    inputs = [torch.zeros(rows, w.shape[1], dtype=model.dtype, device=model.device) for rows in CARD_ROWS]
    inputs = [x for x in inputs if kernels.choose(x, w) in CARD]
    for x in inputs:
        kernels.linear(x, w)
    return len(inputs)


def _pair_on_card(pair: list, model: PreTrainedModel) -> int:
    """The same for the fused products of an expert."""
    inputs = [torch.zeros(rows, pair[0].shape[1], dtype=model.dtype, device=model.device) for rows in ROWS]
    inputs = [x for x in inputs if kernels.choose(x, pair[0]) == "triton"]
    for x in inputs:
        kernels.gated_mlps(x, [(pair[0], pair[1])])
        if len(x) == 1:  # experts of a token are computed in one launch
            kernels.gated_mlps(x, [(pair[0], pair[1])] * 2)
    return len(inputs)


def _form(w: Any) -> tuple:
    return (w.bits, w.group_size, w.metadata_bits) if isinstance(w, QTensor) else (w.form.bits,)


def _rows(w: object, exact: bool) -> tuple[int, ...]:
    return (*ROWS, products.FP32_ROWS[w.bits] + 1) if exact and isinstance(w, QTensor) else ROWS


def _expert(form: tuple[int, int, int], dtype: torch.dtype, exact: bool) -> None:
    """Compute the products of one expert whose weights have this form."""
    up, down = (QTensor.empty((n, WIDTH), *form) for n in (2 * WIDTH, WIDTH))
    for rows in _rows(up, exact):
        x = torch.zeros(rows, WIDTH, dtype=dtype)
        if kernels.choose(x, up, exact) in kernels.FUSED:
            kernels.gated_mlps(x, [(up, down)], exact)
        else:
            kernels.linear(x, up, exact=exact)


def compile_solvers(scheme: Scheme, say: Callable[[str], object]) -> float:
    """Compile the loops of a conversion into `scheme`; returns the seconds."""
    forms = scheme.precisions()
    if not forms or solve.loops() is None:
        return 0.0
    with _announced(say) as started:
        for form in forms:
            w = torch.linspace(-1, 1, 4 * form.group_size).view(2, -1)
            solve.quantize(w, form.bits, form.group_size, scheme.solver, scheme.metadata_bits)
    return time.perf_counter() - started


@contextmanager
def _announced(say: Callable[[str], object]) -> Iterator[float]:
    """Say LINE once numba has been compiling, not just reading from disk, for PATIENCE_S; yields the start time."""
    from numba.core import event

    class Passes(event.Listener):
        first, said = None, False

        def on_start(self, _: event.Event) -> None:
            self.first = self.first or time.perf_counter()
            if not self.said and time.perf_counter() - self.first > PATIENCE_S:
                self.said = True
                say(LINE)

        def on_end(self, _: event.Event) -> None:
            pass

    with event.install_listener("numba:run_pass", Passes()):
        yield time.perf_counter()
