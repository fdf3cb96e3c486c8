"""The error tree: three parts, an exit code, a familiar base class, and safe travel between processes."""

from __future__ import annotations

import concurrent.futures
import copy
import inspect
import multiprocessing
import pickle
import re

import pytest

from equipoise import errors
from equipoise.errors import (
    ConfigError,
    DataError,
    DivergedError,
    EquipoiseError,
    InputError,
    OutputError,
    StateError,
    unknown_name,
)
from equipoise.policies.estimators import check_estimator

TREE = {
    EquipoiseError: (Exception, 1),
    ConfigError: (ValueError, 2),
    InputError: (ValueError, 2),
    StateError: (RuntimeError, 3),
    DivergedError: (RuntimeError, 1),
    DataError: (ValueError, 4),
    OutputError: (OSError, 5),
}
each = pytest.mark.parametrize("kind", TREE, ids=lambda kind: kind.__name__)


def test_the_tree_is_complete_and_drawn_in_the_docstring():
    classes = {c for _, c in inspect.getmembers(errors, inspect.isclass) if issubclass(c, EquipoiseError)}
    assert classes == set(TREE)
    drawn = errors.__doc__ or ""
    for kind, (base, code) in TREE.items():
        line = next(line for line in drawn.splitlines() if re.search(rf"\b{kind.__name__}\b", line))
        assert re.search(rf"\b{code}\b", line)
        assert base is Exception or base.__name__ in line


@each
def test_three_parts_and_an_exit_code(kind):
    base, code = TREE[kind]
    error = kind(expected="one", got="another", do="this")
    assert isinstance(error, EquipoiseError)
    assert isinstance(error, base)
    assert error.exit_code == code
    assert (error.expected, error.got, error.do) == ("one", "another", "this")
    assert str(error) == "expected one\n  got: another\n  do:  this"


@each
def test_no_part_can_be_left_out(kind):
    for missing in ("expected", "got", "do"):
        parts = {"expected": "a", "got": "b", "do": "c"}
        del parts[missing]
        with pytest.raises(TypeError, match=missing):
            kind(**parts)


@each
def test_errors_survive_pickling_and_copying(kind):
    error = kind(expected="ä {}", got="line\nbreak", do="%s")
    for again in (pickle.loads(pickle.dumps(error)), copy.copy(error), copy.deepcopy(error)):
        assert type(again) is kind
        assert (str(again), again.expected, again.got, again.do) == (str(error), error.expected, error.got, error.do)


def test_errors_arrive_whole_from_a_real_worker_process():
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=context) as pool:
        error = pool.submit(check_estimator, "exakt").exception(timeout=120)
    assert isinstance(error, ConfigError)
    assert error.do == "did you mean 'exact'?"


@pytest.mark.parametrize("name", ["softmx", "SOFTMAX", "", None, 3, ["softmax"], "zzz"])
def test_an_unknown_name_lists_all_and_suggests_only_what_is_near(name):
    error = unknown_name("gate", name, ("softmax", "sigmoid"))
    assert isinstance(error, ConfigError)
    assert error.expected == "a gate: sigmoid, softmax"
    assert error.got == repr(name)
    near = "softmax" in str(name) or name == "softmx"
    assert error.do == ("did you mean 'softmax'?" if near else "choose one of these")


def test_grammar():
    assert unknown_name("estimator", "x", ["prefix"]).expected == "an estimator: prefix"
