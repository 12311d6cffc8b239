"""Ten minutes on a card: what this code does there, next to what the model predicts.

    python3 go.py gpu                              on this machine's card; without one it says so and ends with 1
    python3 go.py gpu --minutes 3                  begins no section after three minutes
    python benchmarks/gpu_check.py --rehearse      the same code on the CPU, small: its figures mean nothing

Needs no network. What tells most comes first: the link, what hides behind products, the host's time per call, the tests
marked `gpu`, kernels, loading again, tokens. A section that fails becomes a line, and the next one begins. A table is
printed, and everything is written to one JSON file, which names the card and versions but no person, host or folder.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

import _table
import mixoff
from kernel_table import cold_weights
from mixoff import kernels
from mixoff.bench import doctor, synthetic
from mixoff.loading.load import measured as measured_sizes
from mixoff.planning import probe, speed
from mixoff.planning.hardware import NAMED, Hardware
from mixoff.quantize.tensor import QTensor
from mixoff.shapes.kv_cache import advance, begin
from mixoff.transfer import cuda
from mixoff.transfer.mailbox import Mailbox
from mixoff.units import GB, GIB, MIB

ROOT = Path(__file__).resolve().parent.parent
VERSIONS = ("torch", "triton", "transformers", "numba", "mixoff")
TOKENS = 24  # decoded per setting; the first half only warms up
SHARES = (1.0, 0.6, 0.3)  # of all experts, for which there are slots
CALLS = ("cudaLaunchKernel", "cuLaunchKernel", "cuLaunchKernelEx", "cudaLaunchKernelExC", "cudaGraphLaunch")
SYNCS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize")


@dataclass(frozen=True)
class Row:
    """A figure. measured, modelled: in `unit`; None where there is none. error: what ended the section instead."""

    section: str
    what: str
    unit: str
    measured: float | None = None
    modelled: float | None = None
    error: str | None = None


class Host:
    """A device for rehearsals: memory is RAM, and copies are done when `copy` returns."""

    where = torch.device("cpu")
    copying = returning = None

    def empty(self, nbytes: int) -> torch.Tensor:
        return torch.empty(nbytes, dtype=torch.uint8)

    pinned = empty

    def unpin(self, memory: torch.Tensor) -> None: ...

    def synchronize(self) -> None: ...

    def event(self) -> Host:
        return self

    computing = event

    def record_event(self, event: Host) -> None: ...

    def copy(self, stream: None, target: torch.Tensor, source: torch.Tensor) -> None:
        target.copy_(source)


@dataclass
class Bench:
    """Where and how things are timed. found: figures of earlier sections, by name; end: when no section begins."""

    device: Any
    on_card: bool
    end: float = float("inf")
    found: dict[str, float] = field(default_factory=dict)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype to compute in."""
        return getattr(torch, self.device.describe().dtype) if self.on_card else torch.float32

    def size(self, on_card: int, rehearsed: int) -> int:
        """A size for the card, or for a rehearsal."""
        return on_card if self.on_card else rehearsed

    def seconds(self, work: Callable[[], object], launches: int = 20) -> float:
        """Seconds of one call by the card's clock, all calls queued before it starts."""
        for _ in range(3):
            work()
        return probe.device_seconds(work, launches) if self.on_card else self.host_seconds(work, launches)

    def host_seconds(self, work: Callable[[], object], calls: int = 200) -> float:
        """Seconds of the host for one call that may only queue."""
        work()
        self.device.synchronize()
        start = time.perf_counter()
        for _ in range(calls):
            work()
        took = (time.perf_counter() - start) / calls
        self.device.synchronize()
        return took

    def copy(self, *moves: tuple[str, torch.Tensor, torch.Tensor]) -> None:
        """Queue (stream's name, target, source) after what computes now, and make later products wait for all."""
        streams = [getattr(self.device, name) for name, _, _ in moves]
        now = torch.cuda.current_stream() if self.on_card else None
        for stream, (_, target, source) in zip(streams, moves, strict=True):
            if now:
                stream.wait_stream(now)
            self.device.copy(stream, target, source)
        for stream in streams if now else ():
            now.wait_stream(stream)


# Sections -------------------------------------------------------------------------------------------------------------


