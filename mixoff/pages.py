"""Memory in huge pages, where the system has them to give. Knows nothing of what lies in it."""

from __future__ import annotations

import errno
import mmap
from contextlib import suppress

import torch

LINE = 64  # bytes of a cache line


def pages(nbytes: int) -> mmap.mmap:
    """Fresh private memory that begins at a page, in huge pages where the system has them to give.

    Private, since only that counts as the process's own; huge, since direct I/O pins every page it writes to, which
    took a third of a core at 3 GB/s with pages of 4 KiB and a tenth of that with huge ones, and since a product that
    streams through weights finds their addresses sooner (docs/kernels.md). Raises OSError.
    """
    if not hasattr(mmap, "MAP_PRIVATE"):
        return mmap.mmap(-1, nbytes)
    memory = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with suppress(OSError):  # a kernel without huge pages
            memory.madvise(mmap.MADV_HUGEPAGE)
    return memory


def slab(nbytes: int, inherited: bool = True) -> torch.Tensor:
    """`nbytes` of memory as a uint8 tensor, aligned to a page, allocated once and given back with its last view.

    inherited: whether the child of a fork has it too. Of page-locked memory Linux would copy every page at once.
    """
    if nbytes == 0:
        return torch.empty(0, dtype=torch.uint8)
    memory = pages(nbytes)
    if not inherited and hasattr(mmap, "MADV_DONTFORK"):
        memory.madvise(mmap.MADV_DONTFORK)
    return torch.frombuffer(memory, dtype=torch.uint8)


ALLOCATORS = ("can't allocate memory", "CUBLAS_STATUS_ALLOC_FAILED", "CUDA out of memory")  # in RuntimeErrors of torch


def out_of_memory(error: Exception) -> str | None:
    """What an error says, in a sentence, if it is about memory that was not to be had; None for any other.

    >>> out_of_memory(MemoryError("no room")), out_of_memory(ValueError("no sense"))
    ('no room', None)
    """
    lacking = isinstance(error, (MemoryError, torch.OutOfMemoryError))
    lacking = lacking or (isinstance(error, OSError) and error.errno == errno.ENOMEM)
    words = str(error)
    if lacking or (isinstance(error, RuntimeError) and any(mark in words for mark in ALLOCATORS)):
        return ". ".join(words.strip().split("\n")[0].split(". ")[:2]) or type(error).__name__
    return None
