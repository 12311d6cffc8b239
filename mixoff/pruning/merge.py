"""Merging: a dropped expert's weights go into the one that stays whose row of the router is most like its own.

An expert becomes the average of its group, weighted by how often a text chose each, after the hidden neurons of each
are put into the order of the one that stays. Source: Li et al., Merge, Then Compress (arXiv 2310.01334), who compare
the routers' logits on a text where this compares rows, and who train afterwards.

Letters: **D** model width, **F** expert width, **E** experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from mixoff.checkpoints.checkpoint import Extent, Read
from mixoff.errors import CheckpointError
from mixoff.quantize.tensor import QTensor
from mixoff.shapes.sites import Site, torch_dtype

PARTS = ("gate_up_proj", "down_proj")  # of an expert that can be merged


@dataclass(frozen=True)
class MergedExtent(Extent):
    """A part of an expert that is the average of a group's.

    - inner: the whole image of each of the group, the one that stays first.
    - shares: weight of each; they sum to one.
    - site: parts of an image.
    - name: name of the part.
    - dtype: dtype that the average is rounded to, by torch's name.
    """

    inner: tuple[Extent, ...]
    shares: tuple[float, ...]
    site: Site
    name: str
    dtype: str

    def ranges(self) -> list[tuple[str, int, int]]:
        return [r for x in self.inner for r in x.ranges()]

    def fill(self, image: memoryview, read: Read) -> None:
        experts = [self._expert(x, read) for x in self.inner]
        order = PARTS.index(self.name)
        mean = experts[0][order] * self.shares[0]
        for expert, share in zip(experts[1:], self.shares[1:], strict=True):
            mean += share * in_order_of(experts[0], expert)[order]
        out = torch.frombuffer(image[self.place : self.place + self.nbytes], dtype=torch_dtype(self.dtype))
        out.view(mean.shape).copy_(mean)

    def _expert(self, x: Extent, read: Read) -> tuple[Tensor, Tensor]:
        """gate_up (2F, D) and down (D, F) in fp32."""
        raw = bytearray(x.nbytes)
        x.fill(memoryview(raw), read)
        image, parts = torch.frombuffer(raw, dtype=torch.uint8), {p.name: p for p in self.site.parts}
        found = []
        for p in (parts[name] for name in PARTS):
            if p.form is None:
                w = image[p.offset : p.offset + p.nbytes].view(torch_dtype(p.dtype)).view(p.shape)
            else:
                w = QTensor.from_buffer(image, p.offset, p.shape, *p.form).dequantize(torch.float32)
            found.append(w.float())
        return found[0], found[1]


def check(site: Site) -> None:
    """Raise CheckpointError for experts whose neurons cannot be put in order."""
    plain = all(part.form is None or isinstance(part.form[0], int) for part in site.parts)
    if tuple(part.name for part in site.parts) != PARTS or site.transposed or not plain:
        raise CheckpointError(
            "experts with biases, without a gate, transposed, or in the published layout are not merged here: "
            "prune without merging"
        )


def groups(rows: Tensor, kept: Sequence[int]) -> list[list[int]]:
    """The experts that each of `kept` stands for, itself first: a dropped one joins the most similar row of (E, D).

    >>> groups(torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.1, 2.0]]), [0, 1])
    [[0], [1, 2]]
    """
    unit = functional.normalize(rows.float(), dim=1)  # (E, D)
    found = [[e] for e in kept]
    for e in (e for e in range(len(rows)) if e not in kept):
        found[int((unit[list(kept)] @ unit[e]).argmax())].append(e)
    return found


def in_order_of(first: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Expert `other` with its hidden neurons matched to those of `first`; it computes what it did before.

    An expert is gate_up (2F, D) and down (D, F). Neurons are matched best pair first, by the cosine of all their
    weights.
    """
    order = matched(_neurons(*first) @ _neurons(*other).T)  # (F,)
    gate, up = other[0].chunk(2)
    return torch.cat([gate[order], up[order]]), other[1][:, order]


def _neurons(gate_up: Tensor, down: Tensor) -> Tensor:
    """All weights of each hidden neuron, of length one, (F, 3D)."""
    return functional.normalize(torch.cat([*gate_up.chunk(2), down.T], 1), dim=1)


def matched(similar: Tensor) -> Tensor:
    """For each row of (F, F) a column of its own, the most similar pairs first.

    >>> matched(torch.tensor([[0.9, 0.8], [0.95, 0.1]]))
    tensor([1, 0])
    """
    rest, order = similar.clone(), torch.full((len(similar),), -1)
    while (order < 0).any():  # rows that are each other's best, all at once
        column = rest.argmax(1)  # (F,)
        mine = rest.argmax(0)[column] == torch.arange(len(rest))
        mine &= order < 0
        order[mine] = column[mine]
        rest[mine] = rest[:, column[mine]] = -torch.inf
    return order
