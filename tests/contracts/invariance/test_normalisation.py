"""A coefficient reaches the gradient as coef * grad L, whatever the engine divides by, and metrics are the step's."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from contracts.invariance._case import SEQUENCES, Case, make_data, policies_of
from contracts.invariance._judge import architecture_of, judge, tokens_of
from contracts.invariance._reference import reference
from contracts.law._reference import History

pytestmark = pytest.mark.xdist_group("ranks")

COEF = 3.0


def pushed(ranks, case: Case, early: bool = False) -> dict[str, Tensor]:
    """What the optimizer is given with the coefficient, less what it is given without."""
    call = "contracts.invariance._worker:first_gradients"
    run = [ranks.run(call, case, coef, early, size=case.ranks)[0] for coef in (COEF, 0.0)]
    return {name: run[0][name].double() - run[1][name].double() for name in run[0]}


def whole_batch(ranks, case: Case) -> dict[str, Tensor]:
    """coef * grad L, L the mean over all tokens of the step, as if one process had seen them at once."""
    weights = ranks.run("contracts.invariance._worker:first_weights", case, size=1)[0]
    data, alone = make_data(case, 0), case._replace(ranks=1, micro=1, shards=1)
    table = tokens_of(alone, data, 0)
    tokens = [t for t in table.tokens if t.valid]
    at = torch.tensor([[t.sequence, t.place] for t in tokens]).T
    expected = reference(
        weights, architecture_of(case), tokens, data.x_NSD[at[0], at[1]], data.target_NSD[at[0], at[1]],
        [p | {"coef": COEF} for p in policies_of(case) if p["kind"] != "bias"], History(),
        language_weights=[0.0] * len(tokens), token_weights=[1 / len(tokens)] * len(tokens), rows={(0, 0): SEQUENCES},
    )  # fmt: skip
    return expected.gradients


def holds(ranks, case: Case, early: bool = False) -> None:
    got, truth = pushed(ranks, case, early), whole_batch(ranks, case)
    for name, push in got.items():
        error, size = (push - truth[name]).abs().max(), truth[name].abs().max()
        assert error <= 1e-5 * max(size, 1e-3), f"{name}: error {error:.3g} of {size:.3g}"
    assert max(truth[name].abs().max() for name in got) > 0.1


def test_means_per_micro_batch_divided_by_their_number(ranks):
    """B01, B07: the engine divides by M and by world; a policy that did too would be M or world times too weak."""
    for micro in (1, 4):
        holds(ranks, Case(1, micro, policy="sequence"))
        holds(ranks, Case(2, micro, policy="sequence"))


def test_ddp_divides_by_world(ranks):
    for world in (1, 2, 4):
        holds(ranks, Case(world, 2, engine="ddp", policy="sequence"))


def test_fsdp2_averages_over_its_shards(ranks):
    for world in (1, 2, 4):
        holds(ranks, Case(world, 2, engine="fsdp2", policy="sequence"))


def test_hsdp_averages_over_both_axes(ranks):
    holds(ranks, Case(4, 2, engine="hsdp", policy="sequence"))
    holds(ranks, Case(4, 2, 2, engine="hsdp", policy="sequence"))


@pytest.mark.parametrize("engine", ["ddp", "fsdp2", "hsdp"])
def test_the_balancer_may_be_made_before_the_engine_wraps_the_model(ranks, engine):
    """FSDP2 replaces the parameters that the balancer watches."""
    holds(ranks, Case(4, 2, engine=engine, policy="sequence"), early=True)


@pytest.mark.parametrize("engine", ["plain", "ddp", "fsdp2"])
def test_token_sums_divided_by_the_tokens_of_the_step(ranks, engine):
    """B03, B05, B10: the engine multiplies by world what it averages afterwards; T is the step's router tokens."""
    for batch in ("equal", "padded", "uneven"):
        holds(ranks, Case(2, 2, batch=batch, engine=engine, loss="sum", policy="sequence"))


@pytest.mark.parametrize("engine", ["plain", "ddp", "fsdp2"])
def test_declared_tokens_weigh_each_token_alike(ranks, engine):
    """B04: means over micro-batches of 3 and of 60 tokens, and yet 1/T for every token."""
    for batch in ("padded", "uneven"):
        holds(ranks, Case(2, 2, batch=batch, engine=engine, loss="declared", policy="sequence"))


@pytest.mark.parametrize("engine", ["plain", "ddp", "fsdp2"])
def test_a_gradscaler_is_divided_out(ranks, engine):
    """B09: what multiplies the whole loss multiplies its balance loss too."""
    holds(ranks, Case(2, 2, engine=engine, loss="scaled", policy="sequence"))


