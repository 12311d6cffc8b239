"""Keys and values in 4 or 8 bits, by transformers' own quantized cache: `generate` then makes one for each text."""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING

from mixoff.errors import MixoffError
from mixoff.shapes import kv_cache
from mixoff.shapes.shape import from_config

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def quantize_cache(model: PreTrainedModel, bits: int) -> None:
    """Let `model.generate` keep keys and values in `bits`. Raises MixoffError if that cannot be.

    Tested against the bytes that a plan counts. docs/quantization.md has its price.
    """
    from_config(model.config, "this model").with_kv_bits(bits)
    if find_spec("hqq") is None:
        raise MixoffError("kv_bits needs the package hqq: pip install 'mixoff[kv]'")
    model.generation_config.cache_implementation = "quantized"
    model.generation_config.cache_config = kv_cache.cache_options(model.config, bits)
