"""Megatron-core cut over ranks, against one process that sees the whole global batch in one graph, in float64.

The one process has Megatron's model, plain autograd and the law: no schedule, no data parallelism, no equipoise.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch

from engines._law import COEF
from engines.megatron._train import GLOBAL, LOSS_FREE, MICRO, SCOPES, THEIR_BIAS, THEIR_LOSS, train

pytestmark = [pytest.mark.engine, pytest.mark.filterwarnings("ignore")]  # its imports warn of torch's

RECORD = "record_parallel.py"
TOKENS, TOP_K = 32, 2  # of a micro-batch, whatever it is cut into
PREFIX = [{"kind": "AuxLoss", "scope": "global_batch", "coef": COEF, "estimator": "prefix"}]  # sums at each of three
BOTH = [*LOSS_FREE, *GLOBAL]
LAW: dict[str, dict[str, Any]] = {
    **{one: {"policies": [{"kind": "AuxLoss", "scope": one, "coef": COEF}], "accumulation": 2} for one in SCOPES},
    "two losses, three micro-batches": {"policies": [*PREFIX, *MICRO], "accumulation": 3},
    "sum and tokens, full recompute": {"policies": GLOBAL, "accumulation": 2, "loss": "sum", "recompute": "full"},
    "per token, recompute of the MoE layer": {
        "policies": GLOBAL, "accumulation": 2, "loss": "per token", "recompute": "moe",
    },
    "padding": {"policies": MICRO, "accumulation": 2, "padding": 5},
    "bias": {"policies": BOTH, "accumulation": 2, "config": THEIR_BIAS},
    "one MoE layer, a loss scale, freed outputs": {
        "policies": GLOBAL, "accumulation": 2, "loss_scale": 1024.0,
        "config": {"moe_layer_freq": [0, 1], "deallocate_pipeline_outputs": True},
    },
}  # fmt: skip
GLOBAL_LOSS = {"moe_router_load_balancing_type": "global_aux_loss", "moe_aux_loss_coeff": 0.3}
OWN: dict[str, dict[str, Any]] = {  # Megatron's own losses, and what describe() says that they amount to
    "aux_loss": {"config": THEIR_LOSS, "law": [{"scope": "micro_batch", "coef": 0.3}], "accumulation": 2},
    "aux_loss per token": {
        "config": THEIR_LOSS, "law": [{"scope": "micro_batch", "coef": 0.15}], "accumulation": 2, "loss": "per token",
    },
    "global_aux_loss": {"config": GLOBAL_LOSS, "law": [{"scope": "global_batch", "coef": 0.15}]},
}  # fmt: skip
FEW = ("sequence", "bias")
OF_STAGES = tuple(name for name in LAW if not name.startswith(("per token", "padding")))


class Cut(NamedTuple):
    """How ranks share a model and a batch."""

    parallel: dict[str, int]
    ranks: int
    replicas: int = 1
    cases: tuple[str, ...] = FEW
    own: tuple[str, ...] = ("aux_loss",)


CUTS = {
    "tensor": Cut({"tensor": 2}, 2, cases=tuple(LAW)[:-1], own=("aux_loss", "aux_loss per token")),
    "tensor, experts": Cut({"tensor": 2, "expert": 2, "expert tensor": 1}, 2),
    "tensor, data": Cut({"tensor": 2}, 4, replicas=2, own=("global_aux_loss",)),
    "context": Cut({"context": 2}, 2, cases=tuple(LAW)[:-1]),
    "tensor, context": Cut({"tensor": 2, "context": 2}, 4, cases=(*FEW, "padding")),
    "pipeline": Cut({"pipeline": 2}, 2, cases=OF_STAGES),
    "pipeline, tensor": Cut({"pipeline": 2, "tensor": 2}, 4),
    "pipeline, data": Cut({"pipeline": 2}, 4, replicas=2, own=("global_aux_loss",)),
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The one process, for so many data ranks."""
    known: dict[int, dict[str, Any]] = {}

    def of(replicas: int) -> dict[str, Any]:
        if replicas not in known:
            cuts = [cut for cut in CUTS.values() if cut.replicas == replicas]
            cases = {name: OWN[name] | {"config": {}, "replicas": replicas} for cut in cuts for name in cut.own}
            needed = {name for cut in cuts for name in cut.cases}
            cases |= {name: {key: value for key, value in case.items() if key not in ("policies", "recompute", "loss")}
                     | {"law": [one for one in case["policies"] if "scope" in one], "replicas": replicas}
                     for name, case in LAW.items() if name in needed}  # fmt: skip
            (known[replicas],) = train(tmp_path_factory.mktemp("whole"), cases, record=RECORD)
        return known[replicas]

    return of


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """What each rank of a cut saw."""
    known: dict[str, list[dict[str, Any]]] = {}

    def of(key: str) -> list[dict[str, Any]]:
        if key not in known:
            folder = tmp_path_factory.mktemp("cut")
            known[key] = train(folder, cases_of(CUTS[key], str(folder)), CUTS[key].ranks, RECORD)
        return known[key]

    return of


