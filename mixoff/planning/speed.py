"""Time of a token from bytes, bandwidths and a hit rate.

Everything here is modelled. Letters: **L** layers with experts, **K** experts per token.

`predict` adds up one token's time for any shape, scheme and machine. The terms are bytes of weights over the bandwidth
of products, fixed work per token, layer, expert and miss, and fetches that computing does not hide. Misses are
independent, so a layer has m of them with the binomial probability; during the fetches the layer's residents are
computed. With guesses, which span layers, the events of a `Step` are simulated instead. The hit rate is given: no
policy is modelled.

With a card, the host queues launches while the card computes, so the longer of both counts: term `host` is what the
card's work does not hide. Where every quantized expert has a slot, a token is one graph (`runtime.graph`). A miss whose
victim is copied back uses the link in both directions.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING

from mixoff.errors import MixoffError
from mixoff.planning.steps import Step
from mixoff.shapes.sites import dtype_nbytes

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from mixoff.planning.hardware import Hardware
    from mixoff.quantize.scheme import Scheme
    from mixoff.shapes.shape import ModelShape
    from mixoff.shapes.sizes import Sizes


BACKGROUND_FROM = 1 << 20  # bytes; smaller experts are fetched by the thread that computes (mixoff.transfer.tiers)


@dataclass(frozen=True)
class Efficiency:
    """How fast this implementation runs on a machine.

    Attributes
    ----------
    shares: share of the fast tier's read bandwidth that a product reaches, by bits per weight; WIDENED is that of
        weights stored in another dtype than the computation's
    layer_s: fixed work of a layer (norms, router, attention's steps, Python)
    expert_s: fixed work of an expert
    source: origin of the figures
    token_s: fixed work of a token, in addition to its layers
    miss_s: fixed work of a miss, in addition to its bytes
    guess_s: work of guessing for one layer
    shared_s: additional work of a layer whose products several threads share
    cold_s: additional work of a layer whose weights, EVICTING bytes or more, flush the core's cache; in proportion for
        fewer bytes
    python_s: seconds per step of the loop in `probe.python_speed` on the core that all figures hold for
    fixed_slows: additional share of fixed work on a core that takes twice `python_s`
    products_slow: likewise for products of quantized weights
    host_s: work of the host for a layer on a machine with a card, while the card computes
    host_miss_s: likewise for a miss
    host_token_s: likewise for a token, in addition to its layers
    graph_s: likewise for a whole token that is replayed as one graph
    back_slows: share of its time by which a copy back slows a copy to the card: 0 if the link carries both at once, 1
        if they take turns
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
    host_s: float = 0.0
    host_miss_s: float = 0.0
    host_token_s: float = 0.0
    graph_s: float = 0.0
    back_slows: float = 0.0

    def on(self, hardware: Hardware) -> Efficiency:
        """The figures for that machine's cores, if their speed is known."""
        if self.python_s is None or hardware.python_s is None:
            return self
        slower = hardware.python_s / self.python_s - 1
        fixed, products = (max(1 + share * slower, 0.1) for share in (self.fixed_slows, self.products_slow))
        works = {name: fixed * getattr(self, name) for name in FIXED}
        shares = {bits: share / products if bits in CODES else share for bits, share in self.shares.items()}
        return replace(self, **works, shares=shares, python_s=hardware.python_s)

    def seconds(self, nbytes_by_bits: Mapping[int, int] | Mapping[int | str, int], Bps: float) -> float:
        """Seconds to read and multiply these bytes of weights."""
        return sum(nbytes / (Bps * self.shares[bits]) for bits, nbytes in nbytes_by_bits.items())


EVICTING = 2 << 20  # bytes of weights per layer that fill the second cache of a core
WIDENED = "widened"  # key of `shares`
FIXED = ("layer_s", "expert_s", "token_s", "miss_s", "guess_s", "shared_s", "cold_s")
CODES = (2, 3, 4, 8)  # bits of quantized weights, whose products are limited by instructions as well as memory


def _even(share: float) -> dict[int | str, float]:
    return dict.fromkeys((2, 3, 4, 8, 16, 32, WIDENED), share)


@dataclass(frozen=True)
class Queued:
    """What the host queues: calls of ATen, copies and graphs among them, and launches of our kernels."""

    calls: int
    launches: int = 0

    def seconds(self, call_us: float, launch_us: float) -> float:
        """The host's time, at so many microseconds each."""
        return 1e-6 * (self.calls * call_us + self.launches * launch_us)


# counted for Mixtral's layer, partly resident, with a static cache (tests/kernels/test_launches.py, docs/gpu.md); six
# events of a miss count as two calls
LAYER, MISS, TOKEN, GRAPH = Queued(54, 5), Queued(8, 3), Queued(57), Queued(48)
GPU = (
    "counted: 54 calls of ATen and 5 kernels per layer of Mixtral, or one graph per token; assumed: their pace on "
    "Colab's processor, and the speed of kernels that were never run on a GPU; replace it by what `python3 go.py gpu` "
    "measures"
)
CPU = (
    "fitted to twelve measured settings on two cores of an Intel Xeon (AVX-512), benchmarks/time_check.py, and held "
    "against eleven others in docs/benchmarks.md; 3, 8 and 32 bits and guess_s are assumed"
)
STEP_S = 14.5e-9  # result of `probe.python_speed`, the lowest on a core of that machine
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
    """`products` times the speed of products, and `fixed` times the fixed work."""
    works = {name: fixed * getattr(efficiency, name) for name in FIXED}
    return replace(efficiency, **works, shares={bits: products * share for bits, share in efficiency.shares.items()})


def _on_card(
    share: float, layer_ms: float, expert_ms: float, call_us: float, launch_us: float, back_slows: float
) -> Efficiency:
    """A card's kernels at that share of its bandwidth, and the host's work for them."""
    return Efficiency(
        _even(share),
        layer_s=layer_ms / 1000,
        expert_s=expert_ms / 1000,
        source=GPU,
        host_s=LAYER.seconds(call_us, launch_us),
        host_miss_s=MISS.seconds(call_us, launch_us),
        host_token_s=TOKEN.seconds(call_us, launch_us),
        graph_s=GRAPH.seconds(call_us, launch_us),
        back_slows=back_slows,
    )


EFFICIENCY = {
    "cuda": {
        "low": _on_card(0.25, layer_ms=0.35, expert_ms=0.05, call_us=20, launch_us=43, back_slows=1.0),
        "expected": _on_card(0.5, layer_ms=0.2, expert_ms=0.03, call_us=15.5, launch_us=33, back_slows=0.2),
        "high": _on_card(0.8, layer_ms=0.12, expert_ms=0.015, call_us=9, launch_us=19, back_slows=0.0),
    },
    "cpu": {"low": _times(HERE, 0.6, 2.0), "expected": HERE, "high": _times(HERE, 1.5, 0.6)},
}


@dataclass(frozen=True)
class Prediction:
    """One token's time, modelled.

    terms: seconds by kind of work, which add up to the token's time
    floors: seconds that no implementation can beat on this machine at this hit rate, by lane
    inputs: every figure used
    step: the same token as events, for `gantt`; its `attention_s` has all backbone and fixed work
    """

    terms: dict[str, float]
    floors: dict[str, float]
    inputs: dict[str, object] = field(default_factory=dict)
    step: Step | None = field(default=None, repr=False)

    @property
    def seconds(self) -> float:
        """Seconds per token."""
        return sum(self.terms.values())

    @property
    def tokens_per_s(self) -> float:
        """Speed of decoding, batch 1."""
        return 1 / self.seconds

    @property
    def binds(self) -> str:
        """The term with the largest share of the time."""
        return max(self.terms, key=lambda name: self.terms[name])

    def to_dict(self) -> dict:
        """All figures by name."""
        return asdict(self) | {"seconds": self.seconds, "tokens_per_s": self.tokens_per_s, "binds": self.binds}

    def __str__(self) -> str:
        parts = ", ".join(f"{name} {1000 * s:.1f}" for name, s in self.terms.items())
        return f"{self.tokens_per_s:.2f} tokens/s (modelled): {1000 * self.seconds:.1f} ms per token = {parts}"


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
    back_share: float = 0.0,
) -> Prediction:
    """Tokens/s of decoding at batch 1. Raises MixoffError for rates outside 0 to 1.

    Parameters
    ----------
    shape: `ModelShape`, configuration, folder or Hub id
    scheme: as for `sizes.sizes_of`
    hardware: the machine
    hit_rate: share of the requested experts that the cache holds
    recall: share of the other experts that guesses had fetched, None without guesses; a wrong guess wastes a fetch
    efficiency: speed of this implementation; None is the expected one for the device
    ram_share: share of the misses that come from RAM (copies, or cached files) rather than from the disk;
        None is all with a card, and none on a CPU
    background: whether a layer's residents are computed during its fetches, though never during copies within RAM;
        None follows the runtime, which does so for experts of a MiB or more
    back_share: share of the misses whose victim is copied back to RAM: with a card, all where RAM holds only the
        experts that the card lacks
    """
    from mixoff.shapes.sizes import sizes_of
    from mixoff.store.describe import shape_of

    rates = {"hit_rate": hit_rate, "recall": recall, "ram_share": ram_share, "back_share": back_share}
    if any(rate is not None and not 0 <= rate <= 1 for rate in rates.values()):
        raise MixoffError(f"{', '.join(f'{k} is {v}' for k, v in rates.items())}: each is a share from 0 to 1")
    shape = shape_of(shape)
    ram_share = float(hardware.device == "cuda") if ram_share is None else ram_share
    efficiency = (efficiency or EFFICIENCY[hardware.device]["expected"]).on(hardware)
    sizes, compute = sizes_of(shape, scheme), compute_dtype(hardware, shape.dtype)
    background = sizes.slot_nbytes >= BACKGROUND_FROM if background is None else background
    terms = _computing(sizes, compute, hardware, efficiency, recall is not None)
    if hardware.device == "cuda":
        terms["host"] = max(0.0, _queueing(sizes, compute, efficiency, hit_rate) - sum(terms.values()))
    copied = ram_share * (1 - hit_rate) if hardware.device == "cpu" and background else 0.0  # at once: counts as hits
    fetch_s = sizes.requested() / sum(shape.top_k) / miss_Bps(hardware, 0.0 if copied else ram_share)
    if hardware.link_Bps:
        fetch_s += efficiency.back_slows * back_share * sizes.requested() / sum(shape.top_k) / hardware.link_Bps
    step = Step(
        layers=len(sizes.sites),
        top_k=max(shape.top_k),
        host_s=0.0,
        attention_s=(terms["backbone"] + terms["fixed"] + terms.get("host", 0.0)) / len(sizes.sites),
        expert_s=terms["experts"] / sum(shape.top_k),
        link_s=fetch_s + efficiency.miss_s,
        hit_rate=hit_rate + copied,
        recall=recall,
        overlap=background,
    )
    near_s = sizes.requested() / sum(shape.top_k) / miss_Bps(hardware, 1.0) + efficiency.miss_s
    terms["fetches"] = _waiting(step, shape.top_k) + copied * sum(shape.top_k) * near_s
    inputs = rates | {"ram_share": ram_share, "background": background, "compute_dtype": compute}
    inputs |= {"efficiency": asdict(efficiency), "hardware": hardware.to_dict()}
    return Prediction(terms, floors(sizes, compute, hardware, hit_rate, ram_share), inputs, step)


