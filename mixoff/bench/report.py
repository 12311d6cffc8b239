"""Figures of contenders: medians and spreads of their runs, beside the roofline of the machine; tables of them.

Measured and modelled figures stand in columns of their own. Does not know how anything is run.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import TYPE_CHECKING

import numpy as np

from mixoff.units import format_nbytes

if TYPE_CHECKING:
    from mixoff.planning.plan import Plan


PEAKS = ("peak_bytes", "device_peak_bytes", "loaded_bytes")


@dataclass(frozen=True)
class Row:
    """One contender over all its runs. failure: why there are no figures; then they are None.

    decode_*, prompt_*: tokens a second, median, least and most of the runs. ms_p50 to ms_p99: of a decoded token, over
    all runs. phases_ms: of a decoded token. bytes_touched_per_token: of weights. bytes_moved_per_token: into the fast
    tier; bytes_read_per_token: from storage, by the kernel's count. touched_Bps: touched bytes a second.
    roofline_share: of tokens a second that the read bandwidth would allow. predicted_tokens_per_s, planned_bytes:
    modelled; the latter is what the interpreter takes, the plan's parts, and the budget as far as it was taken.
    peak_bytes: of RAM; device_peak_bytes: of a GPU's memory, None without one.
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
    """The row of a contender from the reports of its processes, one or more, each of one run or more."""
    if failures := [r["failure"] for r in reports if "failure" in r]:
        return Row(name, failures[0])
    runs = [times for r in reports for times in r["token_s"]]
    decode = [len(times) / sum(times) for times in runs]
    prompts = [r["prompt_tokens"] / s for r in reports for s in r["prompt_s"]]
    p50, p95, p99 = np.percentile(1000 * np.concatenate(runs), (50, 95, 99)).tolist()
    figures = {"decode_tokens_per_s": statistics.median(decode), "decode_min": min(decode), "decode_max": max(decode)}
    figures |= {"prompt_tokens_per_s": statistics.median(prompts)}
    figures |= {"prompt_min": min(prompts), "prompt_max": max(prompts), "ms_p50": p50, "ms_p95": p95, "ms_p99": p99}
    return Row(name, **figures, **_bytes(reports, figures["decode_tokens_per_s"], read_Bps), **(predicted or {}))


def _bytes(reports: Sequence[dict], tokens_per_s: float, read_Bps: float) -> dict:
    """What was touched, moved and kept, from all reports."""
    tokens = sum(len(times) for r in reports for times in r["token_s"])
    first, touched = reports[0], reports[0].get("touched_bytes")
    per_token = {key: _per_token(reports, key, tokens) for key in ("moved_bytes", "read_bytes")}
    figures = {"bytes_touched_per_token": touched, "bytes_moved_per_token": per_token["moved_bytes"]}
    figures |= {"bytes_read_per_token": per_token["read_bytes"]}
    if touched:
        figures |= {"touched_Bps": touched * tokens_per_s, "roofline_tokens_per_s": read_Bps / touched}
        figures |= {"roofline_share": touched * tokens_per_s / read_Bps}
    if "phases_s" in first:
        medians = {name: statistics.median(r["phases_s"][name] for r in reports) for name in first["phases_s"]}
        figures["phases_ms"] = {name: 1000 * s for name, s in medians.items()}
    for key in ("hit_rate", "cached_rate", "repeat_rate"):
        known = [r[key] for r in reports if r.get(key) is not None]
        figures[key] = statistics.mean(known) if known else None
    figures |= {key: max(r[key] for r in reports) for key in PEAKS if first.get(key)}
    figures["load_s"] = statistics.median(r["load_s"] for r in reports)
    return figures | {"fast_bytes": first.get("fast_bytes"), "prefetch": first.get("info", {}).get("prefetch")}


def _per_token(reports: Sequence[dict], key: str, tokens: int) -> float | None:
    """Sum over reports, of which each has a number, or one a run, or nothing at all."""
    found = [r.get(key) for r in reports]
    if any(x is None or (isinstance(x, list) and None in x) for x in found):
        return None
    return sum(sum(x) if isinstance(x, list) else x for x in found) / tokens


@dataclass(frozen=True)
class Report:
    """Contenders in turns on one machine; the first is the one that was asked for. memory_limit: bytes, or None.

    read_bandwidth_Bps: the best streaming read of memory, probed before every run; probes_Bps: each of them.
    disk_bandwidth_Bps: direct reads of the size and depth that a miss takes, or None where nothing is read.
    name: of a model that everybody can have. plan: of it on the machine as it was measured. counters, time_line: of the
    first contender's last process. These are for `record`; what is printed leaves them out.
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
        apart = ("rows", "name", "plan", "counters", "time_line")
        rest = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in apart}
        return asdict(self.rows[0]) | rest | {"contenders": [asdict(row) for row in self.rows]}

    def __str__(self) -> str:
        lines = [self._head(), "", *_table(COLUMNS, self.rows)]
        if any(row.phases_ms for row in self.rows):
            lines += ["", "ms of a decoded token by phase (measured):", "", *_phases(self.rows)]
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
    "GB a token touched / moved / read from disk": lambda r: " / ".join(
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
    names = list(known[0].phases_ms)
    columns = {"contender": lambda r: r.name}
    columns |= {name: lambda r, name=name: _number(r.phases_ms[name], 1) for name in names}
    return _table(columns, known)
