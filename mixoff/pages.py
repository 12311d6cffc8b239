"""Memory in huge pages, where the system has them."""

from __future__ import annotations

import errno
import mmap
from contextlib import suppress

import torch

LINE = 64  # bytes of a cache line


def pages(nbytes: int) -> mmap.mmap:
    """Fresh private memory that begins at a page, in huge pages where the system has them. Raises OSError.

    Private, because only private memory counts as the process's own. Huge, for two reasons:

    - Direct I/O pins every page that it writes to. At 3 GB/s that took a third of a core with pages of 4 KiB, and a
      tenth of that with huge ones.
    - A product that streams through weights spends less time translating addresses (docs/kernels.md).
    """
    if not hasattr(mmap, "MAP_PRIVATE"):
        return mmap.mmap(-1, nbytes)
    memory = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with suppress(OSError):  # a kernel without huge pages
            memory.madvise(mmap.MADV_HUGEPAGE)
    return memory


def slab(nbytes: int, inherited: bool = True) -> torch.Tensor:
    """`nbytes` of memory as a uint8 tensor, aligned to a page; freed with its last view.

    inherited: whether the child of a fork gets it too. If it is page-locked, Linux copies every page at the fork.
    """
    if nbytes == 0:
        return torch.empty(0, dtype=torch.uint8)
    memory = pages(nbytes)
    if not inherited and hasattr(mmap, "MADV_DONTFORK"):
        memory.madvise(mmap.MADV_DONTFORK)
    return torch.frombuffer(memory, dtype=torch.uint8)


ALLOCATORS = (  # in RuntimeErrors of torch and Triton
    "can't allocate memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDA out of memory",
    "CUDA error: out of memory",
    "Triton Error [CUDA]: out of memory",
)


def out_of_memory(error: Exception) -> str | None:
    """The message of an error about lack of memory, as one sentence; None for any other error.

    >>> out_of_memory(MemoryError("no room")), out_of_memory(ValueError("no sense"))
    ('no room', None)
    >>> out_of_memory(RuntimeError("Triton Error [CUDA]: out of memory"))
    'Triton Error [CUDA]: out of memory'
    """
    message = str(error)
    lacking = (
        isinstance(error, (MemoryError, torch.OutOfMemoryError))
        or (isinstance(error, OSError) and error.errno == errno.ENOMEM)
        or (isinstance(error, RuntimeError) and any(mark in message for mark in ALLOCATORS))
    )
    if not lacking:
        return None
    return ". ".join(message.strip().split("\n")[0].split(". ")[:2]) or type(error).__name__
