"""Models of transformers that are only looked at, evaluated beside a step, and given back as they were."""

from __future__ import annotations

import json
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("transformers")

from equipoise import AuxLoss, Balancer, ConfigError, ExpertBias, ZLoss
from integrations.hf._cases import inputs, quiet
from integrations.hf._law import Twin
from integrations.hf.families import build

AUX = ["qwen3_moe", "mixtral", "granitemoe"]
POLICIES = [AuxLoss("sequence", 0.3), ZLoss(0.1)]


def labelled() -> dict[str, Tensor]:
    given = inputs()
    return given | {"labels": given["input_ids"].masked_fill(given["attention_mask"] == 0, -100)}


def own_loss_on(family: str) -> Any:
    model: Any = build(family, output_router_logits=True)
    for module in (model, *model.modules()):
        if isinstance(getattr(module, "router_aux_loss_coef", None), float):
            module.router_aux_loss_coef = 0.25  # type: ignore[assignment]
    return model.train()


def traces(model: Any) -> list:
    """State, configuration, hooks, modes and what a forward gives."""
    output = model(**labelled())
    given = [output.loss, output.aux_loss, *output.router_logits, output.logits]
    coefs = [getattr(m, "router_aux_loss_coef", None) for m in model.modules()]
    hooks = [list(v) for m in model.modules() for k, v in vars(m).items() if "hooks" in k and isinstance(v, dict)]
    hooks += [bool(p._post_accumulate_grad_hooks) for p in model.parameters()]
    state = {name: one.clone() for name, one in model.state_dict().items()}
    return [
        given,
        state,
        model.config.to_json_string(use_diff=False),
        coefs,
        hooks,
        [m.training for m in model.modules()],
    ]


def same(one: list, other: list) -> None:
    assert len(one[0]) == len(other[0])
    assert all(torch.equal(a, b) for a, b in zip(one[0], other[0], strict=True))
    assert one[1].keys() == other[1].keys()
    assert all(torch.equal(tensor, other[1][name]) for name, tensor in one[1].items())
    assert one[2:] == other[2:]


def step(model: nn.Module, balancer: Balancer | None, given: dict[str, Tensor]) -> dict[str, Tensor]:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    model.train()
    loss = model(**given).loss
    (balancer.tap(loss) if balancer else loss).backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    optimizer.step()
    optimizer.zero_grad()
    return found


@pytest.mark.parametrize("family", AUX)
@pytest.mark.parametrize("policies", [[], POLICIES])
def test_nothing_outlives_a_balancer(family, policies) -> None:
    model = own_loss_on(family)
    before = traces(model)
    with quiet():
        balancer = Balancer(model, policies)
    step(model, balancer, labelled())
    if policies:
        assert model(**labelled()).router_logits is None
        assert "own balance loss" in " ".join(balancer.describe().split())
    balancer.remove()
    same(traces(model), before)
    assert balancer.own_loss.words == []


@pytest.mark.parametrize("error", ["a warning that is an error", "a policy that is refused"])
def test_nor_one_that_was_refused(error) -> None:
    model = own_loss_on("qwen3_moe")
    before = traces(model)
    if error == "a policy that is refused":
        model.model.layers[1].mlp.gate.register_buffer("e_score_correction_bias", torch.zeros(8))
        before = traces(model)
        with quiet(), pytest.raises(ConfigError, match="nobody moves"):
            Balancer(model, POLICIES)
    else:
        with pytest.raises(UserWarning, match="own balance loss"):
            Balancer(model, [*POLICIES, ExpertBias("proportional", rate=0.01)])
    same(traces(model), before)


def test_what_was_set_meanwhile_stays() -> None:
    model = own_loss_on("qwen3_moe")
    with quiet():
        balancer = Balancer(model, POLICIES)
    model.router_aux_loss_coef = 0.5
    balancer.remove()
    assert (model.router_aux_loss_coef, model.config.output_router_logits) == (0.5, True)


