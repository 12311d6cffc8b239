"""A conversation with a model: questions are asked with the turns before them, as the model's own template writes them.

Does not know where the experts are, nor how text is shown.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from mixoff import generation

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# for models that were never taught to chat: what was said, turn by turn, and the model continues it
PLAIN = "{{ bos_token }}{% for message in messages %}{{ message['content'] }}\n{% endfor %}"
Message = dict[str, str]


@dataclass
class Chat:
    """Turns of a conversation. Built in notebooks/15.

    messages: dicts of `role` (`user` or `assistant`) and `content`, oldest first; what no longer fits into `context`
    tokens, the answer's included, is forgotten. context: None is the model's own. A tokenizer without a chat template
    gets PLAIN, and `own_template` is False.
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
        """What the model reads, special tokens written out."""
        how = {} if self.own_template else {"chat_template": PLAIN}
        return self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, **how)

    def _ids(self, messages: list[Message]) -> list[int]:
        return self.tokenizer(self.prompt(messages), add_special_tokens=False)["input_ids"]


def recent(messages: list[Message], count: Callable[[list[Message]], int], room: int) -> list[Message]:
    """The latest messages, from a question on, of which `count` is at most `room`; the last question in any case.

    >>> turns = [{"role": role, "content": "a b"} for role in ("user", "assistant", "user")]
    >>> words = lambda part: sum(len(message["content"].split()) for message in part)
    >>> [len(recent(turns, words, room)) for room in (6, 5, 2, 1)]
    [3, 1, 1, 1]
    """
    questions = [i for i, message in enumerate(messages) if message["role"] == "user"]
    first = next((i for i in questions if count(messages[i:]) <= room), questions[-1])
    return messages[first:]
