"""Reads model folders in the layout of the Hugging Face Hub, expert by expert.

Every byte range comes from headers that are checked before use: sizes, shapes, dtypes, names of files. Nothing is
unpickled, evaluated or imported from a model folder.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mixoff.checkpoints import keys, model_files
from mixoff.checkpoints.model_files import MAX_HEADER, ModelFiles, configurations, parse_json, read_json
from mixoff.errors import CheckpointError
from mixoff.shapes.sites import DTYPES, Part, Site, dtype_nbytes, torch_dtype

ITEM_BITS = dict.fromkeys(("F64", "I64", "U64"), 64) | dict.fromkeys(("F32", "I32", "U32"), 32)
ITEM_BITS |= dict.fromkeys(("F16", "BF16", "I16", "U16"), 16)
ITEM_BITS |= dict.fromkeys(("F8_E4M3", "F8_E5M2", "F8_E8M0", "I8", "U8", "BOOL"), 8)
MAX_DIMENSIONS = 64  # torch's own limit
LOAD_FIRST = "not supported; load the model with transformers, then call mixoff.offload(model)"

Read = Callable[[str, int, memoryview], None]  # read(file, offset, view) fills the view


@dataclass(frozen=True)
class TensorRange:
    """One tensor in a safetensors file; `dtype` by safetensors' name, `offset` and `nbytes` in the file."""

    file: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


@dataclass(frozen=True)
class Extent:
    """`nbytes` bytes at `offset` of `file`, which belong at byte `place` of an expert's image."""

    file: str
    offset: int
    place: int
    nbytes: int

    def ranges(self) -> list[tuple[str, int, int]]:
        """All byte ranges to read: file, offset, size."""
        return [(self.file, self.offset, self.nbytes)]

    def fill(self, image: memoryview, read: Read) -> None:
        """Fill `place` in `image`; `read(file, offset, view)` fills a view with bytes of a file."""
        read(self.file, self.offset, image[self.place : self.place + self.nbytes])


@dataclass(frozen=True)
class WidenedExtent(Extent):
    """Numbers of a narrower dtype than the image has; widening them is exact.

    - nbytes: bytes in the image.
    - dtypes: dtypes in the file and in the image, by torch's names.
    """

    dtypes: tuple[str, str] = ("", "")

    @property
    def stored_nbytes(self) -> int:
        narrow, wide = map(dtype_nbytes, self.dtypes)
        return self.nbytes * narrow // wide

    def ranges(self) -> list[tuple[str, int, int]]:
        return [(self.file, self.offset, self.stored_nbytes)]

    def fill(self, image: memoryview, read: Read) -> None:
        import torch

        raw = bytearray(self.stored_nbytes)
        read(self.file, self.offset, memoryview(raw))
        narrow, wide = map(torch_dtype, self.dtypes)
        out = torch.frombuffer(image[self.place : self.place + self.nbytes], dtype=wide)
        out.copy_(torch.frombuffer(raw, dtype=narrow))


def read_header(path: Path) -> dict[str, TensorRange]:
    """The tensors of one safetensors file; each range is checked against shape, dtype and the file's size."""
    try:
        size = path.stat().st_size
        with path.open("rb") as f:
            raw = f.read(8)
            raw += f.read(min(int.from_bytes(raw, "little"), MAX_HEADER))
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error.strerror or error}): fetch it again") from None
    return parse_header(path, raw, size)


