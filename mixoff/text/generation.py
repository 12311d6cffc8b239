"""Text from any transformers model, token by token, with times."""

from __future__ import annotations

import math
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from mixoff.errors import CheckpointError, MixoffError

if TYPE_CHECKING:
    from pathlib import Path

    import torch
    from transformers import BatchEncoding, PreTrainedModel, PreTrainedTokenizerBase
    from transformers.generation.streamers import BaseStreamer


CUT = "\ufffd"  # decoded in place of bytes that are not a character, or not yet
# overrides of generation_config.json where it asks for what cannot be streamed as one text
ONE_TEXT = {
    "num_beams": 1, "num_return_sequences": 1, "return_dict_in_generate": False, "use_cache": True,
    "prompt_lookup_num_tokens": None, "penalty_alpha": None, "dola_layers": None, "assistant_early_exit": None,
    "max_length": None, "min_length": 0, "max_time": None,
}  # fmt: skip


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen. Raises MixoffError for values out of range.

    temperature: 0 always takes the likeliest token
    seed: seed of random choices
    top_p: sample only from the likeliest tokens with this share of the probability; None is all
    top_k: sample only from this many likeliest tokens; None is all
    min_p: sample only from tokens with at least this share of the likeliest one's probability; None is all
    """

    temperature: float = 0.0
    seed: int = 0
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None

    def __post_init__(self) -> None:
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise MixoffError(f"temperature is {self.temperature}: give 0, which is greedy, or a positive number")
        if type(self.seed) is not int or not -(2**63) <= self.seed < 2**64:
            raise MixoffError(f"seed is {self.seed}: give a whole number of at most 64 bits")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise MixoffError(f"top_p is {self.top_p}: give a share above 0, up to 1")
        if self.top_k is not None and not 0 < self.top_k < 2**31:
            raise MixoffError(f"top_k is {self.top_k}: give a whole number of at least 1")
        if self.min_p is not None and not 0 <= self.min_p <= 1:
            raise MixoffError(f"min_p is {self.min_p}: give a share from 0 to 1")

    def options(self) -> dict:
        """The same as arguments of transformers' `generate`."""
        if self.temperature > 0:
            limits = {"top_k": self.top_k or 0, "min_p": self.min_p}
            limits |= {} if self.top_p is None else {"top_p": self.top_p}
            return {"do_sample": True, "temperature": self.temperature} | limits
        # given, or transformers warns that the model's own sampling parameters are not used
        return {"do_sample": False, "temperature": None, "top_p": None, "top_k": None, "min_p": None}


@dataclass
class Generation:
    """New tokens only. times_s: when each came, in seconds after the start; the first includes reading the prompt."""

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    times_s: list[float] = field(default_factory=list)
    prompt_tokens: int = 0

    @property
    def tokens_per_s(self) -> float:
        """Speed of decoding: tokens after the first over their time; with a single token, that of the token."""
        if len(self.times_s) < 2:
            return 1 / self.times_s[0]
        return (len(self.times_s) - 1) / (self.times_s[-1] - self.times_s[0])

    @property
    def first_s(self) -> float:
        """Seconds until the first token."""
        return self.times_s[0]

    @property
    def prompt_tokens_per_s(self) -> float:
        """Speed of reading the prompt, including the choice of the first token."""
        return self.prompt_tokens / self.first_s


