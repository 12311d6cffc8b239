"""A conversation with a model: each question is sent with the turns before it, formatted by the model's template."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from mixoff.errors import MixoffError
from mixoff.text import generation

if TYPE_CHECKING:
    from types import FrameType

    from transformers import PreTrainedModel, PreTrainedTokenizerBase


# for models without chat training: the turns, one per line, for the model to continue
PLAIN = "{{ bos_token }}{% for message in messages %}{{ message['content'] }}\n{% endfor %}"
Message = dict[str, str]
INSTRUCTIONS = ("system", "developer")  # roles of messages that apply to the whole conversation
MOST_LINES = 1_000_000  # limit for a template: a thousand messages take about 20,000 lines
TEMPLATE = "<template>"  # file name in frames of code that jinja has compiled


@dataclass
class Chat:
    """Turns of a conversation. Built in notebooks/15.

    A tokenizer without a chat template gets PLAIN, and `own_template` is False.

    messages: dicts of `role` (`user` or `assistant`) and `content`, oldest first; the oldest are dropped when messages
        and answer exceed `context` tokens, except `system` messages at the beginning
    context: tokens; None is the model's own limit
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    messages: list[Message] = field(default_factory=list)
    context: int | None = None

    @property
    def own_template(self) -> bool:
        """Whether the model comes with a template for conversations."""
        return bool(self.tokenizer.chat_template)

    @property
    def limit(self) -> int | None:
        """Tokens of messages and answer together, at most; None for a model without a limit."""
        return self.context or getattr(self.model.config.get_text_config(), "max_position_embeddings", None)

    def ask(self, text: str, max_new_tokens: int = 128, **options: Any) -> generation.Generation:
        """The answer to `text`; both join the conversation. options: as for `generation.generate`.

        Raises MixoffError if the question alone and `max_new_tokens` exceed the context.
        """
        context = self.limit
        messages = [*self.messages, {"role": "user", "content": text}]
        if context:
            messages = recent(messages, lambda part: len(self._ids(part)), context - max_new_tokens)
        options = {"add_special_tokens": False, **options}
        answer = generation.generate(self.model, self.tokenizer, self.prompt(messages), max_new_tokens, **options)
        self.messages = [*messages, {"role": "assistant", "content": answer.text.strip()}]
        return answer

    def prompt(self, messages: list[Message], variables: dict[str, Any] | None = None) -> str:
        """The text of `messages` for the model, with special tokens. Raises MixoffError if the template fails.

        variables: what the template may read next to the messages, such as `enable_thinking`
        """
        template = None if self.own_template else PLAIN  # None is the tokenizer's own
        try:
            with bounded():
                return self.tokenizer.apply_chat_template(
                    messages,
                    **(variables or {}) | {"chat_template": template, "tokenize": False, "add_generation_prompt": True},
                )
        except MixoffError:
            raise
        except Exception as error:  # templates raise errors of any kind; users need only one
            reason = (str(error).strip() or type(error).__name__).split("\n")[0]
            raise MixoffError(
                f"the model's chat template refuses these messages: {reason}; change the messages, their roles or "
                "their order, or set tokenizer.chat_template"
            ) from error

    def _ids(self, messages: list[Message]) -> list[int]:
        return self.tokenizer(self.prompt(messages), add_special_tokens=False)["input_ids"]


@contextmanager
def bounded(most: int = MOST_LINES) -> Iterator[None]:
    """Stops a chat template, which comes from a model's files, with a MixoffError after `most` lines on this thread.

    jinja compiles a template to Python, and its sandbox forbids calls but not nested loops. Python's trace function
    counts each line of such code, so this needs no clock, thread or process. One long line, such as a power of two
    large numbers, is not bounded. A debugger needs the trace function itself, so under one nothing is bounded.
    """
    lines = 0

    def line(_frame: FrameType, event: str, _argument: object) -> Callable:
        nonlocal lines
        lines += event == "line"
        if lines > most:
            raise MixoffError(
                f"the model's chat template runs more than {most:,} lines, so it may never end: do not trust this "
                "model, or set tokenizer.chat_template"
            )
        return line

    before = sys.gettrace()
    if before is None:
        sys.settrace(lambda frame, _event, _argument: line if frame.f_code.co_filename == TEMPLATE else None)
    try:
        yield
    finally:
        sys.settrace(before)


def recent(messages: list[Message], count: Callable[[list[Message]], int], room: int) -> list[Message]:
    """The most messages from a question to the end with a `count` of at most `room`; at least the last question.

    System messages before the first question stay too, and are counted.

    >>> turns = [{"role": role, "content": "a b"} for role in ("user", "assistant", "user")]
    >>> words = lambda part: sum(len(message["content"].split()) for message in part)
    >>> [len(recent(turns, words, room)) for room in (6, 5, 2, 1)]
    [3, 1, 1, 1]
    >>> [message["role"] for message in recent([{"role": "system", "content": "a"}, *turns], words, 3)]
    ['system', 'user']
    """
    questions = [i for i, message in enumerate(messages) if message["role"] == "user"]
    before = [message for message in messages[: questions[0]] if message["role"] in INSTRUCTIONS]
    first = next((i for i in questions if count(before + messages[i:]) <= room), questions[-1])
    return before + messages[first:]
