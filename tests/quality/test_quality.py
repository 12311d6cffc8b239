"""Quality: estimates against plain arithmetic, comparisons, and the lossy knobs, none of which is ever on by itself."""

import json
import math
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM

import mixoff
from mixoff import MixoffError, models, quality
from mixoff.quality import Comparison, Estimate, Scores, Windows, estimate
from mixoff.quality.lossy import NOBODY, Shadow, heaviest, leave_out
from mixoff.quantize.scheme import Precision, Scheme
from mixoff.text.generation import load_tokenizer
from tiny import BUNDLED, budget, config_of, decode, resident

pytestmark = pytest.mark.filterwarnings("ignore:all experts .* stay in memory")
FOUR, TWO = Scheme(experts=Precision(4, 16)), Scheme(experts=Precision(2, 16))


@pytest.fixture(scope="module")
def random_model():
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config_of("qwen2_moe"), experts_implementation="grouped_mm").eval()


@pytest.fixture
def over():
    return Windows(torch.randint(3, 128, (2, 3, 20), generator=torch.Generator().manual_seed(1)), ("a", "b"))


# --- estimates -------------------------------------------------------------------------------------------------------


def test_scores_are_those_of_plain_arithmetic(random_model, over):
    """Loss, KL and agreement in fp64, token by token."""
    other = [torch.randn(20, 128).log_softmax(-1) for _ in range(6)]
    scores = quality.measure(random_model, over, other)
    for n, window in enumerate(over.ids.flatten(0, 1)):
        with torch.no_grad():
            p = random_model(window[None]).logits[0].double().softmax(-1)
        loss = [-math.log(p[t, window[t + 1]]) for t in range(19)]
        q = other[n].double().exp()
        kl = [float((q[t] * (q[t] / p[t]).log()).sum()) for t in range(20)]
        top1 = [float(q[t].argmax() == p[t].argmax()) for t in range(20)]
        for found, values in ((scores.loss, loss), (scores.kl, kl), (scores.top1, top1)):
            assert float(found.flatten()[n]) == pytest.approx(sum(values) / len(values), rel=1e-5, abs=1e-6)


def test_the_standard_error_covers_as_it_should():
    """95 % intervals of stratified normal data hold the truth in 95 % of 2000 trials; false alarm: 1 in 10,000.

    The error of a domain's mean comes from few windows; with 5 domains of 8 the intervals of +-1.96 cover 0.94.
    """
    generator = torch.Generator().manual_seed(0)
    truth = torch.tensor([0.0, 1.0, 5.0, -3.0, 2.0])
    trials = [
        estimate(torch.randn(5, 8, generator=generator, dtype=torch.float64) + truth[:, None]) for _ in range(2000)
    ]
    covered = sum(abs(x.mean - 1.0) < 1.96 * x.error for x in trials) / 2000
    assert 0.92 < covered < 0.965


def test_perplexity_is_the_same_whatever_form_the_text_has():
    tokenizer, model, texts = load_tokenizer(BUNDLED), resident(BUNDLED), models.heldout()
    named = quality.perplexity(model, tokenizer, texts, count=2, length=64)
    over = quality.windows(tokenizer, list(texts.values()), 2, 64)
    assert over.ids.shape == (5, 2, 64) and quality.windows(tokenizer, texts, 2, 64).domains[0] == next(iter(texts))
    assert named == quality.perplexity(model, over.ids) == quality.measure(model, over).perplexity
    assert 10 < named.mean < 80 and 0 < named.error < named.mean
    one = quality.perplexity(model, tokenizer, texts["novel"], count=3, length=64)
    assert one == quality.perplexity(model, quality.windows(tokenizer, [texts["novel"]], 3, 64).ids[0])


def test_a_model_compared_with_itself_is_no_different(random_model, over):
    compared = quality.compare({"a": random_model, "b": lambda: random_model}, over.ids)
    figures = compared.to_dict()["b"]
    assert figures["ratio"] == {"mean": 1.0, "error": 0.0} and figures["top1"] == {"mean": 1.0, "error": 0.0}
    assert abs(figures["kl"]["mean"]) < 1e-6
    assert compared.difference("b")["loss"] == Estimate(0.0, 0.0) and compared.base == "a"


