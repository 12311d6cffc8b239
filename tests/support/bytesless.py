"""Tensors of a GPU that have a device and a shape but no bytes: torch's fake tensors, where torch has no CUDA.

Whatever mixes devices raises, and so does whatever looks at a value, which on a GPU would make the host wait.
"""

from contextlib import ExitStack, contextmanager

import torch
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.overrides import TorchFunctionMode

MOVES = {getattr(torch.Tensor, name): {"dtype": getattr(torch, name)} for name in ("float", "half", "bfloat16")}
MOVES |= {torch.Tensor.int: {"dtype": torch.int32}, torch.Tensor.long: {"dtype": torch.int64}}
MOVES |= {torch.Tensor.to: {}, torch.Tensor.cpu: {"device": torch.device("cpu")}}


class _Dispatched(TorchFunctionMode):
    """Indexing and moving by dispatched operators: the built-in ways ask for a build with CUDA."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.Tensor.__getitem__:
            x, rest = _cut(*args)
            return torch.ops.aten.index(x, rest) if any(r is not None for r in rest) else x
        if func is torch.Tensor.__setitem__:
            (x, rest), value = _cut(*args[:2]), torch.as_tensor(args[2])
            listed = any(r is not None for r in rest)
            return torch.ops.aten.index_put_(x, rest, value) if listed else torch.ops.aten.copy_(x, value)
        if func in MOVES:
            return _moved(*args, **(kwargs or {}), **MOVES[func])
        if func is torch.Tensor.copy_:
            return torch.ops.aten.copy_(*args)
        if func is torch.Tensor.contiguous:
            return torch.ops.aten.clone(args[0], memory_format=torch.contiguous_format)
        return func(*args, **(kwargs or {}))


def _moved(x, *wanted, **how):
    how = {name: value for name, value in how.items() if name in ("device", "dtype") and value is not None}
    for one in wanted:
        if isinstance(one, torch.Tensor):
            how |= {"device": one.device, "dtype": one.dtype}
        elif isinstance(one, (str, torch.device)):
            how["device"] = torch.device(one)
        elif isinstance(one, torch.dtype):
            how["dtype"] = one
    here = {"device": x.device, "dtype": x.dtype}
    return x if how.items() <= here.items() else torch.ops.aten._to_copy(x, **how)


def _cut(x, index):
    """`x` after all integers, slices and Nones of an index, and the tensors that are left of it, by dimension."""
    index = index if isinstance(index, tuple) else (index,)
    dim, rest = 0, []
    dots = next((i for i, part in enumerate(index) if part is Ellipsis), None)
    if dots is not None:
        whole = x.dim() - sum(part is not None and part is not Ellipsis for part in index)
        index = (*index[:dots], *[slice(None)] * whole, *index[dots + 1 :])
    for part in index:
        if isinstance(part, int):
            x = x.select(dim, part)
            continue
        if part is None:
            x = x.unsqueeze(dim)
        elif isinstance(part, slice):
            x = torch.ops.aten.slice(x, dim, part.start, part.stop, part.step or 1)
        rest.append(part if isinstance(part, torch.Tensor) else None)
        dim += 1
    return x, rest


@contextmanager
def gpu():
    """Within it "cuda" is a device, and nothing can be read from it."""
    if torch.version.cuda is None:
        torch._C._ensureCUDADeviceGuardSet()  # stands in for the guard that a build without CUDA lacks
    with ExitStack() as stack:
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        stack.enter_context(_Dispatched())
        stack.enter_context(torch.no_grad())
        yield


def on_host(fn):
    """`fn` with ordinary tensors, wherever it is called."""

    def wrapped(*args, **kwargs):
        with unset_fake_temporarily():
            return fn(*args, **kwargs)

    return wrapped
