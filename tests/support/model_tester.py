"""transformers' own tests of a model, over tiny families, with or without their experts offloaded: a file that pytest
runs in a folder with `common/`, transformers' `tests/test_modeling_common.py`. See test_model_tester.py.

With MIXOFF_OFFLOAD=1 `model.eval()` offloads to 40 kB, or the least that runs; what is refused to an offloaded model is
preceded by the way out that the refusal names, `mixoff.restore`.
"""

import os
import re
import sys
import unittest
import warnings

import torch
import transformers
from common.test_modeling_common import ModelTesterMixin, ids_tensor
from transformers import PreTrainedModel

import mixoff
from mixoff import BudgetError
from mixoff.loading.refusals import Served
from mixoff.shapes import config
from tiny import config_of

TESTED = ("deepseek_v3", "ernie4_5_moe", "glm4_moe", "granitemoe", "mixtral", "olmoe", "phimoe", "qwen3_moe")
FAST = 40_000  # bytes
offloads = 0


def offload(model):
    """With 40 kB, or the least that is needed."""
    try:
        mixoff.offload(model, FAST, scope="global")
    except BudgetError as error:
        least = int(re.search(r"raise it to ([\d,]+) bytes", str(error))[1].replace(",", ""))
        mixoff.offload(model, least, scope="global")


def evaluated(self):
    """`eval`, after which experts are served."""
    global offloads
    if isinstance(self, PreTrainedModel) and "mixoff" not in vars(self) and config.expert_modules(self):
        weights = [w for m in config.expert_modules(self).values() for w in m.parameters(recurse=False)]
        if weights and all(w.device.type == "cpu" and w.dtype != torch.float64 for w in weights):
            with warnings.catch_warnings(action="ignore"):
                offload(self)
            offloads += 1
    return torch.nn.Module.train(self, False)


def restored_first(name, callers=None):
    """A method that restores an offloaded model, or the one of which this is the backbone, before it is what it was.

    callers: modules whose calls are meant, None for any.
    """

    def method(self, *args, **kwargs):
        if callers is None or sys._getframe(1).f_globals["__name__"] in callers:
            mixoff.restore(self._adapters.model())
            return getattr(self, name)(*args, **kwargs)
        return getattr(super(Served, self), name)(*args, **kwargs)

    return method


if os.environ.get("MIXOFF_OFFLOAD") == "1":
    PreTrainedModel.eval = evaluated
    for name in ("save_pretrained", "__reduce_ex__", "set_experts_implementation", "_apply", "train", "state_dict"):
        setattr(Served, name, restored_first(name))
    Served.named_parameters = restored_first("named_parameters", ("common.test_modeling_common",))


class Tester:
    """What ModelTesterMixin wants to know of a family."""

    def __init__(self, family):
        self.config, self.batch_size, self.seq_length, self.is_training = config_of(family), 3, 7, True
        self.hidden_size, self.num_hidden_layers = self.config.hidden_size, self.config.num_hidden_layers
        self.num_attention_heads = self.config.num_attention_heads

    def get_config(self):
        return type(self.config).from_dict(self.config.to_dict())

    def prepare_config_and_inputs_for_common(self):
        ids = ids_tensor([self.batch_size, self.seq_length], self.config.vocab_size)
        return self.get_config(), {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def case(family):
    """A test case of ModelTesterMixin for one family."""
    name = config.model_class(config_of(family)).__name__.removesuffix("ForCausalLM")
    classes = tuple(getattr(transformers, f"{name}{kind}") for kind in ("Model", "ForCausalLM"))

    def set_up(self):
        self.model_tester = Tester(family)

    members = {"setUp": set_up, "all_model_classes": classes, "test_all_params_have_gradient": False}
    return type(f"{name}Test", (ModelTesterMixin, unittest.TestCase), members)


globals().update({f"{family}_case": case(family) for family in TESTED})


def test_models_were_offloaded():
    assert (offloads > 100) == (os.environ.get("MIXOFF_OFFLOAD") == "1")
