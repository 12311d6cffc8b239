"""Memories and links: of well-known machines as they are reported, and of this one as it is measured.

Sizes are in bytes, bandwidths in bytes a second. `sources` of a `Hardware` says of every figure where it comes from:
`measured` (here, by the functions below), `reported` (by whom) or `assumed` (replace it by your own).

Does not know models.
"""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass, field

from mixoff.errors import MixoffError, suggestion
from mixoff.units import GB, GIB, MIB, format_nbytes


@dataclass(frozen=True)
class Hardware:
    """A machine as a plan sees it.

    device: `cuda`, where the fast tier is the card's memory, or `cpu`, where it is a share of RAM. fast_bytes,
    ram_bytes, disk_bytes: sizes; ram_bytes is 0 on a CPU, whose RAM is the fast tier already; disk_bytes None is not
    known. fast_Bps: read bandwidth of the fast tier. link_Bps: from RAM to the fast tier, None on a CPU. disk_Bps:
    large direct reads. reserved_nbytes: kept free for what no plan counts, the CUDA context or the interpreter.
    python_s: seconds of a step of `python_speed`'s loop, None where it is not known. threads: that compute together.
    """

    name: str
    device: str
    fast_bytes: int
    ram_bytes: int
    disk_bytes: int | None
    fast_Bps: float
    link_Bps: float | None
    disk_Bps: float
    compute_dtype: str
    reserved_nbytes: int
    sources: dict[str, str] = field(default_factory=dict)
    python_s: float | None = None
    threads: int = 1

    def to_dict(self) -> dict:
        """All figures under their names, `sources` among them."""
        return asdict(self)

    def __str__(self) -> str:
        sizes = f"{format_nbytes(self.fast_bytes)} at {self.fast_Bps / GB:.0f} GB/s"
        if self.link_Bps:
            sizes += f", RAM {format_nbytes(self.ram_bytes)} behind a link of {self.link_Bps / GB:.0f} GB/s"
        return f"{self.name}: {self.device}, fast memory {sizes}, disk {self.disk_Bps / GB:.1f} GB/s"


# Machines by name -----------------------------------------------------------------------------------------------------

BAM = "reported: authors of BaM, GitHub ZaidQureshi/bam #54, pinned copies"
NVIDIA = "reported: NVIDIA's data sheet, nominal"
NVME = "reported: vendors, 3 to 7 GB/s for large sequential reads; the lower end"
CONTEXT = (
    "reported: PyTorch #107667 (context about 300 MB since CUDA 11.7) and #95668 (cuBLAS 8.5 MB); "
    "the rest is assumed, for fragments of the allocator"
)
CUDA_RESERVED = 512 * MIB
CPU_RESERVED = 768 * MIB  # interpreter, torch and transformers: 0.4 GiB of anonymous memory, and their libraries
INTERPRETER = "measured: interpreter, torch and transformers before a model is loaded, docs/plan.md"
PRIVATE_RAM = "assumed: what is free of 32 GB; give yours with --ram"


def _card(name: str, fast_GiB: float, memory_GBps: float, link_GBps: float, **own: str) -> Hardware:
    sources = {
        "fast_bytes": NVIDIA, "ram_bytes": PRIVATE_RAM, "disk_bytes": "not known: give it with --disk",
        "fast_Bps": NVIDIA, "link_Bps": BAM, "disk_Bps": NVME, "reserved_nbytes": CONTEXT,
    }  # fmt: skip
    sizes = int(fast_GiB * GIB), 28 * GB, None
    speeds = memory_GBps * GB, link_GBps * GB, 3.0 * GB
    return Hardware(name, "cuda", *sizes, *speeds, "bfloat16", CUDA_RESERVED, sources | own)


def _colab_t4() -> Hardware:
    sources = {
        "fast_bytes": "reported: TensorFlow #51951, what CUDA shows of 16 GB",
        "ram_bytes": "reported: Colab's free machine has 12.7 GB, about 11 of them free",
        "disk_bytes": "not known: give it with --disk",
        "fast_Bps": "reported: NVIDIA's data sheet, nominal",
        "link_Bps": BAM + ", PCIe 3.0 x16",
        "disk_Bps": "assumed: no published figure was found; `mixoff doctor` measures it",
        "reserved_nbytes": CONTEXT,
    }
    speeds = 320.0 * GB, 12.0 * GB, 0.5 * GB
    return Hardware("t4", "cuda", int(14.75 * GIB), 11 * GB, None, *speeds, "float16", CUDA_RESERVED, sources)


def _laptop() -> Hardware:
    sources = {
        "fast_bytes": "assumed: what is free of 16 GB of RAM; give yours with --fast",
        "ram_bytes": "none: RAM is the fast tier",
        "disk_bytes": "not known: give it with --disk",
        "fast_Bps": "assumed: two channels of DDR4-3200 have 51 GB/s nominal, of which a loop reads about 35",
        "disk_Bps": NVME,
        "reserved_nbytes": INTERPRETER,
    }
    return Hardware("laptop", "cpu", 12 * GB, 0, None, 35.0 * GB, None, 3.0 * GB, "float32", CPU_RESERVED, sources)


_PCIE4, _PCIE5 = {"link_Bps": BAM + ", PCIe 4.0 x16"}, {"link_Bps": "assumed: 50 of 63 GB/s nominal, PCIe 5.0 x16"}
NAMED = {
    hardware.name: hardware
    for hardware in (
        _colab_t4(),
        _card("rtx-3060", 12, 360, 12, link_Bps=BAM + ", PCIe 3.0 x16"),
        _card("rtx-3080-mobile", 16, 448, 12, link_Bps="assumed: PCIe 4.0 x8, the width in most laptops"),
        _card("rtx-3090", 24, 936, 25, **_PCIE4),
        _card("rtx-4060-laptop", 8, 256, 12, link_Bps="assumed: PCIe 4.0 x8"),
        _card("rtx-4090", 24, 1008, 25, **_PCIE4),
        _card("l4", 24, 300, 25, **_PCIE4),
        _card("a100", 40, 1555, 25, ram_bytes="assumed: a share of a server's RAM; give yours with --ram", **_PCIE4),
        _card("h100", 80, 3350, 50, ram_bytes="assumed: a share of a server's RAM; give yours with --ram", **_PCIE5),
        _laptop(),
    )
}


def named_as(name: str) -> str:
    """The name in NAMED, or `here`, that is written so or nearly so. Raises MixoffError, which lists the names.

    >>> named_as("RTX 4090"), named_as("rtx4090"), named_as("here")
    ('rtx-4090', 'rtx-4090', 'here')
    """
    known = {re.sub(r"[\W_]", "", full): full for full in (*NAMED, "here")}
    if full := known.get(re.sub(r"[\W_]", "", name.lower())):
        return full
    names = f"choose one of {', '.join(NAMED)}, or 'here' to measure this machine"
    raise MixoffError(f"no hardware {name!r}: {names}{suggestion(name, known.values())}")
