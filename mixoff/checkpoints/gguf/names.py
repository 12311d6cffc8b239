"""Which tensor of a GGUF file is which weight of transformers, and how llama.cpp rearranged its rows.

The names are those of the `gguf` package, which llama.cpp's converter goes by. Rows of q and k are rearranged in the
architectures whose rotary positions are computed pairwise in llama.cpp.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch

from mixoff.checkpoints.gguf.config import Facts
from mixoff.errors import CheckpointError

PAIRED = ("llama", "granitemoe")  # architectures whose rows of q and k are rearranged
# names of transformers that the package does not know, and names for them that it does
ALIASES = (
    (".block_sparse_moe.router.weight", ".block_sparse_moe.router.layer.weight"),
    (".e_score_correction_bias", ".e_score_correction.bias"),
)
ENDINGS = (".weight", ".bias")
PIECES = {"gate_up_proj": ("gate", "up"), "up_proj": ("up",), "down_proj": ("down",)}  # of a part of an expert


@dataclass(frozen=True)
class Rows:
    """Where the rows of a stored matrix go in the weight.

    - first: row of the weight for the first one.
    - step: distance of neighbours; 2 where the rows of two matrices alternate.
    - heads: number of heads in which llama.cpp has the two halves alternate; 0 for the order of transformers.
    """

    first: int = 0
    step: int = 1
    heads: int = 0

    def of(self, start: int, stop: int, count: int) -> slice | torch.Tensor:
        """Rows of the weight for rows `start` to `stop` of `count`."""
        if not self.heads:
            return slice(self.first + start * self.step, self.first + (stop - 1) * self.step + 1, self.step)
        order = torch.arange(count).view(self.heads, 2, -1).swapaxes(1, 2).flatten()
        return order[start:stop]


def backbone_names(facts: Facts, names: Iterable[str], config: Mapping[str, int]) -> dict[str, tuple[str, Rows]]:
    """The tensor of each weight of the backbone, and the order of its rows.

    - names: the weights of transformers' model, without experts.
    - config: number of heads, as in config.json.

    Raises CheckpointError if a tensor of the file has no place in the model.
    """
    from gguf.constants import MODEL_ARCH_NAMES
    from gguf.tensor_mapping import get_tensor_name_map

    arch = next(key for key, name in MODEL_ARCH_NAMES.items() if name == facts.arch)
    table = get_tensor_name_map(arch, facts.layers)
    placed = {}
    for name in names:
        known = name
        for ours, theirs in ALIASES:
            known = known.removesuffix(ours) + theirs if known.endswith(ours) else known
        stored = table.get_name(known, try_suffixes=ENDINGS) or known
        # gpt-oss: a parameter without an ending is `.weight` in the file
        stored = stored if stored in facts.tensors else f"{stored}.weight"
        if stored in facts.tensors:
            heads = _heads(facts.arch, stored, config)
            if heads and facts.tensors[stored].shape[0] % (2 * heads):
                raise CheckpointError(f"{facts.name} has {heads} heads, which do not divide {stored}: fetch it again")
            placed[name] = stored, Rows(heads=heads)
    return placed


def _heads(arch: str, name: str, config: Mapping[str, int]) -> int:
    if arch not in PAIRED:
        return 0
    if ".attn_q." in name:
        return config["num_attention_heads"]
    return config["num_key_value_heads"] if ".attn_k." in name else 0


def refuse_strangers(facts: Facts, used: Iterable[str]) -> None:
    """Raise CheckpointError if the model has no place for a tensor: what it computes would differ from llama.cpp's."""
    further = tuple(f"blk.{i}." for i in range(facts.layers, facts.number("block_count")))  # predict further tokens
    strangers = sorted(facts.tensors.keys() - set(used))
    strangers = [name for name in strangers if not (further and name.startswith(further))]
    if strangers:
        more = f" and {len(strangers) - 1} more" if len(strangers) > 1 else ""
        raise CheckpointError(
            f"{facts.name} holds {strangers[0]}{more}, for which transformers has no place in {facts.arch}: "
            "give mixoff the model's safetensors, or run the file with llama.cpp"
        )
