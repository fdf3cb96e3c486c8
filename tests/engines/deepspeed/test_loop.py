"""DeepSpeed's engine and its own MoE layers in a user's loop on CPUs, ZeRO 0 to 2: law, loads, looking, resume."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest
import torch

from _rounding import part_distance
from engines._ranks import free_port, train_ranks

pytestmark = [pytest.mark.engine, pytest.mark.filterwarnings("ignore")]


def train(folder: Path, cases: dict[str, Any], ranks: int = 1) -> list[dict[str, Any]]:
    return train_ranks(Path(__file__).with_name("record_loop.py"), folder, cases, ranks, meet=free_port())


COEF, LAYERS, TOKENS = 5.0, 2, 32  # of a micro-batch
SCOPES = ("sequence", "micro_batch", "data_parallel", "global_batch")


def policies(scope: str) -> list[dict[str, Any]]:
    return [{"kind": "AuxLoss", "scope": scope, "coef": COEF}]


def law(scope: str) -> dict[str, Any]:
    return {"law": [{"scope": scope, "coef": COEF}]}


# Each: (the balanced training, the same with the law added to its loss, the same without either)
GLOBAL = policies("global_batch")
LAW: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    **{scope: ({"policies": policies(scope)}, law(scope), {}) for scope in SCOPES},
    "ZeRO 1, recompute": ({"policies": GLOBAL, "stage": 1, "recompute": True}, law("global_batch"), {"stage": 1}),
    "ZeRO 2": ({"policies": GLOBAL, "stage": 2}, law("global_batch"), {"stage": 2}),
    "ZeRO 2, recompute": ({"policies": GLOBAL, "stage": 2, "recompute": True}, law("global_batch"), {"stage": 2}),
    **{
        f"top-{k}": ({"policies": GLOBAL, "moe": {"k": k}}, {**law("global_batch"), "moe": {"k": k}}, {"moe": {"k": k}})
        for k in (1, 3)
    },
}


@pytest.fixture(scope="module", params=[(1, 1), (2, 1), (2, 2)], ids=["one rank", "two ranks", "experts over ranks"])
def of_law(request, tmp_path_factory):
    ranks, spread = request.param
    cases: dict[str, dict[str, Any]] = {}
    for name, three in LAW.items():
        for kind, case in zip(("balanced", "law", "plain"), three, strict=True):
            cases[f"{kind} {name}"] = {**case, "moe": {**case.get("moe", {}), "ep_size": spread}}
        moe = cases[f"law {name}"]["moe"]
        cases[f"bare {name}"] = {"moe": moe}
        cases[f"fp32 {name}"] = {**cases[f"law {name}"], "precision": "float32"}
    return train(tmp_path_factory.mktemp("law"), cases, ranks)


@pytest.mark.parametrize("name", LAW)
def test_the_balance_part_of_the_gradient_is_the_law(of_law, name):
    """Of all parameters but the experts': the law is at ZeRO 0, without recompute.

    What fp32 may be off on this machine is taken from plain autograd, whose law is of fp32 probabilities.
    """
    for of_rank in of_law:
        got = of_rank[f"balanced {name}"]
        kinds = ("law", "bare", "balanced", "plain", "fp32")
        law, bare, balanced, plain, fp32 = (of_rank[f"{kind} {name}"]["gradients"][0] for kind in kinds)
        for part in ("", "gate.wg"):
            own = part_distance(law, bare, fp32, bare, part)
            assert part_distance(law, bare, balanced, plain, part) < max(1e-6, 2 * own) < 1e-5
        top_k = LAW[name][0].get("moe", {}).get("k", 2)
        for layer in range(LAYERS):  # what the gates themselves count, of all ranks and both micro-batches
            counts_E = torch.stack([one for other in of_law for one in other[f"balanced {name}"]["counts"][layer::2]])
            assert torch.equal(got["loads"][0][layer], counts_E.sum(dim=0))
            assert int(got["loads"][0][layer].sum()) == TOKENS * 2 * len(of_law) * top_k


@pytest.fixture(scope="module")
def others(tmp_path_factory):
    folder = tmp_path_factory.mktemp("others")
    monitor = {"csv_monitor": {"enabled": True, "output_path": str(folder), "job_name": "run"}}
    sampled = {"moe": {"top2_2nd_expert_sampling": True}, "steps": 3}
    half = {"bf16": {"enabled": True}}
    cases: dict[str, dict[str, Any]] = {
        "off": {"policies": GLOBAL, "l_aux": 0.3},
        "without": {"policies": GLOBAL},
        "sampled": {**sampled, "policies": GLOBAL, "recompute": True, "config": monitor},
        "bf16": {"policies": GLOBAL, "stage": 2, "config": half, "steps": 2},
    }
    for stage in (0, 1, 2):
        saved = folder / f"saved-{stage}"
        saved.mkdir()
        again = {"policies": GLOBAL, "stage": stage}
        cases |= {
            f"plain {stage}": {**sampled, "stage": stage, "l_aux": 0.3},
            f"look {stage}": {**sampled, "stage": stage, "l_aux": 0.3, "policies": []},
            f"whole {stage}": {**again, "steps": 4},
            f"first {stage}": {**again, "steps": 2, "save": str(saved)},
            f"second {stage}": {**again, "steps": 2, "first_step": 2, "load": str(saved)},
        }
    refused: dict[str, dict[str, Any]] = {
        "capacity": {"policies": [], "moe": {"drop_tokens": True}},
        "noise": {"policies": [], "moe": {"noisy_gate_policy": "RSample", "k": 1}},
        "bias": {"policies": ["loss-free"]},
        "shuffle": {"policies": policies("shuffle")},
    }
    cases |= {name: {**case, "refused": True} for name, case in refused.items()}
    found = train(folder, cases, 2)
    return [*found, {file.stem: list(csv.reader(file.read_text().splitlines())) for file in folder.rglob("*.csv")}]


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_looking_changes_no_bit_and_leaves_their_loss_on(others, stage):
    """The noise of the second expert's choice among them."""
    for of_rank in others[:2]:
        plain, look = of_rank[f"plain {stage}"], of_rank[f"look {stage}"]
        assert all(torch.equal(weight, look["weights"][name]) for name, weight in plain["weights"].items())
        assert "its balancing  as it was: l_aux" in look["described"]
        assert "2 (micro_batch), 4 (data_parallel), 8 (global_batch)" in " ".join(look["described"].split())
        assert look["state"] == plain["state"] and look["left"] == []


