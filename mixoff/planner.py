"""What runs where: bytes of a model on a machine, how many slots each layer gets, whether it fits, how fast it may be.

A plan needs a configuration, not weights. It takes bytes from `sizes`, slots from the runtime's own rule, and speed
from `timeline`; its numbers are modelled, and every input is shown. Does not know tensors or files.
"""

from __future__ import annotations

import html
import json
import math
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from mixoff import hardware as machines
from mixoff import timeline
from mixoff.errors import BudgetError, CheckpointError, MixoffError
from mixoff.shapes import sites, sizes
from mixoff.shapes.shape import ModelShape
from mixoff.store import describe
from mixoff.store.describe import as_stored
from mixoff.units import format_nbytes, parse_nbytes

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from mixoff.hardware import Hardware
    from mixoff.quantize.scheme import Scheme


DEFAULT = "t4"  # the machine that anybody can have for an hour
PROMPT_SHARE = 0.5  # of the context that arrives in one pass: the workspace is sized for it
WIDE = 10  # vectors of the model's width that a pass holds at once for every token: residual, norms, q, k, v, copies
LOGITS = 2  # copies of a row of logits, in fp32
ROUTERS = {(8, 2): "mixtral-8x7b", (128, 8): "qwen3-235b", (256, 8): "glm-5.2"}  # experts, top-k: a fitted router
LOCALITY = "modelled: LRU on the synthetic router {}, fitted to reported figures"
UNIFORM = "modelled: uniform routing, slots / experts; no figures of a model of this shape are at hand"


@dataclass(frozen=True)
class Plan:
    """How a model lies on a machine. Shows itself as text and, in notebooks, as a table with a bar.

    parameters: numbers by part, `total` and `active` among them. bytes: `experts` and `backbone` as they lie in memory,
    `kv_cache`, `workspace`, and `store`, all tensors of the store. tiers: bytes in `fast`, `ram`, `disk`; the disk tier
    is those experts that neither of the others holds. fast_bytes: what remains of the fast memory for experts, to be
    given to `load`. fits: whether the model runs. slots_per_layer: experts of a layer in the fast tier at least.
    resident: whether all of them are. tokens_per_s: `low`, `expected`, `high`, modelled. predictions: behind them.
    """

    source: str
    scheme: str
    hardware: Hardware
    context: int
    batch: int
    parameters: dict[str, int]
    bytes: dict[str, int]
    tiers: dict[str, int]
    fast_bytes: int
    fits: bool
    resident: bool
    slots_per_layer: int
    experts_per_layer: int
    hit_rate: float
    hit_rate_source: str
    tokens_per_s: dict[str, float | None]
    floors_ms: dict[str, float]
    advice: list[str]
    predictions: dict[str, timeline.Prediction] = field(default_factory=dict, repr=False)

    def to_dict(self) -> dict:
        """Plain figures, as `mixoff plan --json` prints them."""
        values = asdict(replace(self, predictions={}))
        del values["predictions"]
        return values | {"predictions": {name: p.to_dict() for name, p in self.predictions.items()}}

    def to_json(self) -> str:
        """One line of JSON."""
        return json.dumps(self.to_dict())

    def __str__(self) -> str:
        return "\n".join(_lines(self))

    def __repr__(self) -> str:
        verdict = "fits whole" if self.resident else "fits" if self.fits else "does not fit"
        return f"Plan({self.source}, {self.scheme}, {self.hardware.name}: {verdict}, {self.slots_per_layer} slots)"

    def _repr_html_(self) -> str:
        return _as_html(self)


