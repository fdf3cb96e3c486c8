"""Power against simulated experiments."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from equipoise.evidence.power import detectable, pairs_needed, power


@pytest.mark.parametrize(("effect", "pairs"), [(0.006, 5), (0.006, 8), (0.012, 3), (0.0, 5)])
def test_power_is_the_share_of_experiments_that_see_it(effect, pairs):
    rng = np.random.default_rng(0)
    seen = stats.ttest_1samp(rng.normal(effect, 0.0058, (20_000, pairs)), 0, axis=1).pvalue < 0.05
    assert power(effect, 0.0058, pairs) == pytest.approx(seen.mean(), abs=0.01)


def test_a_detectable_difference_is_detected():
    for pairs in (3, 5, 8):
        assert power(detectable(0.0058, pairs), 0.0058, pairs) == pytest.approx(0.8, abs=1e-6)
    needed = pairs_needed(0.006, 0.0058)
    assert power(0.006, 0.0058, needed) >= 0.8 > power(0.006, 0.0058, needed - 1)
    assert power(1.0, 0.1, 1) == 0.0
