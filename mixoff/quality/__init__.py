"""What fewer bits or fewer experts cost: perplexity, divergence, and the knobs that trade exactness for speed."""

from mixoff.quality.lossy import (
    Shadow,
    coarse_misses,
    dynamic_top_k,
    prune,
    skip_light,
    skip_misses,
)
from mixoff.quality.scores import (
    Comparison,
    Estimate,
    Scores,
    Windows,
    as_windows,
    compare,
    estimate,
    matrices,
    measure,
    perplexity,
    predictions,
    quantized,
    windows,
    with_twins,
)

__all__ = [
    "Comparison",
    "Estimate",
    "Scores",
    "Shadow",
    "Windows",
    "as_windows",
    "coarse_misses",
    "compare",
    "dynamic_top_k",
    "estimate",
    "matrices",
    "measure",
    "perplexity",
    "predictions",
    "prune",
    "quantized",
    "skip_light",
    "skip_misses",
    "windows",
    "with_twins",
]