def test_context_shards_divide_by_all_ranks_and_not_twice(ranks):
    """B02, B14: a sequence on two ranks is one sequence, and each of its tokens still weighs 1/T."""
    for loss in ("mean", "sum"):
        holds(ranks, Case(2, 2, 2, loss=loss, policy="sequence"))
        holds(ranks, Case(4, 2, 2, engine="ddp", loss=loss, policy="sequence"))


@pytest.mark.parametrize("policy", ["sequence", "micro_batch", "filled"])
def test_padding_on_one_shard_weighs_no_token_of_another(ranks, policy):
    """Nothing declared: a micro-batch weighs the same with all its shards, wherever its padding lies."""
    whole, cut = (
        pushed(ranks, Case(2 * shards, 2, shards, batch="padded", engine="ddp", policy=policy)) for shards in (1, 2)
    )
    for name, push in whole.items():
        assert (cut[name] - push).abs().max() <= 1e-5 * max(push.abs().max(), 1e-3), name


@pytest.mark.parametrize("loss", ["declared", "sum"])
@pytest.mark.parametrize("policy", ["every", "sequence", "micro_batch", "exact", "prefix"])
def test_masked_prompts_on_2_ranks_and_3_micro_batches(ranks, policy, loss):
    """Router tokens are the denominator, not label tokens: to 1e-5 of float64 (B01 to B14 are one mistake)."""
    case = Case(2, 3, batch="padded", engine="ddp", loss=loss, policy=policy)
    data = make_data(case, 0, 12)
    table = tokens_of(case, data, 0, 12)
    per_part = [sum(t.valid for t in table.tokens if (t.rank, t.micro) == (r, m)) for r in range(2) for m in range(3)]
    assert len(set(per_part)) > 3, "uneven"
    assert int(data.label_NS.sum()) < 0.8 * int(data.valid_NS.sum()), "prompts that are routed but not learnt"
    judge(case, ranks.run("contracts.invariance._worker:train", case, False, 12, size=2), 12)


@pytest.mark.parametrize("loss", ["declared", "sum"])
@pytest.mark.parametrize("engine", ["plain", "ddp", "fsdp2"])
def test_a_rank_without_a_token(ranks, engine, loss):
    """Its micro-batches are of length 0 for a whole step, and it still takes part in everything."""
    case = Case(2, 2, batch="idle", engine=engine, loss=loss)
    judge(case, ranks.run("contracts.invariance._worker:train", case, size=2))


CUTS = [Case(1, 4), Case(2, 2, recompute="reentrant"), Case(4, 4), Case(2, 2, 2), Case(4, 2, 2, "non_reentrant")]


@pytest.mark.parametrize("case", CUTS, ids=lambda case: f"{case.ranks}x{case.micro}x{case.shards}")
def test_every_metric_is_that_of_one_process(ranks, case):
    """All names of ``metrics()``, gradient ratios among them; those that the cut defines are held in the matrix."""
    kept: list[dict[str, Any]] = []
    for one in (Case(), case):
        one = one._replace(batch="packed", loss="sum", policy="invariant")
        steps = ranks.run("contracts.invariance._worker:train", one, size=one.ranks)
        metrics = [step.metrics for step in steps[0]]
        for other in steps[1:]:
            assert [step.metrics for step in other] == metrics, "ranks disagree"
        every = {f"{n}/{key}": value for n, step in enumerate(metrics) for key, value in step.items()}
        kept.append({key: value for key, value in every.items() if "maxvio_micro_batch" not in key})
    assert kept[1] == pytest.approx(kept[0], rel=1e-5, abs=1e-9)
    assert sum("gradient_ratio" in key for key in kept[0]) >= 3 * 6


@pytest.mark.full  # two minutes each; `law/test_modes.py` always has inductor on one rank
@pytest.mark.parametrize(
    "case",
    [
        Case(2, 2, compiled="inductor"),
        Case(2, 1, 2, "non_reentrant", "inductor", "packed", engine="ddp", loss="declared", policy="document"),
    ],
    ids=str,
)
def test_the_default_compiler(ranks, case):
    """The matrix compiles with aot_eager, which has the same graphs; two cases with inductor's kernels."""
    try:
        judge(case, ranks.run("contracts.invariance._worker:train", case, False, 8, 2, size=2, timeout=300), 8)
    finally:
        ranks.stop()  # inductor keeps processes and threads of its own
