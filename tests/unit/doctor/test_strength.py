"""What the doctor says of strength and scope is what transformers, its Trainer and TRL do with a real model."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

pytest.importorskip("transformers", reason="the hf extra is not installed")
pytest.importorskip("accelerate", reason="the hf extra is not installed")

import equipoise
from equipoise.doctor.remedies import policies
from equipoise.functional import balance_loss
from integrations.hf._trainer import Text, as_rank, train
from integrations.hf.families import build
from unit.doctor._configs import diagnosed

pytestmark = [
    pytest.mark.xdist_group("ranks"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]
COEF = 0.3
ADDING = ["mixtral", "qwen3_moe", "olmoe", "gpt_oss"]
LIKE = {"learning_rate": 0.0, "optim": "sgd"}


class Even(Text):
    """Rows of one length: each micro-batch has as many tokens as any other."""

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        ids = super().__getitem__(i)["input_ids"]
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}


def alike(model: Any) -> Any:
    """All layers get the same tokens and have the same router: what leans one way in one leans so in all."""
    named = list(model.named_parameters())
    with torch.no_grad():
        for name, parameter in named:
            if any(part in name for part in ("o_proj", "down_proj")):
                parameter.zero_()
        for end in ("gate.weight", "router.weight", "router.bias"):
            routers = [parameter for name, parameter in named if name.endswith(end)]
            for router in routers[1:]:
                router.copy_(routers[0])
    return model


def config_of(model: Any) -> dict[str, Any]:
    return json.loads(model.config.to_json_string(use_diff=False))


def router_gradients(model: Any) -> torch.Tensor:
    named = model.named_parameters()
    return torch.cat([p.grad.flatten() for n, p in named if n.endswith(("gate.weight", "router.weight"))])


@pytest.mark.parametrize("layers", [1, 3])
@pytest.mark.parametrize("family", ADDING)
def test_the_coefficient_in_our_unit_gives_the_gradient_of_transformers(family, layers, tmp_path):
    more = {"num_hidden_layers": layers, "num_experts_per_tok": 3}
    model = alike(build(family, router_aux_loss_coef=COEF, output_router_logits=True, **more)).double()
    model.set_experts_implementation("eager")
    case = diagnosed(tmp_path, config_of(model), ".json", micro_batch=2)
    (loss,) = case.losses
    assert (case.model.layers, case.model.top_k, loss.scope, loss.sequences(case.batch)) == (
        layers,
        3,
        "micro_batch",
        2,
    )
    ids = torch.randint(3, 60, (2, 12))
    logits: list[torch.Tensor] = []
    hooks = [
        module.register_forward_hook(lambda _m, _a, out: logits.append((out[0], out[2])))
        for module in model.modules()
        if type(module).__name__.endswith("TopKRouter")
    ]
    out = model(ids, labels=ids)
    (COEF * out.aux_loss).backward(retain_graph=True)
    theirs = router_gradients(model).clone()
    model.zero_grad()
    ours = sum(balance_loss(z.softmax(-1), chosen) for z, chosen in logits) * loss.real(case.model)
    ours.backward()
    for hook in hooks:
        hook.remove()
    assert theirs.norm() > 1e-3
    torch.testing.assert_close(router_gradients(model), theirs, rtol=1e-4, atol=1e-9)


def gradients(policies: list[dict], accumulate: int, coef: float, **more: Any) -> dict[str, torch.Tensor]:
    """Of the first step of a real Trainer, of one layer, for which pooling is no matter."""
    config = {"num_hidden_layers": 1, "router_aux_loss_coef": coef, "output_router_logits": coef > 0}
    given = {"config": config, "family": "qwen3_moe", "trainer": {"train_dataset": Even()}} | LIKE | more
    return train(policies, 2, accumulate, 1, **given)["gradients"][0]


def gradients_of_rank(accumulate: int, coef: float) -> dict[str, torch.Tensor]:
    with as_rank():
        return gradients([], accumulate, coef)


def doctor_of_the_trainer(tmp_path: Any, accumulation: int, world: int) -> Any:
    model = build("qwen3_moe", num_hidden_layers=1, router_aux_loss_coef=COEF, output_router_logits=True)
    return diagnosed(tmp_path, config_of(model), ".json", micro_batch=2, accumulation=accumulation, world=world)


@pytest.mark.parametrize("accumulation", [1, 3])
def test_the_policy_that_it_writes_pushes_as_hard_as_the_trainer_does(accumulation, tmp_path):
    """B09, its half that has no issue: accumulated micro-batches. Every parameter, not the routers alone."""
    case = doctor_of_the_trainer(tmp_path, accumulation, 1)
    written = eval(policies(case)[0].line, vars(equipoise))  # the line as a user would paste it
    described = {"kind": "aux", "scope": written.scope, "coef": written.coef}
    without = gradients([], accumulation, 0.0)
    theirs, ours = gradients([], accumulation, COEF), gradients([described], accumulation, 0.0)
    for name, base in without.items():
        pushed = theirs[name] - base
        torch.testing.assert_close(ours[name] - base, pushed, rtol=2e-3, atol=1e-5 * max(1.0, float(pushed.norm())))
    assert sum((theirs[n] - b).norm() for n, b in without.items()) > 1e-2


def test_ranks_multiply_it_as_the_doctor_says(ranks, tmp_path):
    """B09: two ranks of a real Trainer under DDP, against one process that sees the same four micro-batches."""
    two, one = doctor_of_the_trainer(tmp_path, 2, 2), doctor_of_the_trainer(tmp_path, 4, 1)
    assert two.losses[0].real(two.model) == pytest.approx(one.losses[0].real(one.model))
    call = f"{gradients_of_rank.__module__}:{gradients_of_rank.__name__}"
    alone = [gradients([], 4, coef) for coef in (COEF, 0.0)]
    split = [ranks.run(call, 2, coef, size=2, timeout=240)[0] for coef in (COEF, 0.0)]
    assert sum((alone[0][name] - alone[1][name]).norm() for name in alone[0]) > 1e-2
    for name in alone[0]:
        got, want = split[0][name] - split[1][name], alone[0][name] - alone[1][name]
        torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(("reentrant", "works"), [(False, True), (True, False)])
def test_reentrant_checkpointing_leaves_the_loss_without_gradient(reentrant, works, tmp_path):
    """So that what three front-ends do by default is said to be off."""
    more = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": reentrant}}
    with_loss, without = gradients([], 1, COEF, **more), gradients([], 1, 0.0, **more)
    assert (sum((with_loss[name] - without[name]).norm() for name in without) > 1e-3) == works
    yaml = "base_model: x\nmicro_batch_size: 1\ngradient_checkpointing: true\n"
    yaml += "model_config: {output_router_logits: true}\n"
    yaml += f"gradient_checkpointing_kwargs: {{use_reentrant: {str(reentrant).lower()}}}\n"
    case = diagnosed(tmp_path, yaml, model="Qwen3-30B-A3B")
    assert bool(case.working) == works


def test_a_bias_that_nothing_moves(tmp_path):
    """DeepSeek-V3 of transformers: no loss whatever the flag, and the bias is after training what it was before."""
    case = diagnosed(tmp_path, config_of(build("deepseek_v3", output_router_logits=True)), ".json")
    assert not case.balances and case.bias is not None and case.bias.rate == 0
    more = {"family": "deepseek_v3", "config": {"output_router_logits": True}, "learning_rate": 0.1}
    found = train([], 2, 1, 3, **more)
    assert found["biases"][0] and all(not bias.any() for step in found["biases"] for bias in step.values())


@pytest.mark.parametrize("accumulation", [1, 3])
def test_trl_makes_a_mean_of_it(accumulation, tmp_path):
    """Since 1.15 SFT divides it by the accumulated micro-batches: the doctor puts no factor there."""
    pytest.importorskip("trl", reason="trl is not installed")
    from transformers.models.qwen3_moe.modeling_qwen3_moe import load_balancing_loss_func

    from integrations.hf import _trl

    yaml = f"model_name_or_path: Qwen/Qwen3-30B-A3B\ndataset_name: x\nrouter_aux_loss_coef: {COEF}\n"
    yaml += f"gradient_accumulation_steps: {accumulation}\nper_device_train_batch_size: 2\n"
    case = diagnosed(tmp_path, yaml, engine="trl", world=1)
    (loss,) = case.losses
    assert loss.factors == () and loss.sequences(case.batch) == 2

    def mean(_step: int, _micro: int, calls: list, masks: list) -> torch.Tensor:
        logits = tuple(z for _, z, _ in calls)
        return COEF / accumulation * load_balancing_loss_func(logits, 8, 2, torch.cat(masks).view(2, -1))

    theirs = _trl.run("sft", accumulation, router_aux_loss_coef=COEF, steps=1).gradients[0]
    ours = _trl.run("sft", accumulation, add=mean, steps=1).gradients[0]
    plain = _trl.run("sft", accumulation, steps=1).gradients[0]
    pushed = {name: theirs[name] - plain[name] for name in plain}
    assert sum(one.norm() for one in pushed.values()) > 1e-3
    for name, base in plain.items():
        torch.testing.assert_close(ours[name] - base, pushed[name], rtol=1e-6, atol=1e-9)
