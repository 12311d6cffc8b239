"""The fast tier as memory: how many slots a budget pays for, and an expert's weights as views of the slot it lies in.

Letters: **S** slots.
Does not know which expert is where.
"""

from __future__ import annotations

import errno
from collections.abc import Callable

import torch

from mixoff.errors import BudgetError, MixoffError
from mixoff.pages import slab
from mixoff.quantize import strided
from mixoff.quantize.tensor import QTensor
from mixoff.shapes.sites import Part, Site, slot_nbytes, torch_dtype
from mixoff.units import format_nbytes

ALLOCATORS = ("can't allocate memory", "CUBLAS_STATUS_ALLOC_FAILED", "CUDA out of memory")  # in RuntimeErrors of torch
SCOPES = ("layer", "global")
Weight = torch.Tensor | QTensor | strided.StridedTensor


class Arena:
    """S slots of `slot_nbytes` each, allocated once, and each aligned to a page.

    empty: allocates uint8 memory of a device; None is RAM, where `images` are the slots as writable bytes. Raises what
    the allocator raises: `out_of_memory` tells which errors are about that.
    """

    def __init__(self, slots: int, sites: tuple[Site, ...], empty: Callable[[int], torch.Tensor] | None = None) -> None:
        self.sites, self.slot_nbytes = sites, slot_nbytes(sites)
        self.slots = (empty or slab)(slots * self.slot_nbytes).view(slots, -1)  # (S, slot_nbytes)
        self.images = [] if empty else [memoryview(slot.numpy()) for slot in self.slots]
        kinds = {}
        self._kind = [kinds.setdefault(site.parts, i) for i, site in enumerate(sites)]  # sites alike share views
        self._views: dict[tuple[int, int], dict[str, Weight]] = {}

    def numel(self) -> int:
        """Bytes in all."""
        return self.slots.numel()

    def weights(self, slot: int, site: int) -> dict[str, Weight]:
        """The weights of the expert of `site` that lies in `slot`, by part's name, without a copy."""
        at = slot, self._kind[site]
        if at not in self._views:
            self._views[at] = {part.name: view(self.slots[slot], part) for part in self.sites[site].parts}
        return self._views[at]


def out_of_memory(error: Exception) -> str | None:
    """What an error says, in a sentence, if it is about memory that was not to be had; None for any other.

    >>> out_of_memory(MemoryError("no room")), out_of_memory(ValueError("no sense"))
    ('no room', None)
    """
    lacking = isinstance(error, (MemoryError, torch.OutOfMemoryError))
    lacking = lacking or (isinstance(error, OSError) and error.errno == errno.ENOMEM)
    words = str(error)
    if lacking or (isinstance(error, RuntimeError) and any(mark in words for mark in ALLOCATORS)):
        return ". ".join(words.strip().split("\n")[0].split(". ")[:2]) or type(error).__name__
    return None


def least_slots(sites: tuple[Site, ...], scope: str) -> int:
    """Slots without which nothing runs: one a layer, or one in all."""
    if scope not in SCOPES:
        raise MixoffError(f"unknown scope {scope!r}: choose one of {', '.join(SCOPES)}")
    return len(sites) if scope == "layer" else 1


def plan_slots(sites: tuple[Site, ...], fast_bytes: int, scratch: int, scope: str) -> list[int]:
    """Slots of each pool within `fast_bytes`: one pool a layer, or a single one. Raises BudgetError below the minimum.

    Slots that do not divide evenly go to the first layers.
    """
    size, least = slot_nbytes(sites), least_slots(sites, scope)
    slots = (fast_bytes - scratch) // size
    if slots < least:
        need = least * size + scratch
        what = f"{least} MoE layers need at least one slot each" if scope == "layer" else "at least one slot is needed"
        raise BudgetError(
            f"{what}: fast_bytes is {fast_bytes:,} bytes ({format_nbytes(fast_bytes)}), "
            f"raise it to {need:,} bytes ({format_nbytes(need)}) or more"
        )
    if scope == "global":
        return [min(slots, sum(site.num_experts for site in sites))]
    return [min(slots // len(sites) + (i < slots % len(sites)), site.num_experts) for i, site in enumerate(sites)]


def view(image: torch.Tensor, part: Part) -> Weight:
    """A part of an expert's image (nbytes,), as the weight that it is, without a copy."""
    if part.form is not None and part.form[0] == strided.KIND:
        return strided.StridedTensor.from_buffer(image, part.offset, part.shape, strided.Form(*part.form[1:]))
    if part.form is not None:
        return QTensor.from_buffer(image, part.offset, part.shape, *part.form)
    return image[part.offset : part.offset + part.nbytes].view(torch_dtype(part.dtype)).view(part.shape)
