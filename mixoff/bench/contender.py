"""One contender, measured in this process: `python -m mixoff.bench.contender SPEC` prints one JSON object.

Prompts and tokens are random ids, the same for every contender; tokens are fed, not sampled, so that all do the same
work. Phases are timed in a run of their own, half as long, with hooks that cost a microsecond or two a layer.
Does not know the other contenders.
"""

from __future__ import annotations

import json
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, astuple, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn

from mixoff.bench import limits, routing
from mixoff.bench.spec import Spec, repeat_rate
from mixoff.errors import MixoffError
from mixoff.loading import load, warmup
from mixoff.planning import probe
from mixoff.runtime.prefetch import top_k
from mixoff.shapes.config import expert_modules, read_config
from mixoff.shapes.config import skeleton as skeleton_of
from mixoff.shapes.kv_cache import advance
from mixoff.store.source import Source
from mixoff.transfer.arena import view

COUNTED = (
    "hits", "misses", "evictions", "bytes_moved", "prefetches", "prefetch_hits", "prefetch_wasted_bytes", "ram_hits",
    "ram_bytes_moved",
)  # fmt: skip
PHASES = ("attention", "router", "experts", "waiting", "other")


def run(spec: Spec) -> dict:
    """Load and measure; every figure in plain numbers, times in seconds."""
    torch.set_num_threads(spec.threads)
    with limits.Peak() as peak, torch.inference_mode():
        report, start = {"base_bytes": limits.anonymous_nbytes()}, time.perf_counter()
        model = LOADERS[spec.kind](spec)
        report |= {"load_s": time.perf_counter() - start, "loaded_bytes": limits.anonymous_nbytes()}
        if hasattr(model, "mixoff"):
            warmup.compile_for(model, lambda line: print(line, file=sys.stderr))
        report |= _measured(model, spec)
        report["device_peak_bytes"] = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None
    return asdict(spec) | report | {"peak_bytes": peak.nbytes}


