"""Products of rows with quantized weights on a CUDA card: which Triton kernel, which tile, which arguments.

Letters: **T** rows of activations, **N** outputs, **K** inputs, **C** outputs of a chunk, **F** expert width.
Up to `tiles.MOST_ROWS` rows are multiplied straight from the packed codes; for more, weights are dequantized
once, chunk by chunk, and multiplied by cuBLAS. bf16 on a chip without it (sm_75) is computed by way of fp32.

Where triton is missing or cannot compile (`check`), `reference` computes instead. Never run on a card: docs/kernels.md
says what was checked without one.
"""

from __future__ import annotations

import contextlib
import functools
from typing import Any

import torch

from mixoff.kernels.reference import DEQUANTIZED
from mixoff.kernels.triton.tiles import OLDEST, ROWS, Tile, tile
from mixoff.quantize.layout import BLOCK, places
from mixoff.quantize.tensor import QTensor

KINDS = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}
DEVICES = ("cuda",)  # where the kernels run; Triton's interpreter runs them on a CPU
MAGIC = 150 << 23  # 2**23 in fp32, as bits
DEQUANTIZED_GROUPS, DEQUANTIZED_WARPS = 8, 8  # groups per program, and its warps
ROTATED = 512  # inputs that a program rotates: four per thread, one load of 16 bytes


@functools.cache
def loops() -> Any:
    """The kernels; None where triton is not installed."""
    try:
        from mixoff.kernels.triton import loops as triton_loops
    except ImportError:
        return None
    return triton_loops


REFUSED: dict[torch.device, str] = {}  # why, by device on which the kernels do not compile


def check(device: torch.device) -> str | None:
    """Compile and run a small product; if that fails, `serves` refuses the device from now on. Returns the reason."""
    REFUSED.pop(device, None)
    if device.type not in DEVICES or loops() is None:
        return None
    try:
        linear(torch.zeros(1, 64, device=device), QTensor.empty((BLOCK, 64), 4, 64).to(device))
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    except Exception as error:  # Triton, ptxas and the driver raise many kinds
        REFUSED[device] = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
    return REFUSED.get(device)


@functools.cache
def chip(device: torch.device) -> int:
    """The chip of a device: 75 for sm_75; the oldest if it is not a card, such as the interpreter's CPU."""
    if device.type != "cuda":
        return OLDEST
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def serves(x: torch.Tensor, w: QTensor) -> bool:
    """Whether this module can compute `x @ w.T`: decided by form, dtype, device, chip and triton's presence alone."""
    fitting = w.metadata_bits == 8 and x.dtype in KINDS and x.device.type in DEVICES
    return fitting and loops() is not None and chip(x.device) >= OLDEST and x.device not in REFUSED


