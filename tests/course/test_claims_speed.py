"""What chapters 05, 07 and 10 say of errors, overlap and speed, computed with the package."""

import math
import re
from dataclasses import replace

import numpy as np
import pytest
import torch

import mixoff
from claims import plain, words
from mixoff import quality
from mixoff.classroom import table2
from mixoff.planning import probe
from mixoff.planning.speed import predict
from mixoff.planning.steps import Step
from mixoff.quantize import Precision, Scheme, packed_nbytes, quantize
from mixoff.store import describe

MIXTRAL = "mistralai/Mixtral-8x7B-Instruct-v0.1"

# ---------------------------------------------------------------- chapter 05: mixed quantization


@pytest.fixture(scope="module")
def windows():
    """The bundled model, 10 windows of 64 tokens, and what the model predicts on them."""
    model, tokenizer = plain()
    over = quality.windows(tokenizer, mixoff.models.heldout(), count=2, length=64)
    return model, over, quality.predictions(model, over)


@pytest.fixture(scope="module")
def scores(windows):
    """By bits of attention and experts, groups as in the paper: scores, and MB of both."""
    model, over, reference = windows
    forms = {16: None, 4: Precision(4, 64), 3: Precision(3, 64), 2: Precision(2, 16)}
    found, MB = {}, {}
    for row in ((16, 16), (16, 4), (4, 16), (4, 4), (4, 3), (4, 2), (2, 4), (2, 2)):
        with quality.quantized(model, Scheme(attention=forms[row[0]], experts=forms[row[1]])) as sizes:
            found[row] = quality.measure(model, over, reference)
            MB[row] = sum(nbytes for nbytes, _ in sizes.values()) / 1e6
    return found, MB


def kl(score):
    return quality.estimate(score.kl).scaled(1000).mean


def test_05_experts_hold_the_bytes():
    """In parameters, from the model's tensors and from Mixtral's shape."""
    model, _ = plain()
    counts = dict.fromkeys(("experts", "self_attn"), 0)
    for name, tensor in model.named_parameters():
        for part in counts:
            counts[part] += tensor.numel() * (f".{part}." in name)
    shape = describe.shape_of(MIXTRAL)
    here = counts["experts"] / counts["self_attn"]
    mixtral = shape.parameters["experts"] / shape.parameters["attention"]
    assert (
        f"Experts are {here:.0f} times the bytes of attention in this model and {mixtral:.0f} times in Mixtral"
        in words("05")
    )


def test_05_three_bits_lose_less_than_half_of_two(scores):
    found, MB = scores
    assert kl(found[4, 3]) < kl(found[4, 2]) / 2 and MB[4, 3] / MB[4, 2] < 1.05


def test_05_attention_at_two_bits_saves_little_and_hurts_most(scores):
    found, MB = scores
    assert f"the last {MB[4, 2] - MB[2, 2]:.2f} MB" in words("05")
    assert kl(found[2, 2]) > 2 * kl(found[4, 2]) and kl(found[2, 4]) > kl(found[4, 2])
    assert MB[16, 16] - MB[4, 16] < (MB[16, 16] - MB[16, 4]) / 5 and kl(found[16, 4]) < kl(found[4, 16])


def test_05_pairing_makes_errors_smaller(windows, scores):
    """Of a difference of losses and of KL; the numbers of the chapter are those of its own windows."""
    model, over, reference = windows
    made = {}
    for solver in ("lsq", "hqq"):
        with quality.quantized(model, Scheme(experts=Precision(2, 32), solver=solver)):
            made[solver] = quality.measure(model, over, reference)
    together = quality.Comparison(made).difference("hqq", "lsq")
    for name in ("loss", "kl"):
        alone = math.hypot(*(quality.estimate(getattr(score, name)).error for score in made.values()))
        assert together[name].error < alone
    assert together["kl"].mean > 4 * together["kl"].error > 0
    unpaired, paired = (float(x) for x in re.search(r"± (\d+) millinats became ± (\d+) by", words("05")).groups())
    assert f"{unpaired / paired:.0f} times smaller" in words("05") and (unpaired / paired) ** 2 == pytest.approx(
        290, rel=0.1
    )
    gaps = re.findall(r"minus lsq's: ([\d.]+) ± ([\d.]+) millinats unpaired, ([\d.]+) ± ([\d.]+) paired", words("05"))
    assert len(gaps) == 2 and all(2.5 < float(a[1]) / float(a[3]) < 4 for a in gaps)


