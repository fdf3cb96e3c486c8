"""torchtitan's own Trainer on a tiny Qwen3-MoE: loads, the balance gradient, its log, its checkpoints, a bias."""

from __future__ import annotations

import json
import os
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from engines import _law as law
from engines._ranks import run_ranks

pytestmark = pytest.mark.engine

ROOT = Path(__file__).parents[3]
SCOPES = {"global_batch": 0.5, "data_parallel": 0.4, "micro_batch": 0.3, "sequence": 0.2, "sequences:2": 0.1}
SCOPES["document"] = 0.25
ALL = [{"kind": "AuxLoss", "scope": scope, "coef": coef} for scope, coef in SCOPES.items()]
GLOBAL = [{"kind": "AuxLoss", "scope": "global_batch", "coef": law.COEF}]
MIXED = ["global@0.5", "loss-free@1e-3"]
RATE, STEPS, SAVED = 1e-3, 5, 3
WRITTEN = "self.micro_batch_LE[layer] = picked_BLE.detach().sum(dim=(0, 1))"
ADDED = WRITTEN.replace(" = ", " = (self.micro_batch_LE[layer] if len(self.micro_batch_LE[layer]) else 0) + ")
CUTS: dict[str, dict[str, Any]] = {
    "-fsdp": {"recompute": "full"},
    "-experts": {"experts": 2, "recompute": "selective"},
}
Records = dict[str, list[dict[str, Any]]]


