"""Models whose experts are served by a runtime: `load` makes one from a folder.

The backbone is loaded by transformers itself; the experts' parameters are removed before weights are looked for, so
`from_pretrained` never opens an expert tensor. Does not know how experts are cached or computed.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import torch
from transformers import PreTrainedModel

from mixoff.cache.policies import Policy
from mixoff.checkpoints import published
from mixoff.checkpoints.names import pinned
from mixoff.errors import BudgetError, MixoffError
from mixoff.kernels import reference
from mixoff.loading.backbone import load_backbone
from mixoff.loading.hooks import bind
from mixoff.planning import planner, probe
from mixoff.planning.budget import goes_direct, pinned_nbytes
from mixoff.planning.hardware import Hardware
from mixoff.quantize.scheme import Scheme
from mixoff.runtime.prefetch import top_k
from mixoff.runtime.runtime import Runtime
from mixoff.shapes import sites
from mixoff.shapes.config import read_config
from mixoff.store import kept
from mixoff.store.readers import past_page_cache
from mixoff.store.source import EncodedError, Source, open_source
from mixoff.transfer import cuda, streams
from mixoff.transfer.cuda import MARGIN, Gpu
from mixoff.transfer.tiers import WORKERS
from mixoff.units import format_nbytes, parse_nbytes

DTYPES = ("float32", "bfloat16", "float16")
CPU_BUDGET = "6GiB"  # of RAM for experts where nobody says otherwise


def load(
    path: str | Path,
    fast_bytes: int | str = "auto",
    *,
    scheme: str | Scheme | None = None,
    revision: str | None = None,
    ram_bytes: int | str | None = None,
    policy: str | Callable[[], Policy] = "lru",
    prefetch: str = "auto",
    scope: str = "layer",
    io: str = "auto",
    exact: bool = False,
    fetch: str = "expert",
    device: str = "auto",
    dtype: str | torch.dtype = "auto",
    context: int = 4096,
) -> PreTrainedModel:
    """A transformers model whose experts stay in the store, or in a plain checkpoint folder, until the router asks.

    path: a folder, or a model on the Hub (`org/model`, `org/model@revision`), fetched into the cache of the Hub.
    fast_bytes: bytes for experts in the fast tier: slots, buffers and scratch together (`"6GiB"`, `"500MB"`, an int);
    `"auto"` is 6 GiB on a CPU, and what a plan for the free memory of a GPU leaves to experts. scheme: None takes the
    folder as it is; a `Scheme`, or a preset's name, quantizes a plain checkpoint first, into a store that is kept
    in the user's cache folder, and found again. scope:
    `"layer"` gives every MoE layer its own slots, `"global"` shares one pool. dtype: of the computation; `"auto"` takes
    the files', except fp16 on a CPU, which computes in fp32, and bf16 on a GPU older than sm_80, which computes in
    fp16. A backbone beyond fp16's range is then refused; experts, which stay as stored, are not looked at.
    ram_bytes: for copies of experts in RAM, which are fetched without a look at the disk: a hard limit, so that files
    are then read past the page cache; None has no such copies on a CPU, and page-locks as much of the free RAM as
    there are experts for a GPU. device: `"auto"` is the first GPU, where torch sees one, else
    `"cpu"`. context: tokens for whose keys and values a GPU's memory is kept free. io: `"direct"` reads past the page
    cache, `"buffered"` through it, `"auto"` as `readers.goes_direct` says. prefetch: `"next-router"` guesses what the
    next layer will ask for; `"auto"` does where it can pay and stops where it does not, `"none"` never. policy: a name,
    or a class or function that makes a `policies.Policy`; `"none"` keeps nothing between calls. fetch: `"layer"`
    fetches all experts of a layer whichever are asked for; both serve comparisons. exact: activations stay fp32 in
    kernels for quantized weights. What the model computes depends on scheme, dtype and exact alone.
    Raises CheckpointError or BudgetError. Tested bit for bit against transformers' `grouped_mm` with all resident.
    """
    gpu = cuda.pick(device)
    with ExitStack() as undo:
        source = _open(pinned(path, revision), scheme)
        undo.callback(source.close)
        compute, k = _compute_dtype(dtype, source.dtype, gpu), top_k(read_config(source.folder))
        budget, ram = budgets(source, fast_bytes, ram_bytes, gpu, compute, context)
        choose_io(source, io, budget, limited=ram_bytes is not None or gpu is not None)
        model = load_backbone(source, compute, exact, gpu) if gpu else None  # first: slots take what it leaves
        how = {"prefetch": prefetch, "top_k": k, "exact": exact, "fetch": fetch, "device": gpu}
        runtime = Runtime(source, budget, policy, scope, compute, ram_bytes=ram, **how)
        undo.callback(runtime.close)
        _check_memory((0 if gpu else runtime.arena.numel()) + runtime.ram_nbytes)
        model = model or load_backbone(source, compute, exact)
        undo.pop_all()
    bind(model, runtime)
    return model


def budgets(
    source: Source,
    fast_bytes: int | str,
    ram_bytes: int | str | None,
    gpu: streams.Device | None,
    compute: torch.dtype,
    context: int,
) -> tuple[int, int]:
    """Bytes of the fast and the RAM tier: those asked for, else what a plan for the free memory of a GPU says.

    Raises BudgetError, with the plan's advice, where the model does not fit.
    """
    fast = None if fast_bytes == "auto" else parse_nbytes(fast_bytes)
    ram = None if ram_bytes is None else parse_nbytes(ram_bytes)
    if gpu is None:
        return parse_nbytes(CPU_BUDGET) if fast is None else fast, ram or 0
    machine = replace(measured(gpu.describe()), compute_dtype=str(compute).removeprefix("torch."))
    if fast is None:
        fast = planner.fast_nbytes(source.folder, machine, context, scheme_asked(source))
    if ram is None:
        experts = sum(site.num_experts * sites.stride(site) for site in source.sites)
        resident = fast >= experts + reference.scratch_nbytes(source.sites, compute)
        ram = 0 if resident else pinned_nbytes(experts, machine)
    return fast, ram


def scheme_asked(source: Source) -> Scheme | None:
    """The scheme to plan `source` in: None where its files say it."""
    return None if source.is_store or published.is_published(source.folder) else source.scheme


def choose_io(source: Source, io: str, fast_bytes: int, limited: bool) -> None:
    """Give `source` a reader that goes past the page cache, if it should."""
    experts = sum(site.num_experts * site.expert_nbytes for site in source.sites)
    if goes_direct(io, experts + min(fast_bytes, experts), probe.memory_nbytes()[1], limited):
        source.reader = past_page_cache(source.reader, WORKERS)


def _check_memory(nbytes: int) -> None:
    """Refuse tiers that no memory here could hold, before the system ends the process for it."""
    if nbytes > (total := probe.memory_nbytes()[0]):
        raise BudgetError(
            f"fast and RAM tier would take {format_nbytes(nbytes)}, and this process may have {format_nbytes(total)}: "
            "lower fast_bytes or ram_bytes"
        )


def _open(path: str | Path, scheme: str | Scheme | None) -> Source:
    """The source at `path`, in the precision of `scheme` if one is given."""
    scheme = Scheme.preset(scheme) if isinstance(scheme, str) else scheme
    try:
        source = open_source(path)
    except EncodedError:
        if scheme is None:
            raise
    else:
        if scheme is None or scheme == source.scheme:
            return source
        source.close()
        if source.is_store:
            raise MixoffError(
                f"{path} is a store in another scheme: load it without one, or convert the original again"
            )
    return open_source(kept.store_of(path, scheme))


def _compute_dtype(dtype: str | torch.dtype, stored: str, gpu: streams.Device | None = None) -> torch.dtype:
    name = str(dtype).removeprefix("torch.")
    own = gpu and gpu.describe().dtype
    if name == "auto" and gpu:
        name = own if stored == "bfloat16" else stored
    elif name == "auto":
        name = "float32" if stored == "float16" else stored
    if name not in DTYPES:
        raise MixoffError(f"cannot compute in {dtype}: choose one of auto, {', '.join(DTYPES)}")
    if own == "float16" and name == "bfloat16":
        warnings.warn("this GPU only emulates bfloat16, which is slow: float16 is its own format", stacklevel=3)
    return sites.torch_dtype(name)


def measured(gpu: Gpu) -> Hardware:
    """The card and this machine's RAM as a plan sees them, from what is free now, for sizes alone.

    Its bandwidths are a T4's: no size depends on them.
    """
    sources = {
        "fast_bytes": f"measured: free now of {gpu.name}",
        "ram_bytes": "measured: free now",
        "reserved_nbytes": f"stated: {format_nbytes(MARGIN)} for workspaces and fragments, beside the context",
    }
    sizes = {"fast_bytes": gpu.free_nbytes, "ram_bytes": probe.memory_nbytes()[1], "reserved_nbytes": MARGIN}
    return replace(probe.named("t4"), name="here", compute_dtype=gpu.dtype, **sizes, sources=sources)
