"""One contender, measured in this process: `python -m mixoff.bench.contender SPEC` prints one JSON object.

Prompts and tokens are random ids, the same for every contender. Tokens are given, not sampled, so that all contenders
do the same work. Phases are timed in a separate run, half as long, with hooks that cost 1 to 2 us per layer.
"""

from __future__ import annotations

import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import asdict, astuple, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from mixoff.bench import limits, routing
from mixoff.bench.spec import Spec, answer, repeat_rate
from mixoff.cache.events import Event
from mixoff.errors import MixoffError
from mixoff.loading import load, warmup
from mixoff.planning import probe
from mixoff.shapes.config import configured_top_k as top_k
from mixoff.shapes.config import expert_modules, read_config
from mixoff.shapes.config import skeleton as skeleton_of
from mixoff.shapes.kv_cache import advance, begin
from mixoff.store.source import Source
from mixoff.transfer.arena import view

COUNTED = (
    "hits", "misses", "evictions", "bytes_moved", "prefetches", "prefetch_hits", "prefetch_wasted_bytes", "ram_hits",
    "ram_bytes_moved",
)  # fmt: skip


def run(spec: Spec) -> dict:
    """Load and measure; plain numbers, times in seconds."""
    torch.set_num_threads(spec.threads)
    with limits.Peak() as peak, torch.inference_mode():
        report: dict[str, Any] = {"base_bytes": limits.process_nbytes()}
        start = time.perf_counter()
        model = LOADERS[spec.kind](spec)
        report |= {"load_s": time.perf_counter() - start, "loaded_bytes": limits.process_nbytes()}
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
    session.decode(ids[0, : spec.prompt_tokens], ids[0].repeat(1 + spec.warmup // ids.shape[1])[: spec.warmup])
    before, choice.chosen = _counts(model), []
    runs = [session.decode(row[: spec.prompt_tokens], row[spec.prompt_tokens :]) for row in ids]
    counts, experts = _counts(model) - before, np.stack(choice.chosen)
    with Phases(model) as phases:
        session.decode(ids[0, :4], ids[0, -max(spec.tokens // 2, 1) :])
    choice.detach()
    return {
        "prompt_s": [r.prompt_s for r in runs],
        "token_s": [r.token_s for r in runs],
        "prompt_read_bytes": [r.prompt_read for r in runs],
        "read_bytes": [r.read for r in runs],
        "moved_bytes": [r.moved for r in runs],
        "python_s": [r.python_s for r in runs],
        "phases_s": phases.per_token(),
        "repeat_rate": repeat_rate(experts),
        "counters": {name: counts[name] for name in COUNTED},
        "time_line": phases.time_line(),
        **_bytes_and_hits(model, counts),
    }


def _routing(model: nn.Module, spec: Spec) -> routing.Routing:
    """The choice of experts: the model's own, or a trace that is long enough for runs without repetition.

    The trace begins with every expert once, in the warm-up, so that a cache with room for all experts holds them all.
    """
    if spec.routing == "model":
        return routing.Routing(model, None)
    modules = list(expert_modules(model).values())
    tokens = 2 * (spec.prompt_tokens + spec.tokens) * spec.runs + spec.prompt_tokens + spec.warmup
    E, K, L = modules[0].num_experts, top_k(model.config), len(modules)
    trace = routing.synthetic(spec.routing, spec.repeat, E, K, L, tokens)
    trace = np.concatenate([routing.every_expert(E, K, L), trace])
    return routing.Routing(model, trace, routing.guessed(trace, E, spec.recall))


@dataclass
class Run:
    """Figures of one run.

    prompt_s: seconds of the prompt.
    prompt_read: bytes read from storage for the prompt.
    token_s: seconds of each token after the prompt.
    python_s: seconds of a step of `probe.python_speed` after each token.
    read: bytes read from storage for the tokens.
    moved: bytes moved into the fast tier for the tokens.
    """

    prompt_s: float
    prompt_read: int | None
    token_s: list[float]
    python_s: list[float]
    read: int | None
    moved: int | None


class Session:
    """Runs a model token by token, with a new KV cache for every run."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def decode(self, prompt: torch.Tensor, tokens: torch.Tensor) -> Run:
        """Run `prompt` (T,) at once, then each of `tokens` (T,) alone."""
        read_before = limits.read_nbytes()
        prompt_s, cache = self._step(prompt, begin(self.model, len(prompt) + len(tokens)))
        read_between, moved_between = limits.read_nbytes(), self._moved_nbytes()
        token_s, python_s = [], []
        for token in tokens:
            seconds, cache = self._step(token.view(1), cache)
            token_s.append(seconds)
            python_s.append(probe.python_speed())
        return Run(
            prompt_s=prompt_s,
            prompt_read=limits.difference(read_between, read_before),
            token_s=token_s,
            python_s=python_s,
            read=limits.difference(limits.read_nbytes(), read_between),
            moved=limits.difference(self._moved_nbytes(), moved_between),
        )

    def _moved_nbytes(self) -> int | None:
        return self.model.mixoff.bytes_moved if hasattr(self.model, "mixoff") else None

    def _step(self, ids: torch.Tensor, cache: object) -> tuple[float, object]:
        start = time.perf_counter()
        logits, cache = advance(self.model, ids.view(1, -1), cache, logits_to_keep=1)
        finish(ids.device)
        seconds = time.perf_counter() - start
        if not torch.isfinite(logits).all():
            raise MixoffError("the model's logits are not finite: its weights are damaged")
        return seconds, cache


def finish(device: torch.device) -> None:
    """Wait until a GPU has finished its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


# Bytes and hits -------------------------------------------------------------------------------------------------------


def _counts(model: nn.Module) -> Counter:
    """Counters of the model's runtime; empty for a model without one."""
    if not hasattr(model, "mixoff"):
        return Counter()
    return Counter({k: v for k, v in model.mixoff.info().to_dict().items() if type(v) is int})


def _bytes_and_hits(model: nn.Module, counts: Counter) -> dict:
    """Bytes that a token touches, and hits and budget of the runtime; bytes alone for a model without one."""
    if not hasattr(model, "mixoff"):
        return {"touched_bytes": resident_touched_nbytes(model)}
    info, source = model.mixoff.info(), model.mixoff.source
    requests = counts["hits"] + counts["misses"]
    return {
        "touched_bytes": touched_nbytes(model, source),
        "capacity": info.capacity,
        "hit_rate": counts["hits"] / requests,
        "cached_rate": (counts["hits"] - counts["prefetch_hits"]) / requests,
        "expert_nbytes": source.expert_nbytes,
        "fast_bytes": info.fast_bytes,
        "info": info.to_dict(),
    }


def touched_nbytes(model: nn.Module, source: Source) -> int:
    """Bytes of weights that one token of decoding reads: K experts per layer, and the backbone without embeddings.

    The KV cache and activations are not counted: they are much smaller at batch 1.
    """
    experts = sum(part.nbytes for site in source.sites for part in site.parts)
    return experts * top_k(model.config) + _backbone_nbytes(model)


def resident_touched_nbytes(model: nn.Module) -> int:
    """`touched_nbytes` of a model in plain transformers."""
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
    """Time per token by phase, from hooks on modules: `with Phases(model) as phases: ...; phases.per_token()`.

    `experts` is their computation, from the runtime's events. `waiting` is the rest of the expert layers: waiting for
    fetches, and the runtime itself. Passes of more than one token are left out. A decode step compiled as a whole is
    timed by its two halves: hooks on modules would make it give way to them. Its router counts as attention.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model, self.device = model, next(model.parameters()).device
        self.seconds: dict[str, float] = defaultdict(float)  # by phase
        self.tokens, self.computing, self.decoding = 0, 0.0, False
        self.handles: list[Any] = []
        self.wrapped: list[tuple[Any, str]] = []
        self.events: list[Event] = []

    def __enter__(self) -> Phases:
        self._time(self.model, "total")
        if self.compiled:
            for layer in self.model.mixoff.step.layers:
                self._wrap(layer, "_run", "attention")
                self._wrap(layer, "_serve", "experts")
        else:
            for name, module in self.model.named_modules():
                if phase := _phase(name, self.experts):
                    self._time(module, phase)
        if hasattr(self.model, "mixoff"):
            self.end = self.model.mixoff.on_event(self._on_event)
        return self

    @property
    def experts(self) -> dict[str, nn.Module]:
        """Modules that hold the experts of a layer, by name."""
        return expert_modules(self.model)

    @property
    def compiled(self) -> bool:
        """Whether programs compute whole layers of single tokens."""
        step = getattr(getattr(self.model, "mixoff", None), "step", None)
        return any(layer.experts is not None for layer in getattr(step, "layers", ()))

    def _wrap(self, layer: Any, method: str, phase: str) -> None:
        """Time a method of a layer of the decode step."""
        inner = getattr(layer, method)

        def timed(*args: Any) -> Any:
            start = time.perf_counter()
            try:
                return inner(*args)
            finally:
                self.seconds[phase] += time.perf_counter() - start

        setattr(layer, method, timed)
        self.wrapped.append((layer, method))

    def __exit__(self, *exc: object) -> None:
        for handle in self.handles:
            handle.remove()
        for layer, method in self.wrapped:
            delattr(layer, method)
        if hasattr(self.model, "mixoff"):
            self.end()

    def _on_event(self, event: Event) -> None:
        if event.phase != "decode":
            return
        self.events.append(event)
        if event.kind == "compute":
            self.computing += event.t1 - event.t0

    def time_line(self, tokens: int = 2) -> list[list]:
        """Events of the last tokens, as lists of their fields; times in seconds since the first of them."""
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
        """Seconds per token by phase."""
        s, computing = self.seconds, self.computing or self.seconds["experts"]
        parts = {"attention": s["attention"], "router": s["router"], "experts": computing}
        if self.wrapped:
            del parts["router"]
        parts["waiting"] = s["experts"] - computing
        parts["other"] = s["total"] - s["attention"] - s["router"] - s["experts"]
        return {name: seconds / max(self.tokens, 1) for name, seconds in parts.items()}


def _phase(name: str, experts: dict[str, nn.Module]) -> str | None:
    """The phase of a module; None for modules inside a phase, and outside of all."""
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
    """The store's files, mapped into memory and used in place: the page cache is the only cache."""
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

    options = {"dtype": "auto", "experts_implementation": "grouped_mm", "local_files_only": True}
    return AutoModelForCausalLM.from_pretrained(spec.path, **options).eval()


def _load_accelerate(spec: Spec) -> nn.Module:
    """The backbone in memory and all experts on disk, as accelerate runs a model that does not fit."""
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
    """`spec.answer`, without transformers' own messages."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    return answer(run, argv)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
