"""The backbone of a model, all but its experts: whether files hold what transformers needs, and how they are opened.

transformers itself decides which names and shapes a model needs, and which it renames or ignores. For that it loads the
names on the meta device, where tensors have shapes and no memory.
"""

from __future__ import annotations

import contextlib
import copy
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mixoff.checkpoints.checkpoint import TensorRange
from mixoff.errors import CheckpointError
from mixoff.quantize.solve import is_finite
from mixoff.shapes.config import expert_modules, model_class, read_config

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig, PreTrainedModel


INCOMPLETE = "the download is incomplete, fetch it again"


def check(folder: Path, sizes: Mapping[str, tuple[int, ...]], model: str | None = None) -> set[str]:
    """Refuse a backbone that lacks a tensor of config.json's model, or has one in another shape.

    - folder: the model folder.
    - sizes: shapes of all tensors by name.
    - model: name of the model in errors, by default the folder.

    Returns the names of tensors that the model does not use; transformers ignores them. Raises CheckpointError, which
    names the tensor.
    """
    config = read_config(folder)
    missing, unused, misshapen = rehearse(config, sizes)
    if misshapen:
        name, stored, wanted = misshapen[0]
        setting = _setting(config, stored, wanted)
        raise CheckpointError(
            f"{name} of {model or folder} has shape {stored}, config.json says {wanted}{setting}: "
            "copy config.json again from the source of the weights"
        )
    if missing:
        raise CheckpointError(f"{model or folder} lacks {', '.join(missing[:3])}: {_remedy(missing[0], unused)}")
    return unused


def rehearse(
    config: PretrainedConfig, sizes: Mapping[str, tuple[int, ...]]
) -> tuple[list[str], set[str], list[tuple[str, tuple[int, ...], tuple[int, ...]]]]:
    """Load tensors of these names and shapes without memory.

    Returns names that are missing, names that are unused, and (name, shape, expected shape) of those that do not fit.
    """
    import torch

    config = copy.deepcopy(config)
    config.__dict__.pop("quantization_config", None)  # names and shapes are those of decoded weights
    state = {name: torch.empty(shape, device="meta") for name, shape in sizes.items()}
    try:
        with _quietly():
            model, report = model_class(config).from_pretrained(
                None,
                config=config,
                state_dict=state,
                dtype=torch.float32,
                device_map={"": "meta"},
                ignore_mismatched_sizes=True,
                output_loading_info=True,
            )
    except Exception as error:  # transformers raises many kinds here; to the user all of them are one
        reason = str(error).strip().split("\n")[0]
        raise CheckpointError(f"transformers cannot load this model's backbone: {reason}") from error
    modules = expert_modules(model).items()
    experts = {f"{name}.{key}" for name, module in modules for key, _ in module.named_parameters(recurse=False)}
    misshapen = [(name, tuple(stored), tuple(wanted)) for name, stored, wanted in sorted(report["mismatched_keys"])]
    return sorted(set(report["missing_keys"]) - experts), set(report["unexpected_keys"]), misshapen


def _remedy(missing: str, unused: set[str]) -> str:
    """What to do about a missing name, which may only have a prefix too many."""
    longer = next((name for name in sorted(unused) if name.endswith(f".{missing}")), None)
    if longer is None:
        return INCOMPLETE
    prefix = longer.removesuffix(missing)
    return f"its names carry the prefix {prefix!r}, as in {longer}; save the model again without it"


def _setting(config: PretrainedConfig, stored: tuple[int, ...], wanted: tuple[int, ...]) -> str:
    """The setting of a configuration that gives the size that differs: ` (vocab_size = 5)`."""
    sizes = [w for s, w in zip(stored, wanted, strict=False) if s != w] or list(wanted)
    values = config.to_dict() | config.get_text_config().to_dict()
    named = [key for key, value in values.items() if type(value) is int and value == sizes[0]]
    return f" ({named[0]} = {sizes[0]})" if len(named) == 1 else ""


def refuse_overflow(model: PreTrainedModel, compute: torch.dtype, stored: str) -> None:
    """Refuse fp16 for a backbone that was stored in a wider dtype and has weights beyond fp16's range."""
    if str(compute) != "torch.float16" or stored == "float16":
        return
    for name, weight in model.named_parameters():
        if str(weight.dtype) == "torch.float16" and not is_finite(weight):
            raise CheckpointError(
                f"{name} holds NaN, or numbers beyond the 65504 of float16: load the model with dtype='float32'"
            )


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Silence transformers' report, warnings and bars: our own messages replace them."""
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars
    from transformers.utils import logging

    level, bar, hidden = logging.get_verbosity(), logging.is_progress_bar_enabled(), are_progress_bars_disabled()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.set_verbosity_error()
        logging.disable_progress_bar()
        try:
            yield
        finally:
            logging.set_verbosity(level)
            if bar:
                logging.enable_progress_bar()  # this enables the Hub's bars as well
            if hidden:
                disable_progress_bars()


@contextlib.contextmanager
def opened(folder: Path, tensors: Mapping[str, TensorRange]) -> Iterator[dict[str, Any]]:
    """The tensors by name as transformers reads them: slices, whose bytes are read on demand."""
    from safetensors import SafetensorError, safe_open

    with contextlib.ExitStack() as files:
        try:
            by_file = {file: safe_open(folder / file, framework="pt") for file in {t.file for t in tensors.values()}}
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"a file of {folder} is damaged ({error}): fetch it again") from None
        for file in by_file.values():
            files.enter_context(file)
        yield {name: by_file[t.file].get_slice(name) for name, t in tensors.items()}
