"""Students of the bundled model, half the experts or one dense network per layer: begun here, trained by train_tiny.

    python training/distil.py begin four .train/four
    python training/train_tiny.py train --init .train/four --teacher TEACHER --out .train/run-four --minutes 40 ...
    python training/distil.py pack four .train/run-four mixoff/models/students

`four` begins with four experts of each layer chosen by loss, as `mixoff prune` does, `dense` with two of
them side by side. A dense network is a mixture of one expert that every token uses: its router has one row, and its
weight is 1. So both are Mixtral to transformers and to mixoff. `pack` writes a store, experts in 4 bits and attention
in 8. A run that was stopped goes on with `--resume`.

Letters: E experts, K experts per token, F expert width.
"""

import argparse
import json
import tempfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, MixtralConfig

import mixoff
from mixoff.quantize import Precision, Scheme

SHAPES = {  # E, K, F: both students compute as much for a token as the teacher does
    "four": (4, 2, 192),
    "dense": (1, 1, 384),
}
# what `choose.by_loss` kept on the first 512 tokens of each domain of the calibration text
KEPT = ((3, 4, 6, 7), (1, 5, 6, 7), (1, 3, 5, 7), (1, 4, 5, 6), (0, 2, 4, 6), (0, 2, 3, 4), (0, 1, 4, 7), (1, 3, 5, 7))
SCHEME = Scheme(experts=Precision(4, 64), attention=Precision(8, 64))
OF_RUN = ("step", "tokens", "cpu_s", "elapsed_s", "history", "recipes")


def empty(teacher, name):
    """A student with the teacher's backbone, and networks that are still to be filled."""
    E, K, F = SHAPES[name]
    own = {"num_local_experts": E, "num_experts_per_tok": K, "intermediate_size": F}
    student = AutoModelForCausalLM.from_config(MixtralConfig(**{**teacher.config.to_dict(), **own}))
    backbone = {key: w for key, w in teacher.state_dict().items() if ".mlp." not in key}
    student.load_state_dict(backbone, strict=False)
    return student


@torch.no_grad()
def begin(args):
    """Writes a student's first weights."""
    teacher = AutoModelForCausalLM.from_pretrained(mixoff.models.path(), dtype=torch.float32)
    student = empty(teacher, args.student)
    for mine, theirs, kept in zip(student.model.layers, teacher.model.layers, KEPT, strict=True):
        gate_up, down = theirs.mlp.experts.gate_up_proj[list(kept)], theirs.mlp.experts.down_proj[list(kept)]
        if args.student == "four":
            mine.mlp.gate.weight.copy_(theirs.mlp.gate.weight[list(kept)])
        else:  # the first two as one network, each with half the weight
            gate, up = gate_up[:2].chunk(2, 1)
            gate_up, down = torch.cat([*gate, *up])[None], 0.5 * torch.cat(list(down[:2]), 1)[None]
            mine.mlp.gate.weight.zero_()
        mine.mlp.experts.gate_up_proj.copy_(gate_up)
        mine.mlp.experts.down_proj.copy_(down)
    student.half().save_pretrained(args.folder)


def pack(args):
    """Writes a trained student as a store, with training.json."""
    state = torch.load(Path(args.run) / "checkpoint.pt")
    student = empty(AutoModelForCausalLM.from_pretrained(mixoff.models.path(), dtype=torch.float32), args.student)
    student.load_state_dict(state["model"])
    with tempfile.TemporaryDirectory() as folder:
        student.half().save_pretrained(folder)
        target = mixoff.convert(folder, Path(args.folder) / args.student, SCHEME, progress=False)
    kept = {key: state["kept"][key] for key in OF_RUN}
    (target / "training.json").write_text(json.dumps(kept, indent=2) + "\n")
    print(f"{target}: {sum(p.stat().st_size for p in target.iterdir()) / 1e6:.1f} MB")


def main():
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(required=True)
    for job in (begin, pack):
        add = commands.add_parser(job.__name__, help=job.__doc__)
        add.set_defaults(job=job)
        add.add_argument("student", choices=SHAPES)
        if job is pack:
            add.add_argument("run", help="folder of the run, with checkpoint.pt")
        add.add_argument("folder", help="folder to write")
    args = parser.parse_args()
    args.job(args)


if __name__ == "__main__":
    main()
