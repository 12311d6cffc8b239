"""Plans: parameters to the digit, bytes as the converted store and the loaded model have them, and what is advised."""

import contextlib
import json
from dataclasses import replace
from html.parser import HTMLParser

import pytest
import torch
import transformers
from transformers import AutoConfig, MixtralConfig

import mixoff
import tiny
from mixoff import BudgetError, CheckpointError, MixoffError
from mixoff.checkpoints.checkpoint import read_header
from mixoff.commands import cli
from mixoff.planning import hardware, probe
from mixoff.planning.needs import Needs
from mixoff.quantize.scheme import Precision, Scheme
from mixoff.shapes import known, kv_cache, sizes
from mixoff.shapes.kv_cache import advance
from mixoff.shapes.shape import PARTS, from_config
from mixoff.shapes.sites import stride
from mixoff.store import describe
from mixoff.store.manifest import MANIFEST

GIB = 2**30
MIXTRAL = "mistralai/Mixtral-8x7B-Instruct-v0.1"
CPU = replace(probe.named("laptop"), fast_bytes=1 << 30, reserved_nbytes=0)

# ---------------------------------------------------------------- parameters

# total and active parameters in billions, experts a layer, top-k, MoE layers, one expert in millions: as published
KNOWN = {
    MIXTRAL: ("46.703", "12.88", 8, 2, 32, "176.16"),
    "mistralai/Mixtral-8x22B-Instruct-v0.1": ("140.630", "39.16", 8, 2, 56, "301.99"),
    "microsoft/Phi-3.5-MoE-instruct": ("41.873", "6.64", 16, 2, 32, "78.64"),
    "allenai/OLMoE-1B-7B-0924": ("6.919", "1.28", 64, 8, 16, "6.29"),
    "Qwen/Qwen3-30B-A3B": ("30.532", "3.35", 128, 8, 48, "4.72"),
    "openai/gpt-oss-20b": ("20.915", "4.19", 32, 4, 24, "24.89"),
    "deepseek-ai/DeepSeek-V2-Lite": ("15.706", "2.66", 64, 6, 26, "8.65"),
    "ibm-granite/granite-3.1-1b-a400m-instruct": ("1.335", "0.43", 32, 8, 24, "1.57"),
    # without the layers that predict further tokens and without vision, which mixoff does not load
    "openai/gpt-oss-120b": ("116.829", "5.71", 128, 4, 36, "24.89"),
    "Qwen/Qwen3-Coder-30B-A3B-Instruct": ("30.532", "3.35", 128, 8, 48, "4.72"),
    "Qwen/Qwen3-Next-80B-A3B-Instruct": ("79.674", "3.87", 512, 10, 48, "3.15"),
    "Qwen/Qwen3.6-35B-A3B": ("34.661", "3.45", 256, 8, 40, "3.15"),
    "zai-org/GLM-4.5-Air": ("106.852", "13.42", 128, 8, 45, "17.30"),
    "zai-org/GLM-4.7-Flash": ("29.943", "3.90", 64, 4, 46, "9.44"),
    "google/gemma-4-26B-A4B-it": ("25.233", "3.82", 128, 8, 30, "5.95"),
}


@pytest.fixture(scope="module")
def mixtral():
    """The shape of Mixtral-8x7B."""
    return describe.shape_of(MIXTRAL)


@pytest.mark.parametrize("name", known.PRESETS)
def test_well_known_models_have_the_published_parameters(name):
    shape = describe.shape_of(name)
    assert shape.refusal is None and shape.total == sum(shape.parameters.values())
    if name in KNOWN:
        one = shape.parameters["experts"] / sum(site.num_experts for site in shape.sites)
        found = f"{shape.total / 1e9:.3f}", f"{shape.active / 1e9:.2f}", shape.sites[0].num_experts, shape.top_k[0]
        assert (*found, len(shape.sites), f"{one / 1e6:.2f}") == KNOWN[name]


