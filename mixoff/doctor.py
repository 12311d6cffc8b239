"""What is installed, what the machine can do, what will work on it and what will not: the text to paste into an issue.

Nothing here is a secret: no names of users or machines, no tokens, no paths but the cache folder's.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import json
import platform
from dataclasses import asdict, dataclass
from pathlib import Path

from mixoff import hardware
from mixoff.hardware import GB, Hardware
from mixoff.units import format_nbytes

PACKAGES = (
    "mixoff", "torch", "transformers", "huggingface_hub", "accelerate", "safetensors", "numpy", "numba", "triton",
    "hqq", "ipywidgets", "anywidget",
)  # fmt: skip
FEATURES = {"avx2": "AVX2", "avx512f": "AVX-512", "avx512_vnni": "VNNI", "avx_vnni": "AVX-VNNI", "asimd": "NEON"}


@dataclass(frozen=True)
class Finding:
    """Whether something will work, and why."""

    what: str
    works: bool
    why: str


@dataclass(frozen=True)
class Checkup:
    """Versions, the machine as measured, and what follows; prints itself as text."""

    versions: dict[str, str]
    processor: str
    threads: int
    memory_nbytes: int
    gpu: str | None
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
        lines += [f"{'disk':<16} {m.disk_Bps / GB:.2f} GB/s ({m.sources['disk_Bps']}), {size(m.disk_bytes)} free"]
        lines += [f"{'GPU':<16} {self.gpu or 'none that torch can use'}"]
        return "\n".join([*lines, *(f"{'yes' if f.works else 'no ':<4} {f.what}: {f.why}" for f in self.findings)])


def examine(cached: bool = True) -> Checkup:
    """Look at this machine; bandwidths are measured once and kept, `cached=False` measures them anew."""
    machine = hardware.probe(cached)
    total, _ = hardware.memory_nbytes()
    model, flags = _processor()
    known = ", ".join(name for flag, name in FEATURES.items() if flag in flags) or "no vector extension known to us"
    found = {"python": platform.python_version(), "system": f"{platform.system()} {platform.release()}"} | _versions()
    findings = tuple(_findings(found, machine, total))
    return Checkup(found, f"{model} ({known})", hardware.threads_here(), total, hardware.gpu_name(), machine, findings)


def _versions() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        found[name] = "not installed"
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def _processor() -> tuple[str, set[str]]:
    """Name and feature flags, as Linux tells them; elsewhere what Python knows."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine(), set()
    fields = dict(line.split(":", 1) for line in lines if ":" in line)
    found = {key.strip(): value.strip() for key, value in fields.items()}
    return found.get("model name", platform.machine()), set(found.get("flags", found.get("Features", "")).split())


def _findings(versions: dict[str, str], machine: Hardware, total: int) -> list[Finding]:
    compiled = importlib.util.find_spec("numba") is not None
    major, minor = (int(part) for part in versions["transformers"].split(".")[:2])
    supported = (5, 8) <= (major, minor) < (6, 0)
    direct = "direct" in machine.sources["disk_Bps"]
    return [
        Finding(
            "experts backend of transformers",
            supported,
            f"transformers {versions['transformers']}, and 5.8 to 5.x is needed",
        ),
        Finding(
            "compiled products on the CPU",
            compiled,
            "numba is installed" if compiled else "without numba weights are dequantized by torch: pip install numba",
        ),
        _gpu_finding(machine),
        Finding(
            "reads past the page cache",
            direct,
            "the disk takes direct I/O" if direct else "the file system refuses it: reads go through the page cache",
        ),
        *(_fit(name, scheme) for name, scheme in (("Mixtral-8x7B", "mixed"), ("Mixtral-8x7B", "small"))),
    ]


def _gpu_finding(machine: Hardware) -> Finding:
    if machine.device == "cpu":
        return Finding("GPU", False, "torch sees none: the CPU computes, and the fast tier is a share of RAM")
    return Finding(
        "GPU",
        False,
        "torch sees one, and this version computes on the CPU: `mixoff plan --hardware here` plans for the card",
    )


def _fit(name: str, scheme: str) -> Finding:
    """What a plan says of a well-known model on this machine."""
    from mixoff import planner

    plan = planner.plan(f"mistralai/{name}-Instruct-v0.1", scheme=scheme, hardware="here")
    speed = plan.tokens_per_s["expected"]
    rate = f", {speed:.1f} tokens/s (modelled)" if speed else ""
    why = f"{plan.slots_per_layer} of {plan.experts_per_layer} experts of a layer in the fast tier{rate}"
    return Finding(f"{name} as `{scheme}`", plan.fits, why if plan.fits else plan.advice[0])
