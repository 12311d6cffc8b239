"""What stock tools cannot do with a model whose experts are served: each is refused in one sentence with the way out.

torch, transformers, accelerate, safetensors and peft treat such a model as an ordinary one. They would silently save,
copy or convert it without its experts. So `serve` replaces the model's class by one that refuses, and its experts
refuse calls that bypass the model.
"""

from __future__ import annotations

import copy
import functools
import re
import sys
import weakref
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, NoReturn, SupportsIndex

import numpy as np
import torch
from torch import nn

from mixoff.checkpoints.keys import MATRICES
from mixoff.errors import MixoffError
from mixoff.runtime.runtime import Runtime
from mixoff.shapes import sites
from mixoff.shapes.config import expert_modules

if TYPE_CHECKING:
    from peft import PeftConfig


RESTORE = "mixoff.restore the model first"
MERGE = "merge the adapter into the base model (merge_and_unload)"
# what is refused: (why, way out for a model from `load`, way out for a model from `offload`)
WAYS_OUT = {
    "save": ("save_pretrained would lose them", "use mixoff.convert, or copy the folder", RESTORE),
    "bytes": (
        "state_dict has their names and shapes alone",
        f"use mixoff.convert, or copy the folder; after mixoff.offload, {RESTORE}",
        RESTORE,
    ),
    "copy": ("a copy or a pickle would lose them", "call mixoff.load again where a second model is needed", RESTORE),
    "cast": ("they cannot change their dtype or device", "choose these with mixoff.load(dtype=…, device=…)", RESTORE),
    "autocast": ("autocast cannot reach them", "run without it, and choose with mixoff.load(dtype=…)", RESTORE),
    "implementation": ("no other implementation can reach them", "load the model with transformers", RESTORE),
    "adapter": ("an adapter cannot change them", f"{MERGE}, save it, and mixoff.load that", f"{RESTORE}, and {MERGE}"),
}  # fmt: skip


def refusal(what: str, loaded: bool) -> MixoffError:
    """The error for one row of WAYS_OUT. loaded: True for a model from `load`, False for one from `offload`."""
    why, *ways = WAYS_OUT[what]
    return MixoffError(f"this model's experts are offloaded, and {why}: {ways[0 if loaded else 1]}")


class Served:
    """Put before a model's class: refuses whatever would lose the experts; a new instance is an ordinary model."""

    _loaded, _plain = False, nn.Module
    _adapters: Adapters

    def __new__(cls, *args: Any, **kwargs: Any) -> nn.Module:
        return cls._plain(*args, **kwargs)  # for `type(model)(config)` and `type(model).from_pretrained`

    def _refuse(self, what: str) -> NoReturn:
        raise refusal(what, self._loaded)

    def save_pretrained(self, *args: object, **kwargs: object) -> None:
        """Refused: the files would lack the experts."""
        self._refuse("save")

    def __reduce_ex__(self, protocol: SupportsIndex) -> NoReturn:
        self._refuse("copy")

    def set_experts_implementation(self, experts_implementation: str | dict) -> None:
        """Refused for anything but `mixoff`."""
        wanted = experts_implementation
        if set(wanted.values() if isinstance(wanted, dict) else [wanted]) != {"mixoff"}:
            self._refuse("implementation")

    def _apply(self, fn: Any, *args: Any, **kwargs: Any) -> nn.Module:
        if (sample := _sample(self)) is not None:
            changed = fn(sample)
            if (changed.dtype, changed.device) != (sample.dtype, sample.device):
                self._refuse("cast")
        return super()._apply(fn, *args, **kwargs)  # type: ignore[misc]  # of the model's class, which comes next

    @property
    def peft_config(self) -> Adapters:
        """Configurations of the adapters by name, as PEFT reads and writes them."""
        return self._adapters

    @peft_config.setter
    def peft_config(self, adapters: Mapping[str, PeftConfig]) -> None:
        if adapters is not self._adapters:
            self._adapters.clear()
            self._adapters.update(adapters)

    @peft_config.deleter
    def peft_config(self) -> None:
        self._adapters.clear()


class Loaded(Served):
    """The same for a model from `load`, which is also a context manager that closes it."""

    _loaded = True
    mixoff: Runtime

    def __enter__(self) -> nn.Module:
        return self

    def __exit__(self, *exc: object) -> None:
        self.mixoff.close()


@functools.cache
def _served(base: type[nn.Module], loaded: bool) -> type[nn.Module]:
    # __module__ is the base's, or transformers takes the class for custom code
    members = {"__module__": base.__module__, "__doc__": base.__doc__, "_plain": base}
    return type(base.__name__, (Loaded if loaded else Served, base), members)