def test_mixtral_by_part_to_the_digit(mixtral):
    assert (mixtral.total, mixtral.active) == (46_702_792_704, 12_879_925_248)
    assert mixtral.parameters == {
        "experts": 45_097_156_608, "attention": 1_342_177_280, "embeddings": 262_144_000, "router": 1_048_576,
        "norms": 266_240, "shared": 0, "other": 0,
    }  # fmt: skip
    assert mixtral.kv_nbytes(1) == 131_072
    assert mixtral.kv_nbytes(4096, batch=3) == 3 * 4096 * 131_072


def test_tied_weights_count_once():
    untied = from_config(replace_config(tie_word_embeddings=False), "untied")
    tied = from_config(replace_config(tie_word_embeddings=True), "tied")
    assert untied.total - tied.total == 128 * 64 and sizes.sizes_of(tied, "none").tied


def replace_config(**own):
    return MixtralConfig(**tiny.SHAPE | tiny.LOCAL | own)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_parts_of_every_family_add_up(family):
    """The oracle is the model itself, and what transformers marks as experts."""
    shape = from_config(tiny.config_of(family), family)
    model = transformers.AutoModelForCausalLM.from_config(tiny.config_of(family))
    assert shape.total == sum(p.numel() for p in model.parameters())
    experts = [m for m in model.modules() if hasattr(m, "_apply_gate") or type(m).__name__.endswith("Experts")]
    assert shape.parameters["experts"] == sum(p.numel() for m in experts for p in m.parameters(recurse=False)) > 0
    assert all(shape.parameters[part] > 0 for part in ("attention", "embeddings", "router", "norms"))
    assert shape.top_k == (model.config.get_text_config().num_experts_per_tok,) * len(shape.sites)


@pytest.mark.parametrize("name", ["llama4_text", "jetmoe", "glm4_moe_lite", "qwen3_next", "zaya"])
def test_families_beyond_the_tested_ones_are_planned(name):
    """Served or not: what transformers can build has parameters by part and bytes, and a reason where it is refused."""
    config = AutoConfig.for_model(name, num_hidden_layers=4)
    config.layer_types = config.layer_types[:4] if getattr(config, "layer_types", None) else None
    plan = mixoff.plan(config, hardware="h100")
    assert plan.parameters["experts"] > 0.5 * plan.parameters["total"] - plan.parameters["embeddings"]
    assert plan.bytes["experts"] > 0 and plan.tiers["fast"] > 0
    assert (plan.slots_per_layer == 0) == any("cannot offload" in line for line in plan.advice)


# ---------------------------------------------------------------- the KV cache


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3", "gpt_oss", "jamba", "qwen3_moe", "minimax", "nemotron_h"])
@pytest.mark.parametrize("context", [5, 24])
def test_the_kv_cache_is_what_transformers_allocates(family, context):
    """With grouped queries, compressed keys (MLA), sliding windows, and layers that keep a state instead."""
    config = tiny.config_of(family)
    if family == "gpt_oss":
        config.sliding_window = 8
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        _, cache = advance(model, torch.ones(2, context, dtype=torch.long))
    shape = from_config(config, family, "float32")
    scalars = 16 * len(cache.layers)  # counters of tokens, the same for any batch
    assert abs(shape.kv_nbytes(context, 2) - sum(t.nbytes for t, _ in kv_cache._tensors(cache, None, set()))) <= scalars


def test_a_sliding_window_bounds_the_cache():
    window = from_config(replace_config(sliding_window=64), "window")
    whole = from_config(replace_config(sliding_window=None), "whole")
    assert window.kv_nbytes(64_000) == window.kv_nbytes(63)
    assert whole.kv_nbytes(64_000) == 64_000 * whole.kv_nbytes(1)


# ---------------------------------------------------------------- bytes of stores

