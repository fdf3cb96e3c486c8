"""Each engine: the configurations that it is released with, and every way to lose or change a balance loss in it."""

from __future__ import annotations

import pytest

from equipoise import ConfigError
from equipoise.doctor import ENGINES, Options, diagnose
from equipoise.doctor.engines import bridge, llamafactory, megatron
from unit.doctor._configs import MIXTRAL, QWEN3, diagnosed, said, text_of

pytest.importorskip("yaml", reason="PyYAML is not installed")

AXOLOTL_MIXTRAL = (  # examples/mistral/mixtral/mixtral.yml of 0.19.0, the lines that matter here
    "base_model: mistralai/Mixtral-8x7B-v0.1\nload_in_4bit: true\nadapter: qlora\nlora_target_linear: true\n"
    "model_config:\n  output_router_logits: true\nsequence_len: 4096\nsample_packing: true\n"
    "gradient_accumulation_steps: 2\nmicro_batch_size: 1\ngradient_checkpointing: true\n"
)
LLAMA_FACTORY = "model_name_or_path: Qwen/Qwen3-30B-A3B\nstage: sft\nfinetuning_type: full\n"
SWIFT = "model: Qwen/Qwen3-30B-A3B\ntuner_type: full\ndataset: [x]\n"
TRL = "model_name_or_path: Qwen/Qwen3-30B-A3B\ndataset_name: x\n"
MCORE = "--num-experts 64 --moe-router-topk 8 --num-layers 16 --micro-batch-size 2 --global-batch-size 128"
TYPE, COEF = "--moe-router-load-balancing-type", "--moe-aux-loss-coeff"
BIAS = "--moe-router-enable-expert-bias --moe-router-score-function sigmoid"
MIXTRAL_SCRIPT = """\
#!/bin/bash
GPUS_PER_NODE=8
NNODES=${SLURM_NNODES:-"1"}
DISTRIBUTED_ARGS=(
    --nproc_per_node $GPUS_PER_NODE
    --nnodes $NNODES   # of this job
)
MOE_ARGS=(
    --num-experts 8
    --moe-router-topk 2
    --moe-router-load-balancing-type aux_loss
    --moe-aux-loss-coeff 1e-2
)
MODEL_ARGS=(
    --num-layers 32 --micro-batch-size 1 --global-batch-size 256
    --pipeline-model-parallel-size 4 --expert-model-parallel-size 8 --tensor-model-parallel-size 1
)
torchrun ${DISTRIBUTED_ARGS[@]} pretrain_gpt.py ${MOE_ARGS[@]} ${MODEL_ARGS[@]}
"""


