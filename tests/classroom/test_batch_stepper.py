"""A batch, pass by pass: what the widget shows is the schedule, and the experts of its tokens."""

import matplotlib
import numpy as np
import pytest

matplotlib.use("Agg")

import mixoff
from mixoff.errors import MixoffError
from mixoff.trace.batches import Job, schedule, trace_of
from mixoff.widgets import BatchStepper
from mixoff.widgets.batch_stepper import busiest

JOBS = [Job(4, 3), Job(2, 5), Job(3, 2, arrives=1)]


@pytest.fixture(scope="module")
def sources():
    novel = mixoff.trace.load_domains(mixoff.models.path() / "traces.npz")["novel"]
    return [novel.select(np.arange(20 * i, 20 * i + 20)) for i in range(3)]


def test_frames_hold_every_request_of_the_layer(sources):
    passes = schedule(JOBS, rows=2)
    trace = trace_of(passes, sources)
    frames = BatchStepper({"a": passes}, sources, layer=3).runs["a"]
    loads = np.array([[len(jobs) for jobs in frame["wanted"]] for frame in frames])
    for n, row in enumerate(loads):
        assert row.tolist() == np.bincount(trace.experts[trace.passes == n, 3].ravel(), minlength=8).tolist()
    assert [frame["prompt"] for frame in frames] == [one.is_prompt for one in passes]
    assert busiest(frames) == pytest.approx(loads.sum(0).max() / loads.sum(0).mean())


def test_what_is_no_batch_is_refused(sources):
    for runs, given in (({}, sources), ({"a": []}, sources), ({"a": schedule(JOBS)}, sources * 6)):
        with pytest.raises(MixoffError, match="one run or more, each with a pass, and at most 16 jobs"):
            BatchStepper(runs, given)


def test_the_still_twin_has_a_chart_per_run(sources):
    stepper = BatchStepper({"whole": schedule(JOBS, 2), "chunks": schedule(JOBS, 2, chunk=2)}, sources)
    fig = stepper.figure()
    assert len(fig.axes) == 2
    for ax, frames in zip(fig.axes, stepper.runs.values(), strict=True):
        letters = [text.get_text() for text in ax.texts]
        assert letters.count("d") == sum(len(frame["jobs"]) for frame in frames if not frame["prompt"])
        assert letters.count("r") == sum(len(set(frame["jobs"])) for frame in frames if frame["prompt"])
    assert repr(stepper) == "BatchStepper(3 jobs, runs whole, chunks)"
    matplotlib.pyplot.close(fig)