def plan(
    source: ModelShape | PretrainedConfig | str | Path,
    fast_bytes: int | str | None = None,
    ram_bytes: int | str | None = None,
    disk_bytes: int | str | None = None,
    *,
    context: int = 4096,
    batch: int = 1,
    scheme: str | Scheme | None = None,
    hardware: str | Hardware | None = None,
    hit_rate: float | None = None,
) -> Plan:
    """How the model at `source` lies in memory, whether it fits, and how fast it may be.

    source: what `presets.shape_of` takes: a configuration, a folder, or a Hub id. fast_bytes, ram_bytes, disk_bytes:
    the whole fast memory, RAM, and disk, in place of the machine's. scheme: a preset's name or a Scheme; None is
    `mixed`, or what a store is in already. hardware: a name in `hardware.NAMED`, `here`, or a Hardware; None is a T4.
    hit_rate: in place of a modelled one. Raises MixoffError and CheckpointError for what cannot be planned.
    """
    if context < 1 or batch < 1:
        raise MixoffError(f"context is {context} and batch {batch}: plan for at least one token of one sequence")
    machine = _machine(hardware, fast_bytes, ram_bytes, disk_bytes)
    return _plan(_needs(source, scheme, machine, context, batch), machine, hit_rate)


def fast_nbytes(source: str | Path, machine: Hardware, context: int, scheme: Scheme | None = None) -> int:
    """Bytes for experts in the fast memory of `machine`: what `load` takes on a GPU where it is not told.

    Raises BudgetError, with the ways out, where not one slot a layer fits.
    """
    needs = _needs(source, scheme, machine, context, 1)
    if not any(needs.slots(_remaining(needs, machine))):
        raise BudgetError(f"{needs.sizes.shape.name} does not fit: " + "; or ".join(ways_out(needs, machine)))
    return _remaining(needs, machine)


def pinned_nbytes(experts: int, machine: Hardware) -> int:
    """Bytes of RAM that `load` page-locks for copies of `experts` bytes of experts."""
    return min(experts, max(machine.ram_bytes - machines.CPU_RESERVED, 0))


def _needs(source: object, scheme: str | Scheme | None, machine: Hardware, context: int, batch: int) -> Needs:
    shape = describe.shape_of(source)
    if not shape.parameters["experts"]:
        raise CheckpointError(shape.refusal)
    shape, scheme = as_stored(shape, source, scheme)
    return Needs.of(sizes.sizes_of(shape, scheme), machine, context, batch)


def _machine(hardware: str | Hardware | None, *given: int | str | None) -> Hardware:
    machine = machines.named(hardware or DEFAULT) if not isinstance(hardware, machines.Hardware) else hardware
    for key, size in zip(("fast_bytes", "ram_bytes", "disk_bytes"), given, strict=True):
        if size is not None:
            machine = replace(
                machine, **{key: parse_nbytes(size)}, sources=machine.sources | {key: "given by the user"}
            )
    return machine


# Bytes ----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Needs:
    """What a model asks of memory on a kind of device. page_cache: bytes of RAM for files, none beside a card."""

    sizes: sizes.Sizes
    context: int
    batch: int
    compute: str
    backbone: int
    kv_cache: int
    workspace: int
    page_cache: int

    @classmethod
    def of(cls, of: sizes.Sizes, machine: Hardware, context: int, batch: int) -> Needs:
        """The needs of a model, in the dtype that the machine computes in."""
        compute = timeline.compute_dtype(machine, of.shape.dtype)
        kv_cache = of.shape.with_dtype(compute).kv_nbytes(context, batch)
        rows = batch * math.ceil(context * PROMPT_SHARE)
        fixed = of.backbone(compute), kv_cache, workspace_nbytes(of, compute, rows)
        return cls(of, context, batch, compute, *fixed, machine.fast_bytes if machine.device == "cpu" else 0)

    @property
    def fixed(self) -> int:
        """Everything that is not an expert."""
        return self.backbone + self.kv_cache + self.workspace

    @property
    def scratch(self) -> int:
        """Bytes beside the slots that count against `fast_bytes`, as the runtime says."""
        from mixoff.kernels import reference

        return reference.scratch_nbytes(self.sizes.sites, sites.torch_dtype(self.compute))

    def experts_in_fast(self, slots: int) -> int:
        """Bytes of `slots` slots a layer and scratch."""
        each = [min(slots, site.num_experts) for site in self.sizes.sites]
        return sum(each) * self.sizes.slot_nbytes + self.scratch

    def slots(self, fast_bytes: int) -> list[int]:
        """Slots of each layer within `fast_bytes`, none where one each is too much."""
        from mixoff.arena import plan_slots

        left = max(fast_bytes - self.spare(fast_bytes) * self.sizes.slot_nbytes, 0)
        try:
            return plan_slots(self.sizes.sites, left, self.scratch, "layer")
        except BudgetError:
            return [0] * len(self.sizes.sites)

    def spare(self, fast_bytes: int) -> int:
        """Slots that the runtime sets aside for prefetching, which it does where misses come past the page cache."""
        from mixoff.prefetch import set_aside
        from mixoff.store.readers import goes_direct

        of = self.sizes
        slots, experts = max(fast_bytes - self.scratch, 0) // of.slot_nbytes, sum(s.num_experts for s in of.sites)
        nbytes = sum(site.num_experts * site.expert_nbytes for site in of.sites)
        direct = goes_direct("auto", nbytes + min(max(fast_bytes, 0), nbytes), self.page_cache, False)
        wanted = max(of.shape.top_k)
        return set_aside("auto", slots, len(of.sites), experts, wanted, direct, of.slot_nbytes)[0]


