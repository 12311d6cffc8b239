"""The runtime: experts wait in the slow tier and are computed from the fast one, within a budget of bytes.

Letters: **T** tokens of a call, **K** experts a token, **D** model width, **S** slots.
transformers calls `experts_forward` in place of its own loop over experts. The arena of S slots is allocated once; a
slot is computed from only after its bytes arrived, so the output is that of the resident model, bit for bit, for any
budget.

Source of the idea: Eliseev and Mazur, arXiv 2312.17238, section 3. Built in notebooks/00.
Does not know file layouts.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import asdict, dataclass

import torch
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from mixoff import shapes, store
from mixoff.cache import BYPASS, HIT, RESTORE, ExpertCache, Grant
from mixoff.errors import BudgetError, MixoffError
from mixoff.experts import by_expert, expert_mlp
from mixoff.kernels import reference
from mixoff.quantize import QTensor
from mixoff.trace import Recorder
from mixoff.units import format_nbytes

SCOPES = ("layer", "global")


@dataclass(frozen=True)
class Event:
    """One thing that happened to one expert.

    token: number of tokens that the model had processed, those of this pass included.
    kind: `hit`, `miss` (fetched, then computed), `evict`, or `prefetch` (fetched without being asked for).
    nbytes: bytes moved from the slow tier. t0, t1: seconds since the runtime was made, start and end of the fetch.
    phase: `prompt` or `decode`.
    """

    token: int
    layer: int
    expert: int
    kind: str
    nbytes: int
    t0: float
    t1: float
    phase: str


@dataclass(frozen=True)
class CacheInfo:
    """What the cache did so far, in functools' words.

    hits, misses, evictions: requests of decoding; those of prompts stand apart. capacity, resident: slots, and how many
    hold an expert. bytes_moved: all bytes from the slow tier, for prompts, decoding and `restores` (experts that lent
    their slot to a prompt). fast_bytes: the budget; fast_bytes_peak: what was allocated within it.
    """

    hits: int
    misses: int
    evictions: int
    capacity: int
    resident: int
    bytes_moved: int
    prompt_hits: int
    prompt_misses: int
    restores: int
    expert_nbytes: int
    num_experts: int
    fast_bytes: int
    fast_bytes_peak: int

    @property
    def hit_rate(self) -> float | None:
        """Share of decoding's requests that found their expert in the fast tier; None before the first."""
        return self.hits / (self.hits + self.misses) if self.hits + self.misses else None

    def to_dict(self) -> dict:
        """All counters under their names, `hit_rate` included."""
        return asdict(self) | {"hit_rate": self.hit_rate}

    def __str__(self) -> str:
        rate = "no decoding yet" if self.hit_rate is None else f"hit rate {self.hit_rate:.3f}"
        return (
            f"{self.hits} hits, {self.misses} misses ({rate}), {self.evictions} evictions; "
            f"{self.resident} of {self.num_experts} experts resident in {self.capacity} slots; "
            f"{format_nbytes(self.bytes_moved)} moved; "
            f"fast tier {format_nbytes(self.fast_bytes_peak)} of {format_nbytes(self.fast_bytes)}"
        )

    def _repr_html_(self) -> str:
        rate = "-" if self.hit_rate is None else f"{self.hit_rate:.3f}"
        cells = {
            "hits": self.hits, "misses": self.misses, "hit rate": rate, "evictions": self.evictions,
            "slots": f"{self.capacity} of {self.num_experts} experts", "moved": format_nbytes(self.bytes_moved),
            "fast tier": f"{format_nbytes(self.fast_bytes_peak)} of {format_nbytes(self.fast_bytes)}",
        }  # fmt: skip
        head, row = ("".join(f"<{tag}>{x}</{tag}>" for x in xs) for tag, xs in (("th", cells), ("td", cells.values())))
        return f"<table><tr>{head}</tr><tr>{row}</tr></table>"


