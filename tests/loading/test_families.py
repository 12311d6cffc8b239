"""Families: every class of experts that the installed transformers has behind its interface is served, bit for bit;
what is not behind it is refused with the reason. Also models that are in memory already, offloaded and restored.
"""

import importlib
import inspect
import re
from pathlib import Path

import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig
from transformers.activations import ACT2FN
from transformers.integrations.moe import use_experts_implementation

import mixoff
from mixoff import BudgetError, CheckpointError, MixoffError
from mixoff.quantize.scheme import Precision, Scheme
from mixoff.shapes import config as config_
from tiny import FAMILIES, SHAPE, budget, config_of, decode, resident, save_random

T, K, E = 7, 3, 6  # tokens, experts a token, experts
IDS = torch.arange(3, 21)[None]
STAYS = pytest.mark.filterwarnings("ignore:all experts .* stay in memory")
pytestmark = STAYS

# --- every decorated class -------------------------------------------------------------------------------------------

DECORATED = re.compile(r"^@use_experts_implementation\b[^\n]*(?:\n[^\n@]*)*?\nclass (\w+)", re.MULTILINE)
REFUSED = {}  # classes that mixoff does not serve, with a word of the reason; two at most
# what the classes read from their configuration, by a part of its name. Of gpt-oss's gate torch computes the last
# numbers of a tensor without SIMD, with another last bit, unless the width is a multiple of 64: of real models it is
SIZES = {"experts": E, "hidden_size": 32, "intermediate_size": 64, "latent": 16, "limit": 0.7, "alpha": 1.7}
SIZES |= {"beta": 0.5, "eps": 1e-6, "softcap": 2.0, "act": "silu"}


def decorated_classes():
    """Module and name of every class that the installed transformers decorates, found in its sources."""
    for file in sorted(Path(transformers.__file__).parent.glob("**/modeling_*.py")):
        source = file.read_text(encoding="utf-8")
        names = DECORATED.findall(source)
        assert len(names) == len(re.findall(r"^\s*@use_experts_implementation", source, re.MULTILINE)), file
        place = file.relative_to(Path(transformers.__file__).parents[1]).with_suffix("")
        yield from ((".".join(place.parts), name) for name in names)


CLASSES = sorted(decorated_classes())


class Config:
    """A configuration that knows the sizes of a tiny model under every name that a family may have for them."""

    def __init__(self):
        self._experts_implementation_internal = "grouped_mm"

    @property
    def _experts_implementation(self):
        return self._experts_implementation_internal

    def __getattr__(self, name):
        if value := next((value for word, value in SIZES.items() if word in name), None):
            return value
        raise AttributeError(f"a new family asks its configuration for {name}: give it a value in SIZES")


class Layer(nn.Module):
    """A model that is one layer of experts; `ids` (T, 1) tell the runtime that this is decoding."""

    def __init__(self, experts):
        super().__init__()
        self.experts, self.base_model, self.config = experts, self, PreTrainedConfig()

    # nn.Module would register the model as its own child
    def __setattr__(self, name, value):
        object.__setattr__(self, name, value) if name == "base_model" else super().__setattr__(name, value)

    def forward(self, ids, *args):
        return self.experts(*args)


def layer_of(experts_class, dtype):
    torch.manual_seed(0)
    experts = experts_class(Config()).to(dtype)
    for weight in experts.parameters():
        nn.init.normal_(weight, std=0.3)
    return Layer(experts).eval()


def offload_few(model, slots, **kwargs):
    """Offload with exactly so many slots in all."""
    runtime = mixoff.offload(model, "1GiB", scope="global", **kwargs).mixoff
    least = runtime.info().fast_bytes_peak - (runtime.slots - slots) * runtime.source.expert_nbytes
    mixoff.restore(model)
    return mixoff.offload(model, least, scope="global", **kwargs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("module", "name"), CLASSES, ids=[name for _, name in CLASSES])
