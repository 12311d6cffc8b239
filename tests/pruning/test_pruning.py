"""Pruned stores: the same to the byte if nothing leaves, and otherwise what transformers computes with the rest."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

import mixoff
from mixoff import CheckpointError, MixoffError
from mixoff.commands.cli import main
from mixoff.export.run import export
from mixoff.pruning import choose, merge
from mixoff.pruning.routers import Narrowed
from mixoff.shapes.config import expert_modules
from mixoff.text import calibration as text
from tiny import BUNDLED, FAMILIES, config_of, decode, resident, save_random

pytestmark = pytest.mark.filterwarnings("ignore:all experts .* stay in memory")
IDS = torch.arange(5, 14)[None]
REFUSED = {"deepseek_v3": "groups of equal size", "ernie4_5_moe": "is not one row per expert"}
KEPT = [1, 2, 3]
WIDE = {"hidden_size": 64, "intermediate_size": 64}


def files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def stores(tmp_path_factory):
    """Stores of one random Mixtral by scheme: 16 bits, and experts and attention in 4."""
    folder = tmp_path_factory.mktemp("pruning")
    torch.manual_seed(0)
    config = config_of("mixtral")
    config.update(WIDE)
    AutoModelForCausalLM.from_config(config).bfloat16().save_pretrained(folder / "plain")
    return {scheme: mixoff.convert(folder / "plain", folder / scheme, scheme) for scheme in ("none", "quality")}


@pytest.fixture(scope="module")
def bundled(tmp_path_factory):
    return mixoff.convert(BUNDLED, tmp_path_factory.mktemp("bundled") / "store")


@pytest.fixture
def any_text(monkeypatch):
    """A text for random models, which have no tokenizer."""
    ids = torch.randint(3, 128, (2, 20), generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr(text, "read", lambda *arguments: text.Calibration(ids, ""))


# --- what stays ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", ["none", "quality"])
def test_keeping_all_is_the_same_to_the_byte(stores, tmp_path, scheme):
    mixoff.prune(stores[scheme], tmp_path / "by", 4, by="counts")
    mixoff.prune(stores[scheme], tmp_path / "lists", by=[range(4)] * 3, merge=True)
    assert files(tmp_path / "by") == files(tmp_path / "lists") == files(stores[scheme])


@pytest.mark.parametrize("family", [name for name in FAMILIES if name not in REFUSED])
def test_the_rest_computes_what_transformers_does(family, tmp_path):
    """The oracle loses the same experts and rows of its routers in memory. Logits agree bit for bit.

    Both get weights that torch allocated: last bits of a product can depend on where a mapped file's tensor begins.
    """
    plain = save_random(tmp_path / "plain", family)
    store = mixoff.convert(plain, tmp_path / "store")
    sites = len(expert_modules(AutoModelForCausalLM.from_pretrained(plain)))
    kept = [0, 2, 3, 5, 6] if family != "mixtral" else KEPT
    pruned = mixoff.prune(store, tmp_path / "pruned", by=[kept] * sites)
    want = allocated(cut(resident(plain), kept))
    with mixoff.load(pruned, "1GiB") as model:
        logits = decode(allocated(model), IDS)[1]
    assert torch.equal(logits, decode(want, IDS)[1])
    checked = mixoff.verify(pruned, full=True)
    assert checked["experts"] == len(kept) * sites
    assert json.loads((pruned / "mixoff.json").read_text())["pruned"]["kept"] == [kept] * sites


def allocated(model):
    for p in model.parameters():
        p.data = p.data.clone()
    return model


def cut(model, kept):
    """The model with these experts of each layer alone."""
    for name, experts in expert_modules(model).items():
        block = model.get_submodule(name.rpartition(".")[0])
        router = getattr(block, "gate", None) or block.router
        for module in (experts, router):
            for key, w in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
                new = w.data[kept].clone()
                setattr(module, key, torch.nn.Parameter(new) if isinstance(w, torch.nn.Parameter) else new)
            module.num_experts = len(kept)
        if hasattr(block, "num_experts"):
            block.num_experts = len(kept)
        if hasattr(block, "n_routed_experts"):
            block.n_routed_experts = len(kept)
    return model


def test_a_quantized_expert_keeps_its_codes(stores, tmp_path):
    """Without a second rounding: each image is the one that it was, under another number."""
    from mixoff.store.source import open_source

    def images(store):
        source = open_source(store)
        found = {}
        for i, site in enumerate(source.sites):
            for e in range(site.num_experts):
                raw = bytearray(site.expert_nbytes)
                source.reader.read_into(i, e, memoryview(raw))
                found[i, e] = bytes(raw)
        source.close()
        return found

    before = images(stores["quality"])
    after = images(mixoff.prune(stores["quality"], tmp_path / "pruned", by=[[3, 1]] * 3))
    assert after == {(i, new): before[i, old] for i in range(3) for new, old in enumerate((1, 3))}


def test_a_pruned_store_is_a_store_like_any_other(stores, tmp_path, any_text):
    """It plans, runs with little memory as with much, exports, and is pruned again."""
    pruned = mixoff.prune(stores["quality"], tmp_path / "pruned", 3, by="counts")
    assert mixoff.plan(pruned, "1GiB").to_dict()["experts_per_layer"] == 3
    with mixoff.load(pruned, "1GiB") as model:
        want = decode(model, IDS)[1]
        size = model.mixoff.arena.slot_nbytes
        reserved = model.mixoff.allocated_nbytes - len(model.mixoff.arena.slots) * size
    with mixoff.load(pruned, 6 * size + reserved, prefetch="none") as model:
        assert torch.equal(decode(model, IDS)[1], want) and model.mixoff.slots == 6
    export(pruned, tmp_path / "hf", "hf")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "hf").config.num_local_experts == 3
    again = mixoff.prune(pruned, tmp_path / "again", 2, by="counts")
    assert json.loads((again / "config.json").read_text())["num_local_experts"] == 2


# --- which stay ------------------------------------------------------------------------------------------------------


def test_counts_and_losses_choose_as_brute_force_does(bundled, monkeypatch):
    """Counts against a recorded trace; the first layer's losses against models that lost one expert in memory."""
    ids = torch.arange(40, 104)[None]
    with mixoff.load(bundled, "1GiB") as model:
        with model.mixoff.trace() as recorder, torch.no_grad():
            model(ids, use_cache=False)
        counted = torch.as_tensor(recorder.trace.counts())
        assert torch.equal(choose.counts(model, ids), counted)
        kept = choose.by_counts(model, ids, 3)
        for site, row in zip(kept, counted, strict=True):
            assert min(row[list(site)]) >= max(row[[e for e in range(8) if e not in site]])
        monkeypatch.setattr(choose, "ROUNDS", 1)
        narrowed, without = Narrowed(model), []
        with narrowed:
            for e in range(8):
                narrowed.keep(0, [other for other in range(8) if other != e])
                without.append(choose.loss(model, ids))
        assert model.mixoff.reroute is None
        before = choose.loss(model, ids)
    for e in (0, 5):
        oracle = resident(BUNDLED)
        cut_first(oracle, [other for other in range(8) if other != e])
        assert choose.loss(oracle, ids) == pytest.approx(without[e], rel=1e-6)
    assert choose.loss(resident(BUNDLED), ids) == pytest.approx(before, rel=1e-6)