def _computing(
    sizes: Sizes, compute: str, hardware: Hardware, efficiency: Efficiency, guesses: bool
) -> dict[str, float]:
    """Seconds per token by kind of work, without waiting for the host or for misses."""
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


def _queueing(sizes: Sizes, compute: str, efficiency: Efficiency, hit_rate: float) -> float:
    """Seconds per token of a card's host; 16-bit experts are not found by kernels, so they need the host."""
    wide = 8 * dtype_nbytes(compute)
    if hit_rate == 1 and all(bits < wide for bits in sizes.touched_experts()):
        return efficiency.graph_s
    layers, misses = sizes.shape.config.get_text_config().num_hidden_layers, (1 - hit_rate) * sum(sizes.shape.top_k)
    return efficiency.host_token_s + layers * efficiency.host_s + misses * efficiency.host_miss_s


def _widened(touched: Mapping[int, int], compute: str) -> dict[int | str, int]:
    """Bytes by bits; unquantized weights of another width than the computation's are under WIDENED."""
    wide = 8 * dtype_nbytes(compute)
    return {WIDENED if 16 <= bits < wide else bits: nbytes for bits, nbytes in touched.items()}


def _waiting(step: Step, top_k: Iterable[int]) -> float:
    """Seconds per token spent waiting for experts."""
    if step.recall is not None:
        return step.seconds() - replace(step, hit_rate=1.0).seconds(1)
    meanwhile = step.expert_s if step.overlap else 0.0
    return sum(exposed_s(k, step.hit_rate, step.link_s, meanwhile) for k in top_k)