def plan_slots(sites: tuple[shapes.Site, ...], fast_bytes: int, scratch: int, scope: str) -> list[int]:
    """Slots of each pool within `fast_bytes`: one pool a layer, or a single one. Raises BudgetError below the minimum.

    Slots that do not divide evenly go to the first layers.
    """
    if scope not in SCOPES:
        raise MixoffError(f"unknown scope {scope!r}: choose one of {', '.join(SCOPES)}")
    slot_nbytes = max(site.expert_nbytes for site in sites)
    slots = (fast_bytes - scratch) // slot_nbytes
    least = len(sites) if scope == "layer" else 1
    if slots < least:
        need = least * slot_nbytes + scratch
        what = (
            f"{len(sites)} MoE layers need at least one slot each"
            if scope == "layer"
            else "at least one slot is needed"
        )
        raise BudgetError(
            f"{what}: fast_bytes is {fast_bytes:,} bytes ({format_nbytes(fast_bytes)}), "
            f"raise it to {need:,} bytes ({format_nbytes(need)}) or more"
        )
    if scope == "global":
        return [min(slots, sum(site.num_experts for site in sites))]
    return [min(slots // len(sites) + (i < slots % len(sites)), site.num_experts) for i, site in enumerate(sites)]


class Runtime:
    """Serves the experts of one model from an arena of slots. `load` makes it; `model.mixoff` is it.

    Safe to use from several threads: calls of MoE layers take turns. Usable as a context manager.
    """

    def __init__(self, source: store.Source, fast_bytes: int, policy: str, scope: str, compute: torch.dtype) -> None:
        scratch = reference.scratch_nbytes(source.sites, compute)
        pools = plan_slots(source.sites, fast_bytes, scratch, scope)
        self.source, self.scope, self.fast_bytes = source, scope, fast_bytes
        self.cache = ExpertCache(pools, policy)
        self.arena = store.slab(self.cache.capacity * source.expert_nbytes).view(self.cache.capacity, -1)  # (S, nbytes)
        quantized = source.scheme.experts is not None  # then torch makes the blocks, and the scratch is their bound
        self.scratch = store.slab(0 if quantized else scratch)
        self.allocated_nbytes = self.arena.numel() + scratch
        self.images = [memoryview(slot.numpy()) for slot in self.arena]
        self.bytes_moved = 0
        self._listeners: list[Callable[[Event], None]] = []
        self._routing: list[Callable] = []
        self._lock = threading.RLock()
        self._pass = threading.local()  # of each thread's forward pass: is it a prompt, which token does it end with
        self._tokens, self._start, self._closed = 0, time.perf_counter(), False

    @property
    def slots(self) -> int:
        """Slots in all, over all layers."""
        return self.cache.capacity

    def info(self) -> CacheInfo:
        """Counters since loading, or since `reset_counts`."""
        c = self.cache
        return CacheInfo(
            hits=c.hits,
            misses=c.misses,
            evictions=c.evictions,
            capacity=c.capacity,
            resident=len(c.slot_of),
            bytes_moved=self.bytes_moved,
            prompt_hits=c.prompt_hits,
            prompt_misses=c.prompt_misses,
            restores=c.restores,
            expert_nbytes=self.source.expert_nbytes,
            num_experts=sum(site.num_experts for site in self.source.sites),
            fast_bytes=self.fast_bytes,
            fast_bytes_peak=self.allocated_nbytes,
        )

    def reset_counts(self) -> None:
        """Start counting anew; residents stay where they are."""
        with self._lock:
            self.cache.reset_counts()
            self.bytes_moved = 0

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
            fn(getattr(self._pass, "token", 0), self._in_prompt(), site, experts, weights)

    def trace(self) -> Recorder:
        """Records routing: `with model.mixoff.trace() as recorder:` generate, then `recorder.trace` is the `Trace`."""
        return Recorder(self)

    def close(self) -> None:
        """Give back the arena and close the files. The model cannot run afterwards."""
        with self._lock:
            if not self._closed:
                self._closed = True
                self.images, self.arena, self.scratch = [], None, None
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

    def serve(self, site: int, experts: list[int], compute: Callable[[int, dict[str, torch.Tensor]], None]) -> None:
        """Call `compute(expert, weights)` once for each of `experts` (router order), residents first.

        `weights` are views of the slot, by part name, in the store's dtype, good during that call only.
        """
        with self._lock:
            if self._closed:
                raise RuntimeError("this model was closed: load it again to generate")
            pool, keys = 0 if self.scope == "global" else site, [(site, e) for e in experts]
            with closing(self.cache.access(pool, keys, self._in_prompt())) as grants:
                for grant in grants:
                    if grant.kind != HIT:
                        self._fetch(grant)
                    elif self._listeners:
                        self._tell(grant.key, "hit", 0, time.perf_counter())
                    if grant.kind != RESTORE:
                        compute(grant.key[1], self._weights(grant))

    def _in_prompt(self) -> bool:
        return getattr(self._pass, "prompt", False)

    def _fetch(self, grant: Grant) -> None:
        """Fill the grant's slot from the slow tier; on return the bytes are there."""
        t0 = time.perf_counter()
        if grant.evicted is not None and self._listeners:
            self._tell(grant.evicted, "evict", 0, t0)
        nbytes = self.source.reader.read_into(*grant.key, self.images[grant.slot])
        self.bytes_moved += nbytes
        if self._listeners:
            self._tell(grant.key, "prefetch" if grant.kind == RESTORE else "miss", nbytes, t0)
            if grant.kind == BYPASS:
                self._tell(grant.key, "evict", 0, time.perf_counter())

    def _tell(self, key: tuple[int, int], kind: str, nbytes: int, t0: float) -> None:
        layer, t1 = self.source.sites[key[0]].layer, time.perf_counter()
        token, phase = getattr(self._pass, "token", 0), "prompt" if self._in_prompt() else "decode"
        event = Event(token, layer, key[1], kind, nbytes, t0 - self._start, t1 - self._start, phase)
        for fn in tuple(self._listeners):
            fn(event)

    def _weights(self, grant: Grant) -> dict[str, torch.Tensor | QTensor]:
        image, parts = self.arena[grant.slot], self.source.sites[grant.key[0]].parts
        return {part.name: _view(image, part) for part in parts}


def _view(image: torch.Tensor, part: shapes.Part) -> torch.Tensor | QTensor:
    """A part of an expert's image (nbytes,), as the weight that it is, without a copy."""
    if part.form is not None:
        return QTensor.from_buffer(image, part.offset, part.shape, *part.form)
    return image[part.offset : part.offset + part.nbytes].view(shapes.torch_dtype(part.dtype)).view(part.shape)


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
    runtime.note_routing(site, top_k_index, top_k_weights)
    (T, K), D = top_k_index.shape, hidden_states.shape[-1]
    where = by_expert(top_k_index, self.num_experts)
    out = hidden_states.new_zeros(T * K, D)

    def compute(expert: int, weights: dict[str, torch.Tensor]) -> None:
        positions = where[expert]  # (R,) rows of this expert
        out[positions] = expert_mlp(self, hidden_states[positions // K], weights, runtime.scratch)  # (R, D)

    runtime.serve(site, list(where), compute)
    weighted = out * top_k_weights.reshape(-1, 1)  # (T * K, D)
    return weighted.view(T, K, D).sum(dim=1).to(hidden_states.dtype)  # (T, D)


ALL_EXPERTS_FUNCTIONS.register("mixoff", experts_forward)
