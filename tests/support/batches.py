"""Rows of all kinds for the tests of batchers, and what they get."""

import torch

from mixoff.serving.row import Row
from mixoff.serving.sampling import Sampling

PROMPTS = (5, 14, 3, 9, 30, 2, 11, 7)  # tokens of each
LIMITS = (12, 20, 5, 16, 9, 25, 1, 14)


def rows_of(model, count=8, **sampling):
    """Rows of all kinds: greedy ones, sampled ones, short and long."""
    made = []
    for i in range(count):
        ids = torch.randint(3, 120, (PROMPTS[i],), generator=torch.Generator().manual_seed(i)).tolist()
        settings = Sampling(**{"temperature": (0.0, 1.0, 0.7)[i % 3], "top_p": 1 - 0.1 * (i % 2), "seed": i} | sampling)
        made.append(Row(model.tokenizer, ids, LIMITS[i], settings))
    return made


def run(batcher, rows, late=None):
    """Let `rows` run to their ends; late: rows by the number of the step before which they join."""
    late = dict(late or {})
    batcher.join(rows)
    steps = 0
    while batcher.rows or late:
        batcher.join(late.pop(steps, []))
        batcher.step()
        steps += 1
    return rows


def tokens(rows):
    return [row.ids[len(row.prompt) :] for row in rows]


def alone(batcher, model, **sampling):
    """The tokens of each row when nothing else runs."""
    rows = rows_of(model, **sampling)
    for row in rows:
        run(batcher, [row])
    return tokens(rows)
