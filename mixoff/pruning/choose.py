"""Which experts stay: those that a text uses most, or those without which it is predicted worst.

Letters: **B** windows, **T** tokens of a window, **E** experts, **L** sites.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

from mixoff.errors import MixoffError
from mixoff.pruning.routers import Narrowed

ROUNDS = 4  # at most so often are a layer's experts judged again: with 8 of 128 gone, the others matter about as before

Kept = tuple[tuple[int, ...], ...]


def checked(kept: Sequence[Sequence[int]], sites: int, experts: int, top_k: int) -> Kept:
    """Experts to keep, ascending, from a list for each site. Raises MixoffError for lists that no store can have."""
    lists = [sorted(set(map(int, site))) for site in kept]
    if len(lists) != sites or len({len(site) for site in lists}) > 1 or list(map(len, lists)) != list(map(len, kept)):
        raise MixoffError(f"give each of {sites} layers a list of the experts that stay, all of one length, none twice")
    check_number(len(lists[0]), experts, top_k)
    if odd := next((e for site in lists for e in site if not 0 <= e < experts), None):
        raise MixoffError(f"there is no expert {odd}: they have numbers from 0 to {experts - 1}")
    return tuple(map(tuple, lists))


def check_number(keep: int | None, experts: int, top_k: int) -> None:
    """Raise MixoffError for a number of experts that cannot stay."""
    if not isinstance(keep, int) or isinstance(keep, bool) or not top_k <= keep <= experts:
        raise MixoffError(
            f"cannot keep {keep!r} experts per layer: each token uses {top_k}, and there are {experts}; "
            f"give a number from {top_k} to {experts}"
        )


def passes(sites: int, experts: int, keep: int) -> int:
    """How often `by_loss` reads its text.

    >>> passes(sites=8, experts=8, keep=4)  # eight layers: 8 experts left out in turn, then 7, 6 and 5
    208
    """
    return sites * sum(experts - gone for gone in _gone(experts, keep)[:-1])


def _gone(experts: int, keep: int) -> list[int]:
    """How many experts of a layer are gone before each round, and after the last."""
    rounds = min(ROUNDS, experts - keep)
    return [(experts - keep) * n // rounds for n in range(rounds + 1)] if rounds else [0]


@torch.inference_mode()
def loss(model: PreTrainedModel, ids: Tensor) -> float:
    """Cross-entropy of the next token in nats, mean over windows (B, T)."""
    total = 0.0
    for window in ids.to(model.device):
        predicted = model(window[None], use_cache=False).logits[0, :-1].float()  # (T - 1, V)
        total += F.cross_entropy(predicted, window[1:]).item()
    return total / len(ids)


def counts(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """How often a text (B, T) chooses each expert, (L, E)."""
    with Narrowed(model) as narrowed:
        loss(model, ids)
        return narrowed.counts


def by_counts(model: PreTrainedModel, ids: Tensor, keep: int) -> Kept:
    """The `keep` experts of each site that a text (B, T) chooses most often; of equals, the first."""
    order = counts(model, ids).argsort(dim=1, descending=True, stable=True)  # (L, E)
    return tuple(tuple(sorted(site)) for site in order[:, :keep].tolist())


def by_loss(model: PreTrainedModel, ids: Tensor, keep: int, told: Callable[[int], object] = lambda n: None) -> Kept:
    """The `keep` experts of each site that are left when those go whose absence raises the loss of a text (B, T) least.

    Greedy, layer after layer, each in at most ROUNDS rounds that see what is gone already. Lu et al. (arXiv 2402.14800)
    choose by the error of a layer's output instead, among all subsets. `told` gets the passes made since the last call.
    """
    with Narrowed(model) as narrowed:
        for i, site in enumerate(narrowed.kept):
            gone, left = _gone(len(site), keep), list(site)
            for before, after in zip(gone, gone[1:], strict=False):
                without = {}
                for e in left:
                    narrowed.keep(i, [other for other in left if other != e])
                    without[e] = loss(model, ids)
                    told(1)
                dropped = sorted(left, key=without.__getitem__)[: after - before]
                left = [e for e in left if e not in dropped]
            narrowed.keep(i, left)
        return tuple(map(tuple, narrowed.kept))
