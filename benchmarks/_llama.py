"""llama.cpp's forms for the experts of a model in transformers: importance matrix, codes, and weights from codes.

llama.cpp's own function makes the codes (`ggml_quantize_chunk` of libggml-base, through ctypes), the package `gguf`
reads them. The importance matrix is that of `llama-imatrix`: mean squares of an expert's inputs over its tokens.
Codes come in blocks of 256 inputs. Narrower rows are joined to whole blocks, four of 192 to three blocks: groups of 16
and 32 stay within a row, and bits per weight are those of wide models. (`llama-quantize` would take larger forms.)
"""

import ctypes
import importlib.util
import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from mixoff.shapes import config

FORMS = {  # of gate and up, and of down
    "IQ2_XS": ("IQ2_XS", "IQ2_XS"),
    "IQ2_S": ("IQ2_S", "IQ2_S"),
    "IQ2_XS, down IQ3_XXS": ("IQ2_XS", "IQ3_XXS"),
    "Q2_K": ("Q2_K", "Q2_K"),
    "IQ3_XXS": ("IQ3_XXS", "IQ3_XXS"),
    "IQ4_XS": ("IQ4_XS", "IQ4_XS"),
}
MISSING = "no libggml-base here: `pip install llama-cpp-python gguf`, or name the file with --llama"


def library(path: Path = Path()) -> ctypes.CDLL:
    """libggml-base from `path`, by default from the package llama-cpp-python."""
    if path == Path():
        found = importlib.util.find_spec("llama_cpp")
        files = sorted(Path(found.origin).parent.glob("lib/*ggml-base*")) if found else []
        path = files[0] if files else sys.exit(MISSING)
    lib = ctypes.CDLL(str(path))
    pointer, whole = ctypes.c_void_p, ctypes.c_int64
    lib.ggml_quantize_chunk.argtypes = [ctypes.c_int, pointer, pointer, whole, whole, whole, pointer]
    lib.ggml_quantize_chunk.restype = ctypes.c_size_t
    return lib


def importance(model: nn.Module, ids: Tensor) -> dict[nn.Module, dict[str, Tensor]]:
    """Mean squares of the inputs of each expert's matrices, fp32 (E, K), over windows of tokens (B, T)."""
    modules = list(config.expert_modules(model).values())
    sums = {m: {name: torch.zeros(w.shape[0], w.shape[2]) for name, w in m.named_parameters()} for m in modules}
    counts = {m: torch.zeros(m.num_experts, 1) for m in modules}

    def note(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        x, index = inputs[:2]  # (T, D), (T, K)
        for e in index.unique().tolist():
            mine = x[(index == e).any(-1)]
            gate, up = nn.functional.linear(mine, module.gate_up_proj[e]).chunk(2, -1)
            counts[module][e] += len(mine)
            sums[module]["gate_up_proj"][e] += mine.square().sum(0)
            sums[module]["down_proj"][e] += (module.act_fn(gate) * up).square().sum(0)

    hooks = [m.register_forward_pre_hook(note) for m in modules]
    with torch.inference_mode():
        for window in ids:
            model(window[None])
    for hook in hooks:
        hook.remove()
    return {m: {name: total / counts[m] for name, total in sums[m].items()} for m in modules}


def quantize(lib: ctypes.CDLL, w: Tensor, weight: Tensor, form: str) -> tuple[Tensor, int]:
    """w (N, K) through `form` and back, given the importance of its inputs (K,), and the bytes of its codes."""
    import gguf

    kind = gguf.GGMLQuantizationType[form]
    block, nbytes = gguf.GGML_QUANT_SIZES[kind]
    joined = math.lcm(w.shape[1], block) // w.shape[1]
    rows = w.float().contiguous().view(-1, joined * w.shape[1])
    weights = weight.float().repeat(joined)
    codes = torch.empty(rows.shape[0], rows.shape[1] // block * nbytes, dtype=torch.uint8)
    written = lib.ggml_quantize_chunk(
        kind.value, rows.data_ptr(), codes.data_ptr(), 0, *rows.shape, weights.data_ptr()
    )  # fmt: skip
    assert written == codes.numel()
    return torch.from_numpy(gguf.dequantize(codes.numpy(), kind)).view_as(w), written


@contextmanager
def quantized(
    model: nn.Module, lib: ctypes.CDLL, seen: dict[nn.Module, dict[str, Tensor]], forms: tuple[str, str]
) -> Iterator[float]:
    """Inside `with` the model's experts are those of llama.cpp's forms; yields bits per weight."""
    form = dict(zip(("gate_up_proj", "down_proj"), forms, strict=True))
    originals = {(m, name): w.data.clone() for m in seen for name, w in m.named_parameters()}
    nbytes = 0
    for (module, name), original in originals.items():
        for e, w in enumerate(original):
            changed, taken = quantize(lib, w, seen[module][name][e], form[name])
            getattr(module, name).data[e] = changed
            nbytes += taken
    try:
        yield 8 * nbytes / sum(w.numel() for w in originals.values())
    finally:
        for (module, name), original in originals.items():
            getattr(module, name).data.copy_(original)
