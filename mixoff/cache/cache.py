"""Which expert is in which slot: keys and slots only.

A key is `(site, expert)`; a slot is a number below `capacity`, which the runtime maps to an arena slot.
`ExpertCache.access` is one call of one MoE layer: residents are granted first, then misses, each with the slot that the
caller fills. The simulator replays the same rules in arrays; tests check that both count the same.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass

from mixoff.cache.events import BYPASS, HIT, MISS, RESTORE, Key
from mixoff.cache.policies import LRU, POLICIES, Policy
from mixoff.errors import BudgetError, MixoffError

SCOPES = ("layer", "global")  # one pool per layer, or one for all
NONE = "none"  # the policy that keeps nothing between calls: the baseline of every cache


@dataclass(frozen=True)
class Grant:
    """One expert and its slot.

    Kinds: `hit` (the slot holds the expert), `miss` (fill the slot, the expert stays), `bypass` (fill the slot, the
    expert does not stay: a prompt streams past a full pool), `restore` (fill the slot with the expert that lent it).
    """

    key: Key
    slot: int
    kind: str
    evicted: Key | None = None


@dataclass
class Pool:
    """Slots that share a policy: one pool per layer, or one for all."""

    policy: Policy
    free: list[int]
    capacity: int

    def victim(self, *keeps: Collection[Key]) -> Key:
        """The resident to evict next, outside the first of `keeps` that does not hold all residents."""
        return next(key for keep in keeps if (key := self.policy.victim(keep)) is not None)


class ExpertCache:
    """`capacities[i]` slots for pool i, numbered consecutively over all pools.

    policy: name of a policy, or a class or function that makes a `policies.Policy`, called once per pool;
        `"none"` keeps nothing between calls

    >>> cache = ExpertCache([2])
    >>> [(g.key, g.kind, g.evicted) for key in "abac" for g in cache.access(0, [key])]
    [('a', 'miss', None), ('b', 'miss', None), ('a', 'hit', None), ('c', 'miss', 'b')]
    """

    def __init__(self, capacities: Sequence[int], policy: str | Callable[[], Policy] = "lru") -> None:
        make = _maker(policy)
        if min(capacities, default=0) < 1:
            raise BudgetError(f"every pool needs at least one slot, got {list(capacities)}")
        self.pools, start, self.forgets = [], 0, policy == NONE
        for n in capacities:
            self.pools.append(Pool(make(), list(range(start + n - 1, start - 1, -1)), n))
            start += n
        self.capacity = start
        self.slot_of: dict[Key, int] = {}
        self.reset_counts()

    def reset_counts(self) -> None:
        """Set all counters to zero; residents stay."""
        self.hits = self.misses = self.evictions = 0
        self.prompt_hits = self.prompt_misses = self.restores = 0

    def count_on(self, before: ExpertCache) -> None:
        """Continue the counts of the cache that this one replaces."""
        for name in ("hits", "misses", "evictions", "prompt_hits", "prompt_misses", "restores"):
            setattr(self, name, getattr(before, name))

    def access(
        self,
        pool: int,
        keys: Sequence[Key],
        prompt: bool = False,
        weights: Sequence[float] | None = None,
        scores: Sequence[float] | None = None,
    ) -> Iterator[Grant]:
        """Grant each of `keys` (distinct, in router order) a slot: residents first, then misses.

        The caller fills the slot of every grant that is not a hit. A grant is valid until a later one names its slot,
        so the caller may take several before filling them. If filling fails, it closes the iterator, which takes the
        newest grant back; a caller that had taken several starts again with a new cache. More keys than slots are
        served in waves: a key already granted may be evicted for one that was not.

        weights: the router's weight of each key, for policies that use it
        scores: the router's score of every expert of the layer, likewise
        """
        if self.forgets:
            self._forget(self.pools[pool])
        hits = [key for key in keys if key in self.slot_of]
        misses = [key for key in keys if key not in self.slot_of]
        for key in hits:
            yield Grant(key, self.slot_of[key], HIT)
        if prompt:
            self.prompt_hits += len(hits)
            self.prompt_misses += len(misses)
            yield from self._pass_through(self.pools[pool], misses)
        else:
            self.hits += len(hits)
            self.misses += len(misses)
            self.pools[pool].policy.begin(keys, scores)
            yield from self._admit(self.pools[pool], misses, keys)
            self._touch(self.pools[pool].policy, keys, weights)

    def _admit(self, pool: Pool, misses: Sequence[Key], keys: Sequence[Key]) -> Iterator[Grant]:
        """Decoding: each miss takes a free slot or a victim's; `_touch` then sets recency in router order."""
        for i, key in enumerate(misses):
            evicted = None
            if not pool.free:
                evicted = pool.victim(keys, misses[i:])  # if all belong to this call, one that was already granted
                self._evict(pool, evicted)
            yield from self._fill(pool, key, evicted)

    def _touch(self, policy: Policy, keys: Sequence[Key], weights: Sequence[float] | None) -> None:
        for key, weight in zip(keys, weights or [0.0] * len(keys), strict=True):
            if key in self.slot_of:
                policy.touch(key, weight)

    def _pass_through(self, pool: Pool, misses: Sequence[Key]) -> Iterator[Grant]:
        """A prompt fills free slots and touches nothing else; experts without a slot stream through a borrowed one.

        Otherwise a prompt would flush what decoding uses. With a free slot left, that slot is borrowed, so the passing
        experts come first: once `_fill` has granted it, it belongs to an expert that stays. Without one, `_borrow`
        takes the next victim's slot, and restores the victim at the end.
        """
        staying, passing = misses[: len(pool.free)], misses[len(pool.free) :]
        if passing and pool.free:
            for key in passing:
                yield Grant(key, pool.free[-1], BYPASS)
        for key in staying:
            yield from self._fill(pool, key, None)
        if passing and not staying:
            yield from self._borrow(pool, passing)

    def _borrow(self, pool: Pool, passing: Sequence[Key]) -> Iterator[Grant]:
        """Stream through the next victim's slot. Until it is restored the lender is not resident: `slot_of` is true."""
        lender = pool.victim(())
        slot, restored = self.slot_of.pop(lender), False
        try:
            for key in passing:
                yield Grant(key, slot, BYPASS)
            yield Grant(lender, slot, RESTORE)
            restored = True
        finally:
            if restored:
                self.slot_of[lender], self.restores = slot, self.restores + 1
            else:
                pool.policy.remove(lender)
                pool.free.append(slot)

    def _fill(self, pool: Pool, key: Key, evicted: Key | None) -> Iterator[Grant]:
        """Grant a free slot; the key becomes resident only when the caller asks for the next grant."""
        slot, filled = pool.free.pop(), False
        try:
            yield Grant(key, slot, MISS, evicted)
            filled = True
        finally:
            if filled:
                self.slot_of[key] = slot
                pool.policy.insert(key)
            else:
                pool.free.append(slot)

    def _evict(self, pool: Pool, key: Key) -> None:
        pool.policy.remove(key)
        pool.free.append(self.slot_of.pop(key))
        self.evictions += 1

    def _forget(self, pool: Pool) -> None:
        while (key := pool.policy.victim(keep=())) is not None:
            self._evict(pool, key)


def _maker(policy: str | Callable[[], Policy]) -> Callable[[], Policy]:
    if callable(policy):
        return policy
    if policy not in {*POLICIES, NONE}:
        raise MixoffError(f"unknown policy {policy!r}: choose one of {', '.join(sorted(POLICIES))}")
    return POLICIES.get(policy, LRU)
