"""Contenders in turns: a store, its ablations and its peers, each run in its own process.

Before every run the read bandwidth of memory is probed, so that a noisy neighbour shows. Under a memory limit the files
of a contender are dropped from the page cache first, and the process runs inside a real limit.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from mixoff.bench import limits
from mixoff.bench.doctor import installed, processor
from mixoff.bench.report import Report, Row, row
from mixoff.bench.spec import Spec
from mixoff.checkpoints.find import find
from mixoff.errors import MixoffError
from mixoff.planning import hardware, planner, probe
from mixoff.planning.hardware import Hardware
from mixoff.planning.plan import Plan
from mixoff.planning.speed import predict
from mixoff.shapes import sizes
from mixoff.store import describe, manifest
from mixoff.store.readers import PIECE
from mixoff.store.source import open_source
from mixoff.transfer.tiers import WORKERS

# As in Table 2 of Eliseev and Mazur (arXiv 2312.17238); the last fetches every expert of a layer, as accelerate does.
ABLATIONS = {
    "full algorithm": {},
    "without pre-loading": {"prefetch": "none"},
    "without LRU cache and pre-loading": {"prefetch": "none", "policy": "none"},
    "naive offloading (layer by layer)": {"prefetch": "none", "policy": "none", "fetch": "layer"},
}
PEERS = ("transformers", "accelerate", "mmap")
PROBES = 5  # least number of streaming reads behind a roofline
TIMEOUT_S = 1800
# otherwise torch's OpenMP threads spin for milliseconds after each operation, on the cores that our kernels need
PASSIVE = {"OMP_WAIT_POLICY": "PASSIVE"}
ENVIRONMENT = {"mixoff": PASSIVE, "mmap": PASSIVE}
PACKAGE = Path(__file__).parents[2]  # folder from which a contender imports mixoff


@dataclass(frozen=True)
class Settings:
    """What to compare. Fields that are not listed are those of `Spec`.

    rounds: number of turns; in each, every contender runs once in a new process.
    fast_bytes: budget of our contenders; None for what the plan leaves of the limit, or of free memory.
    io: kind of reads of our contenders.
    memory_limit: bytes, page cache included.
    peers: names in PEERS.
    ablations: whether to run ABLATIONS.
    checkpoint: 16-bit folder for transformers and accelerate.
    gguf: file for llama.cpp.
    llama_bench: names and commands of llama.cpp's program `llama-bench` and of its forks'.
    name: public name of the model, None for a local folder.
    """

    store: str
    threads: int = 1
    prompt_tokens: int = 64
    tokens: int = 32
    rounds: int = 3
    warmup: int = 8
    routing: str = "mixtral-8x7b"
    repeat: float | None = None
    fast_bytes: int | None = None
    io: str = "auto"
    memory_limit: int | None = None
    peers: tuple[str, ...] = ()
    ablations: bool = False
    checkpoint: str | None = None
    gguf: str | None = None
    llama_bench: tuple[tuple[str, str], ...] = ()
    name: str | None = None

    @property
    def context(self) -> int:
        """Tokens of one run, prompt included."""
        return self.prompt_tokens + self.tokens


def compare(settings: Settings, on_line: Callable[[str], None] = lambda line: None) -> Report:
    """Run every contender in turns; `on_line` gets a line per run. Raises MixoffError if a limit is not possible."""
    machine, scheme = _machine(settings), scheme_of(settings.store)
    plan = planner.plan(settings.store, hardware=machine, context=settings.context, scheme=scheme)
    specs = _specs(settings, plan)
    reports: dict[str, list[dict]] = {spec.name: [] for spec in specs}
    probes: list[float] = []
    disks: list[float] = []
    with limits.limit(settings.memory_limit) if settings.memory_limit else contextlib.nullcontext() as limit:
        for _ in range(settings.rounds):
            for spec in specs:
                probes += _probes(settings, len(specs))
                reports[spec.name].append(_run(spec, limit))
                on_line(f"{spec.name}: {_result(reports[spec.name][-1])}, memory {probes[-1] / 1e9:.1f} GB/s")
            ours = [runs[-1] for runs in reports.values() if runs[-1].get("kind") == "mixoff"]
            if any(sum(report.get("moved_bytes") or [0]) for report in ours):
                disks.append(probe.disk_bandwidth(Path(settings.store).parent, PIECE, WORKERS))
    machine = _as_measured(machine, probes, disks)
    plan = planner.plan(settings.store, hardware=machine, context=settings.context, scheme=scheme)
    last = reports[specs[0].name][-1]
    return Report(
        rows=tuple(_row(spec, reports[spec.name], machine, plan) for spec in specs),
        read_bandwidth_Bps=max(probes),
        probes_Bps=tuple(probes),
        disk_bandwidth_Bps=max(disks, default=None),
        memory_limit=settings.memory_limit,
        limit_kind=limit.kind if limit else None,
        settings={
            "model": settings.name or Path(settings.store).name,
            "threads": settings.threads,
            "runs": settings.rounds,
            "tokens": settings.tokens,
            "prompt_tokens": settings.prompt_tokens,
            "routing": settings.routing,
            "repeat": settings.repeat,
            "warmup": settings.warmup,
        },
        versions=versions(),
        name=settings.name,
        plan=plan,
        counters=last.get("counters", {}),
        time_line=last.get("time_line", []),
    )


def scheme_of(folder: str) -> str | None:
    """The scheme to plan with: None for a store or a quantized checkpoint, `none` for a plain checkpoint."""
    return None if find(folder).is_quantized else "none"


def versions() -> dict[str, str]:
    """System, processor and versions of the packages that a figure depends on."""
    packages = installed(("mixoff", "torch", "transformers", "accelerate", "numba", "numpy"))
    here = {"python": platform.python_version(), "system": platform.platform(), "processor": processor()[0]}
    return here | {name: version for name, version in packages.items() if version}


def _machine(settings: Settings) -> Hardware:
    """This machine for the plan: its GPU if it has one, otherwise RAM within the limit."""
    if probe.gpu_name():
        return probe.probe()
    _, free = probe.memory_nbytes()
    nbytes = settings.memory_limit or free
    sources = {"fast_bytes": "the memory limit" if settings.memory_limit else "free memory"}
    return replace(hardware.NAMED["laptop"], name="here", fast_bytes=nbytes, sources=sources)


def _as_measured(machine: Hardware, probes: list[float], disks: list[float]) -> Hardware:
    """`machine` with the bandwidths of these runs; the memory of a GPU was measured by the probe."""
    sources = {"disk_Bps": "measured: direct reads between runs, as large and as many as misses are"} if disks else {}
    machine = replace(machine, disk_Bps=max(disks, default=machine.disk_Bps), sources=machine.sources | sources)
    if machine.device == "cuda":
        return machine
    sources = {"fast_Bps": "measured: streaming reads before every run, the best"}
    return replace(machine, fast_Bps=max(probes), sources=machine.sources | sources)


def _specs(settings: Settings, plan: Plan) -> list[Spec]:
    """The contenders of a round, ours first."""
    keys = ("threads", "prompt_tokens", "tokens", "warmup", "routing", "repeat")
    common = {key: getattr(settings, key) for key in keys}
    ours = {"fast_bytes": plan.fast_bytes if settings.fast_bytes is None else settings.fast_bytes, "io": settings.io}
    if plan.hardware.device == "cuda" and settings.fast_bytes is None:  # then `load` plans the free memory itself
        ours = {"context": settings.context, "io": settings.io}
    variants = ABLATIONS if settings.ablations else {"mixoff": {}}
    specs = [Spec(name, "mixoff", settings.store, load=ours | options, **common) for name, options in variants.items()]
    for peer in settings.peers:
        specs += _peer(peer, settings, common)
    for name, command in settings.llama_bench:
        path = _given(settings.gguf, name, "--gguf FILE")
        specs.append(Spec(name, "llama-bench", path, load={"command": command}, **common))
    return specs


def _peer(peer: str, settings: Settings, common: dict) -> list[Spec]:
    if peer == "mmap":
        return [Spec("memory-mapped, no cache", peer, settings.store, load={"fast_bytes": _least(settings)}, **common)]
    path = _given(settings.checkpoint, peer, "--checkpoint FOLDER")
    return [Spec({"accelerate": "accelerate, experts on disk"}.get(peer, peer), peer, path, **common)]


def _given(path: str | None, peer: str, option: str) -> str:
    if path is None:
        raise MixoffError(f"{peer} cannot read a store: pass its copy of the model with {option}")
    return path


def _least(settings: Settings) -> int:
    """The smallest budget with which the store loads; the mapped contender does not use its slots."""
    from mixoff.kernels import reference
    from mixoff.shapes.sites import slot_nbytes, torch_dtype

    source = open_source(settings.store)
    source.close()
    scratch = reference.scratch_nbytes(source.sites, torch_dtype(source.dtype))
    return len(source.sites) * slot_nbytes(source.sites) + scratch + (64 << 20)


# Runs -----------------------------------------------------------------------------------------------------------------


def _probes(settings: Settings, contenders: int) -> list[float]:
    """Streaming reads before one run, enough for PROBES in total."""
    count = -(-PROBES // (settings.rounds * contenders))
    return [probe.read_bandwidth(settings.threads, rounds=1) for _ in range(count)]


def _run(spec: Spec, limit: limits.Limit | None) -> dict:
    """The report of one process, or `{"failure": why}`."""
    if limit:
        limits.forget(Path(spec.path))
    module = "llama_bench" if spec.kind == "llama-bench" else "contender"
    words = [*(limit.words if limit else ()), sys.executable, "-m", f"mixoff.bench.{module}", spec.to_json()]
    env = environment(spec.threads, **ENVIRONMENT.get(spec.kind, {}))
    try:
        done = subprocess.run(words, capture_output=True, text=True, env=env, timeout=TIMEOUT_S)
    except subprocess.TimeoutExpired:
        return {"failure": f"took more than {TIMEOUT_S} s"}
    if done.returncode == 0:
        return json.loads(done.stdout.strip().splitlines()[-1])
    if done.returncode in (-9, 137):
        return {"failure": "killed: out of memory" + (" within the limit" if limit else "")}
    last = (done.stderr.strip().splitlines() or ["no message"])[-1]
    return {"failure": f"exit code {done.returncode}: {last}"}


def environment(threads: int, **variables: str) -> dict[str, str]:
    """Environment of a contender: the same threads for every library, and mixoff on the path of any Python."""
    inherited = {key: value for key, value in os.environ.items() if key != "OMP_WAIT_POLICY"}
    counts = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS"), str(threads))
    return {**inherited, **counts, **variables, "PYTHONPATH": str(PACKAGE), "HF_HUB_OFFLINE": "1"}


def _result(report: dict) -> str:
    if "failure" in report:
        return report["failure"]
    speeds = [len(times) / sum(times) for times in report["token_s"]]
    return f"{max(speeds):.2f} tokens/s"


def _row(spec: Spec, reports: list[dict], machine: Hardware, plan: Plan) -> Row:
    result = row(spec.name, reports, machine.fast_Bps)
    if spec.kind != "mixoff" or result.failure:
        return result
    source = open_source(spec.path)
    source.close()
    scheme = sizes.PUBLISHED if source.files.kind == "published" else source.scheme
    here = replace(machine, threads=spec.threads, python_s=_python_s(reports))
    speed, cached = None, result.cached_rate
    if cached is not None and spec.load.get("fetch") != "layer":  # the time model has fetches of single experts only
        rates = _rates(result.hit_rate or 0.0, cached, reports)
        speed = predict(describe.shape_of(spec.path), scheme, here, cached, **rates).tokens_per_s
    if machine.device == "cuda":  # the plan covers GPU memory, not the RAM of a process
        return replace(result, predicted_tokens_per_s=speed)
    packed = source.folder / manifest.QUANTIZED  # the rest of the backbone stays mapped from its files
    fixed = plan.bytes["kv_cache"] + plan.bytes["workspace"] + (packed.stat().st_size if packed.exists() else 0)
    planned = reports[0]["base_bytes"] + fixed + reports[0]["info"]["fast_bytes_peak"]
    return replace(result, predicted_tokens_per_s=speed, planned_bytes=planned)


def _python_s(reports: list[dict]) -> float | None:
    """Speed of the core in the median run, from the loop between tokens."""
    runs = [steps for report in reports for steps in report.get("python_s", [])]
    return statistics.median(map(statistics.mean, runs)) if runs else None


def _rates(hit_rate: float, cached_rate: float, reports: list[dict]) -> dict:
    """Inputs of a prediction in addition to the hit rate of the cache: recall of the guesses, and the share in RAM."""
    guessed = hit_rate - cached_rate
    recall = min(guessed / (1 - cached_rate), 1.0) if guessed > 0 else None
    return {"recall": recall, "ram_share": 1.0 if reports[0]["info"].get("io") == "buffered" else None}
