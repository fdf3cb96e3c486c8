"""Replayed routing in models of transformers: each family whose weights can be made for other experts, or a refusal.

One family of each kind of router; with ``-m full``, all.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("transformers")

from contracts.law._reference import naive_scores
from equipoise import AuxLoss, Balancer, ConfigError, ExpertBias, RoutingRecord, record_routing, replay_routing
from equipoise.external.discovery import find_external_routers
from equipoise.external.output_formats import parse_output
from integrations.hf._cases import RECOMPUTED, UNMEASURED, inputs, loss_of, quiet, tiers
from integrations.hf._law import bias_of
from integrations.hf.families import SERVED, TOO_OLD, build

REPLAYED = [family for family in SERVED if family not in UNMEASURED]


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with quiet():
        yield
    torch.set_num_threads(before)


def recorded(model: nn.Module, *batches: dict[str, Tensor]) -> RoutingRecord:
    with record_routing(model) as record, torch.no_grad():
        for given in batches:
            loss_of(model, given)
    return record


@pytest.mark.parametrize("family", tiers(REPLAYED))
def test_its_own_record_changes_no_bit_and_another_is_dispatched_by_its_live_scores(family: str):
    model, given = build(family).eval(), inputs(padded=False)
    routers = dict(find_external_routers(model, None))
    record = recorded(model, given)
    assert set(record.ids) <= set(routers) and record.num_calls == 1
    before = loss_of(model, given)
    with replay_routing(model, record):
        again = loss_of(model, given)
    assert torch.equal(before, again)
    other = RoutingRecord(
        {name: [(ids + 1) % routers[name].num_experts for ids in calls] for name, calls in record.ids.items()}
    )
    seen: dict[str, Any] = {}
    reached: list[Tensor] = []

    def look(name: str) -> Any:
        return lambda module, args, kwargs, output: seen.update({name: (module, args, kwargs, output)})

    def arrives(_module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        reached.extend(x for x in (*args, *kwargs.values()) if isinstance(x, Tensor) and not x.is_floating_point())

    with replay_routing(model, other):  # these hooks come behind those of the replay
        for name, module in model.named_modules():
            if name in routers:
                module.register_forward_hook(look(name), with_kwargs=True)
            if name.endswith("experts"):
                module.register_forward_pre_hook(arrives, with_kwargs=True)
        assert not torch.equal(loss_of(model, given), before)
    for name, call in seen.items():
        wanted_TK = other.ids[name][0].long()
        logits_TE, weights_TK, ids_TK = read(routers[name].spec, call, wanted_TK)
        assert torch.equal(ids_TK, wanted_TK)
        if any(ids.numel() == wanted_TK.numel() for ids in reached):
            assert any(torch.equal(ids.reshape(-1).long(), wanted_TK.flatten()) for ids in reached)
        check_weights(routers[name].spec, logits_TE, weights_TK, wanted_TK)


def read(spec: Any, call: tuple[Any, ...], wanted_TK: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Logits, weights and ids of a router's output."""
    output = call[-1]
    if spec.gate == "sigmoid" and len(output) == 2:  # Llama 4: scores of all experts, 0 for those not chosen; no ids
        scores_TE, logits_TE = output
        ids_TK = torch.zeros_like(logits_TE).scatter(-1, wanted_TK, 1.0).where(scores_TE != 0, -1.0)
        assert int((scores_TE != 0).sum()) == wanted_TK.numel() == int((ids_TK > 0).sum())
        return logits_TE, scores_TE.gather(-1, wanted_TK), wanted_TK
    return parse_output(*call, swapped=spec.swapped).parts


