"""Small random models whose weights are stored as fp8 or MXFP4, each beside the same as transformers decodes it."""

import json
import shutil

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from transformers.integrations.finegrained_fp8 import Fp8Dequantize
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from tiny import config_of

BLOCK = 16  # of the small models; 128 in DeepSeek-V3


def model_of(family, folder):
    """A random model of the family in bf16, on disk with the keys of the Hub; its weights."""
    torch.manual_seed(0)
    config = config_of(family)
    config.intermediate_size = 64 if family == "gpt_oss" else config.intermediate_size  # groups of 32 divide it
    AutoModelForCausalLM.from_config(config).bfloat16().save_pretrained(folder)
    return load_file(folder / "model.safetensors")


def finish(folder, original, tensors, decoded, quantization):
    """The encoded checkpoint in `folder`, beside the same model decoded by transformers in `original`."""
    shutil.copytree(original, folder)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    save_file(decoded, original / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text()) | {"quantization_config": quantization}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def encode_fp8(w, block):
    """fp8 codes of a matrix and the scales of its blocks, as DeepSeek-V3 has them."""
    rows, columns = (-(-n // block) for n in w.shape)
    padded = torch.zeros(rows * block, columns * block)
    padded[: w.shape[0], : w.shape[1]] = w.float()
    scale = padded.view(rows, block, columns, block).abs().amax((1, 3)).clamp_min(1e-12) / 448
    wide = scale.repeat_interleave(block, 0).repeat_interleave(block, 1)
    return (padded / wide)[: w.shape[0], : w.shape[1]].contiguous().to(torch.float8_e4m3fn), scale


def write_fp8(root, scales):
    """A DeepSeek-V3 whose linear layers and experts are fp8, and the same decoded by transformers.

    scales: "blocks", "one scale" a matrix, or "exponents", the blocks' as powers of two.
    """
    weights, tensors = model_of("deepseek_v3", root / "original"), {}
    by_transformers = Fp8Dequantize(None)
    for name, w in weights.items():
        encoded = "proj" in name and w.dim() == 2 and all(n % BLOCK == 0 for n in w.shape)
        if not encoded:
            tensors[name] = w
            continue
        codes, scale = encode_fp8(w, BLOCK if scales != "one scale" else max(w.shape))
        if scales == "exponents":
            scale = scale.log2().ceil().exp2().to(torch.float8_e8m0fnu)
        tensors[name], tensors[f"{name}_scale_inv"] = codes, scale
        weights[name] = by_transformers._dequantize_one(codes, scale, torch.bfloat16)
    assert sum(t.dtype == torch.float8_e4m3fn for t in tensors.values()) > 20
    size = None if scales == "one scale" else [BLOCK, BLOCK]
    how = {"quant_method": "fp8", "weight_block_size": size, "activation_scheme": "dynamic", "fmt": "e4m3"}
    return finish(root / "encoded", root / "original", tensors, weights, how), root / "original"


def write_mxfp4(root):
    """A gpt-oss whose experts are MXFP4, random codes, and the same decoded by transformers."""
    weights = model_of("gpt_oss", root / "original")
    tensors, generator = dict(weights), torch.Generator().manual_seed(0)
    for name in [name for name in weights if name.endswith(("gate_up_proj", "down_proj"))]:
        experts, inputs, outputs = tensors.pop(name).shape
        size = (experts, outputs, inputs // 32)
        blocks = torch.randint(0, 256, (*size, 16), dtype=torch.uint8, generator=generator)
        scales = torch.randint(118, 124, size, dtype=torch.uint8, generator=generator)
        tensors[f"{name}_blocks"], tensors[f"{name}_scales"] = blocks, scales
        weights[name] = convert_moe_packed_tensors(blocks, scales, dtype=torch.bfloat16)
    how = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn"]}
    return finish(root / "encoded", root / "original", tensors, weights, how), root / "original"


def split(folder, files):
    """Deal the tensors of the checkpoint to so many files in turn: codes and scales of a weight lie apart."""
    weights, weight_map = load_file(folder / "model.safetensors"), {}
    names = [f"model-{i + 1:05d}-of-{files:05d}.safetensors" for i in range(files)]
    for i, file in enumerate(names):
        part = {name: weights[name] for name in sorted(weights)[i::files]}
        weight_map |= dict.fromkeys(part, file)
        save_file(part, folder / file, metadata={"format": "pt"})
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder
