"""A GGUF file for llama.cpp, in 16, 8, 5 or 4 bits: header, names and encoders are those of the `gguf` package.

Letters: **E** experts, **N** outputs, **K** inputs. Rows of q and k are rearranged where llama.cpp has them so.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from mixoff.checkpoints.checkpoint import Extent, Read
from mixoff.checkpoints.gguf.extent import row_nbytes
from mixoff.checkpoints.gguf.names import ALIASES, ENDINGS, PAIRED, PIECES, Rows
from mixoff.errors import CheckpointError, MixoffError
from mixoff.export.gguf_metadata import architecture_of, write_metadata
from mixoff.export.layout import Export, Reencoded, copied
from mixoff.export.model import Model
from mixoff.quantize.scheme import Scheme
from mixoff.quantize.solve import is_finite
from mixoff.shapes.config import read_config
from mixoff.shapes.sites import DTYPES, Part
from mixoff.store.blueprint import Output, Weight

BLOCK = 32  # numbers of a block of each quantized type
QUANTIZED = {8: "Q8_0", 5: "Q5_0", 4: "Q4_0"}  # by bits; the package has no encoders of k- and i-quants
WIDER = ("token_embd.weight", "output.weight")  # in 8 bits at least, as llama.cpp's own tool has more bits there
ROWS = 256  # outputs encoded at a time
EXACT = {"float16": "F16", "bfloat16": "BF16", "float32": "F16"}
FP32 = (".ffn_gate_inp.weight", ".ffn_gate_inp_shexp.weight")  # routers, which llama.cpp computes in fp32


@dataclass(frozen=True)
class EncodedExtent(Reencoded):
    """A weight, or a part of an expert, in a type of GGUF.

    - kind: type to encode it in.
    - rows: where its rows come from, if llama.cpp has them in another order.
    """

    kind: str
    rows: Rows

    def fill(self, image: memoryview, read: Read) -> None:
        from gguf.constants import GGMLQuantizationType
        from gguf.quants import quantize

        whole = self.weights(read).view(-1, self.part.shape[-1])
        rest = image[self.place : self.place + self.nbytes]
        for start in range(0, len(whole), ROWS):
            stop = min(start + ROWS, len(whole))
            some = whole[self.rows.of(start, stop, len(whole))].float()
            if not is_finite(some) or (self.kind == "F16" and not is_finite(some.half())):
                raise CheckpointError(
                    f"{self.part.name} in {self.file} holds NaN or numbers beyond the 65504 of float16: repair it, "
                    "then export again"
                )
            encoded = quantize(some.numpy(), GGMLQuantizationType[self.kind]).tobytes()
            rest[: len(encoded)] = encoded
            rest = rest[len(encoded) :]


@dataclass(frozen=True)
class Stored:
    """A tensor of the file: shape, outputs first, and type."""

    shape: tuple[int, ...]
    kind: str

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor."""
        return math.prod(self.shape[:-1]) * row_nbytes(self.kind, self.shape[-1])


def gguf_layout(model: Model, target: Path, bits: int | None) -> Export:
    """One GGUF file. Raises MixoffError for what it cannot hold.

    bits: 4, 5, 8 (see QUANTIZED) or 16 of each matrix; None is 16
    """
    package = _package()
    if target.suffix.lower() != ".gguf":
        raise MixoffError(f"a GGUF is one file: give OUT a name that ends in .gguf, as in {target.name}.gguf")
    config = read_config(model.checkpoint.folder)
    arch = architecture_of(config, model.sites)
    names = _backbone_names(model, arch, config.get_text_config().num_hidden_layers)
    tensors = {}
    for name, stored in names.items():
        t = model.backbone[name][0]
        tensors[stored] = Stored(t.shape, _kind(stored, t.shape, t.dtype, bits))
    for site in model.sites:
        for part in site.parts:
            N, K = part.shape
            pieces = PIECES[part.name]
            for piece in pieces:
                stored = f"blk.{site.layer}.ffn_{piece}_exps.weight"
                shape = site.num_experts, N // len(pieces), K
                tensors[stored] = Stored(shape, _kind(stored, shape, _name_of(part.dtype), bits))
    head, offsets = _head(package, model, arch, tensors)
    file, last = target.name, max(offsets, key=offsets.__getitem__)
    size = len(head) + package.GGUFWriter.ggml_pad(offsets[last] + tensors[last].nbytes, package.GGUF_DEFAULT_ALIGNMENT)
    places = {name: len(head) + offset for name, offset in offsets.items()}
    weights = [*_backbone(model, arch, config, names, tensors, places, file), *_experts(model, tensors, places, file)]
    return Export(Scheme(), model.sites[0].parts[0].dtype, (), weights, {file: size}, {file: head}, alone=file)


