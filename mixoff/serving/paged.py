"""A batcher over transformers' continuous batching: keys and values in blocks of bounded memory, without padding.

transformers schedules the passes and owns the blocks; the tokens are chosen here, by each row's own sampler, in the
place of a logits processor. It works for families whose layers are all full attention; others are refused.

transformers runs its loop on a thread of its own, where an exception ends it for good. So this calls the loop's three
steps from the worker's thread instead. Their names are private, so they are looked for first: another release of
transformers may lack them.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
import transformers
from transformers import ContinuousBatchingConfig, GenerationConfig, LogitsProcessor

from mixoff.errors import MixoffError, one_line
from mixoff.serving.row import Row

if TYPE_CHECKING:
    from transformers import PreTrainedModel

BLOCK = 32  # tokens of a block
OF_MANAGER = ("_create_batch_processor", "_original_attn_impl", "background_thread_status", "batch_processor")
OF_LOOP = ("_generation_step", "inputs_and_outputs", "prepare_next_batch", "update_batch")
PROMPT_TOKENS = 512  # most tokens of one pass: longer prompts are read in several, between the tokens of others


class PagedBatcher:
    """Computes rows with a KV cache of `tokens` tokens in all, which is allocated at once."""

    scores_prompts = False

    def __init__(self, model: PreTrainedModel, most_rows: int, context: int, tokens: int = 0) -> None:
        self.model = model
        self.rows: list[Row] = []
        self._names: dict[str, Row] = {}
        self._numbers = itertools.count()
        if others := set(getattr(model.config.get_text_config(), "layer_types", None) or ()) - {"full_attention"}:
            raise MixoffError(f"this model needs --batcher rows: it has layers of {', '.join(sorted(others))}")
        self.blocks = tokens // BLOCK if tokens else most_rows * -(-context // BLOCK)
        config = ContinuousBatchingConfig(
            num_blocks=self.blocks + 1,  # the scheduler keeps one
            safety_margin=0.0,
            max_batch_tokens=max(PROMPT_TOKENS, most_rows),
            allow_block_sharing=False,
            use_async_batching=False,
            use_cuda_graph=False,
            **{_block_size(): BLOCK},
        )
        ends = GenerationConfig(do_sample=False, eos_token_id=-1, max_new_tokens=context)
        self._manager = model.init_continuous_batching(ends, config)
        _check(self._manager, (*OF_MANAGER, "logit_processor"))
        self._manager.logit_processor.logits_processor.append(_Choose(self))
        self._manager.logit_processor.do_processing = True
        self._begin()

    def _begin(self) -> None:
        self._manager.batch_processor = None  # or transformers would reset the old one, whatever state it is in
        try:
            self._loop = self._manager.batch_processor = self._manager._create_batch_processor()
        except (ValueError, RuntimeError, NotImplementedError, AttributeError) as error:
            raise MixoffError(f"this model needs --batcher rows: {one_line(error)}") from error
        _check(self._loop, OF_LOOP)

    def fits(self, row: Row) -> bool:
        """Whether there are blocks for the whole of a row. Raises MixoffError if there never could be.

        Without this, rows that grow into each other's blocks would be read again and again, or wait for ever.
        """
        need = _blocks(row)
        if need > self.blocks:
            raise MixoffError(
                f"the request needs the keys and values of {need * BLOCK} tokens, and this server holds "
                f"{self.blocks * BLOCK}: lower max_tokens, or start it with a larger --kv-tokens"
            )
        return need + sum(_blocks(row) for row in self.rows if not row.ended) <= self.blocks

    def join(self, rows: list[Row]) -> None:
        """Take in `rows`; their tokens are read in the next steps."""
        for row in rows:
            name = f"row-{next(self._numbers)}"
            self._names[name] = row
            self.rows.append(row)
            self._manager.background_thread_status.clear()
            self._manager.add_request(list(row.ids), request_id=name, max_new_tokens=row.limit - row.count + 1)

    @torch.no_grad()
    def step(self) -> None:
        """One pass: a token for each row whose prompt has been read."""
        for name, row in list(self._names.items()):
            if row.ended:
                self._manager.cancel_request(name)
                del self._names[name]
        self.rows = list(self._names.values())
        if self._loop.prepare_next_batch():
            self._loop._generation_step(self.model)
            self._loop.update_batch()
        elif self.rows:
            raise RuntimeError("transformers schedules no row, which would go on for ever")

    def choose(self, logits: torch.Tensor) -> torch.Tensor:
        """The tokens that the rows of this pass choose from `logits` (rows, V), each as the only finite score."""
        states = [s.state for s in self._loop.inputs_and_outputs.requests_in_batch if s.has_new_token]
        scores = torch.full_like(logits, -torch.inf)
        for i, state in enumerate(states):
            row = self._names.get(state.request_id)
            if row is not None and not row.ended:
                row.take(logits[i].float().cpu())
                scores[i, row.ids[-1]] = 0
            else:
                scores[i, 0] = 0
        return scores

    def clear(self) -> list[Row]:
        """Forget all rows; returns those that have not ended."""
        rows, self.rows, self._names = self.rows, [], {}
        self._begin()
        return [row for row in rows if not row.ended]

    def close(self) -> None:
        """Free the blocks, and give the model its own attention back."""
        self.rows, self._names = [], {}
        self._loop = self._manager.batch_processor = None
        if self._manager._original_attn_impl is not None:
            self.model.set_attn_implementation(self._manager._original_attn_impl)
            self._manager._original_attn_impl = None


class _Choose(LogitsProcessor):
    """Hands the logits of a pass to the rows."""

    supports_continuous_batching = True

    def __init__(self, batcher: PagedBatcher) -> None:
        self.batcher = batcher

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """The scores after each row has chosen."""
        return self.batcher.choose(scores)


def _check(part: object, names: Iterable[str]) -> None:
    """Raise MixoffError, with the way out, if a part of transformers lacks one of the names that are used here."""
    if missing := [name for name in names if not hasattr(part, name)]:
        raise MixoffError(
            f"--batcher paged does not fit transformers {transformers.__version__}, which has no {missing[0]}: use "
            "--batcher rows, or the newest mixoff"
        )


def _blocks(row: Row) -> int:
    """Blocks for all tokens of a row."""
    return -(-(len(row.prompt) + row.limit) // BLOCK)


def _block_size() -> str:
    """The name of the size of a block: it changed in transformers 5.17."""
    names: list[Any] = [field.name for field in dataclasses.fields(ContinuousBatchingConfig)]
    return "page_size" if "page_size" in names else "block_size"
