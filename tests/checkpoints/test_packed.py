"""GPTQ, AWQ, compressed-tensors, bitsandbytes and modelopt: decoded as their libraries do, converted, or refused."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

import mixoff
import packed_models
from mixoff import CheckpointError
from mixoff.checkpoints.find import find
from mixoff.store import source
from tiny import decode, resident

IDS = torch.arange(5, 14)[None]
BF16 = torch.bfloat16
OURS = {  # encoders of the tests: family, encoder, dtype of scales
    "gptq": ("mixtral", packed_models.gptq(), torch.float16),
    "gptq asymmetric": ("qwen3_moe", packed_models.gptq(symmetric=False), torch.float16),
    "gptq act-order": ("mixtral", packed_models.gptq(act_order=True), torch.float16),
    "gptq 8 bits, one group, version 2": ("qwen3_moe", packed_models.gptq(8, -1, version=2), torch.float16),
    "gptq 3 bits": ("mixtral", packed_models.gptq(3, symmetric=False), torch.float16),
    "awq": ("mixtral", packed_models.awq(), torch.float16),
    "modelopt nvfp4": ("qwen3_moe", packed_models.modelopt(), BF16),
    "modelopt fp8": ("mixtral", packed_models.modelopt_fp8(), BF16),
}
COMPRESSED = ("W4", "W4 asymmetric", "W8", "int8", "fp8", "fp8 blocks", "NVFP4", "MXFP4")
BNB = {"bnb nf4": ("nf4", True), "bnb fp4": ("fp4", True), "bnb nf4 once": ("nf4", False)}


def write(name, root):
    """The model of that name, encoded and decoded."""
    if name in OURS:
        family, (encode, settings), dtype = OURS[name]
    elif name in BNB:
        pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
        family, (encode, settings), dtype = "mixtral", packed_models.bitsandbytes(*BNB[name]), BF16
    else:
        pytest.importorskip("compressed_tensors", reason="compressed-tensors is not installed")
        family, (encode, settings), dtype = "qwen3_moe", packed_models.compressed(name), BF16
    return packed_models.write(root, family, encode, settings, dtype, 128 if name in BNB else 96)


@pytest.fixture(scope="module", params=[*OURS, *COMPRESSED, *BNB])
def packed(request, tmp_path_factory):
    return write(request.param, tmp_path_factory.mktemp("packed"))


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Encoded models by name, made when they are asked for."""
    made = {}

    def folder(name):
        if name not in made:
            made[name] = write(name, tmp_path_factory.mktemp("packed"))[0]
        return made[name]

    return folder


def test_the_store_is_that_of_the_decoded_model(packed, tmp_path):
    """Every byte of the experts, every number of the backbone, tokens and logits of the resident model."""
    folder, original = packed
    ours, plain = (mixoff.convert(path, tmp_path / path.name) for path in (folder, original))
    a, b = source.open_source(ours), source.open_source(plain)
    assert a.sites == b.sites
    for site in range(len(a.sites)):
        file = f"experts-{site:03d}.bin"
        assert (ours / file).read_bytes() == (plain / file).read_bytes(), file
    weights = [load_file(path / "model.safetensors") for path in (ours, plain)]
    assert weights[0].keys() == weights[1].keys()
    assert [name for name, w in weights[0].items() if not torch.equal(w, weights[1][name])] == []
    assert "quantization_config" not in json.loads((ours / "config.json").read_text())
    with mixoff.load(ours, fast_bytes="1MB", dtype="bfloat16") as model:
        tokens, logits = decode(model, IDS, new_tokens=4)
    want_tokens, want_logits = decode(resident(original, BF16), IDS, new_tokens=4)
    assert torch.equal(tokens, want_tokens) and torch.equal(logits, want_logits)
    assert mixoff.verify(ours, full=True)["tensors"] > 0


def test_plan_and_load_go_by_a_scheme(packed):
    folder, _ = packed
    assert mixoff.plan(folder, "8GiB", "8GiB", hardware="t4", scheme="none").fits
    with pytest.raises(CheckpointError, match=f"stores weights as {find(folder).kind}.*mixoff convert"):
        mixoff.load(folder)


def test_pieces_change_nothing(folders, tmp_path, monkeypatch):
    from mixoff.checkpoints.packed import matrix

    for name in ("gptq act-order", "gptq 3 bits", "awq", "modelopt nvfp4"):
        whole = mixoff.convert(folders(name), tmp_path / f"{name} whole")
        with monkeypatch.context() as patch:
            patch.setattr(matrix, "PIECE", 500)
            pieces = mixoff.convert(folders(name), tmp_path / f"{name} pieces")
        for file in sorted(p.name for p in whole.iterdir()):
            assert (whole / file).read_bytes() == (pieces / file).read_bytes(), (name, file)


