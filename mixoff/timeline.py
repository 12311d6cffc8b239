"""Time of a token: what bytes, bandwidths and a hit rate make of it, and when each thing happens.

Everything here is modelled. Letters: **L** layers with experts, **K** experts a token.

`predict` adds up one token's time for any shape, scheme and machine: bytes of weights over the bandwidth that products
reach, fixed work a token, a layer, an expert and a miss, and fetches that computing does not hide. Misses are drawn
independently, so a layer has m of them with the binomial chance; while they come, the layer's residents are computed.
With guesses, which reach over layers, the events of a `Step` are run instead.

Does not know policies: the hit rate is given.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np

from mixoff.errors import MixoffError
from mixoff.events import Event
from mixoff.shapes import dtype_nbytes

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from transformers import PretrainedConfig

    from mixoff.hardware import Hardware
    from mixoff.presets import ModelShape
    from mixoff.quantize import Scheme
    from mixoff.sizes import Sizes

BACKGROUND_FROM = 1 << 20  # bytes; smaller experts are fetched by the thread that computes (mixoff.tiers)


@dataclass(frozen=True)
class Efficiency:
    """What this implementation makes of a machine.

    shares: of the fast tier's read bandwidth that a product reaches, by bits of a weight; WIDENED, for weights that are
    stored in another dtype than that of the computation. layer_s: fixed work of a layer (norms, router, attention's
    steps, Python). expert_s: of an expert. source: where the figures come from. token_s: of a token, beside its layers.
    miss_s: of a miss, beside its bytes. guess_s: of guessing for one layer. shared_s: of a layer whose products several
    threads share. cold_s: of a layer whose weights, EVICTING bytes or more, drive all else out of the core's cache, and
    its part for one of fewer. All that holds for a core that takes `python_s` for a step of the loop in
    `hardware.python_speed`. On one that takes twice as long, fixed work takes 1 + `fixed_slows` times as long, and
    products of quantized weights 1 + `products_slow` times.
    """

    shares: Mapping[int | str, float]
    layer_s: float
    expert_s: float
    source: str
    token_s: float = 0.0
    miss_s: float = 0.0
    guess_s: float = 0.0
    shared_s: float = 0.0
    cold_s: float = 0.0
    python_s: float | None = None
    fixed_slows: float = 0.0
    products_slow: float = 0.0

    def on(self, hardware: Hardware) -> Efficiency:
        """The same for that machine's cores, where their speed is known."""
        if self.python_s is None or hardware.python_s is None:
            return self
        slower = hardware.python_s / self.python_s - 1
        fixed, products = (max(1 + share * slower, 0.1) for share in (self.fixed_slows, self.products_slow))
        own = {name: fixed * getattr(self, name) for name in FIXED}
        quantized = {bits: share / products for bits, share in self.shares.items() if bits in CODES}
        return replace(self, **own, shares={**self.shares, **quantized}, python_s=hardware.python_s)

    def seconds(self, nbytes_by_bits: Mapping[int | str, int], Bps: float) -> float:
        """Time to read and multiply so many bytes of weights."""
        return sum(nbytes / (Bps * self.shares[bits]) for bits, nbytes in nbytes_by_bits.items())


EVICTING = 2 << 20  # bytes of weights a layer, the second cache of a core
WIDENED = "widened"  # key of `shares`
FIXED = ("layer_s", "expert_s", "token_s", "miss_s", "guess_s", "shared_s", "cold_s")
CODES = (2, 3, 4, 8)  # bits of quantized weights, whose products are bound by instructions as much as by memory


def _even(share: float) -> dict[int | str, float]:
    return dict.fromkeys((2, 3, 4, 8, 16, 32, WIDENED), share)


GPU = "assumed: fused kernels that were never run on a GPU; replace it by what `mixoff bench` measures"
CPU = (
    "fitted to twelve measured settings on two cores of an Intel Xeon (AVX-512), benchmarks/time_check.py, and held "
    "against eleven others in docs/benchmarks.md; 3, 8 and 32 bits and guess_s are assumed"
)
STEP_S = 14.5e-9  # of `hardware.python_speed`, the least on a core of that machine
HERE = Efficiency(
    {2: 0.78, 3: 0.78, 4: 0.68, 8: 0.68, 16: 0.47, 32: 0.50, WIDENED: 0.218},
    layer_s=0.149e-3,
    expert_s=0.024e-3,
    source=CPU,
    token_s=0.62e-3,
    miss_s=0.087e-3,
    guess_s=0.10e-3,
    shared_s=0.38e-3,
    cold_s=0.39e-3,
    python_s=STEP_S,
    fixed_slows=0.65,
    products_slow=0.30,
)


