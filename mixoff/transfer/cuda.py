"""A GPU as the runtime needs it: memory, page-locked RAM, streams, events, copies, and what the card can do.

Together with `probe`'s bandwidths and the kernels, the only module that calls torch.cuda. It is thin, since it was
never run on a GPU (docs/gpu.md). Tests check every name it uses against the installed torch, and run the modules above
it on a simulated device.
"""

from __future__ import annotations

import gc
import platform
import re
import warnings
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch

from mixoff.errors import MixoffError
from mixoff.pages import slab
from mixoff.units import MIB, format_nbytes

LEAST_SM = (7, 0)  # the oldest that Triton compiles for
BF16_SM = (8, 0)  # older cards emulate it slowly, yet torch reports it as supported
MARGIN = 384 * MIB  # free VRAM to leave, once the context exists: cuBLAS's workspaces and the allocator's fragments
REGISTER_PORTABLE = 1  # cudaHostRegisterPortable, as torch's own _pin_memory_utils passes it


@dataclass(frozen=True)
class Gpu:
    """A card. sm: compute capability. total_nbytes, free_nbytes: its memory, now."""

    name: str
    sm: tuple[int, int]
    total_nbytes: int
    free_nbytes: int

    @property
    def dtype(self) -> str:
        """The 16-bit format that the card computes in natively.

        >>> Gpu("Tesla T4", (7, 5), 0, 0).dtype, Gpu("NVIDIA L4", (8, 9), 0, 0).dtype
        ('float16', 'bfloat16')
        """
        return "bfloat16" if self.sm >= BF16_SM else "float16"

    def __str__(self) -> str:
        sizes = f"{format_nbytes(self.free_nbytes)} of {format_nbytes(self.total_nbytes)} free"
        return f"{self.name}, sm_{self.sm[0]}{self.sm[1]}, {sizes}, computes in {self.dtype}"


def pick(device: str | torch.device) -> Cuda | None:
    """The device to serve experts on; None is the CPU. `"auto"` is the first GPU if there is one.

    Raises MixoffError, with the reason, for a GPU that does not exist or that kernels do not run on.
    """
    try:
        wanted = None if device == "auto" else torch.device(device)
    except RuntimeError:
        raise MixoffError(f"no device {device!r}: choose auto, cpu, cuda or cuda:N") from None
    if wanted is not None and wanted.type not in ("cpu", "cuda"):
        raise MixoffError(f"device {device!r} is not served: choose auto, cpu, cuda or cuda:N")
    if wanted is not None and wanted.type == "cpu":
        return None
    why = obstacle(0 if wanted is None else wanted.index or 0)
    if why is None:
        return Cuda(0 if wanted is None else wanted.index or 0)
    if wanted is None:
        return None
    raise MixoffError(f"device {device!r} cannot be used: {why}")


def obstacle(index: int = 0) -> str | None:
    """Why the GPU of that number cannot serve experts; None if it can."""
    if torch.version.cuda is None:
        return "this torch was built without CUDA: install it from pytorch.org for your driver"
    if not torch.cuda.is_available():
        return "torch sees no GPU: is there one, and a driver for CUDA " + torch.version.cuda + "?"
    if index >= torch.cuda.device_count():
        return f"there are {torch.cuda.device_count()} GPUs, numbered from 0"
    if (sm := torch.cuda.get_device_capability(index)) < LEAST_SM:
        return f"sm_{sm[0]}{sm[1]} is older than sm_70, the first that Triton compiles for"
    if not has_code(sm, built := torch.cuda.get_arch_list()):
        return f"this torch was built for {', '.join(built)}, not sm_{sm[0]}{sm[1]}: install one from pytorch.org"
    return None


def has_code(sm: tuple[int, int], built: list[str]) -> bool:
    """Whether a torch built for these architectures runs on a card: machine code (sm) within its generation, or PTX.

    An empty list says nothing.

    >>> has_code((7, 0), ["sm_75", "sm_80"]), has_code((8, 6), ["sm_75", "sm_80"]), has_code((7, 5), ["compute_70"])
    (False, True, True)
    """
    kinds = [re.fullmatch(r"(sm|compute)_(\d+)(\d)[a-z]?", name) for name in built]
    codes = [(kind[1], (int(kind[2]), int(kind[3]))) for kind in kinds if kind]
    return not codes or any(code <= sm and (kind == "compute" or code[0] == sm[0]) for kind, code in codes)


def describe(index: int = 0) -> Gpu:
    """The card of that number; creates its context, which takes about 300 MB of its memory.

    Memory that torch caches counts as used, and a dropped model is often part of a cycle: both are returned first.
    """
    gc.collect()
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info(index)
    return Gpu(torch.cuda.get_device_name(index), torch.cuda.get_device_capability(index), total, free)