def parse_header(path: Path, raw: bytes, size: int) -> dict[str, TensorRange]:
    """The tensors of a safetensors file of `size` bytes that begins with `raw`; `path` is its name in errors."""
    length = int.from_bytes(raw[:8], "little")
    if len(raw) < 8 or not 2 <= length <= min(size - 8, len(raw) - 8, MAX_HEADER):
        raise CheckpointError(
            f"{path} is truncated or not a safetensors file ({size} bytes): copy it again from its source"
        )
    try:
        header: Any = parse_json(raw[8 : 8 + length])
        header.pop("__metadata__", None)
        tensors = {name: _tensor_range(path.name, entry, 8 + length) for name, entry in header.items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        reason = f"{type(error).__name__}: {error}"[:200]
        raise CheckpointError(f"{path} has a damaged header ({reason}): copy it again from its source") from None
    end = 8 + length
    for name, t in sorted(tensors.items(), key=lambda item: (item[1].offset, item[1].nbytes)):
        if t.offset != end:
            raise CheckpointError(
                f"{path}: {name!r} begins at byte {t.offset}, expected {end}: copy the file again from its source"
            )
        end += t.nbytes
    if end != size:
        raise CheckpointError(
            f"{path} is {size} bytes, its header promises {end}: the copy is incomplete, fetch it again"
        )
    return tensors


def _tensor_range(file: str, entry: dict, base: int) -> TensorRange:
    dtype, shape = entry["dtype"], entry["shape"]
    begin, end = entry["data_offsets"]
    if dtype not in ITEM_BITS:
        raise ValueError(f"unknown dtype {dtype!r}")
    if len(shape) > MAX_DIMENSIONS or not all(type(n) is int and 0 <= n < 2**63 for n in [*shape, begin, end]):
        raise ValueError("a shape or an offset is not a whole number")
    if (nbytes := math.prod(shape) * ITEM_BITS[dtype] // 8) != end - begin:
        raise ValueError(f"shape {shape} of {dtype} takes {nbytes} bytes, the header gives {end - begin}")
    return TensorRange(file, dtype, tuple(shape), base + begin, nbytes)


class Checkpoint:
    """The safetensors files of one model folder. Opening it reads headers only.

    - folder: the folder with config.json.
    - found: the model's files; None looks into the folder.
    - headers: tensors by file, where the files are elsewhere.
    - tensors: every tensor by its name in the files; the later file wins if two have one name, as in transformers.

    Raises CheckpointError for anything missing, damaged or unsafe.
    """

    kind = "plain"  # name of the layout or encoding that this class reads
    widens = True  # whether experts of several dtypes are read as the widest

    def __init__(
        self,
        folder: str | Path,
        found: ModelFiles | None = None,
        headers: Mapping[str, dict[str, TensorRange]] | None = None,
    ) -> None:
        self.folder = Path(folder)
        if not self.folder.is_dir():
            from mixoff.checkpoints.names import missing

            raise CheckpointError(missing(folder))
        if not (self.folder / "config.json").exists():
            names = [p.name for p in self.folder.iterdir()]
            model_files.refuse_adapter(names, self.folder, self.folder)
            model_files.refuse_gguf(names, self.folder)
        _refuse_quantized(read_json(self.folder / "config.json"), self.folder, self.kind)
        self.found = found or model_files.find(self.folder)
        self.files = list(self.found.names)
        self._read_headers(headers)

    def _read_headers(self, headers: Mapping[str, dict[str, TensorRange]] | None) -> None:
        self.tensors: dict[str, TensorRange] = {}
        for file in self.files:
            header = read_header(self.folder / file) if headers is None else headers[file]
            self.tensors |= self._full_names(file, header)

    def _full_names(self, file: str, tensors: dict[str, TensorRange]) -> dict[str, TensorRange]:
        """The tensors of a file by their names in the model."""
        return tensors

    def path_of(self, file: str) -> Path:
        """The path of one of `files`."""
        return self.folder / file

    def stored_as(self, file: str) -> str:
        """The file of a store that holds what is copied from one of `files`."""
        return file

    @property
    def name(self) -> str:
        """What to call it in errors: the folder, or the file that was given."""
        return str(self.folder)

    @property
    def not_in_place(self) -> str | None:
        """Why experts cannot be served from these files as they are; None if they can."""
        dtypes = {self.tensors[name].dtype for name in self.expert_names()}
        mixed = len(dtypes) > 1 and dtypes <= DTYPES.keys()
        return f"{self.folder}: experts are stored as {', '.join(sorted(dtypes))}" if mixed else None

    def stored_sites(self, sites: Iterable[Site]) -> tuple[Site, ...]:
        """The sites with their parts as this checkpoint stores them, which may already be quantized."""
        return tuple(sites)

    def expert_names(self) -> set[str]:
        """Names of the tensors that belong to experts; all others are the backbone."""
        return {name for name in self.tensors if keys.parse(name)}

    def backbone(self) -> dict[str, tuple[TensorRange, Extent]]:
        """Every tensor of the backbone by name: its description once it is read, and how to read it."""
        experts = self.expert_names()
        whole = {name: t for name, t in self.tensors.items() if name not in experts}
        return {name: (t, self._extent(name, 0, t.nbytes, 0)) for name, t in whole.items()}

    def side_changes(self) -> dict[str, bytes]:
        """Small files that differ in a store of this checkpoint."""
        return {}

    def _extent(self, name: str, start: int, nbytes: int, place: int) -> Extent:
        """How to read `nbytes` from byte `start` of a tensor into an image."""
        t = self.tensors[name]
        return Extent(t.file, t.offset + start, place, nbytes)

    def expert_dtype(self) -> str:
        """The dtype of the experts, by torch's name; float32, which holds all others, if they have several."""
        examples = {self.tensors[name].dtype: name for name in sorted(self.expert_names(), reverse=True)}
        if not examples:
            if interleaved := next((name for name in self.tensors if name.endswith(keys.INTERLEAVED)), None):
                raise CheckpointError(f"{interleaved} interleaves the rows of gate and up, as in Inkling: {LOAD_FIRST}")
            raise CheckpointError(
                f"{self.folder} has no expert weights under a name that mixoff knows (…layers.0.….experts.0.w1.weight)"
            )
        if not examples.keys() <= DTYPES.keys() or (len(examples) > 1 and not self.widens):
            listed = ", ".join(f"{name} in {dtype}" for dtype, name in sorted(examples.items()))
            raise CheckpointError(
                f"experts are stored as {', '.join(sorted(examples))} ({listed}): "
                f"mixoff reads checkpoints that have one of {', '.join(DTYPES)} for all experts"
            )
        return "float32" if len(examples) > 1 else DTYPES[examples.popitem()[0]]

    def extents(self, sites: Sequence[Site]) -> dict[tuple[int, int], list[Extent]]:
        """Where the bytes of each expert are, by (site, expert). Every part of every expert is covered exactly once."""
        places = keys.by_place(self.tensors, sites)
        return {
            (i, e): [extent for part in site.parts for extent in self._part_extents(places, sites, i, e, part)]
            for i, site in enumerate(sites)
            for e in range(site.num_experts)
        }

    def _part_extents(self, places: dict[keys.Place, str], sites: Sequence[Site], i: int, e: int, part: Part) -> list:
        """Where a part of expert `e` of site `i` is: a slice of one tensor, or one tensor per matrix of the part."""
        site = sites[i]
        if name := places.get((i, None, part.name)):
            self._expect(self.tensors[name], (site.num_experts, *part.shape), site, e)
            return [self._expert_extent(name, e * part.nbytes, part.nbytes, part.offset, part.dtype)]
        extents, place = [], part.offset
        pieces = keys.PIECES.get(part.name, (part.name,))
        for matrix in pieces:
            name = places.get((i, e, matrix), "")
            self._expect(self.tensors.get(name), (part.shape[0] // len(pieces), *part.shape[1:]), site, e)
            nbytes = part.nbytes // len(pieces)
            extents.append(self._expert_extent(name, 0, nbytes, place, part.dtype))
            place += nbytes
        return extents

    def _expert_extent(self, name: str, start: int, nbytes: int, place: int, dtype: str) -> Extent:
        """How to read `nbytes` of an image in `dtype`, from byte `start` of a tensor counted in that dtype."""
        t = self.tensors[name]
        if (stored := DTYPES[t.dtype]) == dtype:
            return self._extent(name, start, nbytes, place)
        first = start * dtype_nbytes(stored) // dtype_nbytes(dtype)
        return WidenedExtent(t.file, t.offset + first, place, nbytes, (stored, dtype))

    def _expect(self, t: TensorRange | None, shape: tuple[int, ...], site: Site, e: int) -> TensorRange:
        """`t`, if it has the shape that an expert needs."""
        if t is None:
            raise CheckpointError(
                f"{self.folder} lacks weights of expert {e} in layer {site.layer}: "
                "the download is incomplete, fetch it again"
            )
        if t.shape != shape and len(shape) == 3 and t.shape == (shape[0], shape[2], shape[1]):
            raise CheckpointError(
                f"the experts of layer {site.layer} in {t.file} have inputs before outputs, as in Qwen3-VL-MoE: "
                f"{LOAD_FIRST}"
            )
        if t.shape != shape:
            raise CheckpointError(
                f"expert {e} of layer {site.layer} has shape {t.shape} in {t.file}, config.json says {shape}"
            )
        return t


def _refuse_quantized(config: dict, folder: Path, known: str) -> None:
    for part in configurations(config):
        if quantization := part.get("quantization_config"):
            method = quantization.get("quant_method", "unknown") if isinstance(quantization, dict) else quantization
            if method == known:
                continue
            name = " ".join(str(method).split())[:50]
            raise CheckpointError(
                f"{folder} is quantized already ({name}): give mixoff the 16-bit original of this model"
            )
