"""A conversation with a model: questions are asked with the turns before them, as the model's own template writes them.

Does not know where the experts are, nor how text is shown.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from mixoff.errors import MixoffError
from mixoff.text import generation

if TYPE_CHECKING:
    from types import FrameType

    from transformers import PreTrainedModel, PreTrainedTokenizerBase


# for models that were never taught to chat: what was said, turn by turn, and the model continues it
PLAIN = "{{ bos_token }}{% for message in messages %}{{ message['content'] }}\n{% endfor %}"
Message = dict[str, str]
INSTRUCTIONS = ("system", "developer")  # roles of what is said before a conversation, and holds for all of it
MOST_LINES = 1_000_000  # that a template may run: a thousand messages take some 20,000
TEMPLATE = "<template>"  # the file that jinja names in frames of what it has compiled


@dataclass
class Chat:
    """Turns of a conversation. Built in notebooks/15.

    messages: dicts of `role` (`user` or `assistant`) and `content`, oldest first; what no longer fits into `context`
    tokens, the answer's included, is forgotten, but for those of role `system` that come first. context: None is the
    model's own. A tokenizer without a chat template gets PLAIN, and `own_template` is False.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    messages: list[Message] = field(default_factory=list)
    context: int | None = None

    @property
    def own_template(self) -> bool:
        """Whether the model comes with a template for conversations."""
        return bool(self.tokenizer.chat_template)

    def ask(self, text: str, max_new_tokens: int = 128, **how: object) -> generation.Generation:
        """The answer to `text`, which joins the conversation with it. how: as for `generation.generate`.

        Raises MixoffError where the question alone, and so many new tokens, exceed the context.
        """
        context = self.context or getattr(self.model.config, "max_position_embeddings", None)
        messages = [*self.messages, {"role": "user", "content": text}]
        if context:
            messages = recent(messages, lambda part: len(self._ids(part)), context - max_new_tokens)
        how = {"add_special_tokens": False} | how
        answer = generation.generate(self.model, self.tokenizer, self.prompt(messages), max_new_tokens, **how)
        self.messages = [*messages, {"role": "assistant", "content": answer.text.strip()}]
        return answer

    def prompt(self, messages: list[Message]) -> str:
        """What the model reads, special tokens written out. Raises MixoffError where the template refuses it."""
        how = {} if self.own_template else {"chat_template": PLAIN}
        try:
            with bounded():
                return self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, **how)
        except MixoffError:
            raise
        except Exception as error:  # templates raise any kind; to the user all of them are one
            reason = (str(error).strip() or type(error).__name__).split("\n")[0]
            raise MixoffError(
                f"the model's chat template refuses these messages: {reason}; change the messages, their roles or "
                "their order, or set tokenizer.chat_template"
            ) from error

    def _ids(self, messages: list[Message]) -> list[int]:
        return self.tokenizer(self.prompt(messages), add_special_tokens=False)["input_ids"]


@contextmanager
def bounded(most: int = MOST_LINES) -> Iterator[None]:
    """Ends a chat template of this thread, which comes from a model's files, after `most` lines, by a MixoffError.

    jinja compiles a template to Python, and its sandbox forbids calls but not loops in loops. Python's trace function
    sees each line of such code alone, so a limit of lines needs no clock, no thread and no process. What one line asks
    of C, as a power of two large numbers, is not bounded. Under a debugger, which needs that function, nothing is.
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
    """The latest messages, from a question on, of which `count` is at most `room`; the last question in any case.

    System messages before the first question stay too, and count.

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
