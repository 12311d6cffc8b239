"""The rotation of inputs: orthogonal, the same bits everywhere, and worth its additions."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from mixoff import MixoffError, kernels
from mixoff.quantize import Precision, Scheme, rotation
from mixoff.shapes.sites import Part, Site, quantized_sites

MIXED = Scheme(experts=Precision(2, 64), down=Precision(3, 64, rotated=True))


def test_it_is_orthogonal():
    R = rotation.rotate(torch.eye(64))
    assert torch.allclose(R @ R.T, torch.eye(64), atol=1e-6)
    assert (R[:16, 16:] == 0).all() and (R[:16, :16].abs() == 0.25).all()
    x = torch.randn(3, 64)
    assert torch.allclose(rotation.unrotate(rotation.rotate(x)), x, atol=1e-6)


def test_signs_are_fixed_for_all_time():
    """A store holds only a flag, so signs change neither with a version nor with the number of inputs."""

    def sign(k):
        h = k * 0x9E3779B1 & 0xFFFFFFFF
        h = (h ^ h >> 15) * 0x85EBCA77 & 0xFFFFFFFF
        return -0.25 if (h ^ h >> 13) & 1 else 0.25

    expected = [sign(k) for k in range(14336)]
    assert rotation.signs(14336).tolist() == expected and rotation.signs(192).tolist() == expected[:192]
    assert abs(sum(expected)) < 14336**0.5


@pytest.mark.parametrize("shape", [(4, 24), (100,), ()])
def test_other_widths_are_refused(shape):
    with pytest.raises(MixoffError, match="does not divide into blocks of 16"):
        rotation.rotate(torch.ones(shape))


def test_compiled_code_gives_the_bits_of_torch():
    numba = pytest.importorskip("numba", reason="numba is not installed")
    from mixoff.kernels.cpu import loops

    x = torch.randn(3, 272)
    assert np.array_equal(numba.njit(lambda x: loops.rotated(x))(x.numpy()), rotation.rotate(x).numpy())


@pytest.mark.parametrize("kernel", ["int8", "fp32", "dense", "reference"])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_a_rotated_weight_gives_the_product_of_the_weights_it_stands_for(bits, kernel):
    x, w = torch.randn(3, 128), torch.randn(48, 128)
    q = MIXED.quantize_as(w, Precision(bits, 32, rotated=True))
    got, want = kernels.linear(x, q, kernel=kernel), x @ q.dequantize().T
    assert (got - want).norm() < (0.02 if kernel == "int8" else 1e-5) * want.norm()
    assert "rotated" in repr(q) and (q.dequantize() - w).norm() < 0.6 / 2 ** (bits - 2) * w.norm()


@pytest.mark.parametrize("exact", [True, False])
def test_an_expert_whose_last_matrix_is_rotated(exact):
    x = torch.randn(2, 64)
    gate_up, down = (MIXED.quantize_as(torch.randn(*shape), p) for shape, p in
                     zip([(256, 64), (64, 128)], [MIXED.experts, MIXED.down], strict=True))  # fmt: skip
    gate, up = (x @ gate_up.dequantize().T).chunk(2, 1)
    want = torch.nn.functional.silu(gate) * up @ down.dequantize().T
    got = kernels.gated_mlps(x, [(gate_up, down)], exact)[0]
    assert (got - want).norm() < (1e-5 if exact else 0.03) * want.norm()


def test_outliers_cost_less():
    """A few large inputs stretch the grid of their group; rotated, they are spread over 16."""
    torch.manual_seed(0)
    w = torch.randn(128, 256)
    w[:, ::16] *= 8
    errors = [(MIXED.quantize_as(w, Precision(2, 64, rotated)).dequantize() - w).norm() for rotated in (False, True)]
    assert errors[1] < 0.9 * errors[0]


def test_precision_by_matrix_and_layer():
    site = Site("experts", 0, 2, (Part("gate_up_proj", (64, 64), "float32", 0, 4 * 64 * 64),
                                  Part("down_proj", (64, 64), "float32", 4 * 64 * 64, 4 * 64 * 64)))  # fmt: skip
    sites = (site, replace(site, name="others", layer=1))
    assert [part.form for part in quantized_sites(sites, MIXED)[1].parts] == [(2, 64, 8), (3, 64, 8, True)]
    by_layer = replace(MIXED, by_layer=((Precision(4, 64), Precision(2, 16)), (MIXED.experts, MIXED.experts)))
    first, second = quantized_sites(sites, by_layer)
    assert [part.form for part in first.parts + second.parts] == [(4, 64, 8), (2, 16, 8), (2, 64, 8), (2, 64, 8)]
    assert first.expert_nbytes > second.expert_nbytes
    assert by_layer.precisions() == {Precision(4, 64), Precision(2, 16), *MIXED.precisions()}
    assert Scheme.from_json(by_layer.to_json()) == by_layer
    with pytest.raises(MixoffError, match="has 2 layers of experts"):
        quantized_sites((*sites, site), by_layer)
    with pytest.raises(MixoffError, match="2 layers of experts, and this one 1"):
        quantized_sites(sites[:1], by_layer)


def test_descriptions_from_before_are_read():
    text = '{"attention": null, "experts": {"bits": 2, "group_size": 32}, "shared_experts": null, "head": null, '
    text += '"embeddings": null, "metadata_bits": 8, "solver": "lsq"}'
    assert Scheme.from_json(text) == Scheme(experts=Precision(2, 32))


@pytest.mark.parametrize(
    "wrong", [{"down": Precision(2, 32)}, {"experts": Precision(2, 32), "by_layer": ((Precision(2, 32),),)},
              {"experts": Precision(2, 32), "by_layer": [1]}, {"experts": Precision(2, 32), "down": 3}]
)  # fmt: skip
def test_impossible_schemes_are_refused(wrong):
    with pytest.raises(MixoffError):
        Scheme(**wrong)


def test_rotated_is_a_word():
    with pytest.raises(MixoffError, match="choose True or False"):
        Precision(2, 32, rotated=1)
