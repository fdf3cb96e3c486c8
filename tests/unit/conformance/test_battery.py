"""The battery passes a router that is right, and says of each fault which cut shows it, by how much, and why."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from equipoise.conformance import CHECKS, Adapter, Answer, Finding, cut_for, judge, run_checks
from equipoise.conformance.judge import FINITE, RIGHT
from equipoise.errors import ConfigError
from unit.conformance import _routers as routers

BY_NAME = {check.name: check for check in CHECKS}
ROUTERS = Path(__file__).with_name("_routers.py")


def alone(adapter: type[Adapter], *names: str) -> dict[str, Finding]:
    """The checks of one rank, in this process."""
    found, factor = {}, 1.0
    for check in (one for one in CHECKS if one.ranks == 1 and not one.offered(adapter)):
        if names and check.name not in names:
            continue
        tasks = cut_for(check, adapter.bias_rate)
        found[check.name] = judge(check, adapter, tasks, [adapter().step(tasks[0])], factor)
        factor = found[check.name].factor if check is CHECKS[0] else factor
    return found


def wrong(found: dict[str, Finding] | Sequence[Finding]) -> dict[str, dict[str, str]]:
    findings = found.values() if isinstance(found, dict) else found
    return {one.check.name: {column: one.words[column] for column in one.wrong} for one in findings if not one.passed}


def test_a_right_router_passes_on_one_rank():
    found = alone(routers.Right)
    assert wrong(found) == {}
    assert set(found["padding"].words.values()) == {RIGHT}
    assert found["large logits"].words["gradient"] == found["bfloat16"].words["gradient"] == FINITE


FAULTS = {
    "KTimes": {"one micro-batch": {"gradient": "x 2 = K"}},
    "SummedOverMicroBatches": {
        "accumulation": {"gradient": "x 5 = micro-batches"},
        "padding": {"gradient": "x 5 = micro-batches"},
        "padding alone": {"gradient": "x 5 = micro-batches"},
    },
    "CountsInForward": {"recompute": {"counts": "x 2"}},  # reentrant: its first pass has no gradients
    "CountsEvaluation": {
        name: {"counts": "x 2"} for name in ("recompute", "recompute, reentrant", "evaluation between")
    },
    "Detached": {name: {"gradient": "nothing arrives"} for name, check in BY_NAME.items()
                 if check.ranks == 1 and check.text == "plain"},
    "Frozen": {name: {"bias": "does not move"} for name, check in BY_NAME.items()
               if check.ranks == 1 and check.text != "large"},
}  # fmt: skip


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_found_where_it_is_and_nowhere_else(name):
    assert wrong(alone(getattr(routers, name))) == FAULTS[name]


@pytest.mark.parametrize(
    ("name", "check", "columns"),
    [
        ("CountsPadding", "padding", {"gradient", "counts"}),
        ("Pooled", "layers that lean apart", {"gradient", "counts", "bias"}),
        ("CountsInBfloat16", "bfloat16", {"counts"}),
    ],
)
def test_what_is_off_by_no_factor_is_found_as_well(name, check, columns):
    found = wrong(alone(getattr(routers, name), "one micro-batch", "accumulation", check))
    assert set(found[check]) >= columns - {"bias"}
    assert set(found) <= {check, "accumulation"}
    assert "accumulation" not in found


def test_known_defects_are_named_where_they_belong():
    found = alone(routers.KTimes, "one micro-batch", "accumulation")
    assert found["one micro-batch"].known == "B11, B13"
    assert found["accumulation"].passed and found["accumulation"].known == ""  # the same fault, said once
    assert alone(routers.CountsInForward, "recompute")["recompute"].known == "B20, B22"


def test_every_number_is_one_of_the_table():
    defects = (Path(__file__).resolve().parents[3] / "docs" / "defects.md").read_text(encoding="utf-8")
    named = {number for check in CHECKS for text in check.known.values() for number in text.split(", ")}
    assert {number for number in named if number not in defects} == set()


def test_the_adapter_of_the_page_is_the_classic_loss():
    page = (Path(__file__).resolve().parents[3] / "docs" / "conformance.md").read_text(encoding="utf-8")
    names: dict[str, Any] = {}
    exec(page.split("```python\n")[1].split("```")[0], names)
    found = alone(names["MyRouter"])
    assert wrong(found) == {}
    assert [one.check.name for one in found.values() if one.skipped] == []
    assert {check.name for check in CHECKS if check.offered(names["MyRouter"])} == {
        "padding", "padding, ranks", "padding alone", "layers that lean apart", "bfloat16"}  # fmt: skip


@pytest.mark.parametrize(
    ("answer", "columns"),
    [
        (lambda right: right._replace(gradient_LED=right.gradient_LED * float("nan")), {"gradient": "not finite"}),
        (lambda right: right._replace(gradient_LED=right.gradient_LED[0]), {"gradient": "shape (8, 16)"}),
        (lambda right: right._replace(gradient_LED=right.gradient_LED / 3), {"gradient": "x 0.3333 = 1 / ranks"}),
        (lambda right: right._replace(gradient_LED=right.gradient_LED * 2 / 7), {"gradient": "x 0.2857 = K / layers"}),
        (lambda right: right._replace(gradient_LED=right.gradient_LED * 1.37), {"gradient": "x 1.37"}),
        (lambda right: right._replace(counts_LE=None), {"counts": "none given"}),
        (lambda right: right._replace(counts_LE=right.counts_LE.flip(1)), {"counts": "other experts"}),
        (lambda right: right._replace(counts_LE=right.counts_LE - torch.eye(1, 8)), {"counts": "479 of 480"}),
        (lambda right: right._replace(bias_LE=None), {"bias": "none given"}),
        (lambda right: right._replace(bias_LE=-right.bias_LE), {"bias": "moves otherwise"}),
        (lambda right: right._replace(bias_LE=right.bias_LE + 0.5), {}),  # chooses the same experts
    ],
)
def test_an_answer_is_judged_by_column(answer, columns):
    check = CHECKS[0]
    tasks = cut_for(check, 1e-3)
    right = routers.Right().step(tasks[0])
    found = judge(check, routers.Right, tasks, [answer(right)])
    assert {column: found.words[column] for column in found.wrong} == columns


def test_ranks_that_differ_are_found():
    check = BY_NAME["ranks"]
    tasks = cut_for(check, 1e-3)
    one, other = Answer(*(torch.ones(1, 8, 16), torch.ones(1, 8), torch.ones(1, 8))), None
    other = one._replace(gradient_LED=one.gradient_LED + 1e-6, bias_LE=one.bias_LE + 1e-3)
    found = judge(check, routers.Right, tasks, [one, one, other])
    assert found.words["gradient"] == found.words["bias"] == "differs between ranks"


def test_every_cut_is_of_the_same_tokens():
    whole = cut_for(CHECKS[0])[0].micro_batches[0].hidden_BSD
    for check in CHECKS:
        if check.text == "plain" and check.layers == 1:
            parts = [one.hidden_BSD for task in cut_for(check) for one in task.micro_batches]
            assert torch.equal(torch.cat(parts), whole)
            assert len(cut_for(check)) == check.ranks and len(parts) == check.ranks * check.micro_batches
    ragged = [one.mask_BS.sum(dim=1) for one in cut_for(BY_NAME["padding"])[0].micro_batches]
    assert len({int(of.sum()) for of in ragged}) > 3
    assert not cut_for(BY_NAME["padding alone"])[0].micro_batches[0].mask_BS.any()


# ---------------------------------------------------------------- in processes


def test_our_router_passes():
    """In the matrix of its own it goes through far more; here by the adapter that users copy."""
    found = list(run_checks("equipoise.conformance.ours:GlobalBatch"))
    assert wrong(found) == {}
    assert len(found) == len(CHECKS) and not any(one.skipped for one in found)
    of_bias = [BY_NAME[name] for name in ("recompute", "padding", "padding, ranks", "bfloat16")]
    assert wrong(list(run_checks("equipoise.conformance.ours:LossFree", of_bias))) == {}


def test_the_loss_of_transformers_is_k_times_the_law_and_pools_its_layers():
    pytest.importorskip("transformers", reason="needs transformers")
    checks = [BY_NAME[name] for name in ("one micro-batch", "padding", "padding alone", "layers that lean apart")]
    found = wrong(list(run_checks("equipoise.conformance.transformers:LoadBalancingLoss", checks)))
    assert found.pop("one micro-batch") == {"gradient": "x 2 = K"}
    assert found.pop("padding alone") == {"gradient": "not finite"}
    assert found.pop("layers that lean apart")["gradient"].startswith("off by 9")
    assert found == {}


OF_RANKS = (BY_NAME["ranks"], BY_NAME["ranks, accumulation"])


def test_a_right_router_passes_on_ranks_and_one_that_forgets_them_does_not():
    assert wrong(list(run_checks(f"{ROUTERS}:Right", OF_RANKS))) == {}
    found = wrong(list(run_checks(f"{ROUTERS}:OwnRankOnly", OF_RANKS[:1])))
    assert set(found["ranks"]) == {"gradient", "counts", "bias"}
    assert found["ranks"]["counts"] == "160 of 480"
    assert wrong(list(run_checks(f"{ROUTERS}:BiasOfOwnRank", OF_RANKS[:1]))) == {
        "ranks": {"bias": "differs between ranks"}
    }


@pytest.mark.parametrize(
    ("name", "checks", "said"),
    [
        ("OneRankRaises", OF_RANKS, ["RuntimeError: the second rank is out of memory (_routers.py:"] * 2),
        ("Hangs", OF_RANKS[:1], ["no answer in 20 s"]),
        ("Dies", (CHECKS[1], CHECKS[0]), ["the process died", ""]),
    ],
)
def test_what_raises_hangs_or_dies_is_a_finding_and_the_next_check_is_made(name, checks, said):
    found = list(run_checks(f"{ROUTERS}:{name}", checks, timeout=20.0))
    assert len(found) == len(checks)
    for finding, words in zip(found, said, strict=True):
        assert finding.words.get("step", "").startswith(words)
        assert finding.passed == (words == "")


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("nowhere.py:Right", "no such file"),
        (f"{ROUTERS}:Wrong", "there: Right, KTimes"),
        ("equipoise.errors:ConfigError", "derive it from Adapter"),
        ("no_such_package:Router", "install what it needs"),
        ("just_a_name", "name the class as well"),
        ("broken.py:Router", r"ZeroDivisionError: division by zero\n.*python broken\.py"),
        ("half.py:Router", "SyntaxError: invalid syntax"),
    ],
)
def test_an_adapter_that_cannot_be_loaded_says_what_to_do(spec, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("broken.py").write_text("x = 1 / 0\n")
    Path("half.py").write_text("def (\n")
    with pytest.raises(ConfigError, match=words):
        next(run_checks(spec))
