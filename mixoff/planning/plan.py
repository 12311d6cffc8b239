"""A plan, and how it shows itself: text, JSON, and a table with a bar in notebooks."""

from __future__ import annotations

import html
import json
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING

from mixoff.planning import speed
from mixoff.units import format_nbytes

if TYPE_CHECKING:
    from mixoff.planning.hardware import Hardware


@dataclass(frozen=True)
class Plan:
    """Where a model's bytes go on a machine. Displays itself as text and, in notebooks, as a table with a bar.

    Attributes
    ----------
    source: name of the model
    scheme: name of the quantization scheme
    hardware: the machine
    context, batch: tokens and sequences that the KV cache is planned for
    parameters: parameters by part, and `total` and `active`
    bytes: bytes of `experts`, `backbone`, `kv_cache` and `workspace` in memory, and of the whole `store`
    tiers: bytes in `fast`, `ram` and `disk`; `disk` counts experts that are in neither of the others
    fast_bytes: fast memory left for experts, to pass to `load`
    fits: whether the model runs
    resident: whether all experts are in the fast tier
    slots_per_layer: slots of the layer with the fewest
    experts_per_layer: experts of the layer with the most
    hit_rate, hit_rate_source: share of requests that the fast tier holds, and the origin of the figure
    tokens_per_s: `low`, `expected` and `high` speed, modelled
    floors_ms: milliseconds per token that no implementation can beat, by lane
    advice: ways to make the model fit or run faster
    predictions: predictions of speed behind `tokens_per_s`
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
    predictions: dict[str, speed.Prediction] = field(default_factory=dict, repr=False)

    def to_dict(self) -> dict:
        """Plain figures, as `mixoff plan --json` prints them."""
        values = asdict(replace(self, predictions={}))
        del values["predictions"]
        return values | {"predictions": {name: p.to_dict() for name, p in self.predictions.items()}}

    def to_json(self) -> str:
        """`to_dict` as one line of JSON."""
        return json.dumps(self.to_dict())

    def brief(self) -> str:
        """Five lines: model, machine, verdict, speed, and advice: the first, or all if the model does not fit."""
        return "\n".join(f"{label:<{LABEL}}{text}" for label, text in _brief(self))

    def __str__(self) -> str:
        return "\n".join(_lines(self))

    def __repr__(self) -> str:
        verdict = "fits" if self.fits else "does not fit"
        if self.resident:
            verdict = "fits whole"
        return f"Plan({self.source}, {self.scheme}, {self.hardware.name}: {verdict}, {self.slots_per_layer} slots)"

    def _repr_html_(self) -> str:
        return _as_html(self)


# How a plan shows itself ----------------------------------------------------------------------------------------------

COLOURS = {  # Okabe and Ito's hues, legible on light and dark; the table next to the bar names each part too
    "backbone": "#0072B2", "kv_cache": "#3A93C8", "workspace": "#8F8600", "slots": "#009E73", "reserved": "#949494",
}  # fmt: skip
LABEL = 13  # columns of the label in front of each line
NAMES = {"kv_cache": "KV cache", "slots": "experts in slots", "reserved": "kept free"}


def _fast_parts(plan: Plan) -> dict[str, int]:
    """Bytes of the fast memory by part."""
    parts = {name: plan.bytes[name] for name in ("backbone", "kv_cache", "workspace")}
    return parts | {"slots": plan.tiers["fast"] - sum(parts.values()), "reserved": plan.hardware.reserved_nbytes}


def _speed(plan: Plan) -> str:
    low, expected, high = (plan.tokens_per_s[name] for name in ("low", "expected", "high"))
    return "-" if expected is None else f"{low:.1f} to {high:.1f}, expected {expected:.1f}"


def _rows(plan: Plan) -> list[tuple[str, str]]:
    """Label and text of each line of a plan."""
    p, b, size = plan.parameters, plan.bytes, format_nbytes
    verdict = "fits" if plan.fits else "does not fit"
    if plan.resident:
        verdict = "everything fits: do not offload"
    slots = f"{plan.slots_per_layer} of {plan.experts_per_layer} experts of each layer"
    rows = [
        ("model", f"{plan.source}: {p['total'] / 1e9:.2f} B parameters, {p['active'] / 1e9:.2f} B active a token"),
        ("scheme", f"{plan.scheme}: store {size(b['store'])}, all experts {size(b['experts'])}"),
        ("machine", str(plan.hardware)),
        ("fast memory", f"{size(plan.tiers['fast'])} of {size(plan.hardware.fast_bytes)}; " + _held_text(plan)),
        ("for experts", f"fast_bytes={plan.fast_bytes} ({size(plan.fast_bytes)}): {slots}"),
        ("RAM", f"{size(plan.tiers['ram'])} of experts" + _pinned_text(plan)),
        ("disk", f"{size(plan.tiers['disk'])} of experts that are in no other tier"),
        ("verdict", verdict),
        ("hit rate", f"{plan.hit_rate:.2f} ({plan.hit_rate_source})"),
        ("tokens/s", f"{_speed(plan)} (modelled)"),
    ]
    if plan.floors_ms:
        floors = ", ".join(f"{name} {ms:.1f}" for name, ms in plan.floors_ms.items())
        rows.append(("floors", f"{floors} ms a token (modelled: bytes over bandwidth alone)"))
    return rows


def _brief(plan: Plan) -> list[tuple[str, str]]:
    """Label and text of each line of a short plan."""
    p, slots = plan.parameters, f"{plan.slots_per_layer} of {plan.experts_per_layer} experts of each layer"
    stored = f"{format_nbytes(plan.bytes['store'])} {'in 16 bits' if plan.scheme == 'none' else f'as {plan.scheme}'}"
    verdict = f"{stored} fit, with {slots} in fast memory: fast_bytes={plan.fast_bytes}"
    if plan.resident:
        verdict = f"{stored} fit whole into fast memory"
    if not plan.fits:
        verdict = f"{stored} do not fit"
    advice = plan.advice[:1] if plan.fits else ["; or ".join(plan.advice)]
    return [
        ("model", f"{plan.source}: {p['total'] / 1e9:.2f} B parameters, {p['active'] / 1e9:.2f} B active per token"),
        ("machine", str(plan.hardware)),
        ("verdict", verdict),
        ("tokens/s", f"{_speed(plan)} (modelled), hit rate {plan.hit_rate:.2f}"),
        ("advice", advice[0] if advice else "none: --verbose shows every byte and the origin of each figure"),
    ]


def _pinned_text(plan: Plan) -> str:
    """RAM that `load` page-locks on a machine with a card."""
    if plan.hardware.device != "cuda" or plan.resident or not plan.fits:
        return ""
    return f"; about {format_nbytes(plan.tiers['ram'])} are page-locked for copies"


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
    return speed.EFFICIENCY[plan.hardware.device]["expected"].source


def _as_html(plan: Plan) -> str:
    """A table, and the fast memory as a bar; only the bar has its own colours."""
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
