"""Folders in the layout of the published Mixtral checkpoint with 2-bit experts, small or of full size.

Made with the hqq package, which made the original, or of random codes.
"""

import json
import random
import shutil

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, MixtralConfig

from mixoff.checkpoints.model_files import INDEX

EXPERTS, ATTENTION = (2, 16, 128), (4, 64, 256)  # bits, group, group of scales
CONFIG = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 8}
CONFIG |= {"num_key_value_heads": 2, "head_dim": 32, "num_local_experts": 8, "vocab_size": 512}


def quantized(w, bits, group, scale_group):
    """`w` in the parts of the published files, by hqq: codes, and scale and zero in 8-bit codes of their own."""
    from hqq.core.quantize import Quantizer

    def run(t, nbits, group_size, **how):
        return Quantizer.quantize(t, nbits, group_size=group_size, axis=0, optimize=False, device="cpu", **how)

    codes, meta = run(w, bits, group)
    scale_q, scale = run(meta["scale"], 8, scale_group)
    zero_q, zero = run(meta["zero"], 8, None, channel_wise=False)
    parts = {"W_q": codes, "meta.scale_q": scale_q, "meta.zero_q": zero_q}
    parts |= {"meta.meta_scale.scale": scale["scale"].half(), "meta.meta_scale.zero": scale["zero"].half()}
    return parts | {"meta.meta_zero.scale": zero["scale"].half(), "meta.meta_zero.zero": zero["zero"].half()}


def random_parts(shape, bits, group, scale_group, generator):
    """Parts of a weight of that shape whose values are of the size that weights have."""
    groups = shape[0] * shape[1] // group

    def codes(*size):
        return torch.randint(0, 256, size, dtype=torch.uint8, generator=generator)

    def numbers(low, high, *size):
        return (low + (high - low) * torch.rand(size, generator=generator)).half()

    columns = groups // scale_group
    return {
        "W_q": codes(group * bits // 8, groups),
        "meta.scale_q": codes(scale_group, columns),
        "meta.zero_q": codes(1, groups),
        "meta.meta_scale.scale": numbers(1e-5, 1e-4, 1, columns),
        "meta.meta_scale.zero": numbers(-300, -100, 1, columns),
        "meta.meta_zero.scale": numbers(0.005, 0.01),
        "meta.meta_zero.zero": numbers(-20, 20),
    }


def by_hqq(parts, shape, bits, group, dtype):
    """The oracle: the weights that hqq computes from those parts, in `dtype` throughout."""
    from hqq.core.quantize import Quantizer

    def meta(name, size):
        numbers = {key: parts[f"meta.meta_{name}.{key}"] for key in ("scale", "zero")}
        return numbers | {
            "packing": "8bit_u8",
            "nbits": 8,
            "shape": size,
            "view_as_float": False,
            "compute_dtype": dtype,
        }

    one = (1, shape[0] * shape[1] // group)
    values = {name: Quantizer.dequantize(parts[f"meta.{name}_q"], meta(name, one)) for name in ("scale", "zero")}
    how = {"packing": f"{bits}bit_u8", "nbits": bits, "shape": shape, "group_size": group, "axis": 0}
    return Quantizer.dequantize(parts["W_q"], values | how | {"view_as_float": False, "compute_dtype": dtype})


def write(folder, original, seed=0):
    """Make `folder` a miniature of the published one, and `original` the same model with the weights that hqq decodes.

    The expert files' numbers are drawn: only the index tells which expert a file holds.
    """
    torch.manual_seed(seed)
    AutoModelForCausalLM.from_config(MixtralConfig(**CONFIG)).save_pretrained(original)
    weights, trunk, experts = load_file(original / "model.safetensors"), {}, {}
    for name, w in weights.items():
        layer, form = name.removesuffix(".weight"), EXPERTS if ".experts." in name else ATTENTION
        if ".experts." not in name and "self_attn" not in name:
            trunk[name] = w.half()
            weights[name] = trunk[name].float()
            continue
        parts = quantized(w, *form)
        weights[name] = by_hqq(parts, tuple(w.shape), *form[:2], torch.float32)
        expert, _, matrix = layer.rpartition(".")
        holder, prefix = (experts.setdefault(expert, {}), matrix) if ".experts." in name else (trunk, layer)
        holder |= {f"{prefix}.{key}": part for key, part in parts.items()}
    save_file(weights, original / "model.safetensors", metadata={"format": "pt"})
    shutil.copytree(original, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    write_files(folder, trunk, experts, random.Random(seed))
    return folder


def write_files(folder, trunk, experts, rng):
    """The trunk, the experts' files in drawn order, and the index."""
    names = [f"model-{i + 1:05d}-of-{len(experts) + 1:05d}.safetensors" for i in range(len(experts) + 1)]
    save_file(trunk, folder / names[0], metadata={"format": "pt"})
    weight_map = dict.fromkeys(trunk, names[0])
    for (expert, parts), name in zip(experts.items(), rng.sample(names[1:], len(experts)), strict=True):
        save_file(parts, folder / name, metadata={"format": "pt"})
        weight_map |= {f"{expert}.{key}": name for key in parts}
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
