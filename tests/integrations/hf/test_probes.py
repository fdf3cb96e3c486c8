"""What a balancer finds out before it relies on a block: whether it uses the weights and ids of its router."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("transformers")

from equipoise import AuxLoss, Balancer, ConfigError, ExpertBias, ZLoss
from integrations.hf._cases import quiet
from integrations.hf.families import build


class Router(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 8))

    def forward(self, x_TD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits_TE = x_TD @ self.weight.T
        weights_TK, ids_TK = logits_TE.softmax(dim=-1).topk(2, dim=-1)
        return logits_TE, weights_TK, ids_TK


class Block(nn.Module):
    """``takes``: what it does with the weights and ids of its router."""

    def __init__(self, takes: str) -> None:
        super().__init__()
        self.gate, self.takes = Router(), takes
        self.experts = nn.Parameter(torch.randn(4, 8, 8))

    def forward(self, x_TD: Tensor) -> Tensor:
        logits_TE, weights_TK, ids_TK = self.gate(x_TD)
        if self.takes in ("own weights", "nothing"):
            weights_TK = logits_TE.softmax(dim=-1).gather(-1, ids_TK)
        if self.takes == "detached weights":
            weights_TK = weights_TK.detach()
        if self.takes in ("own ids", "nothing"):
            ids_TK = logits_TE.topk(2, dim=-1).indices
        return x_TD + (torch.einsum("td,tkdh->tkh", x_TD, self.experts[ids_TK]) * weights_TK.unsqueeze(-1)).sum(dim=1)


class Model(nn.Module):
    def __init__(self, takes: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList([Block(takes) for _ in range(2)])

    def forward(self, x_TD: Tensor) -> Tensor:
        for layer in self.layers:
            x_TD = layer(x_TD)
        return x_TD


EXAMPLE = {"x_TD": torch.randn(6, 8, generator=torch.Generator().manual_seed(0))}


@pytest.mark.parametrize("takes", ["own weights", "detached weights", "nothing"])
def test_a_block_that_ignores_the_weights_is_refused(takes: str) -> None:
    """The balance gradient would never begin: nothing flows back through what the router returned."""
    with pytest.raises(ConfigError, match=r"(?s)Router \(layers\.0\.gate\): its block ignores the weights"):
        Balancer(Model(takes), [AuxLoss("micro_batch", 0.1)], example=EXAMPLE)


def test_a_block_that_ignores_the_ids_gets_no_bias_of_ours() -> None:
    """A loss is fine there: the block chooses as the router did. With a bias the router would choose for nobody."""
    Balancer(Model("own ids"), [AuxLoss("micro_batch", 0.1)], example=EXAMPLE).remove()
    with pytest.raises(ConfigError, match="ignores the expert ids"):
        Balancer(Model("own ids"), [ExpertBias("proportional", rate=1e-3)], example=EXAMPLE)


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


def test_a_block_that_ignores_ids_is_refused_also_where_experts_are_copies() -> None:
    with pytest.raises(ConfigError, match="chooses by itself and ignores the expert ids"):
        Balancer(upcycled(Model("own ids")), [ExpertBias("proportional", rate=1e-3)], example=EXAMPLE)
    Balancer(upcycled(Model("all")), [ExpertBias("proportional", rate=1e-3)], example=EXAMPLE)


def test_copies_in_integers_are_refused_without_a_guess() -> None:
    """Their signs cannot be turned, so nothing tells them from a block that ignores ids."""

    class Eighth(Block):
        def __init__(self) -> None:
            super().__init__("all")
            self.register_buffer("packed", (8 * self.experts.data[:1]).round().to(torch.int8).expand(4, 8, 8).clone())
            del self.experts

        @property
        def experts(self) -> Tensor:
            return self.packed / 8

    model = Model("all")
    model.layers = nn.ModuleList([Eighth() for _ in range(2)])
    with pytest.raises(ConfigError, match="copies of each other or its block ignores the ids, and weights that are"):
        Balancer(model, [ExpertBias("proportional", rate=1e-3)], example=EXAMPLE)
    Balancer(model, [AuxLoss("micro_batch", 0.1)], example=EXAMPLE)


def test_experts_that_give_nothing_yet_are_no_reason_to_refuse() -> None:
    """Where experts begin at 0, the output is the same with any weights and ids."""
    model = Model("all")
    for layer in model.layers:
        layer.experts.data.zero_()
    Balancer(model, [AuxLoss("micro_batch", 0.1), ExpertBias("proportional", rate=1e-3)], example=EXAMPLE)


def test_a_block_that_uses_both_is_pushed() -> None:
    model = Model("all")
    Balancer(model, [AuxLoss("micro_batch", 0.1), ExpertBias("proportional", rate=1e-3)], example=EXAMPLE)
    plain = Model("all")
    balancer = Balancer(plain, [AuxLoss("micro_batch", 0.5)], example=EXAMPLE)
    (balancer.tap(plain(**EXAMPLE).mean()) * 0).backward()  # what is left has the scale 0 as well
    assert all(not layer.gate.weight.grad.any() for layer in plain.layers)
    balancer.discard()
    plain.zero_grad()
    balancer.tap(plain(**EXAMPLE).mean() * 0).backward()  # the loss is 0, its scale is 1: only the balance pushes
    assert all(layer.gate.weight.grad.any() for layer in plain.layers)


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
