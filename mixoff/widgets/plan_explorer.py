"""A plan with controls: bytes per tier, whether they fit, and the smallest change that makes them fit.

Every figure comes from `mixoff.plan` and `mixoff.shapes.sizes` in the kernel: the browser sends the values of the
controls and draws the answer.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

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
from mixoff.widgets import browser

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from mixoff.planning.hardware import Hardware
    from mixoff.planning.needs import Needs
    from mixoff.planning.plan import Plan
    from mixoff.shapes.shape import ModelShape

MODELS = (
    "mistralai/Mixtral-8x7B-Instruct-v0.1", "mistralai/Mixtral-8x22B-Instruct-v0.1", "microsoft/Phi-3.5-MoE-instruct",
    "Qwen/Qwen3-30B-A3B", "Qwen/Qwen3-235B-A22B", "openai/gpt-oss-20b", "openai/gpt-oss-120b",
    "deepseek-ai/DeepSeek-V2-Lite", "allenai/OLMoE-1B-7B-0924", "ibm-granite/granite-3.1-1b-a400m-instruct",
)  # fmt: skip
PLAIN = 16  # bits of weights that are not quantized
CONTEXTS = tuple(512 << i for i in range(9))  # 512 to 131,072 tokens
ATTENTION_GROUP = 64  # group size of attention and shared experts, as in every preset
MIXED = 2.33  # bits of the preset `mixed`, mean: gate and up in 2, down in 3
SCALES = {
    "experts": (BITS[0], MIXED, *BITS[1:], PLAIN),
    "attention": (*BITS, PLAIN),
    "group": GROUP_SIZES,
    "context": CONTEXTS,
}
SLOW = 1.0  # tokens/s
PARTS = {"backbone": "", "KV cache": "..", "workspace": "xx", "experts": "//", "kept free": "--"}  # with hatches
COLOURS = dict(zip(PARTS, plans.COLOURS.values(), strict=True))


@dataclass(frozen=True)
class Choice:
    """Values of the controls.

    model: name that `mixoff.plan` takes.
    experts, attention: bits per weight; MIXED for experts as in the preset `mixed`.
    group: group size of the experts.
    context: tokens in the KV cache, at most as many as the model was made for.
    slots: slots per layer; 0 for as many as fit.
    hardware: name of a machine.
    """

    model: str = MODELS[0]
    experts: float = MIXED
    attention: int = 4
    group: int = 64
    context: int = 4096
    slots: int = 0
    hardware: str = planner.DEFAULT

    @property
    def scheme(self) -> Scheme:
        """Bits and groups of each part. Raises MixoffError for unknown bits or group sizes."""
        attention, down = _precision(self.attention, ATTENTION_GROUP), None
        experts = _precision(BITS[0] if self.experts == MIXED else self.experts, self.group)
        if self.experts == MIXED:
            down = Precision(BITS[1], self.group, rotated=True)
        return Scheme(attention=attention, experts=experts, shared_experts=attention, down=down)

    def __str__(self) -> str:
        group = "" if self.experts == PLAIN else f" in groups of {self.group}"
        bits = f"experts {self.experts}-bit{group}, attention {self.attention}-bit"
        return f"{self.model.rpartition('/')[2]}, {bits}, context {self.context:,}, {self.hardware}"


def _precision(bits: float, group: int) -> Precision | None:
    return None if bits == PLAIN else Precision(bits, group)  # type: ignore[arg-type]  # Precision refuses fractions


@functools.lru_cache(maxsize=32)
def _shape(model: str, compute: str | None = None) -> ModelShape:
    """The shape of a model, in the dtype of a GPU; cached, because reading it takes seconds and a plan 10 ms."""
    return describe.shape_of(model) if compute is None else _shape(model).with_dtype(compute)


def context_limit(model: str) -> int | None:
    """Tokens that a model was made for at most; None if its configuration does not say."""
    return getattr(_shape(model).config.get_text_config(), "max_position_embeddings", None)


def within_limit(choice: Choice) -> Choice:
    """The choice with the longest context of the scale that its model was made for, if its own is longer."""
    limit = context_limit(choice.model)
    if limit is None or choice.context <= limit:
        return choice
    return replace(choice, context=max((context for context in CONTEXTS if context <= limit), default=limit))


def _needs(choice: Choice, machine: Hardware) -> Needs:
    shape = _shape(choice.model)
    if machine.device == "cuda":
        shape = _shape(choice.model, compute_dtype(machine, shape.dtype))
    return Needs.of(sizes.sizes_of(shape, choice.scheme), machine, choice.context, 1)


def lacking_nbytes(choice: Choice) -> int:
    """Bytes of fast memory, or of disk, by which a choice is too large; 0 or less if it fits."""
    machine = probe.named(choice.hardware)
    needs = _needs(choice, machine)
    fast = planner.needed_fast_nbytes(needs, machine, choice.slots or 1) - machine.fast_bytes
    return fast if machine.disk_bytes is None else max(fast, needs.sizes.stored - machine.disk_bytes)


# The smallest change --------------------------------------------------------------------------------------------------


def smallest_change(choice: Choice) -> Choice | None:
    """The choice that fits with one control moved as little as possible; None if no single control is enough.

    Fewer slots only cost speed, so they come first. Sliders follow, fewest steps first, then machines by size.
    `planner.ways_out` answers the same question in options of the command line, among presets instead of sliders.
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
    names = ("context", "group", "experts", "attention")
    smaller: dict[str, list] = {name: _smaller(name, getattr(choice, name)) for name in names}
    for step in range(max(map(len, smaller.values()))):
        yield from (replace(choice, **{name: values[step]}) for name, values in smaller.items() if step < len(values))
    larger = sorted(machines.NAMED.values(), key=lambda machine: machine.fast_bytes)
    yield from (replace(choice, hardware=machine.name) for machine in larger if machine.device == "cuda")