class TestReleasedDefaults:
    """What a user has who changes nothing."""

    def test_transformers(self, tmp_path):
        """5.23.0: every family that can add a loss has its flag off."""
        case = diagnosed(tmp_path, {"model_type": "qwen3_moe"}, ".json")
        assert not case.balances and "output_router_logits is false: router_aux_loss_coef = 0.001" in said(case, "off")

    def test_trl(self, tmp_path):
        """1.16.0: on, with the coefficient that the model declares, and a mean."""
        case = diagnosed(tmp_path, TRL, engine="trl==1.16.0", world=8)
        assert case.balances and "without being asked for" in said(case, "differs")
        assert case.losses[0].factors == () and case.losses[0].real(case.model) == pytest.approx(1e-3 * 8 / 48)

    def test_axolotl(self, tmp_path):
        """0.19.0: the example switches the loss on, and checkpointing takes its gradient away."""
        case = diagnosed(tmp_path, AXOLOTL_MIXTRAL, world=8)
        assert not case.balances and "has no gradient" in said(case, "off") and "routers" in said(case, "note")
        assert case.fix == {"gradient_checkpointing_kwargs.use_reentrant": False}
        mended = diagnosed(
            tmp_path, f"{AXOLOTL_MIXTRAL}gradient_checkpointing_kwargs: {{use_reentrant: false}}\n", world=8
        )
        assert mended.balances and mended.losses[0].real(mended.model) == pytest.approx(1e-3 * 2 / 32)

    def test_llamafactory(self, tmp_path):
        """0.9.5: no loss; with a coefficient none either, until checkpointing is told not to be reentrant."""
        assert "moe_aux_loss_coef is not set" in said(diagnosed(tmp_path, LLAMA_FACTORY), "off")
        case = diagnosed(tmp_path, f"{LLAMA_FACTORY}moe_aux_loss_coef: 0.001\n")
        assert not case.balances and case.fix == {"use_reentrant_gc": False}

    def test_ms_swift(self, tmp_path):
        """4.6.0: coefficient 0, for both of its trainers."""
        assert "is 0, the default: no balance loss" in said(diagnosed(tmp_path, SWIFT), "off")
        case = diagnosed(tmp_path, "megatron sft --model Qwen/Qwen3-30B-A3B --micro_batch_size 1", ".sh", world=8)
        assert case.engine == "ms-swift (megatron)" and "moe_aux_loss_coeff is 0, the default" in said(case, "off")
        assert (case.batch.micro_batch, case.batch.accumulation, case.batch.ranks) == (1, 2, 8)

    def test_megatron(self, tmp_path):
        """0.16.1: the type is aux_loss and its coefficient 0."""
        case = diagnose(["--num-experts", "8", "--num-layers", "4"], Options(world=8))
        assert not case.balances and "moe_aux_loss_coeff is 0, the default: aux_loss does nothing" in said(case, "off")

    def test_megatron_s_example(self, tmp_path):
        case = diagnosed(tmp_path, MIXTRAL_SCRIPT, ".sh")
        assert (case.batch.ranks, case.batch.accumulation, case.model.layers) == (2, 128, 32)
        assert "your Balance BSZ is 1, of 256 in a step" in text_of(case)
        assert case.losses[0].real(case.model) == 1e-2
        assert case.wider == {megatron.TYPE: "global_aux_loss", megatron.COEF: 0.02}

    @pytest.mark.parametrize(
        ("name", "flavor", "moves"),
        [("deepseek_v3", "debugmodel", True), ("qwen3", "30B-A3B", False), ("gpt_oss", "20b", True),
         ("llama4", "17bx16e", True)],
    )  # fmt: skip
    def test_torchtitan(self, name, flavor, moves, tmp_path):
        """0.2.2: a bias of rate 1e-3, and of qwen3 one that nobody moves (B42)."""
        toml = (
            f'[model]\nname = "{name}"\nflavor = "{flavor}"\n[training]\nlocal_batch_size = 4\nglobal_batch_size = 64\n'
        )
        case = diagnosed(tmp_path, f"{toml}[parallelism]\ntensor_parallel_degree = 2\n", ".toml", world=16)
        assert case.balances == moves and case.bias.rate == (1e-3 if moves else 0.0)
        assert (case.batch.ranks, case.batch.accumulation, case.batch.whole) == (8, 2, 64)
        assert ("64 sequences: it moves by 0.001 a step" in text_of(case)) == moves
        assert ("torchtitan#3666" in said(case, "off")) != moves

    def test_torchtitan_of_0_3(self):
        line = "torchrun --nproc_per_node 8 -m torchtitan.train --module qwen3 --config qwen3_30b_a3b"
        case = diagnose([line])
        assert case.version == "0.3.0" and case.bias_moves

    def test_verl_s_example(self):
        """examples/grpo_trainer/run_qwen3_vl_30b_a3b_megatron.sh: 0.01 is written, and the type stays none."""
        over = "+actor_rollout_ref.actor.megatron.override_transformer_config"
        words = ["python3", "-m", "verl.trainer.main_ppo", "actor_rollout_ref.actor.use_dynamic_bsz=True",
                 "actor_rollout_ref.model.path=Qwen/Qwen3-VL-30B-A3B-Instruct", f"{over}.moe_aux_loss_coeff=0.01",
                 f"{over}.moe_z_loss_coeff=0.001"]  # fmt: skip
        case = diagnose(words)
        assert not case.balances and case.z_loss == 1e-3 and case.batch.micro_batch is None
        assert list(case.fix) == [f"{over}.{megatron.TYPE}"]
        assert diagnose([*words, f"{over}.{megatron.TYPE}=aux_loss"]).balances

    @pytest.mark.parametrize("kind", bridge.IMPORTS)
    def test_megatron_bridge(self, kind, tmp_path):
        """Each import of commit 067f987 says what it makes; whoever has no type and no bias is balanced by nothing."""
        known = bridge.IMPORTS[kind]
        config = {"model_type": kind, "num_experts": 8, "num_experts_per_tok": 2}
        case = diagnosed(tmp_path, config, ".json", engine="megatron-bridge")
        moves = known.rate is not None and known.rate > 0
        of_config = known.coef is None and kind != "deepseek_v2"  # whose config.json has no coefficient
        loss = known.type != "none" and (of_config or bool(known.coef))
        assert case.balances == (moves or loss)
        assert [one.scope for one in case.losses] == ([megatron.SCOPES[known.type]] if loss else [])
        assert (case.bias is not None) == (known.rate is not None)


class TestAxolotl:
    def test_without_the_flag(self, tmp_path):
        case = diagnosed(tmp_path, "base_model: Qwen/Qwen3-30B-A3B\nmicro_batch_size: 2\n", world=4)
        assert case.fix == {"model_config.output_router_logits": True}
        assert "model_config:\n    output_router_logits: true" in "\n".join(f"  {line}" for line in _yaml(case))

    @pytest.mark.parametrize(
        "key", ["router_aux_loss_coef: 0.01", "output_router_logits: true", "moe_aux_loss_coef: 0.1"]
    )
    def test_keys_at_the_top_level_are_dropped(self, key, tmp_path):
        case = diagnosed(tmp_path, f"base_model: Qwen/Qwen3-30B-A3B\nmicro_batch_size: 2\n{key}\n")
        assert f"{key.partition(':')[0]} at the top level is dropped" in said(case, "off")

    def test_a_number_that_yaml_takes_for_a_word(self, tmp_path):
        yaml = AXOLOTL_MIXTRAL.replace("true\nsequence", "true\n  router_aux_loss_coef: 1e-3\nsequence")
        case = diagnosed(tmp_path, yaml)
        assert "router_aux_loss_coef: 1e-3 is text" in said(case, "refused")
        assert "router_aux_loss_coef: 0.001" in text_of(case)

    def test_a_vision_model_reads_its_text_config(self, tmp_path):
        yaml = "base_model: Qwen/Qwen3-VL-30B-A3B-Instruct\nmicro_batch_size: 1\n"
        case = diagnosed(tmp_path, f"{yaml}model_config: {{output_router_logits: true}}\n")
        assert not case.balances and "text_config" in said(case, "off")

    @pytest.mark.parametrize("rl", ["dpo", "kto", "grpo"])
    def test_rl_is_trl_s(self, rl, tmp_path):
        case = diagnosed(tmp_path, f"base_model: Qwen/Qwen3-30B-A3B\nmicro_batch_size: 1\nrl: {rl}\n")
        assert case.balances and case.losses[0].factors == () and "TRL#6085" in said(case, "differs")


def _yaml(case):
    from equipoise.doctor.remedies import as_settings

    return as_settings(case.fix, "yaml")


class TestLlamaFactory:
    ON = f"{LLAMA_FACTORY}moe_aux_loss_coef: 0.01\nuse_reentrant_gc: false\n"

    def test_on(self, tmp_path):
        case = diagnosed(tmp_path, f"{self.ON}gradient_accumulation_steps: 4\n", world=2)
        assert case.losses[0].real(case.model) == pytest.approx(0.01 * 8 / 48 * 4 * 2)
        assert case.batch.micro_batch == 8  # the default of transformers' arguments

    def test_one_rank_without_token_average(self, tmp_path):
        case = diagnosed(tmp_path, f"{self.ON}average_tokens_across_devices: false\n", world=8)
        assert [one.name for one in case.losses[0].factors] == ["M"]

    @pytest.mark.parametrize(
        ("line", "words"),
        [("stage: dpo", "stage dpo makes a loss of its own"), ("use_dft_loss: true", "use_dft_loss replaces"),
         ("label_smoothing_factor: 0.1", "label_smoothing_factor replaces"), ("use_unsloth_gc: true", "no gradient")],
    )  # fmt: skip
    def test_what_loses_it(self, line, words, tmp_path):
        yaml = self.ON.replace("stage: sft\n", "") if line.startswith("stage") else self.ON
        case = diagnosed(tmp_path, f"{yaml}{line}\n")
        assert not case.balances and words in said(case, "off")

    def test_a_key_of_another_engine(self, tmp_path):
        case = diagnosed(tmp_path, f"{LLAMA_FACTORY}router_aux_loss_coef: 0.01\n")
        assert "router_aux_loss_coef is not an argument" in said(case, "refused")
        assert text_of(case).count("It will not start") == 1

    def test_families_that_only_get_the_flag(self, tmp_path):
        (tmp_path / "config.json").write_text('{"model_type": "glm4v_moe"}', encoding="utf-8")
        yaml = self.ON.replace("Qwen/Qwen3-30B-A3B", str(tmp_path))
        case = diagnosed(tmp_path, yaml)
        assert case.losses[0].coef == 1e-4 and "its weight stays 0.0001" in said(case, "differs")

    def test_a_family_on_the_list_that_has_no_loss(self, tmp_path):
        """Llama 4 is on both lists, and its code in transformers adds nothing."""
        (tmp_path / "config.json").write_text('{"model_type": "llama4_text"}', encoding="utf-8")
        case = diagnosed(tmp_path, self.ON.replace("Qwen/Qwen3-30B-A3B", str(tmp_path)))
        assert not case.balances and "llama4_text adds no balance loss" in said(case, "off")
        assert "llama4" in llamafactory.SETS_COEF


