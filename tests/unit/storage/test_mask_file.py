"""Masks in a file: every bit comes back, and what is no such file is said."""

from __future__ import annotations

import pytest
import torch

from equipoise.errors import DataError, OutputError
from equipoise.storage.balancer_file import pack_state
from equipoise.storage.mask_file import MASKS, mask_file, read_masks, write_masks


@pytest.mark.parametrize("experts", [1, 7, 8, 9, 130])
def test_every_bit_comes_back(tmp_path, experts):
    draw = torch.Generator().manual_seed(experts)
    masks = {name: torch.rand(33, experts, generator=draw) < 0.5 for name in ("model.layers.0.mlp.gate", "b")}
    path = write_masks(masks, tmp_path)
    assert path == mask_file(tmp_path) == tmp_path / MASKS
    found = read_masks(tmp_path)
    assert found.keys() == masks.keys()
    assert all(torch.equal(found[name], masks[name]) for name in masks)
    assert path.stat().st_size < 33 * 2 * (experts / 8 + 1) + 1000  # eight experts to a byte


def test_what_is_no_such_file_is_said(tmp_path):
    assert mask_file(tmp_path) is None
    with pytest.raises(DataError, match="no such file"):
        read_masks(tmp_path)
    whole = write_masks({"gate": torch.ones(50, 8, dtype=torch.bool)}, tmp_path).read_bytes()
    for broken in (whole[:-20], b"", b"{}" * 40):
        (tmp_path / MASKS).write_bytes(broken)
        with pytest.raises(DataError, match="cut short"):
            read_masks(tmp_path)
    for experts in (-1, 7, 17, 8.0):  # of a byte each
        state = {
            "format": 1,
            "routers": {"gate": {"experts": experts, "visible": torch.zeros(5, 2, dtype=torch.uint8)}},
        }
        (tmp_path / MASKS).write_bytes(pack_state(state))
        with pytest.raises(DataError, match="another kind"):
            read_masks(tmp_path)
    with pytest.raises(OutputError):
        write_masks({"gate": torch.ones(5, 8, dtype=torch.bool)}, tmp_path / "nowhere" / "at all")
