"""Speed of the bundled model by budget, next to what bytes and bandwidth allow.

Modelled time per token = time with every expert resident + bytes moved per token / bandwidth of the slow tier, both
measured in the same run. The model ignores overlap, so the measured time can be shorter.
"""

from __future__ import annotations

import statistics
import time
from dataclasses import asdict, dataclass

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from mixoff import models
from mixoff.kernels import reference
from mixoff.loading import load
from mixoff.pages import slab
from mixoff.store.source import open_source
from mixoff.text import generation

PROMPTS = (
    "It was a fine morning in the spring, and Elizabeth",
    "And the LORD said unto Moses,",
    "import os\n\ndef read_file(path):\n",
)
SLOTS = (1, 2, 3, 4, 6, 8)  # per layer


@dataclass(frozen=True)
class Row:
    """One budget. Times in ms per token; `measured_*` over all runs."""

    slots_per_layer: int
    fast_bytes: int
    hit_rate: float
    bytes_per_token: float
    modelled_ms: float
    measured_ms: float
    measured_min_ms: float
    measured_max_ms: float

    def cells(self) -> list[str]:
        """The row as text, one cell per column of `Table`."""
        return [
            f"{self.slots_per_layer}",
            f"{self.fast_bytes:,}",
            f"{self.hit_rate:.3f}",
            f"{self.bytes_per_token / 1e6:.2f}",
            f"{self.modelled_ms:.1f}",
            f"{self.measured_ms:.1f}; {self.measured_min_ms:.1f} to {self.measured_max_ms:.1f}",
            f"{1000 / self.measured_ms:.1f}",
        ]


@dataclass(frozen=True)
class Table:
    """All budgets, and the inputs of the model; prints itself as markdown."""

    rows: tuple[Row, ...]
    transformers_ms: float
    resident_ms: float
    link_Bps: float
    runs: int
    threads: int

    def to_dict(self) -> dict:
        """All figures under their names."""
        return asdict(self)

    def __str__(self) -> str:
        head = (
            f"slow tier {self.link_Bps / 1e9:.2f} GB/s (page cache), every expert resident {self.resident_ms:.1f} ms "
            f"per token, plain transformers {self.transformers_ms:.1f} ms; medians of {self.runs} runs, "
            f"{self.threads} thread(s), all measured\n"
        )
        columns = "slots per layer,fast_bytes,hit rate (measured),MB per token (measured),ms per token (modelled)"
        columns += ",ms per token (measured: median; min to max),tokens/s (measured)"
        rows = [columns.split(","), ["---"] * 7, *(row.cells() for row in self.rows)]
        return "\n".join([head, *(f"| {' | '.join(cells)} |" for cells in rows)])


def run(runs: int = 5, max_new_tokens: int = 64, threads: int = 1) -> Table:
    """Measure every budget and plain transformers in turns, `runs` times each, over the same three prompts."""
    torch.set_num_threads(threads)
    tokenizer, folder = generation.load_tokenizer(models.path()), models.path()
    link, sizes = store_bandwidth(), budgets()
    loaded = [load.load(folder, fast_bytes=size) for size in sizes]
    contenders = [*loaded, resident_model()]
    for model in contenders:  # one short run each, so that no measurement pays for the first use of a library
        _decode_ms(model, tokenizer, 4)
    for model in loaded:
        model.mixoff.reset_counts()
    times: list[list[float]] = [[] for _ in contenders]
    for _ in range(runs):
        for i, model in enumerate(contenders):
            times[i].append(_decode_ms(model, tokenizer, max_new_tokens))
    resident = statistics.median(times[len(loaded) - 1])
    rows = tuple(_row(m, times[i], resident, link, sizes[i]) for i, m in enumerate(loaded))
    for model in loaded:
        model.mixoff.close()
    return Table(
        rows=rows,
        transformers_ms=statistics.median(times[-1]),
        resident_ms=resident,
        link_Bps=link,
        runs=runs,
        threads=threads,
    )


def store_bandwidth(rounds: int = 5) -> float:
    """Bytes/s from the slow tier into a slot, in the best of several rounds over all experts."""
    source = open_source(models.path())
    image = memoryview(slab(source.expert_nbytes).numpy())
    best = 0.0
    for _ in range(rounds):
        start = time.perf_counter()
        nbytes = sum(source.reader.read_into(*key, image) for key in source.reader.extents)
        best = max(best, nbytes / (time.perf_counter() - start))
    source.close()
    return best


def budgets() -> list[int]:
    """The `fast_bytes` that give each layer of the bundled model the numbers of slots in SLOTS."""
    source = open_source(models.path())
    source.close()
    scratch = reference.scratch_nbytes(source.sites, torch.float32)
    return [n * len(source.sites) * source.expert_nbytes + scratch for n in SLOTS]


def _decode_ms(model: PreTrainedModel, tokenizer: object, max_new_tokens: int) -> float:
    """Milliseconds per decoded token over all prompts; the prompts themselves are not counted."""
    results = [generation.generate(model, tokenizer, p, max_new_tokens) for p in PROMPTS]
    return 1000 * sum(1 / r.tokens_per_s for r in results) / len(results)


def _row(model: PreTrainedModel, times: list[float], resident_ms: float, link_Bps: float, budget: int) -> Row:
    info = model.mixoff.info()
    layers = len(model.mixoff.source.sites)
    tokens = (info.hits + info.misses) / (layers * model.config.num_experts_per_tok)
    nbytes = info.misses * info.expert_nbytes / tokens
    return Row(
        slots_per_layer=info.capacity // layers,
        fast_bytes=budget,
        hit_rate=info.hit_rate,
        bytes_per_token=nbytes,
        modelled_ms=resident_ms + 1000 * nbytes / link_Bps,
        measured_ms=statistics.median(times),
        measured_min_ms=min(times),
        measured_max_ms=max(times),
    )


def resident_model() -> PreTrainedModel:
    """The bundled model in plain transformers with every expert resident: the reference for offloading."""
    return AutoModelForCausalLM.from_pretrained(
        models.path(), dtype=torch.float32, experts_implementation="grouped_mm"
    ).eval()