class TestSwift:
    ON = f"{SWIFT}router_aux_loss_coef: 0.01\nper_device_train_batch_size: 2\n"

    def test_accumulation_that_it_chooses(self, tmp_path):
        case = diagnosed(tmp_path, self.ON, world=2)
        assert case.batch.accumulation == 4 and "16 sequences a step" in " ".join(case.known_from)
        assert case.losses[0].real(case.model) == pytest.approx(0.01 * 8 / 48)  # a mean over micro-batches and ranks

    @pytest.mark.parametrize(("line", "world", "works"), [("", 8, True), ("", 1, False), ("deepspeed: zero2", 8, False),
                             ("gradient_checkpointing: false", 1, True)])  # fmt: skip
    def test_checkpointing(self, line, world, works, tmp_path):
        assert diagnosed(tmp_path, f"{self.ON}{line}\n", world=world).balances == works

    def test_the_other_trainer_s_name(self, tmp_path):
        line = "megatron sft --model Qwen/Qwen3-30B-A3B --router_aux_loss_coef 0.01 --micro_batch_size 1"
        case = diagnosed(tmp_path, line, ".sh", world=8)
        assert "megatron sft reads moe_aux_loss_coeff" in said(case, "off")

    @pytest.mark.parametrize(("more", "moves"), [("", True), ("--tuner_type lora", False)])
    def test_a_bias_of_the_checkpoint(self, more, moves, tmp_path):
        line = f"megatron sft --model deepseek-ai/DeepSeek-V3 --moe_aux_loss_coeff 1e-4 --global_batch_size 64 {more}"
        case = diagnosed(tmp_path, line, ".sh", world=64)
        assert case.bias_moves == moves and case.losses[0].scope == "sequence"


