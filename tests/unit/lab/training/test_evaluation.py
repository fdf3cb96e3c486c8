"""The held-out numbers against a slow and obvious computation of each."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from equipoise.errors import DataError
from equipoise.lab.config.schema import ModelConfig
from equipoise.lab.data.packing import PackedData
from equipoise.lab.models.transformer import LanguageModel
from equipoise.lab.training import routing_churn
from equipoise.lab.training.evaluation import evaluate, shuffled_mutual_information
from equipoise.lab.training.routing_churn import LastRouting
from equipoise.lab.training.trainer import train
from equipoise.layers import Router
from equipoise.storage.run_record import Evaluation, read_run

LENGTH, EXPERTS, TOP_K, VOCABULARY = 12, 8, 2, 300
CONFIG = ModelConfig(layers=3, width=32, heads=2, head_dim=16, experts=EXPERTS, top_k=TOP_K, expert_hidden=16,
                     vocab_size=VOCABULARY)  # fmt: skip


def packed(sizes=(9, 6, 7)) -> PackedData:
    """Domains of four words each, so that experts can tell them apart; held-out windows only."""
    rng = np.random.default_rng(0)
    heldout = {
        f"domain {d}": rng.integers(100 * d, 100 * d + 4, (size, LENGTH + 1)).astype(np.uint16)
        for d, size in enumerate(sizes)
    }
    heldout_bytes = {name: 5 * rows.shape[0] * LENGTH // 2 for name, rows in heldout.items()}  # 2.5 bytes a token
    return PackedData(list(heldout), "", VOCABULARY, heldout, heldout, heldout_bytes, Path("none"))


def sharp(gate: str = "softmax", **options) -> LanguageModel:
    """Routers with strong opinions, so that loads are uneven."""
    model = LanguageModel(dataclasses.replace(CONFIG, gate=gate, **options), seed=1)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("mlp.gate.weight", "embed_tokens.weight")):
                parameter.normal_(0, 1, generator=generator)
    return model


@pytest.fixture(scope="module")
def found() -> Evaluation:
    return evaluate(sharp(), packed(), step=7, sequences_per_micro_batch=2)


@pytest.fixture(scope="module")
def slow() -> list[list[dict]]:
    """[domain][sequence] -> loss, choices [layer][token] and scores [layer][token], one sequence at a time."""
    model, data = sharp().eval(), packed()
    routed: list[torch.Tensor] = []
    for module in model.modules():
        if isinstance(module, Router):
            module.register_forward_hook(lambda *io: routed.append(io[2].logits_TE.double().softmax(1)))
    result = []
    for name in data.domains:
        sequences = []
        for row in data.heldout[name]:
            tokens = torch.tensor(row.astype(np.int64))
            routed.clear()
            with torch.no_grad():
                logits = model(tokens[None, :-1])[0].double()
            losses = [-logits[t].log_softmax(0)[tokens[t + 1]].item() for t in range(LENGTH)]
            ranked = [sorted(enumerate(row), key=lambda pair: -pair[1])[:TOP_K] for r in routed for row in r.tolist()]
            chosen = [{e for e, _ in pairs} for pairs in ranked]
            score = [sum(p for _, p in pairs) for pairs in ranked]
            layers = range(0, 3 * LENGTH, LENGTH)
            sequences.append({"loss": mean(losses), "chosen": [chosen[i : i + LENGTH] for i in layers],
                              "score": [mean(score[i : i + LENGTH]) for i in layers]})  # fmt: skip
        result.append(sequences)
    return result


def count(sequences: list[dict], layer: int) -> list[int]:
    return [sum(e in chosen for s in sequences for chosen in s["chosen"][layer]) for e in range(EXPERTS)]


def vio(counts: list[int]) -> float:
    return max(counts) / (sum(counts) / len(counts)) - 1


def mean(values) -> float:
    values = list(values)
    return sum(values) / len(values)


def test_loss_and_counts_per_domain(found, slow):
    assert found.step == 7
    for d, sequences in enumerate(slow):
        name = f"domain {d}"
        assert found.loss[name] == pytest.approx(mean(s["loss"] for s in sequences), rel=1e-5)
        assert found.tokens[name] == len(sequences) * LENGTH
        assert found.bits_per_byte[name] == pytest.approx(found.loss[name] / math.log(2) / 2.5)
        for layer in range(3):
            assert found.counts[d][layer] == count(sequences, layer)
            assert found.topk_score[d][layer] == pytest.approx(mean(s["score"][layer] for s in sequences), rel=1e-5)


def test_balance_uses_equally_many_sequences_of_each_domain(found, slow):
    fair = [sequences[:6] for sequences in slow]
    together = [s for sequences in fair for s in sequences]
    pairs = [[sequences[i], sequences[i + 1]] for sequences in fair for i in (0, 2, 4)]
    for layer in range(3):
        assert found.maxvio_global[layer] == pytest.approx(vio(count(together, layer)))
        assert found.maxvio_sequence[layer] == pytest.approx(mean(vio(count([s], layer)) for s in together))
        assert found.maxvio_micro_batch[layer] == pytest.approx(mean(vio(count(pair, layer)) for pair in pairs))
        assert found.dead_experts[layer] == count(together, layer).count(0)


def test_mutual_information(found, slow):
    """I(E; D) = sum p(e, d) ln(p(e, d) / p(e) p(d)), with the same weight for each domain."""
    for layer in range(3):
        joint = [[c / (6 * LENGTH * TOP_K) / 3 for c in count(sequences[:6], layer)] for sequences in slow]
        expert = [sum(row[e] for row in joint) for e in range(EXPERTS)]
        nats = sum(p * math.log(p / (expert[e] / 3)) for row in joint for e, p in enumerate(row) if p)
        assert found.mutual_information[layer] == pytest.approx(nats)
        assert 0 <= found.mutual_information_shuffled[layer] < nats / 2


def test_routing_churn_is_what_changed_since_the_evaluation_before(found, slow):
    """Against a model whose routers see every second expert's logits with another sign; domains count alike."""
    assert found.routing_churn == []
    model, last = sharp(), LastRouting()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, Router):
                module.weight[::2] *= -1
    assert evaluate(model, packed(), step=1, last=last).routing_churn == []
    before = last.ids_NLSK
    assert before is not None and before.dtype == torch.uint8 and before.shape == (18, 3, LENGTH, TOP_K)
    churn = evaluate(sharp(), packed(), step=2, last=last).routing_churn
    sequences = [sequence for domain in slow for sequence in domain[:6]]
    for layer in range(3):
        pairs = [
            (set(old), new)
            for of_sequence, sequence in zip(before[:, layer].tolist(), sequences, strict=True)
            for old, new in zip(of_sequence, sequence["chosen"][layer], strict=True)
        ]
        assert churn[layer] == pytest.approx(mean(len(new - old) / TOP_K for old, new in pairs))
    assert min(churn) > 0.1 and max(churn) < 1
    assert evaluate(sharp(), packed(), step=3, last=last).routing_churn == [0.0] * 3


