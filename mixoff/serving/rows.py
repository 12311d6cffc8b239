"""A batcher for every family: rows of one batch, padded on the left, with the model's own KV cache.

A newcomer's prompt is read in a pass of its own, and its cache is then joined to the others', so it waits for one step
at most. A cache that cannot be joined (sliding windows, recurrent states) is made again from the tokens of all rows.

Letters: **B** rows, **T** tokens so far, **V** vocabulary.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from mixoff.serving import caches
from mixoff.serving.row import Row
from mixoff.serving.sampling import Logprob, logprob_of
from mixoff.shapes.kv_cache import CACHE_NAMES

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass
class _Batch:
    """Rows whose tokens, but for the last one of each, are in `cache`; mask: 1 for a token, 0 for padding, (B, T)."""

    rows: list[Row]
    cache: Any
    mask: torch.Tensor


class RowsBatcher:
    """Computes rows as one padded batch."""

    scores_prompts = True

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self._batch: _Batch | None = None
        self._new: list[Row] = []
        parameters = inspect.signature(model.forward).parameters
        self._positions, self._keep = "position_ids" in parameters, "logits_to_keep" in parameters
        self._cache = next((name for name in CACHE_NAMES if name in parameters), CACHE_NAMES[-1])

    @property
    def rows(self) -> list[Row]:
        """Rows that have not been dropped."""
        return [*(self._batch.rows if self._batch else ()), *self._new]

    def fits(self, row: Row) -> bool:
        """True: the cache grows with its rows."""
        return True

    def join(self, rows: list[Row]) -> None:
        """Take in `rows`; their tokens are read in the next step."""
        self._new += rows

    def clear(self) -> list[Row]:
        """Forget all rows; returns those that have not ended."""
        rows, self._batch, self._new = self.rows, None, []
        return [row for row in rows if not row.ended]

    def close(self) -> None:
        """Forget all rows."""
        self.clear()

    @torch.no_grad()
    def step(self) -> None:
        """One pass over the running rows, and one over the prompts of newcomers."""
        self._drop()
        self._new = [row for row in self._new if not row.ended]
        running = self._batch
        if running and self._new and not caches.joinable(running.cache):
            self._batch, self._new = None, running.rows + self._new
        elif running:
            self._decode(running)
        if new := [row for row in self._new if self._score(row)]:
            self._admit(new)
        self._new = []  # only now: after an exception, `clear` returns every row

    def _drop(self) -> None:
        """Drop the rows that ended; a cache from which rows cannot be taken is made again from the others' tokens."""
        batch = self._batch
        if batch is None or not any(row.ended for row in batch.rows):
            return
        keep = [i for i, row in enumerate(batch.rows) if not row.ended]
        batch.rows, batch.mask = [batch.rows[i] for i in keep], batch.mask[keep]
        if not keep:
            self._batch = None
        elif caches.select(batch.cache, keep):
            batch.mask = caches.trim(batch.cache, batch.mask)
        else:
            self._batch, self._new = None, batch.rows + self._new

    def _score(self, row: Row) -> bool:
        """Report the log-probabilities of the prompt, if asked for, in a pass of its own; False if that was all."""
        if row.score_prompt:
            ids = torch.tensor([row.prompt])
            row.scored(_prompt_logprobs(row, self._forward(ids, torch.ones_like(ids), None, 0).logits[0].float().cpu()))
        return not row.ended

    def _admit(self, new: list[Row]) -> None:
        """Read the tokens of `new`, choose the next of each, and let them run with the others."""
        width = max(len(row.ids) for row in new)
        ids = torch.tensor([[0] * (width - len(row.ids)) + row.ids for row in new])  # (B, T)
        mask = torch.tensor([[0] * (width - len(row.ids)) + [1] * len(row.ids) for row in new])
        out = self._forward(ids, mask, None, 1)
        cache = _cache_of(out)
        self._choose(new, out.logits)
        if running := self._batch:
            running.mask = caches.merge(running.cache, cache, running.mask, mask)
            running.rows = running.rows + new
        else:
            self._batch = _Batch(new, cache, mask)

    def _decode(self, batch: _Batch) -> None:
        ids = torch.tensor([row.ids[-1:] for row in batch.rows])
        batch.mask = torch.cat([batch.mask, batch.mask.new_ones(len(batch.rows), 1)], 1)
        out = self._forward(ids, batch.mask, batch.cache, 1)
        batch.cache = _cache_of(out)
        self._choose(batch.rows, out.logits)

    def _choose(self, rows: list[Row], logits: torch.Tensor) -> None:
        for row, last in zip(rows, logits[:, -1].float().cpu(), strict=True):  # (V,)
            if not row.ended:
                row.take(last)

    def _forward(self, ids: torch.Tensor, mask: torch.Tensor, cache: Any, keep: int) -> Any:
        """A pass over the newest `ids` of each row; mask (B, T) covers those in the cache too."""
        options: dict[str, Any] = {self._cache: cache} | ({"logits_to_keep": keep} if self._keep else {})
        device = self.model.device
        if self._positions:
            positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
            options["position_ids"] = positions.to(device)
        ids, mask = ids.to(device), mask.to(device)
        return self.model(ids, attention_mask=mask, use_cache=True, return_dict=True, **options)


def _cache_of(out: Any) -> Any:
    return next(cache for name in reversed(CACHE_NAMES) if (cache := getattr(out, name, None)) is not None)


def _prompt_logprobs(row: Row, logits: torch.Tensor) -> list[Logprob]:
    """Of each token of the prompt by the logits (T, V) before it; the first has none."""
    best, ids = row.sampling.top_logprobs or 0, row.prompt
    return [Logprob(ids[0], None, []), *(logprob_of(logits[i - 1], ids[i], best) for i in range(1, len(ids)))]
