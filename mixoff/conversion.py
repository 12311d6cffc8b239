"""From a checkpoint to a store: expert by expert, shard by shard, quantized as a scheme says.

Does not know caches or budgets.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import torch

from mixoff import shapes
from mixoff.checkpoint import INDEX, Checkpoint, TensorRange
from mixoff.errors import CheckpointError
from mixoff.quantize import QTensor, Scheme
from mixoff.shapes import PART_ALIGN, Part, Site
from mixoff.store import FORMAT, MANIFEST, QUANTIZED, VERSION, Source, open_source, quantized_sites, stride

CHUNK = 1 << 22  # bytes copied at a time
SIDE_FILES = ("*.json", "*.model", "*.txt", "*.jinja", "README.md", "LICENSE*", "NOTICE*")  # tokenizer, card, licences


def convert(source: str | Path, target: str | Path, scheme: str | Scheme = "none") -> Path:
    """Write the checkpoint in folder `source` as a store into the new folder `target`; returns the target.

    scheme: bits of each part of the model, a `Scheme` or the name of a preset; `"none"` keeps every weight as it is.
    Memory: two experts, and the quantized part of the backbone. The store appears under its name only when it is
    complete; an interrupted conversion leaves `target.partial`, which the next one replaces. Raises CheckpointError for
    what cannot be converted, MixoffError for a scheme that does not suit the model's widths.
    """
    scheme = Scheme.preset(scheme) if isinstance(scheme, str) else scheme
    target = Path(target)
    if target.exists():
        raise CheckpointError(f"{target} exists already: choose another folder, or remove it first")
    opened = open_source(source)
    if opened.is_store:
        opened.close()
        raise CheckpointError(f"{source} is a store already: load it as it is, or copy the folder")
    partial = target.with_name(target.name + ".partial")
    try:
        sites = quantized_sites(opened.sites, scheme)
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        _write_store(opened, sites, scheme, partial)
        os.replace(partial, target)
    except Exception as error:
        shutil.rmtree(partial, ignore_errors=True)
        if isinstance(error, OSError):
            raise CheckpointError(f"could not write {target}: {error.strerror or error}; nothing was kept") from error
        raise
    finally:
        opened.close()
    return target


def _write_store(source: Source, sites: tuple[Site, ...], scheme: Scheme, folder: Path) -> None:
    entries = [_write_site(source, i, site, scheme, folder) for i, site in enumerate(sites)]
    backbone = _write_backbone(Checkpoint(source.folder), scheme, folder)
    for pattern in SIDE_FILES:
        for side in source.folder.glob(pattern):
            if not side.name.endswith(".index.json"):
                shutil.copyfile(side, folder / side.name)
    manifest = {
        "format": FORMAT,
        "version": VERSION,
        "scheme": json.loads(scheme.to_json()),
        "dtype": source.dtype,
        "backbone": backbone,
        "sites": entries,
    }
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")


# Experts --------------------------------------------------------------------------------------------------------------


def _write_site(source: Source, i: int, site: Site, scheme: Scheme, folder: Path) -> dict:
    """Write the experts of one site, each padded to the stride; returns the site's entry in the manifest."""
    path, hashes = folder / f"experts-{i:03d}.bin", []
    for image in _images(source, i, site, scheme):
        _append(path, image)
        parts = [image[part.offset : part.offset + part.nbytes] for part in site.parts]
        hashes.append([hashlib.sha256(part).hexdigest() for part in parts])
    return {"file": path.name, "stride": stride(site), **asdict(site), "sha256": hashes}


def _images(source: Source, i: int, site: Site, scheme: Scheme) -> Iterator[bytearray]:
    plain = source.sites[i]
    raw = bytearray(plain.expert_nbytes)
    for expert in range(site.num_experts):
        source.reader.read_into(i, expert, memoryview(raw))
        image = bytearray(stride(site))
        for before, after in zip(plain.parts, site.parts, strict=True):
            content = raw[before.offset : before.offset + before.nbytes]
            if after.form is not None:
                content = _quantized(content, before, plain.transposed, scheme)
            image[after.offset : after.offset + after.nbytes] = content
        yield image


