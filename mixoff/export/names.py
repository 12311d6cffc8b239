"""Names that the Hub's files have for the weights of a model: those that transformers gives them when it saves one."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from mixoff.checkpoints import keys
from mixoff.errors import CheckpointError
from mixoff.shapes.sites import Part, Site, dtype_nbytes


@dataclass(frozen=True)
class Slice:
    """The part of a tensor on the Hub that a part of an expert fills.

    - name: name of the tensor.
    - shape: its shape, that of all experts where they are one tensor.
    - offset: first number in it.
    """

    name: str
    shape: tuple[int, ...]
    offset: int


class HubNames:
    """Names of a model's weights on the Hub; `backbone` has shapes of its other weights, under transformers' names.

    Raises CheckpointError for a model whose weights transformers joins or splits in a way that is not undone here.
    """

    def __init__(self, model: PreTrainedModel, sites: tuple[Site, ...]) -> None:
        self.model, self.sites = model, sites
        self.shapes = {name: tuple(t.shape) for name, t in _reverted(model, model.state_dict()).items()}
        self.places = keys.by_place(self.shapes, sites)
        experts = tuple(f"{site.name}." for site in sites)
        state = model.state_dict().items()
        self.backbone = {name: tuple(t.shape) for name, t in state if not name.startswith(experts)}

    def of_backbone(self, names: Iterable[str]) -> dict[str, str]:
        """Names on the Hub of weights under transformers' names; others already have the Hub's."""
        state = self.model.state_dict()
        found = {}
        for name in names:
            found[name] = name
            if name not in self.shapes and name in state:
                found[name], *more = _reverted(self.model, {name: state[name]})
                if more:
                    raise CheckpointError(f"the Hub has {name} in {1 + len(more)} tensors: this model is not exported")
        if len(set(found.values())) < len(found):
            raise CheckpointError("two weights have one name on the Hub: this model is not exported")
        return found

    def of_expert(self, i: int, e: int, part: Part) -> list[Slice]:
        """Where the numbers of a part of expert `e` of site `i` are, in order."""
        numel = part.nbytes // dtype_nbytes(part.dtype)
        if name := self.places.get((i, None, part.name)):
            return [Slice(name, self._expect(name, (self.sites[i].num_experts, *part.shape)), e * numel)]
        pieces = keys.PIECES.get(part.name, (part.name,))
        shape = part.shape[0] // len(pieces), *part.shape[1:]
        names = [self.places.get((i, e, matrix), "") for matrix in pieces]
        return [Slice(name, self._expect(name, shape), 0) for name in names]

    def _expect(self, name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
        if self.shapes.get(name) != shape:
            raise CheckpointError(
                f"transformers saves experts of {shape} as {name or 'something else'} {self.shapes.get(name, '')}: "
                f"this model ({type(self.model).__name__}) is not exported"
            )
        return shape


def _reverted(model: PreTrainedModel, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    from transformers.core_model_loading import revert_weight_conversion

    try:
        return revert_weight_conversion(model, dict(state))
    except Exception as error:  # transformers raises many kinds here; to the user all of them are one
        reason = str(error).strip().split("\n")[0]
        raise CheckpointError(f"transformers cannot name the weights of this model as on the Hub: {reason}") from error
