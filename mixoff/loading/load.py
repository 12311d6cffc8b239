"""Models whose experts are served by a runtime: `load` makes one from a folder.

The backbone is loaded by transformers itself; the experts' parameters are removed before weights are looked for, so
`from_pretrained` never opens an expert tensor.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import torch
from transformers import PreTrainedModel

from mixoff._version import __version__
from mixoff.cache.policies import Policy
from mixoff.checkpoints.find import Folder, find
from mixoff.errors import BudgetError, MixoffError
from mixoff.kernels import reference
from mixoff.kernels.triton import products as triton_products
from mixoff.loading import preload
from mixoff.loading.backbone import load_backbone
from mixoff.loading.hooks import bind, checked
from mixoff.loading.kv_bits import quantize_cache
from mixoff.planning import planner, probe
from mixoff.planning.budget import goes_direct, pinned_nbytes
from mixoff.planning.hardware import Hardware
from mixoff.quantize.scheme import Scheme
from mixoff.runtime import ranks
from mixoff.runtime.runtime import Runtime
from mixoff.shapes import sites
from mixoff.shapes.config import likely_top_k, read_config
from mixoff.store import kept
from mixoff.store.readers import ExpertReader, past_page_cache
from mixoff.store.source import EncodedError, Source, open_source
from mixoff.transfer import cuda
from mixoff.transfer.cuda import MARGIN, Gpu
from mixoff.transfer.streams import STAGING
from mixoff.transfer.tiers import WORKERS
from mixoff.units import format_nbytes, parse_nbytes

DTYPES = ("float32", "bfloat16", "float16")
UNCOMPILED = (
    "Triton cannot compile kernels for this card, so torch alone multiplies dequantized weights, several times slower; "
    "another release of triton may help"
)
CPU_BUDGET = "6GiB"  # RAM for experts on a CPU, unless `fast_bytes` says otherwise


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
    kv_bits: int | None = None,
    decode: str = "compiled",
    shard: bool = False,
) -> PreTrainedModel:
    """A transformers model whose experts stay in a store or checkpoint folder until the router asks for them.

    What the model computes depends on `scheme`, `dtype`, `exact`, `kv_bits` and `decode` alone. Raises
    CheckpointError or BudgetError.
    Tested bit for bit against transformers' `grouped_mm` with all experts resident.

    Parameters
    ----------
    path: folder, GGUF file, or Hub model (`org/model`, `org/model@revision`), which is downloaded into the Hub's cache
    fast_bytes: budget for experts in the fast tier: slots, buffers and scratch (`"6GiB"`, `"500MB"`, an int).
        `"auto"` is 6 GiB on a CPU, and what a plan leaves for experts on a GPU
    scheme: `Scheme`, or a preset's name, in which a plain checkpoint is stored once, in the user's cache folder;
        `"keep"` takes over codes that are quantized already, and None takes the folder as it is
    revision: branch, tag or commit of a Hub model
    ram_bytes: hard limit on copies of experts in RAM, with which files are read past the page cache.
        None makes no copies on a CPU, and page-locks free RAM for them on a GPU
    policy: name of an eviction policy, or a class or function that makes a `policies.Policy`;
        `"none"` keeps nothing between calls, for comparison
    prefetch: `"next-router"` guesses what the next layer will ask for, `"none"` never guesses;
        `"auto"` guesses where it can pay, and stops where it does not
    scope: `"layer"` gives each MoE layer its own slots, `"global"` shares one pool
    io: `"direct"` reads past the page cache, `"buffered"` through it, `"auto"` follows `budget.goes_direct`
    exact: True keeps activations in fp32 in kernels for quantized weights
    fetch: `"expert"` fetches what the router chose, `"layer"` all experts of the layer, for comparison
    device: `"cpu"`, `"cuda"` or `"cuda:N"`; `"auto"` is the first GPU that torch sees, else the CPU
    dtype: dtype of the computation; `"auto"` is the files' own, with two exceptions:
        a CPU computes fp16 in fp32, and a GPU older than sm_80 computes bf16 in fp16.
        A backbone beyond fp16's range is then refused, while experts stay as stored and are not checked
    context: tokens for whose keys and values a GPU's memory is kept free
    kv_bits: 4 or 8 bits for keys and values in `generate`, by transformers' own quantized cache (extra `kv`: hqq);
        None keeps them in the dtype of the computation, which is exact
    decode: `"compiled"` computes single tokens of a quantized model by compiled programs on a CPU (`runtime.step`),
        whose last bits differ, and as one CUDA graph on a GPU (`runtime.graph`), where that is possible;
        `"modules"` by transformers' modules
    shard: True serves this process's share of the experts, in a group of torch.distributed or started by torchrun:
        all ranks must then make the same calls, and the budgets are those of one rank
    """
    gpu, decode = cuda.pick(ranks.device_of(device) if shard else device), checked(decode)
    if gpu and (why := triton_products.check(gpu.where)):
        warnings.warn(f"{UNCOMPILED} ({why})", stacklevel=2)
    with ExitStack() as undo:
        source = _open(find(path, revision), scheme)
        undo.callback(source.close)
        mine = ranks.of_group(source.sites) if shard else ranks.Ranks(source.sites)
        source.sites = mine.sites
        compute = _compute_dtype(dtype, source.dtype, gpu)
        budget, ram = budgets(source, fast_bytes, ram_bytes, gpu, compute, context, kv_bits)
        limited = ram_bytes is not None or gpu is not None
        source.reader = choose_io(source.reader, source.sites, io, budget, limited)
        model = load_backbone(source, compute, exact, gpu) if gpu else None  # first: slots take what it leaves
        runtime = Runtime(
            source,
            budget,
            policy,
            scope,
            compute,
            ram_bytes=ram,
            prefetch=prefetch,
            top_k=likely_top_k(read_config(source.folder)),
            exact=exact,
            fetch=fetch,
            device=gpu,
            ranks=mine,
        )
        undo.callback(runtime.close)
        _check_memory((0 if gpu else runtime.arena.numel()) + runtime.ram_nbytes)
        model = model or load_backbone(source, compute, exact)
        if kv_bits is not None:
            quantize_cache(model, kv_bits)
        mine.connect(_facts(source, compute, exact, decode))
        undo.pop_all()
    bind(model, runtime, decode=decode)
    if gpu:
        try:
            preload.fill(model)
        except BaseException:
            runtime.close()
            raise
    return model


def budgets(
    source: Source,
    fast_bytes: int | str,
    ram_bytes: int | str | None,
    gpu: cuda.Cuda | None,
    compute: torch.dtype,
    context: int,
    kv_bits: int | None = None,
) -> tuple[int, int]:
    """Bytes of the fast and the RAM tier: as given, else from a plan for the free memory of the GPU.

    Raises BudgetError, with the plan's advice, where the model does not fit.
    """
    fast = None if fast_bytes == "auto" else parse_nbytes(fast_bytes)
    ram = None if ram_bytes is None else parse_nbytes(ram_bytes)
    if gpu is None:
        return parse_nbytes(CPU_BUDGET) if fast is None else fast, ram or 0
    machine = replace(measured(gpu.describe()), compute_dtype=str(compute).removeprefix("torch."))
    if fast is None:
        fast = planner.fast_nbytes(source.folder, machine, context, scheme_asked(source), kv_bits)
    if ram is None:
        experts = sum(site.num_experts * sites.stride(site) for site in source.sites)
        held = fast - reference.scratch_nbytes(source.sites, compute)
        unused = (STAGING + 2 * likely_top_k(read_config(source.folder)) + 1) * sites.slot_nbytes(source.sites)
        ram = 0 if held >= experts else pinned_nbytes(experts, experts - held + unused, machine)
    return fast, ram


def scheme_asked(source: Source) -> Scheme | None:
    """The scheme to plan `source` in; None if its files determine it."""
    return None if source.files.is_quantized else source.scheme


def choose_io(reader: ExpertReader, of: Iterable[sites.Site], io: str, fast_bytes: int, limited: bool) -> ExpertReader:
    """The reader, or one that bypasses the page cache, if `goes_direct` says so."""
    experts = sum(site.num_experts * site.expert_nbytes for site in of)
    direct = goes_direct(io, experts + min(fast_bytes, experts), probe.memory_nbytes()[1], limited)
    return past_page_cache(reader, WORKERS) if direct else reader


def _check_memory(nbytes: int) -> None:
    """Refuse tiers larger than this machine's memory, before the system kills the process for it."""
    if nbytes > (total := probe.memory_nbytes()[0]):
        raise BudgetError(
            f"fast and RAM tier would take {format_nbytes(nbytes)}, and this process may use {format_nbytes(total)}: "
            "lower fast_bytes or ram_bytes"
        )


