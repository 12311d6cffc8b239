"""Widgets of the chapters: a cache at work, live or replayed; evictions step by step; a plan to play
with; a packed word; a batch.

Each has a still twin (`.figure()`) and a text summary, and works in JupyterLab, Notebook 7, VS Code and Colab without
an extension.
"""

from mixoff.classroom.widgets.batch_stepper import BatchStepper
from mixoff.classroom.widgets.cache_view import CacheView
from mixoff.classroom.widgets.eviction_stepper import EvictionStepper
from mixoff.classroom.widgets.plan_explorer import PlanExplorer
from mixoff.classroom.widgets.word_stepper import WordStepper

__all__ = ["BatchStepper", "CacheView", "EvictionStepper", "PlanExplorer", "WordStepper"]
