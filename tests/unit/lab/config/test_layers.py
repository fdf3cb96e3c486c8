"""Which layers a command line names, and what is no list of layers."""

from __future__ import annotations

import pytest

from equipoise.errors import ConfigError
from equipoise.lab.config.layers import layers_of


def test_layers_are_counted_from_either_end():
    assert layers_of("", 3) == [0, 1, 2]
    assert layers_of("-1, 0", 4) == [0, 3]
    assert layers_of("1-2,2", 4) == [1, 2]


@pytest.mark.parametrize("wrong", ["2", "x", "1-", "-3", "0,,1", "1-0"])
def test_what_is_no_list_of_layers(wrong):
    with pytest.raises(ConfigError, match="0 to 1: this model has 2 routers"):
        layers_of(wrong, 2, "routers")
