"""How a budget is divided: slots, spare slots for guesses, how files are read. The runtime uses the same rules."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mixoff.cache.cache import SCOPES
from mixoff.errors import BudgetError, MixoffError
from mixoff.planning import hardware as machines
from mixoff.shapes.sites import Site, slot_nbytes
from mixoff.units import format_nbytes

if TYPE_CHECKING:
    from mixoff.planning.hardware import Hardware


def least_slots(sites: tuple[Site, ...], scope: str) -> int:
    """The fewest slots that run: one per layer, or a single one."""
    if scope not in SCOPES:
        raise MixoffError(f"unknown scope {scope!r}: choose one of {', '.join(SCOPES)}")
    return len(sites) if scope == "layer" else 1


def plan_slots(sites: tuple[Site, ...], fast_bytes: int, scratch: int, scope: str) -> list[int]:
    """Slots of each pool within `fast_bytes`: one pool per layer, or a single one. Raises BudgetError if too few.

    Slots that do not divide evenly go to the first layers.
    """
    size, least = slot_nbytes(sites), least_slots(sites, scope)
    slots = (fast_bytes - scratch) // size
    if slots < least:
        need = least * size + scratch
        reason = "at least one slot is needed"
        if scope == "layer":
            reason = f"{least} MoE layers need at least one slot each"
        raise BudgetError(
            f"{reason}: fast_bytes is {fast_bytes:,} bytes ({format_nbytes(fast_bytes)}), "
            f"raise it to {need:,} bytes ({format_nbytes(need)}) or more"
        )
    if scope == "global":
        return [min(slots, sum(site.num_experts for site in sites))]
    return [min(slots // len(sites) + (i < slots % len(sites)), site.num_experts) for i, site in enumerate(sites)]


MODES = ("auto", "none", "next-router")
SHARE = 8  # `auto` sets aside at most one slot in this many: the cache needs them more


def set_aside(
    mode: str, slots: int, least: int, experts: int, wanted: int, direct: bool, slot_nbytes: int
) -> tuple[int, str]:
    """Spare slots for guesses, and the reason. Raises MixoffError, or BudgetError if `next-router` has no room.

    mode: one of MODES
    slots: all slots that fit into `fast_bytes`
    least: slots that the cache needs at least
    experts: experts of all layers
    wanted: spare slots wanted, K
    direct: whether misses are read past the page cache, and so take long enough to be hidden

    >>> set_aside("auto", 64, 8, 256, 2, True, 1), set_aside("auto", 256, 8, 256, 2, True, 1)
    ((2, 'on: next-router, 2 spare slots'), (0, 'off: every expert has a slot'))
    """
    if mode not in MODES:
        raise MixoffError(f"unknown prefetch {mode!r}: choose one of {', '.join(MODES)}")
    if mode == "none":
        return 0, "off: as asked"
    if slots >= experts:
        return 0, "off: every expert has a slot"
    if mode == "next-router" and slots <= least:
        raise BudgetError(
            f"prefetch needs a slot in addition to the {least} that the layers need: raise fast_bytes by "
            f"{format_nbytes((least + 1 - slots) * slot_nbytes)}, or set prefetch to 'none'"
        )
    spare = min(wanted, slots - least)
    if mode == "auto" and not direct:
        return 0, "off: misses come from memory, and waking a thread costs what hiding them would save"
    if mode == "auto" and (spare < 1 or spare * SHARE > slots):
        return 0, f"off: {wanted} spare slots would be too many of {slots}"
    return spare, f"on: next-router, {spare} spare slots"


def exchanged(slots: int, least: int, experts: int, wanted: int) -> int:
    """Slots that a device's transfer exchanges for those that are copied back to RAM: `wanted`, or none.

    None where every expert has a slot, or where they would be more than one in SHARE. Arguments as for `set_aside`.

    >>> exchanged(192, 32, 256, 2), exchanged(256, 32, 256, 2), exchanged(12, 8, 256, 2)
    (2, 0, 0)
    """
    return wanted if slots < experts and wanted * SHARE <= slots and slots - wanted >= least else 0


IO = ("auto", "direct", "buffered")


def goes_direct(io: str, nbytes: int, free: int, limited: bool) -> bool:
    """Whether files are read past the page cache. Nothing is timed.

    io: `"direct"` or `"buffered"` decides; `"auto"` is direct if the page cache cannot help or must not be used
    nbytes: bytes of all experts and the fast tier; the page cache cannot help if they exceed `free`
    free: free bytes of memory
    limited: whether RAM for experts is limited, so the page cache must not hold them too

    >>> goes_direct("auto", 14, 24, False), goes_direct("auto", 14, 9, False), goes_direct("auto", 14, 24, True)
    (False, True, True)
    """
    if io not in IO:
        raise MixoffError(f"unknown io {io!r}: choose one of {', '.join(IO)}")
    return io == "direct" or (io == "auto" and (limited or nbytes > free))


def pinned_nbytes(experts: int, beyond: int, machine: Hardware) -> int:
    """Bytes of RAM that `load` page-locks for copies of experts.

    All of them if they fit, since evicting an expert with a copy moves nothing; otherwise those that the card lacks.

    experts: bytes of all experts
    beyond: bytes of experts without a slot
    """
    room = max(machine.ram_bytes - machines.PAGEABLE, 0)
    return experts if experts <= room else min(beyond, room)
