"""Plans: bytes of a model on a machine, how many slots each layer gets, whether it fits, how fast it may be.

A plan needs a configuration, not weights. It takes bytes from `sizes`, slots from the runtime's rule, and speed from
`speed`; its numbers are modelled, and every input is shown.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mixoff.errors import BudgetError, CheckpointError, MixoffError
from mixoff.planning import hardware as machines
from mixoff.planning import probe, speed
from mixoff.planning.budget import pinned_nbytes
from mixoff.planning.needs import Needs
from mixoff.planning.plan import Plan
from mixoff.shapes import sizes
from mixoff.shapes.shape import ModelShape
from mixoff.shapes.sites import stride
from mixoff.store import describe
from mixoff.store.describe import as_stored
from mixoff.units import format_nbytes, parse_nbytes

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from mixoff.planning.hardware import Hardware
    from mixoff.quantize.scheme import Scheme
    from mixoff.shapes.sizes import Sizes


DEFAULT = "t4"  # the GPU of free notebooks
ROUTERS = {(8, 2): "mixtral-8x7b", (128, 8): "qwen3-235b", (256, 8): "glm-5.2"}  # (experts, top-k): fitted router
LOCALITY = "modelled: LRU on the synthetic router {}, fitted to reported figures"
UNIFORM = "modelled: uniform routing, slots / experts; no figures of a model of this shape are at hand"


def plan(
    source: ModelShape | PretrainedConfig | str | Path,
    fast_bytes: int | str | None = None,
    ram_bytes: int | str | None = None,
    disk_bytes: int | str | None = None,
    *,
    context: int = 4096,
    batch: int = 1,
    scheme: str | Scheme | None = None,
    hardware: str | Hardware | None = None,
    hit_rate: float | None = None,
    kv_bits: int | None = None,
) -> Plan:
    """Where the bytes of a model go on a machine, whether it fits, and how fast it may be. Nothing is downloaded.

    Raises MixoffError, and CheckpointError for a model that cannot be planned.

    Parameters
    ----------
    source: configuration, folder, Hub id, or `ModelShape`
    fast_bytes: size of the fast memory, in place of the machine's
    ram_bytes: size of RAM, likewise
    disk_bytes: size of the disk, likewise
    context: tokens of each sequence
    batch: number of sequences
    scheme: `Scheme`, or a preset's name; None is `mixed`, or the scheme of a store
    hardware: name in `hardware.NAMED`, `here` to measure this machine, or a `Hardware`; None is a T4
    hit_rate: hit rate of the fast tier, in place of a modelled one
    kv_bits: 4 or 8 bits for keys and values; None is the dtype of the computation
    """
    if context < 1 or batch < 1:
        raise MixoffError(f"context is {context} and batch {batch}: plan for at least one token of one sequence")
    of = _sizes(source, scheme)  # first: measuring this machine for a model that cannot be planned would be in vain
    machine = _machine(hardware, fast_bytes, ram_bytes, disk_bytes)
    return _plan(Needs.of(of, machine, context, batch, kv_bits), machine, hit_rate)


def fast_nbytes(
    source: str | Path, machine: Hardware, context: int, scheme: Scheme | None = None, kv_bits: int | None = None
) -> int:
    """Bytes left for experts in the fast memory of `machine`: the default budget of `load` on a GPU.

    Raises BudgetError, with the ways out, if not even one slot per layer fits.
    """
    needs = _needs(source, scheme, machine, context, 1, kv_bits)
    if not any(needs.slots(_remaining(needs, machine))):
        raise BudgetError(f"{needs.sizes.shape.name} does not fit: " + "; or ".join(ways_out(needs, machine)))
    return _remaining(needs, machine)


def _needs(
    source: object,
    scheme: str | Scheme | None,
    machine: Hardware,
    context: int,
    batch: int,
    kv_bits: int | None = None,
) -> Needs:
    return Needs.of(_sizes(source, scheme), machine, context, batch, kv_bits)


def _sizes(source: object, scheme: str | Scheme | None) -> Sizes:
    """The sizes of a model that mixoff serves. Raises CheckpointError for others."""
    shape = describe.shape_of(source)
    if not shape.parameters["experts"]:
        raise CheckpointError(shape.refusal)
    shape, scheme = as_stored(shape, source, scheme)
    return sizes.sizes_of(shape, scheme)


def _machine(hardware: str | Hardware | None, *given: int | str | None) -> Hardware:
    machine = probe.named(hardware or DEFAULT) if not isinstance(hardware, machines.Hardware) else hardware
    for key, size in zip(("fast_bytes", "ram_bytes", "disk_bytes"), given, strict=True):
        if size is not None:
            known: dict[str, Any] = {key: parse_nbytes(size), "sources": machine.sources | {key: "given by the user"}}
            machine = replace(machine, **known)
    return machine


def _plan(needs: Needs, machine: Hardware, hit_rate: float | None) -> Plan:
    of, shape = needs.sizes, needs.sizes.shape
    remaining = _remaining(needs, machine)
    slots = needs.slots(remaining) if shape.sites else []
    least = min(slots, default=0)
    served = sum(slots) == sum(site.num_experts for site in shape.sites) > 0
    resident = served or (not shape.sites and of.experts <= remaining)
    tiers = _tiers(needs, machine, slots, resident)
    fits = (resident or least > 0) and (machine.disk_bytes is None or of.stored <= machine.disk_bytes)
    rate, rate_source = _hit_rate(shape, slots, resident, hit_rate)
    speeds = _speeds(needs, machine, rate, hit_rate, slots, tiers) if fits and shape.sites else {}
    parts = shape.parameters
    return Plan(
        source=shape.name,
        scheme=of.name,
        hardware=machine,
        context=needs.context,
        batch=needs.batch,
        parameters={"total": shape.total, "active": shape.active} | parts,
        bytes={
            "experts": of.experts,
            "backbone": needs.backbone,
            "kv_cache": needs.kv_cache,
            "workspace": needs.workspace,
            "store": of.stored,
        },
        tiers=tiers,
        fast_bytes=max(remaining, 0),
        fits=fits,
        resident=resident,
        slots_per_layer=least,
        experts_per_layer=max((site.num_experts for site in shape.sites), default=0),
        hit_rate=rate,
        hit_rate_source=rate_source,
        tokens_per_s={n: speeds[n].tokens_per_s if n in speeds else None for n in ("low", "expected", "high")},
        floors_ms={n: 1000 * s for n, s in speeds["expected"].floors.items()} if speeds else {},
        advice=_advice(needs, machine, tiers, resident, fits),
        predictions=speeds,
    )


def _tiers(needs: Needs, machine: Hardware, slots: list[int], resident: bool) -> dict[str, int]:
    """Bytes in each tier: RAM has a copy of all experts if they fit, else those missing in the fast tier.

    With a card, `hardware.PAGEABLE` of RAM is kept free.
    """
    of = needs.sizes
    arena = of.experts if resident else 0
    if any(slots):
        spare = needs.spare(_remaining(needs, machine))
        arena = (sum(slots) + spare) * of.slot_nbytes + needs.scratch
    if resident:
        return {"fast": needs.fixed + arena, "ram": 0, "disk": 0}
    beyond = of.experts - _held(needs, slots)
    if machine.device == "cuda":
        ram = pinned_nbytes(of.experts, beyond, machine)
    else:
        ram = of.experts if of.experts <= machine.ram_bytes else min(beyond, machine.ram_bytes)
    return {"fast": needs.fixed + arena, "ram": ram, "disk": max(beyond - ram, 0)}


def _held(needs: Needs, slots: list[int]) -> int:
    """Bytes of experts, as stored, in this many slots of each layer."""
    return sum(n * stride(site) for n, site in zip(slots, needs.sizes.sites, strict=True))


# Speed ----------------------------------------------------------------------------------------------------------------


def _hit_rate(shape: ModelShape, slots: list[int], resident: bool, given: float | None) -> tuple[float, str]:
    """Share of decoding's requests that the fast tier holds, mean over layers, and the origin of the figure."""
    if given is not None:
        return given, "given by the user"
    if resident:
        return 1.0, "every expert is in the fast tier"
    if not any(slots):
        return 0.0, "nothing fits"
    site, top_k = shape.sites[0], max(shape.top_k)
    name = ROUTERS.get((site.num_experts, top_k))
    if name is None:
        return sum(slots) / sum(site.num_experts for site in shape.sites), UNIFORM
    from mixoff.trace import routers

    router = routers.preset(name)
    return sum(router.hit_rate(n) for n in slots) / len(slots), LOCALITY.format(name)


