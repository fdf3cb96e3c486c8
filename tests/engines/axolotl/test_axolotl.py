"""axolotl's own command on a tiny model: loads, the balance gradient, its log, its checkpoints, what is refused."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from engines import _front_end, _training

pytestmark = pytest.mark.engine

OURS, RECORD = "equipoise.adapters.axolotl.EquipoisePlugin", "engines.axolotl.record_plugin.RecordPlugin"


class TestAxolotl(_front_end.FrontEnd):
    name = "axolotl"

    @classmethod
    def train(cls, folder: Path, policies: list[Any] | None, resume: Path | None = None, **more: Any) -> dict[str, Any]:
        import yaml

        folder.mkdir()
        if not (model := folder.parent / "model").exists():
            _training.write_model(model)
            lines = [json.dumps({"text": text}, ensure_ascii=False) for text in _training.texts(48)]
            (folder.parent / "text.jsonl").write_text("\n".join(lines))
        data = {"path": str(folder.parent / "text.jsonl"), "ds_type": "json", "type": "completion", "field": "text"}
        steps = {"max_steps": 3, "micro_batch_size": 2, "gradient_accumulation_steps": 2, "num_epochs": 1}
        rate = {"learning_rate": 1e-3, "lr_scheduler": "constant", "optimizer": "adamw_torch", "max_grad_norm": 0.0}
        types = {"bf16": False, "fp16": False, "tf32": False, "use_cpu": True, "device_map": "cpu"}
        files = {"output_dir": str(folder / "out"), "dataset_prepared_path": str(folder / "data"), "save_steps": 2}
        rest = {
            "sequence_len": 32,
            "sample_packing": False,
            "attn_implementation": "eager",
            "logging_steps": 1,
            "val_set_size": 0,
            "dataset_num_proc": 1,
            "seed": 3,
            "special_tokens": {"pad_token": "<pad>"},
        }
        whole = {"base_model": str(model), "datasets": [data]} | steps | rate | types | files | rest | more
        ours = {} if policies is None else {"equipoise": {"policies": policies}}
        again = {} if resume is None else {"resume_from_checkpoint": str(resume), "base_model": str(resume)}
        whole |= ours | again | {"plugins": [OURS, RECORD] if ours else [RECORD]}
        (folder / "config.yml").write_text(yaml.safe_dump(whole))
        return _training.run(["-m", "axolotl.cli.train", "config.yml"], folder, AXOLOTL_DO_NOT_TRACK="1")


@pytest.fixture
def plugins():
    """axolotl's list of plugins, as a process begins with it."""
    from axolotl.integrations.base import PluginManager

    PluginManager._instance = None
    yield
    PluginManager._instance = None


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({}, r"policies: \[\] measures and changes nothing"),
        ({"equipoise": {"policies": ["globl"]}}, "did you mean 'global'"),
        ({"equipoise": {"policies": [], "layer": True}}, "did you mean 'layers'"),
        ({"equipoise": {"policies": []}, "use_ray": True}, "leave it out"),
    ],
)
def test_what_is_wrong_in_its_configuration_stops_it(config, words, plugins):
    from axolotl.cli.config import prepare_plugins
    from axolotl.utils.dict import DictDefault

    with pytest.raises(ValueError, match=words):
        prepare_plugins(DictDefault({"plugins": [OURS]} | config))


def test_its_own_schema_takes_ours(plugins):
    from axolotl.cli.config import prepare_plugins
    from axolotl.integrations.config import merge_input_args
    from axolotl.utils.dict import DictDefault
    from pydantic import ValidationError

    table = {"kind": "AuxLoss", "scope": "global_batch", "coef": "1e-3"}
    good = {"policies": [table, "z"], "layers": True}
    prepare_plugins(DictDefault({"plugins": [OURS], "equipoise": good}))
    base = {"base_model": "x", "learning_rate": 1e-3, "micro_batch_size": 1, "gradient_accumulation_steps": 1}
    base |= {"datasets": [{"path": "x", "type": "completion"}]}
    _, schema = merge_input_args()
    kept = schema(**base, equipoise=good).model_dump(exclude_none=True)["equipoise"]
    assert (kept["policies"], kept["layers"]) == ([table, "z"], True)
    for bad in ({"policies": ["globl"]}, {"policies": [], "layer": True}, {}):
        with pytest.raises(ValidationError, match="expected"):
            schema(**base, equipoise=bad)


def test_a_part_of_it_that_cannot_be_imported_stops_it(monkeypatch, plugins):
    """axolotl goes on without a plugin whose module raises ImportError; ours raises where it does not."""
    from axolotl.cli.config import prepare_plugins
    from axolotl.utils.dict import DictDefault

    monkeypatch.setitem(sys.modules, "equipoise.adapters.front_end", None)
    with pytest.raises(ImportError):
        prepare_plugins(DictDefault({"plugins": [OURS], "equipoise": {"policies": []}}))