def _times(efficiency: Efficiency, products: float, fixed: float) -> Efficiency:
    """So many times the products' speed, and the fixed work."""
    own = {name: fixed * getattr(efficiency, name) for name in FIXED}
    return replace(efficiency, **own, shares={bits: products * share for bits, share in efficiency.shares.items()})


EFFICIENCY = {
    "cuda": {
        "low": Efficiency(_even(0.25), 1.2e-3, 0.40e-3, GPU),
        "expected": Efficiency(_even(0.5), 0.6e-3, 0.15e-3, GPU),
        "high": Efficiency(_even(0.8), 0.4e-3, 0.08e-3, GPU),
    },
    "cpu": {"low": _times(HERE, 0.6, 2.0), "expected": HERE, "high": _times(HERE, 1.5, 0.6)},
}


@dataclass(frozen=True)
class Prediction:
    """One token's time, modelled. terms: seconds by what they are spent on; they add up to the token's time.

    floors: seconds that no implementation can beat on this machine at this hit rate, by lane. inputs: every figure that
    went in. step: the same token as events, for `gantt`; all its backbone and fixed work is `attention_s`.
    """

    terms: dict[str, float]
    floors: dict[str, float]
    inputs: dict[str, object] = field(default_factory=dict)
    step: Step | None = field(default=None, repr=False)

    @property
    def seconds(self) -> float:
        """Of one token."""
        return sum(self.terms.values())

    @property
    def tokens_per_s(self) -> float:
        """Of decoding, batch 1."""
        return 1 / self.seconds

    @property
    def binds(self) -> str:
        """What takes the largest share of the time."""
        return max(self.terms, key=lambda name: self.terms[name])

    def to_dict(self) -> dict:
        """All figures under their names."""
        return asdict(self) | {"seconds": self.seconds, "tokens_per_s": self.tokens_per_s, "binds": self.binds}

    def __str__(self) -> str:
        parts = ", ".join(f"{name} {1000 * s:.1f}" for name, s in self.terms.items())
        return f"{self.tokens_per_s:.2f} tokens/s (modelled): {1000 * self.seconds:.1f} ms a token = {parts}"


def predict(
    shape: ModelShape | PretrainedConfig | str,
    scheme: str | Scheme | None,
    hardware: Hardware,
    hit_rate: float = 1.0,
    *,
    recall: float | None = None,
    efficiency: Efficiency | None = None,
    ram_share: float | None = None,
    background: bool | None = None,
) -> Prediction:
    """Tokens/s of decoding at batch 1.

    shape: as for `presets.shape_of`. scheme: as for `sizes.sizes_of`. hit_rate: share of the experts asked for that the
    cache holds. recall: share of the others that guesses had fetched, None without guesses; a wrong guess moves an
    expert in vain. ram_share: of the misses that come from copies in RAM (or from files in the page cache), the others
    come from the disk (default: all where RAM is another tier, none on a CPU). background: whether a layer's residents
    are computed while its misses come (default: as the runtime does it, for experts of a MiB and more; copies within
    RAM never are). Raises MixoffError for rates beyond 0 and 1.
    """
    from mixoff.presets import shape_of
    from mixoff.sizes import sizes_of

    rates = {"hit_rate": hit_rate, "recall": recall, "ram_share": ram_share}
    if any(rate is not None and not 0 <= rate <= 1 for rate in rates.values()):
        raise MixoffError(f"{', '.join(f'{k} is {v}' for k, v in rates.items())}: each is a share from 0 to 1")
    shape = shape_of(shape)
    rates["ram_share"] = float(hardware.device == "cuda") if ram_share is None else ram_share
    efficiency = (efficiency or EFFICIENCY[hardware.device]["expected"]).on(hardware)
    sizes, compute = sizes_of(shape, scheme), compute_dtype(hardware, shape.dtype)
    background = sizes.slot_nbytes >= BACKGROUND_FROM if background is None else background
    terms = _computing(sizes, compute, hardware, efficiency, recall is not None)
    copied = rates["ram_share"] * (1 - hit_rate) if hardware.device == "cpu" and background else 0.0
    step = _step(sizes, hardware, efficiency, terms, rates | {"overlap": background}, copied)
    near_s = sizes.requested() / sum(shape.top_k) / miss_Bps(hardware, 1.0) + efficiency.miss_s
    terms["fetches"] = _waiting(step, shape.top_k) + copied * sum(shape.top_k) * near_s
    inputs = rates | {"background": background, "compute_dtype": compute}
    inputs |= {"efficiency": asdict(efficiency), "hardware": hardware.to_dict()}
    return Prediction(terms, floors(sizes, compute, hardware, hit_rate, rates["ram_share"]), inputs, step)


