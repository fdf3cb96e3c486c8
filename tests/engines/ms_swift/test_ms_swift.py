"""ms-swift's own command on a tiny model: loads, the balance gradient, its log, its checkpoints, what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from engines import _front_end, _training

pytestmark = pytest.mark.engine


class TestMsSwift(_front_end.FrontEnd):
    name = "ms-swift"

    @classmethod
    def train(cls, folder: Path, policies: list[Any] | None, resume: Path | None = None, **more: Any) -> dict[str, Any]:
        import yaml

        from equipoise.adapters.ms_swift import PLUGIN, VARIABLE

        folder.mkdir()
        if not (model := folder.parent / "model").exists():
            _training.write_model(model)
            texts = _training.texts(96, longest=20)
            lines = [
                json.dumps({"messages": [{"role": "user", "content": a}, {"role": "assistant", "content": b}]})
                for a, b in zip(texts[::2], texts[1::2], strict=True)
            ]
            (folder.parent / "text.jsonl").write_text("\n".join(lines))
        data = {"dataset": str(folder.parent / "text.jsonl"), "split_dataset_ratio": 0, "load_from_cache_file": False}
        kind = {"model": str(model), "model_type": "qwen3_moe", "template": "qwen3", "tuner_type": "full"}
        types = {"torch_dtype": "float32", "attn_impl": "sdpa", "use_cpu": True, "bf16": False, "fp16": False}
        steps = {"max_steps": 3, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "max_length": 256}
        rate = {"learning_rate": 1e-3, "lr_scheduler_type": "constant", "max_grad_norm": 0, "seed": 3}
        files = {"output_dir": str(folder / "out"), "save_steps": 2, "logging_steps": 1, "report_to": "none"}
        rest = {"gradient_checkpointing": False, "dataloader_num_workers": 0, "add_version": False, "strict": True}
        whole = data | kind | types | steps | rate | files | rest | more
        record = str(Path(__file__).parent / "record_plugin.py")
        plugins = {"external_plugins": [record], "callbacks": ["record"]}
        if policies is not None:
            plugins = {"external_plugins": [str(PLUGIN), record], "callbacks": ["equipoise", "record"]}
            whole["ENV"] = {VARIABLE: json.dumps(policies)}
        if resume is not None:
            whole |= {"resume_from_checkpoint": str(resume), "model": str(resume)}
        (folder / "config.yaml").write_text(yaml.safe_dump(whole | plugins))
        return _training.run(
            ["-m", "swift.cli.main", "sft", "config.yaml"], folder, MODELSCOPE_CACHE=str(folder / "ms")
        )


def test_its_list_of_callbacks_knows_ours(capsys):
    from swift.callbacks import callbacks_map
    from swift.utils import import_external_file

    from equipoise.adapters.ms_swift import PLUGIN

    import_external_file(str(PLUGIN))
    assert "equipoise" in callbacks_map
    assert "--callbacks equipoise" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("policies", "arguments", "words"),
    [
        (None, {}, "measures and changes nothing"),
        ("global", {"router_aux_loss_coef": 1e-3}, "the model's own on again at every batch"),
        ("global", {"template": SimpleNamespace(sequence_parallel_size=2)}, "whole sequences"),
    ],
)
def test_what_would_be_balanced_twice_or_not_at_all_is_refused(policies, arguments, words, monkeypatch):
    from equipoise.adapters.ms_swift import VARIABLE, callback
    from equipoise.errors import ConfigError

    monkeypatch.delenv(VARIABLE, raising=False)
    if policies:
        monkeypatch.setenv(VARIABLE, policies)
    with pytest.raises(ConfigError, match=words):
        callback(SimpleNamespace(**arguments), SimpleNamespace(**arguments))
