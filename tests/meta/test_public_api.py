"""The public face: every exported name exists, is sorted, says what it is, and shows itself in an example that runs."""

from __future__ import annotations

import doctest
import importlib
import inspect
import types

import pytest

MODULES = ["equipoise", "equipoise.functional", "equipoise.layers", "equipoise.plot", "equipoise.policies"]
NO_EXAMPLE = (  # what these are is shown by those that use them
    "ConfigError", "DataError", "InputError", "OutputError", "StateError",  # the root of the tree has the example
    "Routing",  # what `route` returns
)  # fmt: skip


def names():
    for name in MODULES:
        module = importlib.import_module(name)
        for public in module.__all__:
            yield pytest.param(module, public, id=f"{name}.{public}")


def ruff_order(name: str) -> tuple[int, str]:
    """CONSTANTS, Classes, functions."""
    return (0 if name.isupper() else 1 if name[0].isupper() else 2), name


@pytest.mark.parametrize("name", MODULES)
def test_all_is_sorted_and_true(name):
    module = importlib.import_module(name)
    assert module.__doc__
    assert list(module.__all__) == sorted(set(module.__all__), key=ruff_order)
    assert all(hasattr(module, public) for public in module.__all__)


@pytest.mark.parametrize(("module", "public"), list(names()))
def test_every_public_name_is_documented_with_an_example(module, public):
    thing = getattr(module, public)
    if not (inspect.isclass(thing) or inspect.isfunction(thing)):
        assert public.isupper() or isinstance(thing, types.UnionType)
        return
    own = thing.__doc__
    if public in NO_EXAMPLE and public.endswith("Error"):
        return
    assert own, "no docstring"
    assert not own.startswith(f"{public}("), "the docstring that a dataclass or tuple writes by itself"
    if public not in NO_EXAMPLE:
        examples = doctest.DocTestFinder(recurse=True).find(thing, public)
        assert any(test.examples for test in examples), "no example"


def test_what_the_readme_needs_is_at_the_top():
    import equipoise

    assert {"AuxLoss", "Balancer", "ExpertBias", "MoE", "Router", "Sequences", "Switch", "ZLoss"} <= set(
        equipoise.__all__
    )
    assert equipoise.__version__.count(".") == 2