def cut_first(model, kept):
    block = model.model.layers[0].mlp
    for module, keys in ((block.experts, ("gate_up_proj", "down_proj")), (block.gate, ("weight",))):
        for key in keys:
            setattr(module, key, torch.nn.Parameter(getattr(module, key).data[kept]))
        module.num_experts = len(kept)


def test_by_loss_is_greedy_and_told_of_each_pass(bundled):
    """The first to leave is the one whose absence costs least; the passes are those that were announced."""
    ids, told = torch.arange(40, 72)[None], []
    with mixoff.load(bundled, "1GiB") as model:
        with Narrowed(model) as narrowed:
            costs = []
            for e in range(8):
                narrowed.keep(0, [other for other in range(8) if other != e])
                costs.append(choose.loss(model, ids))
        kept = choose.by_loss(model, ids, 7, told.append)
    assert set(range(8)) - set(kept[0]) == {min(range(8), key=costs.__getitem__)}
    assert len(told) == choose.passes(8, 8, 7) == 64 and {len(site) for site in kept} == {7}


# --- merging ---------------------------------------------------------------------------------------------------------


def test_an_expert_whose_neurons_are_shuffled_merges_into_itself():
    torch.manual_seed(0)
    gate_up, down = torch.randn(12, 5), torch.randn(5, 6)
    order = torch.randperm(6)
    shuffled = torch.cat([gate_up[:6][order], gate_up[6:][order]]), down[:, order]
    back = merge.in_order_of((gate_up, down), shuffled)
    assert torch.equal(back[0], gate_up) and torch.equal(back[1], down)


