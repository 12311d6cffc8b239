"""Stands in for a CUDA graph, on a CPU: calls of ATen and launches of kernels are noted, and done again in the same
memory.

As on a card, nothing of a capture is kept: memory that it wrote to is as before, and what it allocated is garbage until
the first replay. What a capture cannot hold raises.
"""

from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_flatten

from mixoff.kernels.triton import products
from mixoff.runtime.graph import looks


def tensors(*trees):
    return [leaf for leaf in tree_flatten(trees)[0] if isinstance(leaf, torch.Tensor)]


def memory(tensor):
    return tensor.untyped_storage().data_ptr()


class Recording(TorchDispatchMode):
    """Calls in their order. Usable as a context manager, once."""

    def __init__(self):
        super().__init__()
        self.calls, self.made, self.before = [], [], {}
        honest = products.loops()
        self.loops = mock.patch.object(products, "loops", lambda: honest and _Launches(honest, self))

    def __enter__(self):
        self.loops.start()
        return super().__enter__()

    def __exit__(self, *error):
        super().__exit__(*error)
        self.loops.stop()
        for tensor, values in self.before.values():
            tensor.copy_(values)
        for made in self.made:
            made.untyped_storage().fill_(0xFF)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func._schema.is_mutable:
            self.keep(args, kwargs)
        out = func(*args, **kwargs)
        if looks(func, (args, kwargs), out):
            raise RuntimeError(f"operation not permitted when stream is capturing: {func}")
        known = {memory(t) for t in tensors(args, kwargs)}
        fresh = [t for t in tensors(out) if memory(t) not in known]
        self.made += fresh
        if fresh or func._schema.is_mutable:
            self.calls.append(lambda: self.again(func, args, kwargs, out))
        return out

    def keep(self, *given):
        """Note what memory held before the capture wrote to it."""
        for tensor in tensors(given):
            if memory(tensor) not in {memory(t) for t in self.made}:
                whole = torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage())
                self.before.setdefault(memory(tensor), (whole, whole.clone()))

    def again(self, func, args, kwargs, out):
        new = func(*args, **kwargs)
        for old, value in zip(tensors(out), tensors(new), strict=True):
            if memory(old) != memory(value):
                old.copy_(value)

    def replay(self):
        with _disable_current_modes(), torch.no_grad():
            for call in self.calls:
                call()


class _Launches:
    """Kernels whose launches are noted and not done."""

    def __init__(self, honest, recording):
        self.honest, self.recording = honest, recording

    def __getattr__(self, name):
        kernel = getattr(self.honest, name)

        class Kernel:
            def __getitem__(_, grid):
                return lambda *args, **named: self.recording.calls.append(lambda: kernel[grid](*args, **named))

        return Kernel()


def capture(work):
    """As `cuda.Cuda.capture`."""
    with (recording := Recording()):
        result = work()
    return result, recording.replay
