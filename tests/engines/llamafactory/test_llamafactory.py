"""LLaMA-Factory by our launcher on a tiny model: loads, the balance gradient, its log, its checkpoints, refusals."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from engines import _front_end, _training

pytestmark = pytest.mark.engine

STUB = Path(__file__).parent / "stub"


class TestLlamaFactory(_front_end.FrontEnd):
    name = "LLaMA-Factory"

    @classmethod
    def train(cls, folder: Path, policies: list[Any] | None, resume: Path | None = None, **more: Any) -> dict[str, Any]:
        import yaml

        folder.mkdir()
        data = folder.parent / "data"
        if not (model := folder.parent / "model").exists():
            _training.write_model(model)
            data.mkdir()
            texts = _training.texts(96, longest=16)
            rows = [{"instruction": a, "input": "", "output": b} for a, b in zip(texts[::2], texts[1::2], strict=True)]
            (data / "text.json").write_text(json.dumps(rows))
            (data / "dataset_info.json").write_text(json.dumps({"text": {"file_name": "text.json"}}))
        kind = {"stage": "sft", "do_train": True, "finetuning_type": "full", "template": "empty"}
        files = {"model_name_or_path": str(model), "dataset": "text", "dataset_dir": str(data), "cutoff_len": 64}
        steps = {"max_steps": 3, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "seed": 3}
        rate = {"learning_rate": 1e-3, "lr_scheduler_type": "constant", "max_grad_norm": 0.0}
        types = {"use_cpu": True, "bf16": False, "fp16": False, "flash_attn": "sdpa"}
        out = {"output_dir": str(folder / "out"), "save_steps": 2, "logging_steps": 1, "report_to": "none"}
        rest = {"disable_gradient_checkpointing": True, "preprocessing_num_workers": 1, "overwrite_cache": True}
        whole = kind | files | steps | rate | types | out | rest | more
        whole |= {} if policies is None else {"equipoise": {"policies": policies}}
        (folder / "train.yaml").write_text(yaml.safe_dump(whole))
        command = [str(Path(__file__).parent / "record.py"), *(["--plain"] if policies is None else []), "train.yaml"]
        command += [] if resume is None else [f"resume_from_checkpoint={resume}", f"model_name_or_path={resume}"]
        return _training.run(command, folder, paths=[STUB])


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        ("stage: sft\n", "policies: [] measures and changes nothing"),
        ("stage: sft\nequipoise: {policies: [globl]}\n", "did you mean 'global'"),
        ("stage: sft\nmoe_aux_loss_coef: 0.001\nequipoise: {policies: [global]}\n", "one balance loss"),
        ("stage: ppo\nequipoise: {policies: [global]}\n", "transformers' Trainer"),
    ],
)
def test_what_is_wrong_in_its_configuration_stops_it(lines, words, tmp_path):
    (tmp_path / "train.yaml").write_text(lines)
    command = [sys.executable, "-m", "equipoise.adapters.llamafactory", "train.yaml"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=600)
    assert done.returncode == 2
    assert words in done.stderr
    assert "Traceback" not in done.stderr
