"""Guards where nobody may wait: values that are not at hand, as on a GPU, and training that goes on after a fault."""

from __future__ import annotations

import re
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from contracts.law._model import BIAS, SMALL, Micro, assert_close, loss_of, make_step, net, setup, train_step
from equipoise import AuxLoss, Balancer, ConfigError, EquipoiseError, ExpertBias, InputError, MoE, StateError, devices

MICRO = AuxLoss("micro_batch", 0.3)
PREVIOUS = AuxLoss("global_batch", 0.3, estimator="previous")


@pytest.fixture
def far(monkeypatch):
    """No device's values are at hand: what a GPU's user gets."""
    monkeypatch.setattr(devices, "HOST_READABLE", set())


def nan_logits(model: Any, micro: Micro) -> Tensor:
    x = micro.x_BSD.clone()
    x[0, 1, 0] = torch.nan
    return (model(x) - micro.target_BSD).square().mean()


def documents_out_of_range(model: Any, micro: Micro) -> Tensor:
    documents = torch.zeros(micro.x_BSD.shape[:2], dtype=torch.int64)
    documents[0, 2] = 99
    return loss_of(model, micro._replace(documents_BS=documents))


def detached(model: Any, micro: Micro) -> Tensor:
    hook = model.blocks[0].gate.register_forward_hook(
        lambda _m, _a, out: out._replace(weights_TK=out.weights_TK.detach())
    )
    try:
        return loss_of(model, micro)
    finally:
        hook.remove()


def without_a_forward(model: Any, micro: Micro) -> Tensor:
    """Another model's loss, of which a parameter of this one is part: no router ran."""
    return model.inp.weight.square().sum()


DOCUMENT = AuxLoss("document", 0.3)
GUARDS: dict[str, tuple[Any, list[Any], type[EquipoiseError], str]] = {
    "NaN logits": (
        nan_logits,
        [PREVIOUS, BIAS],
        InputError,
        "finite router logits.*infinity in 'blocks.0.gate'",
    ),
    "NaN logits, a bias alone": (nan_logits, [BIAS], InputError, "finite router logits"),
    "documents": (documents_out_of_range, [DOCUMENT, BIAS], InputError, r"document numbers.*1 out of range"),
    "detached": (detached, [MICRO, BIAS], StateError, "never arrived, in 'blocks.0.gate'"),
    "no forward": (without_a_forward, [MICRO, BIAS], StateError, "a forward of the routers.*1 taps"),
}


def documents(micro: Micro) -> Micro:
    return micro._replace(documents_BS=torch.zeros(micro.x_BSD.shape[:2], dtype=torch.int64))


def snapshot(model: Any, balancer: Balancer) -> list[Any]:
    layer = balancer.state_dict()["layers"]["blocks.0.gate"]
    previous = layer["previous_E"]
    return [layer["expert_bias_E"].tolist(), None if previous is None else previous.tolist()]


@pytest.mark.parametrize("name", GUARDS)
def test_a_fault_is_told_one_step_late_and_commits_nothing(far, name):
    """Nobody waited for the bad step's values; its loads and biases are left out, and the error names it."""
    bad, policies, kind, words = GUARDS[name]
    model, balancer, optimizer = setup(*policies)
    for seed in range(2):
        train_step(model, balancer, optimizer, [documents(make_step(seed)[0])])
    before = snapshot(model, balancer)
    (micro,) = make_step(2)
    balancer.tap(bad(model, micro)).backward()
    weights = [p.detach().clone() for p in model.parameters()]
    optimizer.step()  # nothing is known yet
    optimizer.zero_grad()
    with torch.no_grad():  # which NaN gradients spoil, with or without a balancer
        for p, weight in zip(model.parameters(), weights, strict=True):
            p.copy_(weight)
    assert snapshot(model, balancer) == before
    balancer.tap(loss_of(model, documents(make_step(3)[0]))).backward()
    with pytest.raises(kind, match=f"(?s){words}.*step 2"):
        optimizer.step()


@pytest.mark.parametrize("name", GUARDS)
def test_the_same_faults_where_values_are_at_hand_are_told_at_once(name):
    """Before the optimizer moves anything."""
    bad, policies, kind, words = GUARDS[name]
    model, balancer, optimizer = setup(*policies)
    parameters = [p.detach().clone() for p in model.parameters()]
    (micro,) = make_step(2)
    with pytest.raises(kind, match=f"(?s){words.partition('.*')[0]}"):  # noqa: PT012
        balancer.tap(bad(model, micro)).backward()
        optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(parameters, model.parameters(), strict=True))