class Decoder:
    """Text of tokens as they arrive: `add` returns text that is final, `end` the rest.

    Each step decodes the last piece again together with the new tokens, since the first token of a text may be decoded
    differently. The work per step does not grow with the text. Tested against decoding all tokens at once.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer, self.text = tokenizer, ""
        self.ids: list[int] = []
        self.before, self.read = 0, 0  # index of the first token of the last piece, and of the first undecoded one

    def add(self, ids: list[int]) -> str:
        """Add tokens; returns new text, empty while a character is incomplete."""
        self.ids += ids
        known, new = self._decode(self.before, self.read), self._decode(self.before, len(self.ids))
        if len(new) <= len(known) or new.endswith(CUT):  # the bytes of a character may come in several tokens
            return ""
        self.before, self.read = self.read, len(self.ids)
        return self._certain(new[len(known) :])

    def end(self) -> str:
        """The text of all tokens that `add` has not returned."""
        whole = self._decode(0, len(self.ids))
        return self._certain(whole[len(self.text) :] if whole.startswith(self.text) else "")

    def _certain(self, piece: str) -> str:
        self.text += piece
        return piece

    def _decode(self, first: int, last: int) -> str:
        return self.tokenizer.decode(self.ids[first:last], skip_special_tokens=True)


class _Clock:
    """A transformers streamer: notes each new token and its time, and passes on text that is final."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, on_text: Callable[[str], None] | None, other: BaseStreamer | None
    ) -> None:
        self.on_text, self.other = on_text, other
        self.decoder, self.result = Decoder(tokenizer), Generation()
        self.prompt_seen = False
        self.start = time.perf_counter()

    def put(self, ids: torch.Tensor) -> None:
        """Receive the prompt, then each new token."""
        if self.other:
            self.other.put(ids)
        if not self.prompt_seen:  # transformers hands over the prompt first
            self.prompt_seen, self.result.prompt_tokens = True, ids.numel()
            return
        self.result.times_s.append(time.perf_counter() - self.start)
        new = ids.flatten().tolist()
        self.result.token_ids += new
        self._say(self.decoder.add(new))

    def end(self) -> None:
        self._say(self.decoder.end())
        if self.other:
            self.other.end()

    def _say(self, piece: str) -> None:
        self.result.text = self.decoder.text
        if piece and self.on_text:
            self.on_text(piece)


class _Ended:
    """A stopping criterion of transformers: asks a function after each token."""

    def __init__(self, ended: Callable[[], bool]) -> None:
        self.ended = ended

    def __call__(self, ids: torch.Tensor, _scores: object, **_options: object) -> torch.Tensor:
        import torch

        return torch.full((ids.shape[0],), self.ended(), dtype=torch.bool, device=ids.device)


def load_tokenizer(folder: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer in `folder`, never running code from it. Raises CheckpointError."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except Exception as error:  # transformers raises many kinds here; users need only one
        reason = str(error).strip().split("\n")[0]
        raise CheckpointError(f"{folder} has no tokenizer that transformers can load: {reason}") from error


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
    *,
    top_p: float | None = None,
    top_k: int | None = None,
    min_p: float | None = None,
    stop: list[str] | None = None,
    context: int | None = None,
    ended: Callable[[], bool] | None = None,
) -> Generation:
    """Continue `prompt`.

    Raises MixoffError if the context leaves no room, and if the model computes numbers that are not finite.

    Parameters
    ----------
    model, tokenizer: any causal language model of transformers
    prompt: text to continue
    max_new_tokens: new tokens, at most
    temperature, seed, top_p, top_k, min_p: as in `Sampling`; temperature 0 is greedy
    on_text: function that gets each new piece of text
    streamer: transformers streamer that gets each token too
    add_special_tokens: False if the prompt spells them out, as chat templates do
    stop: texts after which generation ends
    context: limit on prompt and new tokens together; None is the model's own
    ended: asked after each token whether to end there
    """
    import torch

    sampling = Sampling(temperature, seed, top_p, top_k, min_p)
    ids = encode(model, tokenizer, prompt, add_special_tokens).to(model.device)
    limits = [n for n in (context, getattr(model.config, "max_position_embeddings", None)) if n]
    _check_room(ids["input_ids"].shape[1], max_new_tokens, min(limits, default=None))
    options = ONE_TEXT | sampling.options() | ({"stop_strings": stop} if stop else {})
    options |= {"stopping_criteria": [_Ended(ended)]} if ended else {}
    torch.manual_seed(seed)
    clock = _Clock(tokenizer, on_text, streamer)
    options |= _cache(model)
    end = model.generation_config.eos_token_id
    options |= {"pad_token_id": end[0] if isinstance(end, list) else end, "max_new_tokens": max_new_tokens}
    with _explained(model):
        model.generate(**ids, **options, streamer=clock, tokenizer=tokenizer, logits_processor=[_Finite(model)])
    return clock.result


