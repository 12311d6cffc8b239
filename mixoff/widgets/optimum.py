"""Bélády's rule as a policy of the cache: it is told the future, so only a replay can use it.

The simulator has the same rule in arrays; tests check that both count the same.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Iterator, Sequence

from mixoff.cache.events import Key
from mixoff.cache.policies import LRU


class Belady(LRU):
    """Evicts the expert whose next use is farthest away; of those that are never used again, the oldest.

    calls: keys of each call of decoding of this pool, in order
    """

    def __init__(self, calls: Sequence[Collection[Key]]) -> None:
        super().__init__()
        self._uses: dict[Key, deque[int]] = {}
        for at, keys in enumerate(calls):
            for key in keys:
                self._uses.setdefault(key, deque()).append(at)

    def begin(self, keys: Sequence[Key], scores: Sequence[float] | None = None) -> None:
        for key in keys:
            self._uses[key].popleft()

    def next_use(self, key: Key) -> float:
        """Number of the next call that asks for `key`; infinity if none does."""
        uses = self._uses.get(key)
        return uses[0] if uses else float("inf")

    def victim(self, keep: Collection[Key]) -> Key | None:
        return max((key for key in self.order if key not in keep), key=self.next_use, default=None)


def for_pools(pools: Sequence[Sequence[Collection[Key]]]) -> Callable[[], Belady]:
    """What `ExpertCache` calls once per pool, in order. pools: the calls of each."""
    futures: Iterator[Sequence[Collection[Key]]] = iter(pools)
    return lambda: Belady(next(futures))