class Cuda:
    """A GPU with a separate stream for copies in each direction, as `streams.Device`. index: its number."""

    def __init__(self, index: int = 0) -> None:
        self.where = torch.device("cuda", index)
        self.copying, self.returning = torch.cuda.Stream(self.where), torch.cuda.Stream(self.where)
        self.registered: set[int] = set()  # addresses of page-locked RAM

    def describe(self) -> Gpu:
        """The card, with its free memory now."""
        return describe(self.where.index)

    def computing(self) -> torch.cuda.Stream:
        """The stream on which the calling thread computes."""
        return torch.cuda.current_stream(self.where)

    def event(self) -> torch.cuda.Event:
        """A new event, without a clock."""
        return torch.cuda.Event()

    def empty(self, nbytes: int) -> torch.Tensor:
        """Memory of the card, uint8. Raises torch.OutOfMemoryError."""
        return torch.empty(nbytes, dtype=torch.uint8, device=self.where)

    def pinned(self, nbytes: int) -> torch.Tensor:
        """RAM of exactly that size, uint8, page-locked; pageable, with a warning, if the system refuses.

        torch's allocator would round up to a power of two: 1.43 times an expert of Mixtral in 4 bits. Raises OSError
        if there is not enough memory.
        """
        memory = slab(nbytes, inherited=False)
        error = int(torch.cuda.cudart().cudaHostRegister(memory.data_ptr(), nbytes, REGISTER_PORTABLE))
        if error == 0:
            self.registered.add(memory.data_ptr())
        else:
            self._clear_error()
            warnings.warn(
                f"{format_nbytes(nbytes)} of RAM cannot be page-locked (CUDA error {error}): copies to the GPU are "
                f"slower, and wait for each other{' (WSL2 allows little of it)' if is_wsl() else ''}; lower ram_bytes",
                stacklevel=2,
            )
        return memory

    def _clear_error(self) -> None:
        """Let a kernel report the error that a failed call of the CUDA runtime left behind, and ignore it."""
        with suppress(RuntimeError):
            torch.zeros(1, device=self.where)

    def unpin(self, memory: torch.Tensor) -> None:
        """Release memory from `pinned`, once all queued work is done."""
        self.synchronize()
        if memory.data_ptr() in self.registered:
            self.registered.remove(memory.data_ptr())
            torch.cuda.cudart().cudaHostUnregister(memory.data_ptr())

    def copy(self, stream: torch.cuda.Stream, target: torch.Tensor, source: torch.Tensor) -> None:
        """Queue a copy between the card and RAM on a stream; the host does not wait if the RAM is page-locked."""
        with torch.cuda.stream(stream):
            target.copy_(source, non_blocking=True)

    def capture(self, work: Callable[[], Any]) -> tuple[Any, Callable[[], None]]:
        """Capture what `work` queues as a CUDA graph, without doing it; returns its result and what queues the graph.

        Every replay uses the same memory. Raises RuntimeError, with the driver's reason, for what cannot be captured.
        """
        graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream(self.where)
        capturing = torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local")
        # the stream of now is named, or a capture that failed would leave its own current
        with torch.cuda.device(self.where), torch.cuda.stream(self.computing()), capturing:
            result = work()
        return result, graph.replay

    def synchronize(self) -> None:
        """Sleep until all queued work is done."""
        torch.cuda.synchronize(self.where)

    def give_back(self) -> None:
        """Return freed memory to the driver."""
        torch.cuda.empty_cache()


def is_wsl() -> bool:
    """Whether this is Linux inside Windows."""
    return "microsoft" in platform.release().lower()


def link_bandwidths(nbytes: int = 256 * MIB, rounds: int = 3) -> dict[str, float]:
    """Bytes per second of copies between RAM and the first GPU: `pinned`, `pageable` and `back` (pinned, to RAM).

    Timed by the device's events, the best of `rounds` after one more to warm up. Needs a GPU.
    """
    device, target = Cuda(0), torch.empty(nbytes, dtype=torch.uint8, device="cuda:0")
    pinned, pageable = device.pinned(nbytes), slab(nbytes)
    pageable.fill_(1)  # or its pages would not exist yet
    pairs = {"pinned": (target, pinned), "pageable": (target, pageable), "back": (pinned, target)}
    try:
        return {name: nbytes / min(_seconds(*pair) for _ in range(rounds + 1)) for name, pair in pairs.items()}
    finally:
        device.unpin(pinned)


def _seconds(target: torch.Tensor, source: torch.Tensor) -> float:
    """Seconds of one copy, by the device's clock. `planning.probe` has its own: neither room imports the other."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    target.copy_(source, non_blocking=True)
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1000
