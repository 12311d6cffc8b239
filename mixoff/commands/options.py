"""Options that several commands share: each function adds the option of its name.

add: the `add_argument` of a command's parser.
"""

from __future__ import annotations

from collections.abc import Callable

from mixoff.commands import arguments

PATH = "store or checkpoint folder, GGUF file, bundled model, Hub id, its address, or a short name such as mixtral-8x7b"
SCHEMES = f"{', '.join(arguments.SCHEMES[:-1])} or {arguments.SCHEMES[-1]}; mixed+head8 has the head in 8 bits too"


def max_new_tokens(add: Callable, default: int) -> None:
    """`--max-new-tokens`, at least 1."""
    kind = arguments.whole("max_new_tokens", "ask for at least one token")
    add("--max-new-tokens", type=kind, default=default, metavar="N", help="largest number of tokens to generate")


def fast_bytes(add: Callable, default: str = "auto") -> None:
    """`--fast-bytes`: a size with or without a unit, or `auto`."""
    text = "bytes of experts in the fast tier, as in 500MB or 6GiB; auto: 6GiB, or the free memory of a GPU"
    add("--fast-bytes", type=arguments.size_or_auto, default=default, metavar="SIZE", help=text)


def scheme(add: Callable, text: str, default: str | None = None) -> None:
    """`--scheme`, a preset, on request with an ending; SCHEMES in `text` is replaced by their names."""
    endings = [f"{name}+{head}" for name in arguments.SCHEMES if name != "keep" for head in arguments.HEADS]
    kind = arguments.choice("scheme", arguments.SCHEMES, dict(zip(endings, endings, strict=True)))
    add("--scheme", type=kind, default=default, help=text.replace("SCHEMES", SCHEMES))


def prefetch(add: Callable, text: str = "") -> None:
    """`--prefetch`; `text` continues its help."""
    kind = arguments.choice("prefetch", arguments.PREFETCH)
    add("--prefetch", type=kind, default="auto", help=f"guesses of the next experts: auto, none or next-router{text}")


def io(add: Callable) -> None:
    """`--io`: how experts are read from disk."""
    kind = arguments.choice("io", arguments.IO)
    add("--io", type=kind, default="auto", help="reads: auto, direct (past the page cache) or buffered")


def threads(add: Callable, text: str, default: int | None = None, name: str = "threads") -> None:
    """`--threads`, or another `name` for it."""
    kind = arguments.whole(name, "give at least one thread, of at most 1024", 1, 1024)
    add(f"--{name}", type=kind, default=default, metavar="N", help=text)


def seed(add: Callable, default: int = 0) -> None:
    """`--seed`, any 64-bit number, signed or unsigned."""
    kind = arguments.whole("seed", "give a whole number of at most 64 bits", -(2**63), 2**64 - 1)
    add("--seed", type=kind, default=default, metavar="N", help="random seed for sampling")


def loading(add: Callable) -> None:
    """How a model is loaded: budget, precision, cache, reads, device, context and threads."""
    choice, whole = arguments.choice, arguments.whole
    fast_bytes(add)
    scheme(add, "quantize a plain checkpoint first, and keep the result: SCHEMES")
    text = "pools of slots: 'layer', one per MoE layer, or 'global', one for all layers"
    add("--scope", type=choice("scope", arguments.SCOPES), default="layer", help=text)
    add("--policy", type=arguments.policy, default="lru", help="policy that chooses the expert to evict")
    text = "bytes of expert copies in RAM, between fast tier and disk (default none)"
    add("--ram-bytes", type=arguments.size, metavar="SIZE", help=text)
    prefetch(add)
    io(add)
    add("--device", type=arguments.device, default="auto", help="auto, cpu, cuda or cuda:N; auto prefers a GPU")
    dtype = choice("dtype", arguments.DTYPES, arguments.SHORT)
    add("--dtype", type=dtype, default="auto", help="dtype of computation: auto, float32, bfloat16 or float16")
    text = "largest number of tokens, prompt and new ones together (default the model's)"
    add("--context", type=whole("context", "give at least two tokens", 2), metavar="N", help=text)
    threads(add, "threads that compute (default all cores)")
    kv_bits(add)
    decode(add)


def decode(add: Callable) -> None:
    """`--decode`: what computes single tokens."""
    text = "single tokens of a quantized model on a CPU: compiled is faster, modules are transformers' own"
    add("--decode", type=arguments.choice("decode", arguments.DECODE), default="compiled", help=text)


def kv_bits(add: Callable) -> None:
    """`--kv-bits`: 4, 8, or None for 16."""
    text = "bits of keys and values: 4 or 8 are smaller and not exact, and need hqq (default 16, or 32 in float32)"
    add("--kv-bits", type=arguments.kv_bits, metavar="B", help=text)


def sampling(add: Callable, temperature: float) -> None:
    """How the next token is chosen, and where a text ends: names as in `generation.generate`."""
    real, whole = arguments.real, arguments.whole
    kind = real("temperature", "give 0, which is greedy, or a positive number")
    add("--temperature", type=kind, default=temperature, metavar="X", help="sampling temperature; 0 is greedy")
    kind = real("top_p", "give a share above 0, up to 1", 1e-9, 1.0)
    add("--top-p", type=kind, metavar="P", help="sample from the likeliest tokens of this total share (default all)")
    top_k = whole("top_k", "give a whole number of at least 1", 1, 2**31 - 1)
    add("--top-k", type=top_k, metavar="K", help="sample from this many likeliest tokens (default all)")
    text = "sample from tokens with this share of the likeliest one's probability (default all)"
    add("--min-p", type=real("min_p", "give a share from 0 to 1", 0.0, 1.0), metavar="P", help=text)
    seed(add)
    add("--stop", type=arguments.words, action="append", metavar="TEXT", help="text to end after; may be repeated")


SAMPLING = ("temperature", "seed", "top_p", "top_k", "min_p", "stop")
