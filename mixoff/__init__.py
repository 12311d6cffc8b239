"""mixoff: run Mixture-of-Experts models that do not fit your memory, exactly, and see why it works.

`import mixoff` is light: torch and transformers load when a name that needs them is first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from mixoff._version import __version__

if TYPE_CHECKING:  # what editors and type checkers see; `tests/test_packaging.py` holds it equal to HOMES
    from mixoff import (
        bench,
        cache,
        checkpoints,
        errors,
        kernels,
        loading,
        models,
        planning,
        quality,
        quantize,
        runtime,
        shapes,
        store,
        text,
        trace,
        transfer,
        units,
    )
    from mixoff.cache.cache import ExpertCache
    from mixoff.cache.events import CacheInfo, Event
    from mixoff.conversion.convert import convert
    from mixoff.errors import BudgetError, CheckpointError, MixoffError
    from mixoff.loading.load import load
    from mixoff.loading.offload import offload, restore
    from mixoff.planning.plan import Plan
    from mixoff.planning.planner import plan
    from mixoff.pruning.prune import prune
    from mixoff.quantize.scheme import Scheme
    from mixoff.quantize.tensor import QTensor
    from mixoff.runtime.runtime import Runtime
    from mixoff.store.verify import verify
    from mixoff.trace.simulate import Simulation, simulate
    from mixoff.trace.trace import Trace

_HOMES = {
    "load": "loading.load",
    "offload": "loading.offload",
    "restore": "loading.offload",
    "Runtime": "runtime.runtime",
    "CacheInfo": "cache.events",
    "Event": "cache.events",
    "ExpertCache": "cache.cache",
    "convert": "conversion.convert",
    "prune": "pruning.prune",
    "verify": "store.verify",
    "Scheme": "quantize.scheme",
    "QTensor": "quantize.tensor",
    "plan": "planning.planner",
    "Plan": "planning.plan",
    "Trace": "trace.trace",
    "Simulation": "trace.simulate",
    "simulate": "trace.simulate",
    "MixoffError": "errors",
    "CheckpointError": "errors",
    "BudgetError": "errors",
}
_ROOMS = (
    "bench",
    "cache",
    "checkpoints",
    "errors",
    "kernels",
    "loading",
    "models",
    "planning",
    "quality",
    "quantize",
    "runtime",
    "shapes",
    "store",
    "text",
    "trace",
    "transfer",
    "units",
)
__all__ = [*_HOMES, *_ROOMS]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(f"mixoff.{_HOMES[name]}"), name)
    if name in _ROOMS:
        return import_module(f"mixoff.{name}")
    raise AttributeError(f"module 'mixoff' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
