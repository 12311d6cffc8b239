"""Figures of contenders: medians and spreads of their runs, next to the roofline of the machine, and tables of them.

Measured and modelled figures are in separate columns.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import TYPE_CHECKING, Any

import numpy as np

from mixoff.units import format_nbytes

if TYPE_CHECKING:
    from mixoff.planning.plan import Plan


PEAKS = ("peak_bytes", "device_peak_bytes", "loaded_bytes")


@dataclass(frozen=True)
class Row:
    """One contender over all its runs.

    failure: reason why there are no figures; all other fields are then None.
    decode_*, prompt_*: tokens/s, as median, minimum and maximum over the runs.
    ms_p50, ms_p95, ms_p99: percentiles of the time per decoded token, over all runs.
    phases_ms: time per decoded token, by phase.
    bytes_touched_per_token: bytes of weights that a token reads.
    bytes_moved_per_token: bytes moved into the fast tier.
    bytes_read_per_token: bytes read from storage, by the kernel's count.
    touched_Bps: touched bytes per second.
    roofline_tokens_per_s: tokens/s that the read bandwidth allows (modelled).
    roofline_share: measured share of those.
    hit_rate, cached_rate: share of hits, with and without guessed experts.
    repeat_rate: share of experts that the previous token used too.
    peak_bytes, device_peak_bytes: peak of RAM, and of GPU memory (None without a GPU).
    predicted_tokens_per_s: tokens/s (modelled).
    planned_bytes: bytes of the interpreter, the plan's parts and the used budget (modelled).
    """

    name: str
    failure: str | None = None
    decode_tokens_per_s: float | None = None
    decode_min: float | None = None
    decode_max: float | None = None
    prompt_tokens_per_s: float | None = None
    prompt_min: float | None = None
    prompt_max: float | None = None
    ms_p50: float | None = None
    ms_p95: float | None = None
    ms_p99: float | None = None
    phases_ms: dict[str, float] | None = None
    bytes_touched_per_token: float | None = None
    bytes_moved_per_token: float | None = None
    bytes_read_per_token: float | None = None
    touched_Bps: float | None = None
    roofline_tokens_per_s: float | None = None
    roofline_share: float | None = None
    hit_rate: float | None = None
    cached_rate: float | None = None
    repeat_rate: float | None = None
    prefetch: str | None = None
    fast_bytes: int | None = None
    peak_bytes: int | None = None
    device_peak_bytes: int | None = None
    loaded_bytes: int | None = None
    load_s: float | None = None
    predicted_tokens_per_s: float | None = None
    planned_bytes: int | None = None


def row(name: str, reports: Sequence[dict], read_Bps: float, predicted: dict | None = None) -> Row:
    """The row of a contender, from the reports of its processes, each with one run or more."""
    if failures := [r["failure"] for r in reports if "failure" in r]:
        return Row(name, failures[0])
    runs = [times for r in reports for times in r["token_s"]]
    decode = [len(times) / sum(times) for times in runs]
    prompts = [r["prompt_tokens"] / s for r in reports for s in r["prompt_s"]]
    p50, p95, p99 = np.percentile(1000 * np.concatenate(runs), (50, 95, 99)).tolist()
    return Row(
        name=name,
        decode_tokens_per_s=statistics.median(decode),
        decode_min=min(decode),
        decode_max=max(decode),
        prompt_tokens_per_s=statistics.median(prompts),
        prompt_min=min(prompts),
        prompt_max=max(prompts),
        ms_p50=p50,
        ms_p95=p95,
        ms_p99=p99,
        **_bytes(reports, statistics.median(decode), read_Bps),
        **(predicted or {}),
    )


def _bytes(reports: Sequence[dict], tokens_per_s: float, read_Bps: float) -> dict:
    """Touched, moved and kept bytes, and rates, from all reports."""
    tokens = sum(len(times) for r in reports for times in r["token_s"])
    first, touched = reports[0], reports[0].get("touched_bytes")
    figures = {
        "bytes_touched_per_token": touched,
        "bytes_moved_per_token": _per_token(reports, "moved_bytes", tokens),
        "bytes_read_per_token": _per_token(reports, "read_bytes", tokens),
        "load_s": statistics.median(r["load_s"] for r in reports) if "load_s" in first else None,
        "fast_bytes": first.get("fast_bytes"),
        "prefetch": first.get("info", {}).get("prefetch"),
    }
    if touched:
        figures["touched_Bps"] = touched * tokens_per_s
        figures["roofline_tokens_per_s"] = read_Bps / touched
        figures["roofline_share"] = touched * tokens_per_s / read_Bps
    if "phases_s" in first:
        medians = {name: statistics.median(r["phases_s"][name] for r in reports) for name in first["phases_s"]}
        figures["phases_ms"] = {name: 1000 * s for name, s in medians.items()}
    for key in ("hit_rate", "cached_rate", "repeat_rate"):
        known = [r[key] for r in reports if r.get(key) is not None]
        figures[key] = statistics.mean(known) if known else None
    return figures | {key: max(r[key] for r in reports) for key in PEAKS if first.get(key)}


def _per_token(reports: Sequence[dict], key: str, tokens: int) -> float | None:
    """The sum over reports, each with a number, or one number per run; None if one is missing."""
    values: list[Any] = [r.get(key) for r in reports]
    if any(x is None or (isinstance(x, list) and None in x) for x in values):
        return None
    return sum(sum(x) if isinstance(x, list) else x for x in values) / tokens


@dataclass(frozen=True)
class Report:
    """Contenders in turns on one machine; the first is the requested one.

    read_bandwidth_Bps: best streaming read of memory.
    probes_Bps: streaming reads of memory, one before every run.
    disk_bandwidth_Bps: direct reads of the size and depth of a miss, None if nothing was read.
    memory_limit: bytes, or None.
    name: public name of the model.
    plan: plan of the model on the measured machine.
    counters, time_line: those of the last process of the first contender.

    The last four fields are for `record`, and are not printed.
    """

    rows: tuple[Row, ...]
    read_bandwidth_Bps: float
    probes_Bps: tuple[float, ...]
    disk_bandwidth_Bps: float | None
    memory_limit: int | None
    limit_kind: str | None
    settings: dict
    versions: dict[str, str]
    name: str | None = None
    plan: Plan | None = None
    counters: dict[str, int] = field(default_factory=dict)
    time_line: list[list] = field(default_factory=list)

    def to_dict(self) -> dict:
        """All figures: the first contender's at the top, every contender's under `contenders`."""
        left_out = ("rows", "name", "plan", "counters", "time_line")
        rest = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in left_out}
        return asdict(self.rows[0]) | rest | {"contenders": [asdict(row) for row in self.rows]}

    def __str__(self) -> str:
        lines = [self._head(), "", *_table(COLUMNS, self.rows)]
        if any(row.phases_ms for row in self.rows):
            lines += ["", "ms per decoded token, by phase (measured):", "", *_phases(self.rows)]
        return "\n".join([*lines, *(f"\n{row.name}: {row.failure}" for row in self.rows if row.failure)])

    def _head(self) -> str:
        s, limit = self.settings, "no memory limit"
        if self.memory_limit:
            limit = f"memory limit {format_nbytes(self.memory_limit)} ({self.limit_kind})"
        disk = f", disk {self.disk_bandwidth_Bps / 1e9:.2f} GB/s" if self.disk_bandwidth_Bps else ""
        probes = f"{min(self.probes_Bps) / 1e9:.1f} to {max(self.probes_Bps) / 1e9:.1f}"
        return (
            f"{s['model']}, {s['threads']} thread(s), {s['runs']} run(s) of {s['tokens']} tokens after "
            f"{s['prompt_tokens']} of prompt, {limit}; memory reads {probes} GB/s{disk} (measured)"
        )


def _number(value: float | None, digits: int = 2, scale: float = 1.0) -> str:
    return "-" if value is None else f"{value * scale:.{digits}f}"


def _spread(value: float | None, low: float | None, high: float | None) -> str:
    return "-" if value is None else f"{value:.2f}; {low:.2f} to {high:.2f}"


COLUMNS = {
    "contender": lambda r: r.name,
    "decode tokens/s (measured: median; min to max)": lambda r: _spread(
        r.decode_tokens_per_s, r.decode_min, r.decode_max
    ),
    "of the roofline": lambda r: _number(r.roofline_share, 0, 100) + ("" if r.roofline_share is None else " %"),
    "tokens/s (modelled)": lambda r: _number(r.predicted_tokens_per_s),
    "ms p50 / p95 / p99": lambda r: " / ".join(_number(x, 0) for x in (r.ms_p50, r.ms_p95, r.ms_p99)),
    "prompt tokens/s": lambda r: _spread(r.prompt_tokens_per_s, r.prompt_min, r.prompt_max),
    "GB per token touched / moved / read from disk": lambda r: " / ".join(
        _number(x, 2, 1e-9) for x in (r.bytes_touched_per_token, r.bytes_moved_per_token, r.bytes_read_per_token)
    ),
    "hit rate (cache alone)": lambda r: f"{_number(r.hit_rate, 3)} ({_number(r.cached_rate, 3)})",
    "repeat rate": lambda r: _number(r.repeat_rate, 3),
    "peak GiB": lambda r: _number(r.peak_bytes, 2, 2**-30),
    "GiB (modelled)": lambda r: _number(r.planned_bytes, 2, 2**-30),
}


def _table(columns: dict, rows: Sequence[Row]) -> list[str]:
    cells = [list(columns), ["---"] * len(columns), *([cell(row) for cell in columns.values()] for row in rows)]
    return [f"| {' | '.join(line)} |" for line in cells]


def _phases(rows: Sequence[Row]) -> list[str]:
    known = [row for row in rows if row.phases_ms]
    names = {name: None for row in reversed(known) for name in row.phases_ms or ()}
    phases = {name: lambda r, name=name: _number(r.phases_ms.get(name), 1) for name in names}
    return _table({"contender": lambda r: r.name, **phases}, known)