def workspace_nbytes(of: sizes.Sizes, compute: str, rows: int) -> int:
    """Bytes of activations while a prompt of `rows` tokens passes, an upper bound: all tokens may want one expert.

    WIDE vectors of the model's width a token, the outputs of its K experts twice, one expert's inner activations (gate,
    up and their product), and the last token's logits.
    """
    text, item = of.shape.config.get_text_config(), sites.dtype_nbytes(compute)
    inner = [max(part.shape) for site in of.shape.sites for part in site.parts if part.name.startswith("down_proj")]
    dense = getattr(text, "intermediate_size", 0)
    widest = max([*inner, dense if isinstance(dense, int) else 0])
    width = (WIDE + 2 * max(of.shape.top_k, default=1)) * text.hidden_size + 3 * widest
    return rows * width * item + LOGITS * text.vocab_size * 4


def _plan(needs: Needs, machine: Hardware, hit_rate: float | None) -> Plan:
    of, shape = needs.sizes, needs.sizes.shape
    remaining = machine.fast_bytes - machine.reserved_nbytes - needs.fixed
    slots = needs.slots(remaining) if shape.sites else []
    least = min(slots, default=0)
    served = sum(slots) == sum(site.num_experts for site in shape.sites) > 0
    resident = served or (not shape.sites and of.experts <= remaining)
    tiers = _tiers(needs, machine, slots, resident)
    fits = (resident or least > 0) and (machine.disk_bytes is None or of.stored <= machine.disk_bytes)
    rate, rate_source = _hit_rate(shape, slots, resident, hit_rate)
    speeds = _speeds(needs, machine, rate, hit_rate, slots, tiers) if fits and shape.sites else {}
    parts = shape.parameters
    return Plan(
        source=shape.name,
        scheme=of.name,
        hardware=machine,
        context=needs.context,
        batch=needs.batch,
        parameters={"total": shape.total, "active": shape.active} | parts,
        bytes={
            "experts": of.experts,
            "backbone": needs.backbone,
            "kv_cache": needs.kv_cache,
            "workspace": needs.workspace,
            "store": of.stored,
        },
        tiers=tiers,
        fast_bytes=max(remaining, 0),
        fits=fits,
        resident=resident,
        slots_per_layer=least,
        experts_per_layer=max((site.num_experts for site in shape.sites), default=0),
        hit_rate=rate,
        hit_rate_source=rate_source,
        tokens_per_s={n: speeds[n].tokens_per_s if n in speeds else None for n in ("low", "expected", "high")},
        floors_ms={n: 1000 * s for n, s in speeds["expected"].floors.items()} if speeds else {},
        advice=_advice(needs, machine, tiers, resident, fits),
        predictions=speeds,
    )


