"""The runtime: experts wait in the slow tier and are computed from the fast one, within a budget of bytes.

Letters: **T** tokens of a call, **K** experts a token, **E** experts, **D** model width.
transformers calls `experts_forward` in place of its own loop over experts. What a call lacks is on its way while what
it has is computed, and is computed as it lands. A slot is computed from only after its bytes arrived, and fetched into
only after it was computed from, so the output is that of the resident model, bit for bit, for any budget.

A call may end anywhere: at a pressed stop button, an exception from a listener, a failed read. Cache, arena, transfer
and guesses share what they know of a slot, and no order of their changes is safe at every point. So nothing is repaired
on the way out: a call notes that it has begun and that it has ended, and the next call that finds the first note
without the second begins with an empty fast tier (`Runtime.renew`). A stop costs the fetches of what was resident;
copies in RAM stay. The alternative, a `try` around each change, had left 4 to 9 % of the possible moments wrong.

Source of the idea: Eliseev and Mazur, arXiv 2312.17238, section 3. Built in notebooks/00.
Does not know file layouts.
"""

from __future__ import annotations

import functools
import os
import threading
import time
import warnings
import weakref
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Protocol

import torch
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from mixoff.cache.cache import ExpertCache, Grant
from mixoff.cache.events import BYPASS, HIT, RESTORE, CacheInfo, Event
from mixoff.cache.policies import Key, Policy
from mixoff.errors import BudgetError, MixoffError
from mixoff.experts import by_expert, expert_mlp, expert_mlps
from mixoff.kernels import reference
from mixoff.pages import out_of_memory, slab
from mixoff.planning.budget import least_slots, plan_slots, set_aside
from mixoff.prefetch import Guesses
from mixoff.quantize.scheme import Scheme
from mixoff.runtime_recorder import Recorder
from mixoff.shapes.sites import Site, slot_nbytes
from mixoff.store.readers import Reader
from mixoff.transfer.arena import Arena, Weight
from mixoff.transfer.streams import Device, open_device_transfer
from mixoff.transfer.tiers import open_transfer
from mixoff.transfer.transfer import Transfer
from mixoff.units import format_nbytes

SHRINK = 8  # one slot of so many is given up at a time when memory runs out
FETCH = ("expert", "layer")
MOVES = ("miss", "bypass", "restore", "prefetch")  # kinds of fetches
Compute = Callable[[dict[int, dict[str, Weight]]], None]
_alive: weakref.WeakSet[Runtime] = weakref.WeakSet()


class Source(Protocol):
    """Where experts come from: a model folder (`store.Source`), or a model in memory."""

    sites: tuple[Site, ...]
    scheme: Scheme
    reader: Reader

    @property
    def expert_nbytes(self) -> int:
        """Bytes of the largest expert."""

    def close(self) -> None:
        """Let go of files or memory."""