def compute_dtype(hardware: Hardware, stored: str) -> str:
    """The dtype that `load` computes a `stored` model in: a card's 16-bit format; on a CPU, fp32 for fp16.

    >>> from mixoff.planning import probe
    >>> compute_dtype(probe.named("t4"), "bfloat16"), compute_dtype(probe.named("laptop"), "bfloat16")
    ('float16', 'bfloat16')
    """
    if hardware.device == "cuda":
        return "float32" if stored == "float32" else hardware.compute_dtype
    return "float32" if stored == "float16" else stored


def miss_Bps(hardware: Hardware, ram_share: float) -> float:
    """Bytes per second of misses: over the link, by a copy within RAM, or from the disk and then over the link."""
    near = hardware.link_Bps or hardware.fast_Bps / 2  # a copy reads and writes
    far = 1 / (1 / hardware.disk_Bps + 1 / hardware.link_Bps) if hardware.link_Bps else hardware.disk_Bps
    return 1 / (ram_share / near + (1 - ram_share) / far)


def exposed_s(top_k: int, hit_rate: float, fetch_s: float, expert_s: float) -> float:
    """Mean seconds that a layer waits for its misses while its residents take `expert_s` each.

    >>> round(exposed_s(2, 0.5, fetch_s=1.0, expert_s=0.0), 3), round(exposed_s(2, 0.5, fetch_s=1.0, expert_s=1.0), 3)
    (1.0, 0.5)
    """
    chances = [math.comb(top_k, m) * (1 - hit_rate) ** m * hit_rate ** (top_k - m) for m in range(top_k + 1)]
    return sum(p * max(0.0, m * fetch_s - (top_k - m) * expert_s) for m, p in enumerate(chances))


def floors(sizes: Sizes, compute: str, hardware: Hardware, hit_rate: float, ram_share: float) -> dict[str, float]:
    """Seconds per token for bytes and nominal bandwidths alone: `memory` and `transfer`."""
    touched = sum(sizes.touched_backbone(compute).values()) + sum(sizes.touched_experts().values())
    moved = sizes.requested() * (1 - hit_rate)
    return {"memory": touched / hardware.fast_Bps, "transfer": moved / miss_Bps(hardware, ram_share)}
