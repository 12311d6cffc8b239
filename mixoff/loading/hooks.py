"""What is attached to a model while a runtime serves its experts, and how it is removed again."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import ExitStack
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from mixoff.errors import MixoffError
from mixoff.kernels.cpu import products
from mixoff.kernels.cpu.threads import borrow, give_back
from mixoff.loading import layers, overflow, refusals
from mixoff.loading.passes import wrap
from mixoff.loading.rescue import guard
from mixoff.runtime.graph import Graphs
from mixoff.runtime.runtime import Runtime
from mixoff.runtime.step import Step
from mixoff.shapes.config import expert_modules
from mixoff.shapes.routers import router_in

# what a router raises when its arguments differ from its neighbour's
UNASKABLE = (TypeError, ValueError, RuntimeError, AttributeError, LookupError, StopIteration, NotImplementedError)


class NextRouter:
    """Hooks on a model's routers that pass `expect(site, chosen)` the next site's likely choice (T, K).

    Works on any family with a `gate` or `router` next to the experts. The next router gets the arguments it was last
    called with. A router that cannot be asked ahead ends the guessing through `stop(why)`, never the generation.

    names: modules with experts, in order of sites. listening: tells whether a guess is wanted now.
    """

    def __init__(
        self,
        model: nn.Module,
        names: Iterable[str],
        expect: Callable[[int, torch.Tensor], None],
        listening: Callable[[], bool],
        stop: Callable[[str], None],
    ) -> None:
        self.routers: list[Any] = [router_in(model.get_submodule(name.rpartition(".")[0])) for name in names]
        self.expect, self.listening, self.stop = expect, listening, stop
        self.extra: dict[int, tuple[tuple, dict]] = {}
        self.asked: set[int] = set()  # routers that have answered

    def attach(self) -> ExitStack:
        """Hook every router; closing the result removes the hooks."""
        undo = ExitStack()
        if None in self.routers:
            self.stop("this model's routers are not where mixoff looks for them (gate or router next to the experts)")
            return undo
        for i, router in enumerate(self.routers):
            hook = router.register_forward_pre_hook(self._hook(i), with_kwargs=True)
            undo.callback(hook.remove)
        return undo

    def _hook(self, i: int) -> Callable:
        def before_router(_: nn.Module, args: tuple, kwargs: dict) -> None:
            extra = {name: value for name, value in kwargs.items() if name != "hidden_states"}
            self.ask(i, args[0] if args else kwargs["hidden_states"], args[1:], extra)

        return before_router

    def ask(self, i: int, x: torch.Tensor, args: tuple = (), kwargs: dict | None = None) -> None:
        """Have router i + 1 guess from what router i is called with: x (T, D), and other arguments."""
        self.extra[i] = args, kwargs or {}
        if i + 1 < len(self.routers) and self.listening():
            self._predict(i, x)

    @torch.no_grad()
    def _predict(self, i: int, x: torch.Tensor) -> None:
        router, (args, kwargs) = self.routers[i + 1], self.extra.get(i + 1) or self.extra[i]
        try:
            out = type(router).forward(router, x, *args, **kwargs)  # past its hooks
            chosen = next(t for t in out if isinstance(t, torch.Tensor) and not t.is_floating_point())  # (T, K)
        except UNASKABLE as error:
            if i + 1 in self.asked:  # it answered before, so this is an interrupt or a real fault
                raise
            self.stop(f"the router of site {i + 1} cannot be asked ahead ({type(error).__name__})")
            return
        self.asked.add(i + 1)
        self.expect(i + 1, chosen)


def lend(backbone: torch.nn.Module) -> Callable[[], None]:
    """`borrow` PyTorch's threads while `backbone` computes one token on a CPU; returns a function that ends it.

    For quantized backbones only: the number of threads may change PyTorch's last bits, and a 16-bit backbone must equal
    plain transformers bit for bit.
    """

    def around(forward: Callable[..., Any], args: tuple, kwargs: dict) -> Any:
        give_back()  # in case an interrupt hit the `finally` below
        ids = read_by(args, kwargs)
        if ids is None or ids.shape[1] != 1 or ids.device.type != "cpu":
            return forward(*args, **kwargs)
        try:
            borrow()
            return forward(*args, **kwargs)
        finally:
            give_back()

    return wrap(backbone, around)


def read_by(args: tuple, kwargs: dict) -> torch.Tensor | None:
    """The input of a pass with these arguments: ids (B, T), or embeddings (B, T, D)."""
    return next((x for x in (*args[:1], kwargs.get("input_ids"), kwargs.get("inputs_embeds")) if x is not None), None)


DECODE = ("compiled", "modules")


def checked(decode: str) -> str:
    """A way to compute single tokens. Raises MixoffError."""
    if decode not in DECODE:
        raise MixoffError(f"unknown decode {decode!r}: choose one of {', '.join(DECODE)}")
    return decode


def bind(model: PreTrainedModel, runtime: Runtime, loaded: bool = True, decode: str = "compiled") -> ExitStack:
    """Let `runtime` serve the experts of `model`; closing the result leaves no trace of it.

    loaded: True for a model from `load`, False for one from `offload`.
    decode: one of DECODE.
    """
    dtype = refusals.dtype_of(model.base_model)

    def note_pass(backbone: torch.nn.Module, args: tuple, kwargs: dict) -> None:
        ids = read_by(args, kwargs)
        if ids is not None:
            refusals.check(backbone, dtype, ids.device.type, loaded)
            runtime.ranks.agree(ids)
            _note_pass(runtime, ids, kwargs)

    with refusals.serve(model, runtime, loaded) as undo:
        undo.callback(model.base_model.register_forward_pre_hook(note_pass, with_kwargs=True).remove)
        on_cpu = runtime.device is None
        if on_cpu and any(isinstance(module, layers.QuantizedLinear) for module in model.modules()):
            undo.callback(lend(model.base_model))
        ask = None
        if runtime.guesses.active:
            names = list(expert_modules(model))
            routers = NextRouter(model, names, runtime.expect, runtime.wants_guesses, runtime.guesses.stop)
            undo.push(routers.attach())
            ask = routers.ask if None not in routers.routers else None
        quantized = runtime.source.scheme.experts is not None and not runtime.exact
        if decode == "compiled" and quantized and on_cpu and products.loops() is not None:
            undo.push(compile_step(model, runtime, ask))
        alone = runtime.ranks.count == 1
        if decode == "compiled" and quantized and not on_cpu and alone:
            undo.push(capture_tokens(model, runtime))
        if alone:  # ranks stay in step, and a pass that one of them repeats would not be
            undo.push(guard(model, runtime))
        if dtype == torch.float16:
            undo.callback(overflow.watch(model).remove)
        model.mixoff = runtime
        undo.callback(delattr, model, "mixoff")
        return undo.pop_all()


def compile_step(model: PreTrainedModel, runtime: Runtime, ask: Callable | None) -> ExitStack:
    """Let compiled programs compute single tokens (`runtime.step`); closing the result ends it."""
    undo, step = ExitStack(), Step(model, runtime, ask)

    def around(forward: Callable[..., Any], args: tuple, kwargs: dict) -> Any:
        with step.passing(read_by(args, kwargs), kwargs):
            return forward(*args, **kwargs)

    undo.callback(wrap(model.base_model, around))
    for layer in step.layers:
        undo.callback(wrap(layer.module, layer.forward))
    if step.compiles_head():
        undo.callback(wrap(model.get_output_embeddings(), step.head))
    runtime.step = step
    undo.callback(setattr, runtime, "step", None)
    return undo


def capture_tokens(model: PreTrainedModel, runtime: Runtime) -> ExitStack:
    """Let a card replay single tokens as graphs (`runtime.graph`) where it can; closing the result ends it."""
    undo, graphs = ExitStack(), Graphs(model, runtime)
    undo.callback(wrap(model, graphs.around))
    runtime.step = graphs
    undo.callback(setattr, runtime, "step", None)
    return undo


def _note_pass(runtime: Runtime, ids: torch.Tensor, kwargs: dict) -> None:
    """Tell the runtime about a pass; sequences packed in one row (continuous batching) give the longest length."""
    runtime.begin_pass(ids.shape[0] * ids.shape[1], kwargs.get("max_length_q") or ids.shape[1])