def test_every_decorated_class(module, name, dtype):
    """Equal to `grouped_mm` in waves of two slots, with rows that ask for no expert (index E) among the others."""
    layer = layer_of(getattr(importlib.import_module(module), name), dtype)
    if name in REFUSED:
        with pytest.raises(CheckpointError, match=f"{name}.*{REFUSED[name]}"):
            mixoff.offload(layer)
        return
    width = layer.experts.down_proj.shape[2 if layer.experts.is_transposed else 1]
    x, weights = torch.randn(T, width, dtype=dtype), torch.rand(T, K, dtype=dtype)
    index = torch.stack([torch.randperm(E + 1)[:K] for _ in range(T)])
    layer.experts._is_expert_parallel = True  # or `grouped_mm` takes no index E
    with torch.no_grad():
        expected = layer(torch.zeros(T, 1), x, index, weights)
        offload_few(layer, 2)
        got, info = layer(torch.zeros(T, 1), x, index, weights), layer.mixoff.info()
    assert (index == E).any() and got.dtype == dtype
    assert torch.equal(got, expected)
    assert info.misses > 2 and info.evictions > 0 and info.capacity == 2
    mixoff.restore(layer)
    with torch.no_grad():
        assert torch.equal(layer(torch.zeros(T, 1), x, index, weights), expected)


def test_the_classes_were_found_and_at_most_two_are_refused():
    assert len(CLASSES) >= 50  # transformers 5.15, Colab's, has 51; 5.23 has 65
    assert len(REFUSED) <= 2 and set(REFUSED) <= {name for _, name in CLASSES}


def test_every_kind_of_experts_is_among_them():
    """What the families differ in: each is served by at least one class of the generated test."""
    made = [layer_of(getattr(importlib.import_module(module), name), torch.float32).experts for module, name in CLASSES]
    own_gate = [m for m in made if "integrations" not in type(m)._apply_gate.__module__]
    assert own_gate and any(m.is_transposed for m in made) and any(m.has_bias for m in made)
    assert any(not m.has_gate for m in made)
    assert any(getattr(m, "has_post_expert_norm", False) for m in made) == ("has_post_expert_norm" in FLAGS)
    assert any(not m.is_concatenated for m in made)  # gate and up interleaved
    assert any(m.down_proj.shape[1] == SIZES["latent"] for m in made)  # experts narrower than the model


# of the installed transformers: older ones have fewer
FLAGS = set(inspect.signature(use_experts_implementation).parameters) - {"experts_class", "experts_interface"}


def test_every_flag_of_the_decorator_is_known():
    """Fails when a new transformers can say something about experts that mixoff has not heard of."""
    assert FLAGS <= config_.FLAGS


class Plain(nn.Module):
    """Mixtral's experts, to be decorated by the tests."""

    def __init__(self, config):
        super().__init__()
        self.num_experts = E
        self.gate_up_proj = nn.Parameter(torch.empty(E, 128, 32))
        self.down_proj = nn.Parameter(torch.empty(E, 32, 64))
        self.act_fn = ACT2FN["silu"]

    def forward(self, hidden_states, top_k_index, top_k_weights):
        raise NotImplementedError


def decorated(change):
    """A decorated class whose instances are changed by `change` after they were made."""

    class Changed(Plain):
        def __init__(self, config):
            super().__init__(config)
            change(self)

    return use_experts_implementation(Changed)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: setattr(m, "has_twin", True), "Changed is not served.*has_twin"),
        (lambda m: setattr(m, "is_sparse_inside", False), "Changed is not served.*is_sparse_inside"),
        (lambda m: m.register_parameter("mid_proj", nn.Parameter(torch.empty(E, 64, 64))), "mid_proj"),
        (lambda m: setattr(m, "down_proj", nn.Parameter(torch.empty(32, 64))), "weights .*down_proj"),
        (lambda m: m.double(), "float64: mixoff needs one of float32"),
        (lambda m: m.to("meta"), "experts are on meta"),
    ],
)
def test_what_would_be_computed_wrongly_is_refused_by_name(change, message):
    layer = Layer(decorated(change)(Config()))
    with pytest.raises(MixoffError, match=message):
        mixoff.offload(layer)
    assert "mixoff" not in vars(layer) and layer.experts.config._experts_implementation == "grouped_mm"


# --- families outside the interface ----------------------------------------------------------------------------------

