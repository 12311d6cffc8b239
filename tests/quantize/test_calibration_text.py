"""The bundled calibration text: small, of every held-out domain, and nothing that results are measured on."""

import corpus
from mixoff import models


def test_it_has_the_held_out_domains_in_equal_shares():
    sizes = {name: len(text.encode()) for name, text in models.calibration().items()}
    assert sorted(sizes) == sorted(models.heldout()) == sorted(corpus.DOMAINS)
    assert sum(sizes.values()) <= 150_000 and max(sizes.values()) < 1.1 * min(sizes.values())


def test_it_shares_no_eight_words_in_a_row_with_held_out_text():
    heldout = set().union(*map(corpus.shingles, models.heldout().values()))
    assert len(heldout) > 20_000 and corpus.SHINGLE == 8
    for name, text in models.calibration().items():
        assert not corpus.shingles(text) & heldout, name


def test_excerpts_are_whole_lines_without_known_shingles():
    lines = [f"line {n} " + " ".join(f"{word}{n}" for word in "abcdefghijklmnop") for n in range(60)]
    document, known = "\n".join(lines), corpus.shingles(lines[30])
    for seed in range(20):
        text = corpus.excerpt(document, known, corpus.random.Random(seed))
        assert set(text.split("\n")) <= set(lines) - {lines[30]}
        assert 0.7 * corpus.EXCERPT_BYTES < len(text.encode()) <= corpus.EXCERPT_BYTES
    assert corpus.excerpt(document, corpus.shingles(document), corpus.random.Random(0)) == ""