class TestMegatron:
    def test_sequence_loss_and_bias_as_deepseek_v3(self):
        line = f"{MCORE} {TYPE} seq_aux_loss {COEF} 1e-4 {BIAS}"
        case = diagnose(line.split(), Options(world=8))
        assert case.bias.rate == 1e-3 and case.losses[0].sequences(case.batch) == 1
        assert "B66" in said(case, "differs") and "128 sequences" in text_of(case)

    def test_global_loss(self):
        line = f"{MCORE} {TYPE} global_aux_loss {COEF} 1e-2"
        case = diagnose(line.split(), Options(world=8))
        (loss,) = case.losses
        assert loss.real(case.model) == pytest.approx(1e-2 / 8) and loss.meant(case.model) == 1e-2
        assert "16 at a step's first micro-batch, 128 at its last" in text_of(case)
        assert "B01" in said(case, "differs") and "B33" in said(case, "differs")

    def test_two_types(self):
        line = f"{MCORE} {TYPE} global_aux_loss aux_loss {COEF} 1e-2 1e-4"
        case = diagnose(line.split(), Options(world=8))
        assert [(one.scope, one.coef) for one in case.losses] == [("global_batch", 1e-2), ("micro_batch", 1e-4)]

    @pytest.mark.parametrize(
        ("more", "severity", "words"),
        [
            (f"{TYPE} none {COEF} 1e-2", "off", "is none: moe_aux_loss_coeff = 0.01"),
            (f"{TYPE} aux_loss seq_aux_loss {COEF} 1e-2", "refused", "2 types need"),
            (f"{TYPE} sinkhorn {COEF} 1e-2", "refused", "has to be 0"),
            (f"{TYPE} global {COEF} 1e-2", "refused", "global is none of"),
            ("--moe-router-enable-expert-bias", "refused", "needs a sigmoid gate"),
            (f"{BIAS} --moe-router-bias-update-rate 0", "off", "never moves"),
            (f"{BIAS} --moe-expert-capacity-factor 1 --moe-pad-expert-input-to-capacity", "off", "B67"),
            (f"{COEF} 1e-2 --moe-router-force-load-balancing", "off", "random numbers"),
            (f"{COEF} 1e-2 --calculate-per-token-loss --context-parallel-size 2", "differs", "B03"),
            (f"{COEF} 1e-2 --calculate-per-token-loss {TYPE} seq_aux_loss", "differs", "B04"),
            ("--moe-aux-loss-coef 1e-2", "refused", "--moe-aux-loss-coeff?"),
        ],
    )
    def test_what_goes_wrong(self, more, severity, words):
        case = diagnose(f"{MCORE} {more}".split(), Options(world=8))
        assert words in said(case, severity)
        assert case.balances == (severity == "differs")

    def test_sinkhorn_alone(self):
        case = diagnose(f"{MCORE} {TYPE} sinkhorn".split())
        assert case.balances and "Sinkhorn balances" in text_of(case)

    @pytest.mark.parametrize(
        ("frequency", "layers"), [("2", 8), ("([0]*1+[1]*15)", 15), ("[1,0]*8", 8), ("rm -rf", None)]
    )
    def test_layers(self, frequency, layers):
        case = diagnose([*MCORE.split(), "--moe-aux-loss-coeff", "1", "--moe-layer-freq", f"'{frequency}'"])
        assert case.model.layers == layers

    def test_a_batch_that_does_not_divide(self):
        with pytest.raises(ConfigError, match="whole micro-batches"):
            diagnose([*MCORE.split(), "--moe-aux-loss-coeff", "1"], Options(world=24))

    def test_a_dense_model(self):
        with pytest.raises(ConfigError, match="--num-experts"):
            diagnose(["torchrun pretrain_gpt.py --num-layers 4 --micro-batch-size 1"])


class TestTrl:
    @pytest.mark.parametrize(
        ("version", "trainer", "balances"),
        [("0.8.1", "beta: 0.1", False), ("0.24.0", "beta: 0.1", True), ("1.0.0", "beta: 0.1", False),
         ("1.8.0", "beta: 0.1", True), ("0.24.0", "", True)],
    )  # fmt: skip
    def test_dpo_through_the_years(self, version, trainer, balances, tmp_path):
        (tmp_path / "config.json").write_text(
            '{"model_type": "mixtral", "output_router_logits": true}', encoding="utf-8"
        )
        case = diagnosed(tmp_path, f"{TRL}{trainer}\n", engine=f"trl=={version}", model=str(tmp_path))
        assert case.balances == balances

    def test_switched_off(self, tmp_path):
        case = diagnosed(tmp_path, f"{TRL}router_aux_loss_coef: 0.0\n", engine="trl")
        assert not case.balances and not case.losses


def test_every_engine_has_what_the_recogniser_asks_for():
    for name, module in ENGINES.items():
        assert module.__doc__ and isinstance(module.NAME, str) and callable(module.examine), name
        assert all(isinstance(one, str) for one in (*module.MARKERS, *module.KNOWN))


def test_a_family_that_balances_with_a_loss_and_a_bias_of_the_model(tmp_path):
    """MiniMax-M2: the loss counts what the bare logits choose, and the bias decides."""
    config = {"model_type": "minimax_m2", "output_router_logits": True, "num_hidden_layers": 4}
    case = diagnosed(tmp_path, config, ".json", micro_batch=1)
    assert case.balances and "e_score_correction_bias decide" in said(case, "differs")
    assert case.bias.rate == 0 and "nothing moves it" in said(case, "off")


def test_a_weight_of_zero(tmp_path):
    config = QWEN3 | {"output_router_logits": True, "router_aux_loss_coef": 0.0}
    case = diagnosed(tmp_path, config, ".json")
    assert not case.balances and case.fix == {"router_aux_loss_coef": 0.001}


def test_names_that_are_nearly_right(tmp_path):
    case = diagnosed(tmp_path, MIXTRAL | {"router_aux_loss_coeff": 0.02}, ".json")
    assert "router_aux_loss_coeff is not a name of transformers that balances: router_aux_loss_coef?" in said(
        case, "note"
    )
