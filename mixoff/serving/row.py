"""One answer on its way: its tokens, its text with stop strings cut off, and why it ended.

A row knows no batch, no thread and no HTTP: a batcher gives it tokens, and it tells `listener` what is new.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from mixoff.serving.sampling import Logprob, Sampler, Sampling
from mixoff.text.generation import Decoder

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

    from mixoff.serving.grammar import Grammar

STOP, LENGTH, CANCELLED, FAILED = "stop", "length", "cancelled", "error"


@dataclass
class News:
    """What a row has to tell: new text that is final, the tokens behind it, and the end, if it has come.

    reason: `stop`, `length`, `cancelled` or `error`
    """

    text: str = ""
    tokens: list[int] = field(default_factory=list)
    logprobs: list[Logprob] = field(default_factory=list)
    reason: str | None = None
    error: Exception | None = None


class Row:
    """One answer.

    Parameters
    ----------
    ids: tokens of the prompt
    limit: largest number of new tokens; 0 only scores the prompt
    ends: tokens that end an answer
    stops: texts that end an answer and are left out of it
    score_prompt: True also reports log-probabilities of the prompt's tokens
    grammar: mask of the tokens that may come next, or None
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        ids: list[int],
        limit: int,
        sampling: Sampling,
        *,
        ends: frozenset[int] = frozenset(),
        stops: tuple[str, ...] = (),
        score_prompt: bool = False,
        grammar: Grammar | None = None,
    ) -> None:
        self.prompt, self.ids, self.limit, self.ends, self.stops = tuple(ids), list(ids), limit, ends, stops
        self.sampling, self.sampler = sampling, Sampler(sampling, grammar)
        self.score_prompt = score_prompt
        self.listener: Callable[[News], None] = lambda news: None
        self.reason: str | None = None
        self.cancelled = False  # set by anybody; the batcher drops the row before its next pass
        self._decoder, self._held = Decoder(tokenizer), ""

    @property
    def count(self) -> int:
        """Number of new tokens."""
        return len(self.ids) - len(self.prompt)

    @property
    def prompt_text(self) -> str:
        """Text of the prompt."""
        return self._decoder.tokenizer.decode(list(self.prompt), skip_special_tokens=True)

    @property
    def ended(self) -> bool:
        """Whether no more tokens are wanted."""
        if self.cancelled and self.reason is None:
            self._tell(News(reason=CANCELLED))
        return self.reason is not None

    def take(self, logits: torch.Tensor) -> None:
        """Choose the next token from `logits` (V,)."""
        try:
            token, logprob = self.sampler.choose(self.ids, logits)
        except Exception as error:
            self.fail(error)
            return
        self.ids.append(token)
        news = News(tokens=[token], logprobs=[] if logprob is None else [logprob])
        self._spell(token, news)
        self._tell(news)

    def scored(self, logprobs: list[Logprob]) -> None:
        """Report the log-probabilities of the prompt's tokens; ends a row that wants nothing else."""
        self.score_prompt = False  # once, even if the prompt is read again
        self._tell(News(logprobs=logprobs, reason=LENGTH if self.limit == 0 else None))

    def fail(self, error: Exception) -> None:
        """End with an error."""
        self._tell(News(reason=FAILED, error=error))

    def _spell(self, token: int, news: News) -> None:
        """Add the text of `token` to `news`, and the reason if it ends the answer."""
        if token in self.ends:
            news.reason = STOP
            self._add(self._decoder.end(), news)
        else:
            self._add(self._decoder.add([token]), news)
            if self.count >= self.limit and news.reason is None:
                news.reason = LENGTH
                self._add(self._decoder.end(), news)
        if news.reason is not None:
            news.text, self._held = news.text + self._held, ""

    def _add(self, piece: str, news: News) -> None:
        """Add final text to `news`, and hold back what may be the beginning of a stop string."""
        self._held += piece
        found = [at for stop in self.stops if (at := self._held.find(stop)) >= 0]
        if found:
            news.reason, self._held = STOP, self._held[: min(found)]
            return
        final = len(self._held) - max((_overlap(self._held, stop) for stop in self.stops), default=0)
        news.text += self._held[:final]
        self._held = self._held[final:]

    def _tell(self, news: News) -> None:
        if self.reason is None:
            self.reason = news.reason
            self.listener(news)


def _overlap(text: str, stop: str) -> int:
    """The most characters at the end of `text` that begin `stop`."""
    most = min(len(stop) - 1, len(text))
    return next((n for n in range(most, 0, -1) if text.endswith(stop[:n])), 0)
