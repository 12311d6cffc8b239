"""Which way to run a model for which machine: seconds per token from bytes and bandwidths, modelled (chapter 14).

Four ways compete. All bytes of a token are read once, at the bandwidth of the memory that holds them; nothing overlaps,
and nothing else costs time. So the result says which way is best, and a speed that no engine exceeds.
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mixoff.errors import MixoffError
from mixoff.shapes.sizes import Sizes
from mixoff.trace.routers import Router

WAYS = {
    "card": "whole on the card",
    "split": "each expert computed where it lies",
    "copied": "experts copied to the card, and cached",
    "ram": "no card: in RAM, the rest read from the disk",
}


@dataclass(frozen=True)
class Workload:
    """What a token asks for. Sizes in bytes.

    backbone, experts: all of it
    token_backbone, token_experts: the part that a token reads
    hit_rates: hit rate of an LRU cache of 0 to all experts of a layer, in equal steps
    """

    backbone: float
    experts: float
    token_backbone: float
    token_experts: float
    hit_rates: tuple[float, ...]

    def hits(self, share: float) -> float:
        """Hit rate of a cache that holds this share of the experts."""
        return float(np.interp(share * (len(self.hit_rates) - 1), range(len(self.hit_rates)), self.hit_rates))


@dataclass(frozen=True)
class Machine:
    """Memories in bytes, bandwidths in bytes per second. ram_Bps: what the CPU reaches in products."""

    vram: float
    ram: float
    vram_Bps: float
    ram_Bps: float
    link_Bps: float
    disk_Bps: float


def workload(of: Sizes, router: Router, compute: str = "float16") -> Workload:
    """The workload of a model in the scheme of `of`, with the hit rates of a router."""
    return Workload(
        backbone=of.backbone(compute),
        experts=of.experts,
        token_backbone=sum(of.touched_backbone(compute).values()),
        token_experts=of.requested(),
        hit_rates=tuple(float(rate) for rate in router.hit_rates()),
    )


def seconds(of: Workload, on: Machine) -> dict[str, float]:
    """Seconds per token of each way in WAYS; infinite where it cannot run.

    >>> of = Workload(1e9, 8e9, 1e9, 2e9, (0.0, 0.5, 1.0))
    >>> found = seconds(of, Machine(vram=5e9, ram=8e9, vram_Bps=100e9, ram_Bps=10e9, link_Bps=10e9, disk_Bps=1e9))
    >>> {way: round(s, 3) for way, s in found.items()}
    {'card': inf, 'split': 0.12, 'copied': 0.13, 'ram': 0.55}
    """
    share = min(max((on.vram - of.backbone) / of.experts, 0.0), 1.0)
    behind = min(on.ram / of.experts, 1 - share)  # experts with a copy in RAM alone
    return {
        "card": (of.token_backbone + of.token_experts) / on.vram_Bps if share == 1 else math.inf,
        "split": _split(of, on, share) if behind >= 1 - share else math.inf,
        "copied": _copied(of, on, share, behind),
        "ram": _in_ram(of, on),
    }


def _split(of: Workload, on: Machine, share: float) -> float:
    """The card computes the backbone and its share of the experts, the processor the others."""
    if on.vram < of.backbone:
        return math.inf
    card = of.token_backbone + share * of.token_experts
    return card / on.vram_Bps + (1 - share) * of.token_experts / on.ram_Bps


def _copied(of: Workload, on: Machine, share: float, behind: float) -> float:
    """The card computes everything; what its cache lacks comes over the link, or from the disk."""
    if on.vram < of.backbone or share == 0:
        return math.inf
    near, all_near = of.hits(share), of.hits(share + behind)
    fetched = (all_near - near) / on.link_Bps + (1 - all_near) / on.disk_Bps
    return (of.token_backbone + of.token_experts) / on.vram_Bps + of.token_experts * fetched


def _in_ram(of: Workload, on: Machine) -> float:
    """The processor computes everything; experts that RAM lacks come from the disk."""
    share = min((on.ram - of.backbone) / of.experts, 1.0)
    if share <= 0:
        return math.inf
    read = (of.token_backbone + of.token_experts) / on.ram_Bps
    return read + of.token_experts * (1 - of.hits(share)) / on.disk_Bps


def best(of: Workload, on: Machine) -> tuple[str, float]:
    """The fastest way and its seconds per token; ("none", infinite) where none runs. Of equals, the first in WAYS."""
    found = seconds(of, on)
    way = min(found, key=found.__getitem__)
    return (way, found[way]) if found[way] < math.inf else ("none", math.inf)


def run_ranks(path: str | Path, prompt: str, ranks: int, fast_bytes: str, new_tokens: int) -> dict[str, Any]:
    """What `mixoff run --json` reports from so many processes, each with a budget of its own, on this machine."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    asked = ["run", str(path), "--raw", "--prompt", prompt, "--fast-bytes", fast_bytes, "--device", "cpu"]
    command = [*torchrun, "-m", "mixoff", *asked, "--max-new-tokens", str(new_tokens), "--json"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        said = [line for line in done.stderr.splitlines() if line.startswith("mixoff: ")]
        raise MixoffError(f"the ranks ended with an error: {said[0] if said else done.stderr[-500:]}")
    return json.loads(done.stdout)
