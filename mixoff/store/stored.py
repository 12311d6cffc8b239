"""A store as a checkpoint: its weights dequantized while they are read, in the dtype that they had before."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from mixoff.checkpoints.checkpoint import Checkpoint, Extent, Read, TensorRange, read_header
from mixoff.checkpoints.find import Folder
from mixoff.errors import CheckpointError
from mixoff.quantize.layout import layout
from mixoff.quantize.tensor import QTensor
from mixoff.shapes import config
from mixoff.shapes.sites import DTYPES, Part, Site, dtype_nbytes, torch_dtype
from mixoff.store.manifest import QUANTIZED, described_quantized
from mixoff.store.source import Source, open_source

NAMES = {dtype: name for name, dtype in DTYPES.items()}  # safetensors' names by torch's


@dataclass(frozen=True)
class QuantizedExtent(Extent):
    """A quantized matrix (outputs, inputs), dequantized and rounded to the dtype of the image.

    - nbytes: bytes of the weights in the image.
    - pieces: the ranges of its byte image in the file, in order.
    - shape, form: as in `Part`.
    - dtype: dtype of the image, by torch's name.
    - transposed: whether the weight is (inputs, outputs).
    """

    pieces: tuple[tuple[int, int], ...]
    shape: tuple[int, ...]
    form: tuple
    dtype: str
    transposed: bool = False

    def ranges(self) -> list[tuple[str, int, int]]:
        return [(self.file, offset, nbytes) for offset, nbytes in self.pieces]

    def fill(self, image: memoryview, read: Read) -> None:
        raw = torch.empty(sum(nbytes for _, nbytes in self.pieces), dtype=torch.uint8)
        rest = memoryview(raw.numpy())
        for offset, nbytes in self.pieces:
            read(self.file, offset, rest[:nbytes])
            rest = rest[nbytes:]
        q = QTensor.from_buffer(raw, 0, self.shape, *self.form)
        out = torch.frombuffer(image[self.place : self.place + self.nbytes], dtype=torch_dtype(self.dtype))
        q.dequantize(out=out.view(self.shape[::-1]).T if self.transposed else out.view(self.shape))


class StoreCheckpoint(Checkpoint):
    """The store in `folder`; `tensors` describes the backbone's weights, dequantized."""

    kind = "store"

    def __init__(self, folder: Folder) -> None:
        self.folder = folder.path
        self.source: Source = open_source(folder)
        self.source.close()
        if any(part.form and isinstance(part.form[0], str) for site in self.source.sites for part in site.parts):
            raise CheckpointError(
                f"{folder} is in the published 2-bit layout, which is not exported: export another store"
            )
        self.plain = config.expert_sites(config.skeleton(config.read_config(self.folder)), self.source.dtype)
        self.quantized = self._quantized(folder.path)
        self.tensors = dict(self.source.backbone)
        for name, x in self.quantized.items():
            shape = tuple(x.shape)
            self.tensors[name] = TensorRange(QUANTIZED, NAMES[x.dtype], shape, x.offset, x.nbytes)
        experts = {x.file for of_expert in self.source.reader.extents.values() for x in of_expert}
        self.files = [*dict.fromkeys(t.file for t in self.tensors.values()), *sorted(experts)]

    def _quantized(self, folder: Path) -> dict[str, QuantizedExtent]:
        """How to read the backbone's quantized weights, by name."""
        described = described_quantized(folder)
        parts = read_header(folder / QUANTIZED) if described else {}
        found = {}
        for name, meta in described.items():
            form = meta["bits"], meta["group_size"], meta["metadata_bits"]
            shape = tuple(meta["shape"])
            pieces = [parts[f"{name}.{part}"] for part, _, _ in layout(shape, *form)]
            ranges = tuple((t.offset, t.nbytes) for t in pieces)
            nbytes = math.prod(shape) * dtype_nbytes(self.source.dtype)
            found[name] = QuantizedExtent(QUANTIZED, ranges[0][0], 0, nbytes, ranges, shape, form, self.source.dtype)
        return found

    def expert_dtype(self) -> str:
        return self.source.dtype

    def expert_names(self) -> set[str]:
        return set()  # experts are in files of their own

    def _extent(self, name: str, start: int, nbytes: int, place: int) -> Extent:
        return self.quantized[name] if name in self.quantized else super()._extent(name, start, nbytes, place)

    def extents(self, sites: Sequence[Site]) -> dict[tuple[int, int], list[Extent]]:
        stored = self.source.reader.extents
        return {
            (i, e): list(self._of_expert(self.plain[i], self.source.sites[i], stored[i, e][0]))
            for i in range(len(self.plain))
            for e in range(self.plain[i].num_experts)
        }

    def _of_expert(self, plain: Site, stored: Site, whole: Extent) -> Iterable[Extent]:
        for before, after in zip(plain.parts, stored.parts, strict=True):
            offset = whole.offset + after.offset
            if after.form is None:
                yield Extent(whole.file, offset, before.offset, before.nbytes)
            else:
                yield _dequantized(whole.file, offset, before, after, plain.transposed)


def _dequantized(file: str, offset: int, before: Part, after: Part, transposed: bool) -> QuantizedExtent:
    assert after.form is not None  # as its caller checked
    ranges = ((offset, after.nbytes),)
    return QuantizedExtent(
        file, offset, before.offset, before.nbytes, ranges, after.shape, after.form, before.dtype, transposed
    )
