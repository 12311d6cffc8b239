"""Small random models quantized as on the Hub by GPTQ, AWQ, compressed-tensors, bitsandbytes and modelopt.

Each is next to the same model decoded. The encoders know nothing of mixoff: those of GPTQ and AWQ go number by number
through the published layouts, compressed-tensors and bitsandbytes are the libraries themselves.
"""

import json
import shutil

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from tiny import config_of

FP4_VALUES = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
AWQ_PACKED = (0, 2, 4, 6, 1, 3, 5, 7)  # which of eight outputs is in which nibble, from the lowest


def write(root, family, encode, settings, dtype=torch.float16, width=96):
    """A model of the family whose linear layers and experts are encoded, and the same decoded.

    encode: from (weight, generator) to tensors by ending, and the decoded weight
    settings: quantization_config; None writes modelopt's older hf_quant_config.json
    """
    torch.manual_seed(0)
    config = config_of(family)
    config.moe_intermediate_size = config.intermediate_size = width  # groups of 16 and 32 divide it
    AutoModelForCausalLM.from_config(config).to(dtype).save_pretrained(root / "original")
    weights, tensors, generator = load_file(root / "original/model.safetensors"), {}, torch.Generator().manual_seed(0)
    for name, w in weights.items():
        if "_proj" not in name and ".experts." not in name:
            tensors[name] = w
            continue
        parts, decoded = encode(w, generator)
        tensors |= {name.removesuffix("weight") + ending: part.contiguous() for ending, part in parts.items()}
        weights[name] = decoded.to(dtype).contiguous()
    shutil.copytree(root / "original", root / "encoded")
    save_file(tensors, root / "encoded/model.safetensors", metadata={"format": "pt"})
    save_file(weights, root / "original/model.safetensors", metadata={"format": "pt"})
    config = json.loads((root / "encoded/config.json").read_text())
    if settings is None:
        older = {"producer": {"name": "modelopt", "version": "0.29"}, "quantization": {"quant_algo": "NVFP4"}}
        (root / "encoded/hf_quant_config.json").write_text(json.dumps(older))
    else:
        config["quantization_config"] = settings
    (root / "encoded/config.json").write_text(json.dumps(config))
    return root / "encoded", root / "original"


def whole_numbers(w, bits, groups, symmetric, generator):
    """Codes (N, K), scales fp16 and zeros (N, groups) of a weight; zeros are random where they are not the middle."""
    top, grouped = 2**bits - 1, w.float().unflatten(1, (groups, -1))
    scale = (grouped.abs().amax(-1) * 2 / top).clamp_min(1e-6).half()
    zero = torch.full(scale.shape, 2 ** (bits - 1))
    if not symmetric:
        zero = torch.randint(1, top, scale.shape, generator=generator)
    codes = (grouped / scale.float()[..., None] + zero[..., None]).round().clamp(0, top)
    return codes.flatten(1).int(), scale, zero.int()