def _speeds(
    needs: Needs, machine: Hardware, rate: float, given: float | None, slots: list[int], tiers: dict[str, int]
) -> dict[str, speed.Prediction]:
    """Predictions: `low` has uniform routing and no fetches during computing; `high` has better kernels."""
    experts = sum(site.num_experts for site in needs.sizes.sites)
    uniform = sum(slots) / experts if given is None else given
    share = _ram_share(needs, slots, tiers) if machine.device == "cuda" else 0.0
    back = float(machine.device == "cuda" and 0 < tiers["ram"] < needs.sizes.experts)
    return {
        name: speed.predict(
            needs.sizes.shape,
            needs.sizes.scheme or sizes.PUBLISHED,
            machine,
            uniform if name == "low" else rate,
            efficiency=speed.EFFICIENCY[machine.device][name],
            ram_share=share,
            background=False if name == "low" else None,
            back_share=back,
        )
        for name in ("low", "expected", "high")
    }


def _ram_share(needs: Needs, slots: list[int], tiers: dict[str, int]) -> float:
    """Share of the experts outside the fast tier that RAM holds."""
    beyond = needs.sizes.experts - _held(needs, slots)
    return 1.0 if beyond <= 0 else 1 - tiers["disk"] / beyond


# Advice ---------------------------------------------------------------------------------------------------------------