@pytest.mark.parametrize("far_away", [False, True])
@pytest.mark.parametrize("name", GUARDS)
def test_with_on_fault_warn_training_goes_on(name, far_away, monkeypatch):
    """The step is left unbalanced and counted; the steps around it are those of a run without it."""
    if far_away:
        monkeypatch.setattr(devices, "HOST_READABLE", set())
    bad, policies, _, words = GUARDS[name]
    found, shown = [], []
    for with_fault in (True, False):
        model = net(**SMALL)
        balancer = Balancer(model, policies, on_fault="warn")
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        for seed in range(4):
            micro = documents(make_step(seed)[0])
            with warnings.catch_warnings(record=True) as seen:
                warnings.simplefilter("always")
                if with_fault and seed == 1:
                    weights = [p.detach().clone() for p in model.parameters()]
                    balancer.tap(bad(model, micro)).backward()
                    optimizer.step()
                    optimizer.zero_grad()
                    with torch.no_grad():  # which NaN gradients spoil, with or without a balancer
                        for p, weight in zip(model.parameters(), weights, strict=True):
                            p.copy_(weight)
                elif seed != 1:
                    train_step(model, balancer, optimizer, [micro])
            told = [str(one.message) for one in seen if "left unbalanced" in str(one.message)]
            assert bool(told) == (with_fault and seed == (2 if far_away else 1))
            if with_fault and seed < 2:  # of the bad step nothing is to be seen
                shown.append({k: v for k, v in balancer.metrics().items() if "faulty" not in k})
            if told:
                assert re.search(f"(?s)step 1 is left unbalanced.*{words}", told[0]) or not far_away
        if with_fault:
            assert balancer.metrics()["balance/faulty_steps"] == 1
            assert balancer.step_count == 4
        found.append((snapshot(model, balancer), {k: v for k, v in balancer.metrics().items() if "faulty" not in k}))
    assert shown[0] == shown[1]
    assert found[0][0] == found[1][0]
    assert found[0][1] == pytest.approx(found[1][1], rel=1e-9)


def test_another_word_for_on_fault():
    with pytest.raises(ConfigError, match=r"(?s)'raise' or 'warn'.*'ignore'"):
        Balancer(net(), [MICRO], on_fault="ignore")


@pytest.mark.parametrize("policies", [[MICRO, BIAS], [PREVIOUS, ExpertBias("momentum", rate=0.1)], [AuxLoss(), BIAS]])
def test_a_healthy_run_is_the_same_whether_values_are_at_hand(policies, monkeypatch):
    found = []
    for hands in ({"cpu"}, set()):
        monkeypatch.setattr(devices, "HOST_READABLE", hands)
        model, balancer, optimizer = setup(*policies)
        grads = [train_step(model, balancer, optimizer, make_step(seed, 2)) for seed in range(4)]
        balancer.remove()
        found.append((grads, balancer.metrics(), model.blocks[0].gate.expert_bias.tolist()))
    for one, other in zip(found[0][0], found[1][0], strict=True):
        assert_close(one, other, 0)
    assert found[0][1:] == found[1][1:]


def test_declared_tokens_that_are_others(far):
    model, balancer, optimizer = setup(MICRO, BIAS)
    train_step(model, balancer, optimizer, make_step(0))
    bias = model.blocks[0].gate.expert_bias.clone()
    balancer.begin_step(tokens=77, micro_batches=1)
    train_step(model, balancer, optimizer, make_step(1))
    assert torch.equal(model.blocks[0].gate.expert_bias, bias)
    balancer.tap(loss_of(model, make_step(2)[0])).backward()
    with pytest.raises(StateError, match=r"(?s)77 router tokens.*got: 10"):
        optimizer.step()


def test_the_last_step_s_fault_is_told_when_the_balancer_is_removed(far):
    model, balancer, optimizer = setup(MICRO)
    balancer.tap(detached(model, make_step(0)[0])).backward()
    optimizer.step()
    with pytest.warns(UserWarning, match="never arrived"):
        balancer.remove()


def test_a_step_hidden_from_us_is_seen_by_values_that_travel(far):
    """``p.data`` moves without a version: on a GPU the comparison is read once it has arrived."""
    model, balancer, _ = setup(MICRO)
    with pytest.raises(StateError, match="parameters that changed"):  # noqa: PT012
        for seed in range(4):
            balancer.tap(loss_of(model, make_step(seed)[0])).backward()
            for p in model.parameters():
                assert p.grad is not None
                p.data.sub_(0.05 * p.grad)


