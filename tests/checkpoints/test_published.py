"""The published 2-bit Mixtral: decoded as hqq does bit for bit, served as it is, repacked without loss."""

import json
import random
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import mixoff
import published
from mixoff import CheckpointError, kernels
from mixoff.checkpoints.model_files import INDEX
from mixoff.kernels import reference
from mixoff.quantize import strided
from mixoff.quantize.strided import Form, StridedTensor
from mixoff.store.source import open_source
from tiny import budget, decode, resident
from tolerances import product_bound, within_rounding

pytest.importorskip("hqq", reason="hqq is not installed")
IDS = torch.arange(5, 14)[None]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """The miniature, and the unquantized model with the weights that hqq decodes from it."""
    root = tmp_path_factory.mktemp("published")
    return published.write(root / "published", root / "original"), root / "original"


@pytest.fixture
def copy(folders, tmp_path):
    return shutil.copytree(folders[0], tmp_path / "copy")


def strided_weight(shape, bits, group, scale_group, seed=0):
    parts = published.random_parts(shape, bits, group, scale_group, torch.Generator().manual_seed(seed))
    return StridedTensor.from_parts(shape, Form(bits, group, scale_group), parts), parts


# --- decoding ---------------------------------------------------------------------------------------------------------

WEIGHTS = {
    "expert": ((512, 256), *published.EXPERTS),
    "expert, down": ((256, 512), *published.EXPERTS),
    "attention": ((256, 256), *published.ATTENTION),
    "one row a member": ((64, 256), *published.ATTENTION),
    "eight bits": ((128, 64), 8, 16, 128),
    "rows of more than a block": ((4096, 48), 2, 16, 128),
}