def link(bench: Bench) -> Iterator[Row]:
    """Page-locking, copies each way, and both ways at once, which the way back relies on."""
    n = bench.size(512 * MIB, MIB)
    start = time.perf_counter()
    memory = bench.device.pinned(2 * n)
    yield Row("link", "page-locking RAM", "GiB/s", 2 * n / GIB / (time.perf_counter() - start))
    there, gone = bench.device.empty(n), bench.device.empty(n)
    into, back = ("copying", there, memory[:n]), ("returning", memory[n:], gone)
    to, fro, both = (
        bench.seconds(lambda moves=moves: bench.copy(*moves), 4) for moves in ((into,), (back,), (into, back))
    )
    bench.device.unpin(memory)
    bench.found["link_Bps"] = n / to
    named = like(bench)
    yield Row("link", "RAM to card", "GB/s", n / to / GB, named and named.link_Bps and named.link_Bps / GB)
    yield Row("link", "card to RAM", "GB/s", n / fro / GB, named and named.link_Bps and named.link_Bps / GB)
    yield Row("link", "both ways at once, time over the longer one's", "", both / max(to, fro), 1.0)


def overlap(bench: Bench) -> Iterator[Row]:
    """Whether a copy hides behind products."""
    n, width = bench.size(128 * MIB, MIB), bench.size(2048, 64)
    memory, target = bench.device.pinned(n), bench.device.empty(n)
    x = torch.randn(width, width, dtype=bench.dtype, device=bench.device.where)

    def products() -> None:
        for _ in range(bench.size(100, 2)):
            torch.mm(x, x)

    def both() -> None:
        now = torch.cuda.current_stream() if bench.on_card else None
        if now:
            bench.device.copying.wait_stream(now)
        bench.device.copy(bench.device.copying, target, memory)
        products()
        if now:
            now.wait_stream(bench.device.copying)

    a, b, c = (bench.seconds(work, 3) for work in (products, lambda: bench.copy(("copying", target, memory)), both))
    bench.device.unpin(memory)
    yield Row("overlap", "share of a copy hidden by products", "", (a + b - c) / min(a, b), 1.0)


def host(bench: Bench) -> Iterator[Row]:
    """The host's time per call: decoding is bound by it."""
    where = bench.device.where
    x, w = torch.zeros(1, 4096, dtype=bench.dtype, device=where), QTensor.empty((4096, 4096), 4, 64).to(where)
    chosen, weights = torch.tensor([[3, 1]], device=where), torch.zeros(1, 2, dtype=bench.dtype, device=where)
    box = Mailbox(bench.device)
    calls = {
        "an addition": lambda: torch.add(x, x),
        "a product with 4 bits": lambda: kernels.linear(x, w),
        "a router's choice brought to the host": lambda: box.bring(chosen, weights),
    }
    for name, work in calls.items():
        yield Row("host", name, "us", 1e6 * bench.host_seconds(work, bench.size(200, 3)))
    box.close()


def tests(bench: Bench) -> Iterator[Row]:
    """The tests marked `gpu`: exactness, the order of events, memory."""
    if not bench.on_card:
        return
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "-m",
        "gpu",
        "tests/transfer/test_gpu.py",
    ]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    for name in re.findall(r"^(?:FAILED|ERROR) \S+::(\S+)", ran.stdout, re.MULTILINE):
        yield Row("tests", name, "", error="failed")
    counts = {word: int(n) for n, word in re.findall(r"(\d+) (passed|failed|error)", ran.stdout)}
    yield Row("tests", "passed", "", float(counts.get("passed", 0)))
    yield Row("tests", "failed", "", float(counts.get("failed", 0) + counts.get("error", 0)), 0.0)


def products(bench: Bench) -> Iterator[Row]:
    """Products of one and four rows, cold, next to what a plain sum reads."""
    values = torch.ones(bench.size(1 << 28, 1 << 12), device=bench.device.where)
    read_Bps = bench.found["read_Bps"] = 4 * values.numel() / bench.seconds(values.sum, 5)
    del values
    named, share = like(bench), speed.EFFICIENCY["cuda"]["expected"].shares
    yield Row("products", "a sum reads", "GB/s", read_Bps / GB, named and named.fast_Bps / GB)
    shapes = {"down": (4096, 14336), "gate and up": (28672, 4096)} if bench.on_card else {"down": (128, 64)}
    for (name, shape), (bits, group) in ((s, form) for s in shapes.items() for form in ((2, 32), (4, 64))):
        weights = [w.to(bench.device.where) for w in cold_weights(shape, bits, group, bench.size(256 * MIB, 1))]
        for rows in (1, 4):
            x = (torch.randn(rows, shape[1], device=bench.device.where) / 10).to(bench.dtype)
            what, turn = f"{name} {shape[0]}x{shape[1]}, {bits} bits, rows {rows}", iter(range(10**6))
            took = bench.seconds(lambda x=x, ws=weights, i=turn: kernels.linear(x, ws[next(i) % len(ws)]), 40)
            floor = weights[0].nbytes / (read_Bps * share[bits])
            yield Row("products", what, "us", 1e6 * took, 1e6 * floor)
            true = x.float() @ weights[0].dequantize(torch.float32).t()
            error = (kernels.linear(x, weights[0]).float() - true).abs().max() / true.abs().max()
            yield Row("products", f"{what}: largest error over the largest output", "", float(error))


