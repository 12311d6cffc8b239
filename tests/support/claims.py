"""What tests of the chapters' claims share: the bundled model and its traces, and a chapter's words."""

import functools

import torch

import badges
import chapter_rules
import mixoff
import nb


@functools.cache
def words(number):
    """All that a chapter says, in text, code and captions, with line breaks as spaces."""
    path = next(path for path in badges.chapters() if path.name.startswith(number))
    cells = nb.read(path).cells
    pieces = [cell.source for cell in cells] + [t for c in cells if c.cell_type == "code" for t in outputs(c)]
    return " ".join(" ".join(pieces).split())


def outputs(cell):
    """The texts of a cell's outputs."""
    return list(chapter_rules.output_texts(cell))


@functools.cache
def traces():
    """The traces that the bundled model brings, by domain."""
    return mixoff.trace.load_domains(mixoff.models.path() / "traces.npz")


@functools.cache
def plain():
    """The bundled model in plain transformers, and its tokenizer."""
    from transformers import AutoModelForCausalLM

    from mixoff.text.generation import load_tokenizer

    torch.set_num_threads(1)
    folder = mixoff.models.path()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="float32", experts_implementation="grouped_mm")
    return model, load_tokenizer(folder)