def test_however_long_the_text_few_tokens_are_remembered(monkeypatch):
    every, few, whole = 3, LastRouting(), LastRouting()
    evaluate(sharp(), packed(), step=1, last=whole)
    tokens = sum(len(rows) for rows in packed().heldout.values()) * LENGTH
    monkeypatch.setattr(routing_churn, "TOKENS", tokens // every)
    evaluate(sharp(), packed(), step=1, last=few)
    assert few.ids_NLSK is not None and whole.ids_NLSK is not None
    assert torch.equal(few.ids_NLSK, whole.ids_NLSK[:, :, ::every])


def test_micro_batches_of_mixed_sequences():
    mixed = evaluate(sharp(), packed((6, 6, 6)), step=1, sequences_per_micro_batch=3, mix="sequence")
    plain = evaluate(sharp(), packed((6, 6, 6)), step=1, sequences_per_micro_batch=3)
    for layer in range(3):  # a mixed micro-batch is better balanced than one of a single domain
        assert mixed.maxvio_micro_batch[layer] < plain.maxvio_micro_batch[layer]
        assert mixed.maxvio_global[layer] == pytest.approx(plain.maxvio_global[layer])


def test_a_limit_takes_the_first_sequences():
    data = packed()
    first = dataclasses.replace(data, heldout={name: rows[:4] for name, rows in data.heldout.items()},
                                heldout_bytes=dict.fromkeys(data.domains, 10 * LENGTH))  # fmt: skip
    assert evaluate(sharp(), data, step=1, sequences=4) == evaluate(sharp(), first, step=1)
    everything = evaluate(sharp(), data, step=1)
    assert evaluate(sharp(), data, step=1, sequences=10_000) == everything


def test_a_model_that_knows_nothing_needs_all_bits():
    model = sharp()
    torch.nn.init.zeros_(model.lm_head.weight)
    found = evaluate(model, packed(), step=1)
    assert all(bits == pytest.approx(math.log2(VOCABULARY) / 2.5) for bits in found.bits_per_byte.values())
    assert found.perplexity == pytest.approx(VOCABULARY)


def test_sigmoid_scores_are_normalised_over_all_experts():
    model = sharp("sigmoid", selection_bias=True)
    data = packed((2, 2))
    routed = []
    for module in model.modules():
        if isinstance(module, Router):
            module.register_forward_hook(lambda *io: routed.append(io[2]))
    found = evaluate(model, data, step=1, sequences_per_micro_batch=4)
    for layer in range(3):
        scores = routed[layer].logits_TE.double().sigmoid()
        share = scores.gather(1, routed[layer].expert_ids_TK).sum(1) / scores.sum(1)
        assert found.topk_score[0][layer] == pytest.approx(share[: 2 * LENGTH].mean().item(), rel=1e-5)
        assert found.topk_score[1][layer] == pytest.approx(share[2 * LENGTH :].mean().item(), rel=1e-5)


@pytest.mark.parametrize("training", [True, False])
def test_a_model_is_left_as_it_was(training):
    model = sharp().train(training)
    evaluate(model, packed(), step=1)
    assert all(module.training == training for module in model.modules())
    assert all(not module._forward_hooks for module in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_evaluation_does_not_touch_training(tiny_run, tmp_path):
    often = read_run(train(tiny_run("deepseek-v3", eval_every=1), tmp_path / "often"))
    never = read_run(train(tiny_run("deepseek-v3", eval_every=0), tmp_path / "never"))
    assert len(often.evaluations) == 6 and len(never.evaluations) == 1
    assert [(s.loss, s.grad_norm, s.balance) for s in often.steps] == [
        (s.loss, s.grad_norm, s.balance) for s in never.steps
    ]
    assert dataclasses.replace(often.evaluations[-1], routing_churn=[]) == never.evaluations[-1]


def test_a_domain_without_heldout_text_is_an_error():
    with pytest.raises(DataError, match="held-out text of the domain 'domain 1'"):
        evaluate(sharp(), packed((3, 0)), step=1)


def test_shuffling_destroys_what_experts_know():
    counts = torch.zeros(60, 1, 3, dtype=torch.int64)
    labels = torch.arange(60) // 20
    counts[torch.arange(60), 0, labels] = 10  # every domain has an expert of its own: ln 3 nats
    floors = [shuffled_mutual_information(counts, labels, seed=seed)[0] for seed in range(3)]
    assert len(set(floors)) == 3
    # 60 sequences, each of one expert: about (E - 1)(D - 1) / 2N = 0.033 is left by chance
    assert all(0.005 < floor < 0.1 for floor in floors)
    assert shuffled_mutual_information(counts, labels, seed=1) == shuffled_mutual_information(counts, labels, seed=1)


@given(st.integers(0, 1000))
def test_experts_that_know_nothing_stay_at_zero_when_shuffled(seed):
    counts = torch.full((12, 2, 4), 5)
    assert shuffled_mutual_information(counts, torch.arange(12) % 3, seed=seed) == pytest.approx([0, 0], abs=1e-12)


def test_tokens_that_use_few_experts():
    """With top-p: counts and scores are those of the choices that are made, found one sequence at a time."""
    model, data = sharp(top_k=6, top_p=0.95, normalize_weights=False, expert_widths="arithmetic"), packed()
    got = evaluate(model, data, step=1, sequences_per_micro_batch=2)
    routers = [module for module in model.modules() if isinstance(module, Router)]
    seen: list = []
    hooks = [one.register_forward_hook(lambda _m, _i, out: seen.append(out)) for one in routers]
    used = set()
    for d, name in enumerate(data.domains):
        rows = torch.from_numpy(data.heldout[name].astype("int64"))
        seen.clear()
        with torch.no_grad():
            model.eval()(rows[:, :-1])
        for layer, out in enumerate(seen):
            counts, score = [0] * EXPERTS, 0.0
            for z, ids in zip(out.logits_TE, out.expert_ids_TK.tolist(), strict=True):
                kept = [e for e in ids if e < EXPERTS]
                used.add(len(kept))
                score += float(z.softmax(dim=0)[kept].sum())
                for e in kept:
                    counts[e] += 1
            assert got.counts[d][layer] == counts
            assert got.topk_score[d][layer] == pytest.approx(score / len(out.logits_TE), rel=1e-5)
    for hook in hooks:
        hook.remove()
    assert len(used) > 1, "the case has tokens of several kinds"