def cases_of(cut: Cut, folder: str) -> dict[str, dict[str, Any]]:
    cases = {name: LAW[name] for name in cut.cases}
    cases |= {name: {key: value for key, value in OWN[name].items() if key != "law"} for name in cut.own}
    theirs = {"accumulation": 2, "config": THEIR_BIAS | THEIR_LOSS}
    both = {"accumulation": 2, "config": THEIR_BIAS, "policies": BOTH}
    cases |= {"plain": theirs, "look": theirs | {"policies": []}, "whole": both | {"steps": 2}}
    cases |= {"first half": both | {"save": folder}, "second half": both | {"first_step": 1, "load": folder}}
    return {name: case | {"parallel": cut.parallel} for name, case in cases.items()}


@pytest.mark.parametrize(("key", "name"), [(key, name) for key, cut in CUTS.items() for name in cut.cases])
def test_every_gradient_and_load_is_that_of_one_process(parts, whole, key, name):
    cut, of_ranks = CUTS[key], parts(key)
    right = whole(cut.replicas)[name]
    bound = 1e-12 if LAW[name]["accumulation"] == 2 else 1e-7  # of a stage without the loss Megatron holds 1/M in fp32
    for of_rank in of_ranks:
        got = of_rank[name]
        check_gradients(got, right, bound)
        assert all(torch.equal(a, b) for a, b in zip(got["load"], right["load"].long(), strict=True))
        tokens = (TOKENS - LAW[name].get("padding", 0)) * LAW[name]["accumulation"] * cut.replicas
        assert got["metrics"]["balance/tokens"] == tokens
        assert [int(counts_E.sum()) for counts_E in got["load"]] == [tokens * TOP_K] * len(right["load"])


def check_gradients(got: dict[str, Any], right: dict[str, Any], bound: float) -> None:
    """Of all weights together, and of the routers among them: the norm of what is off, over that of the gradient."""
    off, size = {"": 0.0, "router.weight": 0.0}, {"": 0.0, "router.weight": 0.0}
    for key, gradient in got["gradients"].items():
        known, (dim, part, number) = got["places"][key]
        expected = right["gradients"][known].chunk(number, dim)[part]
        for end in off:
            if key.endswith(end):
                off[end] += float((gradient - expected).square().sum())
                size[end] += float(expected.square().sum())
    assert size[""] > 0
    assert all(off[end] ** 0.5 <= bound * size[end] ** 0.5 for end in off)


@pytest.mark.parametrize(("key", "name"), [(key, name) for key, cut in CUTS.items() for name in cut.own])
def test_its_own_losses_amount_to_what_describe_says(parts, whole, key, name):
    cut, of_ranks = CUTS[key], parts(key)
    for of_rank in of_ranks:
        check_gradients(of_rank[name], whole(cut.replicas)[name], 1e-6)  # it computes them in fp32
    told = of_ranks[0]["look"]["described"]
    assert "in our unit    aux_loss 0.3 is AuxLoss('micro_batch', coef=0.3)\n" in told
    sizes = f"2 (micro_batch), {2 * cut.replicas} (data_parallel), {4 * cut.replicas} (global_batch)"
    said = f"1 sequence (sequence), {sizes}; data ranks: {cut.replicas}, micro-batches: 2 "
    assert said in " ".join(told.split())


@pytest.mark.parametrize("key", CUTS)
def test_the_bias_moves_once_by_the_load_of_all_ranks(parts, key):
    for of_rank in parts(key):
        held = [int(name.split(".")[2]) for name in of_rank["bias"]["routers"]]
        for layer, bias_E in zip(held, of_rank["bias"]["bias"], strict=True):
            counts_E = of_rank["bias"]["load"][layer]
            moved_E = 1e-3 * (counts_E.double().mean() - counts_E).sign()
            torch.testing.assert_close(bias_E.double(), moved_E - moved_E.mean(), rtol=0, atol=1e-8)


@pytest.mark.parametrize("key", CUTS)
def test_looking_changes_no_bit(parts, key):
    for of_rank in parts(key):
        plain, look = of_rank["plain"], of_rank["look"]
        assert all(torch.equal(plain["weights"][k], look["weights"][k]) for k in plain["weights"])
        assert all(torch.equal(a, b) and bool(a.any()) for a, b in zip(plain["bias"], look["bias"], strict=True))


@pytest.mark.parametrize("key", CUTS)
def test_a_resumed_run_ends_with_the_bits_of_one_that_was_not_stopped(parts, key):
    for of_rank in parts(key):
        whole, second = of_rank["whole"], of_rank["second half"]
        assert all(torch.equal(whole["weights"][k], second["weights"][k]) for k in whole["weights"])
        assert all(torch.equal(a, b) for a, b in zip(whole["bias"], second["bias"], strict=True))
        assert all(torch.equal(a, b) for a, b in zip(whole["load"], second["load"], strict=True))
