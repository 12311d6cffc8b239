"""Widgets of the chapters: a cache at work, live or replayed, and an eviction taken step by step.

They take events and traces; the runtime never imports them. Each has a still twin (`.figure()`) and a text summary, and
works in JupyterLab, Notebook 7, VS Code and Colab without an extension. Does not know models.
"""

from mixoff.classroom.widgets.cache_view import CacheView
from mixoff.classroom.widgets.eviction_stepper import EvictionStepper

__all__ = ["CacheView", "EvictionStepper"]
