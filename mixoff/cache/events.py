"""What a runtime tells: an event for each thing that happens to an expert, and counts of all of them.

Does not know caches, tensors or files.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import NamedTuple

from mixoff.units import format_nbytes

HIT, MISS, BYPASS, RESTORE = "hit", "miss", "bypass", "restore"


@dataclass(frozen=True)
class Event:
    """One thing that happened to one expert.

    token: number of tokens that the model had processed, those of this pass included.
    kind: `hit`, `miss` (fetched, then computed), `evict`, `prefetch` (fetched without being asked for), or `compute`.
    nbytes: bytes moved into the fast tier. t0, t1: seconds since the runtime was made, start and end of the fetch or of
    the computation. phase: `prompt` or `decode`.
    Enough for a time line: spans of `miss` and `prefetch` are the link's, those of `compute` the processor's.
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
    hold an expert. bytes_moved: all bytes into the fast tier, for prompts, decoding, `restores` (experts that lent
    their slot to a prompt) and guesses; `ram_bytes_moved` of them came from the RAM tier, in `ram_hits` fetches.
    prefetches: experts fetched on a guess; prefetch_hits: hits that found their expert so (counted in hits as well);
    prefetch_wasted_bytes: moved for guesses that nobody asked for. predictions, predictions_right: experts that the
    next router was expected to choose, and those that it chose. prefetch, io: what is on, and why.
    fast_bytes: the budget; fast_bytes_peak: what was allocated within it; ram_bytes: what the RAM tier takes.
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

    @property
    def hit_rate(self) -> float | None:
        """Share of decoding's requests that found their expert in the fast tier; None before the first."""
        return self.hits / (self.hits + self.misses) if self.hits + self.misses else None

    @property
    def prefetch_precision(self) -> float | None:
        """Share of the experts fetched on a guess that were asked for; None before the first guess."""
        return self.prefetch_hits / self.prefetches if self.prefetches else None

    @property
    def prefetch_recall(self) -> float | None:
        """Share of the experts that the cache lacked which a guess had fetched; None where it lacked none."""
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
PREFETCH = "prefetch"  # a fetch that nobody asked for yet: what is asked for is read before it


class Landing(NamedTuple):
    """Bytes that arrived in a slot: `nbytes` of them, between t0 and t1 (seconds of `time.perf_counter`)."""

    slot: int
    nbytes: int
    t0: float
    t1: float
