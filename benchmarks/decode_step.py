"""Measures what the compiled decode step saves: one model, single tokens by programs and by modules, in turns.

    python benchmarks/decode_step.py [--shape qwen3-30b-a3b] [--layers 8] [--tokens 24] [--rounds 5] [--context 32]

Everything is resident and weights are random. Layers are timed apart from the rest, since only they are scaled down:
`--layers` of the shape's are written, in the preset `mixed`. The limit is their bytes per token over the bandwidth that
this machine reads memory with, measured beside each round.
"""

import argparse
import functools
import statistics
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path

import torch

import _table
import mixoff
from mixoff.bench import synthetic
from mixoff.planning import probe

WAYS = ("compiled", "modules")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", default="qwen3-30b-a3b")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--context", type=int, default=32)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    config = synthetic.config_of(arguments.shape)
    config.num_hidden_layers = arguments.layers
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[: arguments.layers]
    with tempfile.TemporaryDirectory() as temporary:
        folder = synthetic.write_store(config, "mixed", Path(temporary) / "store")
        model = mixoff.load(folder, "100GiB", prefetch="none")
        measure(model, arguments)


def measure(model: torch.nn.Module, arguments: argparse.Namespace) -> None:
    """Print the table."""
    runtime, step = model.mixoff, model.mixoff.step
    for site, experts in enumerate(runtime.source.sites):  # all resident
        runtime.serve(site, list(range(experts.num_experts)), lambda loaded: None)
    allowed, ids = step.allowed, torch.arange(5, 5 + arguments.context)[None]
    modules = [layer.module for layer in step.layers]
    rows: dict[str, list[list[float]]] = {way: [] for way in WAYS}
    bandwidths = []
    with ExitStack() as stack:
        passes, heads, *layers = (
            stack.enter_context(timed(m)) for m in (model.base_model, model.get_output_embeddings(), *modules)
        )
        for round_number in range(arguments.rounds + 1):  # the first compiles
            for way in WAYS:
                step.allowed = allowed if way == "compiled" else lambda *given: False
                for spent in (passes, heads, *layers):
                    spent.clear()
                model.generate(ids, max_new_tokens=arguments.tokens, min_new_tokens=arguments.tokens, do_sample=False)
                if round_number:
                    rows[way].append(figures(passes, heads, layers))
            bandwidths.append(probe.read_bandwidth(arguments.threads))
    limit = 1e3 * layer_nbytes(model) / statistics.median(bandwidths)
    print(f"{step.info()}; memory reads {min(bandwidths) / 1e9:.1f} to {max(bandwidths) / 1e9:.1f} GB/s, "
          f"so a layer of {layer_nbytes(model) / 1e6:.1f} MB takes {limit:.2f} ms at least")  # fmt: skip
    print(
        _table.head(
            "single tokens", "ms per layer, median; range", "of the limit", "rest but for the head, ms", "head, ms"
        )
    )
    for way in WAYS:
        of_layer, rest, head = zip(*rows[way], strict=True)
        middle = statistics.median(of_layer)
        spread = f"{middle:.2f}; {min(of_layer):.2f} to {max(of_layer):.2f}"
        others = [f"{statistics.median(values):.1f}" for values in (rest, head)]
        print(_table.line([way, spread, f"{limit / middle:.0%}", *others]))


def figures(passes: list[float], heads: list[float], layers: list[list[float]]) -> list[float]:
    """Medians in ms over single tokens: of a layer, of a pass without its layers, of the head."""
    tokens = range(2, len(passes))  # the prompt and the first token, which may compare, are left out
    in_layers = [sum(layer[t] for layer in layers) for t in tokens]
    rest = [passes[t] - spent for t, spent in zip(tokens, in_layers, strict=True)]
    return [1e3 * statistics.median(x) for x in ([s / len(layers) for s in in_layers], rest, heads[2:])]


class timed:
    """While open, notes the seconds of each forward pass of a module."""

    def __init__(self, module: torch.nn.Module) -> None:
        self.module, self.spent, self.before = module, [], module.forward

    def __enter__(self) -> list[float]:
        @functools.wraps(self.before)
        def forward(*args: object, **kwargs: object) -> object:
            start = time.perf_counter()
            out = self.before(*args, **kwargs)
            self.spent.append(time.perf_counter() - start)
            return out

        self.module.forward = forward
        return self.spent

    def __exit__(self, *exc: object) -> None:
        self.module.forward = self.before


def layer_nbytes(model: torch.nn.Module) -> int:
    """Bytes that a token reads in one layer: attention, router and the chosen experts."""
    layer = model.base_model.layers[0]
    backbone = sum(module.quantized.image.numel() for module in layer.modules() if hasattr(module, "quantized"))
    router = sum(weight.nbytes for weight in layer.mlp.gate.parameters())
    return backbone + router + model.config.num_experts_per_tok * model.mixoff.source.sites[0].expert_nbytes


if __name__ == "__main__":
    main()
