"""The runtime: experts are stored in the slow tier and computed from the fast one, within a budget of bytes.

Letters: **T** tokens of a call, **K** experts per token, **E** experts.
transformers calls `experts_forward` in place of its own loop over experts. Missing experts are fetched in the
background while resident ones are computed; each is computed as soon as it arrives (drawn in `call`). A slot is
computed from only after its bytes arrived, and fetched into only after it was computed from. So the output is that of
the resident model, bit for bit, for any budget.

A call may end anywhere: at a pressed stop button, an exception from a listener, a failed read. Cache, arena, transfer
and guesses all know something about a slot, and no order of their changes is safe at every point. So nothing is
repaired on the way out: `ended` is False during a call, and a call that finds it False begins with an empty fast tier
(`Runtime.renew`). A stop costs the fetches of what was resident; copies in RAM stay. The alternative, a `try` around
each change, left 4 to 9 % of the possible moments wrong.

Source of the idea: Eliseev and Mazur, arXiv 2312.17238, section 3. Built in notebooks/00.
"""

from __future__ import annotations

import os
import threading
import time
import warnings
import weakref
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch

from mixoff.cache.cache import ExpertCache
from mixoff.cache.events import CacheInfo, Event, Key
from mixoff.cache.policies import Policy
from mixoff.errors import BudgetError, MixoffError
from mixoff.kernels import reference
from mixoff.pages import out_of_memory, slab
from mixoff.planning.budget import exchanged, least_slots, plan_slots, set_aside
from mixoff.runtime.call import MOVES, Call, Compute
from mixoff.runtime.prefetch import Guesses
from mixoff.runtime.ranks import Ranks
from mixoff.runtime.recorder import Recorder
from mixoff.runtime.resident import Residents
from mixoff.shapes.sites import slot_nbytes
from mixoff.store.readers import ExpertSource
from mixoff.transfer.arena import Arena
from mixoff.transfer.mailbox import Mailbox
from mixoff.transfer.streams import Device, open_device_transfer
from mixoff.transfer.tiers import open_transfer
from mixoff.transfer.transfer import Transfer
from mixoff.units import format_nbytes

SHRINK = 8  # when memory runs out, one slot in this many is given up at a time
FETCH = ("expert", "layer")
_alive: weakref.WeakSet[Runtime] = weakref.WeakSet()