def test_differences_are_paired():
    """Two models that differ by a constant have no error in their difference, however wide the losses are."""
    loss = torch.randn(4, 6, dtype=torch.float64) * 10
    zero = torch.zeros_like(loss)
    compared = Comparison({"a": Scores(loss, zero, zero), "b": Scores(loss + 0.5, zero + 0.2, zero)})
    more = compared.difference("b")
    assert more["loss"].mean == pytest.approx(0.5) and more["loss"].error < 1e-9
    assert more["kl"].mean == pytest.approx(0.2) and compared.scores["a"].perplexity.error > 0
    assert compared.difference("a", "b")["loss"].mean == pytest.approx(-0.5)


def test_comparisons_show_themselves(random_model, over):
    with quality.quantized(random_model, FOUR):
        worse = quality.measure(random_model, over, quality.predictions(random_model, over))
    compared = Comparison({"base": worse, "x<y": worse}, {"bits": {"x<y": "4.5"}})
    assert "x&lt;y" in compared._repr_html_() and "<th>KL, millinats</th>" in compared._repr_html_()
    assert str(compared).splitlines()[0].split()[:2] == ["bits", "perplexity"] and "1.0000 ± 0.0000" in str(compared)
    assert compared.markdown().count("\n") == 3 and "| x<y | 4.5 |" in compared.markdown()
    assert json.loads(json.dumps(compared.to_dict()))["x<y"]["bits"] == "4.5"
    again = Scores.from_dict(json.loads(json.dumps(worse.to_dict())))
    assert torch.equal(again.loss, worse.loss) and again.domains == worse.domains and "2 domains" in repr(again)
    assert "perplexity" in str(Comparison({"alone": Scores(worse.loss)}))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda t: quality.windows(t, "too short"), "tokens, and 8 windows"),
        (lambda t: quality.windows(t, {}), "needs at least one text"),
        (lambda t: quality.windows(t, "x", count=1), "raise count to 2"),
        (lambda t: quality.as_windows(t), "give them too"),
        (lambda t: quality.as_windows(torch.zeros(1, 5, dtype=int)), "give .windows, tokens"),
        (lambda t: quality.as_windows(torch.zeros(5, dtype=int)), "give .windows, tokens"),
        (lambda t: quality.dynamic_top_k(1.5), "from 0 to 1"),
        (lambda t: quality.skip_light(-0.1), "from 0 to 1"),
        (lambda t: quality.prune([[1, 2, 3]], 0), "cannot keep 0"),
        (lambda t: quality.prune([1, 2, 3], 1), "give counts .L, E"),
        (lambda t: quality.skip_misses(Shadow(2), -1), "keep is -1"),
        (lambda t: quality.substitute_misses(Shadow(2), torch.zeros(2, 3, 4)), "give a likeness of all pairs"),
        (lambda t: quality.substitute_misses(Shadow(2), torch.zeros(2, 3, 3), 1.5), "from 0 to 1"),
    ],
)
def test_bad_arguments_name_the_way_out(call, message):
    with pytest.raises(MixoffError, match=message):
        call(load_tokenizer(BUNDLED))


def test_a_reference_too_large_is_refused(random_model, over, monkeypatch):
    monkeypatch.setattr(quality.scores, "MOST_NBYTES", 1000)
    with pytest.raises(MixoffError, match="fewer or shorter windows"):
        quality.predictions(random_model, over)


# --- quantization without a store ------------------------------------------------------------------------------------


@torch.no_grad()
def test_quantized_weights_are_those_of_a_store_and_come_back(tmp_path, over):
    """Products of a store's kernels differ in the last bits from those of dequantized weights, and no more."""
    scheme, ids = Scheme(experts=Precision(4, 16), attention=Precision(4, 16)), over.ids[0]
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config_of("gpt_oss"), experts_implementation="grouped_mm").eval()
    model.save_pretrained(tmp_path / "model")
    weights = {n: p.clone() for n, p in model.named_parameters()}
    with mixoff.load(mixoff.convert(tmp_path / "model", tmp_path / "store", scheme), "1GiB", exact=True) as stored:
        want = stored(ids).logits
    before = model(ids).logits
    with quality.quantized(model, scheme) as sizes:
        got = model(ids).logits
    assert (got - want).abs().max() < 1e-5 < 0.01 < (got - before).abs().max()
    assert sizes["experts"][0] < sizes["experts"][1] and set(sizes) == {"experts", "attention", "head", "embeddings"}
    assert all(torch.equal(p, weights[n]) for n, p in model.named_parameters())