def test_load_runs_through_a_kept_conversion(folders):
    with mixoff.load(folders("gptq"), fast_bytes="1MB", scheme="none") as model:
        assert decode(model, IDS, new_tokens=2)[0].shape == (1, 11)


def test_older_modelopt_names_itself_in_a_file_of_its_own(tmp_path):
    encode, _ = packed_models.modelopt()
    folder, original = packed_models.write(tmp_path, "qwen3_moe", encode, None, BF16)
    ours, plain = (mixoff.convert(path, tmp_path / f"store {path.name}") for path in (folder, original))
    assert not (ours / "hf_quant_config.json").exists()
    for file in [p.name for p in plain.glob("experts-*.bin")]:
        assert (ours / file).read_bytes() == (plain / file).read_bytes()


def test_split_files_keep_parts_of_a_weight_apart(folders, tmp_path):
    import encoded_models

    copy = encoded_models.split(shutil.copytree(folders("gptq"), tmp_path / "copy"), 3)
    parts, whole = (mixoff.convert(f, tmp_path / f"store {f.name}") for f in (copy, folders("gptq")))
    for file in [p.name for p in whole.glob("experts-*.bin")]:
        assert (parts / file).read_bytes() == (whole / file).read_bytes()


# Damage ---------------------------------------------------------------------------------------------------------------


def first(tensors, ending):
    return next(name for name in sorted(tensors) if name.endswith(ending))


def without(ending):
    return lambda t: t.pop(first(t, ending))


def cut(ending):
    """A tensor whose first dimension lacks one."""

    def damage(t):
        t[name] = t[name := first(t, ending)][:-1].contiguous()

    return damage


def cast(ending, dtype):
    def damage(t):
        t[name] = t[name := first(t, ending)].to(dtype)

    return damage


def filled(ending, value):
    return lambda t: t[first(t, ending)].fill_(value)


def state(**values):
    """Change what bitsandbytes keeps of a weight; None removes a value."""

    def damage(t):
        name = first(t, "bitsandbytes__nf4")
        given = json.loads(bytes(t[name].tolist())) | values
        raw = json.dumps({key: value for key, value in given.items() if value is not None}).encode()
        t[name] = torch.tensor(list(raw), dtype=torch.uint8)

    return damage


DAMAGE = [
    ("gptq", without(".qzeros"), "lacks .*qzeros: the download is incomplete"),
    ("gptq", without(".scales"), "lacks .*scales"),
    ("gptq", cut(".qweight"), "groups, which do not divide|g_idx in .* expected I32"),
    ("gptq", cut(".qzeros"), "qzeros in .* expected I32"),
    ("gptq", cut(".scales"), "do not divide|expected"),
    ("gptq", cut(".g_idx"), "g_idx in .* expected I32"),
    ("gptq", cast(".qweight", torch.int64), "qweight in .* is I64"),
    ("gptq", cast(".scales", torch.int32), "scales in .* is I32"),
    ("gptq", filled("experts.0.w1.g_idx", 77), "puts an input into group 77"),
    ("gptq", filled("experts.0.w1.g_idx", -1), "puts an input into group"),
    ("gptq", filled("experts.0.w1.scales", float("nan")), "holds NaN or infinity"),
    ("gptq", filled("experts.0.w1.scales", 60000.0), "beyond the 65504 of float16, in gptq 4 bits"),
    ("gptq", lambda t: t.update({first(t, "w1.qweight"): torch.zeros(4, dtype=torch.int32)}), "not a matrix"),
    ("gptq", lambda t: t.update({first(t, "w1.scales"): torch.zeros(0, 96, dtype=torch.float16)}), "groups|expected"),
    ("gptq", lambda t: t.update({"model.layers.0.self_attn.q_proj.weight": torch.zeros(1)}), "encoded and plain"),
    ("awq", cut(".qweight"), "do not divide"),
    ("awq", cut(".qzeros"), "qzeros in .* expected I32"),
    ("awq", cast(".qweight", torch.int16), "qweight in .* is I16"),
    ("modelopt nvfp4", without(".weight_scale"), "lacks .*weight_scale"),
    ("modelopt nvfp4", without(".weight_scale_2"), "for a weight of|has no scale|fits|expected"),
    ("modelopt nvfp4", cast(".weight_scale", torch.float16), "weight_scale in .* is F16"),
    ("modelopt nvfp4", cut("q_proj.weight"), "weight_scale in .* expected F8_E4M3"),
    ("W4", without("q_proj.weight_scale"), "lacks .*weight_scale"),
    ("W4", cut(".weight_packed"), "weight_scale in .* expected"),
    ("W4 asymmetric", cut(".weight_zero_point"), "weight_zero_point in .* expected I32"),
    ("int8", cut("q_proj.weight"), "weight_scale in .* expected"),
    ("fp8", cut("q_proj.weight"), "for a weight of"),
    ("fp8", without("q_proj.weight_scale"), "has no scale for .*q_proj"),
    ("bnb nf4", without(".absmax"), "lacks .*absmax"),
    ("bnb nf4", cut(".absmax"), "absmax in .* expected U8"),
    ("bnb nf4", cut("q_proj.weight"), "weight in .* expected U8"),
    ("bnb nf4", state(shape=[2**40, 2**40]), "is damaged"),
    ("bnb nf4", state(shape=[64]), "is damaged"),
    ("bnb nf4", state(shape=[64, 128]), "has shape .*config.json says"),
    ("bnb nf4", state(shape=[32, 128]), "weight in .* expected U8"),
    ("bnb nf4", state(blocksize=0), "is damaged"),
    ("bnb nf4", state(blocksize=None), "is damaged"),
    ("bnb nf4", state(nested_blocksize=-1), "blocks of -1"),
    ("bnb nf4", state(dtype="int8"), "is damaged"),
    (
        "bnb nf4",
        lambda t: t.update({first(t, "bitsandbytes__nf4"): torch.zeros(20000, dtype=torch.uint8)}),
        "describes",
    ),
    ("bnb nf4", lambda t: t[first(t, "bitsandbytes__nf4")].fill_(91), "is damaged"),
    ("bnb nf4", without("bitsandbytes__nf4"), "is not of bitsandbytes' 4 bits"),
]


