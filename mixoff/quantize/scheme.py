"""Which part of a model gets how many bits."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields, replace

from torch import Tensor

from mixoff.errors import MixoffError
from mixoff.quantize import rotation
from mixoff.quantize.layout import DEFAULT_SOLVER, GROUP_SIZES, METADATA_BITS, SOLVERS, check_format
from mixoff.quantize.solve import quantize
from mixoff.quantize.tensor import QTensor

# Schemes --------------------------------------------------------------------------------------------------------------

ROLES = ("attention", "experts", "shared_experts", "head", "embeddings")
KEPT = ("router", "norms")  # always in 16 bits
KEEP = "keep"  # in place of a solver: codes are those of the checkpoint
LAST = "down_proj"  # the last matrix of an expert, in every family


@dataclass(frozen=True)
class Precision:
    """Bits per weight, and weights per group, of one part of a model.

    rotated: whether inputs are rotated before they are rounded (see `rotation`); for the last matrix of an expert
    """

    bits: int
    group_size: int
    rotated: bool = False

    def __post_init__(self) -> None:
        check_format((1, max(GROUP_SIZES)), self.bits, self.group_size, max(METADATA_BITS))
        if type(self.rotated) is not bool:
            raise MixoffError(f"rotated is {self.rotated!r}: choose True or False")


@dataclass(frozen=True)
class Scheme:
    """Which part of a model gets how many bits; routers and norms always stay in 16.

    - attention, experts, shared_experts, head, embeddings: precision of that part; None leaves it in 16 bits.
    - down: precision of the last matrix of an expert; None is that of `experts`.
    - by_layer: precisions of an expert's first matrices and of its last one, for each layer with experts; if empty,
      `experts` and `down` hold for all layers.
    - metadata_bits: bits of each group's scale and minimum, 8 or 16.
    - solver: `"rtn"`, `"hqq"` or `"lsq"`, as in `quantize`; `"keep"` takes over the codes of the checkpoint, which then
      also decides the precisions.

    Mixtral-8x7B then takes (modelled, GiB): mixed 14.8, paper 17.1, small 13.0, quality 23.5, none 87.0. `paper` has
    the bits and groups of Eliseev and Mazur (arXiv 2312.17238, section 4.2); solver and metadata are ours.

    >>> Scheme.preset("mixed").precision("experts"), Scheme.preset("mixed").precision("router")
    (Precision(bits=2, group_size=64, rotated=False), None)
    """

    attention: Precision | None = None
    experts: Precision | None = None
    shared_experts: Precision | None = None
    head: Precision | None = None
    embeddings: Precision | None = None
    down: Precision | None = None
    by_layer: tuple[tuple[Precision, Precision], ...] = ()
    metadata_bits: int = 8
    solver: str = DEFAULT_SOLVER

    def __post_init__(self) -> None:
        for role in (*ROLES, "down"):
            if not isinstance(getattr(self, role), (Precision, type(None))):
                raise MixoffError(f"{role} of a scheme is a Precision or None, not {getattr(self, role)!r}")
        pairs = all(isinstance(pair, tuple) and len(pair) == 2 for pair in self.by_layer)
        if not pairs or not all(isinstance(precision, Precision) for pair in self.by_layer for precision in pair):
            raise MixoffError(f"by_layer of a scheme is a tuple of pairs of Precision, not {self.by_layer!r}")
        if self.experts is None and (self.down or self.by_layer):
            raise MixoffError("a scheme with `down` or `by_layer` quantizes experts: give `experts` too")
        if type(self.metadata_bits) is not int or self.metadata_bits not in METADATA_BITS:
            raise MixoffError(f"metadata_bits is {self.metadata_bits!r}: choose 8 or 16")
        if self.solver not in (*SOLVERS, KEEP):
            raise MixoffError(f"no solver {self.solver!r}: choose one of {', '.join(SOLVERS)}")

    @classmethod
    def preset(cls, name: str) -> Scheme:
        """The preset of that name, with an ending of HEADS also the head in 8 or 4 bits.

        >>> Scheme.preset("mixed+head8").head
        Precision(bits=8, group_size=64, rotated=False)

        Raises MixoffError, which lists the names.
        """
        base, plus, head = name.partition("+")
        if base not in PRESETS or (plus and (head not in HEADS or base == KEEP)):
            endings = " or ".join(f"+{head}" for head in HEADS)
            raise MixoffError(f"no scheme {name!r}: choose one of {', '.join(PRESETS)}, on request with {endings}")
        return replace(PRESETS[base], head=HEADS[head]) if plus else PRESETS[base]

    @property
    def keeps(self) -> bool:
        """Whether codes are taken over from the checkpoint."""
        return self.solver == KEEP

    def precision(self, role: str) -> Precision | None:
        """The precision of a part; None if it stays in 16 bits."""
        if role not in ROLES + KEPT:
            raise MixoffError(f"a model has no part {role!r}: choose one of {', '.join(ROLES + KEPT)}")
        return None if role in KEPT else getattr(self, role)

    def check_layers(self, count: int) -> None:
        """Raise MixoffError if `by_layer` is for a model with another number of layers with experts than `count`."""
        if self.by_layer and len(self.by_layer) != count:
            layers = f"it has {len(self.by_layer)} layers of experts, and this one {count}"
            raise MixoffError(f"this scheme is for another model: {layers}")

    def expert(self, part: str, site: int) -> Precision | None:
        """The precision of a matrix of an expert, by its name, in layer number `site` of those that have experts."""
        first, last = self.by_layer[site] if self.by_layer else (self.experts, self.down or self.experts)
        return last if part == LAST else first

    def precisions(self) -> set[Precision]:
        """All precisions that the scheme uses."""
        given = [getattr(self, role) for role in (*ROLES, "down")] + [p for pair in self.by_layer for p in pair]
        return {precision for precision in given if precision}

    def quantize(self, w: Tensor, role: str, each: Callable = map) -> QTensor | None:
        """`w` (N, K) quantized as a weight of that part; None if the part stays in 16 bits."""
        precision = self.precision(role)
        return None if precision is None else self.quantize_as(w, precision, each)

    def quantize_as(self, w: Tensor, precision: Precision, each: Callable = map) -> QTensor:
        """`w` (N, K) quantized in that precision by this scheme's solver; `each` as in `quantize`."""
        if precision.rotated:
            w = rotation.rotate(w)
        q = quantize(w, precision.bits, precision.group_size, self.solver, self.metadata_bits, each)
        return replace(q, rotated=precision.rotated)

    def to_json(self) -> str:
        """One line of JSON."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Scheme:
        """The inverse of `to_json`; raises MixoffError for anything else."""
        try:
            values = json.loads(text)
            values |= {role: values[role] and Precision(**values[role]) for role in ROLES}
            values["down"] = values.get("down") and Precision(**values["down"])  # stores of mixoff 0.1 lack these two
            values["by_layer"] = tuple(tuple(Precision(**p) for p in pair) for pair in values.get("by_layer", ()))
            if set(values) != {field.name for field in fields(cls)}:
                raise KeyError(*set(values) - {field.name for field in fields(cls)})
        except (TypeError, ValueError, KeyError, RecursionError) as error:
            raise MixoffError(f"not a scheme in JSON ({error}): {str(text)[:200]}") from None
        return cls(**values)


TWO, FOUR = Precision(2, 64), Precision(4, 64)
HEADS = {"head8": Precision(8, 64), "head4": FOUR}  # endings of a preset's name
PRESETS = {
    name: Scheme(attention=FOUR, experts=experts, shared_experts=FOUR, down=down)
    for name, experts, down in (
        ("mixed", TWO, Precision(3, 64, rotated=True)),
        ("paper", Precision(2, 16), None),
        ("small", TWO, Precision(2, 64, rotated=True)),
        ("quality", FOUR, None),
    )
} | {"none": Scheme(), KEEP: Scheme(metadata_bits=16, solver=KEEP)}