def test_weights_come_back_after_an_error(random_model):
    before = {n: p.clone() for n, p in random_model.named_parameters()}
    with pytest.raises(KeyboardInterrupt), quality.quantized(random_model, FOUR), quality.with_twins(random_model, TWO):
        raise KeyboardInterrupt
    assert all(torch.equal(p, before[n]) for n, p in random_model.named_parameters())
    assert {m.num_experts for m in mixoff.shapes.config.expert_modules(random_model).values()} == {8}


# --- knobs -----------------------------------------------------------------------------------------------------------

INDEX = torch.tensor([[4, 2, 7], [0, 1, 2]])
WEIGHTS = torch.tensor([[0.2, 0.7, 0.1], [0.4, 0.3, 0.3]])


@pytest.mark.parametrize(
    ("knob", "left"),
    [
        (quality.dynamic_top_k(1.0), [[4, 2, 7], [0, 1, 2]]),
        (quality.dynamic_top_k(0.65), [[2], [0, 1]]),
        (quality.dynamic_top_k(0.75), [[4, 2], [0, 1, 2]]),
        (quality.dynamic_top_k(0.0), [[2], [0]]),
        (quality.skip_light(0.0), [[4, 2, 7], [0, 1, 2]]),
        (quality.skip_light(0.15), [[4, 2], [0, 1, 2]]),
        (quality.skip_light(0.35), [[2], [0]]),
        (quality.skip_light(1.0), [[2], [0]]),
        (quality.prune([[9, 0, 5, 0, 5, 0, 0, 5]], 4), [[4, 2, 7], [0, 2]]),
        (quality.prune([[9, 0, 0, 0, 0, 0, 0, 0]], 1), [[], [0]]),
        (quality.skip_misses(Shadow(2), keep=1), [[2], [0, 2]]),  # 2 stayed from the first token
        (quality.skip_misses(Shadow(2), keep=0), [[], []]),
        (quality.skip_misses(Shadow(2), keep=3), [[4, 2, 7], [0, 1, 2]]),
        (quality.skip_misses(Shadow(3), keep=2), [[4, 2], [0, 1, 2]]),
    ],
)
def test_what_each_knob_leaves(knob, left):
    """The experts that stay, in their places; their weights in old proportions sum up to what they did."""
    index, weights = knob(0, INDEX, WEIGHTS)
    assert index.shape == weights.shape == INDEX.shape and weights.dtype == WEIGHTS.dtype
    for t, experts in enumerate(left):
        kept = torch.tensor([e in experts for e in INDEX[t].tolist()])
        assert torch.equal(index[t], INDEX[t].where(kept, NOBODY)) and not weights[t][~kept].any()
        if experts:
            assert torch.allclose(weights[t][kept], WEIGHTS[t][kept] / WEIGHTS[t][kept].sum() * WEIGHTS[t].sum())


LIKE = torch.tensor([[abs(a - b) / -10 for b in range(8)] for a in range(8)])[None]  # neighbours are alike


@pytest.mark.parametrize(
    ("share", "held", "row"),
    [
        (0.0, [4, 2, 7], [0, 1, 2]),
        (1.0, [4, 2, 7], [4, 7, 2]),  # the nearest, 2, is used by the token itself
        (0.35, [4, 2, 7], [0, 4, 2]),  # 0 weighs too much to be replaced
        (0.35, [2], [0, 1, 2]),  # 2 alone is there, and used
    ],
)
def test_what_substitution_takes_instead(share, held, row):
    """The most similar resident that the token does not use; nothing is replaced where there is none."""
    shadow = Shadow(4)
    shadow.ask(0, held)
    index, weights = quality.substitute_misses(shadow, LIKE, share)(0, INDEX[1:], WEIGHTS[1:])
    assert index.tolist() == [row] and torch.equal(weights, WEIGHTS[1:])