def job(folder: Path, ranks: int, cases: list[dict[str, Any]], port: int) -> Records:
    """name -> what each rank recorded, of trainings that run one after the other in ``ranks`` processes."""
    file = folder / "cases.json"
    file.write_text(json.dumps(cases))
    path = os.pathsep.join([str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")])
    both = {"PYTHONPATH": path, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    both |= {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks), "WANDB_MODE": "offline"}
    command = [sys.executable, "-m", "engines.torchtitan.record", str(folder), str(file)]
    own = [{"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(ranks)]
    run_ranks(folder, [command] * ranks, [both | one for one in own], timeout=1200)
    names = [case["name"] for case in cases]
    return {n: [torch.load(folder / f"{n}.{r}.pt", weights_only=False) for r in range(ranks)] for n in names}


def of(records: Records, name: str) -> dict[str, Any]:
    """What rank 0 recorded of a training that ended well."""
    found = records[name][0]
    assert found["error"] is None, found["error"]
    return found


def distance(records: Records, name: str, plain: str, wanted: str, part: str = "") -> float:
    """How far the balance part of the first step's gradient is from the law, relative to that part."""
    got, base, right = (of(records, one)["gradients"] for one in (name, plain, wanted))
    names = [one for one in right if part in one]
    far = sum(float((got[n].double() - right[n].double()).square().sum()) for n in names)
    return (far / sum(float((right[n].double() - base[n].double()).square().sum()) for n in names)) ** 0.5


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("alone")


@pytest.fixture(scope="module")
def page(folder: Path) -> Path:
    """The code of docs/torchtitan-upstream.md as a file."""
    text = (ROOT / "docs" / "torchtitan-upstream.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    file = folder / "upstream.py"
    file.write_text(code)
    return file


@pytest.fixture(scope="module")
def alone(folder: Path, page: Path) -> Records:
    """One process: micro-batches, recompute, gates, losses, precisions, a bias, a checkpoint."""
    two = {"accumulate": 2}
    whole = {"whole": True, **two}
    sigmoid = {"gate": "sigmoid", **whole}
    bias = {"own": RATE, "gate": "sigmoid", "validates": True, **two}
    adds = folder / "adds.py"
    adds.write_text(page.read_text().replace(WRITTEN, ADDED))
    cases = [
        {"name": "plain", **whole},
        {"name": "law", "reference": True, "policies": ALL, **whole},
        *({"name": f"all-{how}", "policies": ALL, "recompute": how, **whole} for how in ("none", "full", "selective")),
        {"name": "global", "reference": True, "policies": GLOBAL, **whole},
        *({"name": f"page-{how}", "upstream": str(page), "recompute": how, **whole} for how in ("full", "selective")),
        {"name": "page-adds", "upstream": str(adds), "recompute": "full", **whole},
        {"name": "chunks", "policies": GLOBAL, "chunks": 4, **whole},
        {"name": "types", "policies": GLOBAL, "spmd": "spmd_types", **whole},
        {"name": "sigmoid-plain", **sigmoid},
        {"name": "sigmoid-law", "reference": True, "policies": ALL, **sigmoid},
        {"name": "sigmoid-all", "policies": ALL, "recompute": "full", **sigmoid},
        {"name": "sigmoid-global", "reference": True, "policies": GLOBAL, **sigmoid},
        {"name": "sigmoid-page", "upstream": str(page), "recompute": "full", **sigmoid},
        {"name": "own-plain", **two},
        {"name": "own-law", "reference": True, "policies": ALL, **two},
        {"name": "own-all", "policies": ALL, "recompute": "selective", **two},
        {"name": "own-global", "reference": True, "policies": GLOBAL, **two},
        {"name": "bfloat16", "policies": GLOBAL, "precision": "bfloat16", **two},
        {"name": "own", "steps": 3, **bias},
        {"name": "looks", "steps": 3, "policies": [], **bias},
        {"name": "bias", "steps": 3, "policies": [f"loss-free@{RATE}"], "recompute": "full", **bias},
        {"name": "whole", "steps": STEPS, "policies": MIXED, "saves": SAVED, **bias},
        {"name": "engine", "steps": STEPS, "saves": SAVED, **bias},
        {"name": "exact", "policies": [GLOBAL[0] | {"estimator": "exact"}, {"kind": "AuxLoss", "scope": "shuffle"}]},
        {"name": "shuffled", "policies": [{"kind": "AuxLoss", "scope": "shuffle"}], **two},
    ]
    return job(folder, 1, cases, 29610)


@pytest.fixture(scope="module")
def resumed(folder: Path, alone: Records) -> Records:
    """From the checkpoints of ``alone``, in a process of its own."""
    bias = {"own": RATE, "gate": "sigmoid", "accumulate": 2, "steps": STEPS, "saves": SAVED, "begins": SAVED}
    cases = [
        {"name": "again", "policies": MIXED, "recompute": "full", "folder": "whole", **bias},
        {"name": "at-rest", "policies": ["global"], "strict": False, "folder": "engine", "skips": True, **bias},
        {"name": "missing", "policies": ["global"], "folder": "engine", **bias},
    ]
    return job(folder, 1, cases, 29650)


@pytest.fixture(scope="module")
def together(tmp_path_factory: pytest.TempPathFactory, page: Path) -> Records:
    """Two processes: FSDP2 shards, replicas, experts over ranks."""
    two = {"accumulate": 2}
    bias = {"own": RATE, "gate": "sigmoid", **two}
    mixed = {"policies": MIXED, "steps": STEPS, "saves": SAVED, "experts": 2, "recompute": "selective", **bias}
    cases = [
        *(
            {"name": f"{name}{cut}", "whole": True, **more, **degrees, **two}
            for cut, degrees in {
                "-fsdp": {"recompute": "full"},
                "-experts": {"experts": 2, "recompute": "selective"},
            }.items()
            for name, more in {
                "plain": {},
                "law": {"reference": True, "policies": ALL},
                "all": {"policies": ALL},
                "global": {"reference": True, "policies": GLOBAL},
                "page": {"upstream": str(page)},
            }.items()
        ),
        {"name": "all-replicas", "policies": ALL, "replicas": 2, "whole": True, **two},
        {"name": "bfloat16", "policies": GLOBAL, "precision": "bfloat16", "experts": 2, **two},
        {"name": "own", "steps": 3, **bias},
        {"name": "looks", "steps": 3, "policies": [], **bias},
        {"name": "whole", **mixed},
        {"name": "again", "folder": "whole", "begins": SAVED, **mixed},
    ]
    return job(tmp_path_factory.mktemp("together"), 2, cases, 29680)


class TestLoads:
    def test_they_are_what_is_counted_beside_it(self, alone, together):
        for records in (alone, together):
            for name, ranks in records.items():
                if ranks[0]["error"] is None and ranks[0]["steps"][0]["loads"] is not None:
                    assert all(step["loads"] == step["counts"] for rank in ranks for step in rank["steps"]), name
                    assert (
                        sum(ranks[0]["steps"][0]["loads"][0]) == ranks[0]["steps"][0]["metrics"]["balance/tokens"] * 2
                    )

    def test_experts_differ_or_a_router_would_learn_nothing(self, together):
        w_EFD = of(together, "plain-fsdp")["end"]["layers.0.moe.routed_experts.inner_experts.w1_EFD"]
        assert float(torch.pdist(w_EFD.flatten(1)).min()) > 0.1


class TestGradient:
    @pytest.mark.parametrize("part", ["", "router.gate"])
    @pytest.mark.parametrize("recompute", ["none", "full", "selective"])
    def test_every_scope_on_one_rank(self, alone, recompute, part):
        assert distance(alone, f"all-{recompute}", "plain", "law", part) < 1e-6

    @pytest.mark.parametrize("part", ["", "router.gate"])
    @pytest.mark.parametrize("cut", ["fsdp", "experts"])
    def test_every_scope_on_two_ranks(self, together, cut, part):
        assert distance(together, f"all-{cut}", f"plain-{cut}", f"law-{cut}", part) < 1e-6

    def test_replicas(self, together):
        assert distance(together, "all-replicas", "plain-fsdp", "law-fsdp") < 1e-6

    def test_its_own_experts_which_multiply_in_bfloat16(self, alone):
        """The last router's gradient comes past no expert; what comes past one may round to another number."""
        assert distance(alone, "own-all", "own-plain", "own-law", "layers.1.moe.router.gate") < 1e-6
        assert distance(alone, "own-all", "own-plain", "own-law") < 1e-4

    def test_a_sigmoid_gate(self, alone):
        assert distance(alone, "sigmoid-all", "sigmoid-plain", "sigmoid-law") < 1e-6

    @pytest.mark.parametrize("how", ["chunks", "types"])
    def test_a_loss_in_chunks_and_its_other_backend(self, alone, how):
        assert distance(alone, how, "plain", "global") < 1e-6

    def test_exact_and_shuffle_where_a_step_is_one_micro_batch(self, alone):
        found = of(alone, "exact")["steps"][0]["metrics"]
        assert found["balance/global/gradient_ratio"] > 0
        assert found["balance/shuffle/gradient_ratio"] > 0

    def test_a_compiled_model(self, alone, tmp_path):
        """In a process of its own: what was compiled without our hooks is found again."""
        case = {"name": "compiled", "policies": GLOBAL, "accumulate": 2, "compiled": "aot_eager", "recompute": "full"}
        records = alone | job(tmp_path, 1, [case], 29740)
        assert of(records, "compiled")["steps"][0]["loads"] == of(alone, "own-global")["steps"][0]["counts"]
        assert distance(records, "compiled", "own-plain", "own-global", "layers.1.moe.router.gate") < 1e-6


class TestThePage:
    """The lines of docs/torchtitan-upstream.md, which use nothing of equipoise."""

    @pytest.mark.parametrize("how", ["full", "selective"])
    def test_recompute_and_two_micro_batches(self, alone, how):
        assert distance(alone, f"page-{how}", "plain", "global") < 1e-6

    def test_a_sigmoid_gate(self, alone):
        assert distance(alone, "sigmoid-page", "sigmoid-plain", "sigmoid-global") < 1e-6

    @pytest.mark.parametrize("cut", ["fsdp", "experts"])
    def test_the_same_on_two_ranks(self, together, cut):
        assert distance(together, f"page-{cut}", f"plain-{cut}", f"global-{cut}") < 1e-6

    def test_counts_that_were_added_in_forward_would_be_another_loss(self, alone, page):
        """What a recompute does to them, and what torchtitan#4772 had to forbid."""
        assert WRITTEN in page.read_text()
        assert distance(alone, "page-adds", "plain", "global") > 1e-2

    def test_it_is_short_and_stands_alone(self, page):
        code = page.read_text()
        assert len(code.splitlines()) <= 150
        assert "equipoise" not in code


class TestBias:
    def test_it_follows_the_loads_of_the_whole_step(self, alone):
        """sign(mean - load), re-centred, on the engine's own buffer, which its checkpoints have."""
        record = of(alone, "bias")
        for layer in range(2):
            bias_E = torch.zeros(8, dtype=torch.float64)
            for step in record["steps"]:
                counts_E = torch.tensor(step["counts"][layer], dtype=torch.float64)
                moved_E = RATE * torch.sign(counts_E.mean() - counts_E)
                bias_E += moved_E - moved_E.mean()
                assert torch.allclose(torch.tensor(step["bias"][layer]).double(), bias_E, atol=1e-8)
        assert "layers.0.moe.expert_bias_E" in record["end"]
        assert "validate step:  3" in record["said"], "and validation counts for nothing"

    def test_its_own_updates_are_off_and_that_is_said(self, alone):
        said = of(alone, "bias")["said"]
        assert "equipoise in torchtitan" in said
        assert "its own bias  off (its bias was moved with load_balance_coeff 0.001)" in said
        assert "the model's expert_bias_E" in said


class TestLooking:
    def test_the_training_is_the_same_to_the_last_bit(self, alone, together):
        for records in (alone, together):
            plain, looks = of(records, "own"), of(records, "looks")
            assert all(torch.equal(looks["end"][name], weight) for name, weight in plain["end"].items())
            assert any(any(bias_E) for bias_E in looks["steps"][-1]["bias"]), "its own balancing is as it was"

    def test_it_says_what_it_does(self, alone):
        said = " ".join(of(alone, "looks")["said"].split())
        assert "asked for nothing: []" in said
        assert "its own bias on, as it was (load_balance_coeff 0.001)" in said
        assert "Balance BSZ micro_batch 2, data_parallel 2, global_batch 4 sequences of 16 tokens" in said
        assert re.search(r"balance: +3 maxvio: [\d.]+ worst layer: [\d.]+ dead experts: \d", said)


class TestLog:
    def test_numbers_are_where_its_own_are(self, alone, folder):
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        assert of(alone, "whole")["error"] is None
        (run,) = (folder / "whole" / "tb").iterdir()
        events = EventAccumulator(str(run))
        events.Reload()
        tags = set(events.Tags()["scalars"])
        assert {"grad_norm", "balance/maxvio_global", "balance/dead_experts", "balance/global/gradient_ratio"} <= tags
        assert len(events.Scalars("balance/global/loss")) >= STEPS


class TestCheckpoints:
    def test_a_resumed_run_gives_the_same_bits_whatever_is_recomputed(self, alone, resumed):
        whole, again = of(alone, "whole"), of(resumed, "again")
        assert [step["loads"] for step in again["steps"]] == [step["loads"] for step in whole["steps"][SAVED:]]
        assert all(torch.equal(again["end"][name], weight) for name, weight in whole["end"].items())

    def test_the_same_on_two_ranks_with_experts_on_both(self, together):
        whole, again = of(together, "whole"), of(together, "again")
        assert all(torch.equal(again["end"][name], weight) for name, weight in whole["end"].items())

    def test_they_have_ours_and_only_where_something_is_kept(self, alone):
        assert "equipoise" in of(alone, "whole")["keys"]
        assert "equipoise" not in of(alone, "engine")["keys"]

    def test_a_bias_that_stood_still_would_be_an_error(self, resumed):
        assert "policy that moves expert_bias_E" in resumed["at-rest"][0]["error"]

    def test_a_checkpoint_without_ours_is_an_error(self, resumed):
        assert "equipoise.state" in resumed["missing"][0]["error"]


def test_a_counting_pass_has_no_place_in_its_loop(alone):
    assert "need no counting pass" in alone["shuffled"][0]["error"]


@pytest.mark.parametrize("ranks", [1, 2])
def test_what_was_run_is_not_warned_of(alone, together, ranks):
    for name, records in (alone if ranks == 1 else together).items():
        assert not records[0].get("warned"), (name, records[0]["warned"])
