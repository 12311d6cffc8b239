"""Experts as compressed-tensors `pack-quantized`, symmetric in 4 or 8 bits, which vLLM and transformers open.

Letters: **N** outputs, **K** inputs, **G** group size. Codes are round(w / scale), with scale = max |w| / (2^(bits-1) -
0.5) per group, in bf16.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mixoff.checkpoints.checkpoint import Read
from mixoff.errors import CheckpointError, MixoffError
from mixoff.export.layout import (
    Entry,
    Export,
    Place,
    Reencoded,
    backbone_weights,
    copied,
    lay_out_safetensors,
    of_backbone,
    of_experts,
)
from mixoff.export.model import Model
from mixoff.quantize.layout import pack
from mixoff.quantize.scheme import Scheme
from mixoff.quantize.solve import is_finite
from mixoff.shapes.sites import Part
from mixoff.store.blueprint import Output, Weight

GROUPS = (32, 16)  # preferred first: vLLM has kernels for 32 and more
ROWS = 256  # outputs encoded at a time
ENDINGS = ("weight_packed", "weight_scale", "weight_shape")


@dataclass(frozen=True)
class CompressedExtent(Reencoded):
    """A part of an expert, encoded: codes, scales and shape of each of its matrices, in this order.

    - pieces: matrices, one above the other.
    - bits, group: form of the codes.
    """

    pieces: int
    bits: int
    group: int

    def fill(self, image: memoryview, read: Read) -> None:
        rest = image[self.place : self.place + self.nbytes]
        for w in self.weights(read).chunk(self.pieces):
            N, K = w.shape
            sizes = [nbytes for _, _, nbytes in entries(N, K, self.bits, self.group)]
            codes = torch.frombuffer(rest[: sizes[0]], dtype=torch.int32).view(N, -1)
            scales = torch.frombuffer(rest[sizes[0] : sum(sizes[:2])], dtype=torch.bfloat16).view(N, -1)
            for start in range(0, N, ROWS):
                rows = slice(start, start + ROWS)
                codes[rows], scales[rows] = self._encoded(w[rows])
            torch.frombuffer(rest[sum(sizes[:2]) : sum(sizes)], dtype=torch.int64)[:] = torch.tensor([N, K])
            rest = rest[sum(sizes) :]

    def _encoded(self, w: Tensor) -> tuple[Tensor, Tensor]:
        if not is_finite(w):
            raise CheckpointError(
                f"{self.part.name} in {self.file} holds NaN or infinity: repair it, then export again"
            )
        half, grouped = 2 ** (self.bits - 1), w.float().unflatten(1, (-1, self.group))
        scale = (grouped.abs().amax(-1) / (half - 0.5)).clamp_min(1e-10).bfloat16()
        codes = (grouped / scale.float()[..., None]).round().clamp(-half, half - 1).add(half).flatten(1)
        return pack(codes.int(), self.bits, 32 // self.bits).T, scale


def entries(N: int, K: int, bits: int, group: int) -> list[Entry]:
    """The three tensors of a matrix (N, K), in the order of ENDINGS."""
    codes, scales = (N, K * bits // 32), (N, K // group)
    return [("I32", codes, 4 * math.prod(codes)), ("BF16", scales, 2 * math.prod(scales)), ("I64", (2,), 16)]


def compressed_layout(model: Model, bits: int | None = None) -> Export:
    """Safetensors whose experts are compressed-tensors.

    - bits: 4 or 8; None is 4 for an original, and 8 for what is quantized already, which 4 bits would round again.

    Raises MixoffError for what this format cannot hold.
    """
    bits = (8 if model.rounded else 4) if bits is None else bits
    if bits == 4 and model.rounded:
        raise MixoffError(
            "these weights are quantized already, and 4 bits would round them a second time (relative error 0.131 in "
            "place of 0.087, measured): export 8 bits, or export the 16-bit original in 4"
        )
    experts = of_experts(model)
    if odd := next((n for n, (_, shape, _) in experts.items() if len(shape) != 2 or not n.endswith(".weight")), None):
        raise MixoffError(f"{odd} is not one matrix of one expert, as compressed-tensors has it: export to hf instead")
    widths = {shape[1] for _, shape, _ in experts.values()}
    group = next((size for size in GROUPS if not any(K % size for K in widths)), None)
    if group is None:
        raise MixoffError(f"no group of {GROUPS} divides the widths {sorted(widths)}: export to hf instead")
    tensors = of_backbone(model)
    for name, (_, (N, K), _) in experts.items():
        base = name.removesuffix("weight")
        tensors |= {base + end: entry for end, entry in zip(ENDINGS, entries(N, K, bits, group), strict=True)}
    places, sizes, heads = lay_out_safetensors(tensors)
    weights = [*backbone_weights(model, places), *_expert_weights(model, tensors, places, bits, group)]
    side = _configured(model, bits, group)
    return Export(Scheme(), model.sites[0].parts[0].dtype, (), weights, sizes, heads, side=side)


def _expert_weights(
    model: Model, tensors: Mapping[str, Entry], places: Mapping[str, Place], bits: int, group: int
) -> Iterator[Weight]:
    for i, site in enumerate(model.sites):
        for e in range(site.num_experts):
            for part in site.parts:
                pieces = model.names.of_expert(i, e, part)
                names = [p.name.removesuffix("weight") + end for p in pieces for end in ENDINGS]
                outputs = [Output(n, places[n].file, places[n].offset, tensors[n][2]) for n in names]
                inner = model.of_part(i, e, part)
                nbytes = sum(output.nbytes for output in outputs)
                alone = Part(part.name, part.shape, part.dtype, 0, part.nbytes)
                extent = CompressedExtent(
                    inner[0].file, inner[0].offset, 0, nbytes, inner, alone, len(pieces), bits, group
                )
                encoded = Part(part.name, (nbytes,), "uint8", 0, nbytes)
                name = f"{site.name}.{e}.{part.name}"
                yield copied(name, [extent], encoded, outputs, f"{name} in {inner[0].file}")


def _configured(model: Model, bits: int, group: int) -> dict[str, bytes]:
    """The small files, with what engines have to know in config.json."""
    side = model.side_files()
    settings = json.loads(side["config.json"])
    weights = {"num_bits": bits, "type": "int", "symmetric": True, "strategy": "group", "group_size": group}
    rest: dict[str, Any] = {
        "dynamic": False,
        "actorder": None,
        "observer": "minmax",
        "observer_kwargs": {},
        "block_structure": None,
    }
    matrices = {name.removesuffix(".weight") for name, (t, _) in model.backbone.items() if len(t.shape) == 2}
    # engines call the layers by the Hub's names or by transformers'
    same = {name.removesuffix(".weight") for name, shape in model.names.backbone.items() if len(shape) == 2}
    settings["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "global_compression_ratio": None,
        "kv_cache_scheme": None,
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": weights | rest,
                "input_activations": None,
                "output_activations": None,
            }
        },
        "ignore": sorted(matrices | same | {"lm_head"}),
    }
    return side | {"config.json": (json.dumps(settings, indent=2) + "\n").encode()}
