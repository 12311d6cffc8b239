"""Memories and links of well-known machines, as reported.

Sizes are in bytes, bandwidths in bytes per second. `sources` of a `Hardware` gives the origin of each figure:
`measured` (by `probe`), `reported` (by whom) or `assumed` (replace it by your own).
"""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass, field

from mixoff.errors import MixoffError, suggestion
from mixoff.units import GB, GIB, MIB, format_nbytes


@dataclass(frozen=True)
class Hardware:
    """A machine as a plan sees it.

    Attributes
    ----------
    name: name in NAMED, or `here`
    device: `cuda`, where the fast tier is the card's memory, or `cpu`, where it is a share of RAM
    fast_bytes: size of the fast memory
    ram_bytes: size of RAM as another tier; 0 on a CPU, whose RAM is the fast memory
    disk_bytes: free disk space; None if unknown
    fast_Bps: read bandwidth of the fast memory
    link_Bps: bandwidth from RAM to the fast memory; None on a CPU
    disk_Bps: bandwidth of large direct reads
    compute_dtype: 16-bit dtype that a card computes in
    reserved_nbytes: fast memory kept free for what no plan counts: the CUDA context, or the interpreter
    sources: origin of each figure, by name
    python_s: seconds per step of the loop in `probe.python_speed`; None if unknown
    threads: threads that compute together
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
        """All figures by name, including `sources`."""
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
PAGEABLE = 2 * GIB  # RAM that page-locked copies leave: short of it, the system kills the process and no call fails
INTERPRETER = "measured: interpreter, torch and transformers before a model is loaded, docs/plan.md"
PRIVATE_RAM = "assumed: what is free of 32 GB; give yours with --ram"


def _card(name: str, fast_GiB: float, memory_GBps: float, link_GBps: float, **origins: str) -> Hardware:
    """A consumer or data-centre card. origins: sources that differ from the usual ones."""
    sources = {
        "fast_bytes": NVIDIA, "ram_bytes": PRIVATE_RAM, "disk_bytes": "not known: give it with --disk",
        "fast_Bps": NVIDIA, "link_Bps": BAM, "disk_Bps": NVME, "reserved_nbytes": CONTEXT,
    }  # fmt: skip
    return Hardware(
        name=name,
        device="cuda",
        fast_bytes=int(fast_GiB * GIB),
        ram_bytes=28 * GB,
        disk_bytes=None,
        fast_Bps=memory_GBps * GB,
        link_Bps=link_GBps * GB,
        disk_Bps=3.0 * GB,
        compute_dtype="bfloat16",
        reserved_nbytes=CUDA_RESERVED,
        sources=sources | origins,
    )


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
    return Hardware(
        name="t4",
        device="cuda",
        fast_bytes=int(14.75 * GIB),
        ram_bytes=11 * GB,
        disk_bytes=None,
        fast_Bps=320.0 * GB,
        link_Bps=12.0 * GB,
        disk_Bps=0.5 * GB,
        compute_dtype="float16",
        reserved_nbytes=CUDA_RESERVED,
        sources=sources,
    )


def _laptop() -> Hardware:
    sources = {
        "fast_bytes": "assumed: what is free of 16 GB of RAM; give yours with --fast",
        "ram_bytes": "none: RAM is the fast tier",
        "disk_bytes": "not known: give it with --disk",
        "fast_Bps": "assumed: two channels of DDR4-3200 have 51 GB/s nominal, of which a loop reads about 35",
        "disk_Bps": NVME,
        "reserved_nbytes": INTERPRETER,
    }
    return Hardware(
        name="laptop",
        device="cpu",
        fast_bytes=12 * GB,
        ram_bytes=0,
        disk_bytes=None,
        fast_Bps=35.0 * GB,
        link_Bps=None,
        disk_Bps=3.0 * GB,
        compute_dtype="float32",
        reserved_nbytes=CPU_RESERVED,
        sources=sources,
    )


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
    """The name in NAMED, or `here`, in its usual spelling. Raises MixoffError, which lists the names.

    >>> named_as("RTX 4090"), named_as("rtx4090"), named_as("here")
    ('rtx-4090', 'rtx-4090', 'here')
    """
    known = {re.sub(r"[\W_]", "", full): full for full in (*NAMED, "here")}
    if full := known.get(re.sub(r"[\W_]", "", name.lower())):
        return full
    names = f"choose one of {', '.join(NAMED)}, or 'here' to measure this machine"
    raise MixoffError(f"unknown hardware {name!r}: {names}{suggestion(name, known.values())}")