NARROW = {  # widths of the tiny families that no group of a preset divides get groups of 16
    name: Scheme(attention=Precision(4, 16), experts=Precision(bits, 16), shared_experts=Precision(4, 16))
    for name, bits in {"mixed": 2, "quality": 4}.items()
} | {"none": Scheme()}


def tensor_nbytes(store):
    """Bytes of all tensors of a store: ranges of experts, padding included, and what safetensors files hold."""
    manifest = json.loads((store / MANIFEST).read_text())
    experts = sum((store / site["file"]).stat().st_size for site in manifest["sites"])
    files = store.glob("*.safetensors")
    return experts, sum(t.nbytes for file in files for t in read_header(file).values())


@pytest.mark.parametrize(
    ("family", "scheme"),
    [*((family, "mixed") for family in tiny.FAMILIES), *((family, "none") for family in tiny.VARIED)]
    + [("mixtral", "quality"), ("ernie4_5_moe", "none"), ("glm4_moe", "none")],
)
@pytest.mark.filterwarnings("ignore")
def test_planned_bytes_are_the_stores(family, scheme, tmp_path):
    tiny.save_random(tmp_path / "model", family, torch.bfloat16)
    with contextlib.suppress(MixoffError):  # widths that no supported group divides: plan and conversion say the same
        store = mixoff.convert(tmp_path / "model", tmp_path / "store", NARROW[scheme])
        plan = mixoff.plan(tmp_path / "model", scheme=NARROW[scheme])
        experts, backbone = tensor_nbytes(store)
        assert plan.bytes["experts"] == experts
        assert plan.bytes["store"] == experts + backbone
        assert mixoff.plan(store).bytes == plan.bytes  # a store is planned in the scheme that it is in
        return
    with pytest.raises(MixoffError, match="does not divide"):
        mixoff.plan(tmp_path / "model", scheme=NARROW[scheme])


def test_most_families_are_converted_in_that_test():
    """Or it would pass by refusing all of them."""
    possible = 0
    for family in tiny.FAMILIES:
        with contextlib.suppress(MixoffError):
            possible += sizes.sizes_of(from_config(tiny.config_of(family), family), NARROW["mixed"]).stored > 0
    assert possible >= 12


def test_the_published_checkpoint_has_its_published_bytes():
    """18,240,378,024 bytes in files; our figure pads experts to pages and leaves 118,440 bytes of header out."""
    of = sizes.sizes_of(describe.shape_of(known.DEMO))
    padding = 256 * (stride(of.sites[0]) - 66_404_420)
    assert of.sites[0].expert_nbytes == 66_404_420  # the file's 66,406,180 less its header
    assert of.stored - padding == 18_240_378_024 - 256 * (66_406_180 - 66_404_420) - 118_440
    with pytest.raises(MixoffError, match="quantized already"):
        mixoff.plan(known.DEMO, scheme="mixed")


# ---------------------------------------------------------------- bytes of a loaded model


@pytest.mark.parametrize(("slots", "scheme"), [(1, None), (3, "mixed"), (8, None)])
def test_the_fast_tier_is_what_load_allocates(scheme, slots):
    """And the backbone's bytes are those of the loaded model's tensors."""
    machine = replace(CPU, fast_bytes=1 << 40)
    needs = Needs.of(sizes.sizes_of(describe.shape_of("tiny-mixtral"), scheme or "none"), machine, 512, 1)
    fast = needs.fixed + needs.experts_in_fast(slots)
    plan = mixoff.plan("tiny-mixtral", fast, context=512, scheme=scheme or "none", hardware=machine)
    assert (plan.slots_per_layer, plan.tiers["fast"], plan.resident) == (slots, fast, slots == 8)
    with mixoff.load("tiny-mixtral", plan.fast_bytes, scheme=scheme) as model:
        assert model.mixoff.slots == slots * 8
        assert model.mixoff.allocated_nbytes == plan.tiers["fast"] - needs.fixed
        assert loaded_nbytes(model) == plan.bytes["backbone"]


