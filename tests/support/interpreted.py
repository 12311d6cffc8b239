"""Products in Triton without a card: cases, and how large their errors are, as a share of what is allowed.

As a program it asks Triton's interpreter, in a process of its own (`TRITON_INTERPRET=1` must be set before imports):
it reads one case per line as JSON, and answers each with one line. test_emulated.py asks the emulator instead.
"""

import json
import sys
from dataclasses import replace
from unittest import mock

import torch

import _interpreter
from mixoff import kernels
from mixoff.kernels.triton import products, tiles
from mixoff.kernels.triton import strided as triton_strided
from mixoff.quantize import rotation
from mixoff.quantize.strided import Form, StridedTensor, packed_nbytes
from mixoff.quantize.tensor import QTensor
from mixoff.runtime import experts
from tolerances import product_bound

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
REACHED = []  # memory that kernels know by its address, not as a tensor
ONE_PROGRAM = tiles.Tile(128, 16, 1, 4)  # a whole block: the interpreter's time goes by programs


def random_weight(n, k, bits, group):
    """Every code and any metadata, as no solver would leave it."""
    w = QTensor.empty((n, k), bits, group)
    for name, part in w.parts.items():
        if part.is_floating_point():
            part.copy_(torch.rand(part.shape) * (-0.02 if name == "min_top" else 0.02))
        else:
            part.view(torch.uint8).random_(0, 256)
    return w


def random_strided(n, k, bits, group, scale_group):
    """Two matrices as they lie in a slot, the second four bytes after a multiple of 16; grids that differ by column."""
    form = Form(bits, group, scale_group, matrices=2)
    buffer = torch.randint(256, (packed_nbytes((n, k), form),), dtype=torch.uint8)
    w = StridedTensor.from_buffer(buffer, 0, (n, k), form)
    for parts in w.matrices:
        grids = parts["meta.meta_scale.scale"], parts["meta.meta_scale.zero"]
        grids[0].copy_(1e-4 * (1 + torch.rand(grids[0].shape)))
        grids[1].copy_(-20 * torch.rand(grids[1].shape))
        parts["meta.meta_zero.scale"].fill_(2**bits / 270)  # zeros lie among the codes
        parts["meta.meta_zero.zero"].fill_(-5)
    return w


def worst(out, true, bound):
    """The largest error as a share of its bound; infinite for what is not a number."""
    return float(((out.double() - true).abs() / bound).nan_to_num(torch.inf).max())


def sums(w, x, out=None):
    """fp32 sums against fp64 on the dequantized weights."""
    weights = w.dequantize()
    out = products.linear(x, w, torch.float32) if out is None else out
    return worst(out, x.double() @ weights.double().t(), product_bound(x.float(), weights))


def linear(w, x):
    """The same; and other dtypes are the fp32 result, rounded."""
    out = products.linear(x, w, torch.float32)
    assert torch.equal(products.linear(x, w), out.to(x.dtype)), "rounded otherwise"
    return sums(w, x, out)


def alone(x, w):
    """The fused gate of one expert."""
    return products.gated(x, w, (w.image, 0), 1)[0]


def gated(w, x):
    """silu's slope is at most 1.1, so the error of h stays within that of gate and up, each times the other's size."""
    weights = w.dequantize()
    gate, up = (x.double() @ weights.double().t()).chunk(2, 1)
    gate_bound, up_bound = product_bound(x.float(), weights).chunk(2, 1)
    true = torch.nn.functional.silu(gate) * up
    allowed = 1.1 * gate_bound * up.abs() + up_bound * gate.abs() + 8 * 2.0**-24 * true.abs()
    return worst(alone(x, w), true, allowed)


