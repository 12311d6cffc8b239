"""Which tensors of a checkpoint are which weight, for each quantizer, and whether their shapes can be what they say.

Names are those of the Hub: `….experts.0.w1.qweight` (GPTQ, AWQ), `….weight_packed` (compressed-tensors),
`….weight.quant_state.bitsandbytes__nf4` (bitsandbytes), `….weight_scale_2` (modelopt). Shapes come from headers alone,
except those of bitsandbytes, which are in a small tensor.
"""

from __future__ import annotations

import math
from typing import Any

from mixoff.checkpoints.checkpoint import TensorRange
from mixoff.checkpoints.encoded import FP8, SCALES, EncodedCheckpoint, Fp8Extent, block_of, quantization_of
from mixoff.checkpoints.packed.floats import Bnb, Fp4, bnb_state
from mixoff.checkpoints.packed.integers import WORDS, Awq, Bytes, Gptq, Packed
from mixoff.checkpoints.packed.matrix import Matrix, extent_of
from mixoff.errors import CheckpointError
from mixoff.shapes.sites import DTYPES

FLOATS = ("F16", "BF16", "F32")
UNUSED = (
    ".input_scale",
    ".input_global_scale",
    ".input_zero_point",
    ".k_scale",
    ".v_scale",
    ".q_scale",
    ".output_scale",
)
CODES = ("U8", "I8", *FP8)  # dtypes that no weight has unless it is encoded
MOST_STATE = 10_000  # bytes of bitsandbytes' description of a weight
NVFP4, MXFP4 = 16, 32  # inputs that share a scale
ORIGINAL = "use the 16-bit original of this model"


