"""The weights of a GGUF file, decoded while they are read: an expert at a time, or some rows of a larger matrix.

The decoders are those of the `gguf` package. Numbers are widened to the 16-bit dtype that holds their type best; fp32
stays. Experts are read from their slabs of the stacked tensors.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from mixoff.checkpoints.checkpoint import Checkpoint, Extent, TensorRange
from mixoff.checkpoints.gguf import latent, names
from mixoff.checkpoints.gguf.config import EXPERT, expert_dtype, experts_of, natural_dtype
from mixoff.checkpoints.gguf.extent import GgufExtent, block, decode
from mixoff.checkpoints.gguf.files import folder_of, open_files
from mixoff.checkpoints.gguf.header import Tensor
from mixoff.checkpoints.gguf.names import PIECES, Rows
from mixoff.checkpoints.model_files import WHOLE, read_json
from mixoff.errors import CheckpointError
from mixoff.shapes import config
from mixoff.shapes.sites import DTYPES, Part, Site, dtype_nbytes


class GgufCheckpoint(Checkpoint):
    """A GGUF file or split set as a checkpoint.

    `tensors` describes decoded weights: those of the backbone under transformers' names, those of experts under GGUF's.
    """

    kind = "gguf"

    def __init__(self, path: Path) -> None:
        self.source = path
        self.parts = open_files(path)
        self.folder = folder_of(path)
        self.files = list(self.parts.headers)
        self.stored: dict[str, tuple[Tensor, Rows]] = {}
        self.joined: dict[str, tuple[str, str]] = {}
        self.tensors: dict[str, TensorRange] = {}
        self.model = config.skeleton(config.read_config(self.folder))
        self.modules = config.expert_modules(self.model)
        stored = self.parts.facts.tensors
        refuse_undecodable(path, {t.kind for t in stored.values()})
        self._add_experts(stored)
        self._add_backbone(stored)

    def _add_experts(self, stored: Mapping[str, Tensor]) -> None:
        self.dtype = expert_dtype(stored)
        for name, m in experts_of(stored).items():
            if int(m["layer"]) < self.parts.facts.layers:
                self._add(name, stored[name], stored[name].shape, Rows(), self.dtype)

    def _add_backbone(self, stored: Mapping[str, Tensor]) -> None:
        experts = tuple(f"{name}." for name in self.modules)
        shapes = {n: tuple(w.shape) for n, w in self.model.state_dict().items() if not n.startswith(experts)}
        if self.model.config.get_text_config().tie_word_embeddings:
            shapes.pop("lm_head.weight", None)
        heads = read_json(self.folder / "config.json")
        placed = names.backbone_names(self.parts.facts, shapes, heads)
        for name, (source, rows) in placed.items():
            t = stored[source]
            self._expect_shape(source, t.shape, shapes[name])
            self._add(name, t, shapes[name], rows, natural_dtype(t.kind))
        used = {source for source, _ in placed.values()} | self.expert_names()
        lacking = {name: shape for name, shape in shapes.items() if name not in placed}
        names.refuse_strangers(self.parts.facts, used | self._add_latent(lacking))

    def _add_latent(self, lacking: Mapping[str, tuple[int, ...]]) -> set[str]:
        """Add the weights that the file has in halves; returns the names of these."""
        stored = self.parts.facts.tensors
        for name, shape in lacking.items():
            if pair := latent.halves(name, stored):
                k, v = (stored[half] for half in pair)
                self._expect_shape(" and ".join(pair), latent.shape_of(k, v), shape)
                self.joined[name] = pair
                self._add(name, k, shape, Rows(), latent.dtype_of(k, v))
        return {half for pair in self.joined.values() for half in pair}

    def _expect_shape(self, name: str, stored: tuple[int, ...], wanted: tuple[int, ...]) -> None:
        if _core(stored) != _core(wanted):
            raise CheckpointError(
                f"{name} of {self.source} has shape {stored}, and its metadata make a model with {wanted}: "
                "the file is damaged, or of another llama.cpp; fetch it again"
            )

    def _expect(self, t: TensorRange | None, shape: tuple[int, ...], site: Site, e: int) -> TensorRange:
        if t is None:
            raise CheckpointError(
                f"{self.source} lacks experts of layer {site.layer}: the download is incomplete, fetch it again"
            )
        self._expect_shape(f"a stack of experts in layer {site.layer}", t.shape, shape)
        return t

    def _add(self, name: str, t: Tensor, shape: tuple[int, ...], rows: Rows, dtype: str) -> None:
        nbytes = math.prod(shape) * dtype_nbytes(DTYPES[dtype])
        self.tensors[name] = TensorRange(t.file, dtype, shape, t.offset, nbytes)
        self.stored[name] = t, rows

    def path_of(self, file: str) -> Path:
        return self.parts.headers[file].path

    def stored_as(self, file: str) -> str:
        """The safetensors file of a store with what comes from a file of this model."""
        if len(self.files) == 1:
            return WHOLE
        return f"model-{self.files.index(file) + 1:05d}-of-{len(self.files):05d}.safetensors"

    @property
    def name(self) -> str:
        return str(self.source)

    @property
    def not_in_place(self) -> str:
        return f"{self.source} is a GGUF, from which experts cannot be served"

    def expert_names(self) -> set[str]:
        return {name for name in self.tensors if EXPERT.match(name)}

    def expert_dtype(self) -> str:
        return DTYPES[self.dtype]

    def _extent(self, name: str, start: int, nbytes: int, place: int) -> Extent:
        if name in self.joined:
            k, v = (self.parts.facts.tensors[half] for half in self.joined[name])
            return latent.joined(k, v, place)
        t, rows = self.stored[name]
        columns = t.shape[-1] if len(t.shape) > 1 or math.prod(t.shape) == 1 else t.shape[0]
        shape = (math.prod(t.shape) // columns, columns)
        if rows.heads and len(t.shape) == 1:  # a bias: each number is a row
            shape = shape[::-1]
        dtype = DTYPES[self.tensors[name].dtype]
        return GgufExtent(t.file, t.offset, place, nbytes, t.kind, dtype, shape, rows)

    def extents(self, sites: Sequence[Site]) -> dict[tuple[int, int], list[Extent]]:
        return {
            (i, e): [extent for part in site.parts for extent in self._pieces(site, e, part)]
            for i, site in enumerate(sites)
            for e in range(site.num_experts)
        }

    def _pieces(self, site: Site, e: int, part: Part) -> Iterator[Extent]:
        """Where a part of expert `e` is: its slab of one stack, or of two, for gate and up."""
        base, bias, _ = part.name.partition("_bias")
        role = "bias" if bias else "weight"
        pieces = PIECES[base]
        outputs = part.shape[-1] if bias or site.transposed else part.shape[0]
        alternate = len(pieces) > 1 and not getattr(self.modules[site.name], "is_concatenated", True)
        share = outputs // len(pieces)
        for k, piece in enumerate(pieces):
            rows = Rows(k, 2) if alternate else Rows(k * share)
            name, skipped = f"blk.{site.layer}.ffn_{piece}_exps.{role}", 0
            merged = f"blk.{site.layer}.ffn_gate_up_exps.{role}"
            if len(pieces) > 1 and name not in self.tensors and merged in self.tensors:
                name, skipped = merged, k * share
            inner = () if bias else (part.shape[0] if site.transposed else part.shape[1],)
            count = share * (len(pieces) if name == merged else 1)
            self._expect(self.tensors.get(name), (site.num_experts, count, *inner), site, e)
            yield self._slab(name, e, skipped, (share, *inner), rows, part, site.transposed and not bias)

    def _slab(
        self, name: str, e: int, skipped: int, shape: tuple[int, ...], rows: Rows, part: Part, transposed: bool
    ) -> GgufExtent:
        """Rows of expert `e` in a stack, from the row `skipped` on."""
        t = self.stored[name][0]
        stored = (shape[0], shape[1] if len(shape) > 1 else 1)
        slab = t.nbytes // t.shape[0]
        offset = t.offset + e * slab + skipped * (slab // t.shape[1])
        return GgufExtent(t.file, offset, part.offset, part.nbytes, t.kind, part.dtype, stored, rows, transposed)


def _core(shape: tuple[int, ...]) -> tuple[int, ...]:
    """A shape without its ones, which llama.cpp drops or adds."""
    return tuple(n for n in shape if n != 1)


def refuse_undecodable(path: Path, kinds: set[str]) -> None:
    """Raise CheckpointError for a type of tensor that the `gguf` package cannot decode."""
    for kind in sorted(kinds):
        numbers, nbytes = block(kind)
        try:
            decode(bytes(nbytes), kind, numbers)
        except NotImplementedError:
            raise CheckpointError(
                f"{path} holds tensors of {kind}, which the gguf package does not decode: use another quantization"
            ) from None