def test_slots_that_are_set_aside_for_guesses_are_planned(tmp_path):
    """Where the page cache cannot hold experts and fast tier, the runtime prefetches; here `io` makes it."""
    store = mixoff.convert("tiny-mixtral", tmp_path / "store", "none")
    machine = replace(CPU, fast_bytes=20_000_000)  # the experts alone have 14 MB
    plan = mixoff.plan(store, context=16, hardware=machine)
    fixed = sum(plan.bytes[name] for name in ("backbone", "kv_cache", "workspace"))
    with mixoff.load(store, plan.fast_bytes, io="direct") as model:
        runtime = model.mixoff
        assert len(runtime.guesses.spares) == 2 and not plan.resident
        assert runtime.slots // 8 == plan.slots_per_layer
        assert runtime.allocated_nbytes == plan.tiers["fast"] - fixed


def loaded_nbytes(model):
    """Bytes of all weights and buffers of the backbone, packed ones included, shared ones once."""
    plain = {id(t): t.nbytes for t in (*model.parameters(), *model.buffers())}
    packed = {id(q): q.nbytes for m in model.modules() if (q := getattr(m, "quantized", None)) is not None}
    return sum(plain.values()) + sum(packed.values())


def test_a_byte_less_is_a_slot_less():
    needs = Needs.of(sizes.sizes_of(describe.shape_of("tiny-mixtral"), "none"), CPU, 512, 1)
    fast = needs.fixed + needs.experts_in_fast(3)
    assert mixoff.plan("tiny-mixtral", fast - 1, context=512, scheme="none", hardware=CPU).slots_per_layer == 2


# ---------------------------------------------------------------- Mixtral on a T4


@pytest.fixture(scope="module")
def on_t4(mixtral):
    """Plans of Mixtral on a T4, by scheme."""
    plans = {name: mixoff.plan(mixtral, scheme=name, hardware="t4") for name in ("mixed", "quality", "small")}
    return plans | {"published": mixoff.plan(known.DEMO, hardware="t4")}


@pytest.mark.parametrize("scheme", ["mixed", "published"])
def test_two_bit_experts_lie_in_vram_and_ram(on_t4, scheme):
    plan = on_t4[scheme]
    assert plan.fits and not plan.resident and plan.tiers["disk"] == 0 < plan.tiers["ram"]
    assert plan.tiers["ram"] + hardware.PAGEABLE <= plan.hardware.ram_bytes == 11 * 10**9
    held = plan.tiers["fast"] - sum(plan.bytes[part] for part in ("backbone", "kv_cache", "workspace"))
    assert held + plan.tiers["ram"] >= plan.bytes["experts"], "VRAM and RAM together hold every expert"
    assert plan.tiers["fast"] <= 14.75 * GIB - plan.hardware.reserved_nbytes
    assert 5 <= plan.slots_per_layer < 8


def test_the_published_size_locks_what_the_card_lacks(on_t4):
    """4.6 GB do where 9.5 GiB were locked: the rest would be copies of what the card holds."""
    plan = on_t4["published"]
    held = plan.tiers["fast"] - sum(plan.bytes[part] for part in ("backbone", "kv_cache", "workspace"))
    assert plan.tiers["ram"] < 4.6e9 and plan.tiers["ram"] >= plan.bytes["experts"] - held


def test_four_bit_experts_need_the_disk(on_t4):
    plan = on_t4["quality"]
    assert plan.fits and plan.tiers["disk"] > 0 and plan.floors_ms["transfer"] > 10 * plan.floors_ms["memory"]
    assert any("of experts stay on disk" in line for line in plan.advice)


def test_small_fits_whole_and_is_not_offloaded(on_t4):
    plan = on_t4["small"]
    assert plan.resident and plan.slots_per_layer == 8 and plan.hit_rate == 1
    assert plan.advice[0].startswith("do not offload")
    assert on_t4["mixed"].advice[0].startswith("use --scheme small: everything then fits")
    assert f"{plan.bytes['store'] / GIB:.1f}" == "13.0"


