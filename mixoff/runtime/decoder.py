"""A decoder layer as a program for one token: its parts, found by structure, and the stages that compute them.

Letters: **D** model width, **H** heads of queries, **G** heads of keys and values, **C** numbers per head,
**E** experts, **K** experts per token, **F** expert width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from mixoff.kernels.cpu import products, program
from mixoff.kernels.cpu.program import Matrix, Memory, Program, bits
from mixoff.quantize.tensor import QTensor
from mixoff.runtime.experts import is_silu_gated

if TYPE_CHECKING:
    from mixoff.runtime.growing import Growing

SHARED = products.SHARED_ABOVE + 1  # a size from which threads share a stage


class Unlike(Exception):
    """A layer is not built like the common decoder; its text says in what."""


@dataclass
class Parts:
    """The parts of a decoder layer.

    - layer, attention, block: the layer, its attention, and its second half: experts and their router, or a network.
    - first, second: the norms before both halves.
    - q, k, v, o: matrices of the projections.
    - heads, groups, size: H, G, C.
    - factor: what each half's result is multiplied with before it is added.
    """

    layer: nn.Module
    attention: Any
    block: nn.Module
    first: nn.Module
    second: nn.Module
    q: Matrix
    k: Matrix
    v: Matrix
    o: Matrix
    heads: int
    groups: int
    size: int
    factor: float

    @property
    def width(self) -> int:
        """D."""
        return self.o.shape[0]


@dataclass(eq=False)
class Experts:
    """The second half: a router, and experts that a runtime serves. divide: weights are divided by their sum."""

    module: nn.Module
    router: torch.Tensor
    bias: torch.Tensor | None
    divide: bool
    chosen: int


def parts_of(layer: nn.Module) -> Parts:
    """The parts of a layer. Raises Unlike."""
    try:
        attention: Any = layer.self_attn
        first, second = layer.input_layernorm, layer.post_attention_layernorm
        q, k, v, o = (_matrix(attention.get_submodule(f"{name}_proj")) for name in "qkvo")
        size, _ = int(attention.head_dim), float(attention.scaling)
    except AttributeError as error:
        raise Unlike(f"no {str(error).rpartition(' ')[2]}") from error
    heads, groups = q.shape[0] // size, k.shape[0] // size
    if (heads * size, groups * size) != (o.shape[1], v.shape[0]) or heads % groups or size % 16:
        raise Unlike("projections of unequal widths")
    factor = float(getattr(layer, "residual_multiplier", 1.0))
    return Parts(layer, attention, block_of(layer), first, second, q, k, v, o, heads, groups, size, factor)


def block_of(layer: nn.Module) -> nn.Module:
    """A layer's second half: the child that contains its experts, or its dense network. Raises Unlike."""
    for child in layer.children():
        if any("_mixoff" in vars(module) for module in child.modules()):
            return child
    if isinstance(block := getattr(layer, "mlp", None), nn.Module):
        return block
    raise Unlike("no experts and no network")


def _matrix(linear: nn.Module) -> Matrix:
    """The weight of a linear layer, quantized or not. Raises Unlike."""
    weight = getattr(linear, "quantized", None)
    weight = getattr(linear, "weight", None) if weight is None else weight
    weight = weight.detach() if isinstance(weight, torch.Tensor) else weight
    if not program.readable(weight):
        raise Unlike(f"{type(linear).__name__} of another kind")
    return weight


def router_of(block: nn.Module) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Weight (E, D) and bias (E,) of the router next to the experts. Raises Unlike."""
    router = getattr(block, "gate", None) or getattr(block, "router", None)
    weight = getattr(router, "weight", None)
    if weight is None or not program.readable(weight.detach()):
        raise Unlike("a router of another kind")
    bias = getattr(router, "bias", None)
    return weight.detach(), bias.detach() if isinstance(bias, torch.Tensor) else None


def computable(experts: nn.Module, weights: dict[str, Any]) -> bool:
    """Whether stages can compute these experts: `silu(gate) * up`, in packed codes."""
    if not is_silu_gated(experts) or getattr(experts, "has_post_expert_norm", False):
        return False
    parts = [weights.get(name) for name in ("gate_up_proj", "down_proj")]
    return len(weights) == 2 and all(isinstance(part, QTensor) and program.readable(part) for part in parts)


class Half:
    """The first half of a layer as a program: `stream` gets the token after attention, `normed` what experts get."""

    def __init__(self, parts: Parts, memory: Memory, turned: int, narrow: bool) -> None:
        D, H, G, C = parts.width, parts.heads, parts.groups, parts.size
        self.program = p = Program(memory)
        self.stream, self.normed = memory.floats("stream", D), memory.floats("normed", D)
        x, q, k, v, mixed, o = (
            memory.floats(name, size)
            for name, size in (("x", D), ("q", H * C), ("k", G * C), ("v", G * C), ("mixed", H * C), ("o", D))
        )
        stages, attention = program.stages(), parts.attention
        norm = stages.Norm(0, narrow, self.stream, 0, 0, 0, p.floats(parts.first.weight), bits(_eps(parts.first)), D, x)
        self.source = p.record(norm)
        p.step(stages.norm.address, self.source)
        p.product(x, [(parts.q, q), (parts.k, k), (parts.v, v)], "x")
        q_norm, k_norm = (getattr(attention, f"{name}_norm", None) for name in "qk")
        whole = q_norm is not None and q_norm.weight.numel() > C
        self.attention = p.record(stages.Attention(
            q, k, v, *(p.floats(getattr(attention, f"{name}_proj").bias) for name in "qkv"),
            p.floats(q_norm.weight if q_norm else None), p.floats(k_norm.weight if k_norm else None),
            whole, bits(_eps(q_norm) if q_norm else 0.0), 0, 0, turned,
            0, 0, narrow, 0, 0, H, G, C, bits(float(attention.scaling)), p.floats(getattr(attention, "sinks", None)),
            mixed,
        ))  # fmt: skip
        p.step(stages.attend.address, self.attention, G, SHARED, stages.append.address)
        p.product(mixed, [(parts.o, o)], "mixed")
        bias, factor = p.floats(attention.o_proj.bias), bits(parts.factor)
        weight, eps = p.floats(parts.second.weight), bits(_eps(parts.second))
        p.step(
            stages.norm.address,
            p.record(stages.Norm(0, 0, self.stream, o, bias, factor, weight, eps, D, self.normed)),
        )
        self.end = len(p)

        self.width = D
        self.aimed = places(stages.Attention, "cos sin keys values room before")

    def results(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Copies of the stream after attention, and of its norm, (D,) each."""
        return tuple(self.program.memory.tensor(name, self.width).clone() for name in ("stream", "normed"))

    def aim(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, room: Growing) -> None:
        """Set what the next run reads: the stream x (1, 1, D), tables of positions, and the cache."""
        self.source[0] = x.data_ptr()
        for place, value in zip(self.aimed, (cos.data_ptr(), sin.data_ptr(), *room.places()), strict=True):
            self.attention[place] = value


