"""Every MoE family of the installed transformers: the law through its real model, or a refusal that says why.

The law is checked for one family of each kind of router; with ``-m full``, for all. What kind a family is of, and that
none is of a kind that the first tier lacks, is always checked.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")

from _threads import one_thread  # noqa: F401
from equipoise import AuxLoss, Balancer, ExpertBias
from equipoise.errors import ConfigError
from equipoise.external.discovery import find_external_routers
from equipoise.external.output_formats import FORMATS
from integrations.hf._cases import (
    check_gradient_ratio,
    check_law,
    inputs,
    kind_of,
    loss_of,
    policies_for,
    quiet,
    rounding,
    same_gradients,
    tiers,
)
from integrations.hf._law import Twin, bias_of, gate_of, law
from integrations.hf.families import FAMILIES, FIRST, NOT_BUILT, REFUSED, SERVED, SINCE, TOO_OLD, build


@pytest.mark.parametrize("family", tiers(SERVED))
def test_gradients_counts_and_biases_are_those_of_the_law(family: str) -> None:
    """Gradients as near to the law in loops as the model rounds, counts exact, without padding, biases by the rule."""
    check_law(family)


@pytest.mark.parametrize("family", tiers(SERVED))
def test_gradient_ratio_is_that_of_autograd(family: str) -> None:
    """No hook can stand between a router's logits and its weights: the norm is reckoned from the gate's closed form."""
    check_gradient_ratio(family)


@pytest.mark.parametrize("family", SERVED)
def test_every_family_has_a_router_of_a_kind_that_is_tested_in_full(family: str) -> None:
    """Its gate is recognized where all logits are nearly equal, as a new model's are, and gates look alike."""
    assert kind_of(family)[0] == gate_of(family)
    assert kind_of(family) in {kind_of(first) for first in FIRST}, f"a new kind: add {family} to FIRST"


def test_no_two_of_the_first_tier_are_of_one_kind() -> None:
    assert len({kind_of(family) for family in FIRST}) == len(FIRST)


@pytest.mark.full
@pytest.mark.parametrize("family", SERVED)
def test_gate_is_recognised_also_when_logits_are_apart(family: str) -> None:
    with quiet():
        model = build(family, initializer_range=0.3)
        gates = {router.gate for _, router in find_external_routers(model, model.dummy_inputs)}
    assert gates == {gate_of(family)}


@pytest.mark.parametrize("family", SINCE)
def test_a_model_of_before_its_router_is_refused_in_words(family: str) -> None:
    with quiet():
        model = build(family)
    if family in TOO_OLD:
        with pytest.raises(ConfigError, match=r"(?s)without a router.*own-router\.md"):
            Balancer(model, [AuxLoss("global_batch", coef=1e-2)])
    else:
        assert Balancer(model, []).routers


@pytest.mark.parametrize("family", sorted(REFUSED))
def test_a_family_that_cannot_be_served_is_refused_by_name(family: str) -> None:
    with quiet():
        model = build(family)
        with pytest.raises(
            ConfigError, match=rf"(?s){REFUSED[family]}.*{re.escape(FORMATS[REFUSED[family]].unsupported)}"
        ):
            Balancer(model, [AuxLoss()])


def test_layers_that_nothing_can_move_are_named_and_the_others_balanced() -> None:
    """The first layers of DeepSeek-V4 take their experts from token ids."""
    with pytest.warns(UserWarning, match=r"token ids: model\.layers\.0\.mlp\.gate$"):
        balancer = Balancer(build("deepseek_v4", mlp_layer_types=["hash_moe", "moe"]), [AuxLoss(), ExpertBias()])
    assert [layer.name for layer in balancer._layers] == ["model.layers.1.mlp.gate"]
    check_law("deepseek_v4", mlp_layer_types=["hash_moe", "moe"])
    with quiet(), pytest.raises(ConfigError, match="token ids: nothing can move them"):
        Balancer(build("deepseek_v4", mlp_layer_types=["hash_moe", "hash_moe"]), [AuxLoss()])


@pytest.mark.parametrize("family", [family for family in ("zaya", "longcat_flash") if family not in TOO_OLD])
def test_choices_of_experts_that_do_no_work_are_no_load(family: str) -> None:
    """All tokens count, for what the losses are divided by; their idle choices do not."""
    with quiet():
        model = build(family)
        balancer = Balancer(model, [AuxLoss("document", 0.3), ExpertBias(rate=0.0)])
        twin, optimizer = Twin(build(family), family), torch.optim.SGD(model.parameters(), lr=0.0)
        model.train(), twin.model.train()
        given = inputs(batch=2, length=8, padded=False)
        del given["attention_mask"]
        given["position_ids"] = torch.tensor([[0, 1, 2, 0, 1, 2, 3, 4], [0, 1, 2, 3, 4, 0, 1, 0]])
        balancer.tap(loss_of(model, given)).backward()
        own = loss_of(twin.model, given)
        (own.double() + law(twin, [0] * 3 + [1] * 5 + [2] * 5 + [3] * 2 + [4], [True] * 16, 0.3)).backward()
        optimizer.step()
        same_gradients(model, twin.model, rounding(family, given))
        counts = list(twin.counts([True] * 16).values())
        assert [c.tolist() for c in balancer.load()] == counts
        top_k = next(iter(twin.ids.values())).shape[1]
        assert sum(map(sum, counts)) < 2 * 16 * top_k, "some choices were idle"
        assert balancer.metrics()["balance/tokens"] == 16