def rotated(w, x):
    """The rotation bit for bit, and an expert whose last matrix is rotated, within fp16's rounding."""
    assert torch.equal(products.rotated(x), rotation.rotate(x)), "other additions than torch's"
    down = replace(random_weight(w.shape[1], w.shape[0] // 2, w.bits, w.group_size), rotated=True)
    true = alone(x, w).double() @ down.dequantize().double().t()
    bound = torch.finfo(x.dtype).eps * true.abs() + 1e-5 * true.abs().max()
    out = kernels.linear(x, replace(random_weight(8, x.shape[1], w.bits, w.group_size), rotated=True))
    assert out.dtype == x.dtype and out.isfinite().all()
    return worst(kernels.gated_mlps(x, [(w, down)])[0], true, bound)


def grouped(w, x, places=3):
    """Several experts in one launch, each bit for bit as alone; 0, or infinite if one differs."""
    N, K = x.shape[1], w.shape[0] // 2
    buffer = torch.empty(places, -(-(2 * w.nbytes + 64) // 256) * 256, dtype=torch.uint8)  # as in an arena of slots
    pairs = [_in_slot(slot, (w.shape, (N, K)), w.bits, w.group_size) for slot in buffer]
    REACHED[:] = [w.image for pair in pairs for w in pair]
    together = kernels.gated_mlps(x, pairs[::-1])
    each = torch.stack([kernels.gated_mlps(x, [pair])[0] for pair in pairs[::-1]])
    assert together.dtype == x.dtype and together.isfinite().all()
    return 0.0 if torch.equal(together, each) else torch.inf


def _in_slot(slot, shapes, bits, group):
    """Matrices next to each other in the bytes of a slot."""
    found, at = [], 0
    for shape in shapes:
        honest = random_weight(*shape, bits, group)
        found.append(QTensor.from_buffer(slot, at, shape, bits, group))
        slot[at : at + honest.nbytes], at = honest.image, at + honest.nbytes
    return tuple(found)


def dense(w, x, module=products):
    """Weights rounded once to x's dtype, as those of the reference, and results once more."""
    weights, step = w.dequantize(), torch.finfo(x.dtype).eps
    size = x.double().abs() @ weights.double().abs().t()
    bound = product_bound(x.float(), weights) + step * size
    return worst(module.dense(x, w), x.double() @ weights.double().t(), bound)


def unfinished(w, x):
    """What is not finite shows in every output of its row, and in no other: 0, or infinite if it does not."""
    for bad in (torch.inf, -torch.inf, torch.nan):
        spoilt = x.clone()
        spoilt[0, -1] = bad
        out = products.linear(spoilt, w)
        if out[0].isfinite().any() or not out[1:].isfinite().all():
            return torch.inf
    return 0.0


def expert(w, x):
    """A whole expert by way of the dispatch: the fused one within fp16's rounding of the generic steps in fp64."""
    from transformers import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralExperts

    F, D = w.shape[0] // 2, w.shape[1]
    config = MixtralConfig(hidden_size=D, intermediate_size=F, num_local_experts=2)
    weights = {"gate_up_proj": w, "down_proj": random_weight(D, F, w.bits, w.group_size)}
    module = MixtralExperts(config)
    assert kernels.choose(x, w) == "triton" and experts.fuses(module, x, weights, False)
    many = x[:1].expand(tiles.MOST_ROWS + 1, -1)
    assert kernels.choose(many, w) == "triton-dense" and not experts.fuses(module, many, weights, False)
    gate, up = (x.double() @ w.dequantize().double().t()).chunk(2, 1)
    true = (torch.nn.functional.silu(gate) * up) @ weights["down_proj"].dequantize().double().t()
    out = experts.expert_mlp(module, x, weights, None)
    assert out.dtype == x.dtype
    return worst(out, true, torch.finfo(x.dtype).eps * true.abs() + 1e-5 * true.abs().max())


def strided(w, x):
    """By way of the dispatch. Another slot gives the same bits; parts apart, as attention has them, begin at other
    places, where threads may take other words, and so may sum in another order.
    """
    assert kernels.choose(x, w) == "triton"
    memory = torch.empty(0, dtype=torch.uint8).set_(w.matrices[0]["W_q"].untyped_storage())
    elsewhere = StridedTensor.from_buffer(memory.clone(), 0, w.shape, w.form)
    apart = StridedTensor(w.shape, w.form, tuple({k: v.clone() for k, v in parts.items()} for parts in w.matrices))
    out, weights = triton_strided.linear(x, w, torch.float32), w.dequantize()
    assert torch.equal(kernels.linear(x, elsewhere), out.to(x.dtype)), "another slot, other bits"
    true, bound = x.double() @ weights.double().t(), product_bound(x.float(), weights)
    return max(worst(out, true, bound), worst(triton_strided.linear(x, apart, torch.float32), true, bound))


def strided_dense(w, x):
    """In chunks of the scratch: every output is there, and weights are those of the reference in x's dtype."""
    assert kernels.choose(x, w) == "triton-dense"
    return dense(w, x, triton_strided)


def tiny(w, x):
    """Logits of the bundled model through the kernels, against those of the CPU's fp32 ones; a share of 1e-3."""
    import mixoff

    ids, logits = torch.tensor([[1, 2, 3]]), []
    for devices in ((), ("cpu",)):
        products.DEVICES = devices
        with torch.no_grad():
            model = mixoff.load("tiny-mixtral", fast_bytes="1GiB", scheme="mixed", exact=True)
            logits.append(model(ids).logits.double())
            model.mixoff.close()
    return float((logits[1] - logits[0]).abs().max() / 1e-3)


def answer(case):
    """The share of what is allowed that a case's error takes."""
    torch.manual_seed(case["n"] + case["k"])
    make = random_strided if case["what"].startswith("strided") else random_weight
    w = make(case["n"], case["k"], case["bits"], case["group"], *case.get("grids", ()))
    x = torch.randn(case["rows"], case["k"]).to(DTYPES[case["dtype"]])
    if case.get("table"):
        return globals()[case["what"]](w, x)
    with mock.patch.object(products, "tile", lambda *_: ONE_PROGRAM):
        return globals()[case["what"]](w, x)


if __name__ == "__main__":
    _interpreter.mend()
    products.DEVICES = ("cpu",)
    for line in sys.stdin:
        print(json.dumps(answer(json.loads(line))), flush=True)
