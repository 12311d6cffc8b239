"""Widgets of the chapters: a cache at work, live or replayed; an eviction taken step by step; a plan to play with.

They take events, traces and shapes; the runtime never imports them. Each has a still twin (`.figure()`) and a text
summary, and works in JupyterLab, Notebook 7, VS Code and Colab without an extension. Does not know weights.
"""

from mixoff.classroom.widgets.cache_view import CacheView
from mixoff.classroom.widgets.eviction_stepper import EvictionStepper
from mixoff.classroom.widgets.plan_explorer import PlanExplorer

__all__ = ["CacheView", "EvictionStepper", "PlanExplorer"]
