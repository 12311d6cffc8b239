"""llama.cpp as a peer: files of a shape that our own reader takes, and figures read from what llama-bench prints."""

import argparse
import json
import sys

import pytest
from transformers import MixtralConfig, Qwen3MoeConfig

import mixoff
from mixoff.bench import compare, gguf_file, llama_bench
from mixoff.bench.spec import Spec
from mixoff.checkpoints.find import find
from mixoff.checkpoints.survey import survey
from mixoff.commands import bench
from mixoff.shapes.config import expert_sites, skeleton

pytest.importorskip("gguf", reason="the extra gguf is not installed")

WIDTHS = {
    "vocab_size": 320,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
CONFIGS = {
    "mixtral": MixtralConfig(**WIDTHS, num_local_experts=4),
    "qwen3_moe": Qwen3MoeConfig(
        **WIDTHS, moe_intermediate_size=256, num_experts=6, num_experts_per_tok=3, head_dim=128
    ),
}
PRINTED = [  # what llama-bench prints, cut to what is read
    {"build_commit": "abc", "build_number": 7, "n_prompt": 8, "n_gen": 0, "samples_ns": [4_000_000_000]},
    {"build_commit": "abc", "build_number": 7, "n_prompt": 0, "n_gen": 4, "samples_ns": [2_000_000_000]},
]


@pytest.fixture(params=CONFIGS)
def file(request, tmp_path):
    gguf_file.write(tmp_path / "new" / f"{request.param}.gguf", CONFIGS[request.param].to_dict())
    return tmp_path / "new" / f"{request.param}.gguf"


def command(folder, script):
    """A program that runs `script`."""
    (folder / "program.py").write_text(script)
    return f"{sys.executable} {folder / 'program.py'} -mmp 0"


def test_a_file_of_a_shape_is_what_our_own_reader_expects(file):
    config = CONFIGS[file.stem]
    found = survey(find(file).checkpoint()).sites
    expected = expert_sites(skeleton(config), "bfloat16")
    assert [[(p.name, p.shape) for p in s.parts] for s in found] == [
        [(p.name, p.shape) for p in s.parts] for s in expected
    ]


def test_a_token_touches_the_chosen_experts_and_the_rest_but_for_embeddings(file):
    config = CONFIGS[file.stem]
    sizes = {n: (gguf_file.nbytes(shape, kind)) for n, shape, kind in gguf_file.tensors(config.to_dict())}
    chosen = config.num_experts_per_tok / config.num_local_experts
    expected = sum(n * (chosen if "_exps" in name else 1) for name, n in sizes.items() if "token_embd" not in name)
    assert llama_bench.touched_nbytes(str(file)) == pytest.approx(expected, abs=len(sizes))


def test_other_families_are_refused_before_anything_is_written(tmp_path):
    with pytest.raises(mixoff.MixoffError, match="no GGUF for olmoe"):
        gguf_file.write(tmp_path / "x.gguf", {"model_type": "olmoe"})
    assert list(tmp_path.iterdir()) == []


def test_what_llama_bench_prints_becomes_figures(file, tmp_path):
    script = f"import sys, pathlib; pathlib.Path('{tmp_path}/given').write_text(' '.join(sys.argv[1:]))\n"
    program = command(tmp_path, script + f"print('''{json.dumps(PRINTED)}''')")
    spec = Spec("fork", "llama-bench", str(file), threads=2, prompt_tokens=8, tokens=4, load={"command": program})
    report = compare._run(spec, None)
    assert report["prompt_s"] == [4.0] and report["token_s"] == [[0.5] * 4]
    assert (tmp_path / "given").read_text() == f"-mmp 0 -m {file} -t 2 -p 8 -n 4 -r 1 -o json"
    row = compare.row("fork", [report], 1e9)
    assert (row.decode_tokens_per_s, row.prompt_tokens_per_s) == (2.0, 2.0) and row.roofline_share > 0


@pytest.mark.parametrize(
    ("script", "message"),
    [
        ("print('no json')", "printed no figures"),
        ("import sys; sys.exit('unknown model architecture')", "exit code 1.: unknown model architecture"),
        ("print('[]')", "printed no figures"),
        ("print('[{}]')", "printed no figures"),
    ],
)
def test_a_program_that_fails_is_a_row_with_the_reason(file, tmp_path, script, message):
    spec = Spec("x", "llama-bench", str(file), load={"command": command(tmp_path, script)})
    with pytest.raises(mixoff.MixoffError, match=message):
        llama_bench.run(spec)
    assert "failure" in compare._run(spec, None)


def test_a_program_that_is_not_there_is_named(file):
    with pytest.raises(mixoff.MixoffError, match="cannot run nowhere/llama-bench"):
        llama_bench.run(Spec("x", "llama-bench", str(file), load={"command": "nowhere/llama-bench -t 1"}))


def test_two_peers_of_one_name_are_refused():
    parser = argparse.ArgumentParser()
    bench.add(parser)
    args = parser.parse_args(["S", "--llama-bench", "a/llama-bench", "--llama-bench", "b/llama-bench"])
    with pytest.raises(mixoff.MixoffError, match="same name"):
        bench._commands(args)
    args = parser.parse_args(["S", "--llama-bench", "a/llama-bench", "--llama-bench", "fork=b/llama-bench -fmoe 1"])
    assert bench._commands(args) == (("llama.cpp", "a/llama-bench"), ("fork", "b/llama-bench -fmoe 1"))
