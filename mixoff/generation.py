"""Text from a model, token by token, with the clock running.

Does not know where the experts are: it times any transformers model.
"""

from __future__ import annotations

import functools
import inspect
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from mixoff.errors import CheckpointError, MixoffError
from mixoff.rescue import CACHE_NAMES

if TYPE_CHECKING:
    from pathlib import Path

    import torch
    from transformers import Cache, PreTrainedModel, PreTrainedTokenizerBase
    from transformers.generation.streamers import BaseStreamer


@dataclass
class Generation:
    """New tokens only. `times_s`: when each came, in seconds after the start; the first holds the prompt's cost."""

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    times_s: list[float] = field(default_factory=list)

    @property
    def tokens_per_s(self) -> float:
        """Speed of decoding: tokens after the first over the time since then; of one token alone, its own speed."""
        if len(self.times_s) < 2:
            return 1 / self.times_s[0]
        return (len(self.times_s) - 1) / (self.times_s[-1] - self.times_s[0])


class _Clock:
    """A transformers streamer: notes each new token and when it came, and hands on the text that has become certain."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, on_text: Callable[[str], None] | None, other: BaseStreamer | None
    ) -> None:
        self.tokenizer, self.on_text, self.other, self.result = tokenizer, on_text, other, Generation()
        self.prompt_seen, self.start = False, time.perf_counter()

    def put(self, ids: torch.Tensor) -> None:
        """Take in the prompt, then each new token."""
        if self.other:
            self.other.put(ids)
        if not self.prompt_seen:  # transformers hands over the prompt first
            self.prompt_seen = True
            return
        self.result.times_s.append(time.perf_counter() - self.start)
        self.result.token_ids += ids.flatten().tolist()
        self._extend(final=False)

    def end(self) -> None:
        self._extend(final=True)
        if self.other:
            self.other.end()

    def _extend(self, final: bool) -> None:
        text = self.tokenizer.decode(self.result.token_ids, skip_special_tokens=True)
        if final or not text.endswith("\ufffd"):  # the bytes of a character may come in several tokens
            new, self.result.text = text[len(self.result.text) :], text
            if new and self.on_text:
                self.on_text(new)


def load_tokenizer(folder: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer in `folder`, never running code from it. Raises CheckpointError."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except Exception as error:  # transformers raises many kinds here; to the user all of them are one
        reason = str(error).strip().split("\n")[0]
        raise CheckpointError(f"{folder} has no tokenizer that transformers can load: {reason}") from error


def advance(
    model: PreTrainedModel, ids: torch.Tensor, cache: Cache | None = None, **how: object
) -> tuple[torch.Tensor, Cache]:
    """One pass over ids (B, T), after what `cache` holds: logits (B, T, V), and the cache, which holds them too now.

    how: what else `model` takes. Written for every transformers, which has two names for that cache.
    """
    name = _cache_name(type(model))
    out = model(ids, use_cache=True, **{name: cache}, **how)
    return out.logits, out[name]


@functools.cache
def _cache_name(model: type[PreTrainedModel]) -> str:
    return next(name for name in CACHE_NAMES if name in inspect.signature(model.forward).parameters)


def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    seed: int = 0,
    on_text: Callable[[str], None] | None = None,
    streamer: BaseStreamer | None = None,
    add_special_tokens: bool = True,
) -> Generation:
    """Continue `prompt`: greedy at temperature 0, else sampled from `seed`. `on_text` gets each new piece of text.

    streamer: hears each token too. add_special_tokens: False where the prompt spells them out, as chat templates do.
    Raises MixoffError when nothing can be generated within the model's context.
    """
    import torch

    how = {"return_token_type_ids": False, "add_special_tokens": add_special_tokens}
    ids = tokenizer(prompt, return_tensors="pt", **how).to(model.device)
    _check_room(ids["input_ids"].shape[1], max_new_tokens, getattr(model.config, "max_position_embeddings", None))
    how = {"do_sample": True, "temperature": temperature, "top_k": 0} if temperature > 0 else {"do_sample": False}
    if temperature == 0:  # or transformers warns that a sampling parameter of the model's own is not used
        how |= {"temperature": None, "top_p": None, "top_k": None}
    torch.manual_seed(seed)
    clock = _Clock(tokenizer, on_text, streamer)
    end = model.generation_config.eos_token_id
    pad = end[0] if isinstance(end, list) else end
    model.generate(**ids, **how, max_new_tokens=max_new_tokens, pad_token_id=pad, streamer=clock)
    return clock.result


def _check_room(prompt_tokens: int, new_tokens: int, context: int | None) -> None:
    if new_tokens < 1:
        raise MixoffError(f"max_new_tokens is {new_tokens}: ask for at least one token")
    if prompt_tokens < 1:
        raise MixoffError("the prompt is empty and this tokenizer adds no start token: give it at least one word")
    if context and prompt_tokens + new_tokens > context:
        raise MixoffError(
            f"{prompt_tokens} tokens of prompt and {new_tokens} new ones exceed the model's context of {context}: "
            "shorten one of them"
        )
