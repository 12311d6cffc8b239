"""From a checked request to rows: the prompt's tokens, limits that fit the context, seeds, and the tokens that end.

Knows the tokenizer and the model's shape; never runs the model.
"""

from __future__ import annotations

import secrets
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mixoff.errors import MixoffError
from mixoff.serving.fields import MOST_BIASES, Asked, ChatAsked, TextAsked
from mixoff.serving.grammar import Grammar, Grammars
from mixoff.serving.row import Row
from mixoff.serving.sampling import Sampling
from mixoff.text import generation
from mixoff.text.chat import Chat

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

CONTEXT = 4096  # tokens of prompt and answer, unless the model's own limit is smaller or the user says otherwise
SEEDS = 2**64
OWN = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")  # what a generation_config.json may recommend
ASKED = (*OWN, "presence_penalty", "frequency_penalty")


@dataclass
class Served:
    """One model as a server offers it.

    name: its name in requests
    context: most tokens of a prompt and its answer together; 0 is the model's own limit, at most CONTEXT
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    name: str
    context: int = 0

    def __post_init__(self) -> None:
        config = self.model.config.get_text_config()
        most = getattr(config, "max_position_embeddings", None)
        self.context = min(self.context or CONTEXT, most or self.context or CONTEXT)
        self.vocabulary = config.vocab_size
        end = self.model.generation_config.eos_token_id
        self.ends = frozenset([] if end is None else end if isinstance(end, list) else [end])
        self.chat = Chat(self.model, self.tokenizer)
        self.grammars = Grammars(self.tokenizer, self.vocabulary, self.ends)

    def spell(self, token: int) -> str:
        """The text of one token."""
        return self.tokenizer.decode([token])

    def chat_rows(self, asked: ChatAsked) -> list[Row]:
        """The rows of a chat. Raises MixoffError."""
        text = self.chat.prompt(asked.turns(), asked.chat_template_kwargs)
        return self._rows(asked, [self._encode(text, False)], asked.limit, asked.best)

    def text_rows(self, asked: TextAsked) -> list[Row]:
        """The rows of a completion: `n` per prompt, in the order of the prompts. Raises MixoffError."""
        prompts = [self._encode(p, True) if isinstance(p, str) else self._known(p) for p in asked.prompts()]
        scored = bool(asked.echo and asked.best is not None) or asked.limit == 0
        return self._rows(asked, prompts, asked.limit, asked.best, scored)

    def _encode(self, text: str, special: bool) -> list[int]:
        return generation.encode(self.model, self.tokenizer, text, special)["input_ids"][0].tolist()

    def _known(self, ids: list[int]) -> list[int]:
        strange = [token for token in ids if not 0 <= token < self.vocabulary]
        if strange:
            raise MixoffError(f"the prompt holds token {strange[0]}: this model knows 0 to {self.vocabulary - 1}")
        return ids

    def _rows(
        self, asked: Asked, prompts: list[list[int]], limit: int | None, best: int | None, scored: bool = False
    ) -> list[Row]:
        n, seed = asked.n or 1, secrets.randbits(63) if asked.seed is None else asked.seed
        ends, stops = frozenset() if asked.ignore_eos else self.ends, asked.stops
        rows = []
        for number, ids in enumerate([prompt for prompt in prompts for _ in range(n)]):
            settings = sampling(asked, (seed + number) % SEEDS, best, self.vocabulary, self.model.generation_config)
            new, grammar = self._limit(ids, limit), self._grammar(asked)
            row = Row(self.tokenizer, ids, new, settings, ends=ends, stops=stops, score_prompt=scored, grammar=grammar)
            rows.append(row)
        return rows

    def _limit(self, ids: list[int], limit: int | None) -> int:
        """The number of new tokens that the context has room for. Raises MixoffError."""
        room = self.context - len(ids)
        if not ids:
            raise MixoffError("the prompt is empty and this tokenizer adds no start token: give it at least one word")
        if room < (limit or 1) and not limit == room == 0:
            wanted = f" and {limit} new ones are" if limit else " are"
            raise MixoffError(
                f"{len(ids)} tokens of prompt{wanted} more than this server's context of {self.context} holds: "
                "shorten the prompt, or lower max_tokens"
            )
        return room if limit is None else limit

    def _grammar(self, asked: Asked) -> Grammar | None:
        grammar = self.grammars.of(asked.response_format)
        if grammar is not None and asked.ignore_eos:
            raise MixoffError("response_format ends an answer where its JSON ends: leave out ignore_eos")
        return grammar


def sampling(asked: Asked, seed: int, best: int | None, vocabulary: int, model: Any = None) -> Sampling:
    """The parameters of one answer; those that were not asked for are the model's own, else OpenAI's defaults.

    model: a generation_config. Raises MixoffError.
    """
    given: dict[str, Any] = {name: value for name in OWN if (value := getattr(model, name, None)) is not None}
    given |= {name: value for name in ASKED if (value := getattr(asked, name)) is not None}
    given["top_p"] = given.get("top_p") or 1.0  # 0 means no limit, as in llama.cpp
    top_k = max(given.pop("top_k", 0), 0)
    return Sampling(
        **given,
        top_k=top_k if top_k < vocabulary else 0,
        logit_bias=_bias(asked.logit_bias or {}, vocabulary),
        seed=seed,
        top_logprobs=None if best is None else min(best, vocabulary),
    )


def _bias(given: dict[str, float], vocabulary: int) -> dict[int, float]:
    if len(given) > MOST_BIASES:
        raise MixoffError(f"logit_bias names {len(given)} tokens: give at most {MOST_BIASES}")
    strange = [token for token in given if not (token.isdecimal() and int(token[:20]) < vocabulary)]
    if strange:
        raise MixoffError(f"logit_bias names token {strange[0][:20]!r}: this model knows 0 to {vocabulary - 1}")
    return {int(token): bias for token, bias in given.items()}