SMALL = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
SMALL |= {"vocab_size": 128, "intermediate_size": 64}
OUTSIDE = {
    "DbrxConfig": ({"d_model": 64, "n_heads": 4, "n_layers": 2, "vocab_size": 128,
                    "ffn_config": {"ffn_hidden_size": 64}, "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0}},
                   r"DbrxForCausalLM.*\(Dbrx"),
    "JetMoeConfig": (SMALL | {"kv_channels": 16}, r"JetMoeForCausalLM.*\(JetMoeMo"),
    "Llama4TextConfig": (SMALL | {"num_local_experts": 4}, r"Llama4ForCausalLM.*\(Llama4TextMoe\)"),
    "SwitchTransformersConfig": ({}, "no class for it that continues a text"),
    "NllbMoeConfig": ({}, "no class for it that continues a text"),
    "LlamaConfig": (SMALL, "LlamaForCausalLM has no experts.*dense"),
}  # fmt: skip


@pytest.mark.parametrize("name", OUTSIDE)
def test_families_outside_the_interface_are_refused_with_the_reason(tmp_path, name):
    arguments, message = OUTSIDE[name]
    config = getattr(transformers, name)(**arguments)
    config.save_pretrained(tmp_path)
    save_file({"model.embed_tokens.weight": torch.zeros(2, 2)}, tmp_path / "model.safetensors")
    for attempt in (mixoff.load, lambda folder: mixoff.convert(folder, tmp_path / "store")):
        with pytest.raises(CheckpointError, match=message):
            attempt(tmp_path)
    assert not (tmp_path / "store").exists()


@pytest.mark.parametrize("name", ["JetMoeConfig", "Llama4TextConfig", "LlamaConfig"])
def test_they_are_refused_in_memory_as_well(name):
    arguments, message = OUTSIDE[name]
    model = AutoModelForCausalLM.from_config(getattr(transformers, name)(**arguments))
    with pytest.raises(CheckpointError, match=message):
        mixoff.offload(model)
    assert "mixoff" not in vars(model)


# --- layouts of the Hub ----------------------------------------------------------------------------------------------

MOE = "block_sparse_moe.experts.N."
PROJ = ("down_proj.weight", "gate_proj.weight", "up_proj.weight")
GPT_OSS = ("down_proj", "down_proj_bias", "gate_up_proj", "gate_up_proj_bias")
# names of expert tensors in the published files, numbers as N
LAYOUTS = {family: [f"model.layers.N.mlp.experts.N.{name}" for name in PROJ] for family in FAMILIES}
LAYOUTS |= {family: [f"model.layers.N.{MOE}{w}.weight" for w in ("w1", "w2", "w3")]
            for family in ("minimax", "mixtral", "phimoe")}  # fmt: skip
LAYOUTS["gpt_oss"] = [f"model.layers.N.mlp.experts.{name}" for name in GPT_OSS]
LAYOUTS["granitemoe"] = [f"model.layers.N.block_sparse_moe.{side}_linear.weight" for side in ("input", "output")]
LAYOUTS["jamba"] = [f"model.layers.N.feed_forward.experts.N.{name}" for name in PROJ]
LAYOUTS["nemotron_h"] = [f"backbone.layers.N.mixer.experts.N.{name}" for name in PROJ if "gate" not in name]


def expert_patterns(folder):
    """Names of the expert tensors in a folder's files, their numbers as N."""
    names = [name for file in folder.glob("*.safetensors") for name in safe_open(file, "pt").keys()]
    return sorted({re.sub(r"\.\d+\.", ".N.", name) for name in names if mixoff.checkpoints.keys.parse(name)})


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_every_family(tmp_path, family):
    """Fourteen families in the layout of their published files, from a checkpoint and a store, in waves and without."""
    folder = save_random(tmp_path / "model", family)
    assert expert_patterns(folder) == LAYOUTS[family]
    want_tokens, want_logits = decode(resident(folder), IDS)
    for path in (folder, mixoff.convert(folder, tmp_path / "store")):
        sites = len(mixoff.store.source.open_source(path).sites)
        for slots, scope in ((sites, "layer"), (5, "global")):
            with mixoff.load(path, fast_bytes=budget(path, slots), scope=scope) as model:
                tokens, logits = decode(model, IDS)
                info = model.mixoff.info()
            assert torch.equal(tokens, want_tokens) and torch.equal(logits, want_logits)
            assert info.misses > 0 and info.evictions > 0


def served_equally(folder, tmp_path):
    """Assert that folder and store give plain transformers' logits with one slot, and return their sites."""
    oracle = resident_any(folder)
    for module in config_.expert_modules(oracle).values():
        for weight in module.parameters(recurse=False):
            weight.data = weight.data.clone()  # aligned: as views of the file their products have other last bits
    want = decode(oracle, IDS)[1]
    for path in (folder, mixoff.convert(folder, tmp_path / "store")):
        with mixoff.load(path, fast_bytes=budget(path, 1, scope="global"), scope="global") as model:
            assert torch.equal(decode(model, IDS)[1], want)
            assert model.mixoff.info().misses > 0 and model.mixoff.info().evictions > 0
            sites = model.mixoff.source.sites
    return sites


def resident_any(folder):
    base = config_.model_class(config_.read_config(folder))
    return base.from_pretrained(folder, dtype=torch.float32, experts_implementation="grouped_mm").eval()


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe", "phimoe"])
def test_names_as_transformers_keeps_them_in_memory(tmp_path, family):
    """All experts in one tensor under transformers' own names, as some fine-tunes are published."""
    folder = save_random(tmp_path / "model", family, save_original_format=False)
    assert expert_patterns(folder) == [f"model.layers.N.mlp.experts.{name}" for name in ("down_proj", "gate_up_proj")]
    served_equally(folder, tmp_path)


ROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 2, 4]}
TWO_SETS = SMALL | {"moe_intermediate_size": [48, 24], "moe_num_experts": 4, "moe_k": 2, "moe_num_shared_experts": 1,
                    "mlp_layer_types": ["dense", "sparse"], "rope_parameters": ROPE, "bos_token_id": 1,
                    "eos_token_id": 2, "pad_token_id": 0}  # fmt: skip
