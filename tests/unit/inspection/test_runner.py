"""Rounds run every window of every domain once, without the token that begins a text, and resume at a round."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from equipoise.errors import ConfigError, DataError
from equipoise.inspection.accumulator import Accumulator, Sizes
from equipoise.inspection.routers import find_routers
from equipoise.inspection.runner import Runner
from equipoise.inspection.windows import write_windows

S, V, E = 4, 11, 4
CPU = torch.device("cpu")


class Gate(nn.Module):
    """Chooses by the token id alone: expert id % 4 first."""

    def forward(self, ids_T):
        z = torch.nn.functional.one_hot(ids_T % E, E).float() * 3
        weights, ids = z.softmax(-1).topk(1)
        return z, weights, ids


class Model(nn.Module):
    def __init__(self, skip=0):
        super().__init__()
        self.gate, self.skip, self.calls = Gate(), skip, []

    def forward(self, ids_BS):
        self.calls.append(ids_BS.clone())
        return self.gate(ids_BS.reshape(-1)[self.skip :])


def runner(folder, *, begin=None, skip=0):
    model = Model(skip)
    windows = write_windows(folder / "tokens", lambda: iter([("a", np.arange(12) % V), ("b", np.arange(4))]), S)
    routers = find_routers(model, lambda: model(torch.arange(8).view(1, 8)))
    model.calls.clear()
    sizes = Sizes(2, windows.windows, windows.equal, S, 1, 0)
    accumulator = Accumulator(routers, sizes, windows.frequency(V), CPU)
    loaded = SimpleNamespace(forward=model, device=CPU)
    return Runner(accumulator, windows, loaded, None, [], begin, 2), model


def test_every_window_is_run_once_by_rounds(tmp_path):
    made, model = runner(tmp_path)
    told = []
    made.run(tmp_path / "state", 1e9, lambda *progress: told.append(progress))
    assert told == [(1, 2, 12), (2, 2, 16)]
    assert [len(ids) for ids in model.calls] == [2, 1, 1]
    counts = made.accumulator.state["counts_DLE"][:, 0]
    assert counts[0].tolist() == np.bincount(np.arange(12) % V % E, minlength=E).tolist()
    assert counts[1].tolist() == [1] * 4


def test_the_token_that_begins_a_text_is_run_and_not_counted(tmp_path):
    made, model = runner(tmp_path, begin=9)
    made.run(tmp_path / "state", 1e9, None)
    assert all(ids.shape[1] == S + 1 and (ids[:, 0] == 9).all() for ids in model.calls)
    assert made.accumulator.state["counts_DLE"][1, 0].tolist() == [1] * 4


def test_it_resumes_behind_the_last_save_to_the_same_sums(tmp_path):
    whole, _ = runner(tmp_path / "whole")
    whole.run(tmp_path / "whole" / "state", 1e9, None)
    first, _ = runner(tmp_path / "cut")

    def stop(done, rounds, tokens):
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        first.run(tmp_path / "cut" / "state", 0.0, stop)
    second, model = runner(tmp_path / "cut")
    second.run(tmp_path / "cut" / "state", 0.0, None)
    assert len(model.calls) == 1, "one round was saved"
    for name, tensor in whole.accumulator.state.items():
        assert torch.equal(tensor, second.accumulator.state[name]), name


def test_sums_of_another_inspection_are_refused(tmp_path):
    first, _ = runner(tmp_path)
    first.run(tmp_path / "state", 0.0, None)
    second, _ = runner(tmp_path)
    second.accumulator.state["counts_DLE"] = torch.zeros(3, 1, E)
    with pytest.raises(DataError, match="another counts_DLE"):
        second.run(tmp_path / "state", 0.0, None)


def test_a_router_that_misses_tokens_is_named(tmp_path):
    made, _ = runner(tmp_path, skip=1)
    with pytest.raises(ConfigError, match="sees each of 8 tokens once: gate"):
        made.run(tmp_path / "state", 1e9, None)
