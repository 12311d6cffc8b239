"""One contract for every batcher: a row gets the same tokens alone or among others, and costs nothing after its end."""

import pytest
import torch

import mixoff
import served as support
import tiny
from batches import LIMITS, alone, rows_of, run, tokens
from mixoff.serving import paged
from mixoff.serving.rows import RowsBatcher
from mixoff.serving.server import make_batcher

KINDS = ("rows", "paged")


@pytest.fixture(params=KINDS)
def batcher(request, model):
    made = make_batcher(request.param, model, support.serving.LIMITS)
    yield made
    made.close()


def test_eight_rows_get_the_tokens_of_each_alone(batcher, model):
    want = alone(batcher, model)
    together = run(batcher, rows_of(model))
    assert tokens(together) == want and [len(ids) for ids in want] == list(LIMITS)
    assert [row.reason for row in together] == ["length"] * 8


def test_newcomers_get_and_change_nothing(batcher, model):
    rows = rows_of(model)
    late = {2: rows[2:4], 3: rows[4:5], 7: rows[5:7], 15: rows[7:]}
    run(batcher, rows[:2], late)
    assert tokens(rows) == alone(batcher, model)


def test_a_newcomer_gets_its_first_token_in_the_step_after_it_joins(batcher, model):
    rows = rows_of(model)
    batcher.join(rows[:1])
    batcher.step()
    batcher.join(rows[1:2])
    before = rows[0].count
    batcher.step()
    batcher.step()
    assert rows[1].count >= 1 and rows[0].count >= before + 1


def test_a_cancelled_row_costs_no_further_pass(batcher, model):
    rows = rows_of(model, 3)
    batcher.join(rows)
    for _ in range(3):
        batcher.step()
    counts = [row.count for row in rows]
    rows[1].cancelled = True
    batcher.step()
    assert rows[1].count == counts[1] and rows[1] not in batcher.rows and rows[1].reason == "cancelled"
    model.model.mixoff.reset_counts()
    for row in rows:
        row.cancelled = True
    batcher.step()
    assert batcher.rows == [] and model.model.mixoff.info().hits == model.model.mixoff.info().misses == 0


def test_the_others_go_on_when_one_is_cancelled(batcher, model):
    want = alone(batcher, model)
    rows = rows_of(model)
    rows[1].listener = lambda news: setattr(rows[1], "cancelled", rows[1].count >= 4)
    run(batcher, rows)
    got = tokens(rows)
    assert got[1] == want[1][:4] and got[:1] + got[2:] == want[:1] + want[2:]


def test_rows_go_on_from_their_tokens_after_clear(batcher, model):
    """As after a pass that failed: a batch begins again, and no token is lost, repeated or drawn differently."""
    rows = rows_of(model)
    batcher.join(rows)
    for _ in range(4):
        batcher.step()
    left = batcher.clear()
    assert batcher.rows == [] and left == [row for row in rows if row.reason is None]
    run(batcher, left)
    assert tokens(rows) == alone(batcher, model)


def test_raw_logprobs_alone_and_together(batcher, model):
    def logprobs(rows):
        told = [[] for _ in rows]
        for row, entries in zip(rows, told, strict=True):
            row.listener = lambda news, entries=entries: entries.extend(news.logprobs)
        return told

    rows, singles = rows_of(model, top_logprobs=2), rows_of(model, top_logprobs=2)
    together, each = logprobs(rows), logprobs(singles)
    run(batcher, rows)
    for row in singles:
        run(batcher, [row])
    for a, b in zip(together, each, strict=True):
        assert [e.token for e in a] == [e.token for e in b]
        assert [e.logprob for e in a] == pytest.approx([e.logprob for e in b], abs=1e-4)


@pytest.mark.parametrize("family", sorted(tiny.FAMILIES))
def test_every_family_can_be_batched(family, tmp_path, model):
    """Hybrids, sliding windows and families with a cache of their own too."""
    loaded = mixoff.load(tiny.save_random(tmp_path, family), "1MB", device="cpu")
    with loaded:
        batcher, rows = RowsBatcher(loaded), rows_of(model, 5)
        run(batcher, rows[:2], {3: rows[2:4], 5: rows[4:]})
        assert tokens(rows) == alone(batcher, model)[:5]
        ids = torch.tensor([rows[0].prompt])
        whole = loaded.generate(ids, max_new_tokens=LIMITS[0], do_sample=False, eos_token_id=None, pad_token_id=0)
        assert rows[0].ids == whole[0].tolist()


def test_padding_does_not_outlive_the_rows_that_needed_it(model):
    batcher = RowsBatcher(model.model)
    rows = rows_of(model)
    long = next(row for row in rows if len(row.prompt) == 30)
    run_until = [row for row in rows if row is not long]
    batcher.join([long, run_until[0]])
    batcher.step()
    width = batcher._batch.mask.shape[1]
    long.cancelled = True
    batcher.step()
    assert batcher._batch.mask.shape[1] < width and bool(batcher._batch.mask.any(0).all())


def test_logits_that_are_not_finite_end_their_row_alone(model):
    row, other = rows_of(model, 2)
    row.take(torch.full((4096,), torch.nan))
    assert row.reason == "error" and other.reason is None


@pytest.mark.parametrize("names", ["OF_MANAGER", "OF_LOOP"])
def test_a_transformers_without_the_private_names_is_refused_in_words(names, model, monkeypatch):
    monkeypatch.setattr(paged, names, (*getattr(paged, names), "_renamed"))
    with pytest.raises(mixoff.MixoffError, match="paged does not fit transformers 5.* which has no _renamed: use"):
        make_batcher("paged", model, support.serving.LIMITS)