def test_05_the_smallest_error_of_weights_is_not_the_best_model():
    said = dict(re.findall(r"(lsq|hqq|plain) *: error of one weight matrix ([\d.]+)", words("05")))
    divergence = dict(re.findall(r"(lsq|hqq|plain) *: error of one weight matrix [\d.]+, KL (\d+)", words("05")))
    assert min(said, key=said.get) == "plain" and min(divergence, key=lambda n: int(divergence[n])) == "lsq"


def test_05_chance_and_the_size_of_the_paper():
    assert 1 / (0.5 * math.erfc(1 / math.sqrt(2))) == pytest.approx(6, abs=0.4)  # one error or more, by chance
    assert "one case of six" in words("05") and pytest.approx(1 / 5, abs=0.005) == 17.54 / 86.99
    steps = {"0.21": (70.51, 70.3), "0.64": (69.11, 68.47)}
    for said, (before, after) in steps.items():
        error = math.hypot(*(math.sqrt(p * (100 - p) / 14_000) for p in (before, after)))
        assert f"{before - after:.2f}" == said and before - after < 2 * error


def test_05_calibrated_bits_are_those_of_the_documentation(root):
    """The chapter shows what `benchmarks/calibration_table.py` measured; both must change together."""
    text = (root / "docs" / "quantization.md").read_text(encoding="utf-8")
    table = re.findall(r"\| ([\d.]+) \| ([\d.]+) ± ([\d.]+) \| [\d.]+ \| [\d ]+ \| [\d.]+ \|", text)
    rows = {(float(bits), float(mean), float(error)) for bits, mean, error in table}
    said = re.findall(r"(\d\.\d+): \(([\d.]+), ([\d.]+)\)[,}]", words("05").split("REPORTED")[0])
    assert len(said) >= 9 and {tuple(map(float, row)) for row in said} <= rows


# ---------------------------------------------------------------- chapter 07: overlap


def test_07_the_modelled_time_line_comes_first_and_each_way_is_faster():
    parts = {"layers": 3, "top_k": 4, "hit_rate": 0.5, "host_s": 0.0, "attention_s": 0.004, "expert_s": 0.003}
    parts["link_s"] = 0.005
    steps = Step(**parts, overlap=False), Step(**parts), Step(**parts, recall=0.85)
    serial, overlapped, guessed = (1000 * step.seconds(tokens=500) for step in steps)
    assert serial > overlapped + 5 and overlapped > guessed + 3
    said = f"takes {serial:.0f} ms on average, overlapped {overlapped:.0f}, with guesses {guessed:.0f} (modelled)"
    assert said in words("07")
    measured = re.search(r"\d copies begun when needed, +\d+ before", words("07"))
    assert words("07").index(said) < measured.start()


def test_07_with_two_experts_that_both_miss_overlap_alone_gains_nothing():
    parts = {"layers": 8, "top_k": 2, "hit_rate": 0.0, "host_s": 0.0, "attention_s": 0.001, "expert_s": 0.001}
    late, soon = (Step(**parts, link_s=0.003, overlap=overlap).seconds() for overlap in (False, True))
    assert late - soon <= 8 * 0.001 + 1e-9  # the first of two is computed while the second is on its way


def test_07_copies_back_would_leave_little_for_host_and_chip():
    reported_ms = 1000 / table2.TABLE_2["T4"][2]
    both_ways_ms = 2 * 64 * 66_406_180 / 12e6
    said = f"would take {both_ways_ms:.0f} of {reported_ms:.0f} ms, and host and chip would share the other"
    assert f"{said} {reported_ms - both_ways_ms:.0f}" in words("07")


# ---------------------------------------------------------------- chapter 10: roofline


def test_10_operations_per_byte_and_which_side_of_the_ridge():
    per_byte = {bits: 2 * 1024**2 / packed_nbytes((1024, 1024), bits, group) for bits, group in ((2, 32), (4, 64))}
    assert f"1.0 with 16 bits, {per_byte[4]:.1f} with 4 and {per_byte[2]:.1f} with 2" in words("10")


