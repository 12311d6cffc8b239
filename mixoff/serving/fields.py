"""What a request may ask: OpenAI's fields, those that llama.cpp and vLLM have in common, and no others.

A field that would change the answer and is not known is refused, as OpenAI does. A field that cannot change it
(`user`, `metadata`) is ignored.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from mixoff.errors import MixoffError, suggestion

MOST_ANSWERS, MOST_STOPS, MOST_LOGPROBS, MOST_BIASES = 128, 16, 20, 1024
# they say something about the request, not about the answer
IGNORED = (
    "user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "prompt_cache_retention",
    "parallel_tool_calls", "cache_prompt",
)  # fmt: skip
WAYS_OUT = {
    "tools": "ask for JSON with response_format",
    "tool_choice": "ask for JSON with response_format",
    "functions": "ask for JSON with response_format",
    "function_call": "ask for JSON with response_format",
    "suffix": "put the text that follows into the prompt",
    "best_of": "ask for n answers, and choose one by their logprobs",
    "modalities": "this server answers with text",
    "audio": "this server answers with text",
    "prediction": "leave it out",
    "web_search_options": "leave it out",
    "reasoning_effort": "say it in chat_template_kwargs, if the model's template knows it",
    "verbosity": "say it in a system message",
    "grammar": "ask for a JSON schema with response_format",
}
Probability = Annotated[float, Field(ge=0, le=1)]
Penalty = Annotated[float, Field(ge=-2, le=2)]


class StreamOptions(BaseModel):
    """Options of a stream."""

    model_config = ConfigDict(extra="ignore", strict=True)
    include_usage: bool = False


class ResponseFormat(BaseModel):
    """The form of an answer. json_schema: an object with `schema`."""

    model_config = ConfigDict(extra="forbid", strict=True)
    type: Literal["text", "json_object", "json_schema"] = "text"
    json_schema: dict[str, Any] | None = None


class Asked(BaseModel):
    """Fields that both endpoints know; None is the default, as OpenAI's clients send it."""

    model_config = ConfigDict(extra="allow", strict=True, allow_inf_nan=False)
    model: str
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: Annotated[int, Field(ge=1, le=MOST_ANSWERS)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**64)] | None = None
    stop: str | list[str] | None = None
    temperature: Annotated[float, Field(ge=0, le=100)] | None = None
    top_p: Probability | None = None
    top_k: Annotated[int, Field(ge=-1, lt=2**31)] | None = None
    min_p: Probability | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=100)] | None = None
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100)]] | None = None
    ignore_eos: bool | None = None
    response_format: ResponseFormat | None = None

    @model_validator(mode="after")
    def _known(self) -> Asked:
        for name, value in (self.model_extra or {}).items():
            if value is None or name in IGNORED or value in (False, [], {}, "none", "auto"):
                continue
            if name in WAYS_OUT:
                raise ValueError(f"{name} is not supported: {WAYS_OUT[name]}")
            raise ValueError(f"unknown field {name[:100]!r}{suggestion(name, type(self).model_fields)}")
        return self

    @property
    def stops(self) -> tuple[str, ...]:
        """Texts that end an answer. Raises MixoffError."""
        stops = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        if len(stops) > MOST_STOPS:
            raise MixoffError(f"stop has {len(stops)} texts: give at most {MOST_STOPS}")
        return tuple(stop for stop in stops if stop)


class ChatAsked(Asked):
    """A request for `/v1/chat/completions`."""

    messages: Annotated[list[dict[str, Any]], Field(min_length=1)]
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MOST_LOGPROBS)] | None = None
    chat_template_kwargs: dict[str, Any] | None = None

    @property
    def limit(self) -> int | None:
        """Largest number of new tokens."""
        return self.max_completion_tokens or self.max_tokens

    @property
    def best(self) -> int | None:
        """Alternatives to report per token; None reports no log-probability. Raises MixoffError."""
        if self.top_logprobs is not None and not self.logprobs:
            raise MixoffError("top_logprobs needs logprobs: true")
        return (self.top_logprobs or 0) if self.logprobs else None

    def turns(self) -> list[dict[str, Any]]:
        """The messages, each with its text. Raises MixoffError for images, sounds and files."""
        return [message | {"content": _text(message)} for message in self.messages]


class TextAsked(Asked):
    """A request for `/v1/completions`."""

    prompt: str | list[str] | list[int] | list[list[int]]
    max_tokens: Annotated[int, Field(ge=0)] | None = None
    logprobs: Annotated[int, Field(ge=0, le=MOST_LOGPROBS)] | bool | None = None
    echo: bool | None = None

    @property
    def limit(self) -> int | None:
        """Largest number of new tokens; OpenAI's default is 16."""
        return 16 if self.max_tokens is None else self.max_tokens

    @property
    def best(self) -> int | None:
        """Alternatives to report per token; None reports no log-probability."""
        if isinstance(self.logprobs, bool):
            return 1 if self.logprobs else None
        return self.logprobs

    def prompts(self) -> list[str | list[int]]:
        """The prompts, each a text or a list of tokens. Raises MixoffError if there is none."""
        given: Any = self.prompt
        prompts = [given] if isinstance(given, str) or (given and isinstance(given[0], int)) else list(given)
        if not prompts:
            raise MixoffError("prompt is an empty list: give a text, or a list of texts")
        if len(prompts) * (self.n or 1) > MOST_ANSWERS:  # before any is read: a small body can ask for very many
            asked = f"{len(prompts)} prompts with {self.n or 1} answers each"
            raise MixoffError(f"the request asks for {asked}: ask for at most {MOST_ANSWERS} answers at once")
        return prompts


def _text(message: dict[str, Any]) -> str:
    """The text of a message, whose content may be a list of parts."""
    if not isinstance(message.get("role"), str):
        raise MixoffError("a message needs a role: system, user or assistant")
    content = message.get("content")
    parts = [{"type": "text", "text": content}] if isinstance(content, str) or content is None else content
    if not isinstance(parts, list) or not all(isinstance(part, dict) for part in parts):
        raise MixoffError("the content of a message is a text, or a list of parts")
    for part in parts:
        if part.get("type") not in ("text", "input_text") or not isinstance(part.get("text") or "", str):
            raise MixoffError(f"a message holds a part of type {part.get('type')!r}: this server reads text only")
    return "".join(part.get("text") or "" for part in parts)
