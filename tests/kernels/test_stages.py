"""Compiled stages against NumPy and PyTorch: sums of vectors, attention's loops, the router's choice, plain matrices,
and rows of many experts in one call.
"""

import numpy as np
import pytest
import torch

from mixoff.kernels.cpu import products
from mixoff.quantize.solve import quantize

DTYPES = (torch.float32, torch.bfloat16)


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)
    torch.manual_seed(0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("T", "N", "K"), [(1, 7, 64), (3, 130, 192), (8, 2, 2048), (2, 3, 70)])
def test_rows_of_a_plain_matrix(dtype, T, N, K):
    from mixoff.kernels.cpu.program import plain, readable

    x, w, bias = torch.randn(T, K), torch.randn(N, K).to(dtype), torch.randn(N)
    assert readable(w) and not readable(w[:, :-1]) and not readable(w.half()) and not readable(w.t())
    want = torch.nn.functional.linear(x.double(), w.double())
    found = plain(x, w)
    assert (found - want).abs().max() < 1e-6 * K
    assert torch.allclose(plain(x, w, bias) - found, bias.expand(T, N), atol=1e-4)
    assert plain(x.bfloat16(), w).dtype == torch.bfloat16
    torch.set_num_threads(2)
    assert torch.equal(plain(x, w), found)
    assert all(torch.equal(plain(row[None], w)[0], one) for row, one in zip(x, found, strict=True))


def run(function, record, count=1):
    """Call a stage of the module `stages` with its record."""
    from mixoff.kernels.cpu.program import Memory, Program

    program = Program(Memory())
    program.step(function.address, program.record(record), count, 1 << 30)
    program.run(2)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("H", "G", "C", "T"), [(4, 4, 16, 1), (8, 2, 32, 63), (10, 2, 16, 65), (6, 1, 128, 200)])
def test_attention(dtype, H, G, C, T):
    from mixoff.kernels.cpu import stages
    from mixoff.kernels.cpu.program import bits

    room = T + 3
    q, k, v = torch.randn(H, C), torch.randn(G, C), torch.randn(G, C)
    keys, values = torch.randn(G, room, C).to(dtype), torch.randn(G, room, C).to(dtype)
    cos, sin, sinks = torch.randn(C // 4), torch.randn(C // 4), torch.randn(H)
    weight = torch.randn(C)

    def turned(x):
        x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-3) * weight
        a, b, rest = x.split([C // 4, C // 4, C - C // 2], -1)
        return torch.cat([a * cos - b * sin, b * cos + a * sin, rest], -1)

    all_keys = torch.cat([keys[:, : T - 1], turned(k)[:, None].to(dtype)], 1).double()
    all_values = torch.cat([values[:, : T - 1], v[:, None].to(dtype)], 1).double()
    shared = [x.repeat_interleave(H // G, 0) for x in (all_keys, all_values)]
    scores = 0.3 * torch.einsum("hc,htc->ht", turned(q).double(), shared[0])
    shares = torch.cat([scores, sinks[:, None].double()], 1).softmax(-1)[:, :-1]
    want = torch.einsum("ht,htc->hc", shares, shared[1])

    before, out = keys.clone(), torch.zeros(H, C)
    record = stages.Attention(
        q.data_ptr(), k.data_ptr(), v.data_ptr(), 0, 0, 0, weight.data_ptr(), weight.data_ptr(), 0, bits(1e-3),
        cos.data_ptr(), sin.data_ptr(), C // 2, keys.data_ptr(), values.data_ptr(), int(dtype == torch.bfloat16),
        room, T - 1, H, G, C, bits(0.3), sinks.data_ptr(), out.data_ptr(),
    )  # fmt: skip
    run(stages.append, record)
    run(stages.attend, record, G)
    assert (out - want).abs().max() < 1e-5 * T**0.5 + 1e-5
    assert torch.equal(keys[:, : T - 1], before[:, : T - 1]) and torch.equal(keys[:, T:], before[:, T:])


@pytest.mark.parametrize("divide", [True, False])
def test_the_choice(divide):
    from mixoff.kernels.cpu import stages

    for E, K in ((8, 2), (128, 8), (5, 5)):
        logits, experts, weights = 3 * torch.randn(E), torch.zeros(K, dtype=torch.int64), torch.zeros(K)
        record = stages.Choice(logits.data_ptr(), E, K, divide, experts.data_ptr(), weights.data_ptr())
        run(stages.choose, record)
        want, order = logits.double().softmax(-1).topk(K)
        assert torch.equal(experts, order)
        assert torch.allclose(weights.double(), want / want.sum() if divide else want, rtol=1e-5)
        logits[2] = float("nan")
        run(stages.choose, record)
        assert len(set(experts.tolist())) == K and weights.isnan().all()
    logits[:] = 1
    run(stages.choose, record)
    assert experts.tolist() == list(range(5)), "the lower index first among equals"


def test_equal_logits_choose_as_torch_does_for_large_and_small_numbers():
    from mixoff.kernels.cpu import stages

    logits, experts, weights = torch.tensor([-1e30, 80.0, 1e4, 0.0]), torch.zeros(2, dtype=torch.int64), torch.zeros(2)
    run(stages.choose, stages.Choice(logits.data_ptr(), 4, 2, True, experts.data_ptr(), weights.data_ptr()))
    assert experts[0] == 2 and np.isfinite(weights.numpy()).all() and weights[0] == 1


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_of_many_experts_are_those_of_each(dtype, monkeypatch):
    from mixoff.kernels.cpu import grouped

    D, F, counts = 128, 64, [1, 2, 3, 4, 5, 8, 1, 7, 2]
    experts = [(quantize(torch.randn(2 * F, D), 2, 32), quantize(torch.randn(D, F), 3, 64)) for _ in counts]
    x = torch.randn(sum(counts), D).to(dtype)
    want = torch.cat([products.gated_mlps(rows, [e])[0] for rows, e in zip(x.split(counts), experts, strict=True)])
    assert torch.equal(grouped.gated_mlps(x, counts, experts), want)
    torch.set_num_threads(2)
    assert torch.equal(grouped.gated_mlps(x, counts, experts), want)
    monkeypatch.setattr(grouped, "MOST_NBYTES", 4096)  # several calls
    assert torch.equal(grouped.gated_mlps(x, counts, experts), want)
