"""A look at the card of this machine, for chapters that otherwise compute without one."""

from __future__ import annotations

import os
import subprocess
import sys

LOOK = """
import time, torch
EXPERT_NBYTES, ROUNDS, GIB = 66_406_180, 20, 2**30
if torch.cuda.is_available():
    free, total = torch.cuda.mem_get_info()
    ram = torch.empty(EXPERT_NBYTES, dtype=torch.uint8, pin_memory=True)
    vram = torch.empty_like(ram, device="cuda")
    vram.copy_(ram)
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(ROUNDS):
        vram.copy_(ram, non_blocking=True)
    torch.cuda.synchronize()
    seconds = (time.perf_counter() - start) / ROUNDS
    print(f"{torch.cuda.get_device_name()}: {free / GIB:.2f} of {total / GIB:.2f} GiB free measured")
    print(f"one expert of 66.4 MB in {1000 * seconds:.2f} ms, {EXPERT_NBYTES / seconds / 1e9:.1f} GB/s measured")
else:
    print("no card here: nothing to measure")
"""


def look() -> None:
    """Print the card's free memory and how fast an expert of Mixtral is copied to it, or that there is no card.

    It runs in a process of its own, since `setup(gpu=False)` hides the card from this one.
    """
    env = {name: value for name, value in os.environ.items() if name != "CUDA_VISIBLE_DEVICES"}
    done = subprocess.run([sys.executable, "-c", LOOK], env=env, capture_output=True, text=True)
    print(done.stdout.strip() or f"the card could not be measured: {done.stderr.strip().splitlines()[-1]}")