def _tiers(needs: Needs, machine: Hardware, slots: list[int], resident: bool) -> dict[str, int]:
    """Bytes in each tier: RAM holds a copy of all experts if they fit, else those that the fast tier lacks.

    The interpreter's share of RAM is kept free where the fast tier is a card's memory.
    """
    of = needs.sizes
    spare = needs.spare(_remaining(needs, machine)) if any(slots) else 0
    arena = (sum(slots) + spare) * of.slot_nbytes + needs.scratch if any(slots) else of.experts if resident else 0
    beyond = 0 if resident else of.experts - _held(needs, slots)
    room = max(machine.ram_bytes - machines.CPU_RESERVED, 0) if machine.device == "cuda" else machine.ram_bytes
    ram = 0 if resident else of.experts if of.experts <= room else min(beyond, room)
    return {"fast": needs.fixed + arena, "ram": ram, "disk": max(beyond - ram, 0)}


def _held(needs: Needs, slots: list[int]) -> int:
    """Bytes of experts, as stored, that so many slots of each layer hold."""
    from mixoff.shapes.sites import stride

    return sum(n * stride(site) for n, site in zip(slots, needs.sizes.sites, strict=True))


# Speed ----------------------------------------------------------------------------------------------------------------


def _hit_rate(shape: ModelShape, slots: list[int], resident: bool, given: float | None) -> tuple[float, str]:
    """Share of decoding's requests that the fast tier holds, the mean over layers, and where the figure comes from."""
    if given is not None:
        return given, "given by the user"
    if resident or not any(slots):
        return float(resident), "every expert is in the fast tier" if resident else "nothing fits"
    site, top_k = shape.sites[0], max(shape.top_k)
    name = ROUTERS.get((site.num_experts, top_k))
    if name is None:
        return sum(slots) / sum(site.num_experts for site in shape.sites), UNIFORM
    from mixoff.trace import routers

    router = routers.preset(name)
    return sum(router.hit_rate(n) for n in slots) / len(slots), LOCALITY.format(name)


def _speeds(
    needs: Needs, machine: Hardware, rate: float, given: float | None, slots: list[int], tiers: dict[str, int]
) -> dict[str, timeline.Prediction]:
    """The band: `low` has uniform routing and no fetch behind computing; `high` the better kernels."""
    experts = sum(site.num_experts for site in needs.sizes.sites)
    uniform = sum(slots) / experts if given is None else given
    share = _ram_share(needs, slots, tiers) if machine.device == "cuda" else 0.0
    return {
        name: timeline.predict(
            needs.sizes.shape,
            needs.sizes.scheme or sizes.PUBLISHED,
            machine,
            uniform if name == "low" else rate,
            efficiency=timeline.EFFICIENCY[machine.device][name],
            ram_share=share,
            background=False if name == "low" else None,
        )
        for name in ("low", "expected", "high")
    }


def _ram_share(needs: Needs, slots: list[int], tiers: dict[str, int]) -> float:
    """Share of the experts outside the fast tier that RAM holds."""
    beyond = needs.sizes.experts - _held(needs, slots)
    return 1.0 if beyond <= 0 else 1 - tiers["disk"] / beyond


# Advice ---------------------------------------------------------------------------------------------------------------


def _advice(needs: Needs, machine: Hardware, tiers: dict[str, int], resident: bool, fits: bool) -> list[str]:
    of, advice = needs.sizes, []
    if of.shape.refusal:
        advice.append(f"mixoff cannot offload this model: {of.shape.refusal}")
    if resident:
        advice.append(
            f"do not offload: everything fits into the fast memory of {machine.name}, and resident experts are faster "
            "than any cache; `load` keeps them all, and llama.cpp is a good choice as well"
        )
    elif not fits:
        advice += ways_out(needs, machine)
    elif name := _smaller_scheme(needs, machine, whole=True):
        advice.append(f"use --scheme {name}: everything then fits into the fast memory, and nothing is offloaded")
    if fits and not resident and tiers["disk"] and machine.device == "cuda":
        advice.append(
            f"{format_nbytes(tiers['disk'])} of experts stay on disk: with {format_nbytes(tiers['disk'])} more of RAM, "
            "or fewer bits, none would"
        )
    if fits and not resident and min(needs.slots(_remaining(needs, machine))) < max(of.shape.top_k):
        advice.append(
            f"a layer has fewer slots than a token wants experts ({max(of.shape.top_k)}): each token moves some of "
            "them twice; fewer bits or a shorter context make room"
        )
    return advice