def test_a_skipped_step_where_values_are_not_at_hand(far):
    """The optimizer multiplies its update by 0: masked on the device, counted when the host knows."""

    class Zero(torch.optim.SGD):
        zero = False

        @torch.no_grad()
        def step(self, closure: Any = None) -> None:  # type: ignore[override]
            for group in self.param_groups:
                for p in group["params"]:
                    p.add_(p.grad * (0.0 if self.zero else -0.05))

    model = net(**SMALL)
    optimizer = Zero(model.parameters(), lr=0.05)
    balancer = Balancer(model, [PREVIOUS, BIAS], optimizer)
    train_step(model, balancer, optimizer, make_step(0))
    before = snapshot(model, balancer)
    optimizer.zero = True
    train_step(model, balancer, optimizer, make_step(1))
    assert snapshot(model, balancer) == before
    optimizer.zero = False
    train_step(model, balancer, optimizer, make_step(2))
    assert snapshot(model, balancer) != before
    assert balancer.metrics()["balance/skipped_steps"] == 1


def test_counting_nothing(far):
    model, balancer, optimizer = setup(AuxLoss("global_batch", 0.3, estimator="exact"))
    model.eval()
    with balancer.counting():
        loss_of(model, make_step(0)[0])
    model.train()
    balancer.tap(loss_of(model, make_step(0)[0])).backward()
    optimizer.step()
    optimizer.zero_grad()
    with balancer.counting():
        loss_of(model, make_step(1)[0])
    balancer.tap(loss_of(model, make_step(1)[0])).backward()
    with pytest.raises(StateError, match="in step 0"):
        optimizer.step()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_guards_are_asked_under_a_compiler_too(far):
    """Document numbers inside a compiled layer: flagged by the graph itself."""
    layer = MoE(8, 8, 4, 2, batch_first=True)
    balancer = Balancer(layer, [DOCUMENT])
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.0)
    compiled: Any = torch.compile(layer, backend="aot_eager")
    x = torch.randn(2, 3, 8)
    for number in (99, 0):
        documents_BS = torch.tensor([[0, 0, number], [0, 0, 0]])
        balancer.tap(compiled(x, document_ids_BS=documents_BS).square().mean()).backward()
        if number:
            optimizer.step()
        else:
            with pytest.raises(InputError, match=r"1 out of range"):
                optimizer.step()


@pytest.mark.xdist_group("ranks")
class TestRanks:
    """Four processes, of which one fails each guard: none hangs, and all say the same."""

    @pytest.mark.parametrize("on_fault", ["raise", "warn"])
    @pytest.mark.parametrize("where", ["at hand", "far"])
    @pytest.mark.parametrize(
        "guard", ["nan", "documents", "detached", "no forward", "unseen", "declared", "no tap", "discarded"]
    )
    def test_one_of_four_ranks_fails(self, ranks, guard, where, on_fault):
        found = ranks.run("contracts.law._fault_cases:one_fails", guard, where, on_fault, size=4, timeout=60)
        texts = [text for text, _ in found]
        assert len(set(texts)) == 1
        assert texts[0], "somebody has to say it"
        if guard in ("unseen", "declared"):
            assert "on rank 2" in texts[0]
        biases = [bias for _, bias in found]
        assert all(bias == biases[0] for bias in biases), "what the bad step would have moved was left out everywhere"

    def test_an_untapped_step_of_all_ranks_is_none(self, ranks):
        assert ranks.run("contracts.law._fault_cases:all_empty", size=2) == [(2, 1)] * 2


def test_after_a_checkpoint_was_loaded_an_old_fault_is_forgotten(far):
    """The message's own remedy: back to the last checkpoint, and go on."""
    model, balancer, optimizer = setup(MICRO, BIAS)
    train_step(model, balancer, optimizer, make_step(0))
    weights, state = {k: v.clone() for k, v in model.state_dict().items()}, balancer.state_dict()
    balancer.tap(nan_logits(model, make_step(1)[0])).backward()
    optimizer.step()
    optimizer.zero_grad()
    model.load_state_dict(weights)
    balancer.load_state_dict(state)
    for seed in range(2, 5):
        train_step(model, balancer, optimizer, make_step(seed))
    assert balancer.step_count == 4


def test_errors_of_other_kinds_pass_through():
    """A guard is no net for a user's own mistakes."""
    model, balancer, _ = setup(MICRO)
    loss = balancer.tap(nn.Identity()(loss_of(model, make_step(0)[0])))
    with pytest.raises(ZeroDivisionError):
        (loss / (1 // 0)).backward()
