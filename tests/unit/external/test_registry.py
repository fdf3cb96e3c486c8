"""Registrations: of a class or a name, for subclasses too, replaced by the next one, refused where they say nothing."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import pytest
from torch import nn

from contracts.law._external import Gate
from equipoise import ConfigError, register_router
from equipoise.external.output_formats import format_of
from equipoise.external.registry import REGISTERED, registered_for


@pytest.fixture(autouse=True)
def registered() -> Iterator[None]:
    """A test's registrations are undone."""
    before = dict(REGISTERED)
    yield
    REGISTERED.clear()
    REGISTERED.update(before)


def read(module: Any, args: tuple, kwargs: dict, output: Any) -> Any:
    return output


@pytest.mark.parametrize(
    ("arguments", "options", "expected"),
    [
        ((Gate(),), {"gate": "softmax"}, "a class of torch modules"),
        ((Gate,), {}, "read=, how to find"),
        ((Gate,), {"gate": "softmx"}, "a gate"),
        ((Gate, None, lambda o, w, i: o), {"gate": "softmax"}, "read=, how to find"),
    ],
)
def test_what_cannot_be_registered_is_refused(arguments: tuple, options: dict, expected: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(expected)):
        register_router(*arguments, **options)
    assert Gate not in REGISTERED


@pytest.mark.parametrize("key", [Gate, "Gate"])
def test_subclasses_and_classes_that_fsdp2_made_are_meant_too(key: Any) -> None:
    assert registered_for(Gate()) is None
    register_router(key, read)
    assert registered_for(type("FSDPGate", (Gate,), {})()) == REGISTERED[key]
    assert registered_for(nn.Linear(1, 1)) is None


def test_the_nearest_class_counts_and_the_last_registration() -> None:
    class Mine(Gate): ...

    register_router(Gate, read)
    register_router(Mine, gate="sigmoid")
    found = registered_for(Mine())
    assert found is not None and (found.read, found.gate) == (None, "sigmoid")
    register_router(Mine, gate="softmax")
    assert format_of(Mine()).gate == "softmax"


def test_a_registration_goes_before_the_table() -> None:
    """A class of the name of one that cannot be balanced may be described."""
    router = type("DogeCDMoE", (nn.Module,), {})()
    assert format_of(router).unsupported
    register_router("DogeCDMoE", read)
    assert not format_of(router).unsupported


def test_the_error_says_what_a_reader_returns() -> None:
    with pytest.raises(ConfigError) as caught:
        register_router(Gate)
    assert "(logits, weights, ids)" in caught.value.do
