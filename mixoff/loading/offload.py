"""Models that are in memory already: `offload` moves their experts behind a runtime, `restore` puts them back.

Letters: **E** experts. Every change to the model pushes what undoes it on one stack, which an error unwinds at once and
`restore` later.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor, nn

from mixoff.cache.policies import Policy
from mixoff.checkpoints.checkpoint import Extent
from mixoff.errors import CheckpointError, MixoffError
from mixoff.loading import layers, refusals
from mixoff.loading.hooks import bind, checked
from mixoff.loading.load import choose_io
from mixoff.quantize.scheme import Scheme
from mixoff.quantize.tensor import QTensor
from mixoff.runtime import backend
from mixoff.runtime.runtime import Runtime
from mixoff.shapes.config import backbone_roles, expert_modules, expert_sites, likely_top_k
from mixoff.shapes.sites import Site, quantized_sites, stride, torch_dtype
from mixoff.store.readers import ExpertReader
from mixoff.units import format_nbytes, parse_nbytes

DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}


class TensorReader:
    """Copies expert images from tensors: `tensors[site]` lists (offset in the image, tensor (E, ...)) pairs."""

    def __init__(self, tensors: list[list[tuple[int, Tensor]]]) -> None:
        self.tensors = tensors

    def read_into(self, site: int, expert: int, image: memoryview) -> int:
        """Fill `image` (writable bytes) with one expert; returns the bytes copied."""
        total = 0
        for offset, tensor in self.tensors[site]:
            raw = tensor[expert].contiguous().view(-1).view(torch.uint8).numpy()
            image[offset : offset + len(raw)] = memoryview(raw)
            total += len(raw)
        return total

    def close(self) -> None:
        """Let go of the tensors; reading afterwards is an error."""
        self.tensors = []


@dataclass
class MemorySource:
    """Experts for a runtime, without a model folder: the attributes of `store.Source` that the runtime uses."""

    sites: tuple[Site, ...]
    dtype: str
    scheme: Scheme
    reader: TensorReader | ExpertReader

    @property
    def expert_nbytes(self) -> int:
        """Bytes of the largest expert image: the size of a slot."""
        return max(site.expert_nbytes for site in self.sites)

    def close(self) -> None:
        """Close the reader."""
        self.reader.close()


def offload(
    model: nn.Module,
    fast_bytes: int | str = "6GiB",
    *,
    scheme: str | Scheme | None = None,
    folder: str | Path | None = None,
    policy: str | Callable[[], Policy] = "lru",
    scope: str = "layer",
    prefetch: str = "auto",
    io: str = "auto",
    exact: bool = False,
    decode: str = "compiled",
) -> nn.Module:
    """Move the experts of a transformers model in memory behind a fast tier of `fast_bytes`; returns the same model.

    `restore` undoes it. Raises MixoffError, and leaves the model as it was whenever anything fails. Tested bit for bit
    against transformers' `grouped_mm`.

    Parameters
    ----------
    model: transformers model on a CPU
    fast_bytes: budget for experts in the fast tier: slots, buffers and scratch
    scheme: `Scheme`, or a preset's name, in which experts and backbone are quantized as `convert` would do it;
        None computes with the weights as they are
    folder: folder for a temporary file with the experts, whose memory is then freed;
        None keeps them in memory as the slow tier, which frees nothing and warns so
    policy: as for `load`
    scope: as for `load`
    prefetch: as for `load`
    io: as for `load`; used only with a folder
    exact: as for `load`
    decode: as for `load`
    """
    budget, decode = parse_nbytes(fast_bytes), checked(decode)
    scheme = Scheme.preset(scheme) if isinstance(scheme, str) else scheme or Scheme()
    given, model = model, refusals.within(model)
    modules, dtype = _experts_in_memory(model)
    with ExitStack() as undo:
        source = _source(model, modules, dtype, scheme, folder, undo)
        undo.callback(source.close)
        if isinstance(source.reader, ExpertReader):
            source.reader = choose_io(source.reader, source.sites, io, budget, limited=False)
        _strip(modules, undo)
        _quantize_backbone(model, scheme, dtype, exact, undo)
        compute, k = torch_dtype(dtype), likely_top_k(model.config)
        runtime = Runtime(source, budget, policy, scope, compute, prefetch=prefetch, top_k=k, exact=exact)
        undo.callback(runtime.close)
        _switch(model, modules, undo)
        undo.push(bind(model, runtime, loaded=False, decode=decode))
        refusals.watch(given, model, undo)
        model._mixoff_undo = undo.pop_all()
    if folder is None:
        held = format_nbytes(sum(site.num_experts * site.expert_nbytes for site in source.sites))
        warnings.warn(
            f"all experts ({held}) stay in memory as the slow tier: to free it, give offload a folder", stacklevel=2
        )
    return given


def restore(model: nn.Module) -> nn.Module:
    """Undo `offload` on `model`: the same parameters, experts implementation and layers as before; returns the model.

    Raises MixoffError for a model that is not offloaded.
    """
    inner = refusals.within(model)
    if undo := vars(inner).pop("_mixoff_undo", None):
        undo.close()
        return model
    if "mixoff" in vars(inner):
        raise MixoffError("this model was loaded by mixoff, so there is nothing to restore: load it with transformers")
    raise MixoffError("this model is not offloaded, so there is nothing to restore: mixoff.offload comes first")


def _experts_in_memory(model: nn.Module) -> tuple[list[nn.Module], str]:
    """The modules with experts and their dtype by name; refuses what cannot be offloaded."""
    if "mixoff" in vars(model):
        raise MixoffError("this model's experts are offloaded already: mixoff.restore it, or close it, first")
    refusals.check_adapters(model)
    modules = list(expert_modules(model).values())
    weights = [weight for module in modules for weight in module.parameters(recurse=False)]
    if devices := sorted({weight.device.type for weight in weights} - {"cpu"}):
        raise MixoffError(
            f"experts are on {devices[0]}, and mixoff offloads models on a CPU only: move the model there first"
        )
    dtypes = {weight.dtype for weight in weights}
    if len(dtypes) > 1 or not dtypes <= DTYPES.keys():
        names = ", ".join(sorted(map(str, dtypes)))
        raise CheckpointError(f"experts are {names}: mixoff needs one of {', '.join(DTYPES.values())} for all of them")
    return modules, DTYPES[dtypes.pop()] if dtypes else "float32"


# Where the experts go -------------------------------------------------------------------------------------------------


def _source(
    model: nn.Module,
    modules: list[nn.Module],
    dtype: str,
    scheme: Scheme,
    folder: str | Path | None,
    undo: ExitStack,
) -> MemorySource:
    """The experts of `model` as a runtime reads them; with a folder, written there and gone from memory."""
    plain = expert_sites(model, dtype)
    sites = quantized_sites(plain, scheme)
    reader = TensorReader(
        [
            [(part.offset, module.get_parameter(part.name).detach()) for part in site.parts]
            for site, module in zip(plain, modules, strict=True)
        ]
    )
    served = reader if sites == plain else TensorReader(_quantized(reader, plain, sites, scheme))
    if folder is None:
        return MemorySource(sites, dtype, scheme, served)
    temporary = _temporary(folder, undo)
    kept = _spill(plain, reader, temporary / "experts.bin")
    images = kept if sites == plain else _spill(sites, served, temporary / "quantized.bin")
    _empty(plain, modules, ExpertReader(temporary, kept), undo)
    return MemorySource(sites, dtype, scheme, ExpertReader(temporary, images))


def _quantized(
    reader: TensorReader, plain: tuple[Site, ...], sites: tuple[Site, ...], scheme: Scheme
) -> list[list[tuple[int, Tensor]]]:
    """Images of all experts, (E, nbytes) per site, quantized as `convert` does it."""
    images = [torch.zeros(site.num_experts, site.expert_nbytes, dtype=torch.uint8) for site in sites]
    for i, (before, after) in enumerate(zip(plain, sites, strict=True)):
        for (_, weights), part in zip(reader.tensors[i], after.parts, strict=True):
            for e, image in enumerate(images[i]):
                w = weights[e]
                if part.form is not None:
                    precision = scheme.expert(part.name, i)
                    assert precision is not None
                    w = scheme.quantize_as(w.t() if before.transposed else w, precision).to_buffer()
                image[part.offset : part.offset + part.nbytes] = w.contiguous().view(-1).view(torch.uint8)
    return [[(0, image)] for image in images]


def _temporary(folder: str | Path, undo: ExitStack) -> Path:
    """A new folder inside `folder`, removed when the model is restored or freed."""
    try:
        return Path(undo.enter_context(TemporaryDirectory(prefix="mixoff-", dir=folder, ignore_cleanup_errors=True)))
    except OSError as error:
        raise MixoffError(f"cannot create a temporary file in {folder}: {error.strerror or error}") from error


def _spill(sites: tuple[Site, ...], reader: TensorReader, path: Path) -> dict[tuple[int, int], list[Extent]]:
    """Write all experts to one file, aligned as in a store; returns the extent of each."""
    extents = {}
    try:
        with path.open("wb") as f:
            for i, site in enumerate(sites):
                for e in range(site.num_experts):
                    image = bytearray(stride(site))
                    reader.read_into(i, e, memoryview(image))
                    extents[i, e] = [Extent(path.name, f.tell(), 0, site.expert_nbytes)]
                    f.write(image)
    except OSError as error:
        raise MixoffError(f"the experts could not be written to {path.parent}: {error.strerror or error}") from error
    return extents


def _empty(sites: tuple[Site, ...], modules: list[nn.Module], reader: ExpertReader, undo: ExitStack) -> None:
    """Give the memory of the experts' parameters back; undoing fills them again."""
    undo.callback(reader.close)
    for i, (site, module) in enumerate(zip(sites, modules, strict=True)):
        weights = dict(module.named_parameters(recurse=False))
        undo.callback(_fill, weights, site, i, reader)
        for weight in weights.values():
            weight.data = weight.data.new_empty(0)


