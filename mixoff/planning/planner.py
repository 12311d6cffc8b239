"""What runs where: bytes of a model on a machine, how many slots each layer gets, whether it fits, how fast it may be.

A plan needs a configuration, not weights. It takes bytes from `sizes`, slots from the runtime's own rule, and speed
from `timeline`; its numbers are modelled, and every input is shown. Does not know tensors or files.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from mixoff.errors import BudgetError, CheckpointError, MixoffError
from mixoff.planning import hardware as machines
from mixoff.planning import probe, speed
from mixoff.planning.needs import Needs
from mixoff.planning.plan import Plan
from mixoff.shapes import sizes
from mixoff.shapes.shape import ModelShape
from mixoff.store import describe
from mixoff.store.describe import as_stored
from mixoff.units import format_nbytes, parse_nbytes

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from mixoff.planning.hardware import Hardware
    from mixoff.quantize.scheme import Scheme


DEFAULT = "t4"  # the machine that anybody can have for an hour
ROUTERS = {(8, 2): "mixtral-8x7b", (128, 8): "qwen3-235b", (256, 8): "glm-5.2"}  # experts, top-k: a fitted router
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
) -> Plan:
    """How the model at `source` lies in memory, whether it fits, and how fast it may be.

    source: what `presets.shape_of` takes: a configuration, a folder, or a Hub id. fast_bytes, ram_bytes, disk_bytes:
    the whole fast memory, RAM, and disk, in place of the machine's. scheme: a preset's name or a Scheme; None is
    `mixed`, or what a store is in already. hardware: a name in `hardware.NAMED`, `here`, or a Hardware; None is a T4.
    hit_rate: in place of a modelled one. Raises MixoffError and CheckpointError for what cannot be planned.
    """
    if context < 1 or batch < 1:
        raise MixoffError(f"context is {context} and batch {batch}: plan for at least one token of one sequence")
    machine = _machine(hardware, fast_bytes, ram_bytes, disk_bytes)
    return _plan(_needs(source, scheme, machine, context, batch), machine, hit_rate)


def fast_nbytes(source: str | Path, machine: Hardware, context: int, scheme: Scheme | None = None) -> int:
    """Bytes for experts in the fast memory of `machine`: what `load` takes on a GPU where it is not told.

    Raises BudgetError, with the ways out, where not one slot a layer fits.
    """
    needs = _needs(source, scheme, machine, context, 1)
    if not any(needs.slots(_remaining(needs, machine))):
        raise BudgetError(f"{needs.sizes.shape.name} does not fit: " + "; or ".join(ways_out(needs, machine)))
    return _remaining(needs, machine)


def _needs(source: object, scheme: str | Scheme | None, machine: Hardware, context: int, batch: int) -> Needs:
    shape = describe.shape_of(source)
    if not shape.parameters["experts"]:
        raise CheckpointError(shape.refusal)
    shape, scheme = as_stored(shape, source, scheme)
    return Needs.of(sizes.sizes_of(shape, scheme), machine, context, batch)


def _machine(hardware: str | Hardware | None, *given: int | str | None) -> Hardware:
    machine = probe.named(hardware or DEFAULT) if not isinstance(hardware, machines.Hardware) else hardware
    for key, size in zip(("fast_bytes", "ram_bytes", "disk_bytes"), given, strict=True):
        if size is not None:
            machine = replace(
                machine, **{key: parse_nbytes(size)}, sources=machine.sources | {key: "given by the user"}
            )
    return machine


def _plan(needs: Needs, machine: Hardware, hit_rate: float | None) -> Plan:
    of, shape = needs.sizes, needs.sizes.shape
    remaining = machine.fast_bytes - machine.reserved_nbytes - needs.fixed
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
    """Bytes in each tier: RAM holds a copy of all experts if they fit, else those that the fast tier lacks.

    The interpreter's share of RAM is kept free where the fast tier is a card's memory.
    """
    of = needs.sizes
    spare = needs.spare(_remaining(needs, machine)) if any(slots) else 0
    arena = (sum(slots) + spare) * of.slot_nbytes + needs.scratch if any(slots) else of.experts if resident else 0
    beyond = 0 if resident else of.experts - _held(needs, slots)
    room = max(machine.ram_bytes - machines.CPU_RESERVED, 0) if machine.device == "cuda" else machine.ram_bytes
    ram = 0 if resident else of.experts if of.experts <= room else min(beyond, room)
    return {"fast": needs.fixed + arena, "ram": ram, "disk": max(beyond - ram, 0)}


def _held(needs: Needs, slots: list[int]) -> int:
    """Bytes of experts, as stored, that so many slots of each layer hold."""
    from mixoff.shapes.sites import stride

    return sum(n * stride(site) for n, site in zip(slots, needs.sizes.sites, strict=True))


# Speed ----------------------------------------------------------------------------------------------------------------


def _hit_rate(shape: ModelShape, slots: list[int], resident: bool, given: float | None) -> tuple[float, str]:
    """Share of decoding's requests that the fast tier holds, the mean over layers, and where the figure comes from."""
    if given is not None:
        return given, "given by the user"
    if resident or not any(slots):
        return float(resident), "every expert is in the fast tier" if resident else "nothing fits"
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
    """The band: `low` has uniform routing and no fetch behind computing; `high` the better kernels."""
    experts = sum(site.num_experts for site in needs.sizes.sites)
    uniform = sum(slots) / experts if given is None else given
    share = _ram_share(needs, slots, tiers) if machine.device == "cuda" else 0.0
    return {
        name: speed.predict(
            needs.sizes.shape,
            needs.sizes.scheme or sizes.PUBLISHED,
            machine,
            uniform if name == "low" else rate,
            efficiency=speed.EFFICIENCY[machine.device][name],
            ram_share=share,
            background=False if name == "low" else None,
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
            f"a layer has fewer slots than a token wants experts ({max(of.shape.top_k)}): each token moves some of "
            "them twice; fewer bits or a shorter context make room"
        )
    return advice


def _remaining(needs: Needs, machine: Hardware) -> int:
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
    """Changes that make a model fit which does not, each enough by itself, the smallest first."""
    of, found = needs.sizes, []
    if machine.disk_bytes is not None and of.stored > machine.disk_bytes:
        lacking = of.stored - machine.disk_bytes
        found.append(f"free {format_nbytes(lacking)} of disk: the store takes {format_nbytes(of.stored)}")
    if not of.shape.sites:
        return found or [f"use a machine with {format_nbytes(needs.fixed + of.experts)} of fast memory"]
    need = needed_fast_nbytes(needs, machine)
    if need <= machine.fast_bytes:
        return found
    shorter = _shorter_context(needs, machine)
    if shorter:
        found.append(f"use --context {shorter}: KV cache and workspace shrink with it")
    if scheme := _smaller_scheme(needs, machine):
        found.append(f"use --scheme {scheme}: a slot of each layer then fits")
    return [*found, f"raise --fast to {format_nbytes(need)} ({need:,} bytes): one slot for each MoE layer then fits"]


def _shorter_context(needs: Needs, machine: Hardware) -> int | None:
    """The longest context, by halving, with which one slot a layer fits."""
    context = needs.context // 2
    while context >= 128:
        shorter = Needs.of(needs.sizes, machine, context, needs.batch)
        if any(shorter.slots(_remaining(shorter, machine))):
            return context
        context //= 2
    return None


def _smaller_scheme(needs: Needs, machine: Hardware, whole: bool = False) -> str | None:
    """The scheme with most bits, of those with fewer than now, with which one slot a layer fits, or all experts do."""
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
        if enough and of.experts < needs.sizes.experts:
            return name
    return None
