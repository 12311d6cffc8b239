"""Writes a store with fewer experts per layer, which loads, plans and serves like any other."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

from torch import Tensor
from transformers import PreTrainedModel

from mixoff.checkpoints.find import Folder, find
from mixoff.checkpoints.shards import LocalShards
from mixoff.errors import CheckpointError, MixoffError, suggestion
from mixoff.loading.load import load
from mixoff.pruning import choose
from mixoff.pruning.choose import Kept
from mixoff.pruning.layout import lay_out
from mixoff.pruning.merge import check
from mixoff.pruning.routers import stored_routers
from mixoff.shapes.config import configured_top_k, read_config, skeleton
from mixoff.store.convert import make, refuse_existing
from mixoff.store.making import Options
from mixoff.store.stored import StoreCheckpoint
from mixoff.text import calibration

BY = ("loss", "counts")
TOKENS = 5120  # of the text


def prune(
    source: str | Path,
    target: str | Path,
    keep: int | None = None,
    by: str | Sequence[Sequence[int]] = "loss",
    *,
    merge: bool = False,
    text: str | Path = "default",
    tokens: int = TOKENS,
    progress: bool | None = None,
) -> Path:
    """Write the store `source` with `keep` experts per layer into the new folder `target`; returns the target.

    - source: a store, in any scheme; a checkpoint has to be converted first.
    - target: the folder to create; it appears only when it is complete.
    - keep: experts per layer that stay, from K to E. None takes the length of the lists in `by`.
    - by: `"loss"` drops, one after the other, the experts whose absence raises the loss of a text least; `"counts"`
      keeps those that the text chooses most often; or a list of the experts to keep for each layer.
    - merge: whether an expert that leaves is averaged into the most similar one that stays.
    - text: text to choose by, a file or `"default"`; judge the result on another.
    - tokens: how much of the text is read, in windows of 256.
    - progress: whether to show bars on standard error; None shows them on a terminal.

    Lossy, and notebooks/13_fewer_experts has the price. Experts that stay keep their bytes, so a store from which none
    leaves is the same to the byte. What was interrupted leaves `target.partial`. Raises MixoffError for a number or
    lists that do not suit the model, and CheckpointError for a family whose routers cannot lose a row.
    """
    refuse_existing(target := Path(target))
    store = _opened(find(source), merge)
    sites = store.source.sites
    kept = _given(store, keep, by)
    fewer = (keep or len(kept[0])) < sites[0].num_experts
    counts = None
    if fewer and (merge or isinstance(by, str)):
        ids = calibration.read(text, store.folder, tokens).ids
        with load(store.folder, prefetch="none") as model:
            kept = _chosen(model, ids, keep or 0, by, progress) if isinstance(by, str) else kept
            counts = choose.counts(model, ids) if merge else None
    way = by if isinstance(by, str) else "lists"
    facts = {"by": way, "merged": merge, "of": sites[0].num_experts, "kept": kept} if fewer else {}
    with closing(LocalShards(store)) as shards:
        return make(shards, lay_out(store, kept, facts, counts), target, Options(progress=progress)).target


def _opened(folder: Folder, merge: bool) -> StoreCheckpoint:
    """The store in `folder`, if it can be pruned."""
    if not folder.is_store:
        raise CheckpointError(f"{folder} is not a store: `mixoff convert {folder} STORE` makes one, and that is pruned")
    store = StoreCheckpoint(folder)
    if merge:
        check(store.source.sites[0])
    stored_routers(skeleton(read_config(folder.path)), store.source.sites, store.source.backbone.items())
    return store


def _given(store: StoreCheckpoint, keep: int | None, by: str | Sequence[Sequence[int]]) -> Kept:
    """The experts that stay, checked; all of them where they are still to be chosen."""
    sites, top_k = store.source.sites, configured_top_k(read_config(store.folder))
    if isinstance(by, str):
        if by not in BY:
            raise MixoffError(f"cannot choose experts by {by!r}: give one of {', '.join(BY)}{suggestion(by, BY)}")
        choose.check_number(keep, sites[0].num_experts, top_k)
        return tuple(tuple(range(site.num_experts)) for site in sites)
    kept = choose.checked(by, len(sites), sites[0].num_experts, top_k)
    if keep not in (None, len(kept[0])):
        raise MixoffError(f"keep is {keep!r}, and the lists keep {len(kept[0])} per layer: leave keep out")
    return kept


def _chosen(model: PreTrainedModel, ids: Tensor, keep: int, by: str, progress: bool | None) -> Kept:
    from tqdm.auto import tqdm

    if by == "counts":
        return choose.by_counts(model, ids, keep)
    sites = model.mixoff.source.sites
    total = choose.passes(len(sites), sites[0].num_experts, keep)
    hidden = not (sys.stderr.isatty() if progress is None else progress)
    with tqdm(total=total, disable=hidden, unit="pass", desc="choosing") as bar:
        return choose.by_loss(model, ids, keep, bar.update)