def test_leaving_out_keeps_weights_that_do_not_sum_to_one():
    index, weights = leave_out(INDEX, 2.5 * WEIGHTS, ~heaviest(WEIGHTS, 1))
    assert torch.allclose(weights.sum(-1), torch.tensor([2.5, 2.5])) and (index == NOBODY).sum() == 4


def test_a_shadow_counts_what_the_simulator_counts():
    experts = torch.rand(200, 8, generator=torch.Generator().manual_seed(0)).topk(2).indices  # (T, K)
    trace, shadow = mixoff.Trace.from_array(experts[:, None].numpy(), 8), Shadow(3)
    marked = quality.coarse_misses(shadow, 8)(0, experts, torch.ones(200, 2))[0] >= 8
    simulated = mixoff.simulate(trace, "lru", 3)
    assert (shadow.hits, shadow.misses) == (simulated.hits, simulated.misses)
    assert int(marked.sum()) == simulated.misses > 0


def test_no_knob_is_on_by_itself_and_off_is_exact(over):
    ids = torch.tensor([[1, 5, 9, 200, 31]])
    with mixoff.load(BUNDLED, "3MB") as model:
        assert model.mixoff.reroute is None
        want = decode(model, ids)[1]
        model.mixoff.reroute = quality.dynamic_top_k(0.6)
        lossy = decode(model, ids)[1]
        model.mixoff.reroute = None
        again = decode(model, ids)[1]
    assert not torch.equal(lossy, want) and torch.equal(again, want)
    assert torch.equal(want, decode(resident(BUNDLED), ids)[1])


ORIGINS = {  # each knob where it changes nothing
    "dynamic_top_k": lambda model: quality.dynamic_top_k(1.0),
    "skip_light": lambda model: quality.skip_light(0.0),
    "skip_misses": lambda model: quality.skip_misses(model.mixoff, keep=2),
    "substitute_misses": lambda model: quality.substitute_misses(
        model.mixoff, quality.router_similarity(model), share=0.0
    ),
    "prune": lambda model: quality.prune([[1] * 8] * 8, keep=8),
}


@pytest.mark.parametrize("name", ORIGINS)
def test_every_knob_is_exact_at_its_origin(name):
    """Bit for bit, in a cache that misses, prompt and tokens."""
    ids = torch.tensor([[1, 5, 9, 200, 31]])
    with mixoff.load(BUNDLED, "3MB") as model:
        want = decode(model, ids)
        model.mixoff.reroute = ORIGINS[name](model)
        got = decode(model, ids)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_a_saturated_router_is_exact_at_mass_one():
    """The heavier weight rounds to 1, and the lighter one still counts."""
    weights = torch.tensor([[1.0, 1e-9]])
    index, left = quality.dynamic_top_k(1.0)(0, torch.tensor([[3, 5]]), weights)
    assert index.tolist() == [[3, 5]] and torch.equal(left, weights)


def test_substitution_moves_fewer_bytes_live_and_changes_the_text():
    ids = torch.tensor([[1, 5, 9, 200, 31]])
    with mixoff.load(BUNDLED, fast_bytes=budget(BUNDLED, 32), prefetch="none") as model:
        exact, want = decode(model, ids, 24)[1], model.mixoff.info().bytes_moved
    with mixoff.load(BUNDLED, fast_bytes=budget(BUNDLED, 32), prefetch="none") as model:
        model.mixoff.reroute = quality.substitute_misses(model.mixoff, quality.router_similarity(model), 0.5)
        got = decode(model, ids, 24)[1]
        assert model.mixoff.info().bytes_moved < want and not torch.equal(got, exact)
    similar = quality.router_similarity(resident(BUNDLED))
    assert similar.shape == (8, 8, 8) and torch.allclose(similar.diagonal(dim1=1, dim2=2), torch.ones(8, 8))


def test_fewer_experts_move_fewer_bytes_live():
    ids = torch.tensor([[1, 5, 9, 200, 31]])

    def moved(knob):
        with mixoff.load(BUNDLED, fast_bytes=budget(BUNDLED, 16), prefetch="none") as model:
            model.mixoff.reroute = knob(model.mixoff) if knob else None
            decode(model, ids, new_tokens=32)
            return model.mixoff.info()

    exact, dynamic = moved(None), moved(lambda runtime: quality.dynamic_top_k(0.7))
    skipping = moved(quality.skip_misses)
    assert dynamic.bytes_moved < exact.bytes_moved and skipping.bytes_moved < exact.bytes_moved
    assert dynamic.hits + dynamic.misses < exact.hits + exact.misses


