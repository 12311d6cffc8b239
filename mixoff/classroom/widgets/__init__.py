"""Widgets of the chapters: a cache at work, a race of caches, evictions step by step, a plan, and small experiments.

Each has a still twin (`.figure()`) and a text summary, and works in JupyterLab, Notebook 7, VS Code and Colab without
an extension.
"""

from mixoff.classroom.widgets.batch_stepper import BatchStepper
from mixoff.classroom.widgets.blind_vote import BlindVote
from mixoff.classroom.widgets.cache_view import CacheView
from mixoff.classroom.widgets.engine_map import EngineMap
from mixoff.classroom.widgets.eviction_stepper import EvictionStepper
from mixoff.classroom.widgets.outlier import OutlierRuler
from mixoff.classroom.widgets.plan_explorer import PlanExplorer
from mixoff.classroom.widgets.race import Race
from mixoff.classroom.widgets.router_swap import RouterSwap
from mixoff.classroom.widgets.word_stepper import WordStepper

__all__ = [
    "BatchStepper",
    "BlindVote",
    "CacheView",
    "EngineMap",
    "EvictionStepper",
    "OutlierRuler",
    "PlanExplorer",
    "Race",
    "RouterSwap",
    "WordStepper",
]
