"""Every example in a docstring is run."""

import doctest
import importlib
import pkgutil

import pytest

import mixoff

MODULES = sorted(
    name for _, name, _ in pkgutil.walk_packages(mixoff.__path__, "mixoff.") if not name.endswith("__main__")
)


@pytest.mark.parametrize("name", MODULES)
def test_examples_of(name):
    assert doctest.testmod(importlib.import_module(name)).failed == 0


def test_there_are_examples():
    """The check cannot pass by finding nothing."""
    found = sum(len(t.examples) for n in MODULES for t in doctest.DocTestFinder().find(importlib.import_module(n)))
    assert found >= 15