def _computing(
    sizes: Sizes, compute: str, hardware: Hardware, efficiency: Efficiency, guesses: bool
) -> dict[str, float]:
    """Seconds of a token by what the processor does."""
    experts = efficiency.seconds(_widened(sizes.touched_experts(), compute), hardware.fast_Bps)
    layers, backbone = sizes.shape.config.get_text_config().num_hidden_layers, sizes.touched_backbone(compute)
    evicting = min(1.0, (sum(backbone.values()) + sum(sizes.touched_experts().values())) / layers / EVICTING)
    layer_s = efficiency.layer_s + (hardware.threads > 1) * efficiency.shared_s + evicting * efficiency.cold_s
    fixed = layers * layer_s + efficiency.token_s
    return {
        "backbone": efficiency.seconds(backbone, hardware.fast_Bps),
        "experts": experts + sum(sizes.shape.top_k) * efficiency.expert_s,
        "fixed": fixed + guesses * (len(sizes.sites) - 1) * efficiency.guess_s,
    }


def _widened(touched: Mapping[int, int], compute: str) -> dict[int | str, int]:
    """Bytes by bits, where what is not quantized and has another width than the computation is WIDENED."""
    wide = 8 * dtype_nbytes(compute)
    return {WIDENED if 16 <= bits < wide else bits: nbytes for bits, nbytes in touched.items()}


def _step(
    sizes: Sizes,
    hardware: Hardware,
    efficiency: Efficiency,
    terms: Mapping[str, float],
    rates: Mapping[str, float | None],
    copied: float,
) -> Step:
    """A step of these terms; copied: share of the requests that RAM serves at once, which are no misses here."""
    layers, experts = len(sizes.sites), sum(sizes.shape.top_k)
    fetch_s = sizes.requested() / experts / miss_Bps(hardware, 0.0 if copied else rates["ram_share"])
    return Step(
        layers=layers,
        top_k=max(sizes.shape.top_k),
        host_s=0.0,
        attention_s=(terms["backbone"] + terms["fixed"]) / layers,
        expert_s=terms["experts"] / experts,
        link_s=fetch_s + efficiency.miss_s,
        hit_rate=rates["hit_rate"] + copied,
        recall=rates["recall"],
        overlap=rates["overlap"],
    )


def _waiting(step: Step, top_k: Iterable[int]) -> float:
    """Seconds of a token in which it waits for experts."""
    if step.recall is not None:
        return step.seconds() - replace(step, hit_rate=1.0).seconds(1)
    meanwhile = step.expert_s if step.overlap else 0.0
    return sum(exposed_s(k, step.hit_rate, step.link_s, meanwhile) for k in top_k)


def compute_dtype(hardware: Hardware, stored: str) -> str:
    """What a model stored as `stored` is computed in: the card's 16-bit format; on a CPU fp32 for fp16, as `load` does.

    >>> from mixoff import hardware
    >>> compute_dtype(hardware.named("t4"), "bfloat16"), compute_dtype(hardware.named("laptop"), "bfloat16")
    ('float16', 'bfloat16')
    """
    if hardware.device == "cuda":
        return "float32" if stored == "float32" else hardware.compute_dtype
    return "float32" if stored == "float16" else stored


def miss_Bps(hardware: Hardware, ram_share: float) -> float:
    """Bytes a second of misses: over the link, or by a copy within RAM, or from the disk and then over the link."""
    near = hardware.link_Bps or hardware.fast_Bps / 2  # a copy reads and writes
    far = 1 / (1 / hardware.disk_Bps + 1 / hardware.link_Bps) if hardware.link_Bps else hardware.disk_Bps
    return 1 / (ram_share / near + (1 - ram_share) / far)


