"""Synthetic routers: traces with the locality of a known model, for when no real trace is available.

Letters: **T** tokens, **L** MoE layers, **E** experts per layer, **K** experts per token.
A layer's logits are `weight * slow + fast`. `slow` models the topic: an AR(1) process that keeps `rho` of itself from
token to token. `fast` models the single token: white noise. Both have unit variance, and the K largest sums are chosen.
So two numbers give a whole curve of hit rates. A third, `peak`, makes few experts stand out at a time: Mixtral's last
layer repeats first choices more often than a Gaussian with the same overlap of pairs. Layers are independent, and in
the long run all experts are equally popular, unlike those of a real router.

Presets are fitted to reported figures, listed next to them.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from mixoff.errors import MixoffError
from mixoff.trace.trace import Trace

CHUNK = 256  # tokens drawn at once: bounds the memory of long traces
SAMPLE, WARM = 1600, 400  # tokens of the trace behind `hit_rate`, and how many of them only fill the cache
ENOUGH = 4096  # experts in that trace, over its layers: more would not change the third digit
RHO = 0.97  # by convention: figures of neighbouring tokens alone cannot separate weight and rho


@dataclass(frozen=True)
class Router:
    """Top-k of `weight * slow + fast`, for `layers` MoE layers.

    The first three below may be tuples of values from the first layer to the last, evenly spaced and interpolated.
    Raises MixoffError for an invalid router.

    weight: factor of the slow part; 0 is uniform routing
    rho: share of the slow part that is kept from token to token, at least 0 and below 1
    peak: 0 is Gaussian; above 0 the slow part is log-normal, the exponential of `peak` times the AR(1)
    num_experts, top_k, layers: E, K and L

    >>> router = Router(num_experts=8, top_k=2, weight=0.0, rho=0.9)
    >>> round(router.hit_rate(4), 1), router.trace(3, layers=2)
    (0.5, Trace(3 tokens, 2 layers, top-2 of 8 experts, 0 of a prompt))
    """

    num_experts: int
    top_k: int
    weight: float | tuple[float, ...]
    rho: float | tuple[float, ...]
    peak: float | tuple[float, ...] = 0.0
    layers: int = 32

    def __post_init__(self) -> None:
        if not 1 <= self.top_k <= self.num_experts or self.layers < 1:
            raise MixoffError(
                f"invalid router: {self.layers} layers, top_k={self.top_k}, num_experts={self.num_experts}; "
                "give 1 <= top_k <= num_experts and at least one layer"
            )
        if min(np.min(self.weight), np.min(self.rho), np.min(self.peak)) < 0 or np.max(self.rho) >= 1:
            raise MixoffError(
                f"weight is {self.weight}, rho {self.rho}, peak {self.peak}: give numbers from 0, and rho below 1"
            )

    def trace(self, tokens: int, layers: int | None = None, seed: int = 0, scores: bool = False) -> Trace:
        """A trace of `tokens` of decoding, one per pass, over `layers` (None: the router's own).

        Its weights are the softmax of the chosen logits, as in Mixtral; `scores` adds scores of all experts, K times
        the softmax and at most 1. A shorter trace is the beginning of a longer one.
        """
        L = self.layers if layers is None else layers
        if tokens < 0 or L < 1:
            raise MixoffError(f"cannot make a trace of {tokens} tokens and {L} layers: give at least 0 and 1")
        numbers = [spread(x, L)[:, None] for x in (self.weight, self.rho, self.peak)]  # (L, 1) each
        rng = np.random.default_rng(seed)
        slow = rng.standard_normal((L, self.num_experts), np.float32)
        chosen, weights, liked = [], [], []
        for start in range(0, max(tokens, 1), CHUNK):
            noise = rng.standard_normal((min(CHUNK, tokens - start), 2, L, self.num_experts), np.float32)
            logits, slow = _logits(noise, slow, *numbers)
            experts = _top(logits, self.top_k)
            chosen.append(experts)
            weights.append(_softmax(np.take_along_axis(logits, experts, 2)))
            liked.append(np.minimum(self.top_k * _softmax(logits), 1) if scores else None)
        known = {"weights": np.concatenate(weights), "scores": np.concatenate(liked) if scores else None}
        return Trace.from_array(np.concatenate(chosen), self.num_experts, **known)

    def hit_rate(self, slots: float) -> float:
        """LRU's hit rate with `slots` per layer, mean over layers, once the cache is warm; modelled from a trace.

        Fractions of a slot are interpolated, since reported curves use them.
        """
        return float(np.interp(slots, np.arange(self.num_experts + 1), self.hit_rates()))

    def hit_rates(self) -> np.ndarray:
        """`hit_rate` for 0 to E slots per layer: float (E + 1,)."""
        return _hit_rates(self)

    def repeat_rates(self) -> np.ndarray:
        """Mixtral's Table 5 of this router: float (L, 2), see `Trace.repeat_rates`."""
        return self.trace(SAMPLE).repeat_rates()

    @classmethod
    def fit(
        cls,
        num_experts: int,
        top_k: int,
        *,
        hit_rates: Mapping[float, float] | None = None,
        repeats: tuple[float, float] | None = None,
        layers: int = 32,
    ) -> Router:
        """The router closest to reported figures, by least squares over a grid that is refined; deterministic.

        hit_rates: LRU's, by slots per layer; fits weight and rho, with peak 0
        repeats: rates of the same first choice, and of the first or second, as in `repeat_rates`; fits weight and
            peak. Neighbouring tokens alone cannot separate rho from weight, so it is 0.97
        """
        if hit_rates is not None and repeats is None:
            start = cls(num_experts, top_k, 1.0, RHO, 0.0, max(256 // num_experts, 2))
            coarse = [replace(start, weight=w, rho=1 - 1 / t) for w, t in itertools.product(WEIGHTS, MEMORIES)]
            best = _closing_in(coarse, "rho", lambda router: router.rmse(hit_rates))
        elif repeats is not None and hit_rates is None:
            start = cls(num_experts, top_k, 1.0, RHO, 0.0, 16)
            coarse = [replace(start, weight=w, peak=p) for w, p in itertools.product(WEIGHTS, PEAKS)]
            best = _closing_in(coarse, "peak", lambda router: _distance(router.repeat_rates().mean(0), repeats))
        else:
            raise MixoffError("give either hit_rates or repeats to fit a router to")
        return replace(best, layers=layers)

    def rmse(self, hit_rates: Mapping[float, float]) -> float:
        """Root mean square error against reported LRU hit rates by slots per layer."""
        return _distance([self.hit_rate(slots) for slots in hit_rates], [*hit_rates.values()])


def spread(values: float | Sequence[float], layers: int) -> np.ndarray:
    """A number, or values evenly spaced over the model's depth, as one value per layer: float32 (layers,)."""
    given = np.atleast_1d(np.asarray(values, np.float32))
    at = np.linspace(0, len(given) - 1, layers)
    return np.interp(at, np.arange(len(given)), given).astype(np.float32)


def _logits(
    noise: np.ndarray, slow: np.ndarray, weight: np.ndarray, rho: np.ndarray, peak: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Logits (T, L, E) from noise (T, 2, L, E), and the slow part (L, E) that the next token starts from."""
    news, levels = np.sqrt(1 - rho**2), noise[:, 0]
    for t in range(len(noise)):
        slow = levels[t] = rho * slow + news * levels[t]
    return weight * _peaked(levels, peak) + noise[:, 1], slow


def _peaked(levels: np.ndarray, peak: np.ndarray) -> np.ndarray:
    """exp(peak * levels) (T, L, E), centred and scaled to unit variance; levels themselves where peak is 0."""
    p = np.where(peak > 0, peak, 1)
    raised = (np.exp(p * levels - p**2 / 2) - 1) / np.sqrt(np.expm1(p**2))
    return np.where(peak > 0, raised, levels)


def _top(logits: np.ndarray, k: int) -> np.ndarray:
    """The k largest of the last axis, largest first."""
    some = np.argpartition(-logits, k - 1, axis=2)[:, :, :k]
    order = np.argsort(-np.take_along_axis(logits, some, 2), axis=2, kind="stable")
    return np.take_along_axis(some, order, 2)


def _softmax(logits: np.ndarray) -> np.ndarray:
    shares = np.exp(logits - logits.max(2, keepdims=True))
    return shares / shares.sum(2, keepdims=True)


@functools.lru_cache(maxsize=256)
def _hit_rates(router: Router) -> np.ndarray:
    """Stack distances of all layers at once: an expert's depth is the number of experts used after it."""
    E, K, L = router.num_experts, router.top_k, min(router.layers, max(ENOUGH // router.num_experts, 2))
    experts = router.trace(SAMPLE, L).experts.astype(np.int64)  # (T, L, K)
    last = np.full((L, E), -1)  # when each expert was used last
    histogram = np.zeros(E + 1, np.int64)
    for t, chosen in enumerate(experts):
        when = np.take_along_axis(last, chosen, 1)  # (L, K)
        depth = np.where(when < 0, E, (last[:, None, :] > when[:, :, None]).sum(2))
        if t >= WARM:
            histogram += np.bincount(depth.ravel(), minlength=E + 1)
        np.put_along_axis(last, chosen, t * K + np.arange(K)[None], 1)
    return np.concatenate([[0], histogram[:-1].cumsum()]) / histogram.sum()


def _distance(rates: Sequence[float], reported: Sequence[float]) -> float:
    """Root mean square of the differences."""
    return float(np.sqrt(np.mean((np.asarray(rates) - reported) ** 2)))


WEIGHTS = (0.2, 0.4, 0.6, 0.8, 1.0, 1.25, 1.5, 2.0)
MEMORIES = (3, 10, 20, 30, 50, 100, 200)  # tokens, 1 / (1 - rho)
PEAKS = (0.0, 0.5, 1.0, 1.5, 2.0)


def _closing_in(coarse: Iterable[Router], second: str, misfit: Callable[[Router], float]) -> Router:
    """The best of a coarse grid, then of ever closer neighbours in weight and a second number, to three digits."""
    best = min(coarse, key=misfit)
    for step in (0.3, 0.15, 0.08, 0.04):
        places = itertools.product((-step, 0, step), (-step, 0, step))
        best = min([best, *(_moved(best, second, *place) for place in places)], key=misfit)
    weight, rho, peak = _numbers(best)
    return replace(best, weight=round(weight, 3), rho=round(rho, 4), peak=round(peak, 3))


def _moved(router: Router, second: str, by: float, by_second: float) -> Router:
    """A neighbour: weight, and peak or else the memory 1 / (1 - rho), increased by these shares."""
    weight, rho, peak = _numbers(router)
    if second == "peak":
        return replace(router, weight=weight * (1 + by), peak=peak * (1 + by_second))
    return replace(router, weight=weight * (1 + by), rho=1 - (1 - rho) / (1 + by_second))


def _numbers(router: Router) -> Iterator[float]:
    """Weight, rho and peak of a router whose layers are all alike, as those of `fit` are."""
    return (x for x in (router.weight, router.rho, router.peak) if not isinstance(x, tuple))


# --- presets ---------------------------------------------------------------------------------------------------------

# Mixtral of Experts (arXiv 2401.04088), Table 5, layers 0, 15 and 31, reported: the same first choice, to two digits,
# and the first or second choice, the mean of its seven data sets
MIXTRAL_REPEATS = {0: (0.14, 0.482), 15: (0.26, 0.639), 31: (0.23, 0.509)}
# LRU hit rate of decoding by the share of experts resident, reported (Apache-2.0 data in PyPI boyle)
SHARES = (0.05, 0.12, 0.25, 0.45)
QWEN3_235B_RATES = {0.05: 0.339, 0.12: 0.580, 0.25: 0.800, 0.45: 0.933}
GLM_5_2_RATES = {0.05: 0.303, 0.12: 0.501, 0.25: 0.667, 0.45: 0.822}

PRESETS = {
    "mixtral-8x7b": Router(8, 2, (0.239, 0.6, 1.25), RHO, (1.794, 0.573, 2.0), layers=32),
    "qwen3-235b": Router(128, 8, 1.5, 0.9752, layers=94),
    "glm-5.2": Router(256, 8, 1.04, 0.9592, layers=75),
    "uniform": Router(8, 2, 0.0, 0.0, layers=32),
}  # as `Router.fit` finds them; tests/trace/test_routers.py fits them again


def preset(name: str) -> Router:
    """The router fitted to a known model. Raises MixoffError for an unknown name.

    >>> preset("mixtral-8x7b").top_k
    2
    """
    if name not in PRESETS:
        raise MixoffError(f"unknown router {name!r}: choose one of {', '.join(PRESETS)}, or make a Router")
    return PRESETS[name]