def test_speed_is_a_band_between_floors_and_the_paper(on_t4):
    """Faster than the paper's 2.09 on the same card, slower than bytes and bandwidths allow."""
    plan = on_t4["published"]
    low, expected, high = (plan.tokens_per_s[name] for name in ("low", "expected", "high"))
    assert 2.09 < low < expected < high < 1000 / max(plan.floors_ms.values())
    no_cache = mixoff.plan(known.DEMO, hardware="t4", hit_rate=0.0)
    assert no_cache.floors_ms["transfer"] == pytest.approx(354, abs=0.5)  # 64 experts of 66.4 MB at 12 GB/s
    assert mixoff.plan(known.DEMO, hit_rate=0.6).floors_ms["transfer"] == pytest.approx(142, abs=0.5)


def row(name, plan):
    """A plan as a row of docs/plan.md."""
    gib = [f"{n / GIB:.1f}" if n else "0" for n in (plan.bytes["store"], plan.tiers["ram"], plan.tiers["disk"])]
    speeds = ", ".join(f"{plan.tokens_per_s[key]:.1f}" for key in ("low", "expected", "high"))
    floors = ", ".join(f"{plan.floors_ms[key]:.0f}" for key in ("memory", "transfer"))
    cells = gib[0], plan.slots_per_layer, *gib[1:], f"{plan.hit_rate:.2f}", speeds, floors
    return f"| {name} | {' | '.join(map(str, cells))} |"


def test_the_table_of_docs_is_what_the_command_says(on_t4, root):
    text = (root / "docs" / "plan.md").read_text(encoding="utf-8")
    names = {"published": "published checkpoint"}
    rows = [row(names.get(name, f"`{name}`"), plan) for name, plan in on_t4.items()]
    assert [made for made in rows if made not in text.splitlines()] == []


# ---------------------------------------------------------------- what does not fit


def test_each_way_out_works():
    """What is advised is tried, and then it fits."""
    config = replace_config(max_position_embeddings=1 << 20)
    machine = replace(CPU, fast_bytes=9 << 20)
    plan = mixoff.plan(config, context=65536, scheme="none", hardware=machine)
    assert not plan.fits and plan.slots_per_layer == 0 and plan.tokens_per_s["expected"] is None
    shorter = next(int(line.split()[2].rstrip(":")) for line in plan.advice if line.startswith("use --context"))
    more = next(int(line.split("(")[1].split()[0].replace(",", "")) for line in plan.advice if "raise --fast" in line)
    assert mixoff.plan(config, context=shorter, scheme="none", hardware=machine).fits
    assert not mixoff.plan(config, context=2 * shorter, scheme="none", hardware=machine).fits
    assert mixoff.plan(config, more, context=65536, scheme="none", hardware=machine).fits
    assert not mixoff.plan(config, more - 1, context=65536, scheme="none", hardware=machine).fits


def test_a_smaller_scheme_is_a_way_out(mixtral):
    plan = mixoff.plan(mixtral, "15GB", scheme="none", hardware="t4")
    assert not plan.fits
    name = next(line.split()[2].rstrip(":") for line in plan.advice if line.startswith("use --scheme"))
    assert mixoff.plan(mixtral, "15GB", scheme=name, hardware="t4").fits


def test_a_full_disk_is_said(mixtral):
    plan = mixoff.plan(mixtral, disk_bytes="10GB", hardware="t4")
    assert not plan.fits and plan.advice[0].startswith("free 5.45 GiB of disk")


