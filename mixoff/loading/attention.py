"""Attention on cards below sm_80: PyTorch's SDPA without its MATH backend.

Letters: **B** sequences, **H** heads, **J** heads of keys and values, **R** = H/J, **T** queries, **U** keys,
**D** width of a head.
transformers passes grouped keys to SDPA as they are (`enable_gqa`). Below sm_80 only the MATH backend takes them, which
allocates scores (B, H, T, U) in fp32 several times: 0.5 GB each for a prompt of 2,048 tokens of Mixtral. The backend
that is efficient there needs keys and values of every head.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

if TYPE_CHECKING:
    from transformers import PreTrainedModel

GROUPED_SM = (8, 0)  # the oldest chip whose flash kernel takes grouped keys
NAME = "mixoff_sdpa"


def attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """`sdpa_attention_forward` for queries (B, H, T, D), keys and values (B, J, U, D), without grouped keys.

    -> (B, T, H, D). A single query takes its R heads per key as R queries instead of R copies of the keys.
    """
    B, H, T, D = query.shape
    R = getattr(module, "num_key_value_groups", 1)
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    plain: Any = SimpleNamespace(is_causal=causal)  # has no groups, so nothing is left to repeat
    shared = attention_mask is None or attention_mask.shape[1] == 1
    if T == 1 and R > 1 and shared and kwargs.get("position_bias") is None:
        packed = query.reshape(B, H // R, R, D)
        out, _ = sdpa_attention_forward(plain, packed, key, value, attention_mask, is_causal=False, **kwargs)
        return out.transpose(1, 2).reshape(B, 1, H, -1), None
    key, value = repeat_kv(key, R), repeat_kv(value, R)
    return sdpa_attention_forward(plain, query, key, value, attention_mask, is_causal=causal, **kwargs)


def fit(model: PreTrainedModel, sm: tuple[int, int]) -> None:
    """Let a model that attends by SDPA use `attention` on a chip below GROUPED_SM."""
    if sm >= GROUPED_SM or model.config._attn_implementation != "sdpa":
        return
    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    model.set_attn_implementation(NAME)