def packed_down(rows, bits):
    """Rows of numbers (n, m) packed along n into int32, bit by bit, the first lowest."""
    words = np.zeros((len(rows) * bits // 32, rows.shape[1]), np.uint32)
    for i, row in enumerate(rows.numpy().astype(np.uint32)):
        for bit in range(bits):
            place = bits * i + bit
            words[place // 32] |= (row >> np.uint32(bit) & np.uint32(1)) << np.uint32(place % 32)
    return torch.from_numpy(words.view(np.int32))


def gptq(bits=4, group=32, act_order=False, symmetric=True, version=1):
    """An encoder in AutoGPTQ's layout; `group` -1 is one group for all inputs."""

    def encode(w, generator):
        N, K = w.shape
        groups = 1 if group < 0 else K // group
        codes, scale, zero = whole_numbers(w, bits, groups, symmetric, generator)
        order = torch.arange(K) // (K // groups)
        if act_order:
            order = order[torch.randperm(K, generator=generator)]
            spread = scale.float()[:, order]
            codes = (w.float() / spread + zero[:, order]).round().clamp(0, 2**bits - 1).int()
        stored = (zero - int(version == 1)) % 2**bits
        parts = {"qweight": packed_down(codes.T, bits), "scales": scale.T, "g_idx": order.int()}
        parts["qzeros"] = packed_down(stored, bits).T
        decoded = (codes.float() - zero.float()[:, order]) * scale.float()[:, order]
        return parts, decoded

    layout = "gptq" if version == 1 else "gptq_v2"
    how = {"quant_method": "gptq", "bits": bits, "group_size": group, "desc_act": act_order, "sym": symmetric}
    return encode, how | {"checkpoint_format": layout}


def awq(group=32):
    """An encoder in AutoAWQ's layout `gemm`."""

    def across(rows):
        words = np.zeros((len(rows), rows.shape[1] // 8), np.uint32)
        for column in range(words.shape[1]):
            for nibble, output in enumerate(AWQ_PACKED):
                words[:, column] |= rows[:, 8 * column + output].numpy().astype(np.uint32) << np.uint32(4 * nibble)
        return torch.from_numpy(words.view(np.int32))

    def encode(w, generator):
        codes, scale, zero = whole_numbers(w, 4, w.shape[1] // group, False, generator)
        parts = {"qweight": across(codes.T), "qzeros": across(zero.T), "scales": scale.T}
        wide = [t.float().repeat_interleave(group, 1) for t in (zero, scale)]
        return parts, (codes.float() - wide[0]) * wide[1]

    how = {"quant_method": "awq", "bits": 4, "group_size": group, "zero_point": True, "version": "GEMM"}
    return encode, how | {"modules_to_not_convert": ["gate"]}


def fp4_codes(w):
    """Nearest FP4 codes (N, K) of numbers within ±6, two in a byte, uint8 (N, K/2); and the numbers."""
    nearest = (w.abs()[..., None] - FP4_VALUES).abs().argmin(-1)
    codes = nearest | (w < 0) << 3
    values = FP4_VALUES[nearest] * torch.where(w < 0, -1.0, 1.0)
    pairs = codes.unflatten(1, (-1, 2))
    return (pairs[..., 0] | pairs[..., 1] << 4).to(torch.uint8), values


def modelopt():
    """An encoder of NVIDIA's NVFP4: a scale in fp8 for 16 inputs, times one in fp32 for the matrix."""

    def encode(w, _):
        grouped = w.float().unflatten(1, (-1, 16))
        whole = grouped.abs().max() / (6 * 448)
        scale = (grouped.abs().amax(-1) / 6 / whole).to(torch.float8_e4m3fn)
        wide = (scale.float() * whole).repeat_interleave(16, 1)
        packed, values = fp4_codes((w.float() / wide.clamp_min(1e-12)).clamp(-6, 6))
        parts = {
            "weight": packed,
            "weight_scale": scale,
            "weight_scale_2": whole.reshape(()),
            "input_scale": torch.ones(()),
        }
        return parts, values * wide

    return encode, {"quant_method": "modelopt", "quant_algo": "NVFP4", "group_size": 16}


def modelopt_fp8():
    """An encoder of modelopt's fp8, one scale per matrix."""

    def encode(w, _):
        scale = w.float().abs().max() / 448
        codes = (w.float() / scale).to(torch.float8_e4m3fn)
        return {"weight": codes, "weight_scale": scale.reshape(()), "k_scale": torch.ones(())}, codes.float() * scale

    return encode, {"quant_method": "modelopt", "quant_algo": "FP8"}


def compressed(form):
    """The library's own compressor: `W4`, `W4 asymmetric`, `W8`, `int8`, `fp8`, `fp8 blocks`, `NVFP4` or `MXFP4`."""
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    name, args = {
        "W4": ("pack-quantized", {"num_bits": 4, "group_size": 32, "strategy": "group"}),
        "W4 asymmetric": ("pack-quantized", {"num_bits": 4, "group_size": 32, "strategy": "group", "symmetric": False}),
        "W8": ("pack-quantized", {"num_bits": 8, "strategy": "channel"}),
        "int8": ("int-quantized", {"num_bits": 8, "strategy": "channel"}),
        "fp8": ("float-quantized", {"num_bits": 8, "type": "float", "strategy": "channel"}),
        "fp8 blocks": (
            "float-quantized",
            {"num_bits": 8, "type": "float", "strategy": "block", "block_structure": [16, 16]},
        ),
        "MXFP4": (
            "mxfp4-pack-quantized",
            {"num_bits": 4, "type": "float", "group_size": 32, "strategy": "group", "scale_dtype": torch.uint8},
        ),
        "NVFP4": (
            "nvfp4-pack-quantized",
            {
                "num_bits": 4,
                "type": "float",
                "group_size": 16,
                "strategy": "tensor_group",
                "scale_dtype": torch.float8_e4m3fn,
            },
        ),
    }[form]
    args = QuantizationArgs(symmetric=args.pop("symmetric", True), **args)
    scheme = QuantizationScheme(targets=["Linear"], weights=args, format=name)

    def encode(w, _):
        grouped = w.float().unflatten(1, (-1, args.group_size or w.shape[1]))
        low, high, state = grouped.amin(-1), grouped.amax(-1), {"weight": w}
        if form == "NVFP4":
            whole = (6 * 448 / w.float().abs().max()).reshape(1)
            state["weight_global_scale"] = whole
            state["weight_scale"] = (grouped.abs().amax(-1) / 6 * whole).to(torch.float8_e4m3fn).float()
        elif form == "fp8 blocks":
            blocks = w.float().unflatten(1, (-1, 16)).unflatten(0, (-1, 16)).abs().amax((1, 3))
            state["weight_scale"] = (blocks / 448).to(torch.bfloat16)
        elif form == "MXFP4":
            state["weight_scale"] = (grouped.abs().amax(-1) / 6).log2().ceil().exp2().to(torch.bfloat16)
        elif form == "fp8":
            state["weight_scale"] = (grouped.abs().amax(-1) / 448).to(torch.bfloat16)
        elif args.symmetric:
            state["weight_scale"] = (grouped.abs().amax(-1) * 2 / (2**args.num_bits - 1)).to(torch.bfloat16)
        else:
            state["weight_scale"] = ((high - low) / (2**args.num_bits - 1)).to(torch.bfloat16)
            middle = 2 ** (args.num_bits - 1)
            zero = (-low / state["weight_scale"].float()).round().clamp(0, 2 * middle - 1) - middle
            state["weight_zero_point"] = zero.to(torch.int8)
        compressor = BaseCompressor.get_value_from_registry(name)
        parts = compressor.compress(dict(state), scheme)
        decoded = compressor.decompress(dict(parts), scheme)["weight"]
        return parts, decoded

    weights = json.loads(args.model_dump_json())
    groups = {"group_0": {"targets": ["Linear"], "weights": weights, "format": name}}
    return encode, {
        "quant_method": "compressed-tensors",
        "format": name,
        "config_groups": groups,
        "ignore": ["lm_head"],
    }


def bitsandbytes(kind="nf4", twice=True):
    """bitsandbytes' own quantizer; its decoder for CPUs errs where a row is not whole blocks of 64."""
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    def encode(w, _):
        codes, state = quantize_4bit(w, blocksize=64, compress_statistics=twice, quant_type=kind)
        packed = state.as_dict(packed=True)
        parts = {"weight": codes} | {f"weight.{name}": t for name, t in packed.items()}
        return parts, dequantize_4bit(codes, state)

    return encode, {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": kind}