def test_merging_twins_changes_nothing(tmp_path, any_text):
    """Two experts that are the same: any weighted average of them is each of them."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config_of("mixtral"))
    for layer in model.model.layers:
        for w in (layer.mlp.experts.gate_up_proj, layer.mlp.experts.down_proj, layer.mlp.gate.weight):
            w.data[3] = w.data[2]
    model.save_pretrained(tmp_path / "plain")
    store = mixoff.convert(tmp_path / "plain", tmp_path / "store")
    merged = mixoff.prune(store, tmp_path / "merged", by=[[0, 1, 2]] * 3, merge=True)
    dropped = mixoff.prune(store, tmp_path / "dropped", by=[[0, 1, 2]] * 3)
    with mixoff.load(merged, "1GiB") as a, mixoff.load(dropped, "1GiB") as b, torch.no_grad():
        assert (a(IDS).logits - b(IDS).logits).abs().max() < 1e-5


def test_a_merged_expert_is_the_average_of_its_group(bundled, tmp_path):
    """Read back from the store: the weighted mean of its group, put in order, with shares from the counts."""
    kept = [[e for e in range(8) if e != 5]] * 8
    merged = mixoff.prune(bundled, tmp_path / "merged", by=kept, merge=True, tokens=1280)
    before, after = resident(BUNDLED), tmp_path / "hf"
    export(merged, after, "hf")
    with mixoff.load(bundled, "1GiB") as model:
        counts = choose.counts(model, text.read("default", bundled, 1280).ids)
    got = resident(after)
    for i in (0, 7):
        old, new = before.model.layers[i].mlp, got.model.layers[i].mlp
        group = next(g for g in merge.groups(old.gate.weight, kept[i]) if 5 in g)
        share = float((counts[i, 5] + 1) / (counts[i, group].sum() + 2))
        weights = [(old.experts.gate_up_proj[e], old.experts.down_proj[e]) for e in group]
        turned = merge.in_order_of(*weights)
        at = kept[i].index(group[0])
        for ours, first, other in zip(
            (new.experts.gate_up_proj[at], new.experts.down_proj[at]), weights[0], turned, strict=True
        ):
            assert (ours - ((1 - share) * first + share * other)).abs().max() < 1e-3 < (ours - first).abs().max()
        untouched = [(n, e) for n, e in enumerate(kept[i]) if n != at]
        assert all(torch.equal(new.experts.down_proj[n], old.experts.down_proj[e]) for n, e in untouched)


# --- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", REFUSED)
def test_families_that_cannot_lose_a_row_are_refused(family, tmp_path):
    store = mixoff.convert(save_random(tmp_path / "plain", family), tmp_path / "store")
    with pytest.raises(CheckpointError, match=REFUSED[family]):
        mixoff.prune(store, tmp_path / "out", 4, by="counts")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"keep": 1}, "each token uses 2, and there are 4"),
        ({"keep": 5}, "give a number from 2 to 4"),
        ({"keep": None}, "cannot keep None"),
        ({"keep": 2.0}, "cannot keep 2.0"),
        ({"keep": 3, "by": "los"}, "did you mean 'loss'?"),
        ({"by": [[0, 1]] * 2}, "give each of 3 layers a list"),
        ({"by": [[0, 1], [0, 1], [0, 1, 2]]}, "all of one length"),
        ({"by": [[0, 0]] * 3}, "none twice"),
        ({"by": [[0, 4]] * 3}, "there is no expert 4"),
        ({"by": [[0]] * 3}, "each token uses 2"),
        ({"keep": 3, "by": [[0, 1]] * 3}, "leave keep out"),
    ],
)
def test_bad_arguments_name_the_way_out(stores, tmp_path, arguments, message):
    with pytest.raises(MixoffError, match=message.replace("?", "[?]")):
        mixoff.prune(stores["none"], tmp_path / "out", **arguments)
    assert not list(tmp_path.iterdir())


def test_a_checkpoint_is_converted_first(tmp_path):
    with pytest.raises(CheckpointError, match="mixoff convert tiny-mixtral STORE"):
        mixoff.prune("tiny-mixtral", tmp_path / "out", 4)


def test_experts_of_another_form_are_not_merged(tmp_path):
    store = mixoff.convert(save_random(tmp_path / "plain", "gpt_oss"), tmp_path / "store")
    with pytest.raises(CheckpointError, match="prune without merging"):
        mixoff.prune(store, tmp_path / "out", 4, by="counts", merge=True)


# --- the command -----------------------------------------------------------------------------------------------------


def test_the_command_prunes(bundled, tmp_path, capsys):
    given = ["prune", str(bundled), str(tmp_path / "out"), "--keep", "5", "--by", "counts", "--tokens", "1280"]
    assert main([*given, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["nbytes"] < 0.8 * report["source_nbytes"] and report["target"].endswith("out")
    assert main(given) == 2 and "already exists" in capsys.readouterr().err
    assert main(["prune", str(bundled), str(tmp_path / "x"), "--keep", "5", "--by", "count"]) == 2
    assert "did you mean 'counts'?" in capsys.readouterr().err