def exposed_s(top_k: int, hit_rate: float, fetch_s: float, expert_s: float) -> float:
    """Seconds that a layer waits for its misses, on average, when its residents take `expert_s` each meanwhile.

    >>> round(exposed_s(2, 0.5, fetch_s=1.0, expert_s=0.0), 3), round(exposed_s(2, 0.5, fetch_s=1.0, expert_s=1.0), 3)
    (1.0, 0.5)
    """
    chances = [math.comb(top_k, m) * (1 - hit_rate) ** m * hit_rate ** (top_k - m) for m in range(top_k + 1)]
    return sum(p * max(0.0, m * fetch_s - (top_k - m) * expert_s) for m, p in enumerate(chances))


def floors(sizes: Sizes, compute: str, hardware: Hardware, hit_rate: float, ram_share: float) -> dict[str, float]:
    """Seconds a token that bytes and nominal bandwidths alone demand: `memory` and `transfer`."""
    touched = sum(sizes.touched_backbone(compute).values()) + sum(sizes.touched_experts().values())
    moved = sizes.requested() * (1 - hit_rate)
    return {"memory": touched / hardware.fast_Bps, "transfer": moved / miss_Bps(hardware, ram_share)}


# Events of a step -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Step:
    """One decode step of an engine on a machine, in seconds a layer; what happens in it is drawn from its rates.

    host_s: work that hides no copy (Python, synchronisations). attention_s: the chip's, before the router is known.
    expert_s: the chip's, of an expert. link_s, disk_s: moving one expert over the link, and from the disk before.
    hit_rate: share of the experts asked for that the fast tier holds. disk_share: of the misses that start on disk.
    recall: share of the misses that the prefetch guessed while the layer before was computed, None without prefetch;
    each miss that it did not guess was guessed wrongly, so as many experts are moved in vain. overlap: whether a
    layer's residents are computed while its misses come.
    """

    layers: int
    top_k: int
    host_s: float
    attention_s: float
    expert_s: float
    link_s: float
    disk_s: float = 0.0
    hit_rate: float = 1.0
    disk_share: float = 0.0
    recall: float | None = None
    overlap: bool = True

    def events(self, tokens: int = 1, seed: int = 0) -> list[Event]:
        """What happens, by the same fields as the runtime's events, so that both make one Gantt chart.

        Kinds: `compute` (expert -1: attention), `host`, `miss` and `prefetch` on the link, `read` on the disk. A miss
        waits for the link until what was prefetched has passed; the last token ends the list.
        """
        return _Clock(self, np.random.default_rng(seed)).run(tokens)

    def seconds(self, tokens: int = 64, seed: int = 0) -> float:
        """Mean time of a token over `tokens` of them."""
        return max(event.t1 for event in self.events(tokens, seed)) / tokens


class _Clock:
    """Runs a step: one time for the processor, one for each lane of copies."""

    def __init__(self, step: Step, rng: np.random.Generator) -> None:
        self.step, self.rng, self.found = step, rng, []
        self.now = self.link = self.disk = 0.0
        self.guessed: list[float] = []  # when each guess for the next layer arrives

    def run(self, tokens: int) -> list[Event]:
        for token in range(1, tokens + 1):
            missing = self.rng.binomial(self.step.top_k, 1 - self.step.hit_rate, self.step.layers)  # (L,)
            right = self.rng.binomial(missing, self.step.recall or 0.0)  # (L,)
            right[0] = 0  # nothing comes before the first layer
            for layer in range(self.step.layers):
                ahead = missing[layer + 1] if self.step.recall is not None and layer + 1 < self.step.layers else 0
                self._layer((token, layer), missing[layer] - right[layer], right[layer], ahead)
        return self.found

    def _layer(self, at: tuple[int, int], demanded: int, right: int, ahead: int) -> None:
        """Attention, then the misses that nobody guessed, the experts, guesses for the next layer, the host's work.

        right: misses that were guessed: they came, or come, behind the layer before.
        """
        s = self.step
        self._compute(at, -1, s.attention_s)
        arrived = self.guessed[:right] + [self._move(at, e, "miss") for e in range(right, right + demanded)]
        self.link = max(self.link, self.now)
        self.guessed = [self._move(at, e, "prefetch") for e in range(ahead)]
        if not s.overlap and arrived:
            self.now = max(self.now, *arrived)
        for e in range(len(arrived), s.top_k):
            self._compute(at, e, s.expert_s)
        for e, t in enumerate(arrived):
            self.now = max(self.now, t)
            self._compute(at, e, s.expert_s)
        if s.host_s:
            self.now = max(self.now, self.link)
            self._tell(at, -1, "host", self.now, s.host_s)
            self.now += s.host_s

    def _compute(self, at: tuple[int, int], expert: int, seconds: float) -> None:
        self._tell(at, expert, "compute", self.now, seconds)
        self.now += seconds

    def _move(self, at: tuple[int, int], expert: int, kind: str) -> float:
        """Bring one expert; returns when it is there."""
        ready = self.now
        if self.rng.random() < self.step.disk_share:
            start = max(self.disk, self.now)
            self._tell(at, expert, "read", start, self.step.disk_s)
            ready = self.disk = start + self.step.disk_s
        start = max(self.link, ready)
        self._tell(at, expert, kind, start, self.step.link_s)
        self.link = start + self.step.link_s
        return self.link

    def _tell(self, at: tuple[int, int], expert: int, kind: str, t0: float, seconds: float) -> None:
        if seconds:
            self.found.append(Event(*at, expert, kind, 0, t0, t0 + seconds, "decode"))


