"""Widgets of the chapters: a cache at work, a race of caches, evictions step by step, a plan, and small experiments.

Each has a still twin (`.figure()`) and a text summary, and works in JupyterLab, Notebook 7, VS Code and Colab without
an extension.
"""

from mixoff.widgets.batch_stepper import BatchStepper
from mixoff.widgets.blind_vote import BlindVote
from mixoff.widgets.cache_view import CacheView
from mixoff.widgets.engine_map import EngineMap
from mixoff.widgets.eviction_stepper import EvictionStepper
from mixoff.widgets.outlier import OutlierRuler
from mixoff.widgets.plan_explorer import PlanExplorer
from mixoff.widgets.race import Race
from mixoff.widgets.router_swap import RouterSwap
from mixoff.widgets.word_stepper import WordStepper

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