def _fill(weights: dict[str, nn.Parameter], site: Site, i: int, reader: ExpertReader) -> None:
    image = bytearray(site.expert_nbytes)
    filled = {p.name: weights[p.name].data.new_empty(site.num_experts, *p.shape) for p in site.parts}
    for e in range(site.num_experts):
        reader.read_into(i, e, memoryview(image))
        for part in site.parts:
            raw = torch.frombuffer(image, dtype=torch.uint8, offset=part.offset, count=part.nbytes)
            filled[part.name][e].view(-1).view(torch.uint8).copy_(raw)
    for name, weight in filled.items():
        weights[name].data = weight


# What changes in the model --------------------------------------------------------------------------------------------


def _strip(modules: list[nn.Module], undo: ExitStack) -> None:
    """Take the experts' parameters out of their modules."""
    for module in modules:
        undo.callback(module._parameters.update, dict(module._parameters))
        module._parameters.clear()


def _quantize_backbone(model: nn.Module, scheme: Scheme, dtype: str, exact: bool, undo: ExitStack) -> None:
    """Replace the layers that `scheme` quantizes; a tied head and its embedding share one quantized weight."""
    modules = dict(model.named_modules())
    by_weight: dict[int, tuple[list[str], QTensor | None]] = {}
    for name, role in backbone_roles(model).items():
        weight = modules[name.removesuffix(".weight")].weight
        if id(weight) not in by_weight:
            by_weight[id(weight)] = ([], scheme.quantize(weight.detach(), role))
        by_weight[id(weight)][0].append(name)
    quantized = {name: q for names, q in by_weight.values() if q is not None for name in names}
    for name in quantized:
        parent, _, child = name.removesuffix(".weight").rpartition(".")
        undo.callback(setattr, modules[parent], child, modules[name.removesuffix(".weight")])
    layers.hollow(model, list(quantized))
    layers.fill(model, quantized, torch_dtype(dtype), exact)


def _switch(model: nn.Module, modules: list[nn.Module], undo: ExitStack) -> None:
    """Make transformers call mixoff for the experts, and turn compilation off."""

    def change(thing: object, name: str, value: object) -> None:
        undo.callback(setattr, thing, name, getattr(thing, name))
        setattr(thing, name, value)

    for config in {id(module.config): module.config for module in modules}.values():
        change(config, "_experts_implementation_internal", backend.NAME)
    if getattr(model, "generation_config", None) is not None:
        change(model.generation_config, "disable_compile", True)
