"""The order in which residents are evicted: one small class per policy.

A policy sees the keys of one pool come, be used and go, and names the next victim. All of them work online, from the
requests so far, so the runtime offers them; `mixoff.simulate` adds two that need the future (`belady`) or the whole
trace (`static`). Ties go to the key that was used longest ago.

Keys are `(site, expert)`. Tested against one contract for all, and against the simulator, which has the same rules in
arrays.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Collection, Sequence
from typing import Protocol

import numpy as np

from mixoff.cache.events import Key

MASK = 2**31 - 1  # numbers of `scramble` stay below this, so their products fit 64 bits in compiled code


class Policy(Protocol):
    """The order in which residents of one pool are evicted."""

    def begin(self, keys: Sequence[Key], scores: Sequence[float] | None = None) -> None:
        """A call of decoding asks for `keys`, in router order; called before its victims are chosen.

        scores: the router's score of each expert of the layer, (E,), from 0 to 1 (certain to be chosen), if known
        """

    def insert(self, key: Key) -> None:
        """Note that `key` is resident from now on."""

    def touch(self, key: Key, weight: float = 0.0) -> None:
        """Note a use by decoding, in router order. weight: the router's, summed over a batch."""

    def remove(self, key: Key) -> None:
        """Note that `key`, a resident, is evicted."""

    def victim(self, keep: Collection[Key]) -> Key | None:
        """The resident to evict next among those not in `keep`, or None if all are kept."""


class LRU:
    """Least recently used: keys in the order of their last use, oldest first."""

    def __init__(self) -> None:
        self.order: OrderedDict[Key, None] = OrderedDict()

    def begin(self, keys: Sequence[Key], scores: Sequence[float] | None = None) -> None:
        pass

    def insert(self, key: Key) -> None:
        self.order[key] = None

    def touch(self, key: Key, weight: float = 0.0) -> None:
        self.order.move_to_end(key)

    def remove(self, key: Key) -> None:
        del self.order[key]

    def victim(self, keep: Collection[Key]) -> Key | None:
        return next((key for key in self.order if key not in keep), None)


class FIFO(LRU):
    """First in, first out: being used changes nothing. More slots may hit less often (Belady's anomaly)."""

    def touch(self, key: Key, weight: float = 0.0) -> None:
        pass


class _Scored(LRU):
    """The resident with the lowest score is evicted; of equal scores, the one that was used longest ago."""

    def score(self, key: Key) -> float:
        raise NotImplementedError

    def victim(self, keep: Collection[Key]) -> Key | None:
        return min((key for key in self.order if key not in keep), key=self.score, default=None)


class LFU(_Scored):
    """Least frequently used, counted since the expert was fetched."""

    def __init__(self) -> None:
        super().__init__()
        self.count: dict[Key, int] = {}

    def insert(self, key: Key) -> None:
        super().insert(key)
        self.count[key] = 0

    def touch(self, key: Key, weight: float = 0.0) -> None:
        super().touch(key, weight)
        self.count[key] += 1

    def remove(self, key: Key) -> None:
        super().remove(key)
        del self.count[key]

    def score(self, key: Key) -> float:
        return self.count[key]


class LFUDA(LFU):
    """LFU with dynamic aging: a new key starts at the score of the last victim, so old counts lose weight.

    Source: Arlitt et al., Evaluating content management techniques for Web proxy caches (2000).
    """

    def __init__(self) -> None:
        super().__init__()
        self.age = 0

    def insert(self, key: Key) -> None:
        super().insert(key)
        self.count[key] = self.age

    def remove(self, key: Key) -> None:
        self.age = max(self.age, self.count[key])
        super().remove(key)


class LFRU(LFU):
    """Frequency over recency: uses since the fetch divided by the time since the last one, in uses of the pool."""

    def __init__(self) -> None:
        super().__init__()
        self.clock = 0
        self.last: dict[Key, int] = {}

    def insert(self, key: Key) -> None:
        super().insert(key)
        self._tick(key)

    def touch(self, key: Key, weight: float = 0.0) -> None:
        super().touch(key, weight)
        self._tick(key)

    def _tick(self, key: Key) -> None:
        self.clock += 1
        self.last[key] = self.clock

    def score(self, key: Key) -> float:
        return self.count[key] / (self.clock - self.last[key] + 1)


def scramble(draw: int, serial: int) -> int:
    """A number in [0, 2**31) that looks random, the same on every machine and in compiled code.

    >>> [scramble(0, n) % 6 for n in range(8)]
    [1, 5, 4, 5, 4, 1, 4, 5]
    """
    x = (draw * 0x1E3779B1 + serial * 0x45EBCA6B + 0x3504F333) & MASK
    x = ((x ^ (x >> 15)) * 0x2C1B3C6D) & MASK
    x = ((x ^ (x >> 12)) * 0x297A2D39) & MASK
    return x ^ (x >> 15)


