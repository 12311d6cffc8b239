"""Reads model folders in the layout of the Hugging Face Hub, expert by expert.

Every byte range comes from headers that are checked before use: sizes, shapes, dtypes, names of files. Nothing is
unpickled, evaluated or imported from a model folder. Does not know caches or budgets.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from mixoff import keys
from mixoff.errors import CheckpointError
from mixoff.shapes import Part, Site

DTYPES = {"F16": "float16", "BF16": "bfloat16", "F32": "float32"}  # of experts that we serve unquantized
ITEM_BITS = {
    "F64": 64,
    "I64": 64,
    "U64": 64,
    "F32": 32,
    "I32": 32,
    "U32": 32,
    "F16": 16,
    "BF16": 16,
    "I16": 16,
    "U16": 16,
}
ITEM_BITS |= {"F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "I8": 8, "U8": 8, "BOOL": 8}
MAX_HEADER = 100_000_000  # bytes; the limit of the safetensors format itself
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
MAX_DIMENSIONS = 64  # torch's own limit
INDEX = "model.safetensors.index.json"
LOAD_FIRST = "not supported; load the model with transformers, then call mixoff.offload(model)"

Read = Callable[[str, int, memoryview], None]  # of a file, from an offset, until the view is full


@dataclass(frozen=True)
class TensorRange:
    """One tensor in a safetensors file: `offset` and `nbytes` in the file, dtype by safetensors' name."""

    file: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


@dataclass(frozen=True)
class Extent:
    """`nbytes` at `offset` of `file` belong at `place` of an expert's image."""

    file: str
    offset: int
    place: int
    nbytes: int

    def ranges(self) -> list[tuple[str, int, int]]:
        """File, offset and size of all that has to be read for it."""
        return [(self.file, self.offset, self.nbytes)]

    def fill(self, image: memoryview, read: Read) -> None:
        """Fill its place in `image`; `read(file, offset, view)` fills a view with bytes of a file."""
        read(self.file, self.offset, image[self.place : self.place + self.nbytes])


def read_json(path: Path) -> dict:
    """A JSON object from `path`. Raises CheckpointError when it is missing, no JSON, or no object."""
    try:
        if (size := path.stat().st_size) > MAX_HEADER:
            raise ValueError(f"{size} bytes")
        value = parse_json(path.read_bytes())
    except FileNotFoundError:
        raise CheckpointError(
            f"{path.parent} has no {path.name}: a model folder holds config.json and *.safetensors"
        ) from None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not readable JSON ({error}): copy it again from its source") from None
    if not isinstance(value, dict):
        raise CheckpointError(
            f"{path} holds a {type(value).__name__}, expected a JSON object: copy it again from its source"
        )
    return value


def parse_json(raw: bytes) -> object:
    """The value of a JSON text in UTF-8. Raises ValueError, also for a key that stands twice, or RecursionError."""

    def unique(pairs: list[tuple[str, object]]) -> dict:
        found = dict(pairs)
        if len(found) != len(pairs):
            raise ValueError("a key stands twice")
        return found

    return json.loads(raw.decode("utf-8"), object_pairs_hook=unique)


def read_header(path: Path) -> dict[str, TensorRange]:
    """The tensors of one safetensors file, each range checked against its shape, its dtype and the file's size."""
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
            f"{path} is truncated or no safetensors file ({size} bytes): copy it again from its source"
        )
    try:
        header = parse_json(raw[8 : 8 + length])
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
            f"{path} holds {size} bytes, its header promises {end}: the copy is incomplete, fetch it again"
        )
    return tensors


