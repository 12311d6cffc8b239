"""What a model is made of: parameters by part, experts, the cache of keys and values, and their bytes under a scheme.

Must not know folders of weights, the Hub, or machines.
"""

from typing import Any


def __getattr__(name: str) -> Any:
    if name == "skeleton":  # loads torch, which names of well-known models do not need
        from mixoff.shapes.config import skeleton

        return skeleton
    raise AttributeError(f"module 'mixoff.shapes' has no attribute {name!r}")
