"""Whether programs compute a decoder layer as transformers' modules do: found out by doing both, with a real token.

Both get the same plain matrices in fp32 in place of packed codes, so that nothing but the order of sums differs: int8
activations would flip here and there, and bf16 would hide a difference of a hundredth. Layers whose modules have the
same types and settings are of one kind, and the first of a kind stands for all.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import nn

from mixoff.kernels.cpu import threads
from mixoff.kernels.cpu.program import Matrix, Memory
from mixoff.quantize.tensor import QTensor
from mixoff.runtime.decoder import Experts, Half, Parts, Unlike, computable, router_of
from mixoff.runtime.growing import Growing
from mixoff.shapes.kv_cache import CACHE_NAMES

CLOSE = 1e-3  # most of a relative error between both ways; the order of sums gives 1e-6
NEAR = 0.05  # most of a relative difference between the router's weights
SETTING = (bool, int, float, str, type(None))
NEW, OLD = CACHE_NAMES


@dataclass(eq=False)
class Kind:
    """What was found out about layers of one kind.

    - reason: why modules compute them, or empty.
    - checked: tokens in the cache at the last comparison.
    - turned: numbers per head that positions turn.
    - divide: whether the router's weights are divided by their sum; None if the second half is not compiled.
    - chosen: experts per token.
    """

    reason: str = ""
    checked: int = 0
    turned: int = 0
    divide: bool | None = None
    chosen: int = 0


def kind_of(parts: Parts) -> tuple:
    """What makes layers one kind: types and settings of their modules, and sizes of attention."""
    modules = [parts.layer, parts.attention, parts.first, parts.block, *parts.block.children()]
    found: list[object] = [parts.heads, parts.groups, parts.size, parts.factor, parts.width]
    for module in modules:
        settings = [item for item in vars(module).items() if isinstance(item[1], SETTING) and item[0] != "layer_idx"]
        found += [type(module), *sorted(settings, key=lambda item: item[0])]
    return tuple(found)


def form_of(experts: nn.Module) -> dict[str, Any]:
    """The weights of whatever expert of these is in the first slot, for their form."""
    runtime, site = experts._mixoff
    return runtime.arena.weights(0, site)


def experts_of(kind: Kind, block: nn.Module) -> Experts | None:
    """The second half of a layer of this kind, if it is compiled."""
    if kind.divide is None or not computable(block.experts, form_of(block.experts)):
        return None
    return Experts(block.experts, *router_of(block), kind.divide, kind.chosen)


class LayerCall(NamedTuple):
    """A call of a layer for one token: its input x (1, 1, D), its part of the cache, and all arguments."""

    x: torch.Tensor
    cache_layer: Any
    args: tuple
    kwargs: dict[str, Any]


def compare(kind: Kind, parts: Parts, call: LayerCall) -> None:
    """Compute a token both ways, without experts, and note in `kind` what was found out."""
    tables = tuple(table.float() for table in call.kwargs["position_embeddings"])
    mine, x = copy.copy(call.cache_layer), call.x.float()
    mine.keys, mine.values = mine.keys.float(), mine.values.float()
    plain = replace(parts, **{name: _plain(getattr(parts, name)) for name in "qkvo"})
    seen = _by_modules(plain, LayerCall(x, copy.copy(mine), call.args, call.kwargs | {"position_embeddings": tables}))
    R, inner = tables[0].shape[-1], parts.factor * seen.inner.flatten()
    for turned in [kind.turned] if kind.turned else [R, 2 * R]:  # tables name each angle twice, or once
        if turned > parts.size:
            continue
        half, room = Half(plain, Memory(), turned, narrow=False), Growing(copy.copy(mine))
        cos, sin = (table.flatten() for table in tables)
        half.aim(x, cos, sin, room)
        half.program.run(threads.count())
        stream, normed = half.results()
        if _close(stream - x.flatten(), (seen.out - x).flatten() - inner) and _close(normed, seen.x.flatten()):
            kind.turned = turned
            kind.divide, kind.chosen = _router(normed, seen, parts.block)
            return
    kind.reason = f"{type(parts.layer).__name__} has attention of another kind"


class Seen:
    """What a layer's modules computed: the block's input and output, the router's choice, and the layer's output."""

    chosen: torch.Tensor | None = None
    weights: torch.Tensor
    given: torch.Tensor
    x: torch.Tensor
    inner: torch.Tensor
    out: torch.Tensor

    def experts(self, hidden_states: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """Stands for the experts: notes the choice, and returns numbers of about the right size."""
        self.chosen, self.weights, self.given = chosen, weights, hidden_states.flip(-1)
        return self.given

    def block(self, original: Callable, x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """Stands for the block around the experts."""
        out = original(x, *args, **kwargs)
        self.x, self.inner = x, out[0] if isinstance(out, tuple) else out
        return out


def _by_modules(parts: Parts, call: LayerCall) -> Seen:
    """This token through a copy of the layer in fp32, whose experts only note what they are asked for."""
    seen = Seen()
    memo = {id(getattr(parts.attention, f"{name}_proj")): _linear(parts, name) for name in "qkvo"}  # not copied
    for module in parts.layer.modules():
        shared = (getattr(module, "quantized", None), getattr(module, "config", None))
        memo |= {id(thing): thing for thing in shared if thing is not None}
        if "_mixoff" in vars(module):
            memo[id(module)] = stub = copy.copy(module)
            stub.forward = seen.experts
    twin = copy.deepcopy(parts.layer, memo).float()
    for module in twin.modules():
        module._forward_hooks.clear()
        module._forward_pre_hooks.clear()
    vars(twin).pop("forward", None)
    children = zip(twin.children(), parts.layer.children(), strict=True)
    inside = next(own for own, child in children if child is parts.block)
    inside.forward = functools.partial(seen.block, inside.forward)
    name = OLD if call.kwargs.get(NEW) is None else NEW
    cache = copy.copy(call.kwargs[name])
    cache.layers = list(cache.layers)
    cache.layers[parts.attention.layer_idx] = call.cache_layer
    rest = {key: value for key, value in call.kwargs.items() if key not in (name, "hidden_states")}
    out = twin(call.x, *call.args[1:], **rest, **{name: cache})
    seen.out = out[0] if isinstance(out, tuple) else out
    return seen


def _plain(matrix: Matrix) -> torch.Tensor:
    """A matrix in fp32; of a rotated one whatever its codes say, since both ways get the same."""
    return (matrix.dequantize() if isinstance(matrix, QTensor) else matrix).float().contiguous()


def _linear(parts: Parts, name: str) -> nn.Linear:
    """A projection with its matrix in fp32, and the bias that it has."""
    weight, bias = getattr(parts, name), parts.attention.get_submodule(f"{name}_proj").bias
    linear = torch.nn.utils.skip_init(nn.Linear, weight.shape[1], weight.shape[0], bias=bias is not None)
    linear.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        linear.bias = nn.Parameter(bias.detach().clone(), requires_grad=False)
    return linear


def _router(normed: torch.Tensor, seen: Seen, block: nn.Module) -> tuple[bool | None, int]:
    """Whether weights are divided, and how many there are, if the block is a softmax router and its experts alone."""
    no = None, 0
    if seen.chosen is None or len(seen.chosen) != 1 or not torch.equal(seen.inner.flatten(), seen.given.flatten()):
        return no
    try:
        router, bias = router_of(block)
    except Unlike:
        return no
    if not computable(block.experts, form_of(block.experts)):
        return no
    p = torch.softmax(torch.nn.functional.linear(normed, router.float(), None if bias is None else bias.float()), -1)
    theirs, weights = p[seen.chosen[0]], seen.weights[0].float()
    if not theirs.min() >= (1 - NEAR) * p.topk(len(theirs)).values[-1]:
        return no
    for divide in (True, False):
        mine = theirs / theirs.sum() if divide else theirs
        if (mine - weights).abs().max() <= NEAR * weights.max():
            return divide, len(theirs)
    return no


def _close(mine: torch.Tensor, theirs: torch.Tensor) -> bool:
    return float((mine - theirs).norm()) <= CLOSE * float(theirs.norm())