IMAGES = {"depth": 1, "hidden_size": 32, "num_heads": 2, "intermediate_size": 32}


def test_two_sets_of_experts_in_a_layer(tmp_path):
    """Ernie 4.5 VL: experts for text and narrower ones for images, in one list of the published file."""
    torch.manual_seed(0)
    config = transformers.Ernie4_5_VLMoeConfig(text_config=TWO_SETS, vision_config=IMAGES)
    config_.model_class(config)(config).save_pretrained(tmp_path / "model")
    assert expert_patterns(tmp_path / "model") == LAYOUTS["qwen3_moe"]
    sites = served_equally(tmp_path / "model", tmp_path)
    assert [site.name.split(".")[-2] for site in sites] == ["text_moe", "vision_moe"]
    assert len({site.layer for site in sites}) == 1 and sites[0].expert_nbytes > sites[1].expert_nbytes


def test_gemma_4(tmp_path):
    """Its files already hold all experts in one tensor, so plain transformers computes with views of the file, whose
    addresses are whatever the header leaves: in fp32 the last bits of a product depend on that. Aligned, they are ours.
    """
    torch.manual_seed(0)
    shape = {"num_experts": 8, "top_k_experts": 3, "moe_intermediate_size": 48, "intermediate_size": 96, "head_dim": 16}
    shape |= {"global_head_dim": 16, "hidden_size_per_layer_input": 0, "num_kv_shared_layers": 0, "sliding_window": 16}
    config = transformers.Gemma4TextConfig(**(SHAPE | shape), enable_moe_block=True)
    model = AutoModelForCausalLM.from_config(config)
    for name, weight in model.named_parameters():
        if "per_expert_scale" in name:
            nn.init.uniform_(weight, 0.5, 1.5)
    model.save_pretrained(tmp_path / "model")
    assert served_equally(tmp_path / "model", tmp_path)
    want = decode(model.eval(), IDS)[1]  # in memory every tensor is aligned
    assert torch.equal(decode(mixoff.offload(model, "100MB"), IDS)[1], want)


def renamed(folder, change):
    """Rewrite the tensors of a folder's one file through `change(name) -> name or None`."""
    file = folder / "model.safetensors"
    tensors = {change(name): t.clone() for name, t in load_file(file).items()}
    save_file({name: t for name, t in tensors.items() if name}, file, metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda n: n.replace("mlp.experts", "mlp.specialists"), "no expert weights under a name"),
        (lambda n: None if "layers.1.mlp.experts.3.up" in n else n, "lacks weights of expert 3 in layer 1"),
        (lambda n: n.replace("layers.1.mlp.experts", "layers.1.mlp.other.experts"), None),
    ],
)
def test_names_that_are_unknown_or_missing(tmp_path, change, message):
    folder = save_random(tmp_path / "model", "qwen3_moe")
    renamed(folder, change)
    if message is None:  # one set of experts in the layer: whatever the path, it is this one
        assert mixoff.store.source.open_source(folder).sites
        return
    with pytest.raises(CheckpointError, match=message):
        mixoff.load(folder)


