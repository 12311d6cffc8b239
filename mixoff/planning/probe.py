"""This machine, measured: memory, disk, link, and how fast Python runs."""

from __future__ import annotations

import functools
import json
import mmap
import os
import platform
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import psutil

from mixoff.errors import MixoffError
from mixoff.folders import cache_folder
from mixoff.planning.hardware import CONTEXT, CPU_RESERVED, CUDA_RESERVED, INTERPRETER, NAMED, Hardware, named_as
from mixoff.units import MIB, PAGE, format_nbytes

SECTIONS = 8  # requests per round, at least
SPIN = 40_000_000  # cycles, 20 to 30 ms of a card: longer than a host takes to queue a hundred launches


def named(name: str) -> Hardware:
    """The machine of that name; `here` measures this one, once. Raises MixoffError, which lists the names."""
    return probe() if (name := named_as(name)) == "here" else NAMED[name]


# Sizes of this machine ------------------------------------------------------------------------------------------------


def memory_nbytes() -> tuple[int, int]:
    """(Total, free) bytes of RAM for this process: the machine's, or its control group's if smaller."""
    machine, limit = psutil.virtual_memory(), cgroup_limit()
    if limit is None or limit[0] >= machine.total:
        return machine.total, machine.available
    return limit[0], min(machine.available, limit[0] - limit[1])


