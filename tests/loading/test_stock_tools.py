"""What torch, transformers, accelerate, safetensors and peft do with a served model: it works as with any other model,
or it is refused in one sentence that names the way out and leaves the model as it was.
"""

import copy
import gc
import io
import os
import pickle
import sys
import threading

import pytest
import safetensors.torch
import torch
from accelerate import Accelerator, cpu_offload, disk_offload, dispatch_model
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    ContinuousBatchingConfig,
    GenerationConfig,
    MixtralForCausalLM,
)

import mixoff
from mixoff import BudgetError, MixoffError
from mixoff.loading.refusals import Elsewhere, Served
from mixoff.shapes.config import read_config
from tiny import BUNDLED, decode, resident, save_random

pytestmark = pytest.mark.filterwarnings("ignore:all experts .* stay in memory")
IDS = torch.arange(3, 12)[None]


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_random(tmp_path_factory.mktemp("stock") / "mixtral", "mixtral")


@pytest.fixture(scope="module")
def want(folder):
    return logits(resident(folder))


def served(folder, kind):
    """The model of `folder`, by `load` or by `offload`."""
    return mixoff.load(folder, "1MB") if kind == "load" else mixoff.offload(resident(folder), "1MB")


# --- continuous batching ---------------------------------------------------------------------------------------------

PROMPTS = [[1, 5, 9, 17, 33, 4], [1, 7, 9], [1, 40, 41, 42, 43]]
NEW = 12


def batched(model):
    """Tokens of all prompts, generated in one changing batch."""
    how = GenerationConfig(max_new_tokens=NEW, do_sample=False, eos_token_id=-1, pad_token_id=0)
    pages = ContinuousBatchingConfig(num_blocks=8, page_size=32, max_batch_tokens=64)
    done = model.generate_batch(PROMPTS, generation_config=how, continuous_batching_config=pages)
    return [request.generated_tokens for request in done.values()]


def one_by_one(model):
    return [decode(model, torch.tensor([ids]), NEW)[0][0, len(ids) :].tolist() for ids in PROMPTS]


def test_continuous_batching_decodes_from_the_cache():
    """All requests are in one row: without a look at their lengths each step would count as a prompt."""
    with mixoff.load(BUNDLED, "3MB") as model:
        assert one_by_one(model) == [request[:NEW] for request in one_by_one(resident(BUNDLED))]
        alone, tokens = model.mixoff.info(), NEW * len(PROMPTS)
        model.mixoff.reset_counts()
        assert batched(model) == batched(resident(BUNDLED)) == one_by_one(resident(BUNDLED))
        together = model.mixoff.info()
    assert together.hits > 0 and together.misses > together.prompt_misses
    assert together.bytes_moved / tokens < 1.2 * alone.bytes_moved / tokens
    assert together.fast_bytes_peak <= 3_000_000


class OtherCache:
    """Keys and values of another kind: neither a length nor layers."""


def test_a_cache_of_another_kind_is_no_obstacle_and_is_not_cut_back(folder, monkeypatch):
    def forward(self, input_ids=None, past_key_values=None):
        if past_key_values is not None:
            raise MemoryError
        return input_ids

    monkeypatch.setattr(MixtralForCausalLM, "forward", forward)
    with mixoff.load(folder, "1MB") as model:
        with pytest.raises(BudgetError, match=r"ran out, and this model's cache \(OtherCache\) cannot be cut back"):
            model(IDS, past_key_values=OtherCache())
        assert model(IDS) is IDS


# --- what is refused -------------------------------------------------------------------------------------------------

