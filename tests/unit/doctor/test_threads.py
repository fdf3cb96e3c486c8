"""Thirteen public threads that ask why a coefficient does nothing, or counts twice: what the doctor would have said.

Each line: the thread; the configuration as its user had it, as short as it can be; the options; what must be said.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest

from equipoise.doctor import Diagnosis
from unit.doctor._configs import MIXTRAL, diagnosed, said, text_of

pytest.importorskip("yaml", reason="PyYAML is not installed")


class Thread(NamedTuple):
    name: str  # repository#number, of github.com
    content: str | dict[str, Any]
    options: dict[str, Any]
    off: tuple[str, ...] = ()  # among what does nothing
    differs: tuple[str, ...] = ()  # among what is other than written
    shown: tuple[str, ...] = ()  # anywhere in the text
    suffix: str = ".yaml"
    balances: bool = False


LLAMA_FACTORY = "stage: sft\ndo_train: true\nfinetuning_type: full\nuse_reentrant_gc: false\n"
DEEPSEEK = {"model_type": "deepseek_v3", "n_routed_experts": 256, "num_experts_per_tok": 8, "num_hidden_layers": 61,
            "first_k_dense_replace": 3, "n_group": 8, "topk_group": 4}  # fmt: skip
MINIMIND_V1 = {"model_type": "minimind", "use_moe": True, "n_routed_experts": 4, "num_experts_per_tok": 2,
               "num_hidden_layers": 8, "aux_loss_alpha": 0.1, "seq_aux": True}  # fmt: skip
VERL = (
    "actor_rollout_ref:\n  model: {path: Qwen/Qwen3-30B-A3B}\n  actor:\n    strategy: megatron\n"
    "    ppo_micro_batch_size_per_gpu: 1\n    megatron:\n      expert_model_parallel_size: 8\n"
)

THREADS = [
    Thread(  # "does fine-tuning Mixtral use a balance loss, or next-token prediction only?"
        "hiyouga/LLaMA-Factory#3085", f"model_name_or_path: mistralai/Mixtral-8x7B-v0.1\n{LLAMA_FACTORY}", {"world": 8},
        off=("moe_aux_loss_coef is not set", "LlamaFactory#3085",), shown=("moe_aux_loss_coef: 0.001",),
    ),
    Thread(  # "where does router_aux_loss_coef work? the code does not show it"
        "hiyouga/LLaMA-Factory#8054", f"model_name_or_path: Qwen/Qwen3-30B-A3B\n{LLAMA_FACTORY}", {"world": 8},
        off=("moe_aux_loss_coef is not set", "router_aux_loss_coef = 0.001 of the model stays unused",),
    ),
    Thread(  # "router_aux_loss_coef from the parser is not set" for Qwen3.5
        "hiyouga/LLaMA-Factory#10302",
        f"model_name_or_path: Qwen/Qwen3.5-35B-A3B\n{LLAMA_FACTORY}moe_aux_loss_coef: 0.001\n", {"world": 8},
        off=("moe_aux_loss_coef = 0.001 is dropped: qwen3_5_moe", "text_config.output_router_logits",),
    ),
    Thread(  # the same, of a family that no pull request names
        "hiyouga/LLaMA-Factory#10307",
        f"model_name_or_path: Qwen/Qwen3-Next-80B-A3B-Instruct\n{LLAMA_FACTORY}moe_aux_loss_coef: 0.01\n", {"world": 8},
        off=("moe_aux_loss_coef = 0.01 is dropped: qwen3_next",),
    ),
    Thread(  # the second attempt; GPT-OSS is missing as well
        "hiyouga/LLaMA-Factory#10636",
        f"model_name_or_path: openai/gpt-oss-20b\n{LLAMA_FACTORY}moe_aux_loss_coef: 0.01\n", {"world": 8},
        off=("moe_aux_loss_coef = 0.01 is dropped: gpt_oss", '"output_router_logits": true',),
    ),
    Thread(  # "is the balance loss added twice?"
        "modelscope/ms-swift#5375",
        "model: Qwen/Qwen3-30B-A3B\ntuner_type: full\ndataset: [x]\nrouter_aux_loss_coef: 0.001\n"
        "per_device_train_batch_size: 1\ngradient_accumulation_steps: 16\n", {"world": 8},
        shown=("the loss is added once", "coefficient 0.001 · K/L 8/48: as strong as coef 0.000167 in our unit"),
        balances=True,
    ),
    Thread(  # "the experts' aux loss seems not to be used"
        "jingyaogong/minimind#140", MINIMIND_V1, {}, suffix=".json",
        off=("aux_loss_alpha = 0.1: version 1 makes this loss and never adds it",),
    ),
    Thread(  # "load balancing loss is not added when output_router_logits=False"
        "huggingface/transformers#44242",
        MIXTRAL | {"router_aux_loss_coef": 0.02, "output_router_logits": False},
        {"micro_batch": 4}, suffix=".json",
        off=("output_router_logits is false: router_aux_loss_coef = 0.02 does nothing",),
        shown=('"output_router_logits": true', "off; once on: micro_batch, coefficient 0.02 · K/L 2/32",),
    ),
    Thread(  # "MoE models in DPO: the auxiliary loss is left out", of a model with the flag on
        "huggingface/trl#1544",
        "model_name_or_path: mixtral\ndataset_name: x\nbeta: 0.1\nper_device_train_batch_size: 2\n",
        {"engine": "trl==0.8.1", "model": "MODEL"},
        off=("DPO of TRL 0.8.1 leaves the balance loss out", "TRL#1544",),
    ),
    Thread(  # the loss on by default: nobody asked for it, and 8 ranks times 8 micro-batches multiply it
        "huggingface/trl#6085",
        "model_name_or_path: Qwen/Qwen3-30B-A3B\ndataset_name: x\nper_device_train_batch_size: 1\n"
        "gradient_accumulation_steps: 8\n", {"engine": "trl==1.9.0", "world": 8},
        differs=("on without being asked for: router_aux_loss_coef is 0.001 by default", "B09",),
        shown=("M 8 · W 8", "coef 0.0107 in our unit",), balances=True,
    ),
    Thread(  # "with expert parallelism update_actor takes longer and longer": the type is none
        "verl-project/verl#4103", VERL, {"world": 8},
        off=("moe_router_load_balancing_type is none",), shown=("verl sets moe_router_load_balancing_type to none",),
    ),
    Thread(  # "just set moe_aux_loss_coeff via override_transformer_config?" No.
        "verl-project/verl#5232",
        f"{VERL}      override_transformer_config: {{moe_aux_loss_coeff: 0.01}}\n", {"world": 8},
        off=("moe_router_load_balancing_type is none: moe_aux_loss_coeff = 0.01 does nothing",),
        shown=("override_transformer_config.moe_router_load_balancing_type=aux_loss",),
    ),
    Thread(  # DeepSeek-V3's config.json has no aux_loss_alpha
        "NVIDIA-NeMo/Megatron-Bridge#5165", DEEPSEEK, {"engine": "megatron-bridge", "micro_batch": 1, "world": 256},
        suffix=".json", balances=True,
        shown=("config.json has no aux_loss_alpha: 0.0001 is filled in", "Balance BSZ is 1", "A bias balances",),
        differs=("counts the top-K without bias and groups",),
    ),
]  # fmt: skip


@pytest.mark.parametrize("thread", THREADS, ids=[thread.name for thread in THREADS])
def test_what_it_says_of_a_thread(thread, tmp_path):
    options = dict(thread.options)
    if options.get("model") == "MODEL":
        (tmp_path / "config.json").write_text(
            '{"model_type": "mixtral", "num_local_experts": 8, "output_router_logits": true}', encoding="utf-8"
        )
        options["model"] = str(tmp_path / "config.json")
    case: Diagnosis = diagnosed(tmp_path, thread.content, thread.suffix, **options)
    assert case.balances == thread.balances
    text = text_of(case)
    assert ("Nothing balances the experts." in text) != thread.balances
    for words in thread.off:
        assert words in said(case, "off")
    for words in thread.differs:
        assert words in said(case, "differs")
    for words in thread.shown:
        assert words in text


def test_there_are_thirteen():
    assert len({thread.name for thread in THREADS}) == 13


def test_families_that_show_an_aux_loss_and_never_set_it(tmp_path):
    """huggingface/transformers#48886: families that show an aux_loss and never set it."""
    for kind in ("afmoe", "cohere2_moe", "hy_v3", "zaya"):
        case = diagnosed(tmp_path, {"model_type": kind, "num_experts": 4, "num_experts_per_tok": 1,
                                    "output_router_logits": True}, ".json")  # fmt: skip
        assert not case.balances and "adds no balance loss" in said(case, "off")


