"""A model without its experts: loaded by transformers, which never opens an expert tensor."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import GenerationConfig, PreTrainedModel

from mixoff.checkpoints import backbone
from mixoff.errors import CheckpointError
from mixoff.loading import attention, layers
from mixoff.runtime import backend
from mixoff.shapes.config import expert_modules, model_class, read_config
from mixoff.store.source import Source, open_backbone
from mixoff.transfer import streams


def load_backbone(
    source: Source, compute: torch.dtype, exact: bool, gpu: streams.Device | None = None
) -> PreTrainedModel:
    """`from_pretrained` of everything but the experts: their parameters are removed before weights are looked for."""
    config = read_config(source.folder)
    base = model_class(config)
    with open_backbone(source) as (quantized, tensors):
        layers.untie(config, quantized)
        try:
            model, report = _shell(base, list(quantized)).from_pretrained(
                None,  # given a folder, transformers would choose the files itself
                config=config,
                state_dict=tensors,
                dtype=compute,
                experts_implementation=backend.NAME,
                output_loading_info=True,
            )
            model.generation_config = _generation_config(source.folder)
        except Exception as error:  # transformers and safetensors raise many kinds; users need only one
            reason = str(error).strip().split("\n")[0]
            raise CheckpointError(f"transformers cannot load the backbone of {source.folder}: {reason}") from error
    if lacking := sorted(report["missing_keys"]):  # transformers would fill them with random numbers and a warning
        raise CheckpointError(f"{source.folder} lacks {', '.join(lacking[:3])}: {backbone.INCOMPLETE}")
    backbone.refuse_overflow(model, compute, source.dtype)
    where = gpu.where if gpu else torch.device("cpu")
    layers.fill(model, quantized, compute, exact, where)
    model.name_or_path = model.config.name_or_path = str(source.folder)
    model.generation_config.disable_compile = True  # the experts are not a graph
    if gpu:
        attention.fit(model, gpu.describe().sm)
    return model.eval().to(where)


def _generation_config(folder: Path) -> GenerationConfig:
    """As `from_pretrained` finds it: generation_config.json, else the generation settings in config.json."""
    try:
        return GenerationConfig.from_pretrained(folder, local_files_only=True)
    except OSError:
        return GenerationConfig.from_pretrained(
            folder, config_file_name="config.json", local_files_only=True, _from_model_config=True
        )


def _shell(base: type[PreTrainedModel], quantized: list[str]) -> type[PreTrainedModel]:
    """`base` without expert weights or those named in `quantized`: none is created, looked for, moved or counted."""

    def __init__(self: PreTrainedModel, config: object, *args: object, **kwargs: object) -> None:
        base.__init__(self, config, *args, **kwargs)
        for module in expert_modules(self).values():
            for name in [name for name, _ in module.named_parameters(recurse=False)]:
                del module._parameters[name]
            module._is_hf_initialized = True  # or transformers would initialize the deleted weights
        layers.hollow(self, quantized)

    # __module__ is the base's, or transformers takes the class for custom code and ignores experts_implementation;
    # ignoring the experts' keys spares a warning about every expert of a plain checkpoint
    ignored = [*(base._keys_to_ignore_on_load_unexpected or []), r"\.experts\.\d+\.", r"\.experts\.\w+$"]
    return type(
        base.__name__,
        (base,),
        {
            "__init__": __init__,
            "_plain": base,
            "__module__": base.__module__,
            "_keys_to_ignore_on_load_unexpected": ignored,
        },
    )
