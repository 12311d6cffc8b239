"""What the worker asks of a batcher: rows join, and each step gives every row one token.

A batcher runs on the worker's thread alone. It never keeps a row that ended: `step` drops it before it computes, so a
cancelled row costs no further pass.
"""

from __future__ import annotations

from typing import Protocol

from mixoff.serving.row import Row


class Batcher(Protocol):
    """Computes the next tokens of several rows together. scores_prompts: whether it reports their log-probabilities."""

    scores_prompts: bool

    @property
    def rows(self) -> list[Row]:
        """Rows that have not been dropped."""

    def fits(self, row: Row) -> bool:
        """Whether memory is free for a row next to those that run. Raises MixoffError if it never could be."""

    def join(self, rows: list[Row]) -> None:
        """Take in `rows`, whose tokens so far are read in the next step."""

    def step(self) -> None:
        """Drop the rows that ended, and compute a token for the others. An exception leaves the batcher unusable."""

    def clear(self) -> list[Row]:
        """Forget all rows, after an exception too, and return those that have not ended."""

    def close(self) -> None:
        """Free what the batcher holds."""
