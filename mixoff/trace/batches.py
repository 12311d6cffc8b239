"""Several requests through one model: which tokens a batch scheduler puts into each pass, and the trace of that.

The order is that of the server's batcher (`serving.rows`): a step is one pass with a token of each running request, and
one over the prompts of those that join. Knows no times and no model; which experts a token wants comes from a trace.

Letters: **K** experts per token, **L** layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mixoff.errors import MixoffError
from mixoff.trace.trace import Trace


@dataclass(frozen=True)
class Job:
    """A request: tokens of its prompt, new tokens, and the step before which it arrives."""

    prompt: int
    new: int
    arrives: int = 0

    @property
    def tokens(self) -> int:
        """Tokens that go through the model; the last new one is only told."""
        return self.prompt + self.new - 1


@dataclass(frozen=True)
class Pass:
    """Tokens that go through the model together: pairs of a job's number and a place in its text."""

    step: int
    is_prompt: bool
    tokens: tuple[tuple[int, int], ...]


def schedule(jobs: Sequence[Job], rows: int = 4, chunk: int = 0, continuous: bool = True) -> list[Pass]:
    """The passes that serve `jobs`, first come first served.

    Parameters
    ----------
    rows: jobs computed together
    chunk: largest number of prompt tokens per step; 0 means whole prompts
    continuous: True lets a job join as soon as a row is free, False only when all rows have ended

    Raises MixoffError for jobs without tokens, and for numbers that serve nobody.

    >>> [(p.step, p.is_prompt, p.tokens) for p in schedule([Job(2, 2), Job(1, 1)], rows=1)]
    [(0, True, ((0, 0), (0, 1))), (1, False, ((0, 2),)), (2, True, ((1, 0),))]
    """
    if rows < 1 or chunk < 0:
        raise MixoffError(f"rows is {rows} and chunk {chunk}: at least one row, and 0 or more tokens")
    if wrong := [job for job in jobs if job.prompt < 1 or job.new < 1]:
        raise MixoffError(f"{wrong[0]} has no prompt or wants no token: both must be at least 1")
    waiting = sorted(range(len(jobs)), key=lambda job: jobs[job].arrives)
    at: dict[int, int] = {}  # next place of each job that has a row, in the order in which they joined
    passes: list[Pass] = []
    step = 0
    while waiting or at:
        if not at:
            step = max(step, jobs[waiting[0]].arrives)
        if continuous or not at:
            while waiting and len(at) < rows and jobs[waiting[0]].arrives <= step:
                at[waiting.pop(0)] = 0
        running = [job for job, place in at.items() if place >= jobs[job].prompt]
        room = chunk or sum(job.prompt for job in jobs)
        for is_prompt, tokens in ((False, [(job, at[job]) for job in running]), (True, _prompts(jobs, at, room))):
            if tokens:
                passes.append(Pass(step, is_prompt, tuple(tokens)))
            for job, place in tokens:
                at[job] = place + 1
        at = {job: place for job, place in at.items() if place < jobs[job].tokens}
        step += 1
    return passes


def _prompts(jobs: Sequence[Job], at: dict[int, int], room: int) -> list[tuple[int, int]]:
    """The next prompt tokens to read, at most `room`."""
    unread = [(job, p) for job, place in at.items() for p in range(place, jobs[job].prompt)]
    return unread[:room]


def trace_of(passes: Sequence[Pass], sources: Sequence[Trace]) -> Trace:
    """The trace of `passes`, ready for `simulate`: the tokens of job i are those of sources[i], from its first on.

    A pass asks once for an expert that several of its tokens want. Raises MixoffError for a source that is too short
    or of another shape.
    """
    if not passes:
        raise MixoffError("there is no pass: schedule at least one job")
    tokens = [token for one in passes for token in one.tokens]
    for job in sorted({job for job, _ in tokens}):
        needed = 1 + max(place for other, place in tokens if other == job)
        if job >= len(sources) or sources[job].tokens < needed:
            have = sources[job].tokens if job < len(sources) else "no source"
            raise MixoffError(f"job {job} has {needed} tokens, and its trace {have}: give one trace per job, as long")
    if len({(s.experts.shape[1:], s.num_experts) for s in sources}) != 1:
        raise MixoffError("the sources differ in layers, experts or experts per token: take traces of one model")
    sizes = [len(one.tokens) for one in passes]
    return Trace.from_array(
        np.stack([sources[job].experts[place] for job, place in tokens]),  # (tokens, L, K)
        sources[0].num_experts,
        is_prompt=np.repeat([one.is_prompt for one in passes], sizes),
        passes=np.repeat(np.arange(len(passes)), sizes),
        layers=sources[0].layers,
        expert_nbytes=sources[0].expert_nbytes,
    )
