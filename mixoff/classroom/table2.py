"""Table 2 of Eliseev and Mazur (arXiv 2312.17238), calibrated: which physical parameters explain its cells."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from mixoff.errors import MixoffError
from mixoff.planning.steps import Step

# tokens/s, reported: batch 1, experts in 2 bits, attention in 4
MODES = ("full algorithm", "without pre-loading", "without LRU cache and pre-loading", "naive (accelerate)")
TABLE_2 = {
    "A100": (3.061, 2.918, 2.265, 1.392),
    "RTX 3080 Mobile": (2.655, 2.227, 1.758, 1.059),
    "RTX 3060": (2.278, 2.051, 1.547, 0.919),
    "T4": (2.092, 1.567, 1.168, 0.661),
}
SLOTS = {"A100": 4, "RTX 3080 Mobile": 4, "RTX 3060": 2, "T4": 4}  # experts per layer in their cache
ANCHOR = {"A100": 25e9}  # reported for PCIe 4.0 x16 (hardware.BAM): without one known link, bytes and speeds only scale
LAYERS, TOP_K, EXPERTS = 32, 2, 8
PAPER_EXPERT_NBYTES = 66_406_180  # in their published checkpoint


@dataclass(frozen=True)
class Calibration:
    """Physical parameters of the paper's runs.

    compute_ms: computation per token, by chip.
    link_GBps: bandwidth of the link, by chip.
    host_ms: work of the host per token, which hides no copy.
    hit_rate: share of hits, by slots per layer.
    recall: share of misses that their prefetch guesses.
    naive_share: share of all experts' bytes that the naive run moves per token.
    """

    compute_ms: dict[str, float]
    link_GBps: dict[str, float]
    host_ms: float
    hit_rate: dict[int, float]
    recall: float
    naive_share: float

    @property
    def free(self) -> int:
        """Number of fitted parameters."""
        return len(self.compute_ms) + len(self.link_GBps) - len(ANCHOR) + 1 + len(self.hit_rate) + 2

    def step(self, chip: str, mode: str) -> Step:
        """Their engine on a chip, where only the prefetch overlaps with computation."""
        cached = mode in MODES[:2]
        return Step(
            layers=LAYERS,
            top_k=TOP_K,
            host_s=self.host_ms / LAYERS / 1e3,
            attention_s=0.0,
            expert_s=self.compute_ms[chip] / LAYERS / TOP_K / 1e3,
            link_s=PAPER_EXPERT_NBYTES / self.link_GBps[chip] / 1e9,
            hit_rate=self.hit_rate[SLOTS[chip]] if cached else 0.0,
            recall=self.recall if mode == MODES[0] else None,
            overlap=False,
        )

    def tokens_per_s(self, chip: str, mode: str) -> float:
        """A cell of the table, modelled: the mean over the number of misses, in closed form."""
        step = self.step(chip, mode)
        if mode == MODES[3]:
            moved = self.naive_share * LAYERS * EXPERTS * step.link_s
            return 1 / (LAYERS * (step.host_s + TOP_K * step.expert_s) + moved)
        return 1 / mean_seconds(step)


def mean_seconds(step: Step) -> float:
    """The mean of `Step.seconds`, for an engine where only prefetches overlap with computation."""
    if step.overlap or step.attention_s or step.disk_share:
        raise MixoffError("the closed form only holds without overlap, attention time and disk reads")
    chances = [
        math.comb(step.top_k, m) * (1 - step.hit_rate) ** m * step.hit_rate ** (step.top_k - m)
        for m in range(step.top_k + 1)
    ]
    computing, misses = step.top_k * step.expert_s, step.top_k * (1 - step.hit_rate)
    total = step.layers * (step.host_s + computing)
    if step.recall is None:
        return total + step.layers * misses * step.link_s
    exposed = sum(p * max(0.0, m * step.link_s - computing) for m, p in enumerate(chances))
    later = exposed + (1 - step.recall) * misses * step.link_s
    return total + misses * step.link_s + (step.layers - 1) * later  # nothing is guessed before the first layer


def calibrate(leave_out: tuple[str, str] | None = None) -> Calibration:
    """Fit the parameters to the logarithms of Table 2; the result is deterministic.

    First least squares, then the sum of fourth powers, which weighs the largest errors most.

    leave_out: a cell (chip, mode) to leave out of the fit.
    """
    cells = [(chip, mode) for chip in TABLE_2 for mode in MODES if (chip, mode) != leave_out]
    reported = np.log([TABLE_2[chip][MODES.index(mode)] for chip, mode in cells])

    def misfit(x: np.ndarray) -> np.ndarray:
        calibration = _parameters(x)
        return np.log([calibration.tokens_per_s(*cell) for cell in cells]) - reported

    x = least_squares(misfit, _START)
    return _parameters(least_squares(lambda x: misfit(x) * np.abs(misfit(x)) / TYPICAL, x))


TYPICAL = 0.02  # typical error of a cell; it only scales the fourth powers against the damping
CHIPS = list(TABLE_2)
FREE_LINKS = [chip for chip in CHIPS if chip not in ANCHOR]
# logarithms of compute_ms by chip, free links, host_ms, naive_share; log-odds of recall, the hit rate at 4 slots, and
# the hit rate at 2 as a share of that: fewer slots never hit more often
_START = np.array([*np.log([25, 100, 90, 210]), *np.log([18, 13, 10]), np.log(220), np.log(0.65), 4.0, 0.2, 1.2])


def _parameters(x: np.ndarray) -> Calibration:
    compute, links, (host, naive) = np.exp(x[:4]), np.exp(x[4:7]), np.exp(x[7:9])
    recall, h4, share = 1 / (1 + np.exp(-x[9:]))
    speeds = {chip: Bps / 1e9 for chip, Bps in ANCHOR.items()} | dict(zip(FREE_LINKS, map(float, links), strict=True))
    return Calibration(
        compute_ms=dict(zip(CHIPS, map(float, compute), strict=True)),
        link_GBps={chip: speeds[chip] for chip in CHIPS},
        host_ms=float(host),
        hit_rate={4: float(h4), 2: float(h4 * share)},
        recall=float(recall),
        naive_share=float(naive),
    )


def least_squares(misfit: Callable[[np.ndarray], np.ndarray], x: np.ndarray, rounds: int = 80) -> np.ndarray:
    """The minimum of the sum of squares of `misfit` near x: Levenberg-Marquardt with forward differences."""
    damping, r = 1e-2, misfit(x)
    for _ in range(rounds):
        J = np.stack([(misfit(x + step) - r) / 1e-6 for step in 1e-6 * np.eye(len(x))], 1)
        change = np.linalg.solve(J.T @ J + damping * np.eye(len(x)), -J.T @ r)
        after = misfit(x + change)
        if after @ after < r @ r:
            x, r, damping = x + change, after, damping / 3
        else:
            damping *= 4
    return x


def gain(made: Calibration, chip: str) -> float:
    """By how much pre-loading speeds up the paper's engine on a chip."""
    return made.tokens_per_s(chip, MODES[0]) / made.tokens_per_s(chip, MODES[1])


TOUCHED_NBYTES = LAYERS * TOP_K * PAPER_EXPERT_NBYTES + 978_133_504  # per token: its experts, and the backbone
FUSED_SHARE, LEAN_HOST_MS = 0.5, 20.0  # assumed: kernels at half of the memory bandwidth, and less Python
MEMORY_BPS = {"A100": 1555e9, "RTX 3080 Mobile": 448e9, "RTX 3060": 360e9, "T4": 320e9}  # reported, nominal


def fast_engine(made: Calibration) -> Calibration:
    """The same machines with fused kernels, whose short computation hides little of a copy."""
    compute = {chip: 1e3 * TOUCHED_NBYTES / FUSED_SHARE / MEMORY_BPS[chip] for chip in made.compute_ms}
    return replace(made, compute_ms=compute, host_ms=LEAN_HOST_MS)