def cgroup_limit(root: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> tuple[int, int] | None:
    """(Limit, bytes used) of this process's control group with the lowest memory limit; None without a limit.

    Reads both versions of Linux's interface: `memory.max`, and `memory.limit_in_bytes`. Cached files that may be
    dropped (`inactive_file`) do not count as used.
    """
    try:
        lines = [line.split(":", 2) for line in own.read_text(encoding="utf-8").splitlines()]
    except OSError:
        return None
    limits = []
    for _, controllers, path in lines:
        v1 = "memory" in controllers.split(",")
        if v1 or not controllers:
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes") if v1 else ("memory.max", "memory.current")
            limits += _limits(root / "memory" if v1 else root, path.strip("/"), *names)
    return min(limits, default=None)


def _limits(base: Path, path: str, limit: str, usage: str) -> list[tuple[int, int]]:
    """Limit and use of a control group and of each group around it."""
    folders = [base, *(base / part for part in _prefixes(path))]
    limits = []
    for folder in folders:
        try:
            texts = [(folder / name).read_text(encoding="ascii") for name in (limit, usage, "memory.stat")]
            most, used, stat = texts[0].strip(), int(texts[1]), dict(line.split() for line in texts[2].splitlines())
        except (OSError, ValueError):
            continue
        if most != "max":
            dropped = int(stat.get("total_inactive_file", stat.get("inactive_file", 0)))
            limits.append((int(most), max(used - dropped, 0)))
    return limits


def _prefixes(path: str) -> list[str]:
    parts = path.split("/") if path else []
    return ["/".join(parts[: i + 1]) for i in range(len(parts))]


def threads_here() -> int:
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


# Bandwidths of this machine -------------------------------------------------------------------------------------------


def read_bandwidth(threads: int | None = None, nbytes: int = 1 << 30, rounds: int = 5) -> float:
    """Bytes per second that `threads` (default: all cores) read from memory, streaming over `nbytes`; the best round.

    The loop is compiled if numba is installed; otherwise it is NumPy's sum.
    """
    threads = threads_here() if threads is None else threads
    if threads < 1 or nbytes < 8 * threads or rounds < 1:
        raise MixoffError(
            f"cannot measure with {threads} threads, {nbytes} bytes, {rounds} rounds: at least one of each"
        )
    pieces, total = np.array_split(np.ones(nbytes // 8, np.int64), threads), _summation()
    total(pieces[0][:64])
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(total, pieces))
        return max(
            sum(p.nbytes for p in pieces) / _seconds(lambda: list(pool.map(total, pieces))) for _ in range(rounds)
        )


@functools.cache
def _summation() -> Callable[[np.ndarray], int]:
    """A function that sums an int64 array with the GIL released."""
    try:
        import numba
    except ImportError:
        return np.sum

    @numba.njit("int64(int64[::1])", nogil=True)
    def total(values: np.ndarray) -> int:
        result = 0
        for i in range(values.size):  # twice as fast as iterating over the values
            result += values[i]
        return result

    return total


def python_speed(steps: int = 15_000) -> float:
    """Seconds per step of a loop in Python, on this core, now.

    A virtual core that shares its physical core with a busy neighbour may take twice as long while memory is as fast as
    before. So this is measured in addition to the bandwidths.
    """
    start, x = time.perf_counter(), 0
    while x < steps:
        x += 1
    return (time.perf_counter() - start) / steps


def _seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def disk_bandwidth(
    folder: str | Path, request_nbytes: int = 16 << 20, depth: int = 1, nbytes: int = 512 << 20
) -> float:
    """Bytes per second of random reads of `request_nbytes`, `depth` at a time, past the page cache.

    Writes a file of `nbytes` to `folder` and removes it. If direct I/O is not possible (`direct_io`), the page cache is
    told to forget the file instead, so a file system in memory shows memory's speed. Raises MixoffError if the folder
    cannot be written.
    """
    if request_nbytes % PAGE or request_nbytes < PAGE or depth < 1:
        raise MixoffError(f"requests of {request_nbytes} bytes, {depth} at a time: use a multiple of {PAGE}, and one")
    nbytes = max(nbytes // request_nbytes, SECTIONS) * request_nbytes
    try:
        with tempfile.TemporaryDirectory(dir=folder, prefix=".mixoff-probe-") as probe:
            _fill(Path(probe) / "noise", nbytes)
            return _read_at_random(Path(probe) / "noise", nbytes, request_nbytes, depth)
    except OSError as error:
        raise MixoffError(f"cannot measure the disk in {folder}: {error.strerror or error}") from error


def _fill(path: Path, nbytes: int) -> None:
    """Write random content: some disks compress, and holes in a file are not read."""
    piece = np.random.default_rng(0).bytes(MIB)
    with path.open("wb") as file:
        for start in range(0, nbytes, MIB):
            file.write(piece[: min(MIB, nbytes - start)])
        file.flush()
        os.fsync(file.fileno())
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def direct_io(folder: str | Path) -> bool:
    """Whether files in `folder` can be read past the page cache."""
    if not hasattr(os, "O_DIRECT"):
        return False
    try:
        with tempfile.TemporaryDirectory(dir=folder, prefix=".mixoff-probe-") as probe:
            (Path(probe) / "page").write_bytes(b"0" * PAGE)
            os.close(os.open(Path(probe) / "page", os.O_RDONLY | os.O_DIRECT))
            return True
    except OSError:
        return False


def _read_at_random(path: Path, nbytes: int, request: int, depth: int) -> float:
    offsets = list(range(0, nbytes, request))
    random.Random(0).shuffle(offsets)
    extra = os.O_DIRECT if direct_io(path.parent) else 0
    buffers = [mmap.mmap(-1, request) for _ in range(depth)]

    def read(worker: int) -> None:  # each worker opens the file again, to have its own position
        with open(path, "rb", buffering=0, opener=lambda name, flags: os.open(name, flags | extra)) as file:
            for offset in offsets[worker::depth]:
                if hasattr(os, "preadv"):
                    os.preadv(file.fileno(), [buffers[worker]], offset)
                else:
                    file.seek(offset)
                    file.readinto(buffers[worker])

    with ThreadPoolExecutor(depth) as pool:
        return nbytes / _seconds(lambda: list(pool.map(read, range(depth))))


def link_bandwidth(nbytes: int = 64 << 20, rounds: int = 5) -> float | None:
    """Bytes per second of copies from pinned memory to the first GPU, timed by its events; None without a GPU.

    Never run on a GPU so far: see docs/plan.md.
    """
    import torch

    if not torch.cuda.is_available():
        return None
    source = torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)
    target = torch.empty(nbytes, dtype=torch.uint8, device="cuda")
    return nbytes / min(device_seconds(lambda: target.copy_(source, non_blocking=True)) for _ in range(rounds + 1))


def device_bandwidth(nbytes: int = 256 << 20, rounds: int = 5) -> float | None:
    """Bytes per second that the first GPU reads from its memory, summing an array; None without a GPU."""
    import torch

    if not torch.cuda.is_available():
        return None
    values = torch.ones(nbytes // 4, dtype=torch.float32, device="cuda")
    return nbytes / min(device_seconds(values.sum) for _ in range(rounds + 1))


def device_seconds(work: Callable[[], object], launches: int = 1) -> float:
    """Seconds of one of `launches` calls of `work` on the current CUDA device, by the device's clock.

    The device spins first, so that the host has queued every call before the clock starts: short work would otherwise
    be timed at the host's pace.
    """
    import torch

    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(SPIN)
    start.record()
    for _ in range(launches):
        work()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1000 / launches


# This machine ---------------------------------------------------------------------------------------------------------


BANDWIDTHS = ("ram_Bps", "device_Bps", "link_Bps", "disk_Bps")  # bandwidths among the stored figures


def _measured_in() -> Path:
    """The folder whose disk is measured: the cache folder, or the system's temporary folder if that is read-only."""
    folder = cache_folder()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return folder
    except OSError:
        return Path(tempfile.gettempdir())


def probe(cached: bool = True, folder: str | Path | None = None) -> Hardware:
    """This machine, measured: memory, disk (in `folder`, default the cache folder) and link, about ten seconds.

    Bandwidths are stored in the cache folder and reused while cores, RAM and GPU are the same; `cached=False` measures
    them again. Free memory is read at every call.
    """
    identity, path = _identity(), cache_folder() / "hardware.json"
    figures = _read_figures(path, identity) if cached and folder is None else None
    folder = Path(folder or _measured_in())
    if figures is None:
        figures = _measure(folder)
        _write_figures(path, identity, figures)
    return _here(figures, folder)


def _identity() -> dict:
    total, _ = memory_nbytes()
    return {"machine": platform.machine(), "threads": threads_here(), "memory_nbytes": total, "gpu": gpu_name()}


def gpu_name() -> str | None:
    """Name of the first GPU that torch can use, None without one."""
    import torch

    return torch.cuda.get_device_name(0) if torch.cuda.is_available() else None


def _measure(folder: Path) -> dict:
    return {
        "ram_Bps": read_bandwidth(),
        "device_Bps": device_bandwidth(),
        "link_Bps": link_bandwidth(),
        "disk_Bps": disk_bandwidth(folder),
        "direct": direct_io(folder),
        "python_s": statistics.median(python_speed() for _ in range(50)),
    }


def _read_figures(path: Path, identity: dict) -> dict | None:
    try:
        kept = json.loads(path.read_text(encoding="utf-8"))
        if kept["identity"] != identity:
            return None
        figures = kept["figures"]
        sound = all(isinstance(figures[name], float | None) for name in BANDWIDTHS) and figures["ram_Bps"]
        return figures if sound and figures["disk_Bps"] and isinstance(figures["direct"], bool) else None
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None


def _write_figures(path: Path, identity: dict, figures: dict) -> None:
    """Store the figures; if that fails, the next probe measures again."""
    try:
        path.write_text(json.dumps({"identity": identity, "figures": figures}, indent=1) + "\n", encoding="utf-8")
    except OSError:
        return


def _here(figures: dict, folder: Path) -> Hardware:
    total, free = memory_nbytes()
    reads = "direct reads of 16 MiB, one at a time" if figures["direct"] else "reads of 16 MiB through the page cache"
    sources = {
        "fast_Bps": "measured: streaming reads, best of 5",
        "disk_bytes": f"measured: free space of {folder}",
        "disk_Bps": f"measured: {reads}",
    }
    disk = psutil.disk_usage(str(folder)).free
    if figures["link_Bps"] is not None:
        return _here_cuda(figures, free, disk, sources)
    sources["fast_bytes"] = f"measured: free now of {format_nbytes(total)} of RAM"
    sources["reserved_nbytes"] = INTERPRETER
    if "python_s" in figures:
        sources["python_s"] = "measured: a loop in Python, median of 50"
    return Hardware(
        name="here",
        device="cpu",
        fast_bytes=free,
        ram_bytes=0,
        disk_bytes=disk,
        fast_Bps=figures["ram_Bps"],
        link_Bps=None,
        disk_Bps=figures["disk_Bps"],
        compute_dtype="float32",
        reserved_nbytes=CPU_RESERVED,
        sources=sources,
        python_s=figures.get("python_s"),
        threads=threads_here(),
    )


def _here_cuda(figures: dict, free: int, disk: int, sources: dict[str, str]) -> Hardware:
    """This machine with its first GPU, which computes in fp16 if it only emulates bf16, like a T4."""
    import torch

    fast = torch.cuda.get_device_properties(0).total_memory
    dtype = "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float16"
    sources |= {"fast_bytes": f"measured: memory of {gpu_name()}", "ram_bytes": "measured: free now"}
    sources |= {"link_Bps": "measured: pinned copies, best of 6", "reserved_nbytes": CONTEXT}
    return Hardware(
        name="here",
        device="cuda",
        fast_bytes=fast,
        ram_bytes=free,
        disk_bytes=disk,
        fast_Bps=figures["device_Bps"],
        link_Bps=figures["link_Bps"],
        disk_Bps=figures["disk_Bps"],
        compute_dtype=dtype,
        reserved_nbytes=CUDA_RESERVED,
        sources=sources,
    )
