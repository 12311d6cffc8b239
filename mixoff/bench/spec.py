"""The task of a contender, the same for all of them. Imports only numpy, so that a peer's process stays small.

Letters: **T** tokens, **L** MoE layers, **K** experts per token.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, field

import numpy as np

from mixoff.errors import MixoffError

SEED, FIRST_ID = 0, 300  # ids below are bytes and special tokens in most vocabularies
RECALL = 0.86  # recall of two guessed experts on the bundled model, measured; forced guesses have the same


@dataclass(frozen=True)
class Spec:
    """One contender.

    kind: `mixoff`, `mmap`, `transformers`, `accelerate` or `llama-bench`.
    path: folder or file of its model.
    warmup: tokens decoded before the clock starts, after a prompt as long as those of the runs; both fill the cache.
    routing: preset of `trace.routers`, or `model` for the model's own choice.
    repeat: repeat rate to tune the routing to.
    recall: share of a forced choice that the guess names, since random routers cannot guess it.
    load: options of the loader.
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
        """One line of JSON, for the command line of the contender's process."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Spec:
        """The inverse of `to_json`."""
        return cls(**json.loads(text))

    def ids(self, vocabulary: int) -> np.ndarray:
        """Random ids of each run, prompt first: int64 (runs, prompt_tokens + tokens)."""
        shape = (self.runs, self.prompt_tokens + self.tokens)
        return np.random.default_rng(SEED).integers(min(FIRST_ID, vocabulary // 2), vocabulary, shape)


def answer(run: Callable[[Spec], dict], argv: list[str]) -> int:
    """Print what `run` measures for the spec in argv, as JSON; MixoffErrors go to standard error, with exit code 2."""
    try:
        print(json.dumps(run(Spec.from_json(argv[0]))))
    except MixoffError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


def repeat_rate(chosen: np.ndarray) -> float | None:
    """Share of experts that the previous token used too, for chosen (T, L, K); None for one token.

    >>> repeat_rate(np.array([[[0, 1]], [[1, 2]], [[1, 2]]]))
    0.75
    """
    if len(chosen) < 2:
        return None
    again = (chosen[1:, :, :, None] == chosen[:-1, :, None, :]).any(-1)  # (T - 1, L, K)
    return float(again.mean())
