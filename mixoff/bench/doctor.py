"""What is installed, what the machine can do, and what will work on it: the text to paste into an issue.

It holds no secrets: no names of users or machines, no tokens, and no path except the cache folder's.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import platform
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from mixoff.planning import probe
from mixoff.planning.hardware import Hardware
from mixoff.transfer import cuda
from mixoff.units import GB, format_nbytes

PACKAGES = (
    "mixoff", "torch", "transformers", "huggingface_hub", "accelerate", "safetensors", "numpy", "numba", "triton",
    "hqq", "ipywidgets", "anywidget",
)  # fmt: skip
PINNED_PAYS = 1.1  # pinned over pageable bandwidth; below this, locking pages gains nothing
MISSING = "not installed"
FEATURES = {"avx2": "AVX2", "avx512f": "AVX-512", "avx512_vnni": "VNNI", "avx_vnni": "AVX-VNNI", "asimd": "NEON"}


@dataclass(frozen=True)
class Finding:
    """Whether something will work, and why."""

    what: str
    works: bool
    why: str


@dataclass(frozen=True)
class Card:
    """A GPU: compute capability, memory, its fast 16-bit dtype, and the measured bandwidth of its link in bytes/s."""

    name: str
    sm: str
    total_nbytes: int
    free_nbytes: int
    dtype: str
    link_Bps: dict[str, float]

    def __str__(self) -> str:
        links = ", ".join(f"{name} {Bps / GB:.1f}" for name, Bps in self.link_Bps.items())
        sizes = f"{format_nbytes(self.free_nbytes)} of {format_nbytes(self.total_nbytes)} free"
        return f"{self.name}, {self.sm}, {sizes}, computes in {self.dtype}; link in GB/s (measured): {links}"


@dataclass(frozen=True)
class Checkup:
    """Versions, the measured machine, and findings; prints itself as text."""

    versions: dict[str, str]
    processor: str
    threads: int
    memory_nbytes: int
    gpu: str | None
    card: Card | None
    machine: Hardware
    findings: tuple[Finding, ...]

    def to_dict(self) -> dict:
        """All of it under its names."""
        return asdict(self)

    def to_json(self) -> str:
        """One line of JSON."""
        return json.dumps(self.to_dict())

    def __str__(self) -> str:
        m, size = self.machine, format_nbytes
        lines = [f"{name:<16} {version}" for name, version in self.versions.items()]
        lines += [f"{'processor':<16} {self.processor}, {self.threads} thread(s)"]
        lines += [f"{'memory':<16} {size(self.memory_nbytes)} may be used, {size(m.fast_bytes)} free in the fast tier"]
        lines += [f"{'read bandwidth':<16} {m.fast_Bps / GB:.1f} GB/s (measured)"]
        lines += [f"{'link':<16} {f'{m.link_Bps / GB:.1f} GB/s (measured)' if m.link_Bps else 'none: no GPU'}"]
        lines += [f"{'disk':<16} {m.disk_Bps / GB:.2f} GB/s ({m.sources['disk_Bps']}), {size(m.disk_bytes or 0)} free"]
        lines += [f"{'GPU':<16} {self.card or self.gpu or 'none that torch can use'}"]
        return "\n".join([*lines, *(f"{'yes' if f.works else 'no ':<4} {f.what}: {f.why}" for f in self.findings)])


def examine(cached: bool = True) -> Checkup:
    """Examine this machine; bandwidths are measured once and kept, and `cached=False` measures them again."""
    machine = probe.probe(cached)
    total, _ = probe.memory_nbytes()
    model, flags = processor()
    extensions = ", ".join(name for flag, name in FEATURES.items() if flag in flags) or "no known vector extensions"
    versions = {
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()}",
        **{name: version or MISSING for name, version in installed(PACKAGES).items()},
    }
    card = _card() if cuda.obstacle() is None else None
    return Checkup(
        versions=versions,
        processor=f"{model} ({extensions})",
        threads=probe.threads_here(),
        memory_nbytes=total,
        gpu=probe.gpu_name(),
        card=card,
        machine=machine,
        findings=tuple(_findings(versions, machine, total, card)),
    )


def _card() -> Card:
    """The first GPU, with its link measured."""
    gpu = cuda.describe()
    sm = f"sm_{gpu.sm[0]}{gpu.sm[1]}"
    return Card(
        name=gpu.name,
        sm=sm,
        total_nbytes=gpu.total_nbytes,
        free_nbytes=gpu.free_nbytes,
        dtype=gpu.dtype,
        link_Bps=cuda.link_bandwidths(),
    )


def installed(packages: Iterable[str]) -> dict[str, str | None]:
    """Version of each package, None if it is not installed."""
    versions = dict.fromkeys(packages)
    for name in versions:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return versions


def processor() -> tuple[str, set[str]]:
    """Name and feature flags of the processor; on systems other than Linux, its name alone."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine(), set()
    pairs = (line.split(":", 1) for line in lines if ":" in line)
    info = {key.strip(): value.strip() for key, value in pairs}
    return info.get("model name", platform.machine()), set(info.get("flags", info.get("Features", "")).split())


