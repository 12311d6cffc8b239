"""A batch scheduler, pass by pass: which requests are in a pass, and which experts of a layer their tokens want.

All passes are worked out in Python and shown by the browser, so the widget works without a kernel.

Letters: **E** experts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import anywidget
import matplotlib.pyplot as plt
import traitlets
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from mixoff.classroom import plots
from mixoff.errors import MixoffError
from mixoff.trace.batches import Pass
from mixoff.trace.trace import Trace

HERE = Path(__file__).parent
LETTERS = "ABCDEFGHIJKLMNOP"  # names of jobs
READ, DECODE = ("r", plots.OKABE_ITO["orange"]), ("d", plots.OKABE_ITO["sky"])


def frame_of(one: Pass, sources: Sequence[Trace], layer: int) -> dict:
    """A pass as the browser shows it: its step, its jobs, tokens of each, and for each expert the jobs that want it."""
    jobs = [job for job, _ in one.tokens]
    wanted: list[list[int]] = [[] for _ in range(sources[0].num_experts)]
    for job, place in one.tokens:
        for expert in sources[job].experts[place, layer]:
            wanted[int(expert)].append(job)
    return {"step": one.step, "prompt": one.is_prompt, "jobs": jobs, "wanted": wanted}


class BatchStepper(anywidget.AnyWidget):
    """Step through the passes of each of `runs`, by name, as `trace.batches.schedule` returns them.

    sources: a trace per job; layer: index of the layer whose experts are shown.

    >>> from mixoff.trace.batches import Job, schedule
    >>> source = Trace.from_array([[[0, 1]], [[0, 2]], [[1, 3]]], num_experts=4)
    >>> BatchStepper({"alone": schedule([Job(2, 2)])}, [source]).summary()
    'alone: 2 passes in 2 steps, the busiest expert has 1.3 times the mean load'
    """

    _esm = (HERE / "theme.js").read_text("utf-8") + (HERE / "batch_stepper.js").read_text("utf-8")
    _css = HERE / "batch_stepper.css"
    runs = traitlets.Dict().tag(sync=True)  # frames, by name
    letters = traitlets.Unicode().tag(sync=True)

    def __init__(self, runs: Mapping[str, Sequence[Pass]], sources: Sequence[Trace], layer: int = 0) -> None:
        if not runs or not all(runs.values()) or len(sources) > len(LETTERS):
            raise MixoffError(f"give one run or more, each with a pass, and at most {len(LETTERS)} jobs")
        frames = {name: [frame_of(one, sources, layer) for one in passes] for name, passes in runs.items()}
        super().__init__(runs=frames, letters=LETTERS[: len(sources)])

    def summary(self) -> str:
        """Passes, steps and balance of each run, in one line."""
        return "; ".join(
            f"{name}: {len(frames)} passes in {frames[-1]['step'] + 1} steps, "
            f"the busiest expert has {busiest(frames):.1f} times the mean load"
            for name, frames in self.runs.items()
        )

    def figure(self) -> Figure:
        """Each run as a still figure: a row per job, a column per step; `r` where it reads, `d` where it decodes."""
        steps = max(frames[-1]["step"] for frames in self.runs.values()) + 1
        rows = len(self.letters)
        fig, axes = plt.subplots(len(self.runs), 1, figsize=(8, (0.2 * rows + 0.5) * len(self.runs)), squeeze=False)
        for ax, (name, frames) in zip(axes[:, 0], self.runs.items(), strict=True):
            for frame in frames:
                letter, colour = READ if frame["prompt"] else DECODE
                for job in set(frame["jobs"]):
                    ax.add_patch(Rectangle((frame["step"], job), 1, 1, facecolor=colour, edgecolor="white"))
                    ax.text(frame["step"] + 0.5, job + 0.5, letter, ha="center", va="center", fontsize=6)
            ax.set(xlim=(0, steps), ylim=(rows, 0), yticks=[job + 0.5 for job in range(rows)])
            ax.set_yticklabels(self.letters, fontsize=8)
            ax.set_title(f"{name}: {frames[-1]['step'] + 1} steps", fontsize=9)
            ax.tick_params(length=0)
        axes[-1, 0].set_xlabel("step")
        return fig

    def __repr__(self) -> str:
        return f"BatchStepper({len(self.letters)} jobs, runs {', '.join(self.runs)})"


def busiest(frames: Sequence[dict]) -> float:
    """Load of the busiest expert over the mean load, over all passes of a run."""
    loads = [sum(len(frame["wanted"][e]) for frame in frames) for e in range(len(frames[0]["wanted"]))]
    return max(loads) * len(loads) / sum(loads)