class Random(_Scored):
    """Any resident with equal chance, drawn the same way in every run."""

    def __init__(self) -> None:
        super().__init__()
        self.serial: dict[Key, int] = {}
        self.inserted = self.removed = 0

    def insert(self, key: Key) -> None:
        super().insert(key)
        self.inserted += 1
        self.serial[key] = self.inserted

    def remove(self, key: Key) -> None:
        super().remove(key)
        self.removed += 1

    def score(self, key: Key) -> float:
        return scramble(self.removed, self.serial[key])


class LeastStale(_Scored):
    """Evicts experts that this pass has not used, and among these first those of layers that it has passed.

    A pass visits layers in order. An expert of an earlier layer is not needed before the next pass, while one of a
    later layer may be needed soon; plain LRU evicts the latter first. With one pool per layer it equals LRU. After the
    idea of Hoang et al., SpecMD (arXiv 2602.03921); a new pass begins when layer numbers start again.
    """

    def __init__(self) -> None:
        super().__init__()
        self.used: dict[Key, int] = {}  # the pass of each key's last use
        self.passes = self.site = 0

    def insert(self, key: Key) -> None:
        super().insert(key)
        self.used[key] = self.passes

    def touch(self, key: Key, weight: float = 0.0) -> None:
        super().touch(key, weight)
        self._arrive(_site(key))
        self.used[key] = self.passes

    def remove(self, key: Key) -> None:
        super().remove(key)
        del self.used[key]

    def victim(self, keep: Collection[Key]) -> Key | None:
        for key in keep:
            self._arrive(_site(key))
        return super().victim(keep)

    def _arrive(self, site: int) -> None:
        self.passes += site < self.site
        self.site = site

    def score(self, key: Key) -> float:
        return 2 * (self.used[key] == self.passes) + (_site(key) > self.site)


HALF_LIVES = (1, 2, 4, 8, 16, 32, 64, 128, 256)  # calls of a layer
FADES = tuple(0.5 ** (1 / calls) for calls in HALF_LIVES)
TRUST = 0.99  # share of a forecast's error that is kept per call: about the last hundred calls count


class HalfLife(_Scored):
    """Evicts the expert that is least likely to be asked for, by the forecast that fits the text best. Our own policy.

    Nine forecasts of a layer's next call count how often each expert was asked for, where a call counts half after 1,
    2, 4, ... 256 calls of the layer. If the router's scores are known, nine more average these. Each forecast is judged
    by its squared error on every call (Brier score), and the best recent one decides. So the memory is short where
    routing changes fast, and long where a text has favourites, without training. It covers all experts of a layer, not
    only residents.
    """

    def __init__(self) -> None:
        super().__init__()
        self.layers: dict[int, _Forecasts] = {}

    def begin(self, keys: Sequence[Key], scores: Sequence[float] | None = None) -> None:
        if keys:
            layer = self.layers.setdefault(_site(keys[0]), _Forecasts())
            layer.see([_expert(key) for key in keys], scores)

    def score(self, key: Key) -> float:
        layer = self.layers.get(_site(key))
        return layer.chance(_expert(key)) if layer else 0.0


class _Forecasts:
    """Forecasts of one layer: rates (2, F, E), the share of calls that ask for each expert, by F ways of forgetting.

    The first half learns from requests, the second from the router's scores; without scores it is a copy, which never
    wins. Sums are in the order of the simulator's loops, so that both agree to the last bit.
    """

    def __init__(self) -> None:
        F = len(FADES)
        self.rates, self.error, self.best = np.zeros((2, F, 0)), np.zeros((2, F)), (0, 0)
        self.fades = np.array(FADES)[:, None]  # (F, 1)

    def see(self, experts: Sequence[int], scores: Sequence[float] | None) -> None:
        """Judge every forecast by this call's `experts`, then learn from them."""
        E = max([*experts, len(() if scores is None else scores) - 1]) + 1
        new = E - self.rates.shape[2]
        if new > 0:
            self.rates = np.pad(self.rates, ((0, 0), (0, 0), (0, new)))
        asked = np.zeros(self.rates.shape[2])
        asked[list(experts)] = 1.0
        liked = asked if scores is None else np.pad(scores, (0, len(asked) - len(scores)))
        self.error = self.error * TRUST + ((self.rates - asked) ** 2).cumsum(2)[:, :, -1]
        self.best = divmod(int(self.error.argmin()), len(FADES))
        self.rates = self.rates * self.fades + (1 - self.fades) * np.stack([asked, liked])[:, None]

    def chance(self, expert: int) -> float:
        """The best forecast's chance that the next call asks for `expert`."""
        half, way = self.best
        return float(self.rates[half, way, expert]) if expert < self.rates.shape[2] else 0.0


def _site(key: Key) -> int:
    return key[0] if isinstance(key, tuple) else 0


def _expert(key: Key) -> int:
    return key[1] if isinstance(key, tuple) else key  # a lone key is its number


POLICIES: dict[str, Callable[[], Policy]] = {
    "lru": LRU,
    "lfu": LFU,
    "lfuda": LFUDA,
    "fifo": FIFO,
    "random": Random,
    "lfru": LFRU,
    "least-stale": LeastStale,
    "half-life": HalfLife,
}
