"""What every rank of `test_ranks.py` does, and what one process does to compare with: `python sharing.py JOB COUNT`.

A job is a JSON file. Ranks are forked from one process that has imported everything once, and each writes its answers
to `JOB.RANK`.
"""

import hashlib
import json
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist

import mixoff
from mixoff.errors import MixoffError
from tiny import decode

IDS = torch.tensor([[3, 11, 40, 7, 5, 90, 33, 12, 8]])


def answers(path, **options):
    """Digests of a prompt's and a greedy answer's logits, and the experts that this process was asked for."""
    model = mixoff.load(path, **options)
    events = []
    with model, torch.no_grad():
        model.mixoff.on_event(events.append)
        with model.mixoff.trace() as recorder:
            prompt = model(IDS.repeat(2, 1)).logits
            tokens, logits = decode(model, IDS, 12)
        info = model.mixoff.info()
        asked = sorted({(event.layer, event.expert) for event in events if event.kind != "evict"})
        requests = info.hits + info.misses + info.prompt_hits + info.prompt_misses
        return {
            "bits": [digest(prompt), digest(logits)],
            "tokens": tokens.tolist(),
            "asked": asked,
            "requests": requests,
            "traced": digest(torch.from_numpy(recorder.trace.experts.copy())),
            "decode": info.decode,
            "experts": info.num_experts,
        }


def digest(tensor):
    """A digest of a tensor's bytes."""
    return hashlib.sha256(tensor.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()


def told(work):
    """The message of the MixoffError that `work` raises."""
    try:
        work()
    except MixoffError as error:
        return str(error)
    return "no error"


def run(job, rank, count):
    """One rank: connect, and answer every case; then what goes wrong on purpose, if the job says so."""
    dist.init_process_group("gloo", init_method=f"file://{job['meet']}", rank=rank, world_size=count)
    results = {"cases": [answers(path, shard=True, **options) for path, options in job["cases"]]}
    if job["faults"]:
        path = job["faults"]
        results["exact"] = told(lambda: mixoff.load(path, "1GiB", shard=True, exact=rank == 1))
        model = mixoff.load(path, "1GiB", shard=True)
        with torch.no_grad():
            results["text"] = told(lambda: model(IDS + rank))
            if rank == 1:  # as the system ends a process that takes too much memory
                os._exit(9)
            results["lost"] = told(lambda: [model(IDS) for _ in range(2)])
    return results


def main():
    """Fork the ranks, and wait for them."""
    file, count = Path(sys.argv[1]), int(sys.argv[2])
    job, children = json.loads(file.read_text()), []
    for rank in range(count):
        if (child := os.fork()) == 0:
            torch.set_num_threads(1)
            result = run(job, rank, count)
            file.with_suffix(f".{rank}").write_text(json.dumps(result))
            os._exit(0)
        children.append(child)
    for child in children:
        os.waitpid(child, 0)


if __name__ == "__main__":
    main()
