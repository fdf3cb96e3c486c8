"""What the doctor writes can be pasted: in Python, and by name where an engine takes names."""

from __future__ import annotations

import pytest

import equipoise
from equipoise.doctor import diagnose, render
from equipoise.doctor.remedies import policies
from equipoise.policies import policies_from

MEGATRON = (
    "torchrun --nproc_per_node 8 pretrain_gpt.py --num-experts {experts} --num-layers 4 --micro-batch-size 2 "
    "--global-batch-size 64 --moe-router-topk 2 --moe-aux-loss-coeff 1e-2 "
)
BIAS = "--moe-router-score-function sigmoid --moe-router-enable-expert-bias --moe-router-bias-update-rate 2e-3"


@pytest.mark.parametrize("more", ["", BIAS, "--moe-router-load-balancing-type seq_aux_loss"])
def test_both_spellings_are_one_policy(more):
    case = diagnose((MEGATRON.format(experts=8) + more).split())
    found = policies(case)
    for one in found[:-1]:
        (named,) = policies_from(one.name)
        written = eval(one.line, vars(equipoise))
        assert type(named) is type(written)
        assert repr(named) == repr(written)
    assert found[-1].at(case.host) == "MegatronBalancer(model, optimizer, [])"
    assert len(found) == (4 if more == BIAS else 3)


def test_every_line_names_what_takes_it():
    text = render(diagnose(MEGATRON.format(experts=8).split()))
    assert "with equipoise (docs/megatron.md):" in text
    assert '  MegatronBalancer(model, optimizer, ["global@0.01"])\n' in text
