"""Small tensors of a device on the host: copied into one page-locked buffer, with one wait for all of them.

A copy to ordinary memory makes the host wait each time, and allocates. This buffer is allocated once, and an event says
when everything in it has arrived.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from mixoff.transfer.streams import Device

LEAST = 4096  # bytes of the buffer: a page, which holds the choice of a token of any model
ALIGNED = 16  # bytes: each tensor begins at a multiple, so that it can be viewed in its dtype


class Mailbox:
    """A page-locked buffer of one device, and the event that the host waits for. Threads take turns."""

    def __init__(self, device: Device) -> None:
        self.device, self.lock = device, threading.Lock()
        self.event = device.event()
        self.memory: torch.Tensor | None = None
        self.parts: dict[tuple, list[torch.Tensor]] = {}  # views of the buffer by shapes and dtypes

    def bring(self, *tensors: torch.Tensor) -> list[torch.Tensor]:
        """Copies on the host, integers as int64 and floats as fp32; the host waits once."""
        with self.lock:
            parts, stream = self._parts(tensors), self.device.computing()
            for part, tensor in zip(parts, tensors, strict=True):
                self.device.copy(stream, part, tensor)
            stream.record_event(self.event)
            self.event.synchronize()
            return [part.to(torch.float32 if part.is_floating_point() else torch.long, copy=True) for part in parts]

    def _parts(self, tensors: tuple[torch.Tensor, ...]) -> list[torch.Tensor]:
        """Views of the buffer like these tensors, one after the other."""
        key = tuple((t.shape, t.dtype) for t in tensors)
        if key not in self.parts:
            sizes = [t.numel() * t.element_size() for t in tensors]
            room = [-(-size // ALIGNED) * ALIGNED for size in sizes]
            memory = self._memory(sum(room))
            starts = [sum(room[:i]) for i in range(len(room))]
            self.parts[key] = [
                memory[start : start + size].view(t.dtype).view(t.shape)
                for start, size, t in zip(starts, sizes, tensors, strict=True)
            ]
        return self.parts[key]

    def _memory(self, nbytes: int) -> torch.Tensor:
        """The buffer, with at least so many bytes."""
        if self.memory is None or self.memory.numel() < nbytes:
            self._release()
            self.memory = self.device.pinned(max(2 * nbytes, LEAST))
        return self.memory

    def _release(self) -> None:
        self.parts.clear()
        if self.memory is not None:
            self.device.unpin(self.memory)
            self.memory = None

    def close(self) -> None:
        """Release the buffer."""
        with self.lock:
            self._release()
