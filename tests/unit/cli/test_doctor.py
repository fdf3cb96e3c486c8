"""``equipoise doctor`` as a user types it."""

from __future__ import annotations

import json

import pytest

from equipoise.cli import main
from equipoise.doctor.diagnosis import ASKED
from equipoise.doctor.engines import bridge
from unit.doctor._configs import QWEN3

OFF = QWEN3 | {"router_aux_loss_coef": 0.001}
LINE = ["--num-experts", "8", "--num-layers", "4", "--moe-aux-loss-coeff", "1e-2", "--micro-batch-size", "2"]


@pytest.fixture
def config(tmp_path):
    pytest.importorskip("transformers", reason="the hf extra is not installed")
    path = tmp_path / "config.json"
    path.write_text(json.dumps(OFF), encoding="utf-8")
    return str(path)


def out(capsys, *arguments: str, code: int = 0) -> str:
    assert main(["doctor", *arguments]) == code
    return capsys.readouterr().out


def flat(text: str) -> str:
    return " ".join(text.split())


def test_the_answer_comes_first(config, capsys):
    text = out(capsys, config, "--micro-batch", "4")
    lines = text.splitlines()
    assert lines[0].startswith("transformers ") and "128 experts, top-8, 48 MoE layers" in text
    assert lines[3:5] == ["Nothing balances the experts.", "A loss of coefficient 0.001 is declared, and does nothing."]
    assert text.index("OFF ") < text.index("in transformers, write:") < text.index("with equipoise")


def test_a_launch_line_after_two_dashes(capsys):
    text = flat(out(capsys, "--world", "8", "--", "torchrun", "pretrain_gpt.py", *LINE))
    assert "your Balance BSZ is 2, of 16 in a step" in text


def test_what_is_missing_is_asked_for_by_its_option(capsys):
    text = flat(out(capsys, "--", *LINE, "--moe-router-load-balancing-type", "global_aux_loss"))
    assert "Balance BSZ is ranks times the micro-batches so far" in text and "· 1/W:" in text
    for one in ("accumulation", "ranks"):
        assert flat(ASKED[one]) in text
    assert flat(ASKED["micro-batch"]) not in text
    assert "for an answer in numbers" not in out(capsys, "--world", "2", "--", *LINE, "--global-batch-size", "16")


def test_80_columns(config, tmp_path, capsys):
    cases = [[config], [config, "--world", "8", "--accumulation", "8", "--expert-parallel", "8"], ["--", *LINE]]
    for kind in bridge.IMPORTS:
        path = tmp_path / f"{kind}.json"
        path.write_text(json.dumps({"model_type": kind, "num_experts": 8}), encoding="utf-8")
        cases.append([str(path), "--engine", "megatron-bridge"])
    for arguments in cases:
        assert max(map(len, out(capsys, *arguments).splitlines())) <= 80


def test_a_hostile_name_stays_text(tmp_path, capsys):
    pytest.importorskip("yaml", reason="PyYAML is not installed")
    path = tmp_path / "a.yaml"
    path.write_text('base_model: "x\\e[31m"\nmicro_batch_size: 1\n"aux_loss\\e[2J": 1\n', encoding="utf-8")
    assert "\x1b" not in out(capsys, str(path))


def test_json_has_the_numbers(config, capsys):
    data = json.loads(out(capsys, config, "--micro-batch", "4", "--accumulation", "2", "--world", "8", "--json"))
    (loss,) = data["losses"]
    assert (loss["works"], loss["balance_bsz"], loss["scope"]) == (False, 4, "micro_batch")
    assert loss["ours"] == pytest.approx(1e-3 * 8 / 48 * 2 * 8)
    assert data["fix"] == {"output_router_logits": True} and not data["balances"]
    assert data["policies"][0]["line"] == 'AuxLoss("global_batch", coef=0.000167)'


def test_strict_fails_where_it_is_not_as_written(config, capsys):
    out(capsys, config, code=0)
    out(capsys, config, "--strict", code=1)
    out(capsys, "--strict", "--world", "1", "--", *LINE, code=0)


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["nowhere.json"], 4, "not there"),
        (["--world", "0", "--", *LINE], 2, "at least 1"),
        (["--engine", "vllm", "--", *LINE], 2, "engine"),
        (["--", "--num-layers", "4", "--micro-batch-size", "1", "--hidden-size", "8"], 2, "mixture-of-experts"),
    ],
)
def test_errors_are_said_once_in_three_parts(arguments, code, words, capsys):
    assert main(["doctor", *arguments]) == code
    error = capsys.readouterr().err
    assert words in error and error.count("equipoise: expected") == 1 and "\n  do:" in error


def test_the_policies_that_it_writes_are_policies(config, capsys):
    import equipoise

    for arguments in ([config], [config, "--world", "8", "--accumulation", "2"], ["--", *LINE]):
        told = json.loads(out(capsys, "--json", *arguments))["policies"]
        assert told[-1]["line"] == ""  # none of them: to look first
        for one in told:
            written = eval(f"[{one['line']}]", vars(equipoise))
            assert all(isinstance(policy, equipoise.AuxLoss | equipoise.ExpertBias) for policy in written)
            assert (one["line"] or one["name"]) in one["written"] or one["name"] in one["written"]
