"""Names of the experts' tensors in model files, in the layouts of the Hub, and which expert of which site each one is.

Published files keep the names of the authors' own code, not those of transformers: Mixtral's experts are listed under
`block_sparse_moe.experts.0.w1`, Granite's under `input_linear`.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from mixoff.errors import CheckpointError
from mixoff.shapes.sites import Site

LAYER = r"(?P<path>(?:^|.*\.)layers\.(?P<layer>\d+)\.(?:.*\.)?"
# separate tensors per expert: Mixtral, Phi, MiniMax, LFM2 (w1, w2, w3), and nearly all others
EXPERT_KEY = re.compile(LAYER + r"experts)\.(?P<expert>\d+)\.(?P<name>\w+)\.weight$")
MATRICES = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}
MATRICES |= {name: name for name in ("gate_proj", "up_proj", "down_proj")}
# one tensor for a matrix of all experts: gpt-oss and what transformers saves; Aria; Granite
FUSED_KEY = re.compile(LAYER + r"experts)\.(?P<name>(?:gate_up|up|down)_proj(?:_bias)?|fc[12]\.weight)$")
LINEAR_KEY = re.compile(LAYER + r"block_sparse_moe)\.(?P<name>(?:in|out)put_linear)\.weight$")
PARTS = {"fc1.weight": "gate_up_proj", "fc2.weight": "down_proj"}
PARTS |= {"input_linear": "gate_up_proj", "output_linear": "down_proj"}

INTERLEAVED = ".experts.w13_weight"  # Inkling interleaves the rows of gate and up, which is not read here

# the matrices that make up a part, in order, if each expert has its own tensors
PIECES = {"gate_up_proj": ("gate_proj", "up_proj")}

Place = tuple[int, int | None, str]  # site, expert in it (None: all of them in one tensor), matrix or part


@dataclass(frozen=True)
class Key:
    """What a tensor's name says.

    - path: path of the set of experts.
    - layer: layer of the set.
    - expert: expert in the set; None if the tensor holds all of them.
    - part: matrix, or part of several matrices.
    """

    path: str
    layer: int
    expert: int | None
    part: str


def parse(name: str) -> Key | None:
    """The name taken apart; None for a tensor of the backbone.

    >>> parse("model.layers.3.block_sparse_moe.experts.5.w2.weight")
    Key(path='model.layers.3.block_sparse_moe.experts', layer=3, expert=5, part='down_proj')
    >>> parse("model.layers.3.mlp.experts.gate_up_proj_bias").part, parse("model.layers.3.mlp.gate.weight")
    ('gate_up_proj_bias', None)
    """
    if (m := EXPERT_KEY.match(name)) and m["name"] in MATRICES:
        return Key(m["path"], int(m["layer"]), int(m["expert"]), MATRICES[m["name"]])
    if m := FUSED_KEY.match(name) or LINEAR_KEY.match(name):
        return Key(m["path"], int(m["layer"]), None, PARTS.get(m["name"], m["name"]))
    return None


def by_place(names: Iterable[str], sites: Sequence[Site]) -> dict[Place, str]:
    """Names of the tensors of all sites by place. Raises CheckpointError if two have the same place."""
    sets: dict[int, dict[str, list[tuple[Key, str]]]] = defaultdict(lambda: defaultdict(list))
    for name in names:
        if key := parse(name):
            sets[key.layer][key.path].append((key, name))
    placed: dict[Place, str] = {}
    for layer in dict.fromkeys(site.layer for site in sites):
        at = [i for i, site in enumerate(sites) if site.layer == layer]
        for place, name in _of_layer(sets[layer], at, sites):
            if place in placed:
                raise CheckpointError(f"{name} and {placed[place]} are the same weight: keep one of them")
            placed[place] = name
    return placed


def _of_layer(
    sets: dict[str, list[tuple[Key, str]]], at: list[int], sites: Sequence[Site]
) -> Iterable[tuple[Place, str]]:
    """The places of one layer's tensors; `at` are the numbers of its sites."""
    if len(at) > 1 and len(sets) == 1:  # Ernie-VL: one list of experts, first those for text, then those for images
        owners = [(i, e) for i in at for e in range(sites[i].num_experts)]
        for key, name in next(iter(sets.values())):
            if key.expert is not None and key.expert < len(owners):
                yield (*owners[key.expert], key.part), name
        return
    for i in at:
        for key, name in sets.get(_nearest(sites[i].name, sets) or "", ()):
            yield (i, key.expert, key.part), name


def _nearest(site: str, paths: Iterable[str]) -> str | None:
    """The path most similar to the site's name by Jaccard index: transformers renames some of its words."""
    site_words = set(site.split("."))
    similarity = {}
    for path in paths:
        words = set(path.split("."))
        similarity[path] = len(site_words & words) / len(site_words | words)
    best = [path for path, value in similarity.items() if value == max(similarity.values())]
    if len(best) > 1:
        raise CheckpointError(f"{' and '.join(best)} may both be {site}: mixoff cannot tell these experts apart")
    return best[0] if best else None