def test_every_family_of_the_installed_version_is_here() -> None:
    """A model file with a router or an aux coefficient that nobody listed is a family nobody tried."""
    import transformers

    folder = Path(transformers.__file__).parent / "models"
    routed = re.compile(r"^class \w*(TopKRouter|TopkRouter|Top1Router|Top2Router|TopKGating|CDMoE|MoEV1Gate)\b", re.M)
    found = {p.parent.name for p in folder.glob("*/modeling_*.py") if routed.search(p.read_text(encoding="utf-8"))}
    assert found <= set(FAMILIES) | set(NOT_BUILT), found - set(FAMILIES) - set(NOT_BUILT)


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral", "olmoe", "gpt_oss", "granitemoe"])
def test_the_models_own_loss_is_switched_off_and_said_so(family: str) -> None:
    """With output_router_logits its pooled loss would push a second time."""
    model = build(family, output_router_logits=True)
    with pytest.warns(UserWarning, match="own balance loss"):
        balancer = Balancer(model, [AuxLoss("sequence", 0.3)])
    plain = build(family)
    given = inputs()
    model.train(), plain.train()
    labels = given["input_ids"].masked_fill(given["attention_mask"] == 0, -100)
    own = model(**given, labels=labels).loss
    assert torch.equal(own, plain(**given, labels=labels).loss), "no balance loss inside"
    assert model.config.output_router_logits is False
    balancer.tap(own).backward()
    twin = Twin(plain, family)
    own_twin = plain(**given, labels=labels).loss
    mask_T = given["attention_mask"].bool().view(-1).tolist()
    (own_twin.double() + law(twin, [t // 6 for t in range(18)], mask_T, 0.3)).backward()
    assert all(p.grad is not None for p in (*model.parameters(), *plain.parameters()))
    same_gradients(model, plain, rounding(family, given, loss=lambda net, batch: net(**batch, labels=labels).loss))


@pytest.mark.parametrize("family", ["gemma4", "phimoe", "deepseek_v2_groups"])
def test_a_bias_where_weights_cannot_be_made_again_is_refused(family: str) -> None:
    with quiet():
        if family == "deepseek_v2_groups":
            model = build("deepseek_v2", topk_method="group_limited_greedy", n_group=4, topk_group=1)
        else:
            model = build(family)
        Balancer(model, [AuxLoss()]).remove()
        with pytest.raises(ConfigError, match="correction bias"):
            Balancer(model, [AuxLoss(), ExpertBias(rate=1e-4)])


def test_routers_that_no_example_reaches_are_balanced_too() -> None:
    """Ernie VL keeps experts for pictures that a text never meets; once one comes, they are pushed as well."""
    with quiet():
        model = build("ernie4_5_vl_moe")
        balancer = Balancer(model, policies_for(model))
        model.train()
        names = [name for name, _ in find_external_routers(build("ernie4_5_vl_moe"), model.dummy_inputs)]
        assert sum("vision" in name for name in names) == 2
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        given = inputs(padded=False)
        kinds = torch.zeros_like(given["input_ids"])
        kinds[:, :2] = 1
        output = model(**given, moe_mm_token_type_ids=kinds).last_hidden_state
        balancer.tap(output.square().mean()).backward()
        optimizer.step()
        loads = dict(zip(names, [int(c.sum()) for c in balancer.load()], strict=True))
        assert {n: c for n, c in loads.items() if "vision" in n} == {n: 12 for n in names if "vision" in n}
        assert all(c == 24 for n, c in loads.items() if "text" in n)
        assert all(b.any() for b in bias_of(model).values())


def test_probing_leaves_the_model_as_it_was() -> None:
    with quiet():
        model = build("deepseek_v3")
        before = {name: value.clone() for name, value in model.state_dict().items()}
        generator = torch.get_rng_state()
        balancer = Balancer(model, policies_for(model))
        assert torch.equal(generator, torch.get_rng_state())
        after = model.state_dict()
        assert all(torch.equal(value, after[name]) for name, value in before.items())
        loss = loss_of(model, inputs())
        balancer.remove()
        assert torch.equal(loss, loss_of(model, inputs()))