def _remaining(needs: Needs, machine: Hardware) -> int:
    return machine.fast_bytes - machine.reserved_nbytes - needs.fixed


def ways_out(needs: Needs, machine: Hardware) -> list[str]:
    """Changes that make a model fit which does not, each enough by itself, the smallest first."""
    of, found = needs.sizes, []
    if machine.disk_bytes is not None and of.stored > machine.disk_bytes:
        lacking = of.stored - machine.disk_bytes
        found.append(f"free {format_nbytes(lacking)} of disk: the store takes {format_nbytes(of.stored)}")
    if not of.shape.sites:
        return found or [f"use a machine with {format_nbytes(needs.fixed + of.experts)} of fast memory"]
    lacking = needs.fixed + needs.experts_in_fast(1) - (machine.fast_bytes - machine.reserved_nbytes)
    if lacking <= 0:
        return found
    shorter = _shorter_context(needs, machine)
    if shorter:
        found.append(f"use --context {shorter}: KV cache and workspace shrink with it")
    if scheme := _smaller_scheme(needs, machine):
        found.append(f"use --scheme {scheme}: a slot of each layer then fits")
    need = machine.fast_bytes + lacking
    return [*found, f"raise --fast to {format_nbytes(need)} ({need:,} bytes): one slot for each MoE layer then fits"]


def _shorter_context(needs: Needs, machine: Hardware) -> int | None:
    """The longest context, by halving, with which one slot a layer fits."""
    context = needs.context // 2
    while context >= 128:
        shorter = Needs.of(needs.sizes, machine, context, needs.batch)
        if any(shorter.slots(_remaining(shorter, machine))):
            return context
        context //= 2
    return None


def _smaller_scheme(needs: Needs, machine: Hardware, whole: bool = False) -> str | None:
    """The scheme with most bits, of those with fewer than now, with which one slot a layer fits, or all experts do."""
    if needs.sizes.scheme is None or not needs.sizes.shape.sites:
        return None
    for name in ("quality", "paper", "mixed", "small"):
        try:
            of = sizes.sizes_of(needs.sizes.shape, name)
            smaller = replace(needs, sizes=of, backbone=of.backbone(needs.compute))
            slots = smaller.slots(_remaining(smaller, machine))
        except MixoffError:  # a group that divides no width of this model
            continue
        enough = all(n >= (site.num_experts if whole else 1) for n, site in zip(slots, of.sites, strict=True))
        if enough and of.experts < needs.sizes.experts:
            return name
    return None


# How a plan shows itself ----------------------------------------------------------------------------------------------

COLOURS = {  # Okabe and Ito's, legible on light and dark; each part is also named in the table beside its bar
    "backbone": "#0072B2", "kv_cache": "#56B4E9", "workspace": "#F0E442", "slots": "#009E73", "reserved": "#999999",
}  # fmt: skip
NAMES = {"kv_cache": "KV cache", "slots": "experts in slots", "reserved": "kept free"}


def _fast_parts(plan: Plan) -> dict[str, int]:
    """What the fast memory holds, in bytes."""
    parts = {name: plan.bytes[name] for name in ("backbone", "kv_cache", "workspace")}
    return parts | {"slots": plan.tiers["fast"] - sum(parts.values()), "reserved": plan.hardware.reserved_nbytes}


def _speed(plan: Plan) -> str:
    low, expected, high = (plan.tokens_per_s[name] for name in ("low", "expected", "high"))
    return "-" if expected is None else f"{low:.1f} to {high:.1f}, expected {expected:.1f}"


