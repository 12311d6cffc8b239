"""The tokenizer in the metadata of a GGUF file, built by transformers, as the small files of a model folder."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from typing import Any

from mixoff.checkpoints.gguf.header import Array
from mixoff.errors import one_line

MAX_TOKEN = 1024  # characters: the pieces of a longer one, which no tokenizer has, would take hours to try
log = logging.getLogger("mixoff")
SPECIAL = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}  # tokens, and their names in GGUF


def tokenizer_files(name: str, metadata: Mapping[str, Any]) -> dict[str, bytes]:
    """tokenizer.json, tokenizer_config.json and chat_template.jinja; a warning and no files where none can be built.

    name: name of the file, in the warning
    """
    try:
        return _files(metadata)
    except Exception as error:  # transformers and tokenizers raise many kinds; to the user all of them are one
        reason = one_line(f"{type(error).__name__}: {error}")[:200]
        log.warning(
            "transformers cannot build the tokenizer of %s (%s): copy tokenizer.json and tokenizer_config.json of the "
            "original model into the store", name, reason,
        )  # fmt: skip
        return {}


def _files(metadata: Mapping[str, Any]) -> dict[str, bytes]:
    fields, settings = _fields(metadata)
    if (longest := max(map(len, fields["tokens"]))) > MAX_TOKEN:
        raise ValueError(f"a token of {longest} characters")
    backend, _ = _of_transformers().convert_gguf_tokenizer(metadata["general.architecture"], fields)
    for special, key in SPECIAL.items():
        if (token := metadata.get(f"tokenizer.ggml.{key}_token_id")) is not None:
            settings[f"{special}_token"] = fields["tokens"][token]
    _surround(backend, settings)
    files = {"tokenizer.json": backend.to_str().encode()}
    if isinstance(template := settings.pop("chat_template", None), str):
        files["chat_template.jinja"] = template.encode()
    settings = {key: value for key, value in settings.items() if value is not None}
    settings |= {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    return files | {"tokenizer_config.json": (json.dumps(settings, indent=1) + "\n").encode()}


def _surround(backend: Any, settings: Mapping[str, Any]) -> None:
    """Let the tokenizer add the tokens of begin and end as the file says: transformers asks tokenizer.json for that."""
    from tokenizers.processors import TemplateProcessing

    added = {key: settings.get(f"{key}_token") for key in ("bos", "eos") if settings.get(f"add_{key}_token")}
    begin, end = (f"{added[key]} " if added.get(key) else "" for key in ("bos", "eos"))
    if begin or end:
        ids = [(token, backend.token_to_id(token)) for token in added.values() if token]
        backend.post_processor = TemplateProcessing(
            single=f"{begin}$A {end}".strip(), pair=f"{begin}$A {end}{begin}$B {end}".strip(), special_tokens=ids
        )


def _fields(metadata: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """What the converter of transformers takes, and the settings of the tokenizer, under transformers' names."""
    mapping, groups = _of_transformers().GGUF_TOKENIZER_MAPPING, []
    for names in (mapping["tokenizer"], mapping["tokenizer_config"]):
        values = {theirs: metadata.get(f"tokenizer.{key}") for key, theirs in names.items()}
        groups.append({k: v.read() if isinstance(v, Array) else v for k, v in values.items() if v is not None})
    if groups[0].get("tokenizer_type") == "llama":
        groups[1].setdefault("add_bos_token", True)  # as llama.cpp does where a file does not say
    return groups[0], groups[1]


def _of_transformers() -> Any:
    """transformers' module for GGUF."""
    try:
        from transformers.integrations import gguf
    except ImportError:  # before transformers 5.2x
        from transformers.integrations import ggml as gguf
    return gguf