def serve(model: nn.Module, runtime: Runtime, loaded: bool) -> ExitStack:
    """Let `runtime` serve the experts of `model`, which then refuses what would lose them; closing the result ends it.

    Raises MixoffError, and changes nothing, if an adapter of the model covers experts.
    """
    modules = expert_modules(model)
    adapters = Adapters(model, modules, loaded)
    adapters.update(original := vars(model).get("peft_config", {}))
    with ExitStack() as undo:
        undo.callback(_give_back, vars(model), original, adapters)
        vars(model).pop("peft_config", None)
        for i, (module, site) in enumerate(zip(modules.values(), runtime.source.sites, strict=True)):
            undo.push(_mark(module, Place(runtime, i, loaded), site))
        for part in dict.fromkeys((model, model.base_model)):
            _change_class(part, adapters, loaded, undo)
        return undo.pop_all()


def _change_class(model: nn.Module, adapters: Adapters, loaded: bool, undo: ExitStack) -> None:
    original = model.__class__
    model._adapters = adapters
    undo.callback(delattr, model, "_adapters")
    model.__class__ = _served(getattr(original, "_plain", original), loaded)
    undo.callback(setattr, model, "__class__", original)


def check(backbone: nn.Module, dtype: torch.dtype | None, kind: str, loaded: bool) -> None:
    """Refuse a pass on a `kind` of device that would give the experts activations of another dtype than `dtype`."""
    if dtype is None:
        return
    if dtype_of(backbone) != dtype:
        raise refusal("cast", loaded)
    if torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind) != dtype:
        raise refusal("autocast", loaded)


def dtype_of(backbone: nn.Module) -> torch.dtype | None:
    """The dtype that `check` expects; None if the model has no floating-point weight."""
    return None if (sample := _sample(backbone)) is None else sample.dtype


def _sample(model: nn.Module) -> torch.Tensor | None:
    """An empty tensor of the dtype and on the device of the model's weights."""
    weight = next((p for p in model.parameters() if p.is_floating_point()), None)
    return None if weight is None else torch.empty(0, dtype=weight.dtype, device=weight.device)


# Experts --------------------------------------------------------------------------------------------------------------


class Place(tuple):
    """(runtime, site) of a module of experts, where `experts_forward` finds it. Cannot be copied."""

    loaded: bool

    def __new__(cls, runtime: Runtime, site: int, loaded: bool) -> Place:
        place = super().__new__(cls, (runtime, site))
        place.loaded = loaded
        return place

    def __reduce_ex__(self, protocol: SupportsIndex) -> NoReturn:
        raise refusal("copy", self.loaded)


class Elsewhere(torch.Tensor):
    """A weight of all experts of a site in a `state_dict`: name, shape and dtype, but no bytes.

    Tools that only list or filter a `state_dict` keep working; those that save or copy it get an error with the reason.
    """

    @staticmethod
    def __new__(cls, shape: tuple[int, ...], dtype: torch.dtype) -> Elsewhere:
        return torch.Tensor._make_wrapper_subclass(cls, shape, dtype=dtype)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func in STAYS and isinstance(args[0], cls):
            return args[0]
        if func is _T.numpy and sys._getframe(1).f_globals.get("__name__") == OFFLOADER:
            return np.zeros(1)
        if func not in TELLS:
            raise refusal("bytes", loaded=True)
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **kwargs or {})

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        raise refusal("bytes", loaded=True)

    def __repr__(self) -> str:
        return f"Elsewhere(shape={tuple(self.shape)}, dtype={self.dtype})"


_T = torch.Tensor
STAYS = {_T.detach, _T.cpu, _T.to, _T.view}
# accelerate writes a `state_dict` to disk by name, but reads back only what modules hold: never experts' weights
OFFLOADER = "accelerate.utils.offload"
TELLS = {_T.size, _T.dim, _T.numel, _T.nelement, _T.element_size, _T.is_floating_point, _T.stride, _T.is_contiguous}
TELLS |= {_T.__len__, *(getattr(_T, name).__get__ for name in ("shape", "dtype", "device", "layout", "requires_grad"))}
TELLS |= {getattr(_T, name).__get__ for name in ("ndim", "nbytes", "itemsize", "is_meta", "is_sparse", "is_quantized")}


