"""The fast tier as memory: slots, and an expert's weights as views of a slot.

Letters: **S** slots. Which expert is in which slot is the cache's business.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import torch

from mixoff.pages import slab
from mixoff.quantize import strided
from mixoff.quantize.tensor import QTensor
from mixoff.shapes.sites import Part, Site, slot_nbytes, torch_dtype

Weight: TypeAlias = torch.Tensor | QTensor | strided.StridedTensor


class Arena:
    """S slots of `slot_nbytes` each, allocated once, each aligned to a page.

    Raises what the allocator raises: `out_of_memory` tells which errors mean that.

    empty: allocator of uint8 memory on a device; None is RAM, where `images` are the slots as writable bytes
    """

    def __init__(self, slots: int, sites: tuple[Site, ...], empty: Callable[[int], torch.Tensor] | None = None) -> None:
        self.sites, self.slot_nbytes = sites, slot_nbytes(sites)
        self.slots = (empty or slab)(slots * self.slot_nbytes).view(slots, -1)  # (S, slot_nbytes)
        self.images = [] if empty else [memoryview(slot.numpy()) for slot in self.slots]
        kinds: dict[tuple[Part, ...], int] = {}
        self._kind = [kinds.setdefault(site.parts, i) for i, site in enumerate(sites)]  # equal sites share views
        self._views: dict[tuple[int, int], dict[str, Weight]] = {}

    def numel(self) -> int:
        """Total bytes."""
        return self.slots.numel()

    def weights(self, slot: int, site: int) -> dict[str, Weight]:
        """The weights of an expert of `site` in `slot`, by part's name, without a copy."""
        at = slot, self._kind[site]
        if at not in self._views:
            self._views[at] = {part.name: view(self.slots[slot], part) for part in self.sites[site].parts}
        return self._views[at]


def view(image: torch.Tensor, part: Part) -> Weight:
    """A part of an expert's image (nbytes,) as a weight, without a copy."""
    if part.form is not None and part.form[0] == strided.KIND:
        return strided.StridedTensor.from_buffer(image, part.offset, part.shape, strided.Form(*part.form[1:]))
    if part.form is not None:
        return QTensor.from_buffer(image, part.offset, part.shape, *part.form)
    return image[part.offset : part.offset + part.nbytes].view(torch_dtype(part.dtype)).view(part.shape)
