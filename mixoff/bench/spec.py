"""What a contender is asked to do, and what all of them are told alike. Knows no library but numpy.

Letters: **T** tokens, **L** MoE layers, **K** experts a token.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field

import numpy as np

SEED, FIRST_ID = 0, 300  # ids below are bytes and special tokens in most vocabularies
RECALL = 0.86  # of the bundled model, two experts guessed, measured: what a forced guess is given in its place


@dataclass(frozen=True)
class Spec:
    """One contender. kind: `mixoff`, `mmap`, `transformers`, `accelerate` or `llama.cpp`. path: its model.

    warmup: tokens decoded before the clock runs, which also fill the cache. routing: a preset of `trace.routers`,
    or `model` for the model's own choice. repeat: the repeat rate to tune it to. recall: share of a forced choice that
    the next-router guess names, since routers with random weights know nothing of it. load: options of the loader.
    """

    name: str
    kind: str
    path: str
    threads: int = 1
    prompt_tokens: int = 64
    tokens: int = 32
    runs: int = 1
    warmup: int = 8
    routing: str = "mixtral-8x7b"
    repeat: float | None = None
    recall: float = RECALL
    load: dict = field(default_factory=dict)

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Spec:
        return cls(**json.loads(text))

    def ids(self, vocabulary: int) -> np.ndarray:
        """Random ids of each run, its prompt and then what is decoded: int64 (runs, prompt_tokens + tokens)."""
        shape = (self.runs, self.prompt_tokens + self.tokens)
        return np.random.default_rng(SEED).integers(min(FIRST_ID, vocabulary // 2), vocabulary, shape)


def repeat_rate(chosen: np.ndarray) -> float | None:
    """Share of a token's experts that the previous token had asked for too, chosen (T, L, K); None for one token.

    >>> repeat_rate(np.array([[[0, 1]], [[1, 2]], [[1, 2]]]))
    0.75
    """
    if len(chosen) < 2:
        return None
    again = (chosen[1:, :, :, None] == chosen[:-1, :, None, :]).any(-1)  # (T - 1, L, K)
    return float(again.mean())