def _rows(plan: Plan) -> list[tuple[str, str]]:
    """Label and text of each line of a plan."""
    p, b, size = plan.parameters, plan.bytes, format_nbytes
    slots = f"{plan.slots_per_layer} of {plan.experts_per_layer} experts of each layer"
    rows = [
        ("model", f"{plan.source}: {p['total'] / 1e9:.2f} B parameters, {p['active'] / 1e9:.2f} B active a token"),
        ("scheme", f"{plan.scheme}: store {size(b['store'])}, all experts {size(b['experts'])}"),
        ("machine", str(plan.hardware)),
        ("fast memory", f"{size(plan.tiers['fast'])} of {size(plan.hardware.fast_bytes)}; " + _held_text(plan)),
        ("for experts", f"fast_bytes={plan.fast_bytes} ({size(plan.fast_bytes)}): {slots}"),
        ("RAM", f"{size(plan.tiers['ram'])} of experts" + _pinned_text(plan)),
        ("disk", f"{size(plan.tiers['disk'])} of experts that are in no other tier"),
        ("verdict", "everything fits: do not offload" if plan.resident else "fits" if plan.fits else "does not fit"),
        ("hit rate", f"{plan.hit_rate:.2f} ({plan.hit_rate_source})"),
        ("tokens/s", f"{_speed(plan)} (modelled)"),
    ]
    if plan.floors_ms:
        floors = ", ".join(f"{name} {ms:.1f}" for name, ms in plan.floors_ms.items())
        rows.append(("floors", f"{floors} ms a token (modelled: bytes over bandwidth alone)"))
    return rows


def _pinned_text(plan: Plan) -> str:
    """What `load` page-locks on a machine with a card, the doubles of resident experts included."""
    if plan.hardware.device != "cuda" or plan.resident or not plan.fits:
        return ""
    return f"; copies of up to {format_nbytes(pinned_nbytes(plan.bytes['experts'], plan.hardware))} are page-locked"


def _held_text(plan: Plan) -> str:
    return ", ".join(f"{NAMES.get(name, name)} {format_nbytes(n)}" for name, n in _fast_parts(plan).items())


def _lines(plan: Plan) -> list[str]:
    lines = [f"{label:<12} {text}" for label, text in _rows(plan)]
    if "expected" in plan.predictions:
        lines.append(f"{'':<12} {plan.predictions['expected']}")
    lines += [f"{'advice':<12} {line}" for line in plan.advice]
    sources = [f"{'':<12} {key}: {text}" for key, text in plan.hardware.sources.items()]
    return [*lines, "inputs", *sources, f"{'':<12} kernels: {_kernels(plan)}"]


def _kernels(plan: Plan) -> str:
    return timeline.EFFICIENCY[plan.hardware.device]["expected"].source


def _as_html(plan: Plan) -> str:
    """A table, and the fast memory as a bar; colours are the reader's own theme's but for the bar's."""
    cells = [*_rows(plan), *(("advice", line) for line in plan.advice)]
    rows = "".join(
        f'<tr><th scope="row" style="text-align:left">{html.escape(label)}</th>'
        f'<td style="text-align:left">{html.escape(text)}</td></tr>'
        for label, text in cells
    )
    return f'<div class="mixoff-plan">{_bar(plan)}<table>{rows}</table></div>'


def _bar(plan: Plan) -> str:
    parts = _fast_parts(plan)
    whole = max(plan.hardware.fast_bytes, sum(parts.values()))
    label = html.escape(f"Fast memory, {format_nbytes(plan.hardware.fast_bytes)}: {_held_text(plan)}")
    pieces = "".join(
        f'<span title="{NAMES.get(name, name)}: {format_nbytes(n)}" style="display:inline-block;height:1.4em;'
        f'width:{100 * n / whole:.2f}%;background:{COLOURS[name]}"></span>'
        for name, n in parts.items()
    )
    return (
        f'<div role="img" aria-label="{label}" style="max-width:46em;border:1px solid currentColor;'
        f'line-height:0;white-space:nowrap;overflow:hidden">{pieces}</div>'
    )
