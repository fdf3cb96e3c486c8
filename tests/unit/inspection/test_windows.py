"""Streams of token ids are cut into windows by domain, read back, and left out where they are too short."""

from __future__ import annotations

import numpy as np
import pytest

from equipoise.errors import ConfigError, DataError
from equipoise.inspection.windows import check_length, read_windows, write_windows

STREAMS = [("b", np.arange(7)), ("a", np.arange(100, 105)), ("b", np.arange(7, 10)), ("c", np.arange(3))]


def test_windows_are_those_of_each_domain_in_a_row(tmp_path):
    made = write_windows(tmp_path, lambda: iter(STREAMS), 4)
    assert (made.domains, made.windows, made.equal) == (["a", "b"], [1, 2], 1)
    assert made.read(1, 0, 9).tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]] and made.read(0, 1, 2).shape == (0, 4)
    assert made.problems == ["c: left out, its 3 tokens are less than a window of 4"]
    assert read_windows(tmp_path) == made
    assert sorted(path.name for path in tmp_path.iterdir()) == ["000.bin", "001.bin", "index.json"]


def test_ids_are_counted_and_have_to_be_the_models(tmp_path):
    made = write_windows(tmp_path, lambda: iter(STREAMS), 4)
    counts = made.frequency(104, windows=1)
    assert counts.sum() == 12 and counts[:8].tolist() == [1] * 8 and counts[100:].tolist() == [1] * 4
    with pytest.raises(DataError, match="below the model's 103"):
        made.frequency(103)


def test_what_is_no_index_is_no_windows(tmp_path):
    assert read_windows(tmp_path) is None
    (tmp_path / "index.json").write_text('{"domains": ["a"]}')
    assert read_windows(tmp_path) is None


def test_text_that_fills_no_window_is_an_error(tmp_path):
    with pytest.raises(DataError, match="a domain with at least one window of 20 tokens"):
        write_windows(tmp_path, lambda: iter(STREAMS), 20)


@pytest.mark.parametrize(("length", "longest"), [(1, None), (9, 8)])
def test_a_length_that_the_model_has_no_positions_for(length, longest):
    check_length(8, 8)
    with pytest.raises(ConfigError, match=f"--length {length}"):
        check_length(length, longest)
