"""The memory that a model needs on a machine."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mixoff.errors import BudgetError
from mixoff.planning import speed
from mixoff.planning.budget import exchanged, goes_direct, plan_slots, set_aside
from mixoff.shapes import sites
from mixoff.shapes.sizes import Sizes

if TYPE_CHECKING:
    from mixoff.planning.hardware import Hardware

PROMPT_SHARE = 0.5  # share of the context that arrives in one pass, which the workspace is sized for
WIDE = 10  # vectors of the model's width that a pass holds per token: residual, norms, q, k, v, copies
LOGITS = 2  # copies of a row of logits, in fp32


# Bytes ----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Needs:
    """Bytes that a model needs on a kind of device.

    compute: dtype of the computation
    page_cache: RAM for cached files; 0 on a machine with a card
    kv_bits: bits of keys and values; None is the dtype of the computation
    """

    sizes: Sizes
    context: int
    batch: int
    compute: str
    backbone: int
    kv_cache: int
    workspace: int
    page_cache: int
    kv_bits: int | None = None

    @classmethod
    def of(cls, of: Sizes, machine: Hardware, context: int, batch: int, kv_bits: int | None = None) -> Needs:
        """The needs of a model, in the dtype that the machine computes in; kv_bits as for `plan`."""
        compute = speed.compute_dtype(machine, of.shape.dtype)
        return cls(
            sizes=of,
            context=context,
            batch=batch,
            compute=compute,
            backbone=of.backbone(compute),
            kv_cache=of.shape.with_dtype(compute).with_kv_bits(kv_bits).kv_nbytes(context, batch),
            workspace=workspace_nbytes(of, compute, rows=batch * math.ceil(context * PROMPT_SHARE)),
            page_cache=machine.fast_bytes if machine.device == "cpu" else 0,
            kv_bits=kv_bits,
        )

    @property
    def fixed(self) -> int:
        """Bytes of everything but experts."""
        return self.backbone + self.kv_cache + self.workspace

    @property
    def scratch(self) -> int:
        """Bytes that count against `fast_bytes` in addition to slots, by the runtime's rule."""
        from mixoff.kernels import reference

        return reference.scratch_nbytes(self.sizes.sites, sites.torch_dtype(self.compute))

    def experts_in_fast(self, slots: int) -> int:
        """Bytes of `slots` slots per layer, and scratch."""
        each = [min(slots, site.num_experts) for site in self.sizes.sites]
        return sum(each) * self.sizes.slot_nbytes + self.scratch

    def slots(self, fast_bytes: int) -> list[int]:
        """Slots of each layer within `fast_bytes`; all 0 if there is no room for one per layer."""
        left = max(fast_bytes - self.spare(fast_bytes) * self.sizes.slot_nbytes, 0)
        try:
            return plan_slots(self.sizes.sites, left, self.scratch, "layer")
        except BudgetError:
            return [0] * len(self.sizes.sites)

    def spare(self, fast_bytes: int) -> int:
        """Slots that the runtime sets aside: for prefetching, if misses are read past the page cache, and on a card for
        copies back."""
        of, wanted = self.sizes, max(self.sizes.shape.top_k)
        nbytes = sum(site.num_experts * site.expert_nbytes for site in of.sites)
        slots, least = max(fast_bytes - self.scratch, 0) // of.slot_nbytes, len(of.sites)
        experts = sum(site.num_experts for site in of.sites)
        spare, _ = set_aside(
            "auto",
            slots=slots,
            least=least,
            experts=experts,
            wanted=wanted,
            direct=goes_direct("auto", nbytes + min(max(fast_bytes, 0), nbytes), self.page_cache, limited=False),
            slot_nbytes=of.slot_nbytes,
        )
        on_card = self.page_cache == 0
        return spare + (exchanged(slots - spare, least, experts, wanted) if on_card else 0)


def workspace_nbytes(of: Sizes, compute: str, rows: int) -> int:
    """Upper bound on the bytes of activations for a prompt of `rows` tokens, all of which may ask for one expert.

    Per token: WIDE vectors of the model's width, the outputs of its K experts twice, and one expert's inner activations
    (gate, up and their product). In addition: the last token's logits.
    """
    text, item = of.shape.config.get_text_config(), sites.dtype_nbytes(compute)
    inner = [max(part.shape) for site in of.shape.sites for part in site.parts if part.name.startswith("down_proj")]
    dense = getattr(text, "intermediate_size", 0)
    widest = max([*inner, dense if isinstance(dense, int) else 0])
    width = (WIDE + 2 * max(of.shape.top_k, default=1)) * text.hidden_size + 3 * widest
    return rows * width * item + LOGITS * text.vocab_size * 4
