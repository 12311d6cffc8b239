"""mixoff: run Mixture-of-Experts models that do not fit your memory, exactly, and see why it works.

`import mixoff` is light: torch and transformers load when a name that needs them is first used.
"""

from importlib import import_module

__version__ = "0.1.0"

_HOMES = {
    "load": "loading",
    "Runtime": "runtime",
    "CacheInfo": "cache.events",
    "Event": "cache.events",
    "convert": "store.convert",
}
_HOMES |= {"MixoffError": "errors", "CheckpointError": "errors", "BudgetError": "errors", "ExpertCache": "cache.cache"}
_HOMES |= {"Scheme": "quantize.scheme", "QTensor": "quantize.tensor", "verify": "store.verify"}
_HOMES |= {"offload": "memory", "restore": "memory"}
_HOMES |= {"Trace": "trace.trace", "Simulation": "trace.simulate", "simulate": "trace.simulate"}
_HOMES |= {"plan": "planning.planner", "Plan": "planning.plan"}
_MODULES = (
    "bench",
    "cache",
    "errors",
    "generation",
    "kernels",
    "loading",
    "lossy",
    "memory",
    "models",
    "planning",
    "prefetch",
    "quality",
    "quantize",
    "rescue",
    "runtime",
    "shapes",
    "store",
    "synthetic",
    "trace",
    "transfer",
    "units",
)
__all__ = [*_HOMES, *_MODULES]


def __getattr__(name: str) -> object:
    if name in _HOMES:
        return getattr(import_module(f"mixoff.{_HOMES[name]}"), name)
    if name in _MODULES:
        return import_module(f"mixoff.{name}")
    raise AttributeError(f"module 'mixoff' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
