"""The runtime: experts wait in the slow tier and are computed from the fast one, within a budget of bytes.

Letters: **T** tokens of a call, **K** experts a token, **E** experts, **D** model width.
transformers calls `experts_forward` in place of its own loop over experts. What a call lacks is on its way while what
it has is computed, and is computed as it lands. A slot is computed from only after its bytes arrived, and fetched into
only after it was computed from, so the output is that of the resident model, bit for bit, for any budget.

Source of the idea: Eliseev and Mazur, arXiv 2312.17238, section 3. Built in notebooks/00.
Does not know file layouts.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Sequence
from contextlib import closing
from typing import Protocol

import torch
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from mixoff import shapes, store
from mixoff.arena import Arena, Weight, least_slots, plan_slots, slot_nbytes
from mixoff.cache import BYPASS, HIT, RESTORE, ExpertCache, Grant
from mixoff.errors import MixoffError
from mixoff.events import CacheInfo, Event
from mixoff.experts import by_expert, expert_mlp
from mixoff.kernels import reference
from mixoff.policies import Key, Policy
from mixoff.prefetch import Guesses, set_aside
from mixoff.quantize import Scheme
from mixoff.readers import Reader
from mixoff.tiers import open_transfer
from mixoff.trace import Recorder

FETCH = ("expert", "layer")
MOVES = ("miss", "bypass", "restore", "prefetch")  # kinds of fetches
Compute = Callable[[int, dict[str, Weight]], None]


class Source(Protocol):
    """Where experts come from: a model folder (`store.Source`), or a model in memory."""

    sites: tuple[shapes.Site, ...]
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
    0 for none. top_k: K. Safe to use from several threads: calls of MoE layers take turns. Usable as a context manager.
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
    ) -> None:
        if fetch not in FETCH:
            raise MixoffError(f"unknown fetch {fetch!r}: choose one of {', '.join(FETCH)}")
        self.source, self.scope, self.fast_bytes = source, scope, fast_bytes
        self.exact, self.whole_layers = exact, fetch == "layer"
        self.reroute: Callable | None = None
        self._listeners: list[Callable[[Event], None]] = []
        self._routing: list[Callable] = []
        self._lock = threading.RLock()
        self._pass = threading.local()  # of each thread's forward pass: is it a prompt, which token does it end with
        self._tokens, self._start, self._closed = 0, time.perf_counter(), False
        self._allocate(policy, compute, ram_bytes, prefetch, top_k)
        self._before: Counter[str] = Counter()  # counts that `reset_counts` put aside

    def _allocate(
        self, policy: str | Callable[[], Policy], compute: torch.dtype, ram_bytes: int, prefetch: str, top_k: int
    ) -> None:
        """The fast tier within its budget: scratch, buffers of the reader, spare slots for guesses, the cache's."""
        source, sites, size = self.source, self.source.sites, slot_nbytes(self.source.sites)
        scratch = reference.scratch_nbytes(sites, compute)
        reserved = scratch + getattr(source.reader, "buffer_nbytes", 0)
        spare, reason = set_aside(
            prefetch,
            slots=(self.fast_bytes - reserved) // size,
            least=least_slots(sites, self.scope),
            experts=sum(site.num_experts for site in sites),
            wanted=top_k,
            direct=getattr(source.reader, "direct", False),
            slot_nbytes=size,
        )
        self.cache = ExpertCache(plan_slots(sites, self.fast_bytes - spare * size, reserved, self.scope), policy)
        self.arena = Arena(self.slots + spare, sites)
        quantized = source.scheme.experts is not None  # then torch makes the blocks, and the scratch is their bound
        self.scratch = store.slab(0 if quantized else scratch)
        self.allocated_nbytes = self.arena.numel() + reserved
        self.place = list(range(self.slots))  # where in the arena each of the cache's slots is now
        ram_slots = min(ram_bytes // size, sum(site.num_experts for site in sites))
        self.ram_nbytes = ram_slots * size
        nbytes = [site.expert_nbytes for site in sites]
        self.transfer = open_transfer(source.reader, self.arena.images, nbytes, ram_slots)
        self.guesses = Guesses(range(self.slots, self.slots + spare), self.transfer, prefetch, reason)

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
        """Give back the memory and close the files. The model cannot run afterwards."""
        with self._lock:
            if not self._closed:
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
            self._pass.prompt, self._pass.token = length > 1, self._tokens

    def in_prompt(self) -> bool:
        """Whether this thread's forward pass reads a prompt."""
        return getattr(self._pass, "prompt", False)

    def expect(self, site: int, experts: Sequence[int]) -> None:
        """`site` will ask for `experts`, best guess first, or so it seems."""
        with self._lock:
            self.guesses.expect(site, experts)

    def wants_guesses(self) -> bool:
        """Whether `expect` would lead to anything now."""
        return self.guesses.active and not self.in_prompt()

    def serve(self, site: int, experts: list[int], compute: Compute, weights: Sequence[float] | None = None) -> None:
        """Call `compute(expert, weights)` once for each of `experts`, in any order; those that are here come first.

        experts: distinct, in router order; weights: what the router gave each of them, for policies that care. What
        `compute` gets are views of a slot, by part name, in the store's dtype, good during that call only.
        """
        with self._lock:
            if self._closed:
                raise RuntimeError("this model was closed: load it again to generate")
            pool, prompt = 0 if self.scope == "global" else site, self.in_prompt()
            self.guesses.judge(site, experts)
            keys = [(site, expert) for expert in experts]
            if self.whole_layers:
                others = set(range(self.source.sites[site].num_experts)).difference(experts)
                keys, weights = [*keys, *((site, expert) for expert in others)], None
            call = _Call(self, pool, compute)
            with closing(self.cache.access(pool, keys, prompt, weights)) as grants:
                call.run(grants, None if prompt else site + 1)

    def tell(self, key: Key, kind: str, nbytes: int, t0: float, t1: float) -> None:
        """An event for those who listen; times of `time.perf_counter`."""
        layer, token = self.source.sites[key[0]].layer, getattr(self._pass, "token", 0)
        phase = "prompt" if self.in_prompt() else "decode"
        event = Event(token, layer, key[1], kind, nbytes, t0 - self._start, t1 - self._start, phase)
        for fn in tuple(self._listeners):
            fn(event)


class _Call:
    """One call of one MoE layer: which grants wait in which slot of the arena until they are computed."""

    def __init__(self, runtime: Runtime, pool: int, compute: Compute) -> None:
        self.runtime, self.pool, self.compute = runtime, pool, compute
        self.transfer, self.guesses, self.listened = runtime.transfer, runtime.guesses, bool(runtime._listeners)
        self.ready: dict[int, Grant] = {}  # their bytes are there
        self.coming: dict[int, Grant] = {}  # their bytes are on their way
        self.guessed: set[int] = set()  # slots that a guess began to fill

    def run(self, grants: Iterable[Grant], following: int | None) -> None:
        """Have everything fetched that is not here, compute what is, then the rest as it lands.

        following: the site whose experts are guessed meanwhile.
        """
        try:
            if following is None:  # a prompt asks for nearly everything anyhow
                self.drop_guesses()
            for grant in grants:
                self.begin(grant)
            self.drop_guesses()
            if following is not None:
                self.guesses.fetch(following, self.runtime.cache.slot_of.__contains__)
            while self.ready:
                self.finish(*self.ready.popitem())
            while self.coming:
                self.land(self.coming)
        except BaseException:
            self.give_up()
            raise

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
                self.finish(slot, self.ready.pop(slot))
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
        self.finish(slot, grant)

    def finish(self, slot: int, grant: Grant) -> None:
        """Compute from a slot whose bytes are there, and let go of it; who was restored is not computed."""
        if self.listened and (grant.kind == HIT or slot in self.guessed):
            self.tell(grant.key, "hit")
        self.guessed.discard(slot)
        if grant.kind == RESTORE:
            return
        t0 = time.perf_counter()
        self.compute(grant.key[1], self.runtime.arena.weights(slot, grant.key[0]))
        self.transfer.release(slot)
        if self.listened:
            self.tell(grant.key, "compute", 0, t0, time.perf_counter())
            if grant.kind == BYPASS:
                self.tell(grant.key, "evict")

    def give_up(self) -> None:
        """Something failed: what has not landed is in no slot, and will be fetched again when it is asked for."""
        for slot, grant in self.coming.items():
            self.transfer.cancel(slot)
            self.runtime.cache.give_up(self.pool, grant.key)

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
    with torch.no_grad():
        out = _served(self, hidden_states, top_k_index, top_k_weights)
    return _Untrainable.apply(out, hidden_states) if hidden_states.requires_grad else out


def _served(
    self: torch.nn.Module, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    runtime, site = self._mixoff
    if runtime.reroute is not None:
        top_k_index, top_k_weights = runtime.reroute(site, top_k_index, top_k_weights)
    runtime.note_routing(site, top_k_index, top_k_weights)
    (T, K), D = top_k_index.shape, hidden_states.shape[-1]
    where = _one_token(top_k_index, self.num_experts) if T == 1 else None
    where = by_expert(top_k_index, self.num_experts) if where is None else where
    out = hidden_states.new_zeros(T * K, D)

    def compute(expert: int, weights: dict[str, Weight]) -> None:
        if (rows := where.get(expert)) is not None:  # of this expert, (R,); none where whole layers are fetched
            mine = hidden_states if isinstance(rows, slice) else hidden_states[rows // K]  # (R, D)
            out[rows] = expert_mlp(self, mine, weights, runtime.scratch, runtime.exact)

    runtime.serve(site, list(where), compute, None if runtime.in_prompt() else _given(where, top_k_weights))
    weighted = out * top_k_weights.reshape(-1, 1)  # (T * K, D)
    return weighted.view(T, K, D).sum(dim=1).to(hidden_states.dtype)  # (T, D)


def _one_token(top_k_index: torch.Tensor, num_experts: int) -> dict[int, slice] | None:
    """Where each expert's row is when there is one token, (1, K); None where it names an expert twice."""
    chosen = top_k_index[0].tolist()
    where = {expert: slice(k, k + 1) for k, expert in enumerate(chosen) if expert < num_experts}
    return where if len(where) == sum(expert < num_experts for expert in chosen) else None


def _given(where: dict[int, slice | torch.Tensor], top_k_weights: torch.Tensor) -> list[float]:
    """The router's weights for each expert, summed over the tokens; what is not a number counts nothing."""
    if not all(isinstance(rows, slice) for rows in where.values()):
        given = top_k_weights.flatten().nan_to_num()
        return [float(given[rows].sum()) for rows in where.values()]
    given = top_k_weights[0].tolist()
    return [x if (x := given[rows.start]) == x else 0.0 for rows in where.values()]


ALL_EXPERTS_FUNCTIONS.register("mixoff", experts_forward)
