"""A batch scheduler: every token once and in order, never more rows or prompt tokens than allowed, first come first
served; and its trace is what the simulator would be told by hand.
"""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import mixoff
from mixoff.errors import MixoffError
from mixoff.trace.batches import Job, schedule, trace_of

jobs_of = st.lists(st.builds(Job, st.integers(1, 9), st.integers(1, 6), st.integers(0, 8)), min_size=1, max_size=6)


@given(jobs_of, st.integers(1, 4), st.integers(0, 5), st.booleans())
def test_every_token_goes_through_once_and_in_order(jobs, rows, chunk, continuous):
    passes = schedule(jobs, rows, chunk, continuous)
    for i, job in enumerate(jobs):
        assert [p for one in passes for j, p in one.tokens if j == i] == list(range(job.tokens))
    for one in passes:
        assert len({j for j, _ in one.tokens}) <= rows
        assert all((place < jobs[j].prompt) == one.is_prompt for j, place in one.tokens)
        assert all(jobs[j].arrives <= one.step for j, _ in one.tokens)
        assert one.is_prompt or len({j for j, _ in one.tokens}) == len(one.tokens), "a token each"
        assert not (one.is_prompt and chunk and len(one.tokens) > chunk)
    order = [(one.step, one.is_prompt) for one in passes]
    assert order == sorted(set(order)), "at most a pass of either kind per step, decoding first"


@given(jobs_of, st.integers(1, 4), st.integers(0, 5))
def test_first_come_first_served(jobs, rows, chunk):
    first = {}
    for one in schedule(jobs, rows, chunk):
        for job, _ in one.tokens:
            first.setdefault(job, one.step)
    begun = [first[job] for job in sorted(range(len(jobs)), key=lambda job: jobs[job].arrives)]
    assert begun == sorted(begun)


@given(jobs_of, st.integers(1, 4))
def test_whoever_may_join_at_once_is_never_later(jobs, rows):
    steps = {kind: schedule(jobs, rows, continuous=kind)[-1].step for kind in (True, False)}
    assert steps[True] <= steps[False]


@given(jobs_of, st.integers(1, 4))
def test_a_running_row_gets_a_token_in_every_step(jobs, rows):
    """Continuously and with whole prompts: once a job decodes, it does so step after step."""
    passes = schedule(jobs, rows)
    for i, _ in enumerate(jobs):
        steps = [one.step for one in passes if not one.is_prompt and any(j == i for j, _ in one.tokens)]
        assert steps == list(range(steps[0], steps[0] + len(steps))) if steps else True


def test_a_static_batch_waits_for_its_last_row():
    jobs = [Job(1, 5), Job(1, 2), Job(1, 2)]
    assert [one.step for one in schedule(jobs, 2, continuous=False) if (2, 0) in one.tokens] == [5]
    assert [one.step for one in schedule(jobs, 2) if (2, 0) in one.tokens] == [2]


def test_nothing_happens_until_somebody_arrives():
    assert [one.step for one in schedule([Job(2, 2, arrives=7)])] == [7, 8]


def test_the_trace_is_that_of_the_tokens():
    first = mixoff.Trace.from_array([[[0, 1]], [[2, 3]], [[4, 5]]], expert_nbytes=10)
    second = mixoff.Trace.from_array([[[6, 7]], [[0, 2]]])
    trace = trace_of(schedule([Job(2, 2), Job(1, 2)], rows=2), [first, second])
    assert trace.experts[:, 0].tolist() == [[0, 1], [2, 3], [6, 7], [4, 5], [0, 2]]
    assert trace.passes.tolist() == [0, 0, 0, 1, 1] and trace.is_prompt.tolist() == [True] * 3 + [False] * 2
    assert trace.expert_nbytes == 10


def test_one_job_alone_is_its_own_trace():
    """What the simulator counts for a batch of one is what it counts for the sequence."""
    source = mixoff.trace.load_domains(mixoff.models.path() / "traces.npz")["novel"].select(np.arange(80))
    alone = trace_of(schedule([Job(1, 80)], rows=1), [source])
    told = mixoff.Trace.from_array(source.experts, 8, is_prompt=np.arange(80) < 1)
    assert mixoff.simulate(alone).to_dict() == mixoff.simulate(told).to_dict()


def test_tokens_of_a_pass_share_an_expert():
    same = mixoff.Trace.from_array([[[0, 1]]] * 9)
    counts = mixoff.simulate(trace_of(schedule([Job(1, 9)] * 4, rows=4), [same] * 4), slots=2)
    assert (counts.hits, counts.misses, counts.prompt_misses) == (2 * 8, 0, 2)


@pytest.mark.parametrize(
    ("jobs", "options", "words"),
    [
        ([Job(0, 1)], {}, "both must be at least 1"),
        ([Job(1, 0)], {}, "both must be at least 1"),
        ([Job(1, 1)], {"rows": 0}, "at least one row"),
        ([Job(1, 1)], {"chunk": -1}, "0 or more tokens"),
    ],
)
def test_what_serves_nobody_is_refused(jobs, options, words):
    with pytest.raises(MixoffError, match=words):
        schedule(jobs, **options)


def test_sources_must_fit():
    short, other = mixoff.Trace.from_array([[[0, 1]]]), mixoff.Trace.from_array([[[0, 1]]] * 4, num_experts=4)
    long = mixoff.Trace.from_array([[[0, 1]]] * 4)
    with pytest.raises(MixoffError, match="job 0 has 3 tokens, and its trace 1"):
        trace_of(schedule([Job(2, 2)]), [short])
    with pytest.raises(MixoffError, match="job 1 has 1 tokens, and its trace no source"):
        trace_of(schedule([Job(1, 1)] * 2), [short])
    with pytest.raises(MixoffError, match="take traces of one model"):
        trace_of(schedule([Job(1, 1)] * 2), [long, other])
    with pytest.raises(MixoffError, match="there is no pass"):
        trace_of([], [long])
