"""Layers with the same input as one product: the bits of each alone, and no product for another input."""

import itertools
import threading

import pytest
import torch
from torch import nn

from mixoff import kernels
from mixoff.loading import layers, together
from mixoff.quantize import quantize

ROWS = (256, 128, 44)  # the last may end within a block
NAMES = [f"attention.{name}.weight" for name in together.LAYERS[0]]


def matrices(bits=4, group=64, metadata_bits=8, rows=ROWS):
    torch.manual_seed(bits + group)
    return [quantize(torch.randn(N, 128), bits, group, "rtn", metadata_bits) for N in rows]


@pytest.mark.parametrize(("bits", "group", "metadata_bits"), [(2, 16, 8), (3, 32, 8), (4, 64, 16), (8, 128, 8)])
def test_matrices_are_joined_and_split_bit_by_bit(bits, group, metadata_bits):
    alone = matrices(bits, group, metadata_bits)
    whole = together.join(alone)
    assert torch.equal(whole.dequantize(), torch.cat([q.dequantize() for q in alone]))
    assert whole.nbytes == sum(q.nbytes for q in alone)
    for q, part in zip(alone, together.split(whole, ROWS), strict=True):
        assert part.shape == q.shape and all(torch.equal(part.parts[name], q.parts[name]) for name in q.parts)
        assert part.parts["codes"].untyped_storage().data_ptr() == whole.image.untyped_storage().data_ptr()


def test_what_is_joined():
    """Matrices of one form, of whole blocks, and three different ones."""
    fitting = dict(zip(NAMES, matrices(), strict=True))
    assert list(together.groups(fitting)) == [tuple(NAMES)]
    for spoilt in (
        {NAMES[1]: matrices(bits=2)[1]},
        {NAMES[0]: matrices(rows=(250,))[0]},
        {NAMES[1]: fitting[NAMES[0]]},
        {NAMES[2]: torch.ones(44, 128)},
    ):
        assert not list(together.groups(fitting | spoilt))
    assert not list(together.groups({name: fitting[name] for name in NAMES[:2]}))


class Attention(nn.Module):
    """Three projections of one input."""

    def __init__(self):
        super().__init__()
        self.attention = nn.Module()
        for name, N in zip(together.LAYERS[0], ROWS, strict=True):
            setattr(self.attention, name, nn.Linear(128, N))

    def forward(self, x):
        return [getattr(self.attention, name)(x) for name in together.LAYERS[0]]


@pytest.fixture
def pair(monkeypatch):
    """The same layers, joined and alone, and the products that were computed: outputs of each."""
    products, honest, weights = [], kernels.linear, dict(zip(NAMES, matrices(), strict=True))

    def linear(x, w, **options):
        products.append(w.shape[0])
        return honest(x, w, **options)

    monkeypatch.setattr(kernels, "linear", linear)
    found = []
    for devices in (("cpu",), ()):
        monkeypatch.setattr(together, "DEVICES", devices)
        torch.manual_seed(0)
        model = Attention()
        layers.hollow(model, NAMES)
        layers.fill(model, weights, torch.float32)
        found.append(model)
    return *found, products


@pytest.mark.parametrize("shape", [(1, 128), (2, 3, 128)])
def test_one_product_computes_all(pair, shape):
    joined, alone, products = pair
    x = torch.randn(shape)
    assert all(torch.equal(a, b) for a, b in zip(joined(x), alone(x), strict=True))
    assert products == [sum(ROWS), *ROWS]


def test_another_input_is_another_product(pair):
    """In any order of calls; and nothing is kept once each layer has been called."""
    joined, alone, _ = pair
    xs = torch.randn(2, 1, 128)
    for calls in itertools.permutations([(name, i) for name in together.LAYERS[0][:2] for i in (0, 1)]):
        for name, i in calls:
            assert torch.equal(getattr(joined.attention, name)(xs[i]), getattr(alone.attention, name)(xs[i]))
    joined(xs[0])
    assert joined.attention.q_proj.together[0].local.x is None


def test_threads_do_not_meet(pair):
    joined, alone, _ = pair
    shared, x, seen = joined.attention.q_proj, torch.randn(1, 128), []
    shared(x)
    thread = threading.Thread(target=lambda: seen.append(hasattr(shared.together[0].local, "x")))
    thread.start()
    thread.join()
    assert seen == [False]