LANES = {  # of a Gantt chart, from the top: which kinds of event are on it, and how each is drawn
    "compute": ("compute", "host"),
    "link": ("miss", "prefetch"),
    "disk": ("read",),
}
LOOKS = {  # Okabe and Ito's colours; hatches tell them apart without colour
    "compute": ("#0072B2", ""), "host": ("#999999", "//"), "miss": ("#D55E00", "xx"), "prefetch": ("#56B4E9", ".."),
    "read": ("#CC79A7", "\\\\"),
}  # fmt: skip


def gantt(events: Iterable[Event], ax: Axes | None = None, title: str = "", modelled: bool = True) -> Axes:
    """Draw a time line, lanes below each other, time in ms; of a step, or of what a runtime told.

    Modelled spans have dashed outlines, measured ones solid: draw both into one `ax` to compare.
    """
    import matplotlib.pyplot as plt

    ax = ax or plt.subplots(figsize=(8, 1.8), layout="constrained")[1]
    spans = {kind: [(1e3 * e.t0, 1e3 * (e.t1 - e.t0)) for e in events if e.kind == kind] for kind in LOOKS}
    lanes = [lane for lane, kinds in LANES.items() if any(spans[kind] for kind in kinds)]
    for row, lane in enumerate(lanes):
        for kind in LANES[lane]:
            colour, hatch = LOOKS[kind]
            look = {"facecolor": colour, "hatch": hatch, "edgecolor": "black", "alpha": 0.85, "linewidth": 0.5}
            ax.broken_barh(spans[kind], (-row - 0.4, 0.8), **look, linestyle="--" if modelled else "-", label=kind)
    ax.set(yticks=[-row for row in range(len(lanes))], yticklabels=lanes, xlabel="ms", title=title)
    return ax


# The paper's Table 2 --------------------------------------------------------------------------------------------------

# Eliseev and Mazur, arXiv 2312.17238, Table 2, tokens/s, reported: batch 1, experts in 2 bits, attention in 4
MODES = ("full algorithm", "without pre-loading", "without LRU cache and pre-loading", "naive (accelerate)")
TABLE_2 = {
    "A100": (3.061, 2.918, 2.265, 1.392),
    "RTX 3080 Mobile": (2.655, 2.227, 1.758, 1.059),
    "RTX 3060": (2.278, 2.051, 1.547, 0.919),
    "T4": (2.092, 1.567, 1.168, 0.661),
}
SLOTS = {"A100": 4, "RTX 3080 Mobile": 4, "RTX 3060": 2, "T4": 4}  # experts a layer in their cache
ANCHOR = {"A100": 25e9}  # reported for PCIe 4.0 x16 (hardware.BAM): without one known link, bytes and speeds only scale
LAYERS, TOP_K, EXPERTS = 32, 2, 8
PAPER_EXPERT_NBYTES = 66_406_180  # of their published checkpoint


