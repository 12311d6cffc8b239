"""What is particular to the paged batcher: bounded memory, and refusals. test_batchers.py holds it to the contract."""

import concurrent.futures

import pytest

import mixoff
import served as support
import tiny
from batches import alone, rows_of, tokens
from mixoff.serving.paged import PagedBatcher
from mixoff.serving.row import Row
from mixoff.serving.sampling import Sampling
from mixoff.serving.worker import Worker
from served import NAME, said_alone


def test_rows_that_do_not_fit_in_the_blocks_take_turns(model):
    """96 tokens for eight rows that need a block of 32 or two each: three run at most, and none grows into another."""
    batcher = PagedBatcher(model.model, 8, 256, tokens=96)
    worker, rows, most = Worker(batcher), rows_of(model), []
    for row in rows:
        row.listener = lambda news: most.append(len(batcher.rows))
    worker.start()
    worker.submit(rows)
    support.wait_until(lambda: all(row.reason for row in rows))
    assert worker.stop() and max(most) == 3
    fresh = PagedBatcher(model.model, 8, 256)
    assert tokens(rows) == alone(fresh, model)
    fresh.close()


def test_a_row_that_never_fits_is_refused(model):
    batcher = PagedBatcher(model.model, 8, 256, tokens=64)
    with pytest.raises(mixoff.MixoffError, match="needs the keys and values of 96 tokens, and this server holds 64"):
        batcher.fits(Row(model.tokenizer, [1] * 30, 40, Sampling()))
    batcher.close()


@pytest.mark.parametrize("family", ["jamba", "gpt_oss"])
def test_families_with_other_layers_are_refused_in_words(family, tmp_path):
    loaded = mixoff.load(tiny.save_random(tmp_path, family), "1MB", device="cpu")
    with loaded, pytest.raises(mixoff.MixoffError, match="needs --batcher rows"):
        PagedBatcher(loaded, 8, 128)


def test_a_server_with_pages(model):
    """Mixed requests at once, each as if it were alone; prompts cannot be scored."""
    prompts = ["It was a fine morning", "He", "The capital of Spain is a city that many have seen, and"]
    with support.Running(model, batcher="paged") as server, concurrent.futures.ThreadPoolExecutor(6) as pool:

        def ask(i):
            options = {"temperature": (0, 0.9)[i % 2], "seed": i, "max_tokens": 8 + 4 * i}
            reply = server.client().completions.create(model=NAME, prompt=prompts[i % 3], **options)
            return reply.choices[0].text

        want = [said_alone(model, prompts[i % 3], 8 + 4 * i, temperature=(0, 0.9)[i % 2], seed=i) for i in range(6)]
        assert list(pool.map(ask, range(6))) == want
        reply = server.post("/v1/completions", {"model": NAME, "prompt": "a", "echo": True, "logprobs": 1})
        assert reply.status_code == 400 and "start it with --batcher rows" in reply.text