def _package() -> ModuleType:
    try:
        import gguf
    except ImportError:
        raise MixoffError("the package gguf writes GGUF files: pip install 'mixoff[gguf]'") from None
    return gguf


def _name_of(dtype: str) -> str:
    return next(name for name, known in DTYPES.items() if known == dtype)


def _kind(stored: str, shape: tuple[int, ...], dtype: str, bits: int | None) -> str:
    """The type of a tensor: fp32 for vectors and routers, as llama.cpp has them."""
    if dtype not in DTYPES:
        raise MixoffError(f"{stored} would be {dtype}, which is not a weight: export to hf instead")
    if len(shape) < 2 or stored.endswith(FP32):
        return "F32"
    if bits not in QUANTIZED or shape[-1] % BLOCK:
        return EXACT[DTYPES[dtype]]
    return QUANTIZED[8 if stored in WIDER else bits]


def _backbone_names(model: Model, arch: str, layers: int) -> dict[str, str]:
    """Names in the file by names on the Hub."""
    from gguf.constants import MODEL_ARCH_NAMES
    from gguf.tensor_mapping import get_tensor_name_map

    table = get_tensor_name_map(next(key for key, name in MODEL_ARCH_NAMES.items() if name == arch), layers)
    found = {}
    for name in model.backbone:
        known = name
        for ours, theirs in ALIASES:
            known = known.removesuffix(ours) + theirs if known.endswith(ours) else known
        if (stored := table.get_name(known, try_suffixes=ENDINGS)) is None:
            raise MixoffError(
                f"{name} has no name in llama.cpp's {arch}: export to hf, and convert that with llama.cpp"
            )
        found[name] = stored
    return found


def _head(package: ModuleType, model: Model, arch: str, tensors: dict[str, Stored]) -> tuple[bytes, dict[str, int]]:
    """The bytes before the first tensor, and each tensor's offset behind them."""
    import numpy as np

    align = package.GGUF_DEFAULT_ALIGNMENT
    offsets, end = {}, 0
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "head.gguf")
        writer = package.GGUFWriter(path, arch)
        write_metadata(writer, model, arch, {t.kind for t in tensors.values()})
        for name, t in tensors.items():
            kind = package.GGMLQuantizationType[t.kind]
            writer.add_tensor_info(name, t.shape, np.dtype(np.float32), t.nbytes, raw_dtype=kind)
            offsets[name] = end
            end += package.GGUFWriter.ggml_pad(t.nbytes, align)
        writer.write_header_to_file(path)
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        writer.close()
        head = path.read_bytes()
    return head + bytes(-len(head) % align), offsets


def _backbone(
    model: Model,
    arch: str,
    config: object,
    names: dict[str, str],
    tensors: dict[str, Stored],
    places: dict[str, int],
    file: str,
) -> Iterator[Weight]:
    text = config.get_text_config()  # type: ignore[attr-defined]  # a configuration of transformers
    heads = {".attn_q.": text.num_attention_heads, ".attn_k.": text.num_key_value_heads} if arch in PAIRED else {}
    for name, stored in names.items():
        t, extent = model.backbone[name]
        rows = Rows(heads=next((count for part, count in heads.items() if part in stored), 0))
        part = Part(name, t.shape, DTYPES[t.dtype], 0, t.nbytes)
        output = Output(stored, file, places[stored], tensors[stored].nbytes)
        yield _weight(name, [extent], part, tensors[stored].kind, rows, [output])


def _experts(model: Model, tensors: dict[str, Stored], places: dict[str, int], file: str) -> Iterator[Weight]:
    for i, site in enumerate(model.sites):
        for e in range(site.num_experts):
            for part in site.parts:
                names = [f"blk.{site.layer}.ffn_{piece}_exps.weight" for piece in PIECES[part.name]]
                slab = tensors[names[0]].nbytes // site.num_experts
                outputs = [Output(f"{name}.{e}", file, places[name] + e * slab, slab) for name in names]
                alone = Part(part.name, part.shape, part.dtype, 0, part.nbytes)
                name = f"{site.name}.{e}.{part.name}"
                yield _weight(name, model.of_part(i, e, part), alone, tensors[names[0]].kind, Rows(), outputs)


def _weight(name: str, inner: Iterable[Extent], part: Part, kind: str, rows: Rows, outputs: Iterable[Output]) -> Weight:
    inner, outputs = tuple(inner), tuple(outputs)
    nbytes = sum(output.nbytes for output in outputs)
    extent = EncodedExtent(inner[0].file, inner[0].offset, 0, nbytes, inner, part, kind, rows)
    return copied(name, [extent], Part(name, (nbytes,), "uint8", 0, nbytes), outputs, f"{name} in {inner[0].file}")