@pytest.mark.parametrize("number", range(len(DAMAGE)), ids=[f"{name} {text[:30]}" for name, _, text in DAMAGE])
def test_damaged_files_are_refused(folders, tmp_path, number):
    name, damage, message = DAMAGE[number]
    copy = shutil.copytree(folders(name), tmp_path / "copy")
    tensors = load_file(copy / "model.safetensors")
    damage(tensors)
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=message):
        mixoff.convert(copy, tmp_path / "store")
    assert {p.name for p in tmp_path.iterdir()} == {"copy"}


@pytest.mark.parametrize("name", ["gptq", "awq", "modelopt nvfp4", "modelopt fp8"])
def test_mutated_files(folders, tmp_path, name):
    """Tensors that are lost, renamed, cut, flattened, emptied or cast: a clear error, or a store, and nothing else."""
    import random

    draw, refused = random.Random(name), 0
    original = load_file(folders(name) / "model.safetensors")
    changes = (
        lambda t, key: t.pop(key),
        lambda t, key: t.update({key + "x": t.pop(key)}),
        lambda t, key: t.update({key: t[key].flatten()[:-1].contiguous()}),
        lambda t, key: t.update({key: t[key].reshape(1, -1)}),
        lambda t, key: t.update({key: t[key].reshape(-1)[:0]}),
        lambda t, key: t.update({key: t[key].float().to(torch.int64)}),
        lambda t, key: t.update({key: t[key].T.contiguous()}),
        lambda t, key: t.update({key: torch.tensor(0)}),
    )
    copy = shutil.copytree(folders(name), tmp_path / "copy")
    for i in range(24):
        tensors = dict(original)
        key = draw.choice(sorted(key for key in tensors if ".experts." in key or "self_attn" in key))
        changes[i % len(changes)](tensors, key)
        save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
        try:
            mixoff.convert(copy, tmp_path / f"store {i}")
        except mixoff.MixoffError as error:
            refused += 1
            assert len(str(error)) < 1000
            assert not list(tmp_path.glob(f"store {i}*"))
    assert refused >= 10


SETTINGS = [
    ("gptq", {"bits": 5}, "gptq with bits = '5'"),
    ("gptq", {"bits": True}, "gptq with bits"),
    ("gptq", {"bits": {"a": 1}}, "gptq with bits"),
    ("gptq", {"checkpoint_format": "marlin"}, "checkpoint_format = 'marlin', and mixoff reads gptq, gptq_v2"),
    ("gptq", {"bits": 8}, "groups|expected"),
    ("awq", {"version": "gemv"}, "version = 'gemv'"),
    ("awq", {"bits": 8}, "awq with bits = '8'"),
    ("W4", {"format": "marlin-24"}, "in the format marlin-24"),
    ("W4", {"sparsity_config": {"format": "sparse-24-bitmask"}}, "in the format sparse-24-bitmask"),
    ("W4", {"config_groups": {}}, "in unknown bits"),
    ("W4", {"config_groups": [1]}, "in unknown bits"),
    ("W4", {"config_groups": {"a": {"weights": {"type": "int", "num_bits": 3}}}}, r"in \[3\] bits"),
]


@pytest.mark.parametrize("number", range(len(SETTINGS)))
def test_settings_that_mixoff_does_not_read(folders, tmp_path, number):
    name, settings, message = SETTINGS[number]
    copy = shutil.copytree(folders(name), tmp_path / "copy")
    config = json.loads((copy / "config.json").read_text())
    config["quantization_config"] |= settings
    (copy / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=message):
        mixoff.convert(copy, tmp_path / "store")
