"""What a runtime reports: one event for each thing that happens to an expert, and counts of all of them."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import NamedTuple

from mixoff.units import format_nbytes

HIT, MISS, BYPASS, RESTORE = "hit", "miss", "bypass", "restore"


@dataclass(frozen=True)
class Event:
    """One thing that happened to one expert.

    Events make a time line: spans of `miss` and `prefetch` belong to the link, those of `compute` to the processor.

    Attributes
    ----------
    token: tokens that the model had processed, including this pass
    layer: number of the layer in the model
    expert: number of the expert in its layer
    kind: `hit`, `miss` (fetched, then computed), `evict`, `prefetch` (fetched without being asked for), or `compute`
    nbytes: bytes moved into the fast tier
    t0, t1: start and end of the fetch or computation, in seconds since the runtime was made
    phase: `prompt` or `decode`
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
    """Counters of the cache, named as in functools' `cache_info`.

    Attributes
    ----------
    hits: requests of decoding that found their expert in the fast tier
    misses: requests of decoding that did not
    evictions: experts that decoding evicted
    capacity: slots of the fast tier
    resident: slots that hold an expert
    bytes_moved: bytes into the fast tier for prompts, decoding, restores and guesses
    prompt_hits, prompt_misses: the same as hits and misses, for prompts
    restores: experts that lent their slot to a prompt and were fetched again
    expert_nbytes: bytes of the largest expert
    num_experts: experts of all layers
    fast_bytes: budget of the fast tier
    fast_bytes_peak: bytes allocated within the budget
    ram_bytes: bytes allocated for the RAM tier
    ram_hits: fetches from the RAM tier
    ram_bytes_moved: the part of bytes_moved that came from the RAM tier
    prefetches: experts fetched on a guess
    prefetch_hits: hits on such an expert, counted in hits as well
    prefetch_wasted_bytes: bytes moved for wrong guesses
    predictions: experts that the next router was expected to choose
    predictions_right: the part of predictions that it chose
    prefetch: whether prefetching is on, and why
    io: `direct`, `buffered` or `memory`: how experts are read
    decode: what computes single tokens: `modules` of transformers, or in which layers compiled programs do
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
    ram_bytes: int = 0
    ram_hits: int = 0
    ram_bytes_moved: int = 0
    prefetches: int = 0
    prefetch_hits: int = 0
    prefetch_wasted_bytes: int = 0
    predictions: int = 0
    predictions_right: int = 0
    prefetch: str = "off"
    io: str = "buffered"
    decode: str = "modules"

    @property
    def hit_rate(self) -> float | None:
        """Share of decoding's requests that found their expert in the fast tier; None before the first."""
        return self.hits / (self.hits + self.misses) if self.hits + self.misses else None

    @property
    def prefetch_precision(self) -> float | None:
        """Share of the experts fetched on a guess that were then asked for; None before the first guess."""
        return self.prefetch_hits / self.prefetches if self.prefetches else None

    @property
    def prefetch_recall(self) -> float | None:
        """Share of the experts missing in the cache that a guess had fetched; None if none was missing."""
        lacked = self.prefetch_hits + self.misses
        return self.prefetch_hits / lacked if lacked and self.prefetches else None

    def to_dict(self) -> dict:
        """All counters and shares under their names."""
        shares = ("hit_rate", "prefetch_precision", "prefetch_recall")
        return asdict(self) | {name: getattr(self, name) for name in shares}

    def __str__(self) -> str:
        rate = "no decoding yet" if self.hit_rate is None else f"hit rate {self.hit_rate:.3f}"
        guessed = f", {self.prefetch_hits} of {self.prefetches} guesses right" if self.prefetches else ""
        return (
            f"{self.hits} hits, {self.misses} misses ({rate}{guessed}), {self.evictions} evictions; "
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


Key = tuple[int, int]  # site, expert
PREFETCH = "prefetch"  # a fetch on a guess: those that were asked for are read before it


class Landing(NamedTuple):
    """Bytes that arrived in a slot: `nbytes` of them, between t0 and t1 (seconds of `time.perf_counter`)."""

    slot: int
    nbytes: int
    t0: float
    t1: float
