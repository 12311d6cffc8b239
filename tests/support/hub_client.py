"""A process that may use the network (on loopback), and does what a test asks: one line of JSON in, one out.

The tests themselves run offline, and huggingface_hub reads its settings once, when it is imported.
"""

import json
import sys
from pathlib import Path


def convert(source, target, **how):
    import mixoff

    return str(mixoff.convert(source, target, **how))


def tokens(path, **how):
    """Eight greedy tokens, and the counters of the cache."""
    import torch

    import mixoff

    with mixoff.load(path, **how) as model:
        ids = model.generate(torch.arange(5, 14)[None], max_new_tokens=8, do_sample=False, pad_token_id=0)
        return ids[0].tolist()


def config(path):
    from mixoff.checkpoints import hub, names

    return str(hub.config_folder(names.parse(path)))


def watched(source, target, **how):
    """Convert, and what the folder in the making held at most: bytes and number of shards, bytes in all."""
    from mixoff.checkpoints import hub

    partial, peaks = Path(f"{target}.partial"), []

    def look():
        sizes = {p: p.stat().st_size for p in partial.rglob("*") if p.is_file()}
        shards = [n for p, n in sizes.items() if p.suffix == ".safetensors" and p.parent.name == "shards"]
        peaks.append((sum(shards), len(shards), sum(sizes.values())))

    acquire, release = hub.HubShards.acquire, hub.HubShards.release
    hub.HubShards.acquire = lambda self, file: (acquire(self, file), look())[0]
    hub.HubShards.release = lambda self, file: (look(), release(self, file), look())[1]
    try:
        convert(source, target, **how)
    finally:
        hub.HubShards.acquire, hub.HubShards.release = acquire, release
    shards, files, everything = map(max, zip(*peaks, strict=True))
    return {"shards": shards, "files": files, "all": everything, "left": partial.exists()}


def main():
    from huggingface_hub import constants

    constants.DOWNLOAD_CHUNK_SIZE = 100_000  # bytes that a dropped connection costs at most: 10 MB, more than our files
    for line in sys.stdin:
        name, args, how = json.loads(line)
        try:
            answer = {"ok": globals()[name](*args, **how)}
        except Exception as error:
            answer = {"error": str(error), "type": type(error).__name__}
        print(json.dumps(answer), file=sys.__stdout__, flush=True)


if __name__ == "__main__":
    sys.stdout = sys.stderr
    main()
