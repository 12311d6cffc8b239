"""Ways in which a model's folder can be damaged, each with what mixoff says of it."""

import json
import os
import shutil

from mixoff.checkpoints.model_files import INDEX


def edit_json(path, change):
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


def cut(path, nbytes):
    os.truncate(path, path.stat().st_size - nbytes)


SHARD = "model-00002-of-00004.safetensors"


def swap_header(path, old, new):
    raw = path.read_bytes()
    n = int.from_bytes(raw[:8], "little")
    header = raw[8 : 8 + n].replace(old, new, 1)
    path.write_bytes(len(header).to_bytes(8, "little") + header + raw[8 + n :])


def dense(folder):
    from transformers import LlamaConfig, LlamaForCausalLM

    shutil.rmtree(folder)
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(**shape, vocab_size=64)).save_pretrained(folder)


def only_pickles(folder):
    for p in folder.glob("model*"):
        p.unlink()
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04.")


DAMAGE = {
    "missing": (shutil.rmtree, "no model folder at"),
    "no config": (lambda d: (d / "config.json").unlink(), "has no config.json"),
    "config is no JSON": (lambda d: (d / "config.json").write_text("{"), "not readable JSON"),
    "config is a list": (lambda d: (d / "config.json").write_text("[]"), "holds a list"),
    "unknown model type": (
        lambda d: edit_json(d / "config.json", lambda c: c.update(model_type="perpetuum")),
        "not a configuration that transformers can read",
    ),
    "absurd config": (
        lambda d: edit_json(d / "config.json", lambda c: c.update(num_hidden_layers=-3)),
        "no experts|not a configuration|cannot build",
    ),
    "wrong width": (
        lambda d: edit_json(d / "config.json", lambda c: c.update(intermediate_size=96)),
        r"shape \(192, 192\) in .*, config.json says \(96, 192\)",
    ),
    "too many experts": (
        lambda d: edit_json(d / "config.json", lambda c: c.update(num_local_experts=9)),
        "lacks weights of expert 8 in layer 0",
    ),
    "dense": (dense, "LlamaForCausalLM has no experts"),
    "EXL3": (
        lambda d: edit_json(d / "config.json", lambda c: c.update(quantization_config={"quant_method": "exl3"})),
        "quantized already .exl3.*16-bit original",
    ),
    "HQQ": (
        lambda d: edit_json(d / "config.json", lambda c: c.update(quantization_config={"quant_method": "hqq"})),
        "quantized already .hqq",
    ),
    "pickles": (only_pickles, "pickle files, which can run code"),
    "no weights": (lambda d: [p.unlink() for p in d.glob("model*")], "no .*safetensors files"),
    "a shard is missing": (lambda d: (d / SHARD).unlink(), f"lacks {SHARD}"),
    "a shard is cut": (lambda d: cut(d / SHARD, 1), "the copy is incomplete"),
    "a shard is cut to its header": (lambda d: os.truncate(d / SHARD, 3), "truncated or not a safetensors file"),
    "a shard is empty": (lambda d: (d / SHARD).write_bytes(b""), "truncated or not a safetensors file"),
    "an absurd header length": (
        lambda d: (d / SHARD).write_bytes(b"\xff" * 8 + b"{}"),
        "truncated or not a safetensors file",
    ),
    "a header that is no JSON": (lambda d: swap_header(d / SHARD, b"{", b"["), "damaged header"),
    "a shape that lies": (lambda d: swap_header(d / SHARD, b"[192,192]", b"[192,193]"), "damaged header"),
    "a negative shape": (lambda d: swap_header(d / SHARD, b"[192,192]", b"[-1,-36864]"), "damaged header"),
    "a dtype that lies": (lambda d: swap_header(d / SHARD, b'"F16"', b'"F32"'), "damaged header"),
    "an unknown dtype": (lambda d: swap_header(d / SHARD, b'"F16"', b'"X99"'), "unknown dtype 'X99'"),
    "a path in the index": (
        lambda d: edit_json(d / INDEX, lambda c: c["weight_map"].update({"x": "../../secret.safetensors"})),
        "do not trust this folder",
    ),
    "an index without a map": (lambda d: edit_json(d / INDEX, lambda c: c.pop("weight_map")), "has no weight_map"),
}
