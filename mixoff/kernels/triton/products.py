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
from collections.abc import Sequence
from dataclasses import dataclass, replace
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
NARROW, WIDEST = 4, 16  # bytes of a load, and what matrices begin at multiples of

Images = tuple[torch.Tensor, int]  # one image and 0, or addresses of images (E,) and what they all are multiples of


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
    out = x.new_empty(x.shape[0], w.shape[0], dtype=dtype or x.dtype)
    _linear(x, w, (w.image, 0), 1, out)
    return out


@dataclass(frozen=True)
class Table:
    """Where the images of E experts are on the card.

    forms: gate_up and down as all experts have them, without parts: a table does not keep memory alive
    at: addresses of gate_up and of down, int64 (2, E), and one more where E is odd: Triton compiles once for rows that
        begin at multiples of 16 bytes, and again for others
    alignments: what the addresses of each row are multiples of
    count: E
    """

    forms: tuple[QTensor, ...]
    at: torch.Tensor
    alignments: tuple[int, ...]
    count: int

    def chosen(self, experts: torch.Tensor) -> Table:
        """Some of them, by index (K,) on the card: the host does not look."""
        return replace(self, at=self.at.index_select(1, experts), count=len(experts))


def table(experts: Sequence[tuple[QTensor, QTensor]]) -> Table:
    """Where these experts are now; the host does not wait, since the copy comes from page-locked memory."""
    rows = [[w.image.data_ptr() for w in matrices] for matrices in zip(*experts, strict=True)]
    alignments = tuple(NARROW if any(address % WIDEST for address in row) else WIDEST for row in rows)
    at, device = torch.tensor([row + row[:1] * (len(row) % 2) for row in rows]), experts[0][0].image.device
    at = at.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else at
    return Table(tuple(replace(w, parts={}) for w in experts[0]), at, alignments, len(experts))


def gated_mlps(x: torch.Tensor, experts: Sequence[tuple[QTensor, QTensor]] | Table) -> torch.Tensor:
    """`(silu(gate) * up) @ down.T` with gate and up the halves of `x @ gate_up.T` -> (E, T, N), in x's dtype.

    Two launches for all experts, and one more if rows are rotated. An expert's bits do not depend on the others.
    x: (T, K). experts: gate_up (2F, K) and down (N, F) of each, all in one form.
    """
    if not isinstance(experts, Table) and len(experts) == 1:
        (gate_up, down), E = experts[0], 1
        images = [(w.image, 0) for w in experts[0]]
    else:
        found = experts if isinstance(experts, Table) else table(experts)
        (gate_up, down), E = found.forms, found.count
        images = list(zip(found.at, found.alignments, strict=True))
    h = gated(x, gate_up, images[0], E)  # (E, T, F)
    h = rotated(h.flatten(0, 1)).view_as(h) if down.rotated else h
    out = x.new_empty(E, x.shape[0], down.shape[0])
    _linear(h, down, images[1], E, out)
    return out


def gated(x: torch.Tensor, w: QTensor, images: Images, E: int) -> torch.Tensor:
    """`silu(x @ gate.T) * (x @ up.T)` for x (T, K) and E weights (2F, K), gate in the first half -> fp32 (E, T, F)."""
    T, F, K = x.shape[0], w.shape[0] // 2, w.shape[1]
    if F % BLOCK:  # a block would hold outputs of both halves
        both = x.new_empty(E, T, 2 * F, dtype=torch.float32)
        _linear(x, w, images, E, both)
        gate, up = both.chunk(2, 2)
        return torch.nn.functional.silu(gate).mul_(up)
    out = x.new_empty(E, T, F, dtype=torch.float32)
    rows, chosen = rows_together(T), tile(chip(x.device), rows_together(T), F)
    named = {"ROWS": rows, "KIND": KINDS[x.dtype], "BN": chosen.BN, "EACH": images[1]}
    with on(x.device):
        grid = (-(-T // rows), F // chosen.BN, E)
        loops().gated[grid](activations(x), images[0], out, T, F, K, *offsets(w), MAGIC, **named, **settings(w, chosen))
    return out


def _linear(x: torch.Tensor, w: QTensor, images: Images, E: int, out: torch.Tensor) -> None:
    """`x @ w.T` for E weights (N, K) into out (E, T, N); x is (T, K) for all of them, or (E, T, K)."""
    T, (N, K) = x.shape[-2], w.shape
    rows, words, stored = rows_together(T), activations(x), storage(out)
    chosen, apart = tile(chip(x.device), rows, N), words.stride(0) if x.dim() == 3 else 0
    named = {"ROWS": rows, "KIND": KINDS[x.dtype], "OUT": KINDS[out.dtype], "BN": chosen.BN, "EACH": images[1]}
    with on(x.device):
        for first, n, outputs, wide in stretches(N):
            grid = (-(-T // rows), -(-outputs // chosen.BN), E)
            loops().linear[grid](
                words, images[0], stored, T, N, K, first, n, *offsets(w), apart, MAGIC, WIDE=wide, **named,
                **settings(w, chosen),
            )  # fmt: skip


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