def test_transposed_experts_are_refused_by_name(tmp_path):
    """Qwen3-VL-MoE as published, (experts, inputs, outputs); what transformers saves of it is served."""
    text = SMALL | {"moe_intermediate_size": 48, "num_experts": 4, "num_experts_per_tok": 2, "head_dim": 16}
    vision = {"depth": 1, "hidden_size": 32, "num_heads": 2, "intermediate_size": 32, "out_hidden_size": 64}
    text |= {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}}
    config = transformers.Qwen3VLMoeConfig(text_config=text, vision_config=vision | {"deepstack_visual_indexes": [0]})
    config_.model_class(config)(config).save_pretrained(tmp_path / "model")
    assert mixoff.store.source.open_source(tmp_path / "model").sites
    file = tmp_path / "model" / "model.safetensors"
    tensors = {n: t.mT.contiguous() if ".mlp.experts." in n else t for n, t in load_file(file).items()}
    save_file(tensors, file, metadata={"format": "pt"})
    for attempt in (mixoff.load, lambda folder: mixoff.convert(folder, tmp_path / "store")):
        with pytest.raises(CheckpointError, match="inputs before outputs, as in Qwen3-VL-MoE.*mixoff.offload"):
            attempt(tmp_path / "model")


def test_interleaved_experts_are_refused_by_name(tmp_path):
    """The experts' names of Inkling, in transformers' conversion mapping."""
    folder = save_random(tmp_path / "model", "mixtral", save_original_format=False)
    renamed(folder, lambda n: n.replace("gate_up_proj", "w13_weight").replace("experts.down_proj", "experts.w2_weight"))
    with pytest.raises(CheckpointError, match="interleaves the rows of gate and up, as in Inkling.*mixoff.offload"):
        mixoff.load(folder)


def test_two_sets_for_one_site_are_told_apart_or_refused(tmp_path):
    folder = save_random(tmp_path / "model", "mixtral")
    tensors = load_file(folder / "model.safetensors")
    other = {n.replace("model.", "twin."): t + 1 for n, t in tensors.items() if mixoff.checkpoints.keys.parse(n)}
    save_file(tensors | other, folder / "model.safetensors", metadata={"format": "pt"})
    want = decode(resident(folder), IDS)[1]
    with mixoff.load(folder, fast_bytes=budget(folder, 3)) as model:
        assert torch.equal(decode(model, IDS)[1], want)
    renamed(folder, lambda n: n.replace("model.layers", "twins.layers") if mixoff.checkpoints.keys.parse(n) else n)
    with pytest.raises(CheckpointError, match="cannot tell these experts apart"):
        mixoff.load(folder)


# --- models in memory ------------------------------------------------------------------------------------------------

IN_MEMORY = ("deepseek_v3", "gpt_oss", "granitemoe", "jamba", "mixtral", "nemotron_h", "qwen2_moe")


def in_memory(family, dtype=torch.float32, implementation="grouped_mm"):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config_of(family), experts_implementation=implementation)
    return model.to(dtype).eval()


def anatomy(model):
    """All that has to be as before once a model is restored: names, parameters, storages, flags, hooks, settings."""
    weights = {n: (id(p), p.data_ptr(), p.requires_grad) for n, p in model.named_parameters()}
    buffers = {n: (id(b), b.data_ptr()) for n, b in model.named_buffers()}
    modules = {n: (id(m), len(m._forward_pre_hooks), sorted(vars(m))) for n, m in model.named_modules()}
    settings = model.config.to_dict(), model.config._experts_implementation, model.generation_config.to_dict()
    return list(weights), weights, buffers, modules, settings


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", IN_MEMORY)
def test_offload_computes_the_same_and_restore_leaves_no_trace(family, dtype):
    model = in_memory(family, dtype)
    next(iter(config_.expert_modules(model).values())).down_proj.requires_grad_(False)
    want, before = decode(model, IDS), anatomy(model)
    assert offload_few(model, 3) is model
    got, info = decode(model, IDS), model.mixoff.info()
    assert not any(p.numel() for m in config_.expert_modules(model).values() for p in m.parameters(recurse=False))
    assert mixoff.restore(model) is model
    assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1])
    assert info.misses > 0 and info.evictions > 0
    assert anatomy(model) == before
    again = decode(model, IDS)
    assert torch.equal(again[0], want[0]) and torch.equal(again[1], want[1])


