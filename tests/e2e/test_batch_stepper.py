"""BatchStepper in Chromium, without Jupyter: every pass of a schedule, and the experts that it touches."""

import numpy as np
import pytest

import mixoff
from mixoff import models
from mixoff.trace.batches import Job, schedule
from mixoff.widgets import BatchStepper

pytestmark = pytest.mark.e2e


@pytest.fixture(scope="module")
def novel():
    trace = mixoff.trace.load_domains(models.path() / "traces.npz")["novel"]
    return trace.select(np.arange(60))


@pytest.mark.parametrize("dark", [False, True])
def test_a_batch_is_stepped_through_pass_by_pass(mount, novel, dark):
    jobs = [Job(6, 4), Job(3, 5), Job(9, 2, arrives=2)]
    runs = {"continuous": schedule(jobs, rows=2), "chunks": schedule(jobs, rows=2, chunk=4)}
    stepper = BatchStepper(runs, [novel] * 3, layer=4)
    page = mount(stepper, dark)
    root = page.locator(".mixoff-batch")
    for name, frames in stepper.runs.items():
        page.locator(".run").select_option(name)
        assert root.get_attribute("data-passes") == str(len(frames))
        page.locator(".step").focus()
        for at, frame in enumerate(frames):
            counts = [int(text) for text in page.locator(".count").all_inner_texts()]
            assert counts == [len(jobs) for jobs in frame["wanted"]]
            assert page.locator(".ball").count() == sum(counts) == 2 * len(frame["jobs"])
            shown = (root.get_attribute("data-at"), root.get_attribute("data-touched"))
            assert shown == (str(at), str(sum(map(bool, counts))))
            assert page.locator(".cell.now.read, .cell.now.decode").count() == len(set(frame["jobs"]))
            page.keyboard.press("Enter")
        assert page.locator(".step").is_disabled()
    assert "prompt tokens of C" in page.locator(".said").inner_text() or "decodes" in page.locator(".said").inner_text()
    assert page.get_by_role("slider", name="pass").get_attribute("aria-valuetext").endswith(f"of {len(frames)}")
    assert page.complaints == []