class Runtime:
    """Serves the experts of one model from an arena of slots. `load` makes it; `model.mixoff` is it.

    policy, scope, prefetch, exact, fetch: as for `load`. compute: dtype of the computation. ram_bytes: of the RAM tier,
    0 for none. top_k: K. device: None is the CPU, whose fast tier is a share of RAM. Safe to use from several threads:
    calls of MoE layers take turns. Usable as a context manager. Raises BudgetError.
    reroute: None, or a function `(site, top_k_index, top_k_weights) -> (top_k_index, top_k_weights)` with the last word
    on the router's choice (index E: no expert). Nothing else here can change what the model computes.
    """

    def __init__(
        self,
        source: Source,
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
    ) -> None:
        if fetch not in FETCH:
            raise MixoffError(f"unknown fetch {fetch!r}: choose one of {', '.join(FETCH)}")
        self.source, self.scope, self.fast_bytes = source, scope, fast_bytes
        self.exact, self.whole_layers = exact, fetch == "layer"
        self.reroute: Callable | None = None
        self._listeners: list[Callable[[Event], None]] = []
        self._routing: list[Callable] = []
        self._lock = threading.RLock()
        self.ended = True  # whether the last call did; set when one begins and ends, under the lock
        self._forked = False
        self._pass = threading.local()  # of each thread's forward pass: is it a prompt, which token does it end with
        self._tokens, self._start, self._closed = 0, time.perf_counter(), False
        self.device, self._policy, self._compute, self._prefetch = device, policy, compute, (prefetch, top_k)
        self.transfer: Transfer | None = None
        self._before: Counter[str] = Counter()  # counts that `reset_counts` put aside
        self.cache: ExpertCache | None = None
        self._fast_nbytes = fast_bytes  # of it what is used: less after `make_room`
        self._allocate(fast_bytes)
        self._empty()
        self._open_transfer(ram_bytes)
        _alive.add(self)

    def _allocate(self, fast_bytes: int) -> None:
        """The fast tier within `fast_bytes`, with fewer slots where the system has not so much memory.

        Raises BudgetError where it has none for the least number of slots.
        """
        quantized = self.source.scheme.experts is not None  # then torch makes the blocks, and scratch is their bound
        scratch = 0 if quantized else reference.scratch_nbytes(self.source.sites, self._compute)
        empty, refused = self.device.empty if self.device else slab, 0
        while True:
            capacities, spare, reserved = self._divide(fast_bytes)
            slots = sum(capacities) + spare
            try:
                self.scratch = empty(scratch)
                arena = Arena(slots, self.source.sites, self.device and empty)
                break
            except Exception as error:
                why = out_of_memory(error)
                if why is None:
                    raise
            fast_bytes, refused = self._fewer(slots, reserved, why), refused or slots
        self.allocated_nbytes, self._capacities, self.arena = arena.numel() + reserved, capacities, arena
        if refused:
            self._warn(refused, why)

    def _empty(self) -> None:
        """A cache that holds nothing, and goes on counting; and where in the arena each of its slots is."""
        cache = ExpertCache(self._capacities, self._policy)
        if self.cache is not None:
            cache.count_on(self.cache)
        self.cache, self.place = cache, list(range(cache.capacity))

    def _divide(self, fast_bytes: int) -> tuple[list[int], int, int]:
        """Slots of each pool, spare ones for guesses, and bytes beside them: scratch and the reader's buffers."""
        sites, size = self.source.sites, slot_nbytes(self.source.sites)
        reserved = reference.scratch_nbytes(sites, self._compute) + getattr(self.source.reader, "buffer_nbytes", 0)
        prefetch, top_k = self._prefetch
        spare, self._why = set_aside(
            prefetch,
            slots=(fast_bytes - reserved) // size,
            least=least_slots(sites, self.scope),
            experts=sum(site.num_experts for site in sites),
            wanted=top_k,
            direct=self.device is not None or getattr(self.source.reader, "direct", False),
            slot_nbytes=size,
        )
        return plan_slots(sites, fast_bytes - spare * size, reserved, self.scope), spare, reserved

    def _fewer(self, slots: int, reserved: int, why: str) -> int:
        """A budget of about an eighth fewer slots. Raises BudgetError where there are no fewer that run."""
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
            f"{format_nbytes(now * size)}; to have no more made, set fast_bytes={self.arena.numel()}, shorten the "
            "context, or use fewer bits",
            stacklevel=4,
        )

    def _open_transfer(self, ram_bytes: int) -> None:
        """What fills the slots, with a tier of copies in RAM, as large as the system allows; and guesses, which use it.

        Raises BudgetError where there is no memory for a single copy.
        """
        size = self.arena.slot_nbytes
        slots = min(ram_bytes // size, sum(site.num_experts for site in self.source.sites))
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
        if slots * size < ram_bytes - size and slots < sum(site.num_experts for site in self.source.sites):
            warnings.warn(f"the RAM tier takes {format_nbytes(self.ram_nbytes)}: there is no more memory", stacklevel=3)
        self.guesses = Guesses(range(self.slots, len(self.arena.slots)), self.transfer, self._prefetch[0], self._why)

    def _filler(self, ram_slots: int) -> tuple[Transfer, int]:
        """The transfer of this device with so many copies in RAM, and the bytes that it takes there."""
        nbytes, reader = [site.expert_nbytes for site in self.source.sites], self.source.reader
        if self.device is None:
            return open_transfer(reader, self.arena.images, nbytes, ram_slots), ram_slots * self.arena.slot_nbytes
        experts = sum(site.num_experts for site in self.source.sites)
        transfer = open_device_transfer(self.device, reader, self.arena.slots, nbytes, ram_slots, experts)
        return transfer, transfer.memory.numel()

    def make_room(self, why: str) -> None:
        """Memory ran out: about an eighth of the slots goes back to the system, and the cache begins again, empty.

        Copies in RAM and all counts stay. Raises BudgetError, with the figures, where no slot can be spared.
        """
        with self._lock:
            if self.arena is None:  # an earlier one was interrupted
                self.renew()
            slots, reserved = len(self.arena.slots), self.allocated_nbytes - self.arena.numel()
            self._fast_nbytes = self._fewer(slots, reserved, why)
            self.ended = False
            self.transfer.reseat(())
            self.arena = self.scratch = None
            self.renew()
            self._warn(slots, why)
            self._tokens -= getattr(self._pass, "tokens", 0)  # the pass that failed will be repeated

    def renew(self) -> None:
        """After a call that did not end: nothing is on its way, no expert is resident, counts and copies in RAM stay.

        Takes nothing for granted but the memory, and may itself be interrupted: then the next call does it again.
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
        self._empty()
        self.transfer.reseat(self.arena.slots if self.device else self.arena.images)
        self.guesses.reseat(range(self.slots, len(self.arena.slots)))
        self.ended = True

    def forked(self) -> None:
        """This process is the child of a fork: locks may be held by threads that stayed with the parent."""
        self._lock, self.ended, self._forked = threading.RLock(), False, True
        self.transfer.forked()

    @property
    def slots(self) -> int:
        """Slots in all, over all layers; those set aside for guesses are not counted."""
        return self.cache.capacity

    @property
    def bytes_moved(self) -> int:
        """Bytes that came into the fast tier, by fetches of every kind."""
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
        )

    def _counts(self) -> Counter[str]:
        counts = self.transfer.counts() + self.guesses.counts
        counts.subtract(self._before)
        return counts

    def reset_counts(self) -> None:
        """Start counting anew; residents stay where they are."""
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
        """Hand the router's choice to those who asked for it."""
        for fn in tuple(self._routing):
            fn(getattr(self._pass, "token", 0), self.in_prompt(), site, experts, weights)

    def trace(self) -> Recorder:
        """Records routing: `with model.mixoff.trace() as recorder:` generate, then `recorder.trace` is the `Trace`."""
        return Recorder(self)

    def close(self) -> None:
        """Give back the memory and close the files. The model cannot run afterwards. Once more does no harm."""
        with self._lock:
            self._closed = True
            self.transfer.close()
            self.arena, self.scratch = None, None
            self.source.close()

    def __enter__(self) -> Runtime:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def __repr__(self) -> str:
        state = "closed" if self._closed else str(self.info())
        return f"Runtime({state})"

    def begin_pass(self, tokens: int, length: int) -> None:
        """Note that a pass over `tokens` tokens begins, `length` of each sequence: more than one is a prompt."""
        with self._lock:
            self._tokens += tokens
            self._pass.prompt, self._pass.token, self._pass.tokens = length > 1, self._tokens, tokens

    def in_prompt(self) -> bool:
        """Whether this thread's forward pass reads a prompt."""
        return getattr(self._pass, "prompt", False)

    def expect(self, site: int, chosen: torch.Tensor) -> None:
        """The router of `site` will make this choice (T, K), or so it seems.

        What a device computed stays there until `look` reads it with the choice of the layer before.
        """
        if chosen.device.type != "cpu":
            self._pass.guess = site, chosen
            return
        with self._lock:  # first choices first
            self.guesses.expect(site, list(dict.fromkeys(chosen.t().flatten().tolist())))

    def look(self, site: int, experts: torch.Tensor, weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The router's choice and weights (T, K) on the host: the one time in a layer that it waits for a device."""
        if experts.device.type == "cpu":
            return experts, weights
        following, guess = getattr(self._pass, "guess", (None, None))
        self._pass.guess = None, None
        if following != site + 1:
            return tuple(to_host(experts, weights))
        experts, weights, guess = to_host(experts, weights, guess)
        self.expect(following, guess)
        return experts, weights

    def wants_guesses(self) -> bool:
        """Whether `expect` would lead to anything now."""
        return self.guesses.active and not self.in_prompt()

    def serve(self, site: int, experts: list[int], compute: Compute, weights: Sequence[float] | None = None) -> None:
        """Call `compute(found)` with weights by expert until each of `experts` was among them: first with all that are
        here, in router order, then with each as it lands. Where somebody listens, each is alone, so that it is timed.

        experts: distinct, in router order; weights: what the router gave each of them, for policies that care. What
        `compute` gets are views of slots, by part name, in the store's dtype, good during that call only.
        """
        if self._lock._is_owned():
            raise RuntimeError("a listener cannot run the model that it listens to: note the event, and run it later")
        with self._lock:
            if self._closed:
                raise RuntimeError("this model was closed: load it again to generate")
            _Call(self, site, compute).run(experts, weights)

    def tell(self, key: Key, kind: str, nbytes: int, t0: float, t1: float) -> None:
        """An event for those who listen; times of `time.perf_counter`."""
        layer, token = self.source.sites[key[0]].layer, getattr(self._pass, "token", 0)
        phase = "prompt" if self.in_prompt() else "decode"
        event = Event(token, layer, key[1], kind, nbytes, t0 - self._start, t1 - self._start, phase)
        for fn in tuple(self._listeners):
            fn(event)


class _Call:
    """One call of one MoE layer: which grants wait in which slot of the arena until they are computed."""

    def __init__(self, runtime: Runtime, site: int, compute: Compute) -> None:
        self.runtime, self.site, self.compute = runtime, site, compute
        self.transfer, self.guesses, self.listened = runtime.transfer, runtime.guesses, bool(runtime._listeners)
        self.ready: dict[int, Grant] = {}  # their bytes are there
        self.coming: dict[int, Grant] = {}  # their bytes are on their way
        self.guessed: set[int] = set()  # slots that a guess began to fill

    def run(self, experts: list[int], weights: Sequence[float] | None) -> None:
        """Serve `experts`, from a fast tier that is as the last call left it if that ended, else empty."""
        runtime = self.runtime
        if not runtime.ended:
            runtime.renew()
        runtime.ended = False
        self.transfer.enter()
        self.guesses.judge(self.site, experts)
        prompt, pool = runtime.in_prompt(), 0 if runtime.scope == "global" else self.site
        keys = [(self.site, expert) for expert in experts]
        if runtime.whole_layers:
            others = set(range(runtime.source.sites[self.site].num_experts)).difference(experts)
            keys, weights = [*keys, *((self.site, expert) for expert in others)], None
        self.serve(runtime.cache.access(pool, keys, prompt, weights), prompt)
        runtime.ended = True

    def serve(self, grants: Iterable[Grant], prompt: bool) -> None:
        """Have everything fetched that is not here, compute what is, then the rest as it lands."""
        if prompt:  # it asks for nearly everything anyhow
            self.drop_guesses()
        for grant in grants:
            self.begin(grant)
        self.drop_guesses()
        if not prompt:
            self.guesses.fetch(self.site + 1, self.runtime.cache.slot_of.__contains__)
        ready, self.ready = self.ready, {}
        for found in [{slot: grant} for slot, grant in ready.items()] if self.listened else [ready]:
            self.finish(found)
        while self.coming:
            self.land(self.coming)

    def begin(self, grant: Grant) -> None:
        """Find the grant's slot in the arena, and have it filled unless it holds the expert already."""
        if grant.kind == HIT:
            self.ready[self.runtime.place[grant.slot]] = grant
            return
        slot = self.vacate(grant)
        if self.listened and grant.evicted is not None:
            self.tell(grant.evicted, "evict")
        guessed = self.guesses.take(grant.key, instead=slot)
        if guessed is None:
            self.transfer.fetch(grant.key, slot, grant.kind)
        else:
            slot = self.runtime.place[grant.slot] = guessed
            self.guessed.add(slot)
        self.coming[slot] = grant

    def vacate(self, grant: Grant) -> int:
        """The slot of the arena for a grant. Who waits in it is computed first; who only passes by keeps it, if a spare
        one can take its place, so that a prompt reads one expert while it computes another."""
        place = self.runtime.place
        while (slot := place[grant.slot]) in self.ready or slot in self.coming:
            passing = slot in self.coming and self.coming[slot].kind == BYPASS
            spare = self.guesses.lend(slot, self.coming) if passing else None
            if spare is not None:
                place[grant.slot] = spare
            elif slot in self.ready:
                self.finish({slot: self.ready.pop(slot)})
            else:
                self.land(self.coming if passing else [slot])
        return slot

    def drop_guesses(self) -> None:
        """This layer's fetches are under way, so guesses that are left proved wrong."""
        for key, landing in self.guesses.drop():
            if self.listened:
                self.tell(key, "prefetch", landing.nbytes, landing.t0, landing.t1)
                self.tell(key, "evict")

    def land(self, slots: Collection[int]) -> None:
        """Sleep until the bytes of one of `slots` are there, and compute it."""
        slot, nbytes, t0, t1 = self.transfer.wait(slots)
        grant = self.coming.pop(slot)
        if slot in self.guessed:
            self.guesses.counts["used_nbytes"] += nbytes
        if self.listened:
            kind = "prefetch" if grant.kind == RESTORE or slot in self.guessed else "miss"
            self.tell(grant.key, kind, nbytes, t0, t1)
        self.finish({slot: grant})

    def finish(self, found: dict[int, Grant]) -> None:
        """Compute from slots whose bytes are there, and let go of them; who was restored is not computed."""
        for slot, grant in found.items():
            if self.listened and (grant.kind == HIT or slot in self.guessed):
                self.tell(grant.key, "hit")
            self.guessed.discard(slot)
        found = {slot: grant for slot, grant in found.items() if grant.kind != RESTORE}
        if not found:
            return
        t0, weights = time.perf_counter(), self.runtime.arena.weights
        self.compute({grant.key[1]: weights(slot, grant.key[0]) for slot, grant in found.items()})
        for slot, grant in found.items():
            self.transfer.release(slot)
            if self.listened:
                self.tell(grant.key, "compute", 0, t0, time.perf_counter())
                if grant.kind == BYPASS:
                    self.tell(grant.key, "evict")

    def tell(self, key: Key, kind: str, nbytes: int = 0, t0: float | None = None, t1: float | None = None) -> None:
        now = time.perf_counter()
        self.runtime.tell(key, kind, nbytes, now if t0 is None else t0, now if t1 is None else t1)


class _Untrainable(torch.autograd.Function):
    """Lets a forward pass through in any mode, and says in words that no gradient comes back.

    The backbone is not frozen instead: for a weight that requires no gradient ATen takes another path to the product,
    with other last bits than plain transformers has.
    """

    @staticmethod
    def forward(ctx: object, out: torch.Tensor, hidden_states: torch.Tensor) -> torch.Tensor:
        return out.view_as(out)

    @staticmethod
    def backward(ctx: object, grad: torch.Tensor) -> None:
        raise RuntimeError("offloaded experts can run but not train: load the model with transformers to train it")


@torch.compiler.disable
def experts_forward(
    self: torch.nn.Module, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """The experts backend of transformers: hidden_states (T, D), choice and weights (T, K) -> (T, D).

    All rows of an expert are one product, and each row's place and sum over K are those of transformers' `grouped_mm`.
    """
    if not torch.is_grad_enabled():
        return _served(self, hidden_states, top_k_index, top_k_weights)
    with torch.no_grad():
        out = _served(self, hidden_states, top_k_index, top_k_weights)
    return _Untrainable.apply(out, hidden_states) if hidden_states.requires_grad else out


def _served(
    self: torch.nn.Module, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    runtime, site = self._mixoff
    if runtime.reroute is not None:
        top_k_index, top_k_weights = runtime.reroute(site, top_k_index, top_k_weights)
    chosen, given = runtime.look(site, top_k_index, top_k_weights)
    runtime.note_routing(site, chosen, given)
    alone = _of_one_token(chosen, given, self.num_experts)
    if alone:
        out = _one_row(self, hidden_states, alone)
    else:
        out = _rows(self, hidden_states, by_expert(chosen, self.num_experts), given)
    weighted = out.view(*top_k_index.shape, -1) * top_k_weights.unsqueeze(-1)  # (T, K, D)
    return weighted.sum(dim=1).to(hidden_states.dtype)  # (T, D)


def _of_one_token(top_k_index: torch.Tensor, top_k_weights: torch.Tensor, num_experts: int) -> dict[int, float] | None:
    """The choice (1, K) of one token and what it gave each expert, nothing for what is not a number; None for several
    tokens, and where it names an expert twice or none."""
    if len(top_k_index) != 1:
        return None
    (experts,), (given,) = top_k_index.tolist(), top_k_weights.tolist()
    weights = {expert: w if w == w else 0.0 for expert, w in zip(experts, given, strict=True)}
    return weights if len(weights) == len(experts) and max(experts) < num_experts else None


def _one_row(self: torch.nn.Module, x: torch.Tensor, weights: dict[int, float]) -> torch.Tensor:
    """One token x (1, D) through each of its experts -> (K, 1, D), in their order; what the router gave them."""
    (runtime, site), experts = self._mixoff, list(weights)
    parts, order = [], []

    def place(expert: int) -> tuple[int, int]:
        return sum(other < expert for other in experts), len(experts)

    def compute(found: dict[int, dict[str, Weight]]) -> None:
        mine = {expert: found[expert] for expert in found if expert in experts}  # others where layers are fetched whole
        if mine:
            parts.append(expert_mlps(self, x, mine, runtime.scratch, runtime.exact, place))
            order.extend(mine)

    runtime.serve(site, experts, compute, None if runtime.in_prompt() else list(weights.values()))
    out = parts[0] if len(parts) == 1 else torch.cat(parts)
    if order != experts:  # row by row, since for an index of its own a host would wait for its device
        rows = dict(zip(order, out.unbind(), strict=True))
        out = torch.stack([rows[expert] for expert in experts])
    return out


def _rows(
    self: torch.nn.Module, hidden_states: torch.Tensor, where: dict[int, torch.Tensor], given: torch.Tensor
) -> torch.Tensor:
    """Rows of hidden_states (T, D) through their experts -> (T * K, D), zeros where there is none.

    where: the positions (R,) of each expert's rows in the router's choice, flattened; given: its weights (T, K).
    """
    runtime, site = self._mixoff
    K, weights = given.shape[1], None if runtime.in_prompt() else _given(where, given)
    out, where = hidden_states.new_zeros(given.numel(), hidden_states.shape[1]), _rows_on(hidden_states.device, where)

    def compute(found: dict[int, dict[str, Weight]]) -> None:
        for expert in found:
            if (rows := where.get(expert)) is not None:  # of this expert, (R,); none where layers are fetched whole
                at = functools.partial(_place, where, len(out), expert)
                mine = hidden_states[rows // K]  # (R, D)
                out[rows] = expert_mlp(self, mine, found[expert], runtime.scratch, runtime.exact, at)

    runtime.serve(site, list(where), compute, weights)
    return out


def _place(where: dict[int, torch.Tensor], rows: int, expert: int) -> tuple[int, int]:
    """How many of a call's rows belong to experts of a lower index, and how many `rows` it has."""
    return sum(len(r) for other, r in where.items() if other < expert), rows


def to_host(*tensors: torch.Tensor) -> list[torch.Tensor]:
    """Small tensors of a device, integers and floats, by one copy: as int64 and fp32."""
    raw = [t.float().view(torch.int32) if t.is_floating_point() else t.int() for t in tensors]
    host = torch.cat([t.flatten() for t in raw]).cpu().split([t.numel() for t in tensors])
    values = [r.view(torch.float32) if t.is_floating_point() else r.long() for r, t in zip(host, tensors, strict=True)]
    return [v.view(t.shape) for v, t in zip(values, tensors, strict=True)]


def _rows_on(device: torch.device, where: dict[int, torch.Tensor]) -> dict[int, torch.Tensor]:
    """Positions of rows on the device that computes, by one copy for which the host does not wait."""
    if device.type == "cpu" or not where:
        return where
    counts = [len(rows) for rows in where.values()]
    rows = torch.cat(list(where.values())).to(device, non_blocking=True).split(counts)
    return dict(zip(where, rows, strict=True))


def _given(where: dict[int, torch.Tensor], top_k_weights: torch.Tensor) -> list[float]:
    """The router's weights for each expert, summed over the tokens; what is not a number counts nothing."""
    given = top_k_weights.flatten().nan_to_num()
    return [float(given[rows].sum()) for rows in where.values()]


def _after_fork() -> None:
    for runtime in _alive:
        runtime.forked()


ALL_EXPERTS_FUNCTIONS.register("mixoff", experts_forward)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