@pytest.mark.parametrize("io", ["direct", "buffered"])
def test_guesses_and_ways_to_read_change_nothing(tmp_path, io):
    model = in_memory("qwen2_moe")
    want = decode(model, IDS)[1]
    offload_few(model, 8, folder=tmp_path, io=io, prefetch="next-router", policy="lfuda")
    assert torch.equal(decode(model, IDS)[1], want)
    assert model.mixoff.info().misses > 0 and model.mixoff.info().evictions > 0
    mixoff.restore(model)
    assert torch.equal(decode(model, IDS)[1], want)


@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm"])
def test_the_previous_implementation_returns(implementation):
    model = in_memory("mixtral", implementation=implementation)
    mixoff.offload(model, "1MB")
    assert model.config._experts_implementation == "mixoff"
    mixoff.restore(model)
    assert model.config._experts_implementation == implementation


def test_a_restored_model_saves_and_trains(tmp_path):
    model = in_memory("mixtral")
    model.save_pretrained(tmp_path / "before")
    mixoff.offload(model, "1MB")
    with pytest.raises(MixoffError, match=r"mixoff\.restore the model first"):
        model.save_pretrained(tmp_path / "x")
    with pytest.raises(RuntimeError, match="not train"):
        model(IDS).logits.sum().backward()
    mixoff.restore(model).zero_grad()
    model.save_pretrained(tmp_path / "after")
    files = [(tmp_path / at / "model.safetensors").read_bytes() for at in ("before", "after")]
    assert files[0] == files[1] and not (tmp_path / "x").exists()
    model(IDS).logits.sum().backward()
    assert all(m.down_proj.grad.abs().sum() > 0 for m in config_.expert_modules(model).values())


@pytest.mark.parametrize("family", ["gpt_oss", "nemotron_h", "qwen2_moe"])
def test_a_folder_takes_the_experts_out_of_memory(tmp_path, family):
    model = in_memory(family, torch.bfloat16)
    want, weights = decode(model, IDS), dict(model.named_parameters())
    values = {name: p.detach().clone() for name, p in weights.items()}
    offload_few(model, 3, folder=tmp_path)
    experts = [p for name, p in weights.items() if ".experts." in name and "shared" not in name]
    assert not any(p.numel() for p in experts)  # nobody else holds them either
    written = sum(file.stat().st_size for file in tmp_path.rglob("*") if file.is_file())
    assert written >= sum(site.num_experts * site.expert_nbytes for site in model.mixoff.source.sites)
    got, info = decode(model, IDS), model.mixoff.info()
    mixoff.restore(model)
    assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1])
    assert info.misses > 0 and info.evictions > 0
    after = dict(model.named_parameters())
    assert list(after) == list(weights) and all(after[name] is p for name, p in weights.items())
    assert all(torch.equal(after[name], value) for name, value in values.items())
    assert not list(tmp_path.iterdir())


FOUR = Precision(4, 16)


@pytest.mark.parametrize("on_disk", [False, True])
@pytest.mark.parametrize(
    ("family", "scheme"),
    [
        ("mixtral", Scheme(experts=FOUR)),
        ("gpt_oss", Scheme(experts=Precision(2, 16), attention=FOUR)),
        ("qwen2_moe", Scheme(experts=FOUR, attention=FOUR, shared_experts=FOUR, head=FOUR, embeddings=FOUR)),
    ],
)
def test_a_scheme_quantizes_as_a_store_does_until_the_model_is_restored(tmp_path, family, scheme, on_disk):
    folder = save_random(tmp_path / "model", family)
    model = resident(folder)
    want, before = decode(model, IDS), anatomy(model)
    with mixoff.load(mixoff.convert(folder, tmp_path / "store", scheme), "1GiB") as stored:
        quantized = decode(stored, IDS)
    (tmp_path / "spill").mkdir()
    offload_few(model, 3, scheme=scheme, folder=tmp_path / "spill" if on_disk else None)
    got, info = decode(model, IDS), model.mixoff.info()
    mixoff.restore(model)
    assert torch.equal(got[1], quantized[1]) and not torch.equal(got[1], want[1])
    assert info.misses > 0 and info.evictions > 0
    assert torch.equal(decode(model, IDS)[1], want[1])
    assert on_disk or anatomy(model) == before