def _measured(model: nn.Module, spec: Spec) -> dict:
    config = model.config.get_text_config()
    choice = _routing(model, spec)
    ids = torch.from_numpy(spec.ids(config.vocab_size)).to(model.device)
    session = Session(model)
    session.decode(ids[0, :4], ids[0, 4 : 4 + spec.warmup])
    before, choice.chosen = _counts(model), []
    runs = [session.decode(row[: spec.prompt_tokens], row[spec.prompt_tokens :]) for row in ids]
    counts, experts = _counts(model) - before, np.stack(choice.chosen)
    with Phases(model) as phases:
        session.decode(ids[0, :4], ids[0, -max(spec.tokens // 2, 1) :])
    choice.detach()
    report = {"prompt_s": [r.prompt_s for r in runs], "token_s": [r.token_s for r in runs]}
    report |= {"prompt_read_bytes": [r.prompt_read for r in runs], "read_bytes": [r.read for r in runs]}
    report |= {"moved_bytes": [r.moved for r in runs], "python_s": [r.python_s for r in runs]}
    report |= {"phases_s": phases.per_token(), "repeat_rate": repeat_rate(experts)}
    report |= {"counters": {name: counts[name] for name in COUNTED}, "time_line": phases.time_line()}
    return report | _served(model, counts, spec)


def _routing(model: nn.Module, spec: Spec) -> routing.Routing:
    """The choice of experts: the model's own, or a trace, long enough that no run meets the same part of it.

    It begins with every expert once, in the warm-up, so that what has room for all of them holds all of them.
    """
    if spec.routing == "model":
        return routing.Routing(model, None)
    modules = list(expert_modules(model).values())
    tokens = 2 * (spec.prompt_tokens + spec.tokens) * spec.runs + spec.warmup
    E, K, L = modules[0].num_experts, top_k(model.config), len(modules)
    trace = routing.synthetic(spec.routing, spec.repeat, E, K, L, tokens)
    trace = np.concatenate([routing.every_expert(E, K, L), trace])
    return routing.Routing(model, trace, routing.guessed(trace, E, spec.recall))


@dataclass
class Run:
    """Seconds of a prompt, of each token after it, and of a step of `hardware.python_speed` in between.

    And bytes: read from storage for the prompt and for the tokens, and moved for the tokens.
    """

    prompt_s: float
    prompt_read: int | None
    token_s: list[float]
    python_s: list[float]
    read: int | None
    moved: int | None


class Session:
    """Feeds a model token by token, with a fresh KV cache for every run."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def decode(self, prompt: torch.Tensor, tokens: torch.Tensor) -> Run:
        """Run `prompt` (T,) at once, then each of `tokens` (T,) alone."""
        before = self._bytes()
        prompt_s, cache = self._step(prompt, None)
        between, token_s, python_s = self._bytes(), [], []
        for token in tokens:
            seconds, cache = self._step(token.view(1), cache)
            token_s.append(seconds)
            python_s.append(probe.python_speed())
        after = self._bytes()
        return Run(prompt_s, _less(between[0], before[0]), token_s, python_s, *map(_less, after, between))

    def _bytes(self) -> tuple[int | None, int | None]:
        """Read from storage so far, and moved into the fast tier."""
        return limits.read_nbytes(), self.model.mixoff.bytes_moved if hasattr(self.model, "mixoff") else None

    def _step(self, ids: torch.Tensor, cache: object) -> tuple[float, object]:
        start = time.perf_counter()
        logits, cache = advance(self.model, ids.view(1, -1), cache, logits_to_keep=1)
        finish(ids.device)
        seconds = time.perf_counter() - start
        if not torch.isfinite(logits).all():
            raise MixoffError("the model's logits are not finite: its weights are damaged")
        return seconds, cache


def finish(device: torch.device) -> None:
    """Wait until a GPU has done what it was told; a CPU has done it already."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _less(after: int | None, before: int | None) -> int | None:
    return None if after is None else after - before


# What the runtime counted ---------------------------------------------------------------------------------------------


def _counts(model: nn.Module) -> Counter:
    """Counters of the runtime that serves the model; empty where none does."""
    if not hasattr(model, "mixoff"):
        return Counter()
    return Counter({k: v for k, v in model.mixoff.info().to_dict().items() if type(v) is int})


def _served(model: nn.Module, counts: Counter, spec: Spec) -> dict:
    """Bytes that a token touches, and what the runtime moved for decoding; of models without one, what files say."""
    if not hasattr(model, "mixoff"):
        return {"touched_bytes": resident_touched_nbytes(model)}
    info, source = model.mixoff.info(), model.mixoff.source
    requests, guessed = counts["hits"] + counts["misses"], counts["prefetch_hits"]
    report = {"touched_bytes": touched_nbytes(model, source), "capacity": info.capacity}
    report |= {"hit_rate": counts["hits"] / requests, "cached_rate": (counts["hits"] - guessed) / requests}
    report |= {"expert_nbytes": source.expert_nbytes, "fast_bytes": info.fast_bytes, "info": info.to_dict()}
    return report


def touched_nbytes(model: nn.Module, source: Source) -> int:
    """Bytes of weights that one token of decoding reads: the backbone but the embedding's table, and K experts a layer.

    The KV cache and activations, small beside them at batch 1, are not counted.
    """
    experts = sum(part.nbytes for site in source.sites for part in site.parts)
    return experts * top_k(model.config) + _backbone_nbytes(model)


def resident_touched_nbytes(model: nn.Module) -> int:
    """The same for a model of plain transformers."""
    experts = 0
    for module in expert_modules(model).values():
        weights = [p for _, p in module.named_parameters(recurse=False)]
        experts += sum(p.numel() // module.num_experts * p.itemsize for p in weights) * top_k(model.config)
    return experts + _backbone_nbytes(model)


def _backbone_nbytes(model: nn.Module) -> int:
    inside = {id(p) for module in expert_modules(model).values() for p in module.parameters()}
    table = model.get_input_embeddings()
    tied = table.weight is getattr(model.get_output_embeddings(), "weight", None) if hasattr(table, "weight") else False
    if not tied:
        inside |= {id(p) for p in table.parameters()}
    plain = sum(p.nbytes for p in model.parameters() if id(p) not in inside)
    packed = [
        m.quantized.nbytes for m in model.modules() if getattr(m, "quantized", None) is not None and m is not table
    ]
    return plain + sum(packed)


class Phases:
    """Where a token's time goes, by hooks on its modules: `with Phases(model) as phases: ...; phases.per_token()`.

    experts: computing them, by the runtime's events. waiting: the rest of the experts' layers, which is waiting for
    fetches and the runtime's own work. Passes of more than one token are left out.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model, self.seconds, self.tokens = model, Counter(), 0
        self.device = next(model.parameters()).device
        self.computing, self.decoding, self.handles, self.events = 0.0, False, [], []

    def __enter__(self) -> Phases:
        self._time(self.model, "total")
        for name, module in self.model.named_modules():
            if phase := _phase(name, self.experts):
                self._time(module, phase)
        if hasattr(self.model, "mixoff"):
            self.end = self.model.mixoff.on_event(self._on_event)
        return self

    @property
    def experts(self) -> dict[str, nn.Module]:
        return expert_modules(self.model)

    def __exit__(self, *exc: object) -> None:
        for handle in self.handles:
            handle.remove()
        if hasattr(self.model, "mixoff"):
            self.end()

    def _on_event(self, event: object) -> None:
        if event.phase != "decode":
            return
        self.events.append(event)
        if event.kind == "compute":
            self.computing += event.t1 - event.t0

    def time_line(self, tokens: int = 2) -> list[list]:
        """What happened to experts in the last tokens: an event's fields, seconds from the first of them."""
        last = [e for e in self.events if e.token > self.events[-1].token - tokens]
        start = min((e.t0 for e in last), default=0.0)
        return [[*astuple(e)[:5], e.t0 - start, e.t1 - start, e.phase] for e in last]

    def _time(self, module: nn.Module, phase: str) -> None:
        begun = []

        def before(_: nn.Module, args: tuple, kwargs: dict) -> None:
            if phase == "total":
                ids = args[0] if args else kwargs["input_ids"]
                self.decoding = ids.shape[1] == 1
                self.tokens += self.decoding
            finish(self.device)
            begun.append(time.perf_counter())

        def after(*_: object) -> None:
            finish(self.device)
            seconds = time.perf_counter() - begun.pop()
            if self.decoding:
                self.seconds[phase] += seconds

        self.handles += [module.register_forward_pre_hook(before, with_kwargs=True)]
        self.handles += [module.register_forward_hook(after)]

    def per_token(self) -> dict[str, float]:
        """Seconds a token by phase."""
        s, computing = self.seconds, self.computing or self.seconds["experts"]
        parts = {"attention": s["attention"], "router": s["router"], "experts": computing}
        parts["waiting"] = s["experts"] - computing
        parts["other"] = s["total"] - s["attention"] - s["router"] - s["experts"]
        return {name: seconds / max(self.tokens, 1) for name, seconds in parts.items()}


def _phase(name: str, experts: dict[str, nn.Module]) -> str | None:
    """Which phase a module's time counts for; modules inside one are not looked at again."""
    if name in experts:
        return "experts"
    parent, _, last = name.rpartition(".")
    if last in ("self_attn", "attention", "attn", "linear_attn", "mamba"):
        return "attention"
    return "router" if last in ("gate", "router") and any(e.startswith(f"{parent}.") for e in experts) else None


# Loading --------------------------------------------------------------------------------------------------------------


def _load_mixoff(spec: Spec) -> nn.Module:
    return load.load(spec.path, **spec.load)


def _load_mapped(spec: Spec) -> nn.Module:
    """The store's files mapped into memory and computed from as they lie: whatever the page cache makes of it."""
    model = load.load(spec.path, **{"prefetch": "none"} | spec.load)
    runtime, views = model.mixoff, {}
    for (site, expert), (extent, *_) in runtime.source.reader.extents.items():
        image = torch.from_numpy(
            np.memmap(runtime.source.folder / extent.file, np.uint8, "c", extent.offset, extent.nbytes)
        )
        views[site, expert] = {part.name: view(image, part) for part in runtime.source.sites[site].parts}

    def serve(site: int, experts: list[int], compute: Callable, weights: object = None) -> None:
        compute({expert: views[site, expert] for expert in experts})

    runtime.serve = serve
    return model


def _load_transformers(spec: Spec) -> nn.Module:
    from transformers import AutoModelForCausalLM

    how = {"dtype": "auto", "experts_implementation": "grouped_mm", "local_files_only": True}
    return AutoModelForCausalLM.from_pretrained(spec.path, **how).eval()


def _load_accelerate(spec: Spec) -> nn.Module:
    """The backbone in memory, all experts on disk: accelerate's own way to run what does not fit."""
    from transformers import AutoModelForCausalLM

    skeleton = skeleton_of(read_config(Path(spec.path)))
    experts = expert_modules(skeleton)
    places = dict.fromkeys(experts, "disk")
    for name, _ in skeleton.named_modules():
        held = any(e == name or e.startswith(f"{name}.") for e in experts)
        if name and not held and not any(name.startswith(f"{placed}.") for placed in places):
            places[name] = "cpu"
    folder = Path(spec.path).with_name(Path(spec.path).name + "-offload")
    model = AutoModelForCausalLM.from_pretrained(
        spec.path, dtype="auto", device_map=places, offload_folder=folder, local_files_only=True
    ).eval()
    for cold in (folder, Path(spec.path)):
        if cold.exists():
            limits.forget(cold)
    return model


LOADERS: dict[str, Callable[[Spec], nn.Module]] = {
    "mixoff": _load_mixoff,
    "mmap": _load_mapped,
    "transformers": _load_transformers,
    "accelerate": _load_accelerate,
}


def main(argv: list[str]) -> int:
    """Print the measurement of the spec in argv as JSON; errors of ours go to standard error, exit code 2."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        print(json.dumps(run(Spec.from_json(argv[0]))))
    except MixoffError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