@pytest.mark.parametrize(
    ("source", "how", "error", "words"),
    [
        (MIXTRAL, {"scheme": "tiny"}, MixoffError, "no scheme 'tiny': choose one of"),
        (MIXTRAL, {"hardware": "t5"}, MixoffError, "unknown hardware 't5': choose one of"),
        (MIXTRAL, {"context": 0}, MixoffError, "context is 0"),
        (MIXTRAL, {"batch": -1}, MixoffError, "batch -1"),
        (MIXTRAL, {"fast_bytes": "-1GB"}, BudgetError, "cannot read '-1GB' as a size"),
        (MIXTRAL, {"ram_bytes": -1}, BudgetError, "cannot use -1 as a size"),
        (MIXTRAL, {"hit_rate": 1.5}, MixoffError, "a share from 0 to 1"),
        ("nobody/nothing", {}, CheckpointError, "nobody/nothing is not built in"),
        ("no-such-folder", {}, CheckpointError, "no config.json in no-such-folder"),
        (transformers.LlamaConfig(num_hidden_layers=1), {}, CheckpointError, "has no experts"),
    ],
)
def test_what_cannot_be_planned_is_one_sentence(source, how, error, words):
    with pytest.raises(error, match=words) as caught:
        mixoff.plan(source, **how)
    assert "\n" not in str(caught.value)


# ---------------------------------------------------------------- how a plan shows itself


class Tags(HTMLParser):
    """Checks that tags are closed in order, and keeps texts."""

    def __init__(self, text):
        super().__init__()
        self.open, self.text = [], []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def test_a_plan_shows_itself(on_t4):
    plan = on_t4["mixed"]
    text, page = str(plan), plan._repr_html_()
    for words in ("14.2 GiB of 14.8 GiB", f"fast_bytes={plan.fast_bytes}", "(modelled)", "reported: TensorFlow #51951"):
        assert words in text
    cells = Tags(page).text
    assert "tokens/s" in cells and 'role="img" aria-label="Fast memory' in page and "color:" not in page
    assert repr(plan) == f"Plan({MIXTRAL}, mixed, t4: fits, {plan.slots_per_layer} slots)"


def test_the_bar_is_as_long_as_the_memory(on_t4):
    import re

    widths = [float(w) for w in re.findall(r"width:([\d.]+)%", on_t4["mixed"]._repr_html_())]
    assert len(widths) == 5 and 95 < sum(widths) <= 100.05


# ---------------------------------------------------------------- the command


def run(capsys, *words):
    code = cli.main(["plan", *words])
    return code, *capsys.readouterr()


def test_the_command_prints_json(capsys):
    code, out, err = run(capsys, "tiny-mixtral", "--json", "--context", "512", "--fast", "1GiB", "--ram", "1GB")
    plan = json.loads(out)
    assert (code, err) == (0, "")
    assert set(plan["parameters"]) == {"total", "active", *PARTS}
    assert set(plan["bytes"]) == {"experts", "backbone", "kv_cache", "workspace", "store"}
    assert set(plan["tiers"]) == {"fast", "ram", "disk"} and set(plan["tokens_per_s"]) == {"low", "expected", "high"}
    assert isinstance(plan["fits"], bool) and isinstance(plan["slots_per_layer"], int)
    assert isinstance(plan["fast_bytes"], int) and all(isinstance(line, str) for line in plan["advice"])
    files = [read_header(file) for file in sorted(tiny.BUNDLED.glob("*.safetensors"))]
    assert plan["parameters"]["total"] == sum(t.nbytes // 2 for tensors in files for t in tensors.values())


@pytest.mark.parametrize(
    "words",
    [["nobody/nothing"], ["tiny-mixtral", "--hardware", "t5"], ["tiny-mixtral", "--scheme", "x"],
     ["tiny-mixtral", "--fast=-3GB"], ["tiny-mixtral", "--context", "-1"]],
)  # fmt: skip
def test_what_is_wrong_is_one_line_and_code_2(capsys, words):
    code, out, err = run(capsys, *words, "--json")
    assert (code, out, err.count("\n")) == (2, "", 1) and err.startswith("mixoff: ")