def _open(folder: Folder, scheme: str | Scheme | None) -> Source:
    """The source in `folder`, in the precision of `scheme` if one is given."""
    scheme = Scheme.preset(scheme) if isinstance(scheme, str) else scheme
    try:
        source = open_source(folder)
    except EncodedError:
        if scheme is None:
            raise
    else:
        if scheme is None or scheme.keeps or scheme == source.scheme:
            return source
        source.close()
        if folder.is_store:
            raise MixoffError(
                f"{folder} is a store in another scheme: load it without one, or convert the original again"
            )
    return open_source(kept.store_of(folder, scheme))


def _facts(source: Source, compute: torch.dtype, exact: bool, decode: str) -> dict[str, object]:
    """What ranks must have in common, so that all of them compute the same bits."""
    return {
        "mixoff": __version__,
        "torch": torch.__version__,
        "the processor": torch.backends.cpu.get_cpu_capability(),
        "the number of threads": torch.get_num_threads(),
        "the scheme": source.scheme.to_json(),
        "the model": hashlib.sha256((source.folder / "config.json").read_bytes()).hexdigest()[:16],
        "dtype": str(compute),
        "exact": exact,
        "decode": decode,
    }


def _compute_dtype(dtype: str | torch.dtype, stored: str, gpu: cuda.Cuda | None = None) -> torch.dtype:
    name = str(dtype).removeprefix("torch.")
    native = gpu.describe().dtype if gpu else None
    if name == "auto" and native:
        name = native if stored == "bfloat16" else stored
    elif name == "auto":
        name = "float32" if stored == "float16" else stored
    if name not in DTYPES:
        raise MixoffError(f"cannot compute in {dtype}: choose one of auto, {', '.join(DTYPES)}")
    if native == "float16" and name == "bfloat16":
        warnings.warn("this GPU only emulates bfloat16, which is slow: float16 is its own format", stacklevel=3)
    return sites.torch_dtype(name)


def measured(gpu: Gpu) -> Hardware:
    """The card and this machine's free RAM as a plan sees them, for sizes only: the bandwidths are a T4's."""
    sources = {
        "fast_bytes": f"measured: free now of {gpu.name}",
        "ram_bytes": "measured: free now",
        "reserved_nbytes": f"stated: {format_nbytes(MARGIN)} for workspaces and fragments, in addition to the context",
    }
    return replace(
        probe.named("t4"),
        name="here",
        compute_dtype=gpu.dtype,
        fast_bytes=gpu.free_nbytes,
        ram_bytes=probe.memory_nbytes()[1],
        reserved_nbytes=MARGIN,
        sources=sources,
    )
