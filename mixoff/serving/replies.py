"""The JSON of OpenAI's answers: whole ones, and the pieces of a stream."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from mixoff.serving.sampling import Logprob

if TYPE_CHECKING:
    from mixoff.serving.row import News, Row

Json = dict[str, Any]


@dataclass
class Reply:
    """What all replies to one request have in common.

    spell: text of one token. include_usage: as in `stream_options`
    """

    model: str
    spell: Callable[[int], str]
    include_usage: bool = False
    created: int = field(default_factory=lambda: int(time.time()))

    kind = prefix = chunk_kind = ""

    def __post_init__(self) -> None:
        self.id = f"{self.prefix}-{uuid.uuid4().hex}"

    def whole(self, answers: list[News], usage: Json) -> Json:
        """The reply to a request without `stream`."""
        choices = [self.choice(i, answer) for i, answer in enumerate(answers)]
        return self._head(self.kind) | {"choices": choices, "usage": usage}

    def piece(self, choices: list[Json], usage: Json | None = None) -> Json:
        """One event of a stream; `usage` is that of its last one."""
        reply = self._head(self.chunk_kind) | {"choices": choices}
        return reply | {"usage": usage} if self.include_usage else reply

    def _head(self, kind: str) -> Json:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model}

    def first(self, index: int) -> Json | None:
        """The choice that opens a stream, if there is one."""
        return None

    def choice(self, index: int, answer: News) -> Json:
        """A whole choice."""
        raise NotImplementedError

    def deltas(self, index: int, news: News) -> Iterable[Json]:
        """The choices of a stream that tell `news`."""
        raise NotImplementedError


class ChatReply(Reply):
    """Replies of `/v1/chat/completions`."""

    kind, prefix, chunk_kind = "chat.completion", "chatcmpl", "chat.completion.chunk"

    def first(self, index: int) -> Json:
        """The role, before any text."""
        delta = {"role": "assistant", "content": ""}
        return {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}

    def choice(self, index: int, answer: News) -> Json:
        """A whole choice."""
        message = {"role": "assistant", "content": answer.text, "refusal": None}
        logprobs = self._logprobs(answer.logprobs)
        return {"index": index, "message": message, "logprobs": logprobs, "finish_reason": answer.reason}

    def deltas(self, index: int, news: News) -> Iterable[Json]:
        """A piece of text, then the reason."""
        if news.text or news.logprobs:
            logprobs = self._logprobs(news.logprobs)
            delta = {"content": news.text}
            yield {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": None}
        if news.reason:
            yield {"index": index, "delta": {}, "logprobs": None, "finish_reason": news.reason}

    def _logprobs(self, logprobs: list[Logprob]) -> Json | None:
        if not logprobs:
            return None
        content = [
            self._one(p.token, p.logprob) | {"top_logprobs": [self._one(*best) for best in p.best]} for p in logprobs
        ]
        return {"content": content, "refusal": None}

    def _one(self, token: int, logprob: float | None) -> Json:
        text = self.spell(token)
        return {"token": text, "logprob": logprob, "bytes": None if "\ufffd" in text else list(text.encode())}


class TextReply(Reply):
    """Replies of `/v1/completions`."""

    kind = chunk_kind = "text_completion"
    prefix = "cmpl"

    def __post_init__(self) -> None:
        super().__post_init__()
        self._offsets: dict[int, int] = {}  # characters of each choice that a stream has reported

    def choice(self, index: int, answer: News) -> Json:
        """A whole choice."""
        logprobs = self._logprobs(answer.logprobs, 0)
        return {"index": index, "text": answer.text, "logprobs": logprobs, "finish_reason": answer.reason}

    def deltas(self, index: int, news: News) -> Iterable[Json]:
        """A piece of text, with the reason if it is the last one."""
        if not (news.text or news.logprobs or news.reason):
            return
        at = self._offsets.get(index, 0)
        self._offsets[index] = at + sum(len(self.spell(p.token)) for p in news.logprobs)
        logprobs = self._logprobs(news.logprobs, at)
        yield {"index": index, "text": news.text, "logprobs": logprobs, "finish_reason": news.reason}

    def _logprobs(self, logprobs: list[Logprob], at: int) -> Json | None:
        if not logprobs:
            return None
        tokens = [self.spell(p.token) for p in logprobs]
        best = [{self.spell(token): logprob for token, logprob in p.best} or None for p in logprobs]
        offsets = [at + sum(map(len, tokens[:i])) for i in range(len(tokens))]
        values = [p.logprob for p in logprobs]
        return {"tokens": tokens, "token_logprobs": values, "top_logprobs": best, "text_offset": offsets}


def usage(rows: list[Row], n: int) -> Json:
    """Tokens of a request with `n` answers per prompt: each prompt counts once."""
    prompt, new = sum(len(row.prompt) for row in rows[::n]), sum(row.count for row in rows)
    return {"prompt_tokens": prompt, "completion_tokens": new, "total_tokens": prompt + new}


def error(message: str, status: int, param: str | None = None, code: str | None = None) -> Json:
    """OpenAI's form of an error."""
    kinds = {401: "authentication_error", 404: "not_found_error", 413: "request_too_large", 429: "rate_limit_error"}
    kind = kinds.get(status, "invalid_request_error" if status < 500 else "server_error")
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def models(name: str, context: int, created: int) -> Json:
    """The reply of `/v1/models`."""
    model = {"id": name, "object": "model", "created": created, "owned_by": "mixoff", "context_length": context}
    return {"object": "list", "data": [model]}