def check_weights(spec: Any, logits_TE: Tensor, weights_TK: Tensor, ids_TK: Tensor) -> None:
    z_TE = logits_TE.detach().double()
    s_TE = naive_scores(z_TE.clamp(min=1e-30).log() if spec.probabilities else z_TE, spec.gate)
    for t, ids in enumerate(ids_TK.tolist()):
        own_K = torch.stack([s_TE[t, e] for e in ids])
        own_K = spec.scale * (own_K / own_K.sum() if spec.normalize else own_K)
        torch.testing.assert_close(weights_TK[t].double(), own_K, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("family", UNMEASURED)
def test_weights_that_hold_more_are_refused_by_name(family: str):
    model = build(family)
    kind = type(dict(model.named_modules())[next(iter(dict(find_external_routers(model, None))))]).__name__
    with (
        pytest.raises(ConfigError, match=rf"(?s){kind} \(.*: its weights hold more.*do: "),
        replay_routing(model, RoutingRecord({})),
    ):
        pass


@pytest.mark.skipif(bool(TOO_OLD), reason="the page is of the transformers in requirements.lock, this one is older")
def test_the_page_counts_the_families():
    page = (Path(__file__).parents[3] / "docs" / "what-counts.md").read_text(encoding="utf-8")
    assert f"{len(REPLAYED)} of the {len(SERVED)} families" in page


@pytest.mark.parametrize("mode", ["plain", *RECOMPUTED])
@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3", "llama4"])
def test_a_rollout_in_bf16_is_trained_in_fp32(family: str, mode: str):
    """Two padded micro-batches: loads are of the record, the gap is counted by hand, the bias moves a step later."""
    batches = [inputs(seed, batch=6, length=32) for seed in range(2)]
    rollout = build(family).to(torch.bfloat16).eval()
    record = recorded(rollout, *batches)
    model = build(family).train()
    bias = [ExpertBias(rate=0.01)] if bias_of(model) else []
    balancer = Balancer(model, [AuxLoss("global_batch", 0.1), *bias])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    if mode != "plain":
        RECOMPUTED[mode](model)
    live: dict[str, list[Tensor]] = {name: [] for name in balancer.routers}
    for name, router in balancer.routers.items():
        index = 1 if family == "llama4" else 0
        router.module.register_forward_hook(
            lambda _m, _a, output, name=name, index=index: live[name].append(output[index].detach())
        )
    with replay_routing(model, record):
        for given in batches:
            (balancer.tap(loss_of(model, given)) / 2).backward()
    optimizer.step()
    metrics = balancer.metrics()
    assert metrics["balance/recompute_flips"] == 0
    valid_T = torch.cat([given["attention_mask"].flatten() for given in batches]).bool()
    every = 2 if mode != "plain" else 1  # a recompute calls the router again, after its forward
    for layer, (name, router) in enumerate(balancer.routers.items()):
        ids_TK = torch.cat(record.ids[name]).long()[valid_T]
        counts_E = torch.bincount(ids_TK.flatten(), minlength=router.num_experts)
        assert torch.equal(balancer.load()[layer], counts_E)
        own_TK = torch.cat(live[name][::every]).topk(ids_TK.shape[1]).indices[valid_T]
        missed = sum(len(set(ids) - set(own)) for ids, own in zip(ids_TK.tolist(), own_TK.tolist(), strict=True))
        assert metrics[f"balance/layer_{layer:02d}/replay_gap"] == pytest.approx(missed / ids_TK.numel(), rel=1e-12)
    assert metrics["balance/replay_gap"] > 0
    if bias:
        assert not any(value.any() for value in bias_of(model).values())
        for given in batches:
            (balancer.tap(loss_of(model, given)) / 2).backward()
        optimizer.step()
        assert all(value.any() for value in bias_of(model).values())


def test_a_generation_with_a_cache_is_one_call_of_the_whole_sequences():
    model = build("qwen3_moe").eval()
    model.config.use_cache = model.generation_config.use_cache = True
    with record_routing(model) as record:
        ids_BS = model.generate(**inputs(padded=False), max_new_tokens=4, min_new_tokens=4, do_sample=False)
    whole, joined = recorded(model, {"input_ids": ids_BS}), record.joined(3, length=ids_BS.shape[1])
    assert record.num_calls == 4 and joined.num_calls == 1
    for name, (ids_TK,) in joined.ids.items():
        ids_BSK, whole_BSK = ids_TK.view(3, -1, 2), whole.ids[name][0].view(3, -1, 2)
        assert torch.equal(ids_BSK[:, :-1], whole_BSK[:, :-1]) and (ids_BSK[:, -1] == -1).all()
    with replay_routing(model, joined):
        model(input_ids=ids_BS)


def test_a_rollout_in_inference_mode_is_trained():
    model = build("qwen3_moe")
    with torch.inference_mode(), record_routing(model) as record:
        loss_of(model, inputs())
    with replay_routing(model, record):
        loss_of(model, inputs()).backward()


def test_an_adapter_is_trained_on_the_record_of_its_base():
    peft = pytest.importorskip("peft")
    record = recorded(build("qwen3_moe"), inputs())
    model = peft.get_peft_model(build("qwen3_moe"), peft.LoraConfig(target_modules=["q_proj"]))
    with replay_routing(model, record):
        loss_of(model, inputs()).backward()
