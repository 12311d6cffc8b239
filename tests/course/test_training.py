"""How the bundled models were made: a card from stored figures, a student's loss, and its first weights."""

import argparse
import json

import pytest
import torch
from transformers import AutoModelForCausalLM

import distil
import model_card
import train_tiny
from mixoff import models
from tiny import BUNDLED, resident


def test_the_bundled_card_is_made_from_the_stored_figures():
    folder = models.path()
    figures, training = (json.loads((folder / f"{name}.json").read_text("utf8")) for name in ("figures", "training"))
    card = model_card.card(AutoModelForCausalLM.from_pretrained(folder), figures, training)
    assert card == (folder / "README.md").read_text(encoding="utf8")


def begun(tmp_path, name):
    distil.begin(argparse.Namespace(student=name, folder=tmp_path / name))
    return train_tiny.build(tmp_path / name)


def test_a_student_learns_the_teachers_probabilities(tmp_path):
    """The loss is KL in plain arithmetic, none of it reaches the teacher, and the teacher itself has none."""
    teacher, student = train_tiny.build(BUNDLED).eval(), begun(tmp_path, "four")
    ids = torch.randint(3, 4096, (2, 12), generator=torch.Generator().manual_seed(0))
    loss, balance, _ = train_tiny.losses(student, ids, ids, 2, teacher)
    with torch.no_grad():
        p, q = (model(ids, use_cache=False).logits.double().softmax(-1) for model in (teacher, student))
    assert loss.item() == pytest.approx(float((p * (p / q).log()).sum(-1).mean()), rel=1e-4) and balance > 0
    loss.backward()
    assert all(w.grad is None for w in teacher.parameters()) and student.lm_head.weight.grad is not None
    assert abs(train_tiny.losses(teacher, ids, ids, 2, teacher)[0].item()) < 1e-5


def test_four_begins_as_the_pruned_teacher(tmp_path):
    student, teacher = begun(tmp_path, "four"), resident(BUNDLED)
    for mine, theirs, kept in zip(student.model.layers, teacher.model.layers, distil.KEPT, strict=True):
        assert torch.equal(mine.mlp.gate.weight, theirs.mlp.gate.weight[list(kept)])
        assert torch.equal(mine.mlp.experts.down_proj, theirs.mlp.experts.down_proj[list(kept)])
    assert torch.equal(student.model.embed_tokens.weight, teacher.model.embed_tokens.weight)


def test_dense_begins_as_the_mean_of_two_experts_and_can_be_trained(tmp_path):
    """One network whose output is the mean of two; Muon steps through it, though it is wider than the model."""
    student, teacher = begun(tmp_path, "dense"), resident(BUNDLED)
    x, one = torch.randn(3, 192), torch.ones(3, 1)
    for i in (0, 7):
        mine, theirs = student.model.layers[i].mlp.experts, teacher.model.layers[i].mlp.experts
        pair = torch.tensor([distil.KEPT[i][:2]] * 3)
        with torch.no_grad():
            want = theirs(x, pair, torch.full((3, 2), 0.5))
            assert (mine(x, torch.zeros(3, 1, dtype=torch.long), one) - want).abs().max() < 1e-4
    experts = student.model.layers[0].mlp.experts
    before = experts.down_proj.detach().clone()
    muon = train_tiny.Muon([experts.gate_up_proj, experts.down_proj], student.config.intermediate_size)
    muon.param_groups[0]["lr"] = 0.01
    ids = torch.randint(3, 4096, (1, 8), generator=torch.Generator().manual_seed(0))
    train_tiny.losses(student, ids, ids, 1)[0].backward()
    muon.step()
    assert not torch.equal(experts.down_proj, before) and experts.down_proj.isfinite().all()