@dataclass(frozen=True)
class Calibration:
    """Physical parameters of the paper's runs.

    compute_ms: the chip's work for a token, by chip. link_GBps: by chip. host_ms: of a token, work that hides no copy.
    hit_rate: by slots a layer. recall: of their prefetch. naive_share: of all experts' bytes, what the naive run moves
    for a token.
    """

    compute_ms: dict[str, float]
    link_GBps: dict[str, float]
    host_ms: float
    hit_rate: dict[int, float]
    recall: float
    naive_share: float

    @property
    def free(self) -> int:
        """Parameters that were fitted."""
        return len(self.compute_ms) + len(self.link_GBps) - len(ANCHOR) + 1 + len(self.hit_rate) + 2

    def step(self, chip: str, mode: str) -> Step:
        """Their engine on a chip: no overlap but that of the prefetch with the chip's work."""
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
        """A cell of the table, modelled: the mean over all that may miss, in closed form."""
        step = self.step(chip, mode)
        if mode == MODES[3]:
            moved = self.naive_share * LAYERS * EXPERTS * step.link_s
            return 1 / (LAYERS * (step.host_s + TOP_K * step.expert_s) + moved)
        return 1 / mean_seconds(step)


def mean_seconds(step: Step) -> float:
    """`Step.seconds` on average, for an engine whose only overlap is that of prefetches with the experts' computing."""
    if step.overlap or step.attention_s or step.disk_share:
        raise MixoffError("the mean in closed form is that of an engine without overlap, attention apart, or disk")
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
    """Fit the parameters to Table 2, by the logarithms of its cells; always the same result.

    First least squares, then the sum of fourth powers, which weighs the largest errors most. leave_out: a cell
    (chip, mode) that the fit does not see.
    """
    cells = [(chip, mode) for chip in TABLE_2 for mode in MODES if (chip, mode) != leave_out]
    reported = np.log([TABLE_2[chip][MODES.index(mode)] for chip, mode in cells])

    def misfit(x: np.ndarray) -> np.ndarray:
        made = _parameters(x)
        return np.log([made.tokens_per_s(*cell) for cell in cells]) - reported

    x = least_squares(misfit, _START)
    return _parameters(least_squares(lambda x: misfit(x) * np.abs(misfit(x)) / TYPICAL, x))


TYPICAL = 0.02  # error of a cell; only scales the fourth powers against the damping
CHIPS = list(TABLE_2)
FREE_LINKS = [chip for chip in CHIPS if chip not in ANCHOR]
# logarithms of compute_ms by chip, free links, host_ms, naive_share; log-odds of recall, the hit rate at 4 slots, and
# the hit rate at 2 as a share of that: fewer slots never hit more often
_START = np.array([*np.log([25, 100, 90, 210]), *np.log([18, 13, 10]), np.log(220), np.log(0.65), 4.0, 0.2, 1.2])


def _parameters(x: np.ndarray) -> Calibration:
    compute, links, (host, naive) = np.exp(x[:4]), np.exp(x[4:7]), np.exp(x[7:9])
    recall, h4, share = 1 / (1 + np.exp(-x[9:]))
    speeds = {chip: Bps / 1e9 for chip, Bps in ANCHOR.items()} | dict(zip(FREE_LINKS, map(float, links), strict=True))
    made = dict(zip(CHIPS, map(float, compute), strict=True)), {chip: speeds[chip] for chip in CHIPS}
    return Calibration(*made, float(host), {4: float(h4), 2: float(h4 * share)}, float(recall), float(naive))


def least_squares(misfit: Callable[[np.ndarray], np.ndarray], x: np.ndarray, rounds: int = 80) -> np.ndarray:
    """Where the squares of `misfit` have the least sum near x: Levenberg-Marquardt with forward differences."""
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


TOUCHED_NBYTES = LAYERS * TOP_K * PAPER_EXPERT_NBYTES + 978_133_504  # of a token: its experts, and the backbone
FUSED_SHARE, LEAN_HOST_MS = 0.5, 20.0  # assumed: kernels at half the memory's bandwidth, and less Python
MEMORY_BPS = {"A100": 1555e9, "RTX 3080 Mobile": 448e9, "RTX 3060": 360e9, "T4": 320e9}  # reported, nominal


def fast_engine(made: Calibration) -> Calibration:
    """The same machines under an engine with fused kernels: it leaves little computing to hide a copy behind."""
    compute = {chip: 1e3 * TOUCHED_NBYTES / FUSED_SHARE / MEMORY_BPS[chip] for chip in made.compute_ms}
    return replace(made, compute_ms=compute, host_ms=LEAN_HOST_MS)
