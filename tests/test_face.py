"""The face of the package: every public name, typed, documented, and seen by editors as it is."""

import ast
import inspect

import pytest

import mixoff

NAMES = [
    "BudgetError", "CacheInfo", "CheckpointError", "Event", "ExpertCache", "MixoffError", "Plan", "QTensor",
    "Runtime", "Scheme", "Simulation", "Trace", "convert", "load", "offload", "plan", "prune", "restore", "simulate",
    "verify",
]  # fmt: skip
ROOMS = [
    "bench", "cache", "checkpoints", "errors", "kernels", "loading", "models", "planning", "quality", "quantize",
    "runtime", "shapes", "store", "text", "trace", "transfer", "units",
]  # fmt: skip
FUNCTIONS = [name for name in NAMES if name[0].islower()]


def test_every_public_name_is_listed():
    assert sorted(mixoff.__all__) == sorted(NAMES + ROOMS) and set(NAMES) <= set(dir(mixoff))


def test_type_checkers_see_the_same_names(root):
    tree = ast.parse((root / "mixoff/__init__.py").read_text(encoding="utf-8"))
    block = next(node for node in tree.body if isinstance(node, ast.If))
    imported = {alias.name: node.module for node in block.body for alias in node.names}
    homes = {name: f"mixoff.{home}" for name, home in mixoff._HOMES.items()} | dict.fromkeys(ROOMS, "mixoff")
    assert imported == homes and (root / "mixoff/py.typed").exists()


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_are_typed_and_documented(name):
    function = getattr(mixoff, name)
    signature = inspect.signature(function)
    untyped = [p.name for p in signature.parameters.values() if p.annotation is inspect.Parameter.empty]
    assert untyped == [] and signature.return_annotation is not inspect.Signature.empty
    undocumented = [
        p for p in signature.parameters if f"{p}:" not in function.__doc__ and f"`{p}`" not in function.__doc__
    ]
    assert undocumented == [], f"{name} does not say what these are"


@pytest.mark.parametrize("name", [name for name in NAMES if name not in FUNCTIONS])
def test_classes_are_typed_and_documented(name):
    kind = getattr(mixoff, name)
    assert len(kind.__doc__) > 20
    for key, member in vars(kind).items():
        function = getattr(member, "__func__", getattr(member, "fget", member))
        if key.startswith("_") or not inspect.isfunction(function):
            continue
        parameters = list(inspect.signature(function).parameters.values())
        untyped = [p.name for p in parameters if p.annotation is p.empty and p.name not in ("self", "cls")]
        assert (untyped, function.__doc__ is not None) == ([], True), f"{name}.{key}"