def test_a_tied_head_is_quantized_with_its_embedding():
    model = resident(mixoff.models.path())
    before = anatomy(model)
    mixoff.offload(model, "4MB", scheme=Scheme(embeddings=Precision(8, 64)))
    head, embedding = model.lm_head.quantized, model.get_input_embeddings().quantized
    assert head is embedding and head.bits == 8
    mixoff.restore(model)
    assert anatomy(model) == before and model.lm_head.weight is model.get_input_embeddings().weight


def test_misuse_has_clear_errors():
    model = in_memory("mixtral")
    with pytest.raises(MixoffError, match="not offloaded"):
        mixoff.restore(model)
    mixoff.offload(model, "1MB")
    with pytest.raises(MixoffError, match="offloaded already"):
        mixoff.offload(model, "1MB")
    mixoff.restore(model)
    with pytest.raises(MixoffError, match="not offloaded"):
        mixoff.restore(model)
    with mixoff.load(mixoff.models.path(), "4MB") as loaded:
        with pytest.raises(MixoffError, match="was loaded by mixoff, so there is nothing to restore"):
            mixoff.restore(loaded)
        with pytest.raises(MixoffError, match="offloaded already"):
            mixoff.offload(loaded)


def test_a_closed_runtime_can_still_be_restored(tmp_path):
    for folder in (None, tmp_path):
        model = in_memory("mixtral")
        want = decode(model, IDS)[1]
        mixoff.offload(model, "1MB", folder=folder).mixoff.close()
        assert torch.equal(decode(mixoff.restore(model), IDS)[1], want)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"fast_bytes": 10}, "raise it to"),
        ({"fast_bytes": "much"}, "cannot read"),
        ({"policy": "clairvoyant"}, "choose one of"),
        ({"scope": "expert"}, "layer, global"),
        ({"prefetch": "crystal ball"}, "prefetch"),
        ({"scheme": "huge"}, "no scheme"),
        ({"scheme": Scheme(experts=Precision(4, 64))}, "64"),
        ({"scheme": Scheme(experts=FOUR, attention=Precision(4, 128))}, "128"),
        ({"folder": "/no/such/folder"}, "cannot create a temporary file"),
    ],
)
def test_an_error_leaves_the_model_as_it_was(arguments, message):
    model = in_memory("gpt_oss")
    before = anatomy(model)
    with pytest.raises(MixoffError, match=message):
        mixoff.offload(model, **({"fast_bytes": "1MB"} | arguments))
    assert anatomy(model) == before


@pytest.mark.parametrize(
    "step", ["_spill", "_empty", "_strip", "_quantize_backbone", "choose_io", "Runtime", "_switch", "bind"]
)
def test_a_failure_at_any_step_leaves_the_model_as_it_was(tmp_path, monkeypatch, step):
    model = in_memory("mixtral")
    want, names = decode(model, IDS)[1], list(dict(model.named_parameters()))

    def fail(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(mixoff.loading.offload, step, fail)
    with pytest.raises(KeyboardInterrupt):
        mixoff.offload(model, "1MB", scheme=Scheme(experts=FOUR), folder=tmp_path)
    assert list(dict(model.named_parameters())) == names and not list(tmp_path.iterdir())
    assert torch.equal(decode(model, IDS)[1], want) and "mixoff" not in vars(model)


def test_a_full_disk_is_a_clear_error(tmp_path, monkeypatch):
    model = in_memory("mixtral")
    before = anatomy(model)

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(mixoff.loading.offload.TensorReader, "read_into", full)
    with pytest.raises(MixoffError, match="could not be written to .*No space left"):
        mixoff.offload(model, "1MB", folder=tmp_path)
    assert anatomy(model) == before and not list(tmp_path.iterdir())


@pytest.mark.filterwarnings("error")
def test_it_says_that_memory_is_not_freed(tmp_path):
    model = in_memory("mixtral")
    with pytest.warns(UserWarning, match="all experts .* stay in memory"):
        mixoff.offload(model, "1MB")
    mixoff.restore(model)
    mixoff.restore(mixoff.offload(model, "1MB", folder=tmp_path))


def test_below_the_least_budget_the_number_is_named():
    model = in_memory("mixtral")
    with pytest.raises(BudgetError) as error:
        mixoff.offload(model, 1, scope="global")
    least = int(re.search(r"raise it to ([\d,]+) bytes", str(error.value))[1].replace(",", ""))
    want = decode(model, IDS)[1]
    assert torch.equal(decode(mixoff.offload(model, least, scope="global"), IDS)[1], want)
    assert model.mixoff.slots == 1 and model.mixoff.info().evictions > 0
