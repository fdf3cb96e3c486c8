"""A model that DDP or the compiler has wrapped is balanced like the one inside; balancers come and go."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch._dynamo.testing import CompileCounter

pytest.importorskip("transformers", reason="the hf extra is not installed")

from contracts.law._model import assert_close
from equipoise import AuxLoss, Balancer, ExpertBias, StateError
from integrations.hf._trainer import STEP_POLICIES, Text, ddp_step, model

pytestmark = [
    pytest.mark.xdist_group("ranks"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # dynamo's own, of autograd functions
]


def batch(rows: range) -> dict[str, torch.Tensor]:
    text = [Text()[i] for i in rows]
    return {key: torch.stack([row[key] for row in text]) for key in text[0]}


def gradients(net: Any, wrapped: Any) -> dict[str, torch.Tensor]:
    balancer = Balancer(wrapped, [AuxLoss(**p) for p in STEP_POLICIES])
    wrapped.train()
    balancer.tap(wrapped(**batch(range(4))).logits.square().mean()).backward()
    return {n: p.grad.clone() for n, p in net.named_parameters()}


def test_a_compiled_model():
    net, plain = model(), model()
    assert_close(gradients(net, torch.compile(net, backend="eager")), gradients(plain, plain), 1e-5)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # dynamo looks at inputs
def test_a_model_compiled_in_place():
    """``model.compile()`` and compiled layers: what finds the routers runs eagerly, and training is compiled."""
    net, plain, compiler = model(), model(), CompileCounter()
    for layer in net.model.layers:
        layer.compile(backend=compiler)
    Balancer(net, [AuxLoss(**p) for p in STEP_POLICIES]).remove()
    assert compiler.frame_count == 0
    assert_close(gradients(net, net), gradients(plain, plain), 1e-5)
    assert compiler.frame_count > 0


def test_two_ranks_of_ddp(ranks):
    """Each rank has half of the sequences; the gradient is that of all of them in one process."""
    net = model()
    balancer = Balancer(net, [AuxLoss(**p) for p in STEP_POLICIES])
    net.train()
    tokens = int(batch(range(8))["attention_mask"].sum())
    balancer.begin_step(tokens=tokens, micro_batches=1)
    balancer.tap(net(**batch(range(8))).logits.square().mean()).backward()
    expected = {n: p.grad.clone() for n, p in net.named_parameters()}
    for got in ranks.run(f"{ddp_step.__module__}:{ddp_step.__name__}", 8, tokens, size=2):
        assert_close(got, expected, 1e-5)


def test_a_second_balancer_is_refused_and_a_later_one_takes_over():
    """A bias of ours stays when its balancer goes: the model chooses with it, and the next balancer moves it on."""
    net = model()
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in net.modules()]
    first = Balancer(net, [ExpertBias("proportional", rate=0.01)])
    with pytest.raises(StateError, match="one balancer per model"):
        Balancer(net, [AuxLoss("micro_batch", 0.1)])
    optimizer = torch.optim.SGD(net.parameters(), lr=0.0)
    net.train()
    net(**batch(range(4))).loss.backward()
    optimizer.step()
    kept = [layer.router.expert_bias.clone() for layer in first._layers]
    assert all(bias_E.abs().max() > 0 for bias_E in kept)
    first.remove()
    second = Balancer(net, [ExpertBias(rate=0.0)])
    assert all(
        torch.equal(layer.router.expert_bias, bias_E) for layer, bias_E in zip(second._layers, kept, strict=True)
    )
    second.remove()
    plain = model()
    third = Balancer(plain, [AuxLoss("micro_batch", 0.1)])
    third.remove()
    assert [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in plain.modules()] == hooks, "no hook is left"
