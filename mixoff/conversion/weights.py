"""Quantizes one matrix for the inputs that it got in the original model, and gets in the one quantized so far.

Letters: **T** tokens, **N** outputs, **K** inputs, **D** model width, **F** expert width, **B** blocks on a Hessian's
diagonal.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from mixoff.quantize import hessian as hessians
from mixoff.quantize import rotation, targets
from mixoff.quantize.calibrated import quantize_calibrated
from mixoff.quantize.hessian import Metric
from mixoff.quantize.scheme import Precision, Scheme
from mixoff.quantize.tensor import QTensor
from mixoff.store.source import Source
from mixoff.transfer.arena import view

WIDEST = 4096  # inputs of one block of a Hessian: factoring costs the cube of it
WHOLE = 64  # inputs that a block has a multiple of: whole groups of any usual size
NARROW = 1024  # inputs up to which matrices are quantized with all care; beyond, time is dear
SWEEPS = 2  # of coordinate descent after the error feedback, for narrow matrices


@dataclass
class Inputs:
    """What a matrix gets.

    - quantized: inputs in the model quantized so far (T, K).
    - original: inputs in the original model (T, K); None if they are the same or not known.
    - gate: the router's weights (T,); None for 1.
    - residual: what the residual stream lacks (T, N), for the last matrix of an expert.
    - others: inputs of other tokens of the layer (S, K), for a Hessian of few tokens T.
    """

    quantized: Tensor
    original: Tensor | None = None
    gate: Tensor | None = None
    residual: Tensor | None = None
    others: Tensor | None = None

    def rotated(self) -> Inputs:
        """The same with rotated inputs."""
        turn = [x if x is None else rotation.rotate(x) for x in (self.quantized, self.original, self.others)]
        return Inputs(turn[0], turn[1], self.gate, self.residual, turn[2])


def decoder_of(model: PreTrainedModel) -> nn.Module:
    """The part of a model that computes hidden states, without its head."""
    return model.get_decoder() if hasattr(model, "get_decoder") else model.base_model


def read_expert(source: Source, site: int, e: int) -> dict[str, Tensor]:
    """The weights of an expert of a plain checkpoint, by name, as they are stored."""
    image = torch.zeros(source.sites[site].expert_nbytes, dtype=torch.uint8)
    source.reader.read_into(site, e, memoryview(image.numpy()))
    views = {part.name: view(image, part) for part in source.sites[site].parts}
    return {name: w for name, w in views.items() if isinstance(w, Tensor)}


def matrices(weights: dict[str, Tensor], transposed: bool) -> dict[str, Tensor]:
    """Those of an expert's weights that are matrices, fp32 (N, K): the first, and LAST."""
    return {name: (w.t() if transposed else w).float() for name, w in weights.items() if w.dim() == 2}


def blocks(K: int) -> int:
    """The fewest blocks of at most WIDEST inputs, each of whole groups, that divide K.

    >>> blocks(4096), blocks(14336), blocks(192), blocks(11008)
    (1, 4, 1, 4)
    """
    return next((n for n in range(-(-K // WIDEST), K // WHOLE + 1) if K % (n * WHOLE) == 0), 1)


def moment(a: Tensor, x: Tensor, gate: Tensor | None = None, count: int = 1) -> Tensor:
    """Sum of v^2 a x^T over tokens: (A, K), or `count` blocks on its diagonal (B, A/B, K/B)."""
    shape = (count, a.shape[1] // count, x.shape[1] // count) if count > 1 else (a.shape[1], x.shape[1])
    total = torch.zeros(shape)
    hessians.add_moment(total, a, x, gate)
    return total


def metric(given: Inputs, common: Tensor | None = None) -> tuple[Metric, Tensor]:
    """The damped Hessian of these inputs, and the undamped one.

    common: Hessian of all tokens of the layer, to which that of few tokens is pulled
    """
    T, K = given.quantized.shape
    own = moment(given.quantized, given.quantized, given.gate, blocks(K))
    shared, tokens = own, T
    if common is None and given.others is not None:
        common, tokens = moment(given.others, given.others, None, blocks(K)), max(T, len(given.others))
    if common is not None:
        shared = hessians.shrink(own, common, T)
    return Metric(shared, hessians.damping(T or tokens, K)), own


def calibrated(
    w: Tensor,
    given: Inputs,
    precision: Precision,
    scheme: Scheme,
    each: Callable = map,
    common: Tensor | None = None,
    measure: tuple[Metric, Tensor] | None = None,
) -> QTensor:
    """`w` (N, K) quantized for its inputs.

    - common: as in `metric`.
    - measure: the result of `metric`, where several matrices have the same inputs.
    """
    w = w.float()
    if precision.rotated:
        w, given = rotation.rotate(w), given.rotated()
    damped, own = measure or metric(given, common)
    if len(given.quantized) and own.diagonal(dim1=-2, dim2=-1).any():
        w = _target(w, given, own)
    sweeps = SWEEPS if w.shape[1] <= NARROW else 0
    q = quantize_calibrated(w.contiguous(), damped, precision, scheme.metadata_bits, sweeps=sweeps, each=each)
    return replace(q, rotated=precision.rotated)


def _target(w: Tensor, given: Inputs, own: Tensor) -> Tensor:
    """Weights to aim for, so that errors made so far are made up for."""
    drift = residual = None
    if given.original is not None:
        lost = given.original - given.quantized
        drift = moment(lost, given.quantized, given.gate, blocks(w.shape[1]))
    if given.residual is not None:
        residual = moment(given.residual, given.quantized, given.gate)
    return w if drift is None and residual is None else targets.aimed(w, own, drift, residual)