def test_their_own_loss_is_off_and_said_so(others):
    for of_rank in others[:2]:
        off, without = of_rank["off"], of_rank["without"]
        assert "off: every layer returns l_aux 0" in off["described"]
        assert all(torch.equal(weight, off["weights"][name]) for name, weight in without["weights"].items())


def test_a_second_expert_that_is_drawn_is_counted_as_it_was_drawn(others):
    """Three steps with recompute, which draws again what it drew."""
    for layer in range(LAYERS):
        counts = torch.stack([one for of_rank in others[:2] for one in of_rank["sampled"]["counts"][8:][layer::2]])
        assert torch.equal(others[0]["sampled"]["loads"][2][layer], counts.sum(dim=0))
    assert others[0]["sampled"]["metrics"]["balance/recompute_flips"] == 0


def test_numbers_are_in_the_engines_monitor(others):
    files = others[2]
    (name,) = [one for one in files if "maxvio_global" in one and "worst" not in one]
    assert len([row for row in files[name] if row and row[0].replace(".", "").isdigit()]) == 3


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_a_resumed_run_ends_with_the_same_bits(others, stage):
    for of_rank in others[:2]:
        whole, second = of_rank[f"whole {stage}"], of_rank[f"second {stage}"]
        assert all(torch.equal(weight, second["weights"][name]) for name, weight in whole["weights"].items())
        assert all(torch.equal(a, b) for a, b in zip(whole["loads"][-1], second["loads"][-1], strict=True))


def test_bf16(others):
    for of_rank in others[:2]:
        got = of_rank["bf16"]
        assert [int(counts_E.sum()) for counts_E in got["loads"][-1]] == [TOKENS * 2 * 2 * 2] * LAYERS


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("capacity", "set drop_tokens=False"),
        ("noise", "noisy_gate_policy='RSample'"),
        ("bias", "DeepSpeed's TopKGate chooses by its logits and has no bias"),
        ("shuffle", "take estimator 'filled'"),
    ],
)
def test_a_refusal_says_what_to_do(others, name, words):
    assert words in others[0][name]["error"]