RESTORE = r"mixoff\.restore the model first"
CAST = r"dtype.*mixoff\.load\(dtype=…"
BYTES = r"state_dict has their names and shapes alone: use mixoff\.convert, or copy the folder"
COPY = r"a copy or a pickle would lose them: call mixoff\.load again"
REFUSED = {  # what is tried, and the words of the refusal after `load`; after `offload` they end in RESTORE
    "half": (lambda m, at: m.half(), CAST),
    "bfloat16": (lambda m, at: m.bfloat16(), CAST),
    "double": (lambda m, at: m.double(), CAST),
    "to a dtype": (lambda m, at: m.to(torch.float16), CAST),
    "to a device": (lambda m, at: m.to("meta"), CAST),
    "the backbone alone": (lambda m, at: m.base_model.half(), CAST),
    "within another module": (lambda m, at: torch.nn.Sequential(m).half(), CAST),
    "save_pretrained": (lambda m, at: m.save_pretrained(at), r"use mixoff\.convert, or copy the folder"),
    "save_model": (lambda m, at: safetensors.torch.save_model(m, at), BYTES),
    "save_file": (lambda m, at: safetensors.torch.save_file(m.state_dict(), at), BYTES),
    "Accelerator.save_model": (lambda m, at: Accelerator().save_model(m, at.parent), BYTES),
    "torch.save of weights": (lambda m, at: torch.save(m.state_dict(), io.BytesIO()), BYTES),
    "numpy": (lambda m, at: {k: w.numpy() for k, w in m.state_dict().items()}, BYTES),
    "clone": (lambda m, at: {k: w.clone() for k, w in m.state_dict().items()}, BYTES),
    "cat": (lambda m, at: torch.cat([w.float() for w in m.state_dict().values() if w.dim() == 3]), BYTES),
    "torch.save": (lambda m, at: torch.save(m, io.BytesIO()), COPY),
    "pickle": (lambda m, at: pickle.dumps(m), COPY),
    "pickle of the backbone": (lambda m, at: pickle.dumps(m.base_model), COPY),
    "deepcopy": (lambda m, at: copy.deepcopy(m), COPY),
    "deepcopy of a layer": (lambda m, at: copy.deepcopy(m.base_model.layers[1]), COPY),
    "another implementation": (lambda m, at: m.set_experts_implementation("eager"), "load the model with transformers"),
    "another by part": (lambda m, at: m.set_experts_implementation({"": "eager"}), "load the model with transformers"),
}


@pytest.mark.parametrize("kind", ["load", "offload"])
def test_what_would_lose_the_experts_is_refused_with_the_way_out(folder, want, tmp_path, kind):
    model = served(folder, kind)
    for name, (attempt, words) in REFUSED.items():
        with pytest.raises(MixoffError, match=words if kind == "load" else RESTORE) as error:
            attempt(model, tmp_path / "x")
        assert "\n" not in str(error.value), name
        assert torch.equal(logits(model), want), name
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind", ["load", "offload"])
def test_autocast_to_another_dtype_is_refused(folder, want, kind):
    model = served(folder, kind)
    for ids in (IDS, IDS[:, :1], IDS.repeat(1, 20)):
        with (
            torch.autocast("cpu", dtype=torch.bfloat16),
            pytest.raises(MixoffError, match="autocast cannot reach them"),
        ):
            model(ids)
    assert torch.equal(logits(model), want)


def test_autocast_to_the_model_s_own_dtype_runs(folder):
    with mixoff.load(folder, "1MB", dtype="bfloat16") as model, torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.isfinite(logits(model)).all()


def test_weights_that_were_cast_one_by_one_are_noticed(folder):
    with mixoff.load(folder, "1MB") as model:
        for weight in model.parameters():
            weight.data = weight.data.to(torch.bfloat16)
        with pytest.raises(MixoffError, match=CAST):
            logits(model)


# --- what goes on working --------------------------------------------------------------------------------------------

FINE = {
    "to the same dtype": lambda m: m.float(),
    "to the same device": lambda m: m.to("cpu"),
    "train and eval": lambda m: m.train().eval(),
    "frozen": lambda m: m.requires_grad_(False),
    "state_dict": lambda m: m.load_state_dict(m.state_dict()),
    "the same implementation": lambda m: m.set_experts_implementation("mixoff"),
    "the same by part": lambda m: m.set_experts_implementation(m.get_experts_implementation()),
    "cpu_offload": lambda m: cpu_offload(m, execution_device=torch.device("cpu")),
    "prepare": lambda m: Accelerator(cpu=True).prepare(m),
    "dispatch": lambda m: dispatch_model(m, {"": "cpu"}),
}


@pytest.mark.parametrize("kind", ["load", "offload"])
@pytest.mark.parametrize("name", FINE)
def test_what_needs_no_experts_works(folder, want, kind, name):
    model = served(folder, kind)
    FINE[name](model)
    assert torch.equal(logits(model), want)


