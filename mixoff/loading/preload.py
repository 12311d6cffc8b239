"""Fills a card's tiers before the first answer, in the order of the files, while kernels are compiled.

Otherwise the first answer would read expert by expert as routers ask, at random, and compile at every new shape. That
takes minutes, in silence. What is filled changes nothing that a model computes.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import TYPE_CHECKING

from mixoff.cache.cache import NONE
from mixoff.cache.events import Key
from mixoff.loading import warmup
from mixoff.transfer.streams import DeviceTransfer

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from mixoff.runtime.runtime import Runtime

PATIENCE_S = 3  # a shorter wait shows no bar


def fill(model: PreTrainedModel) -> None:
    """Fill the slots and the places in RAM of a model from `load`, with a bar on standard error; counts stay 0.

    Raises the OSError or CheckpointError of a failed read. Kernels that do not compile now are left to their first use.
    """
    from tqdm import tqdm

    runtime: Runtime = model.mixoff
    compiling = threading.Thread(target=warmup.compile_on_card, args=(model,), daemon=True)
    compiling.start()
    if runtime._policy != NONE and not runtime.whole_layers:
        total = sum(runtime.source.sites[site].expert_nbytes for site, _ in _wanted(runtime))
        with tqdm(total=total, desc="experts", unit="B", unit_scale=True, delay=PATIENCE_S, leave=False) as bar:
            for nbytes in _filled(runtime):
                bar.update(nbytes)
    compiling.join()
    runtime.reset_counts()


def _filled(runtime: Runtime) -> Iterator[int]:
    """Fetch what the slots hold, then what only RAM holds; yields bytes."""
    sites, slots = runtime.source.sites, runtime.slots
    for i, site in enumerate(sites):
        room = min(slots, site.num_experts) if runtime.scope == "global" else runtime.cache.pools[i].capacity
        if room:
            runtime.serve(i, list(runtime.ranks.held[i][:room]), lambda weights: None)
            yield room * site.expert_nbytes
        slots -= room
    if isinstance(runtime.transfer, DeviceTransfer):
        resident = runtime.cache.slot_of
        for key in runtime.transfer.stock(key for key in _every(runtime) if key not in resident):
            yield sites[key[0]].expert_nbytes


def _every(runtime: Runtime) -> Iterator[Key]:
    """Every expert in the order of the files."""
    return ((i, e) for i, held in enumerate(runtime.ranks.held) for e in held)


def _wanted(runtime: Runtime) -> list[Key]:
    """As many experts as slots and RAM hold together."""
    kept = runtime.transfer.kept if isinstance(runtime.transfer, DeviceTransfer) else 0
    return list(_every(runtime))[: runtime.slots + kept]
