"""The scheduler of `trace.batches` makes the passes that the server's batcher makes."""

import pytest

import mixoff
from mixoff.serving.row import Row
from mixoff.serving.rows import RowsBatcher
from mixoff.serving.sampling import Sampling
from mixoff.text.generation import load_tokenizer
from mixoff.trace.batches import Job, schedule

JOBS = [Job(5, 4), Job(5, 7), Job(5, 2, 1), Job(5, 5, 2), Job(5, 1, 3), Job(5, 3, 4)]  # prompts alike: no padding


@pytest.mark.parametrize("rows", [1, 2, 4])
def test_passes_are_those_of_the_batcher(rows):
    """Kind and tokens of each pass, as the runtime's recorder saw them."""
    folder = mixoff.models.path()
    tokenizer = load_tokenizer(folder)
    waiting = [(job, Row(tokenizer, list(range(10, 15)), job.new, Sampling(temperature=0.0))) for job in JOBS]
    with mixoff.load(folder, fast_bytes="1GiB", prefetch="none") as model, model.mixoff.trace() as recorder:
        batcher, step = RowsBatcher(model), 0
        while waiting or batcher.rows:
            while waiting and waiting[0][0].arrives <= step and running(batcher) < rows:
                batcher.join([waiting.pop(0)[1]])
            batcher.step()
            step += 1
    trace = recorder.trace
    seen = [
        (bool(trace.is_prompt[trace.passes == n][0]), int((trace.passes == n).sum())) for n in sorted({*trace.passes})
    ]
    assert seen == [(one.is_prompt, len(one.tokens)) for one in schedule(JOBS, rows)]


def running(batcher):
    return sum(not row.ended for row in batcher.rows)
