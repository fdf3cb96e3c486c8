"""A configuration that asks for equipoise: the doctor says so first, and no longer that nothing balances."""

from __future__ import annotations

import json

import pytest

from equipoise.cli import main
from equipoise.doctor import diagnose
from equipoise.doctor.engines import ENGINES
from unit.doctor._configs import diagnosed, text_of

BASE = {
    "axolotl": {"base_model": "Qwen/Qwen3-30B-A3B", "micro_batch_size": 2, "datasets": []},
    "llamafactory": {"model_name_or_path": "Qwen/Qwen3-30B-A3B", "stage": "sft", "finetuning_type": "full"},
    "ms-swift": {"model": "Qwen/Qwen3-30B-A3B", "tuner_type": "full"},
}
pytest.importorskip("yaml", reason="PyYAML is not installed")


def asked(engine: str, policies) -> dict:
    if engine == "ms-swift":
        return BASE[engine] | {"ENV": {"EQUIPOISE_POLICIES": policies}}
    return BASE[engine] | {"equipoise": {"policies": policies}}


@pytest.mark.parametrize("engine", BASE)
@pytest.mark.parametrize("policies", ["global@1e-3", ["global@1e-3", {"kind": "ZLoss", "coef": 1e-4}]])
def test_policies_are_the_answer(engine, policies, tmp_path, capsys):
    case = diagnosed(tmp_path, asked(engine, policies), engine=engine)
    text = text_of(case)
    named = "global@1e-3" if isinstance(policies, str) else "global@1e-3, ZLoss"
    assert f"equipoise balances: {named}. All below" in text and case.balances
    assert "Nothing balances" not in text and "with equipoise" not in text and f"refuses: {case.guide}" in text
    path = tmp_path / "given.yaml"
    assert main(["doctor", str(path), "--engine", engine, "--strict"]) == 0
    capsys.readouterr()
    assert main(["doctor", str(path), "--engine", engine, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["ours"] == named.split(", ")


@pytest.mark.parametrize("engine", BASE)
@pytest.mark.parametrize("policies", [[], "[]"])
def test_none_measures_only(engine, policies, tmp_path):
    text = text_of(diagnosed(tmp_path, asked(engine, policies), engine=engine))
    assert "equipoise measures, and changes nothing. Nothing balances the experts." in text


def test_of_a_launch_line():
    line = "swift sft --model Qwen/Qwen3-30B-A3B --external_plugins x --callbacks equipoise"
    assert "equipoise balances: global@1e-3." in text_of(diagnose([f"EQUIPOISE_POLICIES=global@1e-3 {line}"]))
    assert diagnose([line]).ours is None and set(BASE) < set(ENGINES)
