"""Measures how long calibrated conversion takes by step, and its memory, on one layer of a large model's shape.

    python benchmarks/calibration_time.py [--shape mixtral-8x7b] [--scheme mixed] [--jobs 2]

The layer has the shape's widths and experts, random weights and the bundled tokenizer. Printed: seconds of each step,
also per million weights of the layer, measured; hours of all layers, modelled as that many times one layer; and the
peak of memory next to what was promised. CPU seconds are those of all threads, divided by their number: what the step
takes where nothing else runs.
"""

import argparse
import shutil
import tempfile
import time
from collections import Counter
from functools import wraps
from pathlib import Path

import _table
from mixoff import models
from mixoff.bench import synthetic
from mixoff.conversion import convert, streams, weights
from mixoff.store.making import Options

STEPS = {  # what is timed: module, function, and what the table calls it
    "moments of inputs": (weights, "moment"),
    "factors of Hessians": (weights, "metric"),
    "targets": (weights, "_target"),
    "codes": (weights, "quantize_calibrated"),
    "products with weights": (streams.kernels, "linear"),
    "reading weights": (streams, "read_expert"),
}


class Clock:
    """Seconds and CPU seconds by step, without those of steps inside it."""

    def __init__(self) -> None:
        self.seconds, self.cpu = Counter(), Counter()
        self.inside: list[list[float]] = []

    def watch(self, step: str, module: object, name: str) -> None:
        """Count what a function of a module takes."""
        function = getattr(module, name)

        @wraps(function)
        def timed(*args: object, **kwargs: object) -> object:
            self.inside.append([0.0, 0.0])
            started = clocks()
            try:
                return function(*args, **kwargs)
            finally:
                taken = [now - then for now, then in zip(clocks(), started, strict=True)]
                inside = self.inside.pop()
                self.seconds[step] += taken[0] - inside[0]
                self.cpu[step] += taken[1] - inside[1]
                if self.inside:
                    self.inside[-1] = [a + b for a, b in zip(self.inside[-1], taken, strict=True)]

        setattr(module, name, timed)


def clocks() -> tuple[float, float]:
    """Wall clock and CPU time of all threads, seconds."""
    return time.perf_counter(), time.process_time()


def checkpoint(shape: str, folder: Path) -> tuple[Path, int]:
    """A checkpoint with one layer of a shape and the bundled tokenizer; and how many layers the shape has."""
    config = synthetic.config_of(shape)
    layers, config.num_hidden_layers, config.vocab_size = config.num_hidden_layers, 1, 4096
    path = synthetic.write_checkpoint(config, folder / "model")
    for file in models.path().glob("*token*"):
        shutil.copy(file, path)
    return path, layers


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", default="mixtral-8x7b")
    parser.add_argument("--scheme", default="mixed")
    parser.add_argument("--jobs", type=int, default=2)
    arguments = parser.parse_args()
    clock = Clock()
    for step, (module, name) in STEPS.items():
        clock.watch(step, module, name)
    with tempfile.TemporaryDirectory() as temporary:
        source, layers = checkpoint(arguments.shape, Path(temporary))
        tokens, promised = convert.needs(source, "default")
        options = Options(arguments.jobs, progress=False)
        started = clocks()
        report = convert.run(source, Path(temporary) / "store", arguments.scheme, "default", options=options)
        total, cpu = (now - then for now, then in zip(clocks(), started, strict=True))
    clock.seconds["the rest"] = total - sum(clock.seconds.values())
    clock.cpu["the rest"] = cpu - sum(clock.cpu.values())
    million = report.source_nbytes / 2e6
    print(
        f"One layer of {arguments.shape}, {million:,.0f} million weights, {tokens:,} tokens, {arguments.jobs} threads"
    )
    print(_table.head("step", "seconds", "CPU seconds per thread", "these per million weights"))
    clock.seconds["all"], clock.cpu["all"] = total, cpu
    for step, seconds in reversed(clock.seconds.most_common()):
        alone = clock.cpu[step] / arguments.jobs
        print(_table.line([step, f"{seconds:.1f}", f"{alone:.1f}", f"{alone / million:.3f}"]))
    hours = [layers * s / 3600 for s in (total, cpu / arguments.jobs)]
    print(f"\n{layers} layers, modelled: {hours[0]:.1f} hours, {hours[1]:.1f} where nothing else runs")
    print(f"Memory, GiB: {report.peak_nbytes / 2**30:.1f} measured, {promised / 2**30:.1f} promised")


if __name__ == "__main__":
    main()