def test_10_the_kv_term_of_mixtral_on_a_t4():
    nbytes = describe.shape_of(MIXTRAL).kv_nbytes(32_768)
    ms = 1000 * nbytes / probe.named("t4").fast_Bps
    assert (
        f"it is {nbytes / 2**30:.0f} GiB at 32,768 tokens (chapter 02), which is {ms:.0f} ms per token on a T4"
        in words("10")
    )


def test_10_what_binds_and_what_a_faster_part_buys():
    """Of 4-bit Mixtral: fetches on a T4, and twice the memory helps more than twice the bandwidth."""
    t4 = mixoff.plan(MIXTRAL, scheme="quality", hardware="t4")
    terms = t4.predictions["expected"].terms
    total = sum(terms.values())
    assert (
        f"fetching takes {terms['fetches'] / total:.0%} on the t4" in words("10")
        and max(terms, key=terms.get) == "fetches"
    )
    assert f"fetches {total / (total - terms['fetches'] / 2):.2f} (modelled)" in words("10")
    machine = probe.named("t4")
    shape = describe.shape_of(MIXTRAL)
    before = predict(shape, "quality", machine, 0.5).seconds
    quicker = predict(shape, "quality", replace(machine, fast_Bps=2 * machine.fast_Bps), 0.5).seconds
    roomier = predict(shape, "quality", machine, 1.0).seconds
    assert roomier < before / 5 and quicker > 0.9 * before


@pytest.mark.parametrize("card", ["t4", "rtx-3060", "rtx-4090"])
def test_10_fewer_bits_help_twice(card):
    four = Precision(4, 64)
    speeds, slots = {}, {}
    for bits in (4, 2):
        scheme = Scheme(attention=four, shared_experts=four, experts=Precision(bits, 64))
        made = mixoff.plan(MIXTRAL, scheme=scheme, hardware=card)
        speeds[bits], slots[bits] = made.tokens_per_s["expected"], made.slots_per_layer
    assert f"{card} from {speeds[4]:.1f} to {speeds[2]:.1f}" in words("10")
    assert slots[2] > slots[4] or slots[4] == 8


def test_10_the_audit():
    shape = describe.shape_of(MIXTRAL)
    token, whole = (n * 144 / 256 for n in (shape.active, shape.total))
    assert f"It reads {100 * token / whole:.0f} % of the file, {token / 1e9:.1f} GB" in words("10")
    ram, nominal = 5 * token, 2 * 8 * 3200e6
    assert f"{ram / 1e9:.0f} GB/s is {100 * ram / nominal:.0f} % of the nominal {nominal / 1e9:.0f} GB/s" in words("10")
    card_s, ram_s = token * 28 / 32 / 936e9, token * 4 / 32 / 50e9
    assert f"the roof is {1 / (card_s + ram_s):.0f} tokens/s" in words("10")
    assert 24 * (card_s + ram_s) == pytest.approx(0.6, abs=0.01) and ram_s / (card_s + ram_s) == pytest.approx(
        0.73, abs=0.01
    )


def test_10_prediction_and_measurement_agree_in_the_stored_run():
    """Four points; on a machine that was not busy they lie within a quarter of the prediction."""
    busy = float(re.search(r"fastest over slowest: ([\d.]+) measured", words("10"))[1])
    pairs = re.findall(r"slots: hit rate [\d.]+ measured, ([\d.]+) ms measured; predicted ([\d.]+) ms", words("10"))
    errors = [abs(float(predicted) / float(found) - 1) for found, predicted in pairs]
    assert len(pairs) == 4 and (busy > 1.5 or max(errors) < 0.25)


def test_10_stretch_how_many_sequences_reach_the_ridge():
    ridge = 8.1e12 / 320e9
    assert f"8100 / 320 = {ridge:.1f} operations per byte" in words("10")
    assert f"so {math.ceil(ridge)}." in words("10") and f"about {math.ceil(4 * ridge)} sequences" in words("10")


# ---------------------------------------------------------------- chapters 02, 03, 04


