"""Recorded choices and predictions against gates that are applied by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from equipoise.adaptive import RecordedChoices, prefetch_hits, record_choices
from equipoise.adaptive.choices import most_used
from unit.adaptive._models import adaptable, language_model


@pytest.mark.parametrize("threshold", [0.0, 0.4])
def test_what_is_used_and_what_the_layer_before_would_choose(threshold):
    lm = language_model(layers=3)
    model, ids = adaptable(lm), torch.randint(40, (2, 9), generator=torch.Generator().manual_seed(0))
    limits = dict.fromkeys(model.routers, threshold)
    found = record_choices(model, [ids[:1], ids[1:]], limits)
    inputs: list[torch.Tensor] = []
    gates = [layer.mlp.gate for layer in lm.model.layers]
    handles = [gate.register_forward_pre_hook(lambda _m, args: inputs.append(args[0])) for gate in gates]
    with model.dropping(limits), torch.no_grad():
        lm(ids[:, :-1])
    for handle in handles:
        handle.remove()
    assert found.used_TLK.shape == found.predicted_TLK.shape == (16, 3, 2) and found.num_experts == [6, 6, 6]
    dropped = 0
    for i, gate in enumerate(gates):
        weights, chosen = (inputs[i] @ gate.weight.T).softmax(-1).topk(2)
        gone = weights[:, 1] / weights.sum(-1) < threshold
        dropped += int(gone.sum())
        want = torch.stack([chosen[:, 0], chosen[:, 1].masked_fill(gone, -1)], dim=1)
        assert np.array_equal(found.used_TLK[:, i], want.numpy())
        if i:
            ahead = (inputs[i - 1] @ gate.weight.T).topk(2).indices
            assert np.array_equal(found.predicted_TLK[:, i], ahead.numpy())
    assert (found.predicted_TLK[:, 0] == -1).all() and bool(dropped) == bool(threshold)
    with torch.no_grad():
        assert all(gate.drop_threshold is None for gate in gates), "the model is as it was"


def test_hits_are_shares_of_what_is_used():
    used = np.array([[[0, 1], [2, 3]], [[4, -1], [1, -1]], [[0, 2], [2, 0]]])
    ahead = np.array([[[-1, -1], [3, 5]], [[-1, -1], [1, 2]], [[-1, -1], [4, 5]]])
    share_L, whole_L = prefetch_hits(RecordedChoices(used, ahead, [6, 6]))
    assert np.isnan(share_L[0]) and share_L[1] == 2 / 5 and whole_L[1] == 1 / 3
    busiest_LK = most_used(RecordedChoices(used, ahead, [6, 6]), 2)
    assert busiest_LK.tolist() == [[0, 1], [2, 0]]
    share_L, _ = prefetch_hits(RecordedChoices(used, ahead, [6, 6]), busiest_LK)
    assert share_L.tolist() == [3 / 5, 3 / 5]
