"""Files and launch lines as the doctor reads them, which engine they are for, and every input that is none."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from equipoise import ConfigError, DataError
from equipoise.doctor import Options, diagnose
from equipoise.doctor.document import read_document
from equipoise.doctor.options import integer, number
from equipoise.doctor.recognition import recognize
from equipoise.doctor.shell import read_launch, scalar
from unit.doctor._configs import QWEN3

ENGINE_OF = {
    "axolotl": "base_model: x\nmicro_batch_size: 1\nmodel_config: {output_router_logits: true}\n",
    "llamafactory": "model_name_or_path: x\nstage: sft\nfinetuning_type: lora\ntemplate: qwen3\n",
    "ms-swift": "model: x\ntuner_type: full\nrouter_aux_loss_coef: 0.1\n",
    "trl": "model_name_or_path: x\ndataset_name: y\nrouter_aux_loss_coef: 0.1\n",
    "megatron": "MODEL_ARGS:\n  --num-experts: 8\n  --moe-router-topk: 2\n",
    "verl": "actor_rollout_ref: {actor: {strategy: megatron}}\ntrainer: {nnodes: 1}\n",
}
LINES = {
    "axolotl": "accelerate launch --num_processes 8 -m axolotl.cli.train a.yaml",
    "llamafactory": "FORCE_TORCHRUN=1 llamafactory-cli train --stage sft --moe_aux_loss_coef 0.1",
    "ms-swift": "CUDA_VISIBLE_DEVICES=0,1 NPROC_PER_NODE=2 swift sft --model x --router_aux_loss_coef 1e-3",
    "trl": "trl sft --model_name_or_path x --dataset_name y",
    "megatron": "torchrun --nproc_per_node 8 pretrain_gpt.py --num-experts 8 --moe-aux-loss-coeff 1e-2",
    "verl": "python3 -m verl.trainer.main_ppo actor_rollout_ref.model.path=x",
    "torchtitan": "torchrun --nproc_per_node=8 -m torchtitan.train --job.config_file x.toml",
}


def engine_of(inputs: list[str], **options) -> str:
    return recognize(read_document(inputs), Options(**options))


class TestRecognition:
    @pytest.mark.parametrize("engine", ENGINE_OF)
    def test_by_the_names_in_a_file(self, engine, tmp_path):
        pytest.importorskip("yaml", reason="PyYAML is not installed")
        (tmp_path / "a.yaml").write_text(ENGINE_OF[engine], encoding="utf-8")
        assert engine_of([str(tmp_path / "a.yaml")]) == engine
        assert engine_of([str(tmp_path)]) == engine  # the only configuration in a folder

    @pytest.mark.parametrize("engine", LINES)
    def test_by_the_program_of_a_line(self, engine):
        assert engine_of([LINES[engine]]) == engine
        assert engine_of(LINES[engine].split()) == engine

    def test_a_model_s_folder(self, tmp_path):
        (tmp_path / "config.json").write_text(json.dumps(QWEN3), encoding="utf-8")
        (tmp_path / "training.yaml").write_text("a: 1", encoding="utf-8")
        assert engine_of([str(tmp_path)]) == "transformers"

    def test_names_that_fit_several(self, tmp_path):
        (tmp_path / "a.json").write_text('{"base_model": "x", "tuner_type": "lora"}', encoding="utf-8")
        with pytest.raises(ConfigError, match="--engine: axolotl, ms-swift"):
            engine_of([str(tmp_path / "a.json")])
        assert engine_of([str(tmp_path / "a.json")], engine="Axolotl") == "axolotl"

    def test_names_that_fit_none(self, tmp_path):
        (tmp_path / "ds.json").write_text('{"zero_optimization": {"stage": 3}}', encoding="utf-8")
        with pytest.raises(ConfigError, match="zero_optimization"):
            engine_of([str(tmp_path / "ds.json")])

    def test_an_engine_that_is_not_known(self, tmp_path):
        (tmp_path / "config.json").write_text(json.dumps(QWEN3), encoding="utf-8")
        with pytest.raises(ConfigError, match="did you mean 'axolotl'"):
            engine_of([str(tmp_path)], engine="axolot")
        with pytest.raises(ConfigError, match="version in numbers"):
            _ = Options(engine="trl==main").version


class TestBadFiles:
    @pytest.mark.parametrize(
        ("name", "content", "error", "words"),
        [
            ("config.json", '{"model_type": "qwen3_moe", ', DataError, "half-written"),
            ("a.yaml", "model: [1, 2\n", DataError, "half-written"),
            ("a.toml", "[model\n", DataError, "half-written"),
            ("a.json", "[1, 2]", DataError, "no configuration"),
            ("a.yaml", "only words", DataError, "no configuration"),
            ("a.yaml", "", DataError, "no configuration"),
            ("a.sh", "echo hello\n", DataError, "without any --option"),
            ("a.json", "{" * 100_000, DataError, "half-written"),
            ("config.json", '{"architectures": ["X"]}', ConfigError, "model_type"),
        ],
    )
    def test_what_is_no_configuration(self, name, content, error, words, tmp_path):
        (tmp_path / name).write_text(content, encoding="utf-8")
        with pytest.raises(error, match=words) as caught:
            diagnose([str(tmp_path / name)])
        assert caught.value.do and caught.value.got

    def test_what_cannot_be_read(self, tmp_path):
        (tmp_path / "a.json").write_bytes(b"\xff\xfe\x00")
        (tmp_path / "large.json").write_bytes(b" " * 5_000_000)
        (tmp_path / "empty").mkdir()
        for path, error in (
            ("a.json", DataError),
            ("large.json", DataError),
            ("none.json", DataError),
            ("empty", ConfigError),
        ):
            with pytest.raises(error):
                read_document([str(tmp_path / path)])
        with pytest.raises(ConfigError):
            read_document([])

    def test_several_in_a_folder(self, tmp_path):
        for name in ("a.yaml", "b.toml"):
            (tmp_path / name).write_text("a = 1", encoding="utf-8")
        with pytest.raises(ConfigError, match=r"a\.yaml, b\.toml"):
            read_document([str(tmp_path)])

    def test_yaml_without_pyyaml(self, tmp_path, monkeypatch):
        monkeypatch.setitem(__import__("sys").modules, "yaml", None)
        (tmp_path / "a.yaml").write_text("a: 1", encoding="utf-8")
        with pytest.raises(ConfigError, match="pip install pyyaml"):
            read_document([str(tmp_path / "a.yaml")])


class TestLaunch:
    def test_a_script(self):
        launch = read_launch(
            "#!/bin/bash\n"
            "export N=8   # ranks of a node --not-an-option\n"
            'ARGS="--num-experts 64 \\\n  --moe-router-topk 8"\n'
            'MORE="\n  --moe-layer-freq ([0]*3+[1]*58)\n  --bf16\n"\n'
            'NODES=${SLURM_NNODES:-"2"}\n'
            "torchrun --nproc_per_node $N --nnodes=${NODES} pretrain_gpt.py $ARGS --lr 1e-4 --lr 3e-4 --tag 'a b'\n"
        )
        assert launch.ranks == 16 and launch.words == ["torchrun", "pretrain_gpt.py"]
        found = {"num_experts": 64, "moe_router_topk": 8, "moe_layer_freq": "([0]*3+[1]*58)", "bf16": True, "lr": 3e-4,
                 "tag": "a b"}  # fmt: skip
        assert found.items() <= launch.options.items() and "not_an_option" not in launch.options

    def test_products_and_defaults(self):
        launch = read_launch("A=4\nB=$(($A*2))\nC=${X:-${Y:-/z}/q}\nrun --a $B --b $C --c $UNSET\n")
        assert launch.options == {"a": 8, "b": "/z/q", "c": "$UNSET"}
        assert integer(launch.options, "c") is None

    def test_overrides(self):
        launch = read_launch("python -m verl.trainer.main_ppo a.b=1e-3 +c.d.e=none --x 1 f.g=true")
        assert launch.overrides == {"a.b": 1e-3, "c.d.e": "none", "f.g": True} and launch.options["x"] == 1

    def test_accelerate_counts_processes_in_all(self):
        assert read_launch("accelerate launch --num_processes 8 --num_machines 2 train.py").ranks == 8
        assert read_launch("python train.py --lr 1").ranks is None

    def test_a_file_that_a_line_names(self, tmp_path, monkeypatch):
        (tmp_path / "a.json").write_text('{"stage": "sft", "moe_aux_loss_coef": 0.1}', encoding="utf-8")
        (tmp_path / "ds.json").write_text('{"zero_optimization": 1}', encoding="utf-8")
        monkeypatch.chdir(tmp_path)
        document = read_document("llamafactory-cli train a.json --deepspeed ds.json --stage dpo".split())  # noqa: SIM905
        assert document.data == {"stage": "dpo", "moe_aux_loss_coef": 0.1, "deepspeed": "ds.json"}

    @given(st.text(max_size=200))
    def test_any_text_is_read_or_is_none(self, text):
        """No text makes it fail, run anything or take for ever."""
        launch = read_launch(text)
        assert all(isinstance(name, str) for name in launch.options)

    @given(st.one_of(st.integers(-(10**6), 10**6), st.floats(allow_nan=False, allow_infinity=False), st.booleans()))
    def test_numbers_are_read_back(self, value):
        assert scalar(str(value)) == value


class TestNumbers:
    def test_text_that_is_one(self):
        assert number({"a": "1e-3"}, "a") == 1e-3 and number({}, "a", 2.0) == 2.0 and number({"a": None}, "a") is None

    @pytest.mark.parametrize("value", ["much", [1], True, "$COEF"])
    def test_what_is_none(self, value):
        with pytest.raises(ConfigError, match="a number for a"):
            number({"a": value}, "a")

    def test_whole_numbers(self):
        with pytest.raises(ConfigError, match="whole number"):
            integer({"a": 1.5}, "a")
        assert integer({"a": "8"}, "a") == 8

    @pytest.mark.parametrize("options", [{"world": 0}, {"micro_batch": -1}, {"world": 6, "expert_parallel": 4}])
    def test_options(self, options):
        with pytest.raises(ConfigError):
            Options(**options)


def test_prose_is_no_configuration(tmp_path):
    """A README that names engines was taken for the configuration of one."""
    for name in ("README.md", "text.jsonl"):
        (tmp_path / name).write_text("axolotl trains with torchrun train.py --lr 1e-3\n", encoding="utf-8")
        with pytest.raises(ConfigError, match="a script, or a launch line"):
            diagnose([str(tmp_path / name)])