@pytest.mark.parametrize(
    "model",
    [MIXTRAL, "Qwen/Qwen3-30B-A3B", "openai/gpt-oss-20b", "allenai/OLMoE-1B-7B-0924", "deepseek-ai/DeepSeek-V2-Lite"],
)
def test_02_routers_and_norms_are_less_than_a_thousandth(model):
    shape = describe.shape_of(model)
    assert (shape.parameters["router"] + shape.parameters["norms"]) / shape.total < 0.001


def test_02_shared_tables_and_the_bits_of_attention():
    granite = describe.shape_of("ibm-granite/granite-3.1-1b-a400m-instruct")
    table = granite.config.vocab_size * granite.config.hidden_size
    assert f"{100 * table / granite.total:.0f} % of all parameters" in words("02")
    mixtral = describe.shape_of(MIXTRAL)
    assert f"for Mixtral it would be {100 * 32_000 * 4096 / mixtral.total:.1f} %" in words("02")
    assert f"would save {mixtral.parameters['attention'] * 2 / 8 / 2**30:.1f} GiB" in words("02")


def test_03_error_of_whole_rows():
    said = {
        int(group): float(error)
        for group, error in re.findall(r"groups of +(\d+): relative error ([\d.]+)", words("03"))
    }
    assert f"the error rises by {100 * (said[192] / said[16] - 1):.0f} %" in words("03")


def test_04_four_bits_shrink_by_less_than_a_hundredth():
    w = torch.randn(64, 512, generator=torch.Generator().manual_seed(0))
    error = {}
    for bits in (2, 4):
        restored = quantize(w, bits, 32, "rtn").dequantize()
        error[bits] = ((w - restored).norm() / w.norm()).item()
    assert error[4] ** 2 < 0.01 and error[2] / error[4] == pytest.approx(4, abs=1.2)


def test_04_threshold_and_what_lies_above_it():
    assert f"errors below {10 ** (-1 / 1.3):.3f} are set to zero" in words("04")
    assert 1000 ** (-1 / 1.3) < 0.02 / 3  # with beta near 1000 the shrinkage acts on weights of sigma 0.02


# ---------------------------------------------------------------- chapters 00, 01, 08, 15


def test_00_and_01_sizes_and_nats():
    model, _ = plain()
    mixtral = describe.shape_of(MIXTRAL).total
    assert mixtral / sum(p.numel() for p in model.parameters()) == pytest.approx(5000, rel=0.1)
    assert "about 5000 times smaller" in words("00") and 1 - np.exp(-0.1) == pytest.approx(0.1, abs=0.01)


def test_08_what_the_optimum_saves():
    lru, optimum = (
        float(x) for x in re.search(r"LRU misses ([\d.]+) of the requests, the optimum ([\d.]+)", words("08")).groups()
    )
    assert f"would save {100 * (1 - optimum / lru):.0f} % of LRU's misses at 4 slots" in words("08")


def test_15_six_slots_need_nearly_all_of_a_t4():
    t4, model = probe.named("t4"), "lavawolfiee/Mixtral-8x7B-Instruct-v0.1-offloading-demo"
    slots = {
        free: mixoff.plan(model, hardware=replace(t4, fast_bytes=int(free * 2**30))).slots_per_layer
        for free in (14.75, 14.5)
    }
    assert slots == {14.75: 6, 14.5: 5} and "with 14.5 GiB free it would be five" in words("15")


def test_15_which_model_a_t4_would_take_today():
    """Qwen3-30B-A3B is truly offloaded and faster than Mixtral's plan; Mixtral-8x22B fits and is far too slow."""
    qwen = mixoff.plan("Qwen/Qwen3-30B-A3B", scheme="quality", hardware="t4")
    large = mixoff.plan("mistralai/Mixtral-8x22B-Instruct-v0.1", scheme="mixed", hardware="t4")
    assert not qwen.resident and qwen.fits and large.fits and large.slots_per_layer == 1
    assert large.tokens_per_s["expected"] < 0.1 and "more than ten seconds for each token" in words("15")
    assert f"{qwen.slots_per_layer} of {qwen.experts_per_layer}" in words("15")
    assert f"{18.24 / 0.05 / 60:.0f} minutes (modelled)" in words("15")
