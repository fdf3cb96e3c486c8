"""`equipoise conformance` finds in the released Megatron-core what its users reported, and nothing else."""

from __future__ import annotations

from pathlib import Path

import pytest

from equipoise.conformance import CHECKS, run_checks

pytestmark = [pytest.mark.engine, pytest.mark.filterwarnings("ignore")]

ADAPTERS = Path(__file__).parents[2] / "contracts" / "peers" / "_conformance.py"
EXPECTED = {
    "Megatron": {"padding alone": "not finite"},
    "MegatronSequence": {"padding": "off by 68%", "padding, ranks": "off by 69%", "padding alone": "not finite"},
    "MegatronGlobal": {
        "accumulation": "off by 33%",
        "ranks": "x 0.3333 = 1 / ranks",
        "ranks, accumulation": "off by 67%",
        "padding": "off by 68%",
        "padding, ranks": "off by 67%",
        "padding alone": "not finite",
    },
    "MegatronBias": {"recompute": "x 2", "padding": "Error", "padding, ranks": "Error", "padding alone": "Error"},
}


@pytest.mark.parametrize("name", EXPECTED)
def test_the_known_faults_and_no_others(name):
    found = {one.check.name: one for one in run_checks(f"{ADAPTERS}:{name}", timeout=120)}
    assert set(found) == {check.name for check in CHECKS}
    wrong = {check: " ".join(one.words[column] for column in one.wrong) for check, one in found.items() if one.wrong}
    assert set(wrong) == set(EXPECTED[name])
    for check, words in EXPECTED[name].items():
        assert words in wrong[check]
        assert found[check].known
