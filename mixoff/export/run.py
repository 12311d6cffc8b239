"""Exports a store or a checkpoint for another engine."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from pathlib import Path

from mixoff.checkpoints.find import find
from mixoff.errors import MixoffError, suggestion
from mixoff.export.compressed import compressed_layout
from mixoff.export.layout import Export, hub_layout
from mixoff.export.model import Model, open_model
from mixoff.store.convert import Report, make, refuse_existing
from mixoff.store.making import Options


def export(
    source: str | Path,
    target: str | Path,
    to: str,
    *,
    bits: int | None = None,
    progress: bool | None = None,
    planned: Callable[[int], object] | None = None,
) -> Report:
    """Write the weights of `source` into `target` for another engine.

    - source: a store, a model's folder, or a GGUF file.
    - target: the folder to create, or the file for GGUF; it appears only when it is complete.
    - to: `"hf"`, safetensors as on the Hub; `"compressed-tensors"`, experts in 4 or 8 bits; `"gguf"`.
    - bits: bits of experts: 4 or 8 for compressed-tensors, 4, 5, 8 or 16 for GGUF; None chooses.
    - progress: whether to show a bar on standard error; None shows it on a terminal.
    - planned: is told the bytes of the export before any is written.

    What was interrupted leaves `target.partial`, and the next export continues from there. Memory: two experts, the
    backbone's largest tensors and 300 MB. Raises CheckpointError and MixoffError for what cannot be exported.
    """
    target = Path(target)
    refuse_existing(target)
    model = open_model(find(source))
    plan = _planned(model, target, to, bits)
    if planned:
        planned(sum(plan.sizes.values()))
    with closing(model.shards) as shards:
        return make(shards, plan, target, Options(progress=progress))


def _planned(model: Model, target: Path, to: str, bits: int | None) -> Export:
    choices = {"hf": (None,), "compressed-tensors": (None, 4, 8), "gguf": (None, 4, 5, 8, 16)}
    if to not in choices:
        raise MixoffError(f"no format {to!r}: choose one of {', '.join(choices)}{suggestion(to, choices)}")
    if bits not in choices[to]:
        given = " or ".join(str(n) for n in choices[to] if n) or "no number of"
        raise MixoffError(f"{to} has no experts in {bits} bits here: choose {given} bits")
    if to == "hf":
        return hub_layout(model)
    if to == "compressed-tensors":
        return compressed_layout(model, bits)
    from mixoff.export.gguf import gguf_layout

    return gguf_layout(model, target, bits)