def test_a_backbone_on_disk(folder, want, tmp_path):
    model = mixoff.load(folder, "1MB")
    disk_offload(model, tmp_path, execution_device=torch.device("cpu"))
    assert torch.equal(logits(model), want)


def test_a_state_dict_has_the_names_and_shapes_of_the_whole_model(folder):
    whole = resident(folder).state_dict()
    with mixoff.load(folder, "1MB") as model:
        state = model.state_dict()
        experts = [name for name, weight in state.items() if isinstance(weight, Elsewhere)]
        assert {name: w.shape for name, w in state.items()} == {name: w.shape for name, w in whole.items()}
        assert sum(weight.numel() for weight in state.values()) == sum(weight.numel() for weight in whole.values())
        assert len(experts) == 6 and all(".experts." in name for name in experts)
        assert "Elsewhere" in repr(state[experts[0]]) and state[experts[0]].dtype == torch.float32
        assert (
            model.num_parameters() == sum(p.numel() for p in model.parameters()) < sum(map(torch.numel, whole.values()))
        )
        with pytest.raises(RuntimeError, match=BYTES):
            resident(folder).load_state_dict(state)


@pytest.mark.parametrize("kind", ["load", "offload"])
def test_a_model_made_from_a_served_one_s_class_or_configuration_is_an_ordinary_one(folder, want, kind):
    model = served(folder, kind)
    for made in (AutoModelForCausalLM.from_config(model.config), type(model)(model.config)):
        assert not isinstance(made, Served) and torch.isfinite(logits(made)).all()
        assert made.num_parameters() == resident(folder).num_parameters()
    again = type(model).from_pretrained(folder, experts_implementation="grouped_mm")
    assert torch.equal(logits(again), want) and torch.equal(logits(model), want)


def test_restoring_takes_every_refusal_away(folder, want, tmp_path):
    model = mixoff.restore(served(folder, "offload"))
    assert type(model) is type(resident(folder)) and not isinstance(model.base_model, Served)
    assert torch.equal(logits(copy.deepcopy(model)), want) and torch.equal(
        logits(pickle.loads(pickle.dumps(model))), want
    )
    safetensors.torch.save_model(model, tmp_path / "x")
    assert not any(isinstance(weight, Elsewhere) for weight in model.half().state_dict().values())


def test_transformers_refuses_a_store(folder, want, tmp_path):
    """Its experts would be made up at random."""
    store = mixoff.convert(BUNDLED, tmp_path / "store")
    for auto in (AutoModelForCausalLM, AutoModel):
        with pytest.raises(ValueError, match=r"a mixoff store: load this folder with mixoff\.load"):
            auto.from_pretrained(store)
    assert AutoTokenizer.from_pretrained(store)("a").input_ids == AutoTokenizer.from_pretrained(BUNDLED)("a").input_ids
    assert read_config(store)._experts_implementation is None
    with mixoff.load(store, "3MB") as model:
        assert torch.equal(logits(model), logits(resident(BUNDLED)))


def test_a_store_written_before_stores_were_marked_loads(folder, want, tmp_path):
    store = mixoff.convert(folder, tmp_path / "store")
    (store / "config.json").write_bytes((folder / "config.json").read_bytes())
    with mixoff.load(store, "1MB") as model:
        assert torch.equal(logits(model), want)


# --- adapters --------------------------------------------------------------------------------------------------------

ADAPTERS = {  # what of a model an adapter is trained on: each has experts
    "a weight": {"target_parameters": ["gate_up_proj"]},
    "attention and a weight": {"target_modules": ["q_proj"], "target_parameters": ["mlp.experts.down_proj"]},
    "names of transformers 4": {"target_modules": ["w1", "w2", "w3"]},
    "attention and these": {"target_modules": ["q_proj", "w1", "w2", "w3"]},
    "all that was linear": {"target_modules": "all-linear"},
    "a pattern": {"target_modules": r".*experts.*w1"},
    "the whole module": {"target_modules": ["q_proj"], "modules_to_save": ["experts"]},
}
MERGE = "merge the adapter into the base model"


@pytest.fixture
def peft():
    return pytest.importorskip("peft")


def adapter(peft, folder, at, **targets):
    """Save a random adapter of the model in `folder` to `at`; returns it with the logits that it makes."""
    torch.manual_seed(1)
    config = peft.LoraConfig(r=4, init_lora_weights=False, **targets)
    model = peft.get_peft_model(resident(folder), config).eval()
    model.save_pretrained(at)
    return at, logits(model)