def again(bench: Bench) -> Iterator[Row]:
    """A third load in one process plans what the first did."""
    budgets = []
    with stored("tiny-mixtral") as store:
        for _ in range(3):
            model = mixoff.load(store, "auto" if bench.on_card else "4MB", device=bench.device.where.type)
            budgets.append(model.mixoff.fast_bytes)
            model.mixoff.close()
    yield Row("again", "third load's budget over the first's", "", budgets[2] / budgets[0], 1.0)


def tokens(bench: Bench) -> Iterator[Row]:
    """Decoding with slots for all experts, 60 % and 30 % of them, each next to the prediction at its hit rate."""
    with stored("mixtral-3b" if bench.on_card else "tiny-mixtral") as store, torch.inference_mode():
        machine, first = as_measured(bench, store), None
        source = mixoff.store.source.open_source(store)
        experts = sum(site.num_experts * site.expert_nbytes for site in source.sites)
        source.close()
        for share in SHARES:
            how = {"device": bench.device.where.type, "prefetch": "none"}
            with mixoff.load(store, int(share * experts) + bench.size(16 * MIB, MIB // 2), **how) as model:
                took, said = decode(model, bench.size(TOKENS, 4))
                info, what = model.mixoff.info(), f"slots for {share:.0%} of the experts"
                asked = max(info.hits + info.misses, 1)
                made = speed.predict(store, None, machine, info.hits / asked)
                yield Row("tokens", what, "tokens/s", 1 / took, made.tokens_per_s)
                replayed = float(info.decode == "one graph per token")
                yield Row("tokens", f"{what}: one graph per token", "", replayed, float(bench.on_card and share == 1))
                if bench.on_card:
                    yield from profiled(model, what)
            first = said if first is None else first
            yield Row("tokens", f"{what}: share of logits equal to the resident model's", "", float(said == first), 1.0)


SECTIONS = (link, overlap, host, tests, products, again, tokens)


# What they need -------------------------------------------------------------------------------------------------------


def decode(model: Any, count: int) -> tuple[float, list[bytes]]:
    """Median seconds of the later half of `count` tokens, and their logits as bytes."""
    ids = torch.arange(5, 37, device=model.device)[None] % model.config.vocab_size
    _, cache = advance(model, ids, begin(model, 32 + count), logits_to_keep=1)
    took, said = [], []
    for i in range(count):
        start = time.perf_counter()
        logits, cache = advance(model, ids[:, i % 32 : i % 32 + 1], cache, logits_to_keep=1)
        said.append(logits.float().cpu().numpy().tobytes())  # waits for the card
        took.append(time.perf_counter() - start)
        if i == count // 2:
            model.mixoff.reset_counts()
    return statistics.median(took[count // 2 + 1 :]), said


def profiled(model: Any, what: str) -> Iterator[Row]:
    """Launches, synchronisations and the card's own time per token."""
    from torch.profiler import ProfilerActivity, profile

    ids, cache = torch.tensor([[7]], device=model.device), begin(model, 8)
    for _ in range(4):  # a prompt, a token that warms up, one that is captured, one more
        _, cache = advance(model, ids, cache)
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as seen:
        for _ in range(2):
            _, cache = advance(model, ids, cache)
        torch.cuda.synchronize()
    events = list(seen.events())
    on_card = [e for e in events if str(e.device_type).endswith("CUDA") and "Mem" not in e.name]
    yield Row("tokens", f"{what}: launches", "per token", sum(e.name in CALLS for e in events) / 2)
    yield Row("tokens", f"{what}: waits of the host", "per token", sum(e.name in SYNCS for e in events) / 2)
    busy = sum(e.time_range.elapsed_us() for e in on_card) / 2
    yield Row("tokens", f"{what}: card computes", "ms per token", busy / 1000)


@contextmanager
def stored(shape: str) -> Iterator[Path]:
    """A store of random weights in scheme `mixed`, removed afterwards."""
    with tempfile.TemporaryDirectory(prefix="mixoff-gpu-") as folder:
        yield synthetic.write_store(shape, "paper" if shape == "tiny-mixtral" else "mixed", Path(folder) / "store")


def like(bench: Bench) -> Hardware | None:
    """The named machine with this card, for what was reported of it."""
    if not bench.on_card:
        return None
    words = set(re.findall(r"\w+", bench.device.describe().name.lower()))
    return next((made for name, made in NAMED.items() if set(name.split("-")) <= words), None)


def as_measured(bench: Bench, folder: Path) -> Hardware:
    """This machine with the bandwidths of earlier sections, for predictions."""
    if not bench.on_card:
        return probe.named("laptop")
    machine = replace(measured_sizes(bench.device.describe()), disk_Bps=probe.disk_bandwidth(folder.parent))
    figures = {"fast_Bps": bench.found.get("read_Bps"), "link_Bps": bench.found.get("link_Bps")}
    return replace(machine, **{name: Bps for name, Bps in figures.items() if Bps})


def clean(text: str) -> str:
    """One line of a message, without folders or files.

    >>> clean("no room in /home/ada/x.bin: give up\\nat line 3")
    'no room in (path): give up'
    """
    return re.sub(r"(?:[A-Za-z]:)?[\w.~-]*[/\\][\w./\\~-]+", "(path)", text.strip().partition("\n")[0])[:200]


def run(bench: Bench, sections: tuple = SECTIONS) -> list[Row]:
    """Every section that begins in time, its figures printed as they come; an error ends only its own section."""
    rows: list[Row] = []
    print(_table.head("section", "what", "measured", "modelled", "unit"), flush=True)
    for section in sections:
        name = section.__name__
        if time.monotonic() > bench.end:
            rows.append(Row(name, "not begun", "", error="the time is over"))
            print(line(rows[-1]), flush=True)
            continue
        try:
            for row in section(bench):
                rows.append(row)
                print(line(row), flush=True)
        except Exception as error:  # whatever a card, its driver or a kernel raises
            rows.append(Row(name, "ended early", "", error=f"{type(error).__name__}: {clean(str(error))}"))
            print(line(rows[-1]), flush=True)
    return rows


def line(row: Row) -> str:
    """A row of the table."""
    figures = ["-" if x is None else f"{x:.3g}" for x in (row.measured, row.modelled)]
    return _table.line([row.section, row.what, *([row.error, ""] if row.error else figures), row.unit])


def report(bench: Bench, rows: list[Row]) -> dict:
    """Everything as plain values."""
    card = bench.device.describe() if bench.on_card else None
    machine = {"card": card and card.name, "sm": card and card.sm, "total_nbytes": card and card.total_nbytes}
    machine |= {"cores": probe.threads_here(), "memory_nbytes": probe.memory_nbytes()[0]}
    return {
        "rehearsal": not bench.on_card,
        "machine": machine,
        "versions": doctor.installed(VERSIONS),
        "rows": [asdict(row) for row in rows],
    }


def main(arguments: list[str] | None = None) -> int:
    """Run and print; returns the exit code: 1 without a card, or if a section failed."""
    parser = _table.parser(__doc__)
    parser.add_argument("--minutes", type=float, default=10, help="no section begins later")
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "gpu.json", help="file for all figures")
    parser.add_argument("--rehearse", action="store_true", help="run the code on the CPU, small")
    args: argparse.Namespace = parser.parse_args(arguments)
    why = cuda.obstacle()
    if why is not None and not args.rehearse:
        print(f"nothing to check: {why}", file=sys.stderr)
        return 1
    device = Host() if args.rehearse else cuda.Cuda(0)
    bench = Bench(device, not args.rehearse, time.monotonic() + 60 * args.minutes)
    with ExitStack() as quiet:
        from transformers.utils import logging

        logging.disable_progress_bar()
        quiet.callback(logging.enable_progress_bar)
        rows = run(bench)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(report(bench, rows), indent=1) + "\n", encoding="utf-8")
    if args.rehearse:
        print("\nThis was a rehearsal on the CPU: its figures mean nothing.")
    return int(any(row.error for row in rows))


if __name__ == "__main__":
    sys.exit(main())