def places(record: Any, names: str) -> list[int]:
    """Places of fields in a record of `stages`."""
    return [record._fields.index(name) for name in names.split()]


def _eps(norm: nn.Module) -> float:
    return float(next(getattr(norm, name) for name in ("variance_epsilon", "eps") if hasattr(norm, name)))


class Whole(Half):
    """A layer as a program that stops twice: after the router's choice, and when the experts are computed."""

    def __init__(
        self,
        parts: Parts,
        memory: Memory,
        turned: int,
        narrow: bool,
        experts: Experts,
        weights: dict[str, QTensor],
    ) -> None:
        super().__init__(parts, memory, turned, narrow)
        p, stages = self.program, program.stages()
        (E, D), K, gate_up, down = experts.router.shape, experts.chosen, weights["gate_up_proj"], weights["down_proj"]
        F = down.shape[1]
        self.chosen, self.weights = torch.zeros(K, dtype=torch.int64), torch.zeros(K)
        self.outs = torch.zeros(K, D)
        logits = memory.floats("logits", E)
        p.rows(self.normed, experts.router, logits, p.floats(experts.bias))
        p.step(stages.choose.address, p.record(
            stages.Choice(logits, E, K, experts.divide, self.chosen.data_ptr(), self.weights.data_ptr())
        ))  # fmt: skip
        activations = p.prepare(self.normed, gate_up, "normed")
        self.end = len(p)
        halves, rooms = memory.floats("halves", 2 * F * K), [p.room(f"inner {i}", down) for i in range(K)]
        between = [halves + 8 * F * i for i in range(K)]
        ups = [products.job_of(gate_up, activations, out=at) for at in between]
        downs = [products.job_of(down, room, at, gate=True) for at, room in zip(between, rooms, strict=True)]
        self.several: list[tuple[int, int, int]] = []  # stages of all experts: place, blocks and size of one expert
        jobs = []
        for functions, of_each, count, size in (
            (program.linear(gate_up), ups, program.blocks(gate_up), 2 * F * D),
            (program.prepare(down), downs, 1, SHARED),
            (program.linear(down), downs, program.blocks(down), F * D),
        ):
            self.several.append((len(p), count, size))
            jobs.append(p.several([functions] * K, of_each, [count] * K, size * K))
        self.ups, _, self.downs = jobs
        self.image, self.out = (program.loops().JOB.index(name) for name in ("image", "out"))
        self.number = K  # of experts for which the stages are set
        self.computed = len(p)
        self.sum = p.record(
            stages.Sum(self.stream, self.outs.data_ptr(), self.weights.data_ptr(), bits(parts.factor), K, D, 0, narrow)
        )
        p.step(stages.weighted.address, self.sum)
        (self.target,) = places(stages.Sum, "out")

    def experts(self, rows: list[tuple[int, dict[str, QTensor]]], number: int, last: bool) -> None:
        """Compute experts, given as (place in the router's order, weights), on so many threads.

        last: whether these are all that is missing, so that the sum can follow
        """
        fields, first, row = program.fields(), self.outs.data_ptr(), 4 * self.outs.shape[1]
        for i, (place, weights) in enumerate(rows):
            self.ups[fields * i + self.image] = weights["gate_up_proj"].image.data_ptr()
            self.downs[fields * i + self.image] = weights["down_proj"].image.data_ptr()
            self.downs[fields * i + self.out] = first + row * place
        if self.number != len(rows):
            self.number = len(rows)
            for stage, count, size in self.several:
                self.program.share(stage, count * self.number, size * self.number)
        self.program.run(number, self.end, None if last else self.computed)

    def write_to(self, out: torch.Tensor) -> None:
        """Set where the sum goes: the stream for the next layer (1, 1, D)."""
        self.sum[self.target] = out.data_ptr()

    def finish(self, number: int) -> None:
        """Compute the sum by itself."""
        self.program.run(number, self.computed)
