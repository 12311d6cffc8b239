"""Time of a token: what bytes, bandwidths and a hit rate make of it, and when each thing happens.

Everything here is modelled. Letters: **L** layers with experts, **K** experts a token.

`predict` adds up one token's time for any shape, scheme and machine: bytes of weights over the bandwidth that products
reach, fixed work a layer and an expert, and fetches that computing does not hide. Misses are drawn independently, so a
layer has m of them with the binomial chance; while they come, the layer's residents are computed.

Does not know policies: the hit rate is given.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING

from mixoff.errors import MixoffError

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from mixoff.hardware import Hardware
    from mixoff.presets import ModelShape
    from mixoff.quantize import Scheme

BACKGROUND_FROM = 1 << 20  # bytes; smaller experts are fetched by the thread that computes (mixoff.tiers)


@dataclass(frozen=True)
class Efficiency:
    """What this implementation makes of a machine.

    shares: of the fast tier's read bandwidth that a product reaches, by bits of a weight. layer_s: fixed work of a
    layer (norms, router, attention's steps, Python). expert_s: of an expert. source: where the figures come from.
    """

    shares: Mapping[int, float]
    layer_s: float
    expert_s: float
    source: str

    def seconds(self, nbytes_by_bits: Mapping[int, int], Bps: float) -> float:
        """Time to read and multiply so many bytes of weights."""
        return sum(nbytes / (Bps * self.shares[bits]) for bits, nbytes in nbytes_by_bits.items())


def _even(share: float) -> dict[int, float]:
    return dict.fromkeys((2, 3, 4, 8, 16, 32), share)


GPU = "assumed: fused kernels that were never run on a GPU; replace it by what `mixoff bench` measures"
CPU = "measured: one thread of an AMD EPYC (AVX2), docs/time.md"
CPU_SHARES = {2: 0.30, 3: 0.05, 4: 0.40, 8: 0.50, 16: 0.45, 32: 0.80}
EFFICIENCY = {
    "cuda": {
        "low": Efficiency(_even(0.25), 1.2e-3, 0.40e-3, GPU),
        "expected": Efficiency(_even(0.5), 0.6e-3, 0.15e-3, GPU),
        "high": Efficiency(_even(0.8), 0.4e-3, 0.08e-3, GPU),
    },
    "cpu": {
        "low": Efficiency({bits: 0.6 * share for bits, share in CPU_SHARES.items()}, 1.0e-3, 0.30e-3, CPU),
        "expected": Efficiency(CPU_SHARES, 0.6e-3, 0.15e-3, CPU),
        "high": Efficiency({bits: min(1.3 * share, 1.0) for bits, share in CPU_SHARES.items()}, 0.5e-3, 0.10e-3, CPU),
    },
}


@dataclass(frozen=True)
class Prediction:
    """One token's time, modelled. terms: seconds by what they are spent on; they add up to the token's time.

    floors: seconds that no implementation can beat on this machine at this hit rate, by lane. inputs: every figure that
    went in.
    """

    terms: dict[str, float]
    floors: dict[str, float]
    inputs: dict[str, object] = field(default_factory=dict)

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
    efficiency: Efficiency | None = None,
    ram_share: float | None = None,
    background: bool | None = None,
) -> Prediction:
    """Tokens/s of decoding at batch 1.

    shape: as for `presets.shape_of`. scheme: as for `sizes.sizes_of`. hit_rate: share of the experts asked for that the
    fast tier holds. ram_share: of the misses that come from copies in RAM, the others come from the disk (default: all
    where RAM is another tier, none on a CPU). background: whether a layer's residents are computed while its misses
    come (default: as the runtime does it, for experts of a MiB and more).
    Raises MixoffError for rates beyond 0 and 1.
    """
    from mixoff.presets import shape_of
    from mixoff.sizes import sizes_of

    shape = shape_of(shape)
    ram_share = float(hardware.device == "cuda") if ram_share is None else ram_share
    if not (0 <= hit_rate <= 1 and 0 <= ram_share <= 1):
        raise MixoffError(f"hit_rate is {hit_rate} and ram_share {ram_share}: each is a share from 0 to 1")
    efficiency = efficiency or EFFICIENCY[hardware.device]["expected"]
    sizes, compute = sizes_of(shape, scheme), compute_dtype(hardware, shape.dtype)
    background = sizes.slot_nbytes >= BACKGROUND_FROM if background is None else background
    layers = shape.config.get_text_config().num_hidden_layers
    experts = sum(shape.top_k)
    backbone_s = efficiency.seconds(sizes.touched_backbone(compute), hardware.fast_Bps)
    experts_s = efficiency.seconds(sizes.touched_experts(), hardware.fast_Bps) + experts * efficiency.expert_s
    fetch_s = sizes.requested() / experts / miss_Bps(hardware, ram_share)
    hidden_by = experts_s / experts if background else 0.0
    exposed = sum(exposed_s(k, hit_rate, fetch_s, hidden_by) for k in shape.top_k)
    terms = {"backbone": backbone_s, "experts": experts_s, "fixed": layers * efficiency.layer_s, "fetches": exposed}
    inputs = {"hit_rate": hit_rate, "ram_share": ram_share, "background": background, "compute_dtype": compute}
    inputs |= {"efficiency": asdict(efficiency), "hardware": hardware.to_dict()}
    return Prediction(terms, floors(sizes, compute, hardware, hit_rate, ram_share), inputs)


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


def floors(sizes: object, compute: str, hardware: Hardware, hit_rate: float, ram_share: float) -> dict[str, float]:
    """Seconds a token that bytes and nominal bandwidths alone demand: `memory` and `transfer`."""
    touched = sum(sizes.touched_backbone(compute).values()) + sum(sizes.touched_experts().values())
    moved = sizes.requested() * (1 - hit_rate)
    return {"memory": touched / hardware.fast_Bps, "transfer": moved / miss_Bps(hardware, ram_share)}
