"""What a model takes on a machine, control by control: bytes by tier, whether they fit, what would make them fit.

Every figure comes from `mixoff.plan` and `mixoff.shapes.sizes`, in the kernel: the browser sends what the controls
say, and draws what comes back. Letters: **S** slots of a layer, **E** experts of a layer. Does not know weights or
tensors.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import anywidget
import matplotlib.pyplot as plt
import traitlets

import mixoff
from mixoff import units
from mixoff.classroom import plots
from mixoff.errors import MixoffError
from mixoff.planning import hardware as machines
from mixoff.planning import plan as plans
from mixoff.planning import planner, probe
from mixoff.planning.needs import Needs
from mixoff.planning.speed import compute_dtype
from mixoff.quantize.layout import BITS, GROUP_SIZES
from mixoff.quantize.scheme import Precision, Scheme
from mixoff.shapes import sizes
from mixoff.store import describe
from mixoff.units import format_nbytes

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from mixoff.planning.hardware import Hardware
    from mixoff.planning.needs import Needs
    from mixoff.planning.plan import Plan
    from mixoff.shapes.shape import ModelShape

HERE = Path(__file__).parent
MODELS = (
    "mistralai/Mixtral-8x7B-Instruct-v0.1", "mistralai/Mixtral-8x22B-Instruct-v0.1", "microsoft/Phi-3.5-MoE-instruct",
    "Qwen/Qwen3-30B-A3B", "Qwen/Qwen3-235B-A22B", "openai/gpt-oss-20b", "openai/gpt-oss-120b",
    "deepseek-ai/DeepSeek-V2-Lite", "allenai/OLMoE-1B-7B-0924", "ibm-granite/granite-3.1-1b-a400m-instruct",
)  # fmt: skip
PLAIN = 16  # bits of what is not quantized
CONTEXTS = tuple(512 << i for i in range(9))  # 512 to 131,072 tokens
ATTENTION_GROUP = 64  # of attention and shared experts, as in every preset
SCALES = {"experts": (*BITS, PLAIN), "attention": (*BITS, PLAIN), "group": GROUP_SIZES, "context": CONTEXTS}
PARTS = {"backbone": "", "KV cache": "..", "workspace": "xx", "experts": "//", "kept free": "--"}  # and their hatches
COLOURS = dict(zip(PARTS, plans.COLOURS.values(), strict=True))


@dataclass(frozen=True)
class Choice:
    """What the controls say. experts, attention: bits. group: of the experts. slots: of a layer; 0 is all that fit."""

    model: str = MODELS[0]
    experts: int = 2
    attention: int = 4
    group: int = 32
    context: int = 4096
    slots: int = 0
    hardware: str = planner.DEFAULT

    @property
    def scheme(self) -> Scheme:
        """Bits and groups of each part. Raises MixoffError for a number of bits, or a group, that there is not."""
        experts, attention = _precision(self.experts, self.group), _precision(self.attention, ATTENTION_GROUP)
        return Scheme(attention=attention, experts=experts, shared_experts=attention)

    def __str__(self) -> str:
        group = "" if self.experts == PLAIN else f" in groups of {self.group}"
        bits = f"experts {self.experts}-bit{group}, attention {self.attention}-bit"
        return f"{self.model.rpartition('/')[2]}, {bits}, context {self.context:,}, {self.hardware}"


def _precision(bits: int, group: int) -> Precision | None:
    return None if bits == PLAIN else Precision(bits, group)


@functools.lru_cache(maxsize=32)
def _shape(model: str, compute: str | None = None) -> ModelShape:
    """The shape of a model, in the dtype that a card computes in: reading it takes seconds, and a plan ten ms."""
    return describe.shape_of(model) if compute is None else _shape(model).with_dtype(compute)


def _needs(choice: Choice, machine: Hardware) -> Needs:
    shape = _shape(choice.model)
    if machine.device == "cuda":
        shape = _shape(choice.model, compute_dtype(machine, shape.dtype))
    return Needs.of(sizes.sizes_of(shape, choice.scheme), machine, choice.context, 1)


def _fast_bytes(needs: Needs, machine: Hardware, slots: int) -> int:
    """The fast memory that gives each layer so many slots, beside the spare ones that prefetching takes."""
    slots = min(slots, max(site.num_experts for site in needs.sizes.sites))
    experts = needs.experts_in_fast(slots)
    nbytes = needs.fixed + experts + machine.reserved_nbytes
    if slots == 1:
        return nbytes
    smaller = replace(needs, page_cache=min(needs.page_cache, nbytes))
    return nbytes + smaller.spare(experts) * needs.sizes.slot_nbytes


def lacking_nbytes(choice: Choice) -> int:
    """Bytes of fast memory, or of disk, by which a choice is too large; 0 or less where it fits."""
    machine = probe.named(choice.hardware)
    needs = _needs(choice, machine)
    fast = _fast_bytes(needs, machine, choice.slots or 1) - machine.fast_bytes
    return fast if machine.disk_bytes is None else max(fast, needs.sizes.stored - machine.disk_bytes)


# The smallest change --------------------------------------------------------------------------------------------------


def smallest_change(choice: Choice) -> Choice | None:
    """The choice that fits with one control moved as little as possible; None where no single control is enough.

    Slots cost speed alone, so they come first; then sliders, fewest steps first; then the smallest machine that does.
    """
    return next((moved for moved in _moves(choice) if _fits(moved)), None)


def _fits(choice: Choice) -> bool:
    try:
        return lacking_nbytes(choice) <= 0
    except MixoffError:  # a group that divides no width of this model
        return False


def _moves(choice: Choice) -> Iterator[Choice]:
    if choice.slots:
        yield replace(choice, slots=0)
    smaller = {name: _smaller(name, getattr(choice, name)) for name in ("context", "group", "experts", "attention")}
    for step in range(max(map(len, smaller.values()))):
        yield from (replace(choice, **{name: values[step]}) for name, values in smaller.items() if step < len(values))
    larger = sorted(machines.NAMED.values(), key=lambda machine: machine.fast_bytes)
    yield from (replace(choice, hardware=machine.name) for machine in larger if machine.device == "cuda")


def _smaller(name: str, value: int) -> list[int]:
    """Values of a control that take fewer bytes, the nearest first: larger groups have less metadata."""
    if name == "group":
        return [size for size in GROUP_SIZES if size > value]
    return [size for size in reversed(SCALES[name]) if size < value]


def _said(choice: Choice, moved: Choice | None) -> str:
    """The change in words."""
    if moved is None:
        return "no single control is enough: move several"
    before, after = asdict(choice), asdict(moved)
    name = next(name for name in before if before[name] != after[name])
    if name == "slots":
        return f"as many slots as fit, {explore(moved).slots} a layer instead of {choice.slots}"
    unit = {"context": "a context of {:,}", "group": "groups of {}", "experts": "{} bits for experts"}
    unit |= {"attention": "{} bits for attention", "hardware": "{}"}
    was = f"{before[name]:,}" if name == "context" else before[name]
    return f"{unit[name].format(after[name])} instead of {was}"


# What a choice amounts to ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Tier:
    """What one memory would hold. parts: bytes by what they are. limit: bytes that it has, None where not known."""

    name: str
    parts: dict[str, int]
    limit: int | None

    @property
    def nbytes(self) -> int:
        return sum(self.parts.values())

    def __str__(self) -> str:
        size = "" if self.limit is None else f" of {format_nbytes(self.limit)}"
        return f"{self.name} {format_nbytes(self.nbytes)}{size}"


@dataclass(frozen=True)
class Outcome:
    """A choice on its machine. slots: of a layer, as asked for or as many as fit. change: what would make it fit."""

    choice: Choice
    plan: Plan
    slots: int
    tiers: tuple[Tier, ...]
    fits: bool
    lacking_nbytes: int
    change: str

    @property
    def verdict(self) -> str:
        """Whether it fits, in one sentence."""
        held = f"{self.slots} of {self.plan.experts_per_layer} experts of each layer"
        if not self.fits:
            return f"does not fit: {format_nbytes(self.lacking_nbytes)} too much with {held} in fast memory"
        if self.plan.resident:
            return "fits whole: every expert is in fast memory, so do not offload"
        return f"fits, with {held} in fast memory"

    @property
    def rates(self) -> dict[str, float]:
        """Tokens/s, `low`, `expected` and `high`; empty where the model does not run."""
        return self.plan.tokens_per_s if self.fits else {}

    @property
    def speed(self) -> str:
        """The band of tokens/s, in words."""
        if not self.fits:
            return "no speed: it does not run"
        low, expected, high = (f"{rate:.1f}" if rate >= 1 else f"{rate:.2g}" for rate in self.rates.values())
        return f"{low} to {high} tokens/s, expected {expected} (modelled)"

    def __str__(self) -> str:
        tiers = ", ".join(map(str, self.tiers))
        then = f"smallest change: {self.change}" if self.change else self.speed
        return f"{self.choice}: {self.verdict}; {tiers}; {then}"

    def to_dict(self) -> dict:
        """What the browser draws."""
        tiers = [
            {"text": str(t), "name": t.name, "limit": t.limit, "nbytes": t.nbytes, "parts": list(t.parts.items())}
            for t in self.tiers
        ]
        words = {name: getattr(self, name) for name in ("fits", "slots", "verdict", "speed", "change")}
        figures = {"experts": self.plan.experts_per_layer, "store": self.plan.bytes["store"]}
        return words | figures | {"resident": self.plan.resident and self.fits, "tiers": tiers, "rates": self.rates}


def explore(choice: Choice) -> Outcome:
    """What `choice` amounts to. Raises MixoffError for one that cannot be planned."""
    machine = probe.named(choice.hardware)
    needs = _needs(choice, machine)
    choice = replace(choice, slots=min(choice.slots, max(site.num_experts for site in needs.sizes.sites)))
    lacking = lacking_nbytes(choice)
    nbytes = _fast_bytes(needs, machine, choice.slots) if choice.slots and lacking <= 0 else None
    plan = mixoff.plan(needs.sizes.shape, nbytes, context=choice.context, scheme=choice.scheme, hardware=machine)
    slots = choice.slots or max(plan.slots_per_layer, 1)
    experts = needs.experts_in_fast(slots) if lacking > 0 else plan.tiers["fast"] - needs.fixed
    tiers = _tiers(plan, machine, experts)
    change = _said(choice, smallest_change(choice)) if lacking > 0 else ""
    return Outcome(choice, plan, slots, tiers, lacking <= 0, max(lacking, 0), change)


def _tiers(plan: Plan, machine: Hardware, experts: int) -> tuple[Tier, ...]:
    """VRAM, RAM and disk; on a CPU, whose RAM is the fast tier, RAM and disk."""
    fixed = (plan.bytes["backbone"], plan.bytes["kv_cache"], plan.bytes["workspace"], experts, machine.reserved_nbytes)
    card = machine.device == "cuda"
    fast = Tier("VRAM" if card else "RAM", dict(zip(PARTS, fixed, strict=True)), machine.fast_bytes)
    ram = (Tier("RAM", {"experts": plan.tiers["ram"]}, machine.ram_bytes),) if card else ()
    return (fast, *ram, Tier("disk", {"experts": plan.tiers["disk"]}, machine.disk_bytes))


# The widget -----------------------------------------------------------------------------------------------------------


class PlanExplorer(anywidget.AnyWidget):
    """Choose a model, bits, groups, context, slots and a machine, and see where the bytes go and whether they fit.

    `choice` is what the controls say; `.outcome` is what it amounts to, `.summary()` the same as one line of text and
    `.figure()` as a still. Arguments are those of `Choice`; a model may be anything that `mixoff.plan` takes by name.
    Raises MixoffError for a choice that cannot be planned.
    """

    _esm = (HERE / "theme.js").read_text("utf-8") + (HERE / "plan_explorer.js").read_text("utf-8")
    _css = HERE / "plan_explorer.css"
    options = traitlets.Dict().tag(sync=True)
    choice = traitlets.Dict().tag(sync=True)  # fields of Choice, and `asked`, a count of what was asked
    answer = traitlets.Dict().tag(sync=True)  # the outcome, or an `error`; `asked` says to which question

    def __init__(self, model: str = MODELS[0], **controls: int | str) -> None:
        self.outcome = explore(Choice(model, **controls))
        choice = self.outcome.choice
        options = SCALES | {"model": _with(MODELS, model), "hardware": _with(machines.NAMED, choice.hardware)}
        answer = self.outcome.to_dict() | {"asked": 0}
        super().__init__(options=options, choice=asdict(choice) | {"asked": 0}, answer=answer)
        self.observe(self._answer, "choice")

    def _answer(self, _: object) -> None:
        """Work out what the browser asks for; a choice that cannot be planned is answered by the reason."""
        asked, values = self.choice.get("asked", 0), {k: v for k, v in self.choice.items() if k != "asked"}
        try:
            self.outcome = explore(Choice(**values))
        except MixoffError as error:
            self.answer = {"error": str(error), "asked": asked}
        else:
            self.answer = self.outcome.to_dict() | {"asked": asked}

    def summary(self) -> str:
        """The choice and what it amounts to, in one line."""
        return self.answer.get("error") or str(self.outcome)

    def figure(self) -> Figure:
        """The bars of the tiers as a still figure; dashed lines are what the machine has."""
        tiers = self.outcome.tiers
        fig, ax = plt.subplots(figsize=(7.5, 0.75 * len(tiers) + 1.0))
        for row, tier in enumerate(tiers):
            _draw(ax, row, tier)
        names = [f"{tier.name}\n{format_nbytes(tier.nbytes)}" for tier in tiers]
        ax.set(yticks=range(len(tiers)), yticklabels=names, ylim=(len(tiers) - 0.4, -0.7), xlabel="GiB")
        ax.spines["left"].set_visible(False)
        ax.margins(x=0.02)
        handles, labels = ax.get_legend_handles_labels()
        unique = dict(zip(labels, handles, strict=True))
        fig.legend(unique.values(), unique, loc="outside lower center", ncols=len(unique), frameon=False)
        return fig

    def __repr__(self) -> str:
        return f"PlanExplorer({self.outcome.choice})"


def _with(names: object, own: str) -> list[str]:
    return list(dict.fromkeys([*names, own]))


def _draw(ax: Axes, row: int, tier: Tier) -> None:
    start = 0.0
    for name, nbytes in tier.parts.items():
        look = {"color": COLOURS[name], "hatch": PARTS[name], "edgecolor": "white", "label": name}
        ax.barh(row, nbytes / units.GIB, left=start, height=0.6, **look)
        start += nbytes / units.GIB
    if tier.limit is not None:
        limit = tier.limit / units.GIB
        ax.plot([limit, limit], [row - 0.4, row + 0.4], "k--")
        ax.annotate(f"has {limit:.1f}", (limit, row - 0.42), ha="center", va="bottom", fontsize=8)
    if start == 0:
        ax.annotate(" nothing", (0, row), va="center", fontsize=8, color=plots.LINE)
