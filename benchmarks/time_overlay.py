#!/usr/bin/env python3
"""Draws a token of a runtime that reads its misses from the disk, and the same token as the time model has it.

    python benchmarks/time_overlay.py FOLDER --svg docs/overlay.svg

FOLDER holds the stores of benchmarks/time_check.py. Both time lines come from events of one kind: measured ones as the
runtime told them, solid; modelled ones of `timeline.predict(...).step`, dashed, with attention, which the runtime does
not tell. The token is the one of median length among those that missed as often as the modelled one.
"""

import argparse
import statistics
import sys
from pathlib import Path

import matplotlib
import torch

from mixoff import presets, timeline
from time_check import PROMPT, SETTINGS, Runner, machine, path_of, probe, spec_of

LAYERS = 4  # that are drawn
MISSES = 4  # in them


def first_layers(events):
    """Events of the first layers, from the moment when the first of them begins."""
    events = [e for e in events if e.layer < LAYERS and e.kind in ("miss", "compute") and e.phase == "decode"]
    return events, min(e.t0 for e in events)


def shifted(events, start):
    """The same events from `start` on."""
    return [type(e)(e.token, e.layer, e.expert, e.kind, e.nbytes, e.t0 - start, e.t1 - start, e.phase) for e in events]


def misses(events):
    """How many of the events are misses."""
    return sum(e.kind == "miss" for e in events)


def measured(runner):
    """The median token's events, and how fast the core was."""
    tokens, told = {}, []
    runner.model.mixoff.on_event(told.append)
    loops = [loop for _ in range(3) for loop in runner.run()["python_s"]]
    for event in told:
        if event.phase == "decode":
            tokens.setdefault(event.token, []).append(event)
    lines = [first_layers(events) for events in tokens.values()]
    alike = [shifted(*line) for line in lines if misses(line[0]) == MISSES]
    alike.sort(key=lambda events: max(e.t1 for e in events))
    return alike[len(alike) // 2], loops


def modelled(step):
    """Events of a token that misses as often; its first attention ends where the measured token begins."""
    for seed in range(1000):
        events, _ = first_layers(step.events(seed=seed))
        if misses(events) == MISSES:
            return shifted(events, step.attention_s)
    raise SystemExit(f"no token of the model misses {MISSES} times in {LAYERS} layers")


def main(argv=None):
    """Run, predict, and draw."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--svg", required=True, metavar="FILE")
    args = parser.parse_args(argv)
    setting = next(s for s in SETTINGS if s.model == "mixtral-700m" and s.slots == 3)
    path = path_of(args.folder, setting)
    with torch.inference_mode():
        runner = Runner(spec_of(setting, path))
        runner.run()
        events, loops = measured(runner)
    here = machine([probe(args.folder, {1})], 1, {"python_s": loops})
    cached = runner.model.mixoff.info().hit_rate
    step = timeline.predict(presets.shape_of(str(path)), setting.scheme, here, cached).step
    draw(events, modelled(step), args.svg)
    ms = [1000 * max(e.t1 for e in line) for line in (events, modelled(step))]
    print(f"{LAYERS} layers, {MISSES} misses, prompt of {PROMPT}: measured {ms[0]:.1f} ms, modelled {ms[1]:.1f} ms")
    copies = [
        1000 * statistics.mean(e.t1 - e.t0 for e in line if e.kind == "miss") for line in (events, modelled(step))
    ]
    print(f"a miss on the link: measured {copies[0]:.2f} ms, modelled {copies[1]:.2f} ms")
    return 0


def draw(told, made, path):
    """Two charts with one axis of time."""
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update({"svg.hashsalt": "mixoff", "font.size": 9, "svg.fonttype": "none"})
    fig, axes = plt.subplots(2, 1, figsize=(8, 3.6), sharex=True, layout="constrained")
    timeline.gantt(told, axes[0], f"measured: {LAYERS} layers of mixtral-700m, 3 slots, misses from the disk", False)
    timeline.gantt(made, axes[1], "modelled")
    axes[0].set_xlabel("")
    axes[0].set_xlim(left=min(0.0, *(1e3 * e.t0 for e in made)) - 0.3)
    handles = {label: h for ax in axes for h, label in zip(*ax.get_legend_handles_labels(), strict=True)}
    fig.legend(handles.values(), handles.keys(), ncols=5, loc="outside lower center", frameon=False)
    fig.savefig(path, metadata={"Date": None})


if __name__ == "__main__":
    sys.exit(main())