class Runtime:
    """Serves the experts of one model from an arena of slots. `load` makes one, as `model.mixoff`.

    Safe to use from several threads: calls of MoE layers take turns. Usable as a context manager. Raises BudgetError.

    `reroute` is None, or a function `(site, top_k_index, top_k_weights) -> (top_k_index, top_k_weights)` that may
    change the router's choice (index E: no expert). Nothing else here can change what the model computes.

    Parameters
    ----------
    source: origin of the experts
    fast_bytes: budget of the fast tier
    policy, scope, prefetch, exact, fetch: as for `load`
    compute: dtype of the computation
    ram_bytes: size of the RAM tier, 0 for none
    top_k: K
    device: GPU that holds the fast tier; None is the CPU, whose fast tier is a share of RAM
    ranks: processes that share the experts; None is this one alone
    """

    def __init__(
        self,
        source: ExpertSource,
        fast_bytes: int,
        policy: str | Callable[[], Policy],
        scope: str,
        compute: torch.dtype,
        *,
        ram_bytes: int = 0,
        prefetch: str = "none",
        top_k: int = 2,
        exact: bool = False,
        fetch: str = "expert",
        device: Device | None = None,
        ranks: Ranks | None = None,
    ) -> None:
        if fetch not in FETCH:
            raise MixoffError(f"unknown fetch {fetch!r}: choose one of {', '.join(FETCH)}")
        self.source, self.device, self.ranks = source, device, ranks or Ranks(source.sites)
        self.mailbox = Mailbox(device) if device else None
        self.exact, self.whole_layers, self.scope = exact, fetch == "layer", scope
        self._policy, self._compute = policy, compute
        self._prefetch, self._top_k = prefetch, top_k
        self.reroute: Callable | None = None
        self.residents = Residents()
        self.step: Any = None  # what compiles single tokens (`step.Step`), if anything does
        self._listeners: list[Callable[[Event], None]] = []
        self._routing: list[Callable] = []
        self._lock = threading.RLock()
        self.ended = True  # whether the last call did; set when one begins and ends, under the lock
        self._forked = self._closed = False
        self._pass = threading.local()  # each thread's forward pass: whether it is a prompt, and its last token
        self._tokens = 0
        self._start = time.perf_counter()
        self._before: Counter[str] = Counter()  # counts at the last `reset_counts`
        self.fast_bytes = fast_bytes
        self._fast_nbytes = fast_bytes  # the part in use: less after `make_room`
        self._allocate(fast_bytes)
        self._empty(None)
        self._open_transfer(ram_bytes)
        _alive.add(self)

    def _allocate(self, fast_bytes: int) -> None:
        """Allocate the fast tier within `fast_bytes`, with fewer slots if the system lacks the memory.

        Raises BudgetError if there is not enough for the least number of slots.
        """
        quantized = self.source.scheme.experts is not None  # then torch allocates the blocks; scratch bounds their size
        scratch = 0 if quantized else reference.scratch_nbytes(self.source.sites, self._compute)
        empty = self.device.empty if self.device else slab
        refused = 0  # the first number of slots that did not fit
        while True:
            capacities, spare, reserved = self._divide(fast_bytes)
            slots = sum(capacities) + spare
            try:
                self.scratch = empty(scratch)
                arena = Arena(slots, self.source.sites, empty if self.device else None)
                break
            except Exception as error:
                why = out_of_memory(error)
                if why is None:
                    raise
            refused = refused or slots
            fast_bytes = self._fewer(slots, reserved, why)
        self.arena, self._capacities = arena, capacities
        self.allocated_nbytes = arena.numel() + reserved
        if refused and why:
            self._warn(refused, why)

    def _empty(self, before: ExpertCache | None) -> None:
        """Start with an empty cache that continues the counts of `before`; cache slot i is arena slot i again."""
        cache = ExpertCache(self._capacities, self._policy)
        if before is not None:
            cache.count_on(before)
        self.cache, self.place = cache, list(range(cache.capacity))

    def _divide(self, fast_bytes: int) -> tuple[list[int], int, int]:
        """Slots of each pool, spare slots, and other bytes: scratch and the reader's buffers."""
        sites, size = self.source.sites, slot_nbytes(self.source.sites)
        reserved = reference.scratch_nbytes(sites, self._compute) + getattr(self.source.reader, "buffer_nbytes", 0)
        slots, least = (fast_bytes - reserved) // size, least_slots(sites, self.scope)
        room = {"least": least, "experts": sum(site.num_experts for site in sites), "wanted": self._top_k}
        direct = self.device is not None or getattr(self.source.reader, "direct", False)
        spare, self._why = set_aside(self._prefetch, slots, **room, direct=direct, slot_nbytes=size)
        self._exchanged = exchanged(slots - spare, **room) if self.device else 0
        spare += self._exchanged
        return plan_slots(sites, fast_bytes - spare * size, reserved, self.scope), spare, reserved

    def _spares(self) -> tuple[range, range]:
        """Arena slots after the cache's own: those for guesses, and those that the transfer exchanges."""
        end = len(self.arena.slots)
        return range(self.slots, end - self._exchanged), range(end - self._exchanged, end)

    def _fewer(self, slots: int, reserved: int, why: str) -> int:
        """A budget for about an eighth fewer slots. Raises BudgetError if fewer slots could not run."""
        sites, size = self.source.sites, slot_nbytes(self.source.sites)
        least = least_slots(sites, self.scope)
        if slots <= least:
            raise BudgetError(
                f"the system has no {format_nbytes(slots * size)} for {slots} slots, the least that runs ({why}): free "
                "memory, shorten the context, or use fewer bits"
            )
        return max(least, slots - max(slots // SHRINK, least)) * size + reserved

    def _warn(self, slots: int, why: str) -> None:
        size, now = self.arena.slot_nbytes, len(self.arena.slots)
        warnings.warn(
            f"no memory for {slots} slots, {format_nbytes(slots * size)} of experts ({why}): going on with {now}, "
            f"{format_nbytes(now * size)}; to avoid this, set fast_bytes={self.arena.numel()}, shorten the context, "
            "or use fewer bits",
            stacklevel=4,
        )

    def _open_transfer(self, ram_bytes: int) -> None:
        """Open the transfer, with as large a RAM tier as the system allows, and the guesses, which use it.

        Raises BudgetError if there is no memory for a single copy.
        """
        size, experts = self.arena.slot_nbytes, sum(site.num_experts for site in self.source.sites)
        slots = min(ram_bytes // size, experts)
        while True:
            try:
                self.transfer, self.ram_nbytes = self._filler(slots)
                break
            except Exception as error:
                why = out_of_memory(error)
                if why is None:
                    raise
            if slots <= 1:
                raise BudgetError(f"the system has no {format_nbytes(size)} for the RAM tier ({why}): lower ram_bytes")
            slots -= max(slots // SHRINK, 1)
        if slots * size < ram_bytes - size and slots < experts:
            warnings.warn(f"the RAM tier takes {format_nbytes(self.ram_nbytes)}: there is no more memory", stacklevel=3)
        self.guesses = Guesses(self._spares()[0], self.transfer, self._prefetch, self._why)

    def _filler(self, ram_slots: int) -> tuple[Transfer, int]:
        """The transfer of this device with `ram_slots` copies in RAM, and the bytes that it takes there."""
        nbytes, reader = [site.expert_nbytes for site in self.source.sites], self.source.reader
        if self.device is None:
            return open_transfer(reader, self.arena.images, nbytes, ram_slots), ram_slots * self.arena.slot_nbytes
        experts = sum(site.num_experts for site in self.source.sites)
        slots, spares = self.arena.slots, self._spares()[1]
        transfer = open_device_transfer(self.device, reader, slots, nbytes, ram_slots, experts, spares)
        return transfer, transfer.memory.numel()

    def make_room(self, why: str) -> None:
        """Free about an eighth of the slots after memory ran out; the cache starts again, empty.

        Copies in RAM and all counts stay. Raises BudgetError, with the figures, if no slot can be spared.
        """
        with self._lock:
            if self.arena is None:  # an earlier `make_room` was interrupted
                self.renew()
            slots, reserved = len(self.arena.slots), self.allocated_nbytes - self.arena.numel()
            self._fast_nbytes = self._fewer(slots, reserved, why)
            self.ended = False
            self.transfer.reseat(())
            self.arena = self.scratch = None  # type: ignore[assignment]  # until `renew`; nothing runs before it
            self.renew()
            self._warn(slots, why)
            self._tokens -= getattr(self._pass, "tokens", 0)  # the pass that failed will be repeated

    def renew(self) -> None:
        """Empty the fast tier after a call that did not end; counts and copies in RAM stay.

        Relies on nothing but the memory, and may itself be interrupted: then the next call does it again.
        """
        if self._forked and self.device:
            raise RuntimeError("a forked process cannot use its parent's GPU: load the model there, or use spawn")
        self.transfer.reseat(())
        if self.arena is None:
            if self.device:
                self.device.give_back()
            self._allocate(self._fast_nbytes)
        for key in list(self.cache.slot_of) if self._listeners else ():
            now = time.perf_counter()
            self.tell(key, "evict", 0, now, now)
        self._empty(self.cache)
        guessing, exchanging = self._spares()
        self.transfer.reseat(self.arena.slots if self.device else self.arena.images, exchanging)
        self.guesses.reseat(guessing)
        self.ended = True

    def forked(self) -> None:
        """Called in the child of a fork: locks may be held by threads that exist only in the parent."""
        self._lock, self.ended, self._forked = threading.RLock(), False, True
        self.transfer.forked()

    @property
    def slots(self) -> int:
        """Slots of all layers together, without those set aside for guesses."""
        return self.cache.capacity

    @property
    def bytes_moved(self) -> int:
        """Bytes moved into the fast tier, by fetches of every kind."""
        counts = self._counts()
        return sum(counts[kind] for kind in MOVES)

    def info(self) -> CacheInfo:
        """Counters since loading, or since `reset_counts`."""
        c, counts, source = self.cache, self._counts(), self.source
        used = counts["used"]
        return CacheInfo(
            hits=c.hits + used,
            misses=c.misses - used,
            evictions=c.evictions,
            capacity=c.capacity,
            resident=len(c.slot_of),
            bytes_moved=sum(counts[kind] for kind in MOVES),
            prompt_hits=c.prompt_hits,
            prompt_misses=c.prompt_misses,
            restores=c.restores,
            expert_nbytes=source.expert_nbytes,
            num_experts=sum(site.num_experts for site in source.sites),
            fast_bytes=self.fast_bytes,
            fast_bytes_peak=self.allocated_nbytes,
            ram_bytes=self.ram_nbytes,
            ram_hits=counts["ram_hits"],
            ram_bytes_moved=counts["ram"],
            prefetches=counts["fetched"],
            prefetch_hits=used,
            prefetch_wasted_bytes=counts["prefetch"] - counts["used_nbytes"],
            predictions=counts["named"],
            predictions_right=counts["right"],
            prefetch=self.guesses.reason,
            io=getattr(source.reader, "how", "memory"),
            decode=self.step.info() if self.step else "modules",
        )

    def _counts(self) -> Counter[str]:
        counts = self.transfer.counts() + self.guesses.counts
        counts.subtract(self._before)
        return counts

    def reset_counts(self) -> None:
        """Set all counters to zero; residents stay."""
        with self._lock:
            self.cache.reset_counts()
            self._before = self.transfer.counts() + self.guesses.counts

    def resident(self) -> set[tuple[int, int]]:
        """The experts in the fast tier now, as (layer, expert)."""
        with self._lock:
            return {(self.source.sites[site].layer, expert) for site, expert in self.cache.slot_of}

    def on_event(self, fn: Callable[[Event], None]) -> Callable[[], None]:
        """Call `fn(event)` for every event from now on; returns a function that ends it."""
        self._listeners.append(fn)
        return lambda: self._listeners.remove(fn)

    def on_routing(self, fn: Callable) -> Callable[[], None]:
        """Call `fn(token, is_prompt, site, experts, weights)` at every call of a layer; returns a function to end it.

        experts, weights: the router's choice, tensors (T, K), not to be changed. token: as in `Event`, alike for all
        layers of a pass.
        """
        self._routing.append(fn)
        return lambda: self._routing.remove(fn)

    def note_routing(self, site: int, experts: torch.Tensor, weights: torch.Tensor) -> None:
        """Pass the router's choice to the functions given to `on_routing`."""
        for fn in tuple(self._routing):
            fn(getattr(self._pass, "token", 0), self.in_prompt(), site, experts, weights)

    def trace(self) -> Recorder:
        """A recorder of routing: generate in `with model.mixoff.trace() as recorder:`, then use `recorder.trace`."""
        return Recorder(self)

    def close(self) -> None:
        """Free the memory and close the files. The model cannot run afterwards. Safe to call twice."""
        with self._lock:
            self._closed = True
            self.transfer.close()
            self.arena = self.scratch = None  # type: ignore[assignment]  # for good; nothing runs any more
            if self.mailbox and self.device:
                self.mailbox.close()
                self.device.give_back()
            self.source.close()

    def __enter__(self) -> Runtime:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"Runtime({'closed' if self._closed else self.info()})"

    def begin_pass(self, tokens: int, length: int) -> None:
        """Note that a pass over `tokens` tokens begins, `length` per sequence: more than one is a prompt."""
        with self._lock:
            self._tokens += tokens
            self._pass.prompt, self._pass.token, self._pass.tokens = length > 1, self._tokens, tokens

    def in_prompt(self) -> bool:
        """Whether this thread's forward pass reads a prompt."""
        return getattr(self._pass, "prompt", False)

    def expect(self, site: int, chosen: torch.Tensor) -> None:
        """Note a guess of the choice (T, K) at `site`.

        A guess on a device stays there until `look` reads it together with the choice of the layer before.
        """
        if chosen.device.type != "cpu":
            self._pass.guess = site, chosen
            return
        with self._lock:  # first choices first
            named, held = dict.fromkeys(chosen.t().flatten().tolist()), self.ranks.held[site]
            self.guesses.expect(site, [expert for expert in named if expert in held])

    def look(self, site: int, experts: torch.Tensor, weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The router's choice and weights (T, K) on the host, which waits for the device only here in a layer."""
        if self.mailbox is None:
            return experts, weights
        following, guess = getattr(self._pass, "guess", (None, None))
        self._pass.guess = None, None
        if following != site + 1:
            return tuple(self.mailbox.bring(experts, weights))
        experts, weights, guess = self.mailbox.bring(experts, weights, guess)
        self.expect(following, guess)
        return experts, weights

    def wants_guesses(self) -> bool:
        """Whether a guess would be used now."""
        return self.guesses.active and not self.in_prompt()

    def serve(self, site: int, experts: list[int], compute: Compute, weights: Sequence[float] | None = None) -> None:
        """Call `compute` with weights by expert until all `experts` are computed.

        The first call gets all residents, in router order; each further one an expert that has just arrived. With a
        listener every expert gets its own call, so that it is timed. The weights are views of slots, by part name, in
        the store's dtype, and valid during that call only.

        experts: distinct, in router order
        weights: the router's weight of each expert, for policies that use it
        """
        if self._lock._is_owned():  # type: ignore[attr-defined]  # typeshed lacks it
            raise RuntimeError("a listener cannot run the model it listens to: store the event, run the model later")
        with self._lock:
            if self._closed:
                raise RuntimeError("this model was closed: load it again to generate")
            Call(self, site, compute).run(experts, weights)

    def tell(self, key: Key, kind: str, nbytes: int, t0: float, t1: float) -> None:
        """Send an event to all listeners; times are those of `time.perf_counter`."""
        layer, token = self.source.sites[key[0]].layer, getattr(self._pass, "token", 0)
        phase = "prompt" if self.in_prompt() else "decode"
        event = Event(token, layer, key[1], kind, nbytes, t0 - self._start, t1 - self._start, phase)
        for fn in tuple(self._listeners):
            fn(event)


def _after_fork() -> None:
    for runtime in _alive:
        runtime.forked()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
