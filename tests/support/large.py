"""Checkpoints of gigabytes, and conversions of them in processes that are watched.

python tests/support/large.py CHECKPOINT JOBS...     make the checkpoint of 4.5 GB if it is not there; convert, report
"""

import hashlib
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, MixtralConfig

ROOT = Path(__file__).resolve().parents[2]
SHAPE = {"hidden_size": 2048, "intermediate_size": 7168, "num_hidden_layers": 6, "vocab_size": 16384}
EXPERT_NBYTES = 3 * 2048 * 7168 * 2
SHARD_NBYTES = 900_000_000
CHILD = """
import json, sys, torch, transformers, tqdm, filelock
from mixoff.store import convert as conversion, making
import mixoff.quantize.solve_numba
from transformers import MixtralForCausalLM
print("ready", flush=True)
sys.stdin.readline()
done = conversion.run(sys.argv[1], sys.argv[2], sys.argv[3], options=making.Options(int(sys.argv[4])))
print(json.dumps({"source_nbytes": done.source_nbytes, "seconds": done.seconds}))
"""


def write_checkpoint(folder, **shape):
    """A random Mixtral in bf16 with the shapes given, in shards of 0.9 GB: 4.5 GB by default."""
    config = MixtralConfig(**(SHAPE | shape), num_attention_heads=16, num_key_value_heads=4, num_local_experts=8)
    config.architectures, config.dtype = ["MixtralForCausalLM"], torch.bfloat16
    config.save_pretrained(folder)
    with torch.device("meta"):
        shapes = published(
            {n: tuple(t.shape) for n, t in AutoModelForCausalLM.from_config(config).state_dict().items()}
        )
    noise, shard, weight_map = torch.randn(1 << 24, generator=torch.manual_seed(0)).mul_(0.02).bfloat16(), {}, {}
    for i, (name, size) in enumerate(shapes.items()):
        count = torch.Size(size).numel()
        shard[name] = noise.roll(7919 * i).repeat(-(-count // len(noise)))[:count].view(size)
        if sum(t.nbytes for t in shard.values()) > SHARD_NBYTES or i + 1 == len(shapes):
            file = f"model-{len(set(weight_map.values())):05d}.safetensors"
            weight_map |= dict.fromkeys(shard, file)
            save_file({n: t.contiguous() for n, t in shard.items()}, folder / file, metadata={"format": "pt"})
            shard = {}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def published(shapes):
    """Shapes by the names of the Hub: each expert has matrices of its own."""
    named = {}
    for name, size in shapes.items():
        if ".mlp.experts." not in name:
            named[name.replace(".mlp.gate.", ".block_sparse_moe.gate.")] = size
            continue
        prefix = name.split(".mlp.")[0] + ".block_sparse_moe.experts"
        rows, columns = (size[1] // 2, size[2]) if "gate_up" in name else size[1:]
        for e in range(size[0]):
            for w in ("w1", "w3") if "gate_up" in name else ("w2",):
                named[f"{prefix}.{e}.{w}.weight"] = (rows, columns)
    return named


def start(source, target, scheme, jobs):
    """A process that has imported everything and waits for a line before it converts."""
    command = [sys.executable, "-c", CHILD, str(source), str(target), scheme, str(jobs)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT)
    assert process.stdout.readline() == "ready\n"
    return process


def go(process):
    process.stdin.write("\n")
    process.stdin.flush()


def finished(target):
    """How many weights of a conversion in the making are done for certain."""
    journal = Path(f"{target}.partial") / "journal"
    return max(journal.read_bytes().count(b"\n") - 1, 0) if journal.exists() else 0


def anonymous_nbytes(process):
    """Anonymous memory of a process now; 0 once it has ended."""
    text = Path(f"/proc/{process.pid}/status").read_text()
    return next((1024 * int(line.split()[1]) for line in text.splitlines() if line.startswith("RssAnon")), 0)


def measure(source, target, scheme, jobs):
    """Convert: bytes read, seconds, and the peak of anonymous memory beyond that after all imports."""
    process = start(source, target, scheme, jobs)
    before = peak = anonymous_nbytes(process)
    go(process)
    while process.poll() is None:
        peak = max(peak, anonymous_nbytes(process))
        time.sleep(0.005)
    assert process.returncode == 0
    return json.loads(process.stdout.readline()) | {"peak_nbytes": peak - before}


def digests(folder):
    """SHA-256 of every file."""
    return {path.name: digest(path) for path in sorted(Path(folder).iterdir())}


def digest(path):
    found = hashlib.sha256()
    with path.open("rb") as f:
        while piece := f.read(1 << 22):
            found.update(piece)
    return found.hexdigest()


if __name__ == "__main__":
    source = Path(sys.argv[1])
    if not source.exists():
        write_checkpoint(source)
    for jobs in map(int, sys.argv[2:]):
        target = source.with_name("store")
        got = measure(source, target, "mixed", jobs)
        got["MB_per_s"] = got["source_nbytes"] / got["seconds"] / 1e6
        print(json.dumps({"jobs": jobs} | got), flush=True)
        shutil.rmtree(target)
