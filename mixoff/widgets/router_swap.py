"""A broken router: tokens go to experts at other ranks of their scores; loss and text beside it.

Letters: **E** experts per layer, **T** tokens. Everything is measured once, so that the widget works without a kernel.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import anywidget
import matplotlib.pyplot as plt
import numpy as np
import traitlets

from mixoff.widgets import browser

if TYPE_CHECKING:
    import torch
    from matplotlib.figure import Figure

WORDS = 8  # tokens that each router adds to the sentence


def pairs(experts: int) -> list[tuple[int, ...]]:
    """Ranks that may be used: each pair, and each alone."""
    both = [(i, j) for i in range(1, experts + 1) for j in range(i + 1, experts + 1)]
    return [*both, *((i,) for i in range(1, experts + 1))]


@contextlib.contextmanager
def swapped(model: Any, ranks: Sequence[int]) -> Iterator[None]:
    """Send every token of a Mixtral to the experts at these ranks of its scores, 1 the highest."""

    def elsewhere(router: Any, args: Any, out: Any) -> Any:
        chosen = out[0].topk(out[0].shape[-1]).indices[:, [rank - 1 for rank in ranks]]  # (T, K)
        weights = out[0].softmax(-1).gather(-1, chosen)  # (T, K)
        return out[0], weights / weights.sum(-1, keepdim=True), chosen

    hooks = [layer.mlp.gate.register_forward_hook(elsewhere) for layer in model.model.layers]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


class RouterSwap(anywidget.AnyWidget):
    """Choose two ranks, or one, and see the loss and how a sentence goes on.

    model: a Mixtral of transformers. windows: ids (W, T) of text for the loss. sentence: ids (1, T) to go on from.
    decode: ids to text. `.losses` holds nats per token by ranks, measured over `windows`; `.summary()` the ends of the
    scale, and `.figure()` a still figure.
    """

    _esm = browser.module("router_swap")
    _css = browser.style("router_swap")
    experts = traitlets.Int().tag(sync=True)
    rows = traitlets.List().tag(sync=True)  # ranks, loss, text
    lead = traitlets.Unicode().tag(sync=True)
    uniform = traitlets.Float().tag(sync=True)  # loss if every token were equally likely
    about = traitlets.Unicode().tag(sync=True)

    def __init__(self, model: Any, windows: torch.Tensor, sentence: torch.Tensor, decode: Callable[..., str]) -> None:
        E, (W, T) = model.config.num_local_experts, windows.shape
        self.losses: dict[tuple[int, ...], float] = {}
        texts = {}
        for ranks in pairs(E):
            with swapped(model, ranks):
                self.losses[ranks] = round(_loss(model, windows), 3)
                texts[ranks] = _goes_on(model, sentence, decode)
        super().__init__(
            experts=E, rows=[[list(ranks), loss, texts[ranks]] for ranks, loss in self.losses.items()],
            lead=decode(sentence[0], skip_special_tokens=True), uniform=float(np.log(model.config.vocab_size)),
            about=f"nats per token (measured, {W} windows of {T} tokens)",
        )  # fmt: skip

    def summary(self) -> str:
        """Loss as trained, the best without the first rank, and the worst, in one line."""
        without = {ranks: loss for ranks, loss in self.losses.items() if 1 not in ranks}
        best, worst = min(without, key=lambda r: without[r]), max(self.losses, key=lambda r: self.losses[r])
        named = {"as trained": (1, 2), "best without rank 1": best, "worst": worst}
        return "; ".join(f"{name}, {_words(ranks)}: {self.losses[ranks]:.2f}" for name, ranks in named.items())

    def figure(self) -> Figure:
        """Loss of each pair as a still figure, single ranks on the diagonal."""
        grid = np.full((self.experts, self.experts), np.nan)
        for ranks, loss in self.losses.items():
            grid[ranks[0] - 1, ranks[-1] - 1] = grid[ranks[-1] - 1, ranks[0] - 1] = loss
        fig, ax = plt.subplots(figsize=(5, 3.8))
        image = ax.imshow(grid, cmap="cividis", origin="upper")
        for (i, j), loss in np.ndenumerate(grid):
            ink = "white" if loss < (grid.min() + grid.max()) / 2 else "black"
            ax.text(j, i, f"{loss:.1f}", ha="center", va="center", fontsize=8, color=ink)
        ticks = range(self.experts), range(1, self.experts + 1)
        ax.set(xlabel="rank of the one expert", ylabel="rank of the other")
        ax.set_xticks(*ticks)
        ax.set_yticks(*ticks)
        fig.colorbar(image, label="loss, nats per token")
        return fig

    def __repr__(self) -> str:
        return f"RouterSwap({len(self.rows)} routers of {self.experts} experts)"


def _words(ranks: Sequence[int]) -> str:
    return f"ranks {ranks[0]} and {ranks[1]}" if len(ranks) == 2 else f"rank {ranks[0]} alone"


def _loss(model: Any, windows: torch.Tensor) -> float:
    import torch

    with torch.no_grad():
        return float(model(windows, labels=windows).loss)


def _goes_on(model: Any, sentence: torch.Tensor, decode: Callable[..., str]) -> str:
    """The most probable next tokens."""
    out = model.generate(sentence, max_new_tokens=WORDS, do_sample=False, pad_token_id=0)
    return decode(out[0, sentence.shape[1] :], skip_special_tokens=True)
