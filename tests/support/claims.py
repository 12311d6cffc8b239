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


@functools.cache
def library():
    """Token ids of the held-out texts, by domain."""
    _, tokenizer = plain()
    return {
        name: tokenizer(text, return_tensors="pt")["input_ids"][0] for name, text in mixoff.models.heldout().items()
    }


def routed(ids):
    """Which experts the routers choose for token ids (T,), asked in one pass: a trace."""
    model, _ = plain()
    with torch.no_grad():
        logits = model(ids[None], output_router_logits=True).router_logits  # L of (T, E)
    return mixoff.Trace.from_array(torch.stack([layer.topk(2).indices for layer in logits], 1).numpy(), num_experts=8)