@pytest.mark.parametrize("weight", WEIGHTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_decoding_is_hqqs_bit_for_bit(weight, dtype):
    shape, bits, group, scale_group = WEIGHTS[weight]
    q, parts = strided_weight(*WEIGHTS[weight])
    assert torch.equal(q.dequantize(dtype), published.by_hqq(parts, shape, bits, group, dtype))


@pytest.mark.parametrize("weight", WEIGHTS)
def test_blocks_cover_every_output_once(weight):
    q, _ = strided_weight(*WEIGHTS[weight])
    rows = [row for start, stop in q.blocks() for row in range(start, stop)]
    assert rows == list(range(q.shape[0])) and max(stop - start for start, stop in q.blocks()) <= 128


def test_an_expert_of_full_size(tmp_path):
    """A file of exactly the published size, decoded as hqq does: every weight of it."""
    generator, expert, shapes = torch.Generator().manual_seed(0), {}, {"w1": (14336, 4096), "w2": (4096, 14336)}
    for name, shape in (shapes | {"w3": (14336, 4096)}).items():
        parts = published.random_parts(shape, *published.EXPERTS, generator)
        expert |= {f"{name}.{key}": part for key, part in parts.items()}
    save_file(expert, tmp_path / "expert.safetensors")
    assert (tmp_path / "expert.safetensors").stat().st_size == 66_406_180
    read = load_file(tmp_path / "expert.safetensors")
    for name, shape in shapes.items():
        parts = {key.removeprefix(f"{name}."): part for key, part in read.items() if key.startswith(name)}
        q = StridedTensor.from_parts(shape, Form(*published.EXPERTS), parts)
        assert torch.equal(q.dequantize(), published.by_hqq(parts, shape, *published.EXPERTS[:2], torch.float32))


# --- products ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weight", WEIGHTS)
@pytest.mark.parametrize("rows", [1, 3, 9])
def test_products_are_within_rounding_of_the_decoded_weights(weight, rows):
    q, _ = strided_weight(*WEIGHTS[weight])
    x = torch.randn(rows, q.shape[1], generator=torch.Generator().manual_seed(1))
    error = (kernels.linear(x, q).double() - x.double() @ q.dequantize().double().t()).abs()
    assert (error <= product_bound(x, terms(q))).all()


def terms(q):
    """What a kernel adds up for each weight, codes and zeros apart: scale times the largest code, scale times zero."""
    parts, everything = q.matrices[0], slice(0, q.step * q.shape[1])
    scales = strided._scales(parts, everything, torch.float32).view(q.step, -1).abs()
    zeros = strided._zeros(parts, everything, torch.float32).view(q.step, -1).abs()
    return (scales * (zeros + 2**q.form.bits - 1)).repeat(q.form.group_size, 1)  # (N, K)


def test_threads_do_not_change_a_product():
    q, _ = strided_weight((4096, 1024), *published.EXPERTS)
    x = torch.randn(2, 1024, generator=torch.Generator().manual_seed(1))
    one, before = kernels.linear(x, q), torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        assert torch.equal(kernels.linear(x, q), one)
    finally:
        torch.set_num_threads(before)


def test_compiled_and_reference_agree_on_gate_over_up():
    (gate, gate_parts), (up, up_parts) = (strided_weight((512, 256), *published.EXPERTS, seed=s) for s in (0, 1))
    both = StridedTensor((1024, 256), Form(*published.EXPERTS, matrices=2), (gate_parts, up_parts))
    x = torch.randn(1, 256, generator=torch.Generator().manual_seed(1))
    apart = torch.cat([kernels.linear(x, gate), kernels.linear(x, up)], dim=1)
    assert torch.equal(kernels.linear(x, both), apart)
    assert torch.equal(both.dequantize(), torch.cat([gate.dequantize(), up.dequantize()]))
    assert torch.allclose(reference.linear(x, both), apart, rtol=1e-4, atol=1e-4)


# --- models -----------------------------------------------------------------------------------------------------------


def exact_and_trusted(original):
    """Tokens and logits of the unquantized model in transformers, and its logits in fp64."""
    tokens, trusted = decode(resident(original), IDS)
    double = AutoModelForCausalLM.from_pretrained(original, dtype=torch.float64, experts_implementation="eager")
    _, exact = decode(double, IDS)
    return tokens, trusted, exact


def test_the_published_folder_generates_what_its_decoded_weights_do(folders):
    folder, original = folders
    tokens, trusted, exact = exact_and_trusted(original)
    with mixoff.load(folder, fast_bytes=budget(folder, 4)) as model:
        ours, logits = decode(model, IDS)
        info = model.mixoff.info()
    assert info.misses > 0 and info.evictions > 0
    assert torch.equal(ours, tokens) and within_rounding(logits, trusted, exact)


def test_offloaded_is_resident_bit_for_bit(folders):
    with mixoff.load(folders[0], fast_bytes="1GiB") as model:
        everything = decode(model, IDS)
        assert model.mixoff.info().evictions == 0
    with mixoff.load(folders[0], fast_bytes=budget(folders[0], 4)) as model:
        some = decode(model, IDS)
        assert model.mixoff.info().misses > 0 and model.mixoff.info().evictions > 0
    assert torch.equal(everything[0], some[0]) and torch.equal(everything[1], some[1])


def test_repacking_loses_nothing(folders, tmp_path):
    target = mixoff.convert(folders[0], tmp_path / "store")
    plain, stored = open_source(folders[0]), open_source(target)
    assert plain.sites == stored.sites and stored.files.is_store and mixoff.verify(target, full=True)["experts"] == 16
    for key in plain.reader.extents:
        images = [bytearray(plain.expert_nbytes) for _ in range(2)]
        for source, image in zip((plain, stored), images, strict=True):
            source.reader.read_into(*key, memoryview(image))
        assert images[0] == images[1]
    with mixoff.load(folders[0], fast_bytes="2MB") as a, mixoff.load(target, fast_bytes="2MB") as b:
        assert torch.equal(decode(a, IDS)[1], decode(b, IDS)[1])


def test_an_expert_is_few_reads(folders):
    extents = open_source(folders[0]).reader.extents
    assert {len(x) for x in extents.values()} == {6}


# --- damaged folders --------------------------------------------------------------------------------------------------


def edit_index(folder, change):
    index = json.loads((folder / INDEX).read_text())
    change(index["weight_map"])
    (folder / INDEX).write_text(json.dumps(index))


def edit_file(path, change):
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def expert_file(folder):
    return next(p for p in sorted(folder.glob("*.safetensors")) if p.stat().st_size < 300_000)


TRUNK, OUTPUT = "model-00001-of-00017.safetensors", "model.layers.1.self_attn.o_proj"
EXPERT = "model.layers.0.block_sparse_moe.experts"
DAMAGE = {
    "two experts in one file": (
        lambda d: edit_index(d, lambda m: m.update({f"{EXPERT}.7.w1.W_q": expert_file(d).name})),
        "does not hold the tensors",
    ),
    "an expert is missing": (
        lambda d: edit_index(d, lambda m: [m.pop(k) for k in list(m) if ".0.block_sparse_moe.experts.3." in k]),
        "lacks weights of expert 3 in layer 0",
    ),
    "the first expert is missing": (
        lambda d: edit_index(d, lambda m: [m.pop(k) for k in list(m) if ".0.block_sparse_moe.experts.0." in k]),
        "lacks weights of",
    ),
    "a part is missing": (
        lambda d: edit_file(expert_file(d), lambda t: t.pop("w2.meta.zero_q")),
        "does not hold the tensors",
    ),
    "codes of another shape": (
        lambda d: edit_file(expert_file(d), lambda t: t.update({"w2.W_q": t["w2.W_q"].view(8, -1)})),
        "has shape|lacks weights",
    ),
    "codes of another dtype": (
        lambda d: edit_file(expert_file(d), lambda t: t.update({"w2.W_q": t["w2.W_q"].view(torch.int8)})),
        "is I8, expected U8",
    ),
    "attention is not a number": (
        lambda d: edit_file(
            d / TRUNK, lambda t: t[f"{OUTPUT}.meta.meta_scale.zero"].fill_(float("nan"))
        ),
        "is damaged",
    ),
    "attention lacks a part": (
        lambda d: [
            edit_file(d / TRUNK, lambda t: t.pop(f"{OUTPUT}.meta.zero_q")),
            edit_index(d, lambda m: m.pop(f"{OUTPUT}.meta.zero_q")),
        ],
        "the parts of a quantized|lacks",
    ),
    "other widths": (
        lambda d: (d / "config.json").write_text(
            (d / "config.json").read_text().replace('"intermediate_size": 512', '"intermediate_size": 384')
        ),
        "has shape",
    ),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_folders(copy, damage):
    how, message = DAMAGE[damage]
    how(copy)
    with pytest.raises(CheckpointError, match=message):
        mixoff.load(copy, fast_bytes="2MB")


def test_another_scheme_is_refused(copy, tmp_path):
    with pytest.raises(CheckpointError, match="quantized already"):
        mixoff.convert(copy, tmp_path / "store", scheme="mixed")
    with pytest.raises(CheckpointError, match="quantized already"):
        mixoff.load(copy, fast_bytes="2MB", scheme="mixed")


@pytest.mark.parametrize("form", [(3, 16, 128), (2, 24, 128), (2, 16, 0), (2, 16, 100)])
def test_forms_that_cannot_be(form):
    with pytest.raises(mixoff.MixoffError):
        Form(*form).check((512, 256))


def test_files_are_found_through_the_index(folders):
    """The miniature's files are in drawn order, and differ from the experts' order."""
    weight_map = json.loads((folders[0] / INDEX).read_text())["weight_map"]
    files = list(dict.fromkeys(file for name, file in weight_map.items() if ".experts." in name))
    assert files != sorted(files) and random.Random(0).sample(sorted(files), 16) == files
    assert open_source(folders[0]).sites[0].parts[0].form[0] == strided.KIND