def test_a_checkpoint_of_a_running_training_holds_the_users_values(tmp_path) -> None:
    model = own_loss_on("qwen3_moe")
    with quiet():
        balancer = Balancer(model, POLICIES)
    with balancer.own_loss.as_it_was():
        model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))["output_router_logits"] is True
    assert (model.config.output_router_logits, model.router_aux_loss_coef) == (False, 0.0)
    with pytest.raises(KeyError), balancer.own_loss.as_it_was():
        raise KeyError
    assert model.config.output_router_logits is False
    balancer.remove()
    assert (model.config.output_router_logits, model.router_aux_loss_coef) == (True, 0.25)


@pytest.mark.parametrize(
    ("family", "recompute"),
    [*((one, False) for one in (*AUX, "deepseek_v3", "llama4", "longcat_flash", "gpt_oss")), ("qwen3_moe", True)],
)
def test_who_only_looks_changes_no_gradient(family, recompute) -> None:
    found = []
    for looks in (False, True):
        model: Any = own_loss_on(family) if family in AUX else build(family)
        if recompute:
            with quiet():
                model.gradient_checkpointing_enable({"use_reentrant": False})
        with warnings.catch_warnings():
            warnings.simplefilter("ignore" if family == "gpt_oss" else "error", UserWarning)
            balancer = Balancer(model, []) if looks else None
        found.append(step(model, balancer, labelled()))
    assert found[0].keys() == found[1].keys()
    for name, gradient in found[0].items():
        assert torch.equal(gradient, found[1][name]), name
    assert balancer is not None
    assert balancer.metrics()["balance/tokens"] == 15


def test_routers_that_follow_token_ids_are_looked_at() -> None:
    """Nothing can move them, and their load is a load all the same."""
    with quiet():
        model = build("deepseek_v4", mlp_layer_types=["hash_moe", "moe"])
        balanced = Balancer(model, [ExpertBias()])
        names = [layer.name for layer in balanced._layers]
        balanced.remove()
        balancer = Balancer(model, [])
    assert len(balancer._layers) > len(names)
    step(model, balancer, labelled())
    assert all(int(counts_E.sum()) > 0 for counts_E in balancer.load())


@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3"])
@pytest.mark.parametrize("policies", [[], POLICIES])
def test_an_evaluation_counts_what_is_no_padding(family, policies) -> None:
    model, twin = build(family), Twin(build(family).eval(), family)
    with quiet():
        balancer = Balancer(model, [*policies, *([ExpertBias(rate=0.0)] if policies and family != "qwen3_moe" else [])])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    counts: dict[str, list[int]] = {}
    model.train()
    balancer.tap(model(**labelled()).loss).backward()
    model.eval()
    with balancer.evaluation() as found, torch.inference_mode():
        for seed in (1, 2):
            given = inputs(seed)
            model(**given)
            twin.model(**given)
            for name, ids_TK in twin.ids.items():
                chosen = ids_TK[given["attention_mask"].bool().view(-1)].flatten().tolist()
                counts.setdefault(name, []).extend(chosen)
    model.train()
    balancer.tap(model(**labelled()).loss).backward()
    optimizer.step()
    assert found["balance/tokens"] == 30
    assert balancer.metrics()["balance/tokens"] == 30
    for i, chosen in enumerate(counts.values()):
        loads = [chosen.count(e) for e in range(8)]
        vio = max(loads) * 8 / sum(loads) - 1
        assert found[f"balance/layer_{i:02d}/maxvio_global"] == pytest.approx(vio, rel=1e-12)


def test_a_part_that_is_called_by_itself_is_not_evaluated() -> None:
    """Its padding is told by the arguments of the whole model: those of the call before would be read."""
    model: Any = build("qwen3_moe").eval()
    with quiet():
        balancer = Balancer(model, [])
    model(**inputs())
    block = model.model.layers[0].mlp
    with pytest.raises(Exception, match="a forward of the model that Balancer was given"), balancer.evaluation():
        block(torch.randn(3, 6, 32))
