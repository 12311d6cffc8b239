"""One JSON file to compare a machine with its prediction; nothing in it names a person or a place.

Measured and modelled figures are in separate parts. The file holds versions, the machine with its bandwidths, the plan,
the figures of each run, the counters of the cache, and the events of the last tokens. It holds no name of a user or
machine, no path and no text. A model is named if it is bundled, on the Hub, or made for the run.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, astuple, fields
from pathlib import Path
from typing import TYPE_CHECKING

from mixoff import models
from mixoff.cache.events import Event
from mixoff.checkpoints import names
from mixoff.errors import MixoffError

if TYPE_CHECKING:
    from mixoff.bench.report import Report
    from mixoff.planning.plan import Plan

FORMAT = "mixoff-record/1"
UNNAMED = "a local folder"
COLUMNS = tuple(field.name for field in fields(Event))
MODELLED = ("predicted_tokens_per_s", "planned_bytes", "roofline_tokens_per_s", "roofline_share")
PLACES = {"disk_bytes": "measured: free space where files are kept"}  # sources that would show a path


def make(
    plan: Plan,
    runs: Mapping[str, Mapping],
    counters: Mapping[str, object],
    events: Iterable[Event] | list[list],
    settings: Mapping[str, object] | None = None,
    model: str | None = None,
) -> dict:
    """The record of runs of one model. Examines this machine, which takes ten seconds the first time.

    plan: plan of the model.
    runs: figures of each run, by name; those in MODELLED are kept apart.
    counters: counters of the cache.
    events: events of a few decoded tokens, or lists of their fields.
    settings: settings of the runs.
    model: name of the model; None for the plan's, if it is public.
    """
    from mixoff.bench import doctor

    checkup = doctor.examine()
    modelled = {name: {key: run[key] for key in MODELLED if key in run} for name, run in runs.items()}
    planned = plan.to_dict()
    hardware = {"planned": _without_paths(planned.pop("hardware")), "measured": _without_paths(asdict(checkup.machine))}
    machine = {key: getattr(checkup, key) for key in ("processor", "threads", "memory_nbytes", "gpu")}
    return {
        "format": FORMAT,
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "model": model or public_name(planned.pop("source")),
        "versions": checkup.versions,
        "machine": machine | hardware,
        "settings": dict(settings or {}),
        "modelled": {"plan": {k: v for k, v in planned.items() if k != "source"}, "runs": modelled},
        "measured": {name: _figures(run) for name, run in runs.items()},
        "counters": {k: v for k, v in counters.items() if isinstance(v, (int, float))},
        "time_line": {"columns": COLUMNS, "rows": [list(e) if isinstance(e, list) else astuple(e) for e in events]},
    }


def of_report(report: Report) -> dict:
    """The record of what `mixoff bench` measured."""
    settings = {key: value for key, value in report.settings.items() if key != "model"}
    assert report.plan is not None
    record = make(
        plan=report.plan,
        runs={row.name: asdict(row) for row in report.rows},
        counters=report.counters,
        events=report.time_line,
        settings=settings | {"memory_limit": report.memory_limit, "limit_kind": report.limit_kind},
        model=report.name,
    )
    record["measured"]["memory_reads_Bps"] = report.probes_Bps
    record["measured"]["disk_reads_Bps"] = report.disk_bandwidth_Bps
    return record


def write(record: dict, path: str | Path) -> Path:
    """Write a record as JSON. Raises MixoffError if that fails."""
    try:
        Path(path).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise MixoffError(f"cannot write the record to {path}: {error.strerror or error}") from error
    return Path(path)


def public_name(source: str) -> str:
    """The name of a public model, UNNAMED for a local folder.

    >>> public_name("tiny-mixtral"), public_name("org/model"), public_name("./here/store")
    ('tiny-mixtral', 'org/model', 'a local folder')
    """
    return source if source in models.names() or names.parse(source) else UNNAMED


def _figures(run: Mapping) -> dict:
    """The measured figures, without the message of a failure, which may name files."""
    figures = {key: value for key, value in run.items() if key not in (*MODELLED, "failure", "name")}
    return figures | {"failed": bool(run.get("failure"))}


def _without_paths(hardware: dict) -> dict:
    replaced = {key: text for key, text in PLACES.items() if key in hardware["sources"]}
    return hardware | {"sources": hardware["sources"] | replaced}