class PackedCheckpoint(EncodedCheckpoint):
    """A checkpoint in which each quantized weight is several tensors; `tensors` describes them decoded."""

    def _decode_names(self) -> None:
        self.settings = quantization_of(self.folder)
        for name in [name for name in self.tensors if name.endswith(UNUSED)]:
            del self.tensors[name]
        self._decode_all()
        plain = (name for name, t in self.tensors.items() if name not in self.encoded and t.dtype in CODES)
        if odd := next(plain, None):
            raise CheckpointError(f"{self.folder} has no scale for {odd}: fetch it again, or {ORIGINAL}")

    def _decode_all(self) -> None:
        raise NotImplementedError

    def _bases(self, ending: str) -> list[str]:
        """Names of the layers that have a tensor with this ending."""
        return [name.removesuffix(ending) for name in self.tensors if name.endswith(ending)]

    def _take(self, base: str, needed: tuple[str, ...], optional: tuple[str, ...] = ()) -> dict[str, TensorRange]:
        """The tensors of a layer by the ends of their names, which are then no longer in `tensors`."""
        if lacking := next((part for part in needed if f"{base}.{part}" not in self.tensors), None):
            raise CheckpointError(f"{self.folder} lacks {base}.{lacking}: the download is incomplete, fetch it again")
        given = (part for part in (*needed, *optional) if f"{base}.{part}" in self.tensors)
        return {part: self.tensors.pop(f"{base}.{part}") for part in given}

    def _expect_part(self, base: str, part: str, t: TensorRange, dtypes: tuple[str, ...], *shapes: tuple) -> None:
        """Raise CheckpointError unless a tensor has one of the dtypes, and one of the shapes if any are given."""
        if t.dtype not in dtypes or 0 in t.shape or (shapes and t.shape not in shapes):
            wanted = " or ".join(dict.fromkeys(map(str, shapes))) or "a matrix"
            raise CheckpointError(
                f"{base}.{part} in {t.file} is {t.dtype} {t.shape}, expected {' or '.join(dtypes)} {wanted}: fetch it "
                f"again, or {ORIGINAL}"
            )

    def _setting(self, name: str, choices: tuple, default: Any = None) -> Any:
        """A setting of config.json's quantization_config. Raises CheckpointError for one that mixoff does not read."""
        value = self.settings.get(name, default)
        if isinstance(value, bool) or value not in choices:
            raise CheckpointError(
                f"{self.folder} is {self.kind} with {name} = {str(value)[:50]!r}, and mixoff reads "
                f"{', '.join(map(str, choices))}: {ORIGINAL}"
            )
        return value

    def _add_matrix(self, base: str, matrix: Matrix, scale: TensorRange | None = None) -> None:
        """Add a decoded weight, in the dtype of its scale if that has 16 bits, else in bf16."""
        dtype = scale.dtype if scale and scale.dtype in ("F16", "BF16") else "BF16"
        self._add(f"{base}.weight", matrix.shape, extent_of(matrix, DTYPES[dtype]), dtype)

    def _groups(self, base: str, K: int, groups: int) -> int:
        if groups < 1 or K % groups:
            raise CheckpointError(f"{base} has {groups} groups, which do not divide its {K} inputs: fetch it again")
        return groups

    def _fp4(self, base: str, parts: dict[str, TensorRange], divided: bool) -> Fp4:
        """The matrix of codes, scales and, for NVFP4, a scale of the matrix, given in this order."""
        (name, codes), (scale_name, scale), *whole = parts.items()
        self._expect_part(base, name, codes, ("U8",))
        if len(codes.shape) != 2:
            raise CheckpointError(f"{base}.{name} is not a matrix: fetch {codes.file} again")
        N, K = codes.shape[0], 2 * codes.shape[1]
        group, dtypes = (NVFP4, ("F8_E4M3",)) if whole else (MXFP4, ("U8",))
        self._groups(base, K, K // group if K % group == 0 else 0)
        self._expect_part(base, scale_name, scale, dtypes, (N, K // group))
        for part, t in whole:
            self._expect_part(base, part, t, ("F32",), (), (1,))
        roles = {"weight": codes, "scale": scale} | ({"global": whole[0][1]} if whole else {})
        return Fp4("nvfp4" if whole else "mxfp4", (N, K), roles, divided)


class GptqCheckpoint(PackedCheckpoint):
    """GPTQ, with act-order or without, in the layout of AutoGPTQ and GPTQModel."""

    kind = "gptq"

    def _decode_all(self) -> None:
        bits = self._setting("bits", (2, 3, 4, 8))
        layout = self._setting("checkpoint_format", ("gptq", "gptq_v2"), self.settings.get("format", "gptq"))
        for base in self._bases(".qweight"):
            parts = self._take(base, ("qweight", "qzeros", "scales"), ("g_idx",))
            self._add_matrix(base, self._matrix(base, parts, bits, int(layout == "gptq")), parts["scales"])

    def _matrix(self, base: str, parts: dict[str, TensorRange], bits: int, offset: int) -> Gptq:
        for part in ("qweight", "scales"):
            self._expect_part(base, part, parts[part], ("I32",) if part == "qweight" else FLOATS)
        packed, words = parts["qweight"].shape, WORDS.get(bits, 1)
        if len(packed) != 2 or packed[0] % words:
            raise CheckpointError(f"{base}.qweight has shape {packed}, which is not a matrix: fetch it again")
        K, N = packed[0] * 32 // bits, packed[1]
        groups = self._groups(base, K, parts["scales"].shape[0])
        self._expect_part(base, "scales", parts["scales"], FLOATS, (groups, N))
        self._expect_part(base, "qzeros", parts["qzeros"], ("I32",), (groups, N * bits // 32))
        if "g_idx" in parts:
            self._expect_part(base, "g_idx", parts["g_idx"], ("I32",), (K,))
        act_order = bool(self.settings.get("desc_act"))
        kind = f"gptq {bits} bits g{K // groups}" + ", act-order" * act_order
        return Gptq(kind, (N, K), parts, bits, groups, offset, act_order)


class AwqCheckpoint(PackedCheckpoint):
    """AWQ in AutoAWQ's layout `gemm`."""

    kind = "awq"

    def _decode_all(self) -> None:
        self._setting("bits", (4,), self.settings.get("w_bit"))
        self.settings["version"] = str(self.settings.get("version", "gemm")).lower()
        self._setting("version", ("gemm",))
        for base in self._bases(".qweight"):
            parts = self._take(base, ("qweight", "scales"), ("qzeros",))
            self._expect_part(base, "qweight", parts["qweight"], ("I32",))
            if len(parts["qweight"].shape) != 2 or len(parts["scales"].shape) != 2:
                raise CheckpointError(f"{base}.qweight or its scales are not a matrix: fetch the file again")
            K, words = parts["qweight"].shape
            groups = self._groups(base, K, parts["scales"].shape[0])
            self._expect_part(base, "scales", parts["scales"], FLOATS, (groups, 8 * words))
            if "qzeros" in parts:
                self._expect_part(base, "qzeros", parts["qzeros"], ("I32",), (groups, words))
            matrix = Awq(f"awq 4 bits g{K // groups}", (8 * words, K), parts, 4, groups)
            self._add_matrix(base, matrix, parts["scales"])


class CompressedCheckpoint(PackedCheckpoint):
    """compressed-tensors, as llm-compressor writes it: whole numbers in 4 or 8 bits, fp8, NVFP4 and MXFP4."""

    kind = "compressed-tensors"

    def _decode_all(self) -> None:
        self._refuse_sparse()
        for base in self._bases(".weight_packed"):
            if self.tensors[f"{base}.weight_packed"].dtype == "U8":
                self._add_fp4(base)
            else:
                self._add_packed(base)
        for base in self._bases(".weight_scale"):
            weight = self.tensors.get(f"{base}.weight")
            if weight is not None and weight.dtype in FP8:
                self._add_fp8(base)
            else:
                self._add_bytes(base)

    def _refuse_sparse(self) -> None:
        sparse = self.settings.get("sparsity_config") or {}
        kinds = {
            str(self.settings.get("format")),
            str(sparse.get("format", "dense") if isinstance(sparse, dict) else sparse),
        }
        if odd := next((kind for kind in sorted(kinds) if "marlin" in kind or "sparse" in kind), None):
            raise CheckpointError(f"{self.folder} is compressed-tensors in the format {odd[:50]}: {ORIGINAL}")

    def _bits(self, base: str) -> int:
        """Bits of packed weights, which have to be the same in all groups of the configuration."""
        groups = self.settings.get("config_groups")
        groups = groups.values() if isinstance(groups, dict) else ()
        weights = [group.get("weights") for group in groups if isinstance(group, dict)]
        given = (w.get("num_bits") for w in weights if isinstance(w, dict) and w.get("type") == "int")
        kinds = {bits for bits in given if type(bits) is int}
        if len(kinds) != 1 or not kinds <= {2, 4, 8}:
            raise CheckpointError(
                f"{self.folder} packs {base} in {sorted(kinds) or 'unknown'} bits, and mixoff reads one of 2, 4 and 8 "
                f"for all packed weights: {ORIGINAL}"
            )
        return kinds.pop()

    def _add_packed(self, base: str) -> None:
        parts = self._take(base, ("weight_packed", "weight_scale"), ("weight_zero_point", "weight_g_idx"))
        self.tensors.pop(f"{base}.weight_shape", None)
        self._expect_part(base, "weight_packed", parts["weight_packed"], ("I32",))
        if len(parts["weight_packed"].shape) != 2:
            raise CheckpointError(f"{base}.weight_packed is not a matrix: fetch {parts['weight_packed'].file} again")
        bits = self._bits(base)
        N, words = parts["weight_packed"].shape
        per = 32 // bits
        groups = self._scale(base, N, words * per, parts, (-(-N // per),), ("I32", "I8"))
        if order := parts.pop("weight_g_idx", None):
            self._expect_part(base, "weight_g_idx", order, ("I32",), (words * per,))
            parts["g_idx"] = order
        kind = f"compressed-tensors int{bits} g{words * per // groups}"
        self._add_matrix(base, Packed(kind, (N, words * per), parts, bits, groups), parts["weight_scale"])

    def _add_bytes(self, base: str) -> None:
        parts = self._take(base, ("weight", "weight_scale"), ("weight_zero_point",))
        self._expect_part(base, "weight", parts["weight"], ("I8",))
        if len(parts["weight"].shape) != 2:
            raise CheckpointError(f"{base}.weight is not a matrix: fetch {parts['weight'].file} again")
        N, K = parts["weight"].shape
        groups = self._scale(base, N, K, parts, (N,), ("I8",))
        matrix = Bytes(f"compressed-tensors int8 g{K // groups}", (N, K), parts, 8, groups)
        self._add_matrix(base, matrix, parts["weight_scale"])

    def _scale(self, base: str, N: int, K: int, parts: dict, zeros: tuple[int], dtypes: tuple[str, ...]) -> int:
        """Groups of a row, from a scale (N, groups), (1,) or (1, 1) and a zero point that has to fit it."""
        scale = parts["weight_scale"]
        single = math.prod(scale.shape) == 1
        groups = self._groups(base, K, 1 if single else scale.shape[-1])
        self._expect_part(base, "weight_scale", scale, FLOATS, scale.shape if single else (N, groups))
        if zero := parts.get("weight_zero_point"):
            shape = scale.shape if single else (zeros[0] if zero.dtype == "I32" else N, groups)
            self._expect_part(base, "weight_zero_point", zero, dtypes, shape)
        return groups

    def _add_fp4(self, base: str) -> None:
        nested = f"{base}.weight_global_scale" in self.tensors
        parts = self._take(base, ("weight_packed", "weight_scale"), ("weight_global_scale",))
        self._add_matrix(base, self._fp4(base, parts, divided=nested))

    def _add_fp8(self, base: str) -> None:
        parts = self._take(base, ("weight", "weight_scale"))
        weight, scale = parts["weight"], parts["weight_scale"]
        shape = (scale.shape[0], 1) if len(scale.shape) == 1 and scale.shape[0] > 1 else scale.shape
        self._add_blocks(base, weight, TensorRange(scale.file, scale.dtype, shape, scale.offset, scale.nbytes))

    def _add_blocks(self, base: str, weight: TensorRange, scale: TensorRange) -> None:
        size = next(iter(self._block_sizes()), None)
        block = block_of(weight.shape, scale, size) if scale.dtype in SCALES else None
        if block is None:
            raise CheckpointError(
                f"{base}.weight_scale is {scale.dtype} {scale.shape} for a weight of {weight.shape}: {ORIGINAL}"
            )
        extent = Fp8Extent(weight.file, weight.offset, 0, 2 * math.prod(weight.shape), weight, scale, block)
        self._add(f"{base}.weight", weight.shape, extent)

    def _block_sizes(self) -> list:
        groups = self.settings.get("config_groups")
        groups = groups.values() if isinstance(groups, dict) else ()
        weights = [group.get("weights") for group in groups if isinstance(group, dict)]
        return [w["block_structure"] for w in weights if isinstance(w, dict) and w.get("block_structure")]


class ModeloptCheckpoint(CompressedCheckpoint):
    """NVIDIA's modelopt: NVFP4, and fp8 with one scale per matrix."""

    kind = "modelopt"

    def _decode_all(self) -> None:
        for base in self._bases(".weight_scale_2"):
            parts = self._take(base, ("weight", "weight_scale", "weight_scale_2"))
            self._add_matrix(base, self._fp4(base, parts, divided=False))
        for base in self._bases(".weight_scale"):
            self._add_fp8(base)


class BitsandbytesCheckpoint(PackedCheckpoint):
    """bitsandbytes in 4 bits, nf4 or fp4, quantized twice or once."""

    kind = "bitsandbytes"
    MARK = ".weight.quant_state.bitsandbytes__"

    def _decode_all(self) -> None:
        marks = [name for name in self.tensors if self.MARK in name]
        for mark in marks:
            base, _, quantizer = mark.partition(self.MARK)
            state = bnb_state(self._bytes_of(self.tensors.pop(mark)), mark)
            twice = ("weight.nested_absmax", "weight.nested_quant_map") if "nested_blocksize" in state else ()
            parts = self._take(base, ("weight", "weight.absmax", "weight.quant_map", *twice))
            matrix = self._matrix(
                base, {role.removeprefix("weight."): t for role, t in parts.items()}, state, quantizer
            )
            dtype = {"bfloat16": "BF16", "float16": "F16"}.get(state["dtype"], "BF16")
            self._add(f"{base}.weight", matrix.shape, extent_of(matrix, DTYPES[dtype]), dtype)
        if odd := next((name for name in self.tensors if name.endswith((".SCB", ".absmax"))), None):
            raise CheckpointError(f"{self.folder} has {odd}, which is not of bitsandbytes' 4 bits: {ORIGINAL}")

    def _bytes_of(self, t: TensorRange) -> bytes:
        path = self.path_of(t.file)
        if not path.is_file():
            raise CheckpointError(
                f"the shapes of bitsandbytes' weights are inside {t.file}: fetch the whole model with `hf download`, "
                "and give mixoff its folder"
            )
        if t.dtype != "U8" or t.nbytes > MOST_STATE:
            raise CheckpointError(f"{t.file} describes a weight in {t.dtype} {t.shape}: fetch it again")
        with path.open("rb") as file:
            file.seek(t.offset)
            return file.read(t.nbytes)

    def _matrix(self, base: str, parts: dict[str, TensorRange], state: dict, quantizer: str) -> Bnb:
        (N, K), block, nested = state["shape"], state["blocksize"], state.get("nested_blocksize", 0)
        blocks = -(-N * K // block)
        if K % 2 or (nested and not 0 < nested < 2**20):
            raise CheckpointError(f"{base} has {K} inputs and blocks of {nested}: mixoff reads whole bytes per row")
        self._expect_part(base, "weight", parts["weight"], ("U8",), (N * K // 2, 1))
        self._expect_part(base, "weight.quant_map", parts["quant_map"], ("F32",), (16,))
        self._expect_part(base, "weight.absmax", parts["absmax"], ("U8",) if nested else ("F32",), (blocks,))
        if nested:
            shape = (-(-blocks // nested),)
            self._expect_part(base, "weight.nested_absmax", parts["nested_absmax"], ("F32",), shape)
            self._expect_part(base, "weight.nested_quant_map", parts["nested_quant_map"], ("F32",), (256,))
        kind = f"bitsandbytes {quantizer[:10]} g{block}"
        return Bnb(kind, (N, K), parts, block, nested, state.get("nested_offset", 0.0))
