"""Several processes that share the experts of one model: each rank holds, caches and reads only its own.

Letters: **T** tokens of a call, **K** experts per token, **E** experts, **D** model width.
Every rank has the whole backbone and reads the same tokens. Of the router's choice it computes the rows of its own
experts and leaves zeros for the others; the sum over the ranks then has every row. Bytes are added, and a byte plus
zeros is that byte, so the output equals that of one process bit for bit, for any K and dtype. The price is that K rows
per token are exchanged, where a rank could add up its own rows first.

The processes come from torchrun, or from `torch.distributed` in any other way; gloo connects CPUs, NCCL GPUs.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from mixoff.errors import MixoffError
from mixoff.shapes.sites import Site

WAIT = timedelta(seconds=60)  # for the slowest rank's experts of one layer, from the slowest disk


class Ranks:
    """One rank's share of the experts of all sites; by default one process, which holds them all.

    - whole: the sites of the model.
    - sites: the same with only as many experts as this rank holds.
    - held: numbers of these experts, by site.
    """

    def __init__(self, sites: Sequence[Site], rank: int = 0, count: int = 1) -> None:
        if any(site.num_experts < count for site in sites):
            least = min(site.num_experts for site in sites)
            raise MixoffError(f"{count} processes cannot share {least} experts per layer: start at most {least}")
        self.rank, self.count, self.whole = rank, count, tuple(sites)
        self.held = [share(site.num_experts, rank, count) for site in sites]
        self.sites = tuple(replace(site, num_experts=len(mine)) for site, mine in zip(sites, self.held, strict=True))
        self.group: Any = None

    def connect(self, facts: Mapping[str, object]) -> None:
        """Meet the other ranks. Raises MixoffError if `facts`, on which bits depend, differ between them."""
        if self.count == 1:
            return
        theirs = self.gathered(dict(facts))
        with reported(self.rank):
            self.group = dist.new_group(timeout=WAIT)
        for rank, found in enumerate(theirs):
            for name, value in facts.items():
                if found[name] != value:
                    raise MixoffError(
                        f"ranks must compute alike, and {name} is {value} on rank {self.rank} and {found[name]} on "
                        f"rank {rank}: make them the same"
                    )

    def agree(self, tokens: torch.Tensor) -> None:
        """Check that all ranks begin a pass over the same ids (B, T), or embeddings of the same shape (B, T, D)."""
        if self.count == 1:
            return
        ids = tokens.new_zeros(0) if tokens.is_floating_point() else tokens.flatten().long()
        order = torch.arange(1, len(ids) + 1, device=ids.device)
        mine = torch.stack([order.new_tensor(tokens.shape[0]), order.new_tensor(tokens.shape[1]), (ids * order).sum()])
        theirs = [torch.empty_like(mine) for _ in range(self.count)]
        with reported(self.rank):
            dist.all_gather(theirs, mine)
        if any(not torch.equal(mine, other) for other in theirs):
            raise MixoffError(
                f"rank {self.rank} does not read what the other ranks read: every rank must make the same calls, with "
                "the same text, seed and options"
            )

    def gathered(self, mine: Any) -> list[Any]:
        """What each rank gave, in order."""
        theirs = [mine] * self.count
        if self.count > 1:
            with reported(self.rank):
                dist.all_gather_object(theirs, mine)
        return theirs

    def joined(self, rows: torch.Tensor) -> torch.Tensor:
        """`rows` of all ranks, contiguous, each zero on every rank but one; in place."""
        if self.count > 1:
            with reported(self.rank):
                dist.all_reduce(rows.view(-1).view(torch.uint8), group=self.group)
        return rows


def share(experts: int, rank: int, count: int) -> range:
    """The experts of `rank`: neighbours, as many as any other rank has, or one more.

    >>> [share(8, rank, 3) for rank in range(3)]
    [range(0, 2), range(2, 5), range(5, 8)]
    """
    return range(experts * rank // count, experts * (rank + 1) // count)


def launched() -> bool:
    """Whether this process is one of several that torchrun started."""
    return dist.is_available() and dist.is_torchelastic_launched()


def device_of(device: str | torch.device) -> str | torch.device:
    """The device of this rank: `"auto"` takes the GPU with its number on this machine. Never run with a GPU."""
    number = os.environ.get("LOCAL_RANK")
    if device != "auto" or number is None or not torch.cuda.is_available():
        return device
    torch.cuda.set_device(int(number))
    return f"cuda:{number}"


def of_group(sites: Sequence[Site]) -> Ranks:
    """This process's share in torch.distributed's group, which is joined if torchrun started this process.

    Raises MixoffError where there is no group.
    """
    if not dist.is_available():
        raise MixoffError("this build of PyTorch has no torch.distributed: install another one")
    if not dist.is_initialized():
        if not launched():
            raise MixoffError(
                "there is only this process to share experts with: start several with torchrun --nproc-per-node N, or "
                "call torch.distributed.init_process_group first"
            )
        dist.init_process_group()
    return Ranks(sites, dist.get_rank(), dist.get_world_size())


@contextmanager
def reported(rank: int) -> Iterator[None]:
    """Turn the errors of a lost connection into a MixoffError."""
    try:
        yield
    except RuntimeError as error:  # also dist.DistBackendError and dist.DistNetworkError
        reason = str(error).strip().split("\n")[0]
        raise MixoffError(
            f"rank {rank} lost the other ranks: one of them ended, or did not answer ({reason}). Its own message says "
            "why; then start all ranks again"
        ) from error