def _advice(needs: Needs, machine: Hardware, tiers: dict[str, int], resident: bool, fits: bool) -> list[str]:
    of, advice = needs.sizes, []
    if of.shape.refusal:
        advice.append(f"mixoff cannot offload this model: {of.shape.refusal}")
    if resident:
        advice.append(
            f"do not offload: everything fits into the fast memory of {machine.name}, and resident experts are faster "
            "than any cache; `load` keeps them all, and llama.cpp is a good choice as well"
        )
    elif not fits:
        advice += ways_out(needs, machine)
    elif name := _smaller_scheme(needs, machine, whole=True):
        advice.append(f"use --scheme {name}: everything then fits into the fast memory, and nothing is offloaded")
    if fits and not resident and tiers["disk"] and machine.device == "cuda":
        advice.append(
            f"{format_nbytes(tiers['disk'])} of experts stay on disk: with {format_nbytes(tiers['disk'])} more of RAM, "
            "or fewer bits, none would"
        )
    if fits and not resident and min(needs.slots(_remaining(needs, machine))) < max(of.shape.top_k):
        advice.append(
            f"each layer has fewer slots than a token uses experts ({max(of.shape.top_k)}), so each token moves some "
            "of them twice: use fewer bits or a shorter context"
        )
    return advice


def _remaining(needs: Needs, machine: Hardware) -> int:
    """Bytes of the fast memory that are left for experts; below 0 if the rest does not fit."""
    return machine.fast_bytes - machine.reserved_nbytes - needs.fixed


def needed_fast_nbytes(needs: Needs, machine: Hardware, slots: int = 1) -> int:
    """Bytes of fast memory with which each layer has `slots` slots, in addition to the spare slots of prefetching."""
    slots = min(slots, max(site.num_experts for site in needs.sizes.sites))
    experts = needs.experts_in_fast(slots)
    nbytes = needs.fixed + experts + machine.reserved_nbytes
    if slots == 1:  # too few for spare slots
        return nbytes
    smaller = replace(needs, page_cache=min(needs.page_cache, nbytes))
    return nbytes + smaller.spare(experts) * needs.sizes.slot_nbytes


def ways_out(needs: Needs, machine: Hardware) -> list[str]:
    """Changes that make the model fit, each enough by itself, the smallest first; empty if it fits."""
    of, ways = needs.sizes, []
    if machine.disk_bytes is not None and of.stored > machine.disk_bytes:
        lacking = of.stored - machine.disk_bytes
        ways.append(f"free {format_nbytes(lacking)} of disk: the store takes {format_nbytes(of.stored)}")
        if smaller := _smaller_scheme(needs, machine):
            ways.insert(
                0, f"use --scheme {smaller}: its store fits onto the disk, and a slot of each layer into memory"
            )
    if not of.shape.sites:
        return ways or [f"use a machine with {format_nbytes(needs.fixed + of.experts)} of fast memory"]
    need = needed_fast_nbytes(needs, machine)
    if need <= machine.fast_bytes:
        return ways
    shorter = _shorter_context(needs, machine)
    if shorter:
        ways.append(f"use --context {shorter}: KV cache and workspace shrink with it")
    if scheme := _smaller_scheme(needs, machine):
        ways.append(f"use --scheme {scheme}: a slot of each layer then fits")
    return [*ways, f"raise --fast to {format_nbytes(need)} ({need:,} bytes): one slot for each MoE layer then fits"]


def _shorter_context(needs: Needs, machine: Hardware) -> int | None:
    """The longest context, by halving, with which one slot per layer fits."""
    context = needs.context // 2
    while context >= 128:
        shorter = Needs.of(needs.sizes, machine, context, needs.batch, needs.kv_bits)
        if any(shorter.slots(_remaining(shorter, machine))):
            return context
        context //= 2
    return None


def _smaller_scheme(needs: Needs, machine: Hardware, whole: bool = False) -> str | None:
    """The scheme with the most bits, yet fewer than now, that fits: one slot per layer, or everything if `whole`."""
    if needs.sizes.scheme is None or not needs.sizes.shape.sites:
        return None
    for name in ("quality", "paper", "mixed", "small"):
        try:
            of = sizes.sizes_of(needs.sizes.shape, name)
            smaller = replace(needs, sizes=of, backbone=of.backbone(needs.compute))
            slots = smaller.slots(_remaining(smaller, machine))
        except MixoffError:  # a group that divides no width of this model
            continue
        enough = all(n >= (site.num_experts if whole else 1) for n, site in zip(slots, of.sites, strict=True))
        on_disk = machine.disk_bytes is None or of.stored <= machine.disk_bytes
        if enough and on_disk and of.experts < needs.sizes.experts:
            return name
    return None
