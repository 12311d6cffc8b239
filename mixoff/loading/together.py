"""Layers that read the same input as one product: q, k and v of attention, gate and up of an MLP.

On a card each product is a launch, and k and v alone are too few programs to fill it. Outputs are blocks of their own
in a quantized matrix, so matrices of whole blocks are joined without a change of any bit.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence

import torch

from mixoff import kernels
from mixoff.quantize.layout import BLOCK, layout
from mixoff.quantize.tensor import QTensor

LAYERS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))  # next to each other, and called in this order
DEVICES = ("cuda",)  # where it pays: compiled programs do it in their own way on a CPU


def groups(weights: Mapping[str, object]) -> Iterator[tuple[str, ...]]:
    """Names of tensors that can be joined, such as `….q_proj.weight`, `….k_proj.weight`, `….v_proj.weight`."""
    for first, *others in LAYERS:
        end = f".{first}.weight"
        for name in [name for name in weights if name.endswith(end)]:
            names = [name, *(f"{name.removesuffix(end)}.{other}.weight" for other in others)]
            if all(other in weights for other in names) and _fit([weights[other] for other in names]):
                yield tuple(names)


def _fit(weights: Sequence[object]) -> bool:
    """Whether these are different matrices of one form, of whole blocks of outputs except in the last."""
    matrices = [q for q in weights if isinstance(q, QTensor)]
    if len(matrices) < len(weights) or len(set(map(id, matrices))) < len(weights):
        return False
    forms = {(q.shape[1], q.bits, q.group_size, q.metadata_bits, q.rotated) for q in matrices}
    return len(forms) == 1 and not any(q.shape[0] % BLOCK for q in matrices[:-1])


def join(weights: Sequence[QTensor]) -> QTensor:
    """Matrices (N, K) of `groups`, below each other."""
    first, N = weights[0], sum(q.shape[0] for q in weights)
    whole = QTensor.empty((N, first.shape[1]), first.bits, first.group_size, first.metadata_bits, first.rotated)
    for name, part in whole.parts.items():
        torch.cat([q.parts[name] for q in weights], out=part)
    return whole


def split(whole: QTensor, rows: Sequence[int]) -> list[QTensor]:
    """The matrices with so many rows each that `join` was given, as views."""
    found, firsts, form = [], dict.fromkeys(whole.parts, 0), (whole.bits, whole.group_size, whole.metadata_bits)
    for N in rows:
        sizes = {name: size for name, (size,), _ in layout((N, whole.shape[1]), *form)}
        parts = {name: whole.parts[name].narrow(0, firsts[name], size) for name, size in sizes.items()}
        found.append(QTensor((N, whole.shape[1]), *form, parts, whole.rotated))
        firsts = {name: first + sizes[name] for name, first in firsts.items()}
    return found


class Together:
    """The product of several layers with the same input, computed when the first of them is called.

    rows: outputs of each layer, in order. Each thread has its own products.
    """

    def __init__(self, whole: QTensor, rows: Sequence[int], exact: bool) -> None:
        self.whole, self.rows, self.exact = whole, list(rows), exact
        self.local = threading.local()

    def product(self, layer: int, x: torch.Tensor) -> torch.Tensor:
        """`x @ w.T` for layer number `layer`: x (..., K) -> (..., N).

        A product is used once by each layer, and only for the very tensor that it was computed from.
        """
        if getattr(self.local, "x", None) is not x or layer not in self.local.products:
            out = kernels.linear(x, self.whole, exact=self.exact)  # (..., N of all)
            self.local.x, self.local.products = x, dict(enumerate(out.split(self.rows, -1)))
        found = self.local.products.pop(layer)
        if not self.local.products:
            self.local.x = None
        return found