def _smaller(name: str, value: float) -> list:
    """Values of a control that take fewer bytes, nearest first; larger groups have less metadata."""
    if name == "group":
        return [size for size in GROUP_SIZES if size > value]
    return [size for size in reversed(SCALES[name]) if size < value]


def _describe(choice: Choice, moved: Choice | None) -> str:
    """The change in words."""
    if moved is None:
        return "no single control is enough: move several"
    before, after = asdict(choice), asdict(moved)
    name = next(name for name in before if before[name] != after[name])
    if name == "slots":
        return f"as many slots as fit, {explore(moved).slots} per layer instead of {choice.slots}"
    text = {
        "context": "a context of {:,} instead of {:,}",
        "group": "groups of {} instead of {}",
        "experts": "{} bits for experts instead of {}",
        "attention": "{} bits for attention instead of {}",
        "hardware": "{} instead of {}",
    }
    return text[name].format(after[name], before[name])


# The outcome of a choice ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Tier:
    """Contents of one memory. parts: bytes by name. limit: size in bytes, None if unknown."""

    name: str
    parts: dict[str, int]
    limit: int | None

    @property
    def nbytes(self) -> int:
        """Total bytes of all parts."""
        return sum(self.parts.values())

    def __str__(self) -> str:
        size = "" if self.limit is None else f" of {format_nbytes(self.limit)}"
        return f"{self.name} {format_nbytes(self.nbytes)}{size}"


@dataclass(frozen=True)
class Outcome:
    """A choice on its machine.

    slots: slots per layer, as chosen or as many as fit.
    change: smallest change that makes the choice fit, in words.
    """

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
        held = f"{self.slots} of {self.plan.experts_per_layer} experts of each layer in fast memory"
        if not self.fits:
            return f"does not fit: {format_nbytes(self.lacking_nbytes)} too much with {held}"
        if self.plan.resident:
            return "fits whole: every expert is in fast memory, so do not offload"
        if self.slow:
            return f"fits with {held}, but is slow: a token takes {1 / self.rates['expected']:.2g} s"
        return f"fits, with {held}"

    @property
    def slow(self) -> bool:
        """Whether it runs at less than one token per second."""
        return self.rates.get("expected", SLOW) < SLOW

    @property
    def rates(self) -> dict[str, float]:
        """Tokens/s, `low`, `expected` and `high`; empty if the model does not run."""
        return {name: rate for name, rate in self.plan.tokens_per_s.items() if self.fits and rate is not None}

    @property
    def speed(self) -> str:
        """The range of tokens/s, in words."""
        if not self.fits:
            return "no speed: it does not run"
        low, expected, high = (f"{rate:.1f}" if rate >= 1 else f"{rate:.2g}" for rate in self.rates.values())
        return f"{low} to {high} tokens/s, expected {expected} (modelled)"

    def __str__(self) -> str:
        tiers = ", ".join(map(str, self.tiers))
        then = f"smallest change: {self.change}" if self.change else self.speed
        return f"{self.choice}: {self.verdict}; {tiers}; {then}"

    def to_dict(self) -> dict:
        """The figures that the browser draws."""
        tiers = [
            {"text": str(t), "name": t.name, "limit": t.limit, "nbytes": t.nbytes, "parts": list(t.parts.items())}
            for t in self.tiers
        ]
        words = {name: getattr(self, name) for name in ("fits", "slots", "slow", "verdict", "speed", "change")}
        limit = context_limit(self.choice.model)
        contexts = sum(limit is None or context <= limit for context in CONTEXTS)
        figures = {"experts": self.plan.experts_per_layer, "store": self.plan.bytes["store"], "contexts": contexts}
        return words | figures | {"resident": self.plan.resident and self.fits, "tiers": tiers, "rates": self.rates}


