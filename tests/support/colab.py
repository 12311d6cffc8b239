"""Loading on Colab's free machine, rehearsed: a real limit on memory, two threads, a slow disk, a card without bytes.

    python tests/support/colab.py FOLDER                          Mixtral's size in `mixed` (15 GB), 12.7 GiB, 0.5 GB/s
    python tests/support/colab.py FOLDER --layers 4 --hub         fewer layers, from a Hub server on loopback

Makes a store of random weights in FOLDER if it is not there. Prints one line of JSON: seconds by phase, peaks, slots.
What it cannot show is the driver: memory of the card is never written, and copies to it do nothing.
"""

import argparse
import contextlib
import gc
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

SUPPORT = Path(__file__).resolve().parent
LIMIT, DISK_BPS, T4_NBYTES = "12.7GiB", 0.5e9, int(14.75 * 2**30)
THREADS = "2"


class Card:
    """A T4: its memory is address space that nobody touches, and events have always passed."""

    def __init__(self, nbytes):
        import torch

        self.where, self.nbytes, self.locked = torch.device("cpu"), nbytes, 0
        self.copying = self.returning = self

    def describe(self):
        from mixoff.transfer.cuda import Gpu

        gc.collect()  # as `cuda.describe`
        return Gpu("Tesla T4", (7, 5), self.nbytes, self.nbytes)

    def empty(self, nbytes):
        import torch

        return torch.empty(nbytes, dtype=torch.uint8)

    def pinned(self, nbytes):
        """Every page is there at once, as page-locking makes it."""
        from mixoff.pages import slab

        memory = slab(nbytes, inherited=False)
        memory.fill_(0)
        self.locked = max(self.locked, nbytes)
        return memory

    def event(self):
        return self

    computing = event

    def query(self):
        return True

    def nothing(self, *args):
        pass

    copy = unpin = synchronize = give_back = wait_event = record_event = nothing


class Disk:
    """Reads take as long as at this rate, all threads together."""

    def __init__(self, Bps):
        self.Bps, self.lock, self.free = Bps, threading.Lock(), 0.0

    def slow(self, read_into):
        def slowly(reader, *args):
            nbytes = read_into(reader, *args)
            with self.lock:
                self.free = max(self.free, time.monotonic()) + nbytes / self.Bps
                wait = self.free - time.monotonic()
            time.sleep(max(0.0, wait))
            return nbytes

        return slowly


def timed(seconds, name, fn):
    """`fn`, whose seconds are noted the first time."""

    def wrapped(*args, **kwargs):
        start = time.monotonic()
        try:
            return fn(*args, **kwargs)
        finally:
            seconds.setdefault(name, round(time.monotonic() - start, 1))

    return wrapped


def rehearse(name, disk_Bps, card_nbytes, loads):
    """Load so many times, as a cell that is run again does. What is found, as plain values."""
    from unittest import mock

    import mixoff
    from mixoff.bench import limits
    from mixoff.checkpoints.find import find
    from mixoff.loading import load, preload
    from mixoff.store.readers import DirectReader, DroppingReader, ExpertReader
    from mixoff.transfer import cuda

    seconds, slots, peaks, locked, disk = {}, [], [], [], Disk(disk_Bps)
    mock.patch.object(cuda, "pick", lambda device: Card(card_nbytes)).start()
    mock.patch.object(load, "load_backbone", timed(seconds, "backbone", load.load_backbone)).start()
    mock.patch.object(preload, "fill", timed(seconds, "experts", preload.fill)).start()
    for kind in (ExpertReader, DirectReader, DroppingReader):
        if "read_into" in vars(kind):
            mock.patch.object(kind, "read_into", disk.slow(kind.read_into)).start()
    folder = timed(seconds, "files", find)(name)
    for _ in range(loads):
        with limits.Peak() as peak, mixoff.load(name, device="cuda") as model:
            info = model.mixoff.info()
            slots.append(info.capacity)
            locked.append(model.mixoff.device.locked)
        peaks.append(peak.nbytes)
        del model  # its backbone would be in VRAM
    experts = info.num_experts * info.expert_nbytes
    return {
        "seconds": seconds, "slots": slots, "experts": info.num_experts, "experts_nbytes": experts, "io": info.io,
        "peak_nbytes": peaks, "locked_nbytes": locked, "store": folder.is_store,
    }  # fmt: skip


def child(args, limit=None):
    """Run `rehearse` in a process of its own, below a limit of memory; its result, and what it printed."""
    words = limit.words if limit else ()
    command = [*words, sys.executable, __file__, args["name"], "--child", json.dumps(args)]
    env = os.environ | args.get("env", {}) | {"OMP_NUM_THREADS": THREADS, "NUMBA_NUM_THREADS": THREADS}
    ran = subprocess.run(command, capture_output=True, text=True, env=env)
    if ran.returncode:
        raise RuntimeError(f"ended with {ran.returncode} (-9: killed for its memory): {ran.stderr[-2000:]}")
    return json.loads(ran.stdout.splitlines()[-1]) | {"said": ran.stderr}


@contextlib.contextmanager
def hub_of(folder):
    """Environment in which `org/colab` on a Hub is that folder."""
    from hub_server import Hub

    hub = Hub()
    hub.repos["org/colab"] = folder
    with hub.serve() as address, tempfile.TemporaryDirectory(dir=folder.parent) as home:
        yield {"HF_ENDPOINT": address, "HF_HOME": home, "HF_HUB_OFFLINE": "0"}


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder")
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--limit", default=LIMIT)
    parser.add_argument("--disk", type=float, default=DISK_BPS / 1e9, metavar="GB/s")
    parser.add_argument("--card", default=T4_NBYTES, help="bytes of the card's memory")
    parser.add_argument("--loads", type=int, default=2, help="times to load, one after the other")
    parser.add_argument("--hub", action="store_true", help="from a Hub server on loopback")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        asked = json.loads(args.child)
        print(json.dumps(rehearse(*(asked[key] for key in ("name", "disk_Bps", "card_nbytes", "loads")))))
        return
    from transformers import MixtralConfig

    from mixoff.bench import limits, synthetic
    from mixoff.units import parse_nbytes

    folder = synthetic.write_store(MixtralConfig(num_hidden_layers=args.layers, dtype="bfloat16"), "mixed", args.folder)
    limits.forget(folder)
    asked = {"name": str(folder), "disk_Bps": 1e9 * args.disk, "card_nbytes": parse_nbytes(args.card)}
    asked |= {"loads": args.loads}
    with limits.limit(parse_nbytes(args.limit)) as limit, contextlib.ExitStack() as stack:
        if args.hub:
            asked |= {"name": "org/colab", "env": stack.enter_context(hub_of(folder))}
        print(json.dumps(child(asked, limit)))


if __name__ == "__main__":
    main()
