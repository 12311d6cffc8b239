"""Runs products through Triton's interpreter, in a process of its own: `TRITON_INTERPRET=1` must stand before imports.

Reads one case a line as JSON and answers with one line: how large the errors are, as a share of what is allowed.
"""

import json
import sys

import torch
from tolerances import product_bound

from mixoff import experts, kernels
from mixoff.kernels import triton_products, triton_tiles
from mixoff.quantize import QTensor

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
ONE_PROGRAM = triton_tiles.Tile(128, 16, 1, 4)  # a whole block: the interpreter's time goes by programs
TABLE = triton_products.tile
triton_products.DEVICES = ("cpu",)


def random_weight(n, k, bits, group):
    """Every code and any metadata, as no solver would leave it."""
    w = QTensor.empty((n, k), bits, group)
    for name, part in w.parts.items():
        if part.is_floating_point():
            part.copy_(torch.rand(part.shape) * (-0.02 if name == "min_top" else 0.02))
        else:
            part.view(torch.uint8).random_(0, 256)
    return w


def worst(out, true, bound):
    """The largest error as a share of its bound; infinite for what is not a number."""
    return float(((out.double() - true).abs() / bound).nan_to_num(torch.inf).max())


def linear(w, x):
    """fp32 sums against fp64 on the dequantized weights; other dtypes are the fp32 result, rounded."""
    weights = w.dequantize()
    out = triton_products.linear(x, w, torch.float32)
    assert torch.equal(triton_products.linear(x, w), out.to(x.dtype)), "rounded otherwise"
    return worst(out, x.double() @ weights.double().t(), product_bound(x.float(), weights))


def gated(w, x):
    """silu's slope is at most 1.1, so the error of h stays within that of gate and up, each times the other's size."""
    weights = w.dequantize()
    gate, up = (x.double() @ weights.double().t()).chunk(2, 1)
    gate_bound, up_bound = product_bound(x.float(), weights).chunk(2, 1)
    true = torch.nn.functional.silu(gate) * up
    allowed = 1.1 * gate_bound * up.abs() + up_bound * gate.abs() + 8 * 2.0**-24 * true.abs()
    return worst(triton_products.gated(x, w), true, allowed)


def dense(w, x):
    """Weights rounded once to x's dtype, as those of the reference, and results once more."""
    weights, step = w.dequantize(), torch.finfo(x.dtype).eps
    size = x.double().abs() @ weights.double().abs().t()
    bound = product_bound(x.float(), weights) + step * size
    return worst(triton_products.dense(x, w), x.double() @ weights.double().t(), bound)


def unfinished(w, x):
    """What is not finite shows in every output of its row, and in no other: 0, or infinite if it does not."""
    for bad in (torch.inf, -torch.inf, torch.nan):
        spoilt = x.clone()
        spoilt[0, -1] = bad
        out = triton_products.linear(spoilt, w)
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
    many = x[:1].expand(triton_tiles.MOST_ROWS + 1, -1)
    assert kernels.choose(many, w) == "triton-dense" and not experts.fuses(module, many, weights, False)
    gate, up = (x.double() @ w.dequantize().double().t()).chunk(2, 1)
    true = (torch.nn.functional.silu(gate) * up) @ weights["down_proj"].dequantize().double().t()
    out = experts.expert_mlp(module, x, weights, None)
    assert out.dtype == x.dtype
    return worst(out, true, torch.finfo(x.dtype).eps * true.abs() + 1e-5 * true.abs().max())


def tiny(w, x):
    """Logits of the bundled model through the kernels, against those of the CPU's fp32 ones; a share of 1e-3."""
    import mixoff

    ids, logits = torch.tensor([[1, 2, 3]]), []
    for devices in ((), ("cpu",)):
        triton_products.DEVICES = devices
        with torch.no_grad():
            model = mixoff.load("tiny-mixtral", fast_bytes="1GiB", scheme="mixed", exact=True)
            logits.append(model(ids).logits.double())
            model.mixoff.close()
    return float((logits[1] - logits[0]).abs().max() / 1e-3)


def answer(case):
    """The share of what is allowed that a case's error takes."""
    torch.manual_seed(case["n"] + case["k"])
    w = random_weight(case["n"], case["k"], case["bits"], case["group"])
    x = torch.randn(case["rows"], case["k"]).to(DTYPES[case["dtype"]])
    triton_products.tile = TABLE if case.get("table") else lambda *_: ONE_PROGRAM
    return globals()[case["what"]](w, x)


if __name__ == "__main__":
    for line in sys.stdin:
        print(json.dumps(answer(json.loads(line))), flush=True)