def test_skipping_live_drops_only_what_is_not_resident():
    """Every expert that is asked for while decoding is a token's heaviest, or was there already."""
    dropped = []
    with mixoff.load(BUNDLED, fast_bytes=budget(BUNDLED, 16), prefetch="none") as model:
        knob = quality.skip_misses(model.mixoff, keep=1)

        def watch(site, index, weights):
            here = {e for s, e in model.mixoff.cache.slot_of if s == site}
            new, given = knob(site, index, weights)
            if not model.mixoff.in_prompt():
                gone = set(index[0].tolist()) - set(new[0].tolist())
                dropped.append(len(gone))
                assert not gone & here and int(index[0][weights[0].argmax()]) not in gone
            else:
                assert torch.equal(new, index)
            return new, given

        model.mixoff.reroute = watch
        decode(model, torch.tensor([[1, 5, 9, 200, 31]]), new_tokens=24)
    assert sum(dropped) > 0


def test_coarse_twins_lie_between_fine_and_coarse(over):
    """All hits compute as the fine model, all misses as the coarse one, bit for bit; in between some of each."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config_of("mixtral"), experts_implementation="grouped_mm").eval()

    def logits(knob):
        mixoff.offload(model, "1GiB")
        model.mixoff.reroute = knob
        with torch.no_grad():
            out = model(over.ids[0]).logits
        mixoff.restore(model)
        return out

    fine = logits(None)
    with quality.quantized(model, TWO):
        coarse = logits(None)
    with quality.with_twins(model, TWO):
        always = logits(lambda site, index, weights: (index + 4, weights))
        never = logits(None)
        some = logits(quality.coarse_misses(Shadow(2), 4))
    assert torch.equal(never, fine) and torch.equal(always, coarse)
    assert not torch.equal(some, fine) and not torch.equal(some, coarse)


# --- the tool --------------------------------------------------------------------------------------------------------


def table_tool(root):
    sys.path.insert(0, str(root / "benchmarks"))
    try:
        import quality_table
    finally:
        sys.path.pop(0)
    return quality_table


@pytest.mark.parametrize("what", ["schemes", "knobs"])
def test_the_tool_makes_its_table_and_goes_on_where_it_stopped(root, tmp_path, monkeypatch, capsys, what):
    tool = table_tool(root)
    monkeypatch.setattr(tool, "variants", lambda width: [("4 bits g16 rtn", FOUR)])
    monkeypatch.setattr(tool, "solver_rows", lambda compared: [])
    monkeypatch.setattr(tool, "choices", lambda counts, slots: [("dynamic", quality.dynamic_top_k(0.7))])
    monkeypatch.setattr(tool, "windows", lambda tokenizer, texts, count: quality.windows(tokenizer, texts, count, 24))
    page, kept = tmp_path / "page.md", tmp_path / "rows.json"
    marks = [tool.MARKS[0].format(what), tool.MARKS[1]]
    page.write_text("before\n" + "".join(marks) + "after\n", encoding="utf-8")
    arguments = [what, "--windows", "2", "--page", str(page), "--checkpoint", str(kept)]
    monkeypatch.setattr(sys, "argv", ["quality_table.py", *arguments])
    tool.main()
    first, made = page.read_text(encoding="utf-8"), capsys.readouterr().err
    assert first.startswith("before\n") and first.endswith("after\n") and "| KL, millinats |" in first
    assert "16 bits" in first and "millinats" in first and "Scores(" in made
    tool.main()
    assert page.read_text(encoding="utf-8") == first and "Scores(" not in capsys.readouterr().err
    page.write_text("no marks\n", encoding="utf-8")
    with pytest.raises(SystemExit, match="lacks the marks"):
        tool.main()


def test_the_page_has_both_tables(root):
    page = (root / "docs" / "quantization.md").read_text(encoding="utf-8")
    for what in ("schemes", "knobs"):
        begin = table_tool(root).MARKS[0].format(what)
        assert begin in page and f"python benchmarks/quality_table.py {what}" in page
    assert "lossy" in page and "off by default" in page
