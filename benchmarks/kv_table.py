"""Prices the quantized cache of keys and values on the bundled model: divergence per token, and bytes per token.

    python benchmarks/kv_table.py [--chunk 16] [--windows 2]

Windows of held-out text pass through the model in chunks, as a long answer would token by token. Every chunk reads the
keys and values of those before it, in 16, 8 or 4 bits; the weights are the same. Divergences are in nats per token,
KL(exact || quantized), over all tokens but the first chunk, with the standard error over windows.
"""

from __future__ import annotations

import argparse
import math

import torch
from transformers import DynamicCache
from transformers.cache_utils import QuantizedCache

from mixoff import models
from mixoff.bench.budgets import resident_model
from mixoff.shapes import kv_cache
from mixoff.shapes.kv_cache import advance, cache_options
from mixoff.shapes.shape import from_config
from mixoff.text.generation import load_tokenizer

CONTEXT = 512  # tokens of a window: the model's own context


def windows(tokenizer, per_domain):
    """Windows (W, CONTEXT) of held-out text, `per_domain` of each domain."""
    rows = []
    for text in models.heldout().values():
        ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        rows += [[tokenizer.bos_token_id, *ids[at : at + CONTEXT - 1]] for at in range(0, per_domain * 1000, 1000)]
    return torch.tensor(rows)


@torch.no_grad()
def log_probabilities(model, ids, cache, chunk):
    """Logarithms of the next token's probabilities (T, V) along one window ids (1, T), read in chunks."""
    pieces = []
    for piece in ids.split(chunk, 1):
        logits, cache = advance(model, piece, cache)
        pieces.append(logits[0].float().log_softmax(-1))
    return torch.cat(pieces), cache


def divergences(model, rows, bits, chunk):
    """KL per token of each window."""
    found = []
    for ids in rows.split(1):
        exact, _ = log_probabilities(model, ids, DynamicCache(config=model.config), chunk)
        options = cache_options(model.config, bits)
        other, _ = log_probabilities(model, ids, QuantizedCache(config=model.config, **options), chunk)
        found.append((exact.exp() * (exact - other)).sum(-1)[chunk:].mean().item())
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--chunk", type=int, default=16)
    parser.add_argument("--windows", type=int, default=2, help="windows per domain")
    args = parser.parse_args()
    torch.set_num_threads(1)
    model, tokenizer = resident_model(), load_tokenizer(models.path())
    rows = windows(tokenizer, args.windows)
    shape = from_config(model.config, "tiny-mixtral", "float16")
    print(f"{len(rows)} windows of {CONTEXT} tokens, in chunks of {args.chunk}")
    for bits in (None, *kv_cache.BITS):
        nbytes = shape.with_kv_bits(bits).kv_nbytes(4096) / 4096
        kl = divergences(model, rows, bits, args.chunk) if bits else [0.0, 0.0]
        mean = sum(kl) / len(kl)
        error = math.sqrt(sum((x - mean) ** 2 for x in kl) / (len(kl) - 1) / len(kl))
        print(f"{bits or 16:>3} bits: {nbytes:6.0f} bytes per token at 4096 tokens, KL {mean:.5f} +- {error:.5f} nats")


if __name__ == "__main__":
    main()
