"""Losses and loads of each modality are those of a loop; what experts would choose stands beside what is causal."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from equipoise.lab.fusion.evaluation import evaluate
from equipoise.lab.fusion.model import FusionModel
from equipoise.lab.fusion.numbers import MEASURES, numbers_of
from equipoise.lab.fusion.strategies import read_strategy
from equipoise.storage.run_record import Evaluation


def evaluated(config, fused, name: str, **thresholds):
    strategy = read_strategy(name)
    model = FusionModel(config.model, strategy, vocabulary=fused.vocabulary.size)
    for module in model.modules():
        if getattr(module, "thresholds", None) is not None:
            module.thresholds.fill_(0.5)
    return model, evaluate(model, fused, config.model, strategy, step=1, sequences=8, batch=4)


def test_losses_are_means_over_the_tokens_of_a_modality(config, fused):
    model, found = evaluated(config, fused, "dense")
    model.eval()
    sums, counts = [0.0, 0.0], [0, 0]
    for row in fused.held(8):
        with torch.no_grad():
            losses = model(row[None, :-1], row[None, 1:], fused.vocabulary.classes(row[None, :-1]))[0]
        for token, loss in zip(row[1:].tolist(), losses.tolist(), strict=True):
            if token < fused.vocabulary.begin:
                kind = int(token >= fused.vocabulary.text)
                sums[kind], counts[kind] = sums[kind] + loss, counts[kind] + 1
    assert found.loss == pytest.approx({"text": sums[0] / counts[0], "image": sums[1] / counts[1]}, rel=1e-5)
    assert list(found.tokens.values()) == counts and counts[1] == 8 * 16


@pytest.mark.parametrize("name", ["mixed", "groups"])
def test_loads_are_counted_by_the_modality_that_is_read(config, fused, name):
    model, found = evaluated(config, fused, name)
    counts = torch.tensor(found.counts)
    read = fused.vocabulary.classes(fused.held(8)[:, :-1])
    assert counts.sum(dim=2).tolist() == [[int((read == at).sum())] * 2 for at in (0, 1)]
    total = counts.sum(dim=0).double()
    assert found.maxvio_global == pytest.approx((total.max(dim=1).values / total.mean(dim=1) - 1).tolist())
    joint = counts.double() / counts.sum(dim=2, keepdim=True) / 2  # modalities have the same weight
    apart = joint.sum(dim=0, keepdim=True) * joint.sum(dim=2, keepdim=True)
    nats_L = torch.where(joint > 0, joint * (joint / apart).log(), 0.0).sum(dim=(0, 2))
    assert found.mutual_information == pytest.approx(nats_L.tolist(), rel=1e-6)
    assert [found.choices[f"experts {one}"] for one in ("text", "image")] == [1.0, 1.0]
    assert found.dead_experts == (total == 0).sum(dim=1).tolist()
    if name == "groups":
        assert not counts[0, :, 2:].any() and not counts[1, :, :2].any()
        return
    first = model.blocks[0]
    seen = []
    hook = first.feed_forward.gate.register_forward_hook(lambda _, args, __: seen.append(args[0]))
    with torch.no_grad():
        model.eval()(fused.held(8)[:, :-1], fused.held(8)[:, 1:], read)
    hook.remove()
    best = F.linear(seen[0], first.feed_forward.gate.weight).argmax(dim=1).view_as(read)
    for at in (0, 1):
        assert best[read == at].bincount(minlength=4).tolist() == counts[at, 0].tolist()
    scores_T = F.linear(seen[0], first.feed_forward.gate.weight).sigmoid().amax(dim=1).detach().view_as(read)
    for at in (0, 1):
        assert found.topk_score[at][0] == pytest.approx(float(scores_T[read == at].mean()), rel=1e-5)


@pytest.mark.parametrize("name", ["mixed-choice", "groups-choice"])
def test_the_choice_is_measured_beside_what_is_causal(config, fused, name):
    """Choices are even by construction; predictions follow thresholds, and are compared pair by pair."""
    model, found = evaluated(config, fused, name)
    choices = found.choices
    for modality in ("text", "image"):
        assert 0 < choices[f"accuracy {modality}"] < 1
        if name == "groups-choice":
            assert choices[f"experts {modality} chosen"] == pytest.approx(1.0, abs=0.05)
    assert choices["loss text"] != found.loss["text"]
    for module in model.modules():
        if getattr(module, "thresholds", None) is not None:
            module.thresholds.fill_(1.0)
    strategy = read_strategy(name)
    nothing = evaluate(model, fused, config.model, strategy, step=1, sequences=8, batch=4)
    assert nothing.choices["experts text"] == 0 and nothing.choices["recall image"] == 0
    assert nothing.choices["loss text"] == choices["loss text"], "the choice asks no threshold"
    share = nothing.choices["experts image chosen"] / (4 if name == "mixed-choice" else 2)
    assert nothing.choices["accuracy image"] == pytest.approx(1 - share, abs=1e-6), "who predicts nothing"
    assert model.training


def test_numbers_of_an_evaluation():
    found = Evaluation(
        step=1, loss={"text": 3.0, "image": 1.0}, bits_per_byte={}, tokens={"text": 8, "image": 8},
        counts=[[[6, 2, 0, 0]], [[0, 0, 4, 4]]], topk_score=[], maxvio_sequence=[], maxvio_micro_batch=[],
        maxvio_global=[0.5], dead_experts=[0], mutual_information=[0.6], mutual_information_shuffled=[],
        choices={"loss text": 2.5, "accuracy text": 0.8, "precision text": 0.7, "recall text": 0.6, "experts text": 1.1,
                 "experts text chosen": 9.0},
    )  # fmt: skip
    got = numbers_of(found, (range(2), range(2, 4)))
    assert got.keys() == MEASURES.keys()
    known = {"loss text": 3.0, "chosen loss text": 2.5, "gap text": 0.5, "accuracy text": 0.8, "experts text": 1.1,
             "precision text": 0.7, "recall text": 0.6, "maxvio text": 0.5,
             "maxvio image": 0.0, "information": 0.6, "loss image": 1.0}  # fmt: skip
    assert {name: got[name] for name in known} == pytest.approx(known)
    mixed = numbers_of(replace(found, choices={}), (range(4), range(4)))
    assert (mixed["maxvio text"], mixed["maxvio image"]) == (2.0, 1.0) and mixed["gap text"] != mixed["gap text"]
