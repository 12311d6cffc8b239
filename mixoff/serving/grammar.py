"""Answers that follow a JSON schema: which tokens may come next.

llguidance does the work: a parser in Rust that knows the whole of JSON Schema and masks a vocabulary in a millisecond
on a CPU. JSON is written without line breaks, since a small model could go on with blanks for ever.

Letters: **V** vocabulary.
"""

from __future__ import annotations

import functools
import json
from typing import TYPE_CHECKING, Any

import torch

from mixoff.errors import MixoffError, one_line
from mixoff.serving.fields import ResponseFormat

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FORM = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}


class Grammar:
    """The rest of one answer. matcher: llguidance's, which reads token by token."""

    def __init__(self, matcher: Any) -> None:
        self.matcher = matcher

    def mask(self, scores: torch.Tensor) -> torch.Tensor:
        """`scores` (1, V) without the tokens that may not come next. Raises MixoffError if none may."""
        allowed = torch.frombuffer(bytearray(self.matcher.compute_logit_bias()), dtype=torch.uint8) != 0
        if self.matcher.is_error():
            raise MixoffError(f"the grammar of response_format failed: {one_line(self.matcher.get_error())}")
        known = torch.zeros(scores.shape[1], dtype=torch.bool)
        width = min(len(allowed), len(known))
        known[:width] = allowed[:width]
        return scores.masked_fill(~known, -torch.inf)

    def accept(self, token: int) -> None:
        """Note the token that was chosen."""
        self.matcher.consume_token(token)


class Grammars:
    """Makes grammars for one tokenizer, which llguidance reads once, in about a second, when the first is asked for."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, vocabulary: int, ends: frozenset[int]) -> None:
        self.tokenizer, self.vocabulary, self.ends = tokenizer, vocabulary, ends

    def of(self, asked: ResponseFormat | None) -> Grammar | None:
        """The grammar of an answer; None if any text will do. Raises MixoffError."""
        if asked is None or asked.type == "text":
            return None
        from llguidance import LLMatcher

        schema = {"type": "object"} if asked.type == "json_object" else (asked.json_schema or {}).get("schema")
        if not isinstance(schema, dict):
            raise MixoffError('response_format of type json_schema needs {"json_schema": {"schema": {...}}}')
        if not self.ends:
            raise MixoffError("response_format needs a token that ends an answer, and this model has none")
        try:
            matcher = LLMatcher(self._tokens, LLMatcher.grammar_from_json_schema(json.dumps(schema), overrides=FORM))
        except ValueError as error:
            raise MixoffError(f"response_format: {one_line(error)}") from error
        if matcher.is_error():
            raise MixoffError(f"response_format: {one_line(matcher.get_error())}")
        return Grammar(matcher)

    @functools.cached_property
    def _tokens(self) -> Any:
        from llguidance.hf import from_tokenizer

        most = max(self.vocabulary, len(self.tokenizer))
        return from_tokenizer(self.tokenizer, n_vocab=most, eos_token=sorted(self.ends))