def _mark(module: nn.Module, place: Place, site: sites.Site) -> ExitStack:
    """Give a module of experts its place, and its names in a `state_dict`; loading that skips these names."""
    kept = {p.name: Elsewhere((site.num_experts, *p.shape), sites.torch_dtype(p.dtype)) for p in site.parts}

    def named(_: nn.Module, state: dict, prefix: str, *rest: object) -> None:
        state.update({prefix + name: weight for name, weight in kept.items()})

    def unread(_: nn.Module, state: dict, prefix: str, *rest: object) -> None:
        for name in (prefix + name for name in kept):
            if isinstance(state.get(name), Elsewhere):
                del state[name]

    undo = ExitStack()
    module._mixoff = place
    undo.callback(delattr, module, "_mixoff")
    undo.callback(module.register_state_dict_post_hook(named).remove)
    undo.callback(module.register_load_state_dict_pre_hook(unread).remove)
    return undo


# Adapters -------------------------------------------------------------------------------------------------------------


def within(model: nn.Module) -> nn.Module:
    """The transformers model inside a `PeftModel`; any other model is returned as it is."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def check_adapters(model: nn.Module) -> None:
    """Refuse a model in memory if one of its adapters already wraps experts."""
    if any(name.endswith(("base_layer", "original_module")) for name in expert_modules(model)):
        why, _, _ = WAYS_OUT["adapter"]
        raise MixoffError(f"an adapter of this model covers experts, and {why} once they are offloaded: {MERGE} first")


def watch(wrapper: nn.Module, model: nn.Module, undo: ExitStack) -> None:
    """Make a `PeftModel` around the served `model` ask it before it adds another adapter."""
    tuner = getattr(wrapper, "base_model", None)
    if tuner is not None and "peft_config" in vars(tuner):
        undo.callback(setattr, tuner, "peft_config", tuner.peft_config)
        tuner.peft_config = model.peft_config


def _give_back(members: dict, original: dict, adapters: Adapters) -> None:
    """Put the model's current adapters back where PEFT looks for them, into the dict that was there."""
    current = dict(adapters)
    original.clear()
    original.update(current)
    if original:
        members["peft_config"] = original


class Adapters(dict):
    """PEFT's configurations of a model by adapter: PEFT adds one here before it changes a layer.

    One that covers experts is refused: PEFT would not find them, and drop its weights with a warning at most.
    """

    def __init__(self, model: nn.Module, modules: Iterable[str], loaded: bool) -> None:
        super().__init__()
        self.model, self.loaded, self.names = weakref.ref(model), loaded, [*_names(modules)]

    def __setitem__(self, name: str, config: PeftConfig) -> None:
        if _has_experts(config, self.model(), self.names):
            raise refusal("adapter", self.loaded)
        super().__setitem__(name, config)

    def update(self, *args: Any, **kwargs: Any) -> None:
        """Add configurations one by one, so that each is checked."""
        for name, config in dict(*args, **kwargs).items():
            self[name] = config


def _names(modules: Iterable[str]) -> Iterable[str]:
    """Names by which an adapter may refer to experts: the module, its weights, and transformers 4's weights."""
    weights = ("gate_up_proj", "up_proj", "down_proj", "gate_up_proj_bias", "up_proj_bias", "down_proj_bias")
    for path in modules:
        yield path
        yield from (f"{path}.{name}" for name in {*weights, *MATRICES})
        yield from (f"{path}.0.{name}" for name in MATRICES)


def _has_experts(config: PeftConfig, model: nn.Module, names: list[str]) -> bool:
    """Whether PEFT would look for experts: for their weights, or for names that no backbone module has."""
    config = _as_read(config, model)
    parameters, targets, saved = (
        getattr(config, kind, None) or () for kind in ("target_parameters", "target_modules", "modules_to_save")
    )
    if isinstance(targets, str):
        pattern = re.compile(targets)
        targets = ()
        if any(pattern.fullmatch(name) for name in names):
            return True
    backbone = [name for name, _ in model.named_modules()]
    lacking = [name for name in targets if not any(_ends(module, name) for module in backbone)]
    spelt = [name for name in targets if "experts" in name.split(".")]
    wanted = (*parameters, *lacking, *saved)
    return bool(spelt) or any(_ends(expert, name) for name in wanted for expert in names)


def _as_read(config: PeftConfig, model: nn.Module) -> PeftConfig:
    """The configuration as PEFT reads it for this version of transformers, which renamed experts' weights."""
    try:
        from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers
    except ImportError:  # an older PEFT does not convert names
        return config
    config = copy.deepcopy(config)
    convert_peft_config_for_transformers(config, model=model, conversions=None)
    return config


def _ends(name: str, target: str) -> bool:
    return name == target or name.endswith(f".{target}")
