"""Which files are a model: the same for every command and for transformers, to the bit, or refused by all in words."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

import mixoff
from mixoff import CheckpointError
from mixoff.checkpoints import backbone, model_files, published, survey
from mixoff.checkpoints.model_files import INDEX, WHOLE
from mixoff.shapes.config import read_config
from mixoff.store.manifest import MANIFEST
from tiny import VARIED, decode, resident, save_random

IDS = torch.arange(5, 14)[None]
EXPERT, NORM = "model.layers.1.block_sparse_moe.experts.2.w1.weight", "model.norm.weight"


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """The same model in one file, and in shards with an index."""
    root = tmp_path_factory.mktemp("saved")
    return save_random(root / "one"), save_random(root / "many", max_shard_size="150KB")


@pytest.fixture
def one(saved, tmp_path):
    return shutil.copytree(saved[0], tmp_path / "model")


@pytest.fixture
def many(saved, tmp_path):
    return shutil.copytree(saved[1], tmp_path / "model")


def edit_json(path, **change):
    path.write_text(json.dumps(json.loads(path.read_text()) | change))


def edit(path, change):
    """Rewrite a file of tensors."""
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def other_weights(folder, to, source=WHOLE):
    """Write a model that computes something else."""
    save_file({n: t * 1.5 for n, t in load_file(folder / source).items()}, to, metadata={"format": "pt"})


def newer_whole_file(many, saved):
    other_weights(saved[0], many / WHOLE)


def index_left_over(one, saved):
    shutil.copy(saved[1] / INDEX, one / INDEX)


def stale_shards(one, saved):
    """Shards of another model lie there too, with an index that names some of them."""
    for path in saved[1].glob("model-*.safetensors"):
        other_weights(saved[1], one / path.name, path.name)
    index_left_over(one, saved)


def twice(many, saved, kept):
    """Two tensors, an expert's and the backbone's, in the first and the last shard; the index names `kept` of them."""
    files = sorted(p.name for p in many.glob("*.safetensors"))
    index = json.loads((many / INDEX).read_text())
    for name in (EXPERT, NORM):
        w = load_file(saved[0] / WHOLE)[name]
        for i, file in enumerate((files[0], files[-1])):
            edit(many / file, lambda t, w=w, i=i, name=name: t.update({name: w * (2 + i)}))
        if (old := index["weight_map"][name]) not in (files[0], files[-1]):
            edit(many / old, lambda t, name=name: t.pop(name))
        index["weight_map"][name] = files[kept]
    (many / INDEX).write_text(json.dumps(index))


def variant(one, saved):
    other_weights(one, one / "model.fp16.safetensors")


def named_in_config(one, saved):
    other_weights(one, one / "else.safetensors")
    edit_json(one / "config.json", transformers_weights="else.safetensors")


def surplus(one, saved):
    edit(one / WHOLE, lambda t: t.update({"model.layers.7.self_attn.q_proj.weight": torch.ones(4, 4)}))


def without_model_prefix(one, saved):
    edit(one / WHOLE, lambda t: [t.update({n.removeprefix("model."): t.pop(n)}) for n in list(t)])


SOUND = {
    "one file": ("one", lambda one, saved: None),
    "shards and their index": ("many", lambda many, saved: None),
    "shards, their index and a newer whole file": ("many", newer_whole_file),
    "a whole file and an index left over": ("one", index_left_over),
    "a whole file and stale shards": ("one", stale_shards),
    "tensors in two shards, the index names the first": ("many", lambda many, saved: twice(many, saved, 0)),
    "tensors in two shards, the index names the last": ("many", lambda many, saved: twice(many, saved, -1)),
    "a variant": ("one", variant),
    "a file that config.json names": ("one", named_in_config),
    "a tensor that the model does not use": ("one", surplus),
    "names without their first word": ("one", without_model_prefix),
}


def logits(path, **how):
    with mixoff.load(path, fast_bytes="1MB", **how) as model:
        return decode(model, IDS)


@pytest.mark.parametrize("case", SOUND)
def test_what_transformers_loads_is_loaded_and_converted_alike(saved, tmp_path, request, case):
    """Backbone and experts of the same files as in plain transformers, bit for bit."""
    kind, arrange = SOUND[case]
    folder = request.getfixturevalue(kind)
    arrange(folder, saved)
    want = decode(resident(folder), IDS)
    target = mixoff.convert(folder, tmp_path / "store")
    assert mixoff.verify(target, full=True)["experts"] == 12
    for path in (folder, target):
        assert all(torch.equal(a, b) for a, b in zip(logits(path), want, strict=True))
    assert mixoff.plan(folder, scheme="paper").fits and mixoff.plan(target).fits


def without_index(many, saved):
    (many / INDEX).unlink()


def renamed_file(one, saved):
    (one / WHOLE).rename(one / "weights.safetensors")


def adapter(one, saved):
    (one / WHOLE).unlink()
    (one / "config.json").unlink()
    adapter_beside(one, saved)
    (one / "adapter_model.safetensors").write_bytes(b"")


def adapter_beside(one, saved):
    (one / "adapter_config.json").write_text('{"base_model_name_or_path": "org/base", "peft_type": "LORA"}')


def prefixed(one, saved):
    edit(one / WHOLE, lambda t: [t.update({f"module.{n}": t.pop(n)}) for n in list(t)])


def setting(**change):
    return lambda one, saved: edit_json(one / "config.json", **change)


def rewritten(change):
    return lambda one, saved: edit(one / WHOLE, change)


REFUSED = {
    "shards without an index": (
        "many",
        without_index,
        r"has model-00001-of-.* more, but neither model.safetensors nor",
    ),
    "one file of another name": ("one", renamed_file, "has weights.safetensors, but neither .* rename the file"),
    "a shard is missing": (
        "many",
        lambda many, _: (many / sorted(many.glob("model-*"))[1].name).unlink(),
        "lacks model-00002-of-.*, which its index names: the download is incomplete",
    ),
    "no shard is there": (
        "many",
        lambda many, _: [p.unlink() for p in many.glob("*.safetensors")],
        "lacks model-00001-of-.*, which its index names",
    ),
    "an unsafe name in the index": (
        "many",
        lambda many, _: edit_json(many / INDEX, weight_map={"a": "../x.safetensors"}),
        "do not trust this folder",
    ),
    "an unsafe name in config.json": (
        "one",
        setting(transformers_weights="../x.safetensors"),
        "do not trust this folder",
    ),
    "a name in config.json without its file": (
        "one",
        setting(transformers_weights="x.safetensors"),
        "lacks x.safetens",
    ),
    "an adapter": ("one", adapter, r"is an adapter \(LoRA\) of org/base .*merge it into the model with PEFT"),
    "an adapter in addition to a model": ("one", adapter_beside, "holds an adapter .* in addition to a model"),
    "a backbone weight is missing": ("one", rewritten(lambda t: t.pop(NORM)), f"lacks {NORM}: the download is incomp"),
    "names with a prefix": ("one", prefixed, "lacks lm_head.weight, .*: its names carry the prefix 'module.'"),
    "a backbone weight of another shape": (
        "one",
        rewritten(lambda t: t.update({NORM: torch.ones(63)})),
        r"model.norm.weight of .* has shape \(63,\), config.json says \(64,\)",
    ),
    "another vocabulary": (
        "one",
        setting(vocab_size=130),
        r"has shape \(128, 64\), config.json says \(130, 64\) \(vocab_size = 130\): copy config.json again",
    ),
    "too few experts": ("one", setting(num_local_experts=3), r"has shape \(4, 64\), config.json says \(3, 64\)"),
    "too many experts": ("one", setting(num_local_experts=5), "lacks weights of expert 4 in layer 0"),
    "more experts a token than there are": (
        "one",
        setting(num_experts_per_tok=5),
        "sends each token to 5 experts, and layer 0 has 4",
    ),
}
COMMANDS = {
    "load": lambda folder, _: mixoff.load(folder, fast_bytes="1MB").mixoff.close(),
    "load in a scheme": lambda folder, _: mixoff.load(folder, fast_bytes="1MB", scheme="paper").mixoff.close(),
    "convert": lambda folder, target: mixoff.convert(folder, target),
    "plan": lambda folder, _: mixoff.plan(folder),
}


@pytest.mark.parametrize("case", REFUSED)
def test_every_command_refuses_the_same_in_the_same_words(saved, tmp_path, request, case):
    """One line that names the cause, and nothing on the disk."""
    kind, arrange, message = REFUSED[case]
    folder = request.getfixturevalue(kind)
    arrange(folder, saved)
    said = set()
    for command in COMMANDS.values():
        with pytest.raises(CheckpointError, match=message) as error:
            command(folder, tmp_path / "store")
        said.add(str(error.value))
    assert len(said) == 1 and "\n" not in said.pop()
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_a_tensor_that_is_not_used_is_told(one, saved, tmp_path, caplog):
    surplus(one, saved)
    mixoff.convert(one, tmp_path / "store")
    assert "has 1 tensors that its model does not use: model.layers.7.self_attn.q_proj.weight" in caplog.text


@pytest.mark.parametrize("family", VARIED)
@pytest.mark.parametrize("drop", ["embed", "norm", "gate", "router", "head"])
def test_no_weight_of_a_backbone_may_be_missing(tmp_path, family, drop):
    """Whatever transformers renames on the way: the weight that it would make up is named."""
    folder = save_random(tmp_path / "model", family)
    checkpoint = published.open_checkpoint(folder)
    assert survey.survey(checkpoint).unused == set()
    names = [name for name in checkpoint.backbone() if drop in name]
    sizes = {name: t.shape for name, (t, _) in checkpoint.backbone().items()}
    for name in names[:2]:
        with pytest.raises(CheckpointError, match="lacks"):
            backbone.check(folder, {key: size for key, size in sizes.items() if key != name})


def test_a_tied_head_may_be_missing(tmp_path):
    folder = save_random(tmp_path / "model")
    edit(folder / WHOLE, lambda t: t.pop("lm_head.weight"))
    edit_json(folder / "config.json", tie_word_embeddings=True)
    assert torch.equal(logits(mixoff.convert(folder, tmp_path / "store"))[1], decode(resident(folder), IDS)[1])


def test_what_is_asked_of_transformers_leaves_its_settings_alone(one, capsys, monkeypatch):
    from transformers.utils import logging

    monkeypatch.setattr(logging, "_tqdm_active", True)
    before = logging.get_verbosity()
    config = read_config(one)
    assert backbone.rehearse(config, {})[0]
    assert logging.get_verbosity() == before and logging.is_progress_bar_enabled()
    assert capsys.readouterr().err == ""


# --- stores -----------------------------------------------------------------------------------------------------------


def test_a_store_is_the_files_of_its_manifest(saved, many, tmp_path):
    """A whole file that somebody puts into a store does not become its backbone."""
    target = mixoff.convert(many, tmp_path / "store")
    want = logits(target)
    other_weights(saved[0], target / WHOLE)
    assert mixoff.verify(target, full=True)
    assert all(torch.equal(a, b) for a, b in zip(logits(target), want, strict=True))


def lacking(target):
    """Take a tensor of the backbone out of a store, with all that says that it is there."""
    edit(target / WHOLE, lambda t: t.pop(NORM))
    manifest = json.loads((target / MANIFEST).read_text())
    entry = next(entry for entry in manifest["backbone"] if entry["file"] == WHOLE)
    entry["nbytes"] = (target / WHOLE).stat().st_size
    del entry["sha256"][NORM]
    (target / MANIFEST).write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (lacking, f"lacks {NORM}"),
        (lambda target: edit_json(target / "config.json", vocab_size=130), r"config.json says \(130, 64\)"),
        (lambda target: edit_json(target / "config.json", num_experts_per_tok=5), "each token to 5 experts"),
    ],
)
@pytest.mark.parametrize("scheme", ["none", "paper"])
def test_verify_load_and_plan_agree_on_a_store(one, tmp_path, scheme, harm, message):
    target = mixoff.convert(one, tmp_path / "store", scheme)
    harm(target)
    for use in (mixoff.verify, mixoff.load, mixoff.plan):
        with pytest.raises(CheckpointError, match=message):
            use(target)


def test_a_configuration_alone_can_be_planned(one):
    (one / WHOLE).unlink()
    assert not model_files.begun(one) and mixoff.plan(one, scheme="paper").fits


# --- numbers ----------------------------------------------------------------------------------------------------------


def test_a_backbone_beyond_float16_is_named(tmp_path):
    """bf16 reaches further than fp16: what would silently become infinity is refused."""
    folder = save_random(tmp_path / "model", dtype=torch.bfloat16)
    edit(folder / WHOLE, lambda t: t[NORM].fill_(1e5))
    with pytest.raises(CheckpointError, match=f"{NORM} holds NaN, or numbers beyond the 65504 of float16.*float32"):
        mixoff.load(folder, fast_bytes="1MB", dtype="float16")
    assert logits(folder, dtype="float32")[1].isfinite().all()


@pytest.mark.parametrize(
    ("family", "narrow", "dtype"),
    [
        ("mixtral", ".experts.2.w3", torch.float16),
        ("qwen3_moe", "layers.1.mlp.experts", torch.bfloat16),
        ("gpt_oss", "proj_bias", torch.bfloat16),
    ],
)
def test_experts_of_several_dtypes_are_converted_to_the_widest(tmp_path, family, narrow, dtype):
    folder = save_random(tmp_path / "model", family)
    edit(folder / WHOLE, lambda t: t.update({n: w.to(dtype) for n, w in t.items() if narrow in n}))
    wide = shutil.copytree(folder, tmp_path / "wide")
    edit(wide / WHOLE, lambda t: t.update({n: w.float() for n, w in t.items()}))
    with pytest.raises(CheckpointError, match="experts are stored as .*, F32: convert it first .*with a scheme"):
        mixoff.load(folder)
    scheme = mixoff.Scheme(experts=mixoff.quantize.Precision(4, 16)) if family != "qwen3_moe" else "none"
    stores = [mixoff.convert(path, tmp_path / f"{path.name}-store", scheme) for path in (folder, wide)]
    for file in stores[0].glob("experts-*.bin"):
        assert file.read_bytes() == (stores[1] / file.name).read_bytes()
    plain = mixoff.convert(folder, tmp_path / "plain")
    assert torch.equal(logits(plain, dtype="float32")[1], decode(resident(folder), IDS)[1])
