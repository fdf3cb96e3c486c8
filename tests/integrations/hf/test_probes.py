"""What a balancer finds out before it relies on a block: whether it uses the weights and ids of its router."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("transformers")

from equipoise import AuxLoss, Balancer, ConfigError, ExpertBias, ZLoss
from integrations.hf._cases import quiet
from integrations.hf.families import build


@torch.no_grad()
def upcycled(model: nn.Module) -> nn.Module:
    """All experts of a layer are copies of its first one, as in a model made of a dense one."""
    for name, parameter in model.named_parameters():
        if "experts" in name:
            parameter.copy_(parameter[:1].expand_as(parameter))
    return model


@pytest.mark.parametrize("experts", ["eager", "grouped_mm"])
@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_experts_that_are_copies_are_no_reason_to_refuse(family: str, experts: str) -> None:
    """Other ids change nothing there, whoever uses them; the weights are afterwards those from before, to the bit."""
    with quiet():
        model = upcycled(build(family))
        model.set_experts_implementation(experts)
        state = {name: value.clone() for name, value in model.state_dict().items()}
        balancer = Balancer(model, [ExpertBias("proportional", rate=1e-3)])
    assert all(layer.router.expert_bias is not None for layer in balancer._layers)
    assert all(torch.equal(bits(value), bits(state[name])) for name, value in model.state_dict().items())


def bits(x: Tensor) -> Tensor:
    """-0 is not 0."""
    return x.view({4: torch.int32, 2: torch.int16}[x.element_size()]) if x.is_floating_point() else x


@pytest.mark.parametrize("mode", [True, False])
def test_probing_leaves_no_trace(mode: bool) -> None:
    """Modes of every part, random numbers, buffers, gradients and hooks are those from before."""
    with quiet():
        model = build("qwen3_moe").train(mode)
    model.model.layers[0].eval()
    modes = [module.training for module in model.modules()]
    state = {name: value.clone() for name, value in model.state_dict().items()}
    random = torch.get_rng_state()
    Balancer(model, [AuxLoss("micro_batch", 0.1)]).remove()
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert not any(module._forward_hooks for module in model.modules() if type(module).__name__.endswith("Router"))


@pytest.mark.parametrize(
    ("family", "policies", "message"),
    [
        ("gemma4", [ZLoss(1e-3)], "returns probabilities"),
        ("diffusion_gemma", [AuxLoss("sequence", 0.1), ZLoss(1e-3)], "returns probabilities"),
        ("gemma4", [ExpertBias("proportional", rate=1e-3)], "weights hold more than scores"),
        ("deepseek_v3", [AuxLoss("sequence", 0.1)], "a bias in router"),
    ],
)
def test_what_is_refused_leaves_no_hook(family: str, policies: list, message: str) -> None:
    """The z-loss of probabilities is 0 whatever the router does: a policy without a gradient."""
    with quiet():
        model = build(family)
        with pytest.raises(ConfigError, match=message):
            Balancer(model, policies)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_a_model_that_cannot_run_is_refused_in_words() -> None:
    with pytest.raises(ConfigError, match="a model that runs on its example"):
        Balancer(build("qwen3_moe", num_experts_per_tok=99), [AuxLoss("global_batch", coef=1e-2)])


def test_a_refused_balancer_leaves_the_models_own_loss_on() -> None:
    with quiet():
        model = build("qwen3_moe", output_router_logits=True)
        with pytest.raises(ConfigError, match="softmax"):
            Balancer(model, [ExpertBias("sign", rate=0.5)])
    assert model.config.output_router_logits and model.router_aux_loss_coef > 0
