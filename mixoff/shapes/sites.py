"""Where a model keeps its experts, and what one expert looks like.

Letters: **E** experts, **D** model width, **F** expert width.
Read off a skeleton on the meta device, so a 47 B-parameter model costs no memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from mixoff.errors import CheckpointError
from mixoff.quantize import strided
from mixoff.quantize.layout import packed_nbytes
from mixoff.quantize.scheme import Scheme
from mixoff.quantize.strided import Form
from mixoff.units import PAGE

if TYPE_CHECKING:
    import torch


DTYPES = {"F16": "float16", "BF16": "bfloat16", "F32": "float32"}  # dtypes of unquantized experts

PART_ALIGN = 64  # bytes; a cache line, and the widest SIMD load


@dataclass(frozen=True)
class Part:
    """One weight of an expert.

    - name: name of the parameter.
    - shape: shape in the model.
    - dtype: dtype in the checkpoint.
    - offset, nbytes: its bytes in the expert's image.
    - form: `(bits, group size, bits of metadata)` of a quantized weight, followed by True if its inputs are rotated;
      or `strided.Form.to_tuple()`.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    offset: int
    nbytes: int
    form: tuple | None = None


def place(parts: Iterable[Part]) -> tuple[Part, ...]:
    """The parts one after the other in an image, each aligned."""
    placed, offset = [], 0
    for part in parts:
        placed.append(replace(part, offset=-(-offset // PART_ALIGN) * PART_ALIGN))
        offset = placed[-1].offset + part.nbytes
    return tuple(placed)


@dataclass(frozen=True)
class Site:
    """One set of experts in the model.

    - name: name of the module.
    - layer: number of its layer.
    - num_experts: E.
    - parts: weights of each expert.
    - transposed: whether weights are (inputs, outputs), as in gpt-oss, rather than (outputs, inputs).
    """

    name: str
    layer: int
    num_experts: int
    parts: tuple[Part, ...]
    transposed: bool = False

    @property
    def expert_nbytes(self) -> int:
        """Bytes of one expert's image, its parts aligned but not padded at the end."""
        return self.parts[-1].offset + self.parts[-1].nbytes


def dtype_nbytes(dtype: str) -> int:
    """Bytes of one element of `"float16"`, `"bfloat16"` or `"float32"`."""
    return {"float16": 2, "bfloat16": 2, "float32": 4}[dtype]


def torch_dtype(name: str) -> torch.dtype:
    """torch's dtype of that name."""
    import torch

    return getattr(torch, name)


def stride(site: Site) -> int:
    """Bytes from one expert to the next in a store's file."""
    return -(-site.expert_nbytes // PAGE) * PAGE


def quantized_sites(sites: tuple[Site, ...], scheme: Scheme) -> tuple[Site, ...]:
    """The sites as they are stored under `scheme`; biases stay as they are.

    Raises MixoffError if a group does not divide a width, or if `by_layer` is for another number of layers.
    """
    if scheme.experts is None:
        return sites
    scheme.check_layers(len(sites))
    if any(part.form is not None for site in sites for part in site.parts):
        raise CheckpointError(
            "these experts are quantized already: convert them with scheme 'none', which keeps them, "
            "or give mixoff the 16-bit original of this model"
        )
    return tuple(
        replace(site, parts=place(_quantized(part, i, site, scheme) for part in site.parts), transposed=False)
        for i, site in enumerate(sites)
    )


def _quantized(part: Part, i: int, site: Site, scheme: Scheme) -> Part:
    """A matrix as (outputs, inputs), the order of quantized weights in every family; biases stay as they are."""
    precision = scheme.expert(part.name, i)
    if len(part.shape) != 2 or precision is None:
        return part
    form = precision.bits, precision.group_size, scheme.metadata_bits
    shape = part.shape[::-1] if site.transposed else part.shape
    nbytes = packed_nbytes(shape, *form)
    return replace(part, shape=shape, form=(*form, True) if precision.rotated else form, nbytes=nbytes)


def strided_sites(sites: Iterable[Site], form_of: Callable[[Site, Part], Form]) -> Iterable[Site]:
    """The sites with every part in the form `form_of(site, part)`."""
    for site in sites:
        parts = []
        for part in site.parts:
            form = form_of(site, part)
            parts.append(replace(part, nbytes=strided.packed_nbytes(part.shape, form), form=form.to_tuple()))
        yield replace(site, parts=place(parts))


def slot_nbytes(sites: tuple[Site, ...]) -> int:
    """Bytes of a slot: the largest expert in whole pages, as in the store and as direct I/O requires."""
    return max(map(stride, sites))
