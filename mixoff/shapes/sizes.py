"""Bytes of a model under a scheme: in a store, in memory, and read per token. From shapes alone, no weights needed.

Quantized forms, alignment and padding come from `quantize` and `sites`, so planned bytes equal stored bytes.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from mixoff.errors import MixoffError
from mixoff.quantize import strided
from mixoff.quantize.layout import packed_nbytes
from mixoff.quantize.scheme import HEADS, KEEP, PRESETS, Scheme
from mixoff.shapes.known import DEMO
from mixoff.shapes.shape import ModelShape, Tensor
from mixoff.shapes.sites import dtype_nbytes, quantized_sites, stride, strided_sites

if TYPE_CHECKING:
    from mixoff.shapes.sites import Part, Site


PUBLISHED = "published"  # the scheme of the paper's own checkpoint, DEMO
EXPERT_FORM, ATTENTION_FORM = (2, 16, 128), (4, 64, 256)  # bits, group size, groups on one grid of scales


@dataclass(frozen=True)
class Sizes:
    """Bytes of a model under a scheme.

    - shape: the model.
    - scheme: the scheme; None is that of the published checkpoint.
    - name: name of the scheme.
    """

    shape: ModelShape
    scheme: Scheme | None
    name: str

    @cached_property
    def sites(self) -> tuple[Site, ...]:
        """Sets of experts as they are stored. Raises MixoffError if a group does not divide a width."""
        if self.scheme is None:
            return tuple(strided_sites(self.shape.sites, _published_form))
        return quantized_sites(self.shape.sites, self.scheme)

    @property
    def experts(self) -> int:
        """Bytes of all experts in the store, each padded to whole pages."""
        if self.shape.sites:
            return sum(site.num_experts * stride(site) for site in self.sites)
        return self.shape.parameters["experts"] * dtype_nbytes(self.shape.dtype)

    @property
    def slot_nbytes(self) -> int:
        """Bytes of the largest expert, in whole pages."""
        return max(map(stride, self.sites))

    @property
    def stored_backbone(self) -> int:
        """Bytes of the backbone's tensors in files."""
        if self.shape.files is not None:
            return sum(self._packed(t.shape, t.role) or t.nbytes for t in self.shape.files)
        return sum(self._nbytes(tensor, None) for tensor in self.shape.backbone)

    @property
    def stored(self) -> int:
        """Bytes of all tensors of the store, without its metadata (headers, manifest, tokenizer)."""
        return self.experts + self.stored_backbone

    def backbone(self, compute: str) -> int:
        """Bytes of the backbone in memory; tensors that are not quantized are in the dtype `compute`."""
        return sum(self._nbytes(tensor, compute) for tensor in self.shape.backbone) + self.shape.buffers_nbytes

    def touched_backbone(self, compute: str) -> Counter[int]:
        """Bytes of the backbone read per token, by bits per weight: all but embeddings that the head does not share."""
        table = None if self.tied else next((t for t in self.shape.backbone if t.role == "embeddings"), None)
        touched: Counter[int] = Counter()
        for tensor in self.shape.backbone:
            if tensor is not table:
                touched[self._bits(tensor, compute)] += self._nbytes(tensor, compute)
        return touched

    def touched_experts(self) -> Counter[int]:
        """Bytes of experts read per token, by bits per weight."""
        touched: Counter[int] = Counter()
        for site, k in zip(self.sites, self.shape.top_k, strict=True):
            for part in site.parts:
                touched[_part_bits(part)] += min(k, site.num_experts) * part.nbytes
        return touched

    def requested(self) -> int:
        """Bytes of the experts that one token requests, as they are moved."""
        pairs = zip(self.sites, self.shape.top_k, strict=True)
        return sum(min(k, site.num_experts) * site.expert_nbytes for site, k in pairs)

    @property
    def tied(self) -> bool:
        """Whether the head shares the embedding's table."""
        return not any(t.role == "head" for t in self.shape.backbone)

    def _nbytes(self, tensor: Tensor, compute: str | None) -> int:
        return self._packed(tensor.shape, tensor.role) or _plain(tensor, compute)

    def _packed(self, shape: tuple[int, ...], role: str | None) -> int | None:
        """Bytes of a tensor that the scheme quantizes; None for others."""
        if self.scheme is None:
            return strided.packed_nbytes(shape, strided.Form(*ATTENTION_FORM)) if role == "attention" else None
        precision = role and self.scheme.precision(role)
        if not precision:
            return None
        return packed_nbytes(shape, precision.bits, precision.group_size, self.scheme.metadata_bits)

    def _bits(self, tensor: Tensor, compute: str) -> int:
        if self.scheme is None and tensor.role == "attention":
            return ATTENTION_FORM[0]
        precision = self.scheme and tensor.role and self.scheme.precision(tensor.role)
        return precision.bits if precision else 8 * dtype_nbytes(compute)


def _name(scheme: Scheme) -> str:
    other = KEEP if scheme.keeps else "own"
    endings = "", *(f"+{head}" for head in HEADS)
    names = (name + ending for name in PRESETS for ending in endings if name != KEEP or not ending)
    return next((name for name in names if Scheme.preset(name) == scheme), other)


def sizes_of(shape: ModelShape, scheme: str | Scheme | None = None) -> Sizes:
    """The sizes under `scheme`, a preset's name or a Scheme; None is `mixed`, or `published` for that checkpoint.

    Raises MixoffError for an unknown scheme, and for one that does not suit the model's widths.
    """
    if isinstance(scheme, Scheme):
        return Sizes(shape, scheme, _name(scheme))
    if shape.name == DEMO or scheme == PUBLISHED:
        if scheme not in (None, PUBLISHED):
            raise MixoffError(f"{DEMO} is quantized already: plan it without a scheme, or plan the original model")
        return Sizes(shape, None, PUBLISHED)
    return Sizes(shape, Scheme.preset(scheme or "mixed"), scheme or "mixed")


def _plain(tensor: Tensor, compute: str | None) -> int:
    """Bytes of a tensor that is not quantized: as stored if `compute` is None, or in that dtype."""
    floating = tensor.dtype in ("float16", "bfloat16", "float32")
    if not floating:
        return tensor.numel * {"int64": 8, "int32": 4, "uint8": 1, "bool": 1}[tensor.dtype]
    if compute in tensor.wide:
        compute = "float32"
    return tensor.numel * dtype_nbytes(compute or tensor.dtype)


def _published_form(_: Site, part: Part) -> strided.Form:
    return strided.Form(*EXPERT_FORM, matrices=2 if part.name == "gate_up_proj" else 1)


def _part_bits(part: Part) -> int:
    """Bits per weight of a part, without metadata."""
    if part.form is None:
        return 8 * dtype_nbytes(part.dtype)
    return part.form[1] if part.form[0] == strided.KIND else part.form[0]