def linear(x: torch.Tensor, w: QTensor, dtype: torch.dtype | None = None) -> torch.Tensor:
    """`x @ w.T` for x (T, K) and w (N, K), in x's dtype or the one given -> (T, N); `serves(x, w)` must hold."""
    T, (N, K) = x.shape[0], w.shape
    out = x.new_empty(T, N, dtype=dtype or x.dtype)
    rows, words, stored = rows_together(T), activations(x), storage(out)
    chosen = tile(chip(x.device), rows, N)
    named = {"ROWS": rows, "KIND": KINDS[x.dtype], "OUT": KINDS[out.dtype], "BN": chosen.BN}
    with on(x.device):
        for first, n, outputs, wide in stretches(N):
            grid = (-(-T // rows), -(-outputs // chosen.BN))
            loops().linear[grid](
                words, w.image, stored, T, N, K, first, n, *offsets(w), MAGIC, WIDE=wide, **named, **settings(w, chosen)
            )
    return out


def gated(x: torch.Tensor, w: QTensor) -> torch.Tensor:
    """`silu(x @ gate.T) * (x @ up.T)` for x (T, K) and w (2F, K), gate in its first half -> fp32 (T, F)."""
    T, F, K = x.shape[0], w.shape[0] // 2, w.shape[1]
    if F % BLOCK:  # a block would hold outputs of both halves
        gate, up = linear(x, w, torch.float32).chunk(2, 1)
        return torch.nn.functional.silu(gate).mul_(up)
    out = x.new_empty(T, F, dtype=torch.float32)
    rows, words = rows_together(T), activations(x)
    chosen = tile(chip(x.device), rows, F)
    named = {"ROWS": rows, "KIND": KINDS[x.dtype], "BN": chosen.BN}
    with on(x.device):
        grid = (-(-T // rows), F // chosen.BN)
        loops().gated[grid](words, w.image, out, T, F, K, *offsets(w), MAGIC, **named, **settings(w, chosen))
    return out


def gated_mlp(x: torch.Tensor, gate_up: QTensor, down: QTensor) -> torch.Tensor:
    """`gated(x, gate_up) @ down.T` for x (T, K), in x's dtype -> (T, N)."""
    h = gated(x, gate_up)
    return linear(rotated(h) if down.rotated else h, down, x.dtype)


def rotated(x: torch.Tensor) -> torch.Tensor:
    """x (T, K) times the rotation of `quantize.rotation` -> fp32 (T, K), with the same additions in the same order."""
    (T, K), x = x.shape, x.float().contiguous()
    out = torch.empty_like(x)
    with on(x.device):
        loops().rotate[(T, -(-K // ROTATED))](x, out, K, COUNT=ROTATED, num_warps=4, enable_fp_fusion=True)
    return out


def dense(x: torch.Tensor, w: QTensor) -> torch.Tensor:
    """`x @ w.T` by way of weights in x's dtype, a chunk of outputs at a time, in the scratch that `reference` has."""
    out = x.new_empty(x.shape[0], w.shape[0])  # (T, N)
    K, chunk = w.shape[1], BLOCK * DEQUANTIZED // x.element_size()  # C
    scratch = x.new_empty(K * min(chunk, w.shape[0]))
    for first, n, outputs, wide in stretches(w.shape[0]):
        for start in range(first, first + outputs, chunk):
            stop = min(start + chunk, first + outputs)
            weights = scratch[: K * (stop - start)].view(K, -1)  # (K, C)
            dequantize(w, start, n, wide, weights)
            torch.mm(x, weights, out=out[:, start:stop])  # (T, C)
    return out


def dequantize(w: QTensor, start: int, n: int, wide: bool, out: torch.Tensor) -> None:
    """Weights of the blocks of n outputs from `start` on, inputs first, into out (K, C)."""
    K, C = out.shape
    grid = (-(-C // BLOCK), -(-K // (w.group_size * DEQUANTIZED_GROUPS)))
    with on(out.device):
        loops().dequantize[grid](
            w.image, storage(out), C, K, start, n, *offsets(w), MAGIC, BITS=w.bits, G=w.group_size,
            OUT=KINDS[out.dtype], WIDE=wide, BG=DEQUANTIZED_GROUPS, num_warps=DEQUANTIZED_WARPS, enable_fp_fusion=True,
        )  # fmt: skip


# What a launch needs --------------------------------------------------------------------------------------------------


def rows_together(T: int) -> int:
    """Rows per program: the smallest number that holds all rows, at most four."""
    return next((rows for rows in ROWS if rows >= T), ROWS[-1])


def stretches(N: int) -> list[tuple[int, int, int, bool]]:
    """First output, outputs per block, outputs, and whether four neighbours begin at multiples of four bytes.

    Whole blocks, then the last one where it is shorter.

    >>> stretches(256), stretches(300)
    ([(0, 128, 256, True)], [(0, 128, 256, True), (256, 44, 44, False)])
    """
    whole = N // BLOCK * BLOCK
    both = [(0, BLOCK, whole, N % 4 == 0), (whole, N - whole, N - whole, False)]
    return [stretch for stretch in both if stretch[2]]


def offsets(w: QTensor) -> tuple[int, int, int, int, int]:
    """First bytes of third bits, grids, codes of scales and of minima in the image, and the number of grids."""
    at = places(w.shape, w.bits, w.group_size, w.metadata_bits)
    grids, spans = at["scale_base"][0], at["scale_span"][0]
    return at.get("high", (0,))[0], grids, at["scale_codes"][0], at["min_codes"][0], (spans - grids) // 2


def settings(w: QTensor, chosen: Tile) -> dict:
    """Constants and options of a launch; fused multiply-adds are asked for, as Triton's default differs by release."""
    words = w.group_size // (16 if w.bits == 3 else 32 // w.bits)  # of a group
    constants = {"BITS": w.bits, "G": w.group_size, "BG": chosen.BG, "U": min(chosen.U, words)}
    return constants | {"num_warps": chosen.warps, "enable_fp_fusion": True}


def activations(x: torch.Tensor) -> torch.Tensor:
    """x (T, K) as the kernels read it: contiguous, with two 16-bit numbers per word."""
    x = x.contiguous()
    if x.dtype == torch.float32:
        return x
    return (x.clone() if x.data_ptr() % 4 else x).view(torch.int32)


def storage(out: torch.Tensor) -> torch.Tensor:
    """`out` as the kernels write it: bf16 by its bits."""
    return out.view(torch.int16) if out.dtype == torch.bfloat16 else out


def on(device: torch.device) -> contextlib.AbstractContextManager:
    """Triton launches on the current device: make it this one."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