def _tensor_range(file: str, entry: dict, base: int) -> TensorRange:
    dtype, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
    if dtype not in ITEM_BITS:
        raise ValueError(f"unknown dtype {dtype!r}")
    if len(shape) > MAX_DIMENSIONS or not all(type(n) is int and 0 <= n < 2**63 for n in [*shape, begin, end]):
        raise ValueError("a shape or an offset is not a whole number")
    if (nbytes := math.prod(shape) * ITEM_BITS[dtype] // 8) != end - begin:
        raise ValueError(f"shape {shape} of {dtype} takes {nbytes} bytes, the header gives {end - begin}")
    return TensorRange(file, dtype, tuple(shape), base + begin, nbytes)


class Checkpoint:
    """The safetensors files of one model folder. Opening it reads headers only.

    `tensors`: every tensor by its name in the files. headers: the tensors by file, where the files are elsewhere.
    Raises CheckpointError for anything missing, damaged or unsafe.
    """

    in_place = True  # whether experts can be served from these files as they are
    method: str | None = None  # of the quantization that this class reads

    def __init__(self, folder: str | Path, headers: Mapping[str, dict[str, TensorRange]] | None = None) -> None:
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise CheckpointError(
                f"no model folder at {folder}: give the folder that holds config.json and *.safetensors"
            )
        _refuse_quantized(read_json(self.folder / "config.json"), self.folder, self.method)
        self.files = _weight_files(self.folder) if headers is None else sorted(headers)
        self.tensors: dict[str, TensorRange] = {}
        for file in self.files:
            header = read_header(self.folder / file) if headers is None else headers[file]
            for name, t in self._full_names(file, header).items():
                if name in self.tensors:
                    raise CheckpointError(
                        f"{name!r} stands in {t.file} and in {self.tensors[name].file}: keep one of them"
                    )
                self.tensors[name] = t

    def _full_names(self, file: str, tensors: dict[str, TensorRange]) -> dict[str, TensorRange]:
        """The tensors of a file by their names in the model."""
        return tensors

    def stored_sites(self, sites: Iterable[Site]) -> tuple[Site, ...]:
        """The sites with their parts as this checkpoint has them: its experts may be quantized already."""
        return tuple(sites)

    def expert_names(self) -> set[str]:
        """Names of the tensors that belong to experts; all others are the backbone."""
        return {name for name in self.tensors if keys.parse(name)}

    def backbone(self) -> dict[str, tuple[TensorRange, Extent]]:
        """Every tensor that is no expert's by name: as it is once it has been read, and how to read it."""
        experts = self.expert_names()
        whole = {name: t for name, t in self.tensors.items() if name not in experts}
        return {name: (t, self._extent(name, 0, t.nbytes, 0)) for name, t in whole.items()}

    def side_changes(self) -> dict[str, bytes]:
        """Small files that a store has otherwise than this checkpoint."""
        return {}

    def _extent(self, name: str, start: int, nbytes: int, place: int) -> Extent:
        """How to read `nbytes` from byte `start` of a tensor into an image."""
        t = self.tensors[name]
        return Extent(t.file, t.offset + start, place, nbytes)

    def expert_dtype(self) -> str:
        """The one dtype that all experts are stored in, by torch's name."""
        found = {self.tensors[name].dtype: name for name in sorted(self.expert_names(), reverse=True)}
        if not found:
            if interleaved := next((name for name in self.tensors if name.endswith(keys.INTERLEAVED)), None):
                raise CheckpointError(
                    f"{interleaved} has the rows of gate and up in turns, as in Inkling: {LOAD_FIRST}"
                )
            raise CheckpointError(
                f"{self.folder} has no expert weights under a name that mixoff knows (…layers.0.….experts.0.w1.weight)"
            )
        if len(found) > 1 or not found.keys() <= DTYPES.keys():
            examples = ", ".join(f"{name} in {dtype}" for dtype, name in sorted(found.items()))
            raise CheckpointError(
                f"experts are stored as {', '.join(sorted(found))} ({examples}): "
                f"mixoff reads checkpoints that have one of {', '.join(DTYPES)} for all experts"
            )
        return DTYPES[found.popitem()[0]]

    def extents(self, sites: Sequence[Site]) -> dict[tuple[int, int], list[Extent]]:
        """Where the bytes of each expert stand, by (site, expert). Every part of every expert is covered, once."""
        places = keys.by_place(self.tensors, sites)
        return {
            (i, e): [extent for part in site.parts for extent in self._part_extents(places, sites, i, e, part)]
            for i, site in enumerate(sites)
            for e in range(site.num_experts)
        }

    def _part_extents(self, places: dict[keys.Place, str], sites: Sequence[Site], i: int, e: int, part: Part) -> list:
        """Where a part of expert `e` of site `i` stands: a slice of a tensor, or a tensor for each of its matrices."""
        site = sites[i]
        if name := places.get((i, None, part.name)):
            self._expect(self.tensors[name], (site.num_experts, *part.shape), site, e)
            return [self._extent(name, e * part.nbytes, part.nbytes, part.offset)]
        extents, place = [], part.offset
        pieces = keys.PIECES.get(part.name, (part.name,))
        for matrix in pieces:
            t = self.tensors.get(name := places.get((i, e, matrix)))
            self._expect(t, (part.shape[0] // len(pieces), *part.shape[1:]), site, e)
            extents.append(self._extent(name, 0, t.nbytes, place))
            place += t.nbytes
        return extents

    def _expect(self, t: TensorRange | None, shape: tuple[int, ...], site: Site, e: int) -> None:
        if t is None:
            raise CheckpointError(
                f"{self.folder} lacks weights of expert {e} in layer {site.layer}: "
                "the download is incomplete, fetch it again"
            )
        if t.shape != shape and len(shape) == 3 and t.shape == (shape[0], shape[2], shape[1]):
            what = (
                f"the experts of layer {site.layer} stand in {t.file} with inputs before outputs, as Qwen3-VL-MoE's do"
            )
            raise CheckpointError(f"{what}: {LOAD_FIRST}")
        if t.shape != shape:
            raise CheckpointError(
                f"expert {e} of layer {site.layer} has shape {t.shape} in {t.file}, config.json says {shape}"
            )


def _refuse_quantized(config: dict, folder: Path, known: str | None) -> None:
    for holder in (config, config.get("text_config")):
        if isinstance(holder, dict) and (quantization := holder.get("quantization_config")):
            method = quantization.get("quant_method", "unknown") if isinstance(quantization, dict) else quantization
            if method == known:
                continue
            name = " ".join(str(method).split())[:50]
            raise CheckpointError(
                f"{folder} is quantized already ({name}): give mixoff the 16-bit original of this model"
            )


def _weight_files(folder: Path) -> list[str]:
    """Names of the safetensors files, from the index where there is one. Only plain names inside the folder."""
    indexed = (folder / INDEX).exists()
    files = indexed_files(folder) if indexed else sorted(p.name for p in folder.glob("*.safetensors"))
    if not files and any(p.suffix in PICKLES for p in folder.iterdir()):
        raise CheckpointError(
            f"{folder} holds pickle files, which can run code when opened: use a copy with *.safetensors files"
        )
    if not files:
        raise CheckpointError(
            f"{folder} has no *.safetensors files: the download is incomplete, or this is no model folder"
        )
    for file in files:
        if not (folder / file).is_file():
            raise CheckpointError(f"{folder} lacks {file}: the download is incomplete, fetch it again")
    return files


def indexed_files(folder: Path) -> list[str]:
    """Names of the files that a folder's index points to. Raises CheckpointError for all but plain names."""
    weight_map = read_json(folder / INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(f, str) for f in weight_map.values()):
        raise CheckpointError(f"{folder / INDEX} has no weight_map: copy it again from its source")
    for file in (files := sorted(set(weight_map.values()))):
        if set(file) & set("/\\:") or not file.isprintable() or not file.endswith(".safetensors"):
            raise CheckpointError(
                f"{folder / INDEX} points to {file!r}, which is no plain name of a *.safetensors file: "
                "do not trust this folder"
            )
    return files