def _cache(model: PreTrainedModel) -> dict:
    """The cache of keys and values that the model's runtime wants, as an option of `generate`."""
    kind = getattr(getattr(getattr(model, "mixoff", None), "step", None), "cache", None)
    return {"cache_implementation": kind} if kind and model.generation_config.cache_implementation is None else {}


def encode(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: str, add_special_tokens: bool = True
) -> BatchEncoding:
    """The tokens of `prompt` as tensors (1, T), with one start token even if the text begins with it.

    Raises MixoffError for text that is not valid Unicode, and for tokens without an embedding in the model.
    """
    try:
        prompt.encode()
    except UnicodeEncodeError as error:
        raise MixoffError(f"character {error.start + 1} of the prompt is not valid Unicode: give UTF-8 text") from None
    ids = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False, add_special_tokens=add_special_tokens)
    if ids["input_ids"][0, :2].tolist() == [tokenizer.bos_token_id] * 2 and add_special_tokens:
        for name in ids:
            ids[name] = ids[name][:, 1:]
    known, most = model.config.get_text_config().vocab_size, int(ids["input_ids"].max()) if prompt else 0
    if most >= known:
        raise MixoffError(
            f"the prompt holds token {most} ({tokenizer.convert_ids_to_tokens(most)!r}), and the model has embeddings "
            f"for {known}: leave it out, or use the tokenizer that belongs to this model"
        )
    return ids


@contextmanager
def _explained(model: PreTrainedModel) -> Iterator[None]:
    """Turns errors of transformers about a model's configuration into one line."""
    begun = []
    hook = model.register_forward_pre_hook(lambda *_: begun.append(True))
    try:
        yield
    except MixoffError:
        raise
    except RuntimeError as error:
        if not _of_transformers(error):
            raise
        reason = str(error).strip().split("\n")[0]
        raise MixoffError(
            f"transformers cannot run a model with this config.json ({reason}): copy it again from its source"
        ) from error
    except (ValueError, TypeError, AttributeError, ImportError) as error:
        if begun:
            raise
        reason = str(error).strip().split("\n")[0]
        raise MixoffError(f"transformers refuses this model's generation_config.json ({reason}): correct it") from error
    finally:
        hook.remove()


def _of_transformers(error: BaseException) -> bool:
    """Whether an error was raised in transformers' code, rather than in mixoff's or a listener's."""
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    return "transformers" in frame.f_globals.get("__name__", "").split(".")[:1]


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


# Numbers that are not finite ------------------------------------------------------------------------------------------


class _Finite:
    """A logits processor that ends generation if the model computes NaN or infinite logits."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model, self.prompt_tokens = model, None

    def __call__(self, ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.prompt_tokens = self.prompt_tokens or ids.shape[1]
        if bool(scores.isnan().any() | scores.isposinf().any() | scores.isneginf().all()):
            raise MixoffError(_not_finite(self.model, ids, ids.shape[1] - self.prompt_tokens + 1))
        return scores


def _not_finite(model: PreTrainedModel, ids: torch.Tensor, token: int) -> str:
    where = first_not_finite(model, ids)
    which = f", first in {where}" if where else ""
    dtype = str(model.dtype).removeprefix("torch.")
    way_out = "its weights are damaged or not trained: download or convert it again"
    if dtype != "float32":
        way_out = f"load it with dtype float32, which has a wider range than {dtype}; if that fails too, {way_out}"
    return f"the model computes numbers that are not finite for new token {token}{which}: {way_out}"


def first_not_finite(model: PreTrainedModel, ids: torch.Tensor) -> str | None:
    """The first module whose output is not finite in one pass over ids (1, T); None if all are."""
    import torch

    found: list[str] = []

    def look(name: str, output: object) -> None:
        value = output[0] if isinstance(output, tuple) and output else output
        if not found and isinstance(value, torch.Tensor) and not bool(value.isfinite().all()):
            found.append(name)

    def hook(name: str) -> Callable:
        return lambda _module, _inputs, output: look(name, output)

    hooks = [module.register_forward_hook(hook(name)) for name, module in model.named_modules()]
    try:
        with torch.no_grad():
            model(ids, use_cache=False)
    finally:
        for handle in hooks:
            handle.remove()
    return found[0] if found else None
