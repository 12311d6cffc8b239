"""How one row of a batch chooses its next token.

The filters are transformers' own, in `generate`'s order, and every row draws from a generator of its own. So a row
gets the same token alone or among others, and the same as `generate` with the same seed.

Letters: **V** vocabulary.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

import torch
from transformers import LogitsProcessorList
from transformers.generation import logits_process as filters

from mixoff.errors import MixoffError

if TYPE_CHECKING:
    from mixoff.serving.grammar import Grammar


@dataclass(frozen=True)
class Sampling:
    """The parameters of one answer, checked by `fields`.

    temperature: 0 always takes the likeliest token
    top_p, top_k, min_p: limit the tokens to draw from; 1, 0 and 0 mean no limit
    presence_penalty, frequency_penalty: as OpenAI defines them, over new tokens
    repetition_penalty: as transformers defines it, over prompt and new tokens; 1 is none
    logit_bias: numbers to add to the logits, by token
    seed: seed of the draws
    top_logprobs: number of alternatives to report per token; None reports no log-probability at all
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: dict[int, float] = field(default_factory=dict)
    seed: int = 0
    top_logprobs: int | None = None


class Logprob(NamedTuple):
    """The model's own log-probability of a token, before any filter; best: the likeliest tokens with theirs."""

    token: int
    logprob: float | None
    best: list[tuple[int, float]]


class Sampler:
    """Chooses the tokens of one row."""

    def __init__(self, sampling: Sampling, grammar: Grammar | None = None) -> None:
        self.sampling, self.grammar = sampling, grammar
        self.generator = torch.Generator().manual_seed(sampling.seed)
        self.filters = _filters(sampling)
        self.counts: Counter[int] = Counter()  # of new tokens

    def choose(self, ids: list[int], logits: torch.Tensor) -> tuple[int, Logprob | None]:
        """The next token after `ids`, of `logits` (V,) in fp32. Raises MixoffError if they are not finite."""
        if not bool(logits.isfinite().any()) or bool((logits.isnan() | logits.isposinf()).any()):
            raise MixoffError("the model computes numbers that are not finite: `mixoff run` says in which layer")
        scores = self._penalized(logits).unsqueeze(0)  # (1, V)
        if self.grammar is not None:
            scores = self.grammar.mask(scores)
        token = self._draw(self.filters(torch.tensor([ids]), scores))
        self.counts[token] += 1
        if self.grammar is not None:
            self.grammar.accept(token)
        best = self.sampling.top_logprobs
        return token, None if best is None else logprob_of(logits, token, best)

    def _draw(self, scores: torch.Tensor) -> int:
        if self.sampling.temperature <= 0:
            return int(scores.argmax())
        return int(torch.multinomial(torch.softmax(scores, -1), 1, generator=self.generator))

    def _penalized(self, logits: torch.Tensor) -> torch.Tensor:
        given = self.sampling
        penalized = given.presence_penalty or given.frequency_penalty
        if not (given.logit_bias or penalized):
            return logits
        logits = logits.clone()
        for token, bias in given.logit_bias.items():
            logits[token] += bias
        for token, count in self.counts.items() if penalized else ():
            logits[token] -= given.presence_penalty + count * given.frequency_penalty
        return logits


def _filters(given: Sampling) -> LogitsProcessorList:
    """transformers' filters for these parameters, in the order of `generate`."""
    chosen: list[filters.LogitsProcessor] = []
    if given.repetition_penalty != 1:
        chosen.append(filters.RepetitionPenaltyLogitsProcessor(given.repetition_penalty))
    if given.temperature > 0:
        if given.temperature != 1:
            chosen.append(filters.TemperatureLogitsWarper(given.temperature))
        if given.top_k:
            chosen.append(filters.TopKLogitsWarper(given.top_k))
        if given.top_p < 1:
            chosen.append(filters.TopPLogitsWarper(given.top_p))
        if given.min_p:
            chosen.append(filters.MinPLogitsWarper(given.min_p))
    return LogitsProcessorList(chosen)


def logprob_of(logits: torch.Tensor, token: int, best: int) -> Logprob:
    """The log-probability of `token` by `logits` (V,), and the `best` likeliest tokens with theirs."""
    logprobs = torch.log_softmax(logits, -1)
    top = logprobs.topk(best)
    return Logprob(token, float(logprobs[token]), list(zip(top.indices.tolist(), top.values.tolist(), strict=True)))