def _quantized(content: bytearray, part: Part, transposed: bool, scheme: Scheme) -> bytes:
    w = torch.frombuffer(content, dtype=shapes.torch_dtype(part.dtype)).view(part.shape)
    return scheme.quantize(w.t() if transposed else w, "experts").to_buffer().numpy().tobytes()


def _append(path: Path, image: bytearray) -> None:
    with path.open("ab") as f:
        f.write(image)


# The backbone ---------------------------------------------------------------------------------------------------------


def _write_backbone(checkpoint: Checkpoint, scheme: Scheme, folder: Path) -> list[dict]:
    """Copy all but the experts, shard by shard under the shards' own names, and quantize what the scheme says."""
    roles = shapes.backbone_roles(shapes.skeleton(shapes.read_config(checkpoint.folder)))
    quantized = {n: role for n, role in roles.items() if n in checkpoint.tensors and scheme.precision(role) is not None}
    left_out, weight_map, entries = checkpoint.expert_names() | quantized.keys(), {}, []
    for file in checkpoint.files:
        tensors = {n: t for n, t in checkpoint.tensors.items() if t.file == file and n not in left_out}
        if tensors:
            entries.append(_copy_tensors(checkpoint.folder / file, tensors, folder / file))
            weight_map |= dict.fromkeys(tensors, file)
    if (checkpoint.folder / INDEX).exists():
        total = sum(checkpoint.tensors[name].nbytes for name in weight_map)
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        (folder / INDEX).write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")
    if quantized:
        entries.append(_write_quantized(checkpoint, quantized, scheme, folder / QUANTIZED))
    return entries


def _copy_tensors(source: Path, tensors: dict[str, TensorRange], target: Path) -> dict:
    """Write a safetensors file with some of another's tensors, in the same order; returns its entry in the manifest.

    The data begins at the same place modulo 64 as in the source: transformers computes from the mapped file, and the
    last bits of a BLAS product may depend on the alignment of its operands.
    """
    ordered = sorted(tensors.items(), key=lambda item: item[1].offset)
    header, end, hashes = {"__metadata__": {"format": "pt"}}, 0, {}
    for name, t in ordered:
        header[name] = {"dtype": t.dtype, "shape": t.shape, "data_offsets": [end, end := end + t.nbytes]}
    raw = json.dumps(header, separators=(",", ":")).encode()
    raw += b" " * ((ordered[0][1].offset - 8 - len(raw)) % PART_ALIGN)  # the format allows spaces after the header
    with source.open("rb") as f, target.open("wb") as out:
        out.write(len(raw).to_bytes(8, "little") + raw)
        for name, t in ordered:
            digest = hashlib.sha256()
            f.seek(t.offset)
            for start in range(0, t.nbytes, CHUNK):
                piece = f.read(min(CHUNK, t.nbytes - start))
                digest.update(piece)
                out.write(piece)
            hashes[name] = digest.hexdigest()
    return {"file": target.name, "nbytes": target.stat().st_size, "sha256": hashes}


def _write_quantized(checkpoint: Checkpoint, roles: dict[str, str], scheme: Scheme, target: Path) -> dict:
    """Write the quantized weights of the backbone: the parts of each as `NAME.PART`, what else they need as JSON."""
    from safetensors import safe_open
    from safetensors.torch import save_file

    tensors, described = {}, {}
    for name, role in roles.items():
        with safe_open(checkpoint.folder / checkpoint.tensors[name].file, framework="pt") as f:
            q: QTensor = scheme.quantize(f.get_tensor(name), role)
        parts, described[name] = q.to_tensors()
        tensors |= {f"{name}.{part}": tensor for part, tensor in parts.items()}
    save_file(tensors, target, metadata={"mixoff": json.dumps(described)})  # one key: several come in any order
    hashes = {name: hashlib.sha256(t.numpy().tobytes()).hexdigest() for name, t in tensors.items()}
    return {"file": target.name, "nbytes": target.stat().st_size, "sha256": hashes}