@pytest.mark.parametrize("kind", ["load", "offload"])
def test_an_adapter_on_experts_is_refused(peft, folder, want, kind):
    model = served(folder, kind)
    for name, targets in ADAPTERS.items():
        with pytest.raises(MixoffError, match=MERGE):
            peft.get_peft_model(model, peft.LoraConfig(r=4, **targets))
        assert torch.equal(logits(model), want) and all(p.requires_grad for p in model.parameters()), name


@pytest.mark.parametrize("kind", ["load", "offload"])
def test_an_adapter_on_attention_works_and_a_second_one_on_experts_is_refused(peft, folder, want, tmp_path, kind):
    attention, adapted = adapter(peft, folder, tmp_path / "a", target_modules=["q_proj", "v_proj"])
    experts, _ = adapter(peft, folder, tmp_path / "b", target_parameters=["experts.down_proj"])
    model = served(folder, kind)
    wrapped = peft.PeftModel.from_pretrained(model, attention).eval()
    assert torch.equal(logits(wrapped), adapted) and not torch.equal(adapted, want)
    with pytest.raises(MixoffError, match=MERGE):
        wrapped.load_adapter(experts, "second")
    assert torch.equal(logits(wrapped), adapted)
    wrapped.save_pretrained(tmp_path / "again")
    files = [safetensors.torch.load_file(at / "adapter_model.safetensors") for at in (attention, tmp_path / "again")]
    assert files[0].keys() == files[1].keys() and all(torch.equal(files[0][key], files[1][key]) for key in files[0])
    assert torch.equal(logits(wrapped.unload()), want) and not model.peft_config


def test_a_peft_model_is_offloaded_and_restored(peft, folder, tmp_path):
    attention, adapted = adapter(peft, folder, tmp_path / "a", target_modules=["q_proj", "v_proj"])
    experts, changed = adapter(peft, folder, tmp_path / "b", target_parameters=["experts.down_proj"])
    wrapped = peft.PeftModel.from_pretrained(resident(folder), attention).eval()
    assert mixoff.offload(wrapped, "1MB") is wrapped
    assert torch.equal(logits(wrapped), adapted) and wrapped.mixoff.info().prompt_misses > 0
    with pytest.raises(MixoffError, match=MERGE):
        wrapped.load_adapter(experts, "second")
    assert mixoff.restore(wrapped) is wrapped
    assert torch.equal(logits(wrapped), adapted)
    wrapped.load_adapter(experts, "second")


def test_a_peft_model_with_experts_is_offloaded_once_it_is_merged(peft, folder, tmp_path):
    experts, changed = adapter(peft, folder, tmp_path / "b", target_parameters=["experts.down_proj"])
    wrapped = peft.PeftModel.from_pretrained(resident(folder), experts).eval()
    for model in (wrapped, wrapped.get_base_model()):
        with pytest.raises(MixoffError, match=MERGE):
            mixoff.offload(model, "1MB")
    assert torch.equal(logits(wrapped), changed)
    merged = wrapped.merge_and_unload()
    expected = logits(merged)
    assert torch.equal(logits(mixoff.offload(merged, "1MB")), expected)


# --- models dropped without a word -----------------------------------------------------------------------------------

DROPPED = {
    "load": lambda folder, at: mixoff.load(folder, "1MB"),
    "a RAM tier": lambda folder, at: mixoff.load(folder, "1MB", ram_bytes="1MB", io="buffered"),
    "offload": lambda folder, at: mixoff.offload(resident(folder), "1MB"),
    "offload to a folder": lambda folder, at: mixoff.offload(resident(folder), "1MB", folder=at),
}


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux lists what a process has open")
@pytest.mark.parametrize("kind", DROPPED)
def test_a_model_that_is_dropped_leaves_nothing(folder, tmp_path, kind):
    """Descriptors, threads, temporary files and memory go with it, whether or not it was closed."""

    def after(times):
        for _ in range(times):
            logits(DROPPED[kind](folder, tmp_path))
        gc.collect()
        tensors = sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects())
        return len(os.listdir("/proc/self/fd")), threading.active_count(), tensors

    before = after(2)
    assert after(20) == before
    assert not list(tmp_path.iterdir())