def test_a_family_without_a_loss_under_ms_swift(tmp_path):
    """modelscope/ms-swift#9127: "whatever router_aux_loss_coef is, the loss does not change"."""
    (tmp_path / "config.json").write_text(
        '{"model_type": "gemma4_text", "num_experts": 128, "top_k_experts": 8, "enable_moe_block": true}',
        encoding="utf-8",
    )
    yaml = "model: google/gemma-4-26B-A4B-it\ntuner_type: full\ndataset: [x]\nrouter_aux_loss_coef: 0.9\n"
    case = diagnosed(tmp_path, yaml, model=str(tmp_path / "config.json"), world=2)
    assert not case.losses and "adds no balance loss in transformers" in said(case, "off")


def test_a_step_of_one_micro_batch_is_named(tmp_path):
    """modelscope/ms-swift#6787: "ga_steps is always 1": 8 sequences a step on 8 ranks are one micro-batch each."""
    line = (
        "NPROC_PER_NODE=8 megatron sft --model Qwen/Qwen3-VL-30B-A3B-Instruct --load_safetensors true "
        "--expert_model_parallel_size 8 --moe_aux_loss_coeff 1e-3 --moe_router_load_balancing_type global_aux_loss "
        "--micro_batch_size 1 --global_batch_size 8 --recompute_granularity full"
    )
    case = diagnosed(tmp_path, line, ".sh")
    (loss,) = case.losses
    assert (case.batch.accumulation, loss.sequences(case.batch)) == (1, 8)
    assert "ga_steps stays 1" in said(case, "note") and "B01" in said(case, "differs")
    assert loss.real(case.model) == pytest.approx(1e-3 / 8)