def _findings(versions: dict[str, str], machine: Hardware, total: int, card: Card | None) -> list[Finding]:
    compiled = importlib.util.find_spec("numba") is not None
    major, minor = (int(part) for part in versions["transformers"].split(".")[:2])
    supported = (5, 8) <= (major, minor) < (6, 0)
    direct = "direct" in machine.sources["disk_Bps"]
    return [
        Finding(
            "experts backend of transformers",
            supported,
            f"transformers {versions['transformers']}; 5.8 to 5.x is needed",
        ),
        Finding(
            "compiled products on the CPU",
            compiled,
            "numba is installed" if compiled else "without numba weights are dequantized by torch: pip install numba",
        ),
        *_gpu_findings(card, versions),
        Finding(
            "reads past the page cache",
            direct,
            "the disk supports direct I/O" if direct else "the file system refuses it: reads use the page cache",
        ),
        *(_fit(name, scheme) for name, scheme in (("Mixtral-8x7B", "mixed"), ("Mixtral-8x7B", "small"))),
    ]


def _gpu_findings(card: Card | None, versions: dict[str, str]) -> list[Finding]:
    """What works on a GPU, and what does not."""
    if card is None:
        return [Finding("GPU", False, f"{cuda.obstacle()}; the CPU computes, and the fast tier is in RAM")]
    bfloat16 = card.dtype == "bfloat16"
    triton = versions["triton"] != MISSING
    pinned, pageable = card.link_Bps["pinned"], card.link_Bps["pageable"]
    return [
        Finding("GPU", True, f"{card.name} serves experts; untested on real GPUs: docs/gpu.md has the command"),
        Finding(
            "bf16 on the GPU",
            bfloat16,
            f"{card.sm} has it" if bfloat16 else f"{card.sm} only emulates it: float16 is used",
        ),
        Finding(
            "fused products on the GPU",
            triton,
            f"triton {versions['triton']}" if triton else "without triton weights are dequantized: pip install triton",
        ),
        Finding(
            "page-locked RAM",
            pinned > PINNED_PAYS * pageable,
            f"copies run at {pinned / GB:.1f} GB/s, from pageable RAM at {pageable / GB:.1f}"
            + (": WSL2 allows little of it" if cuda.is_wsl() else ""),
        ),
    ]


def _fit(name: str, scheme: str) -> Finding:
    """Whether a well-known model fits this machine, by a plan."""
    from mixoff.planning import planner

    plan = planner.plan(f"mistralai/{name}-Instruct-v0.1", scheme=scheme, hardware="here")
    speed = plan.tokens_per_s["expected"]
    rate = f", {speed:.1f} tokens/s (modelled)" if speed else ""
    why = f"{plan.slots_per_layer} of {plan.experts_per_layer} experts of a layer in the fast tier{rate}"
    return Finding(f"{name} as `{scheme}`", plan.fits, why if plan.fits else plan.advice[0])