def explore(choice: Choice) -> Outcome:
    """Plan a choice. Raises MixoffError for one that cannot be planned, or whose context is beyond the model."""
    limit = context_limit(choice.model)
    if limit is not None and choice.context > limit:
        made_for = f"longer than {choice.model} was made for: give {limit:,} tokens or fewer"
        raise MixoffError(f"a context of {choice.context:,} is {made_for}")
    machine = probe.named(choice.hardware)
    needs = _needs(choice, machine)
    choice = replace(choice, slots=min(choice.slots, max(site.num_experts for site in needs.sizes.sites)))
    lacking = lacking_nbytes(choice)
    nbytes = planner.needed_fast_nbytes(needs, machine, choice.slots) if choice.slots and lacking <= 0 else None
    plan = mixoff.plan(needs.sizes.shape, nbytes, context=choice.context, scheme=choice.scheme, hardware=machine)
    slots = choice.slots or max(plan.slots_per_layer, 1)
    experts = needs.experts_in_fast(slots) if lacking > 0 else plan.tiers["fast"] - needs.fixed
    tiers = _tiers(plan, machine, experts)
    change = _describe(choice, smallest_change(choice)) if lacking > 0 else ""
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

    `.choice` holds the values of the controls and `.outcome` their plan; `.summary()` is the plan in one line, and
    `.figure()` a still figure. Arguments are the fields of `Choice`. Raises MixoffError for a choice that cannot be
    planned.
    """

    _esm = browser.module("plan_explorer")
    _css = browser.style("plan_explorer")
    options = traitlets.Dict().tag(sync=True)
    choice = traitlets.Dict().tag(sync=True)  # fields of Choice, and `asked`, the number of the question
    answer = traitlets.Dict().tag(sync=True)  # the outcome, or an `error`, and the number of its question

    def __init__(self, model: str = MODELS[0], **controls: Any) -> None:
        self.outcome = explore(Choice(model, **controls))
        choice = self.outcome.choice
        options = SCALES | {"model": _with(MODELS, model), "hardware": _with(machines.NAMED, choice.hardware)}
        answer = self.outcome.to_dict() | {"asked": 0, "lowered": 0}
        super().__init__(options=options, choice=asdict(choice) | {"asked": 0}, answer=answer)
        self.observe(self._answer, "choice")

    def _answer(self, _: object) -> None:
        """Answer the browser, with a reason for a choice that cannot be planned."""
        asked, values = self.choice.get("asked", 0), {k: v for k, v in self.choice.items() if k != "asked"}
        try:
            self.outcome = explore(within_limit(Choice(**values)))
        except MixoffError as error:
            self.answer = {"error": str(error), "asked": asked}
        else:
            lowered = self.outcome.choice.context if self.outcome.choice.context < values["context"] else 0
            self.answer = self.outcome.to_dict() | {"asked": asked, "lowered": lowered}

    def summary(self) -> str:
        """The choice and its outcome, in one line."""
        return self.answer.get("error") or str(self.outcome)

    def figure(self) -> Figure:
        """The bars of the tiers as a still figure; dashed lines are the sizes of the machine's memories."""
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


def _with(names: Iterable[str], name: str) -> list[str]:
    return list(dict.fromkeys([*names, name]))


def _draw(ax: Axes, row: int, tier: Tier) -> None:
    start = 0.0
    for name, nbytes in tier.parts.items():
        look = {"color": COLOURS[name], "hatch": PARTS[name], "edgecolor": "white", "label": name}
        ax.barh(row, nbytes / units.GIB, left=start, height=0.6, **look)
        start += nbytes / units.GIB
    if tier.limit is not None:
        limit = tier.limit / units.GIB
        ax.plot([limit, limit], [row - 0.4, row + 0.4], "--", color=plots.INK)
        ax.annotate(f"has {limit:.1f}", (limit, row - 0.42), ha="center", va="bottom", fontsize=8)
    if start == 0:
        ax.annotate(" nothing", (0, row), va="center", fontsize=8, color=plots.LINE)
