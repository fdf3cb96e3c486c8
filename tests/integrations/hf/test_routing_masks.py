"""Masks by token id on real tiny models of transformers, against the same model with routers written as loops."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("transformers")

from _rounding import FACTOR, OURS, Float64, worst
from equipoise import (
    AuxLoss,
    Balancer,
    ConfigError,
    ExpertBias,
    InputError,
    StateError,
    load_masks,
    mask_routers,
    record_routing,
    replay_routing,
    routing_masks,
    save_masks,
    unmask_routers,
)
from equipoise.external.observe import capture, find_routers
from equipoise.functional import draw_visible
from integrations.hf._cases import RECOMPUTED, double, inputs, loss_of, quiet
from integrations.hf.families import build

FAMILIES = ["qwen3_moe", "mixtral", "olmoe", "dots1"]
VOCABULARY, E, K, COEF = 64, 8, 2, 0.3


def tiny(family: str) -> Any:
    return build(family)


def made(family: str) -> Any:
    """In float64; one with a correction bias chooses from two of four groups."""
    torch.manual_seed(0)
    more = {"n_group": 4, "topk_group": 2} if family == "dots1" else {}
    model = double(build(family, **more)).train()
    for gate in gates(model).values():
        if hasattr(gate, "e_score_correction_bias"):
            gate.e_score_correction_bias.copy_(torch.linspace(-0.2, 0.2, E))
    return model


def gates(model: nn.Module) -> dict[str, Any]:
    return {name: module for name, module in model.named_modules() if type(module).__name__.endswith("Router")}


def drawn(visible: int = 4) -> list[Tensor]:
    """For two layers: half of the ids see one expert."""
    rare_V = torch.rand(VOCABULARY, generator=torch.Generator().manual_seed(7)) < 0.5
    return [draw_visible(rare_V, E, num_visible=visible, seed=seed) for seed in (0, 1)]


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def same(got: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    assert set(got) == set(want)
    error, name = worst(got, want)
    assert error <= OURS, f"{name}: error {error:.3g}"


class Loops:
    """Puts a router of plain loops in place of each router of a model; what it chose is in ``seen``."""

    def __init__(self, model: nn.Module, masks: list[Tensor], bias: float = 0.0) -> None:
        self.ids: list[int] = []  # of the tokens of the forward
        self.seen: list[list[tuple[Tensor, list[int]]]] = []  # of each call: (p (E,), experts) of each token
        for gate, mask in zip(gates(model).values(), masks, strict=True):
            gate.forward = self._router(gate, mask.tolist(), bias)
        model.register_forward_pre_hook(self._note, with_kwargs=True)

    def _note(self, _module: nn.Module, _args: tuple, kwargs: dict[str, Any]) -> None:
        self.ids = kwargs["input_ids"].reshape(-1).tolist()

    def _router(self, gate: Any, mask: list[list[bool]], bias: float) -> Any:
        sigmoid = hasattr(gate, "e_score_correction_bias")
        normalize, scale = getattr(gate, "norm_topk_prob", True), getattr(gate, "routed_scaling_factor", 1.0)

        def forward(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            z_TE = x.reshape(-1, x.shape[-1]) @ gate.weight.T
            calls: list[tuple[Tensor, list[int]]] = []
            weights, ids = [], []
            for t, z_E in enumerate(z_TE):
                visible = [e for e in range(E) if mask[self.ids[t]][e]]
                score = {e: z_E[e].sigmoid() if sigmoid else z_E[e].exp() for e in visible}
                total: Any = sum(score.values())
                by = {e: float(score[e] if sigmoid else score[e] / total) for e in visible}
                by = {
                    e: v + bias * e + (float(gate.e_score_correction_bias[e]) if sigmoid else 0) for e, v in by.items()
                }
                if sigmoid and gate.num_group > 1:
                    size = E // gate.num_group
                    worth = [
                        sorted((v for e, v in by.items() if e // size == g), reverse=True)[:2]
                        for g in range(gate.num_group)
                    ]
                    best = sorted(range(gate.num_group), key=lambda g: -sum(worth[g]) if worth[g] else math.inf)
                    by = {e: v for e, v in by.items() if e // size in best[: gate.topk_group]}
                chosen = sorted(by, key=lambda e: -by[e])[:K]
                own = [score[e] if sigmoid else score[e] / total for e in chosen]
                own = [w / sum(own) for w in own] if normalize else own
                calls.append((torch.stack([score[e] / total if e in score else z_E[e] * 0 for e in range(E)]), chosen))
                weights.append(torch.stack(own + [z_E[0] * 0] * (K - len(own))) * scale)
                ids.append(chosen + chosen[:1] * (K - len(chosen)))
            self.seen.append(calls)
            return z_TE, torch.stack(weights), torch.tensor(ids)

        return forward

    def taken(self) -> list[list[tuple[Tensor, list[int]]]]:
        seen, self.seen = self.seen, []
        return seen


def load_of(calls: list[list[tuple[Tensor, list[int]]]], valid: list[list[int]]) -> Tensor:
    load = torch.zeros(E, dtype=torch.float64)
    for call, mask in zip(calls, valid, strict=True):
        for (_, chosen), real in zip(call, mask, strict=True):
            for e in chosen if real else ():
                load[e] += 1
    return load


@pytest.mark.parametrize("family", FAMILIES)
def test_choices_loads_and_gradients_are_those_of_loops(family: str) -> None:
    """Two micro-batches with padding; f of the whole step, from what was chosen, p from the visible experts alone."""
    with quiet(), Float64():
        model, other = made(family), made(family)
        masks = drawn()
        assert mask_routers(model, masks) == list(gates(model))
        loops, step = Loops(other, masks), [inputs(0), inputs(1)]
        policies: list[Any] = [AuxLoss("global_batch", COEF, estimator="exact")]
        policies += [ExpertBias(rate=0.0)] if family == "dots1" else []
        balancer = Balancer(model, policies)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        with balancer.counting():
            for given in step:
                model(**given)
        total, seen = torch.zeros((), dtype=torch.float64), []
        for given in step:
            loss, theirs = loss_of(model, given), loss_of(other, given)
            torch.testing.assert_close(loss, theirs, rtol=OURS, atol=OURS)
            (balancer.tap(loss) / 2).backward()
            total = total + theirs / 2
            seen.append(loops.taken())
        found = gradients(model)
        optimizer.step()
        valid = [given["attention_mask"].view(-1).tolist() for given in step]
        tokens = sum(map(sum, valid))
        for layer, counts_E in enumerate(balancer.load()):
            calls = [of_pass[layer] for of_pass in seen]
            load = load_of(calls, valid)
            assert torch.equal(counts_E.double(), load)
            assert load.sum() < K * tokens  # some tokens have one choice
            for call, mask in zip(calls, valid, strict=True):
                for (p, _), real in zip(call, mask, strict=True):
                    total = total + real * COEF * E * (load / load.sum() * p).sum() / tokens
        total.backward()
        same(found, gradients(other))
        balancer.remove()
        assert torch.equal(loss_of(model, step[0]), loss_of(model, step[0]))
        torch.testing.assert_close(loss_of(model, step[0]), loss_of(other, step[0]), rtol=OURS, atol=OURS)


@pytest.mark.parametrize("family", FAMILIES)
def test_generation_with_a_cache_is_that_of_loops_without(family: str) -> None:
    with quiet(), Float64(), torch.no_grad():
        model, other = made(family).eval(), made(family).eval()
        mask_routers(model, drawn())
        Loops(other, drawn())
        ids = inputs(3, padded=False)["input_ids"]
        for _ in range(5):
            ids = torch.cat([ids, other(input_ids=ids).logits[:, -1].argmax(dim=-1, keepdim=True)], dim=1)
        begin = ids[:, :-5]
        made_ids = model.generate(begin, max_new_tokens=5, do_sample=False, use_cache=True, eos_token_id=None)
        assert torch.equal(made_ids, ids)


def test_a_bias_of_ours_chooses_among_what_is_visible() -> None:
    with quiet(), Float64():
        model, other = made("qwen3_moe"), made("qwen3_moe")
        mask_routers(model, drawn())
        balancer = Balancer(model, [ExpertBias(rule="proportional", rate=0.1)])
        for layer in balancer._layers:
            assert layer.router.expert_bias is not None
            layer.router.expert_bias.copy_(0.05 * torch.arange(E))
        Loops(other, drawn(), bias=0.05)
        torch.testing.assert_close(loss_of(model, inputs()), loss_of(other, inputs()), rtol=OURS, atol=OURS)
        balancer.remove()  # bias and mask stay with the model
        torch.testing.assert_close(loss_of(model, inputs()), loss_of(other, inputs()), rtol=OURS, atol=OURS)


@pytest.mark.parametrize("balanced", [False, True])
@pytest.mark.parametrize("way", RECOMPUTED)
def test_a_recompute_has_the_ids_of_its_forward(way: str, balanced: bool) -> None:
    """Micro-batch after micro-batch, as trainers do it, with another forward between forward and backward."""

    def trained(recompute: Any, masked: bool) -> dict[str, Tensor]:
        model = tiny("qwen3_moe").train()
        if masked:
            mask_routers(model, drawn())
        recompute(model)
        balancer = Balancer(model, [AuxLoss("micro_batch", COEF)]) if balanced else None
        for seed in (0, 1):
            loss = loss_of(model, inputs(seed))
            with torch.no_grad():
                model(**inputs(5))
            (balancer.tap(loss) if balancer else loss).backward()
        return gradients(model)

    with quiet():
        rounding, error = (
            worst(trained(RECOMPUTED[way], masked), trained(lambda _: None, masked))[0] for masked in (False, True)
        )
        assert error <= FACTOR * max(rounding, 1e-7) < 1e-3


def test_a_recompute_that_may_be_of_two_forwards_is_an_error() -> None:
    with quiet():
        model = tiny("qwen3_moe").train()
        mask_routers(model, drawn())
        model.gradient_checkpointing_enable({"use_reentrant": False})
        first, second = loss_of(model, inputs(0)), loss_of(model, inputs(1))
        with pytest.raises(StateError, match="as one batch"):
            (first + second).backward()
        model = tiny("qwen3_moe").train()
        mask_routers(model, drawn())
        model.gradient_checkpointing_enable({"use_reentrant": False})
        other = inputs(1, length=5, padded=False)  # another number of tokens: nobody is in doubt
        (loss_of(model, inputs(0)) + loss_of(model, other)).backward()


def test_masks_lie_beside_the_weights(tmp_path: Any) -> None:
    with quiet(), torch.no_grad():
        model = tiny("qwen3_moe").eval()
        plain = model(**inputs()).logits
        mask_routers(model, drawn())
        want = model(**inputs()).logits
        model.save_pretrained(tmp_path)
        assert save_masks(model, tmp_path).parent == tmp_path
        again = type(model).from_pretrained(tmp_path).eval()
        assert torch.equal(again(**inputs()).logits, plain)  # the mask is in no weight
        mask_routers(again, load_masks(tmp_path))
        assert torch.equal(again(**inputs()).logits, want)
        assert all(torch.equal(routing_masks(again)[name], one) for name, one in routing_masks(model).items())
        unmask_routers(again)
        assert torch.equal(again(**inputs()).logits, plain) and not routing_masks(again)
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in again.modules())


def test_a_copy_is_told_to_be_masked_again() -> None:
    with quiet(), torch.no_grad():
        model = tiny("qwen3_moe").eval()
        mask_routers(model, drawn())
        want, copied = model(**inputs()).logits, copy.deepcopy(model)
        with pytest.raises(InputError, match=r"mask_routers\(copy, routing_masks\(model\)\)"):
            copied(**inputs())
        mask_routers(copied, routing_masks(model))
        assert torch.equal(copied(**inputs()).logits, want)


def test_a_mask_changes_and_a_balancer_comes_and_goes() -> None:
    with quiet():
        model = tiny("qwen3_moe").train()
        mask_routers(model, drawn(4))
        first = loss_of(model, inputs())
        for _ in range(2):
            balancer = Balancer(model, [AuxLoss("sequence")])
            assert torch.equal(loss_of(model, inputs()), first)
            with pytest.raises(StateError, match="make the Balancer again"):
                mask_routers(model, drawn(2))
            balancer.remove()
            assert torch.equal(loss_of(model, inputs()), first)
        mask_routers(model, drawn(2))
        assert not torch.equal(loss_of(model, inputs()), first)
        mask_routers(model, drawn(4))
        assert torch.equal(loss_of(model, inputs()), first)


def test_a_mask_of_few_experts_may_follow_one_of_enough() -> None:
    """What a block makes of a token without a second expert is tried for the first such mask, whichever came before."""
    torch.manual_seed(0)
    model, example = Table(), {"input_ids": inputs(padded=False)["input_ids"]}
    mask_routers(model, draw_visible(torch.zeros(VOCABULARY).bool(), E, num_visible=4), example=example)
    with pytest.raises(ConfigError, match="let every id see 2 experts"):
        mask_routers(model, drawn()[:1], example=example)


def test_a_record_from_before_the_mask_gives_no_weight_to_what_is_hidden() -> None:
    with quiet(), torch.no_grad():
        model = tiny("qwen3_moe").eval()
        given = inputs(padded=False)
        with record_routing(model) as record:
            model(**given)
        mask_routers(model, masks := drawn())
        weights: list[Tensor] = []
        for gate in gates(model).values():
            gate.register_forward_hook(lambda _m, _a, out: weights.append(out[1]))
        with replay_routing(model, record):
            assert bool(model(**given).logits.isfinite().all())
        for mask, ids, weights_TK in zip(masks, record.ids.values(), weights, strict=True):
            seen_TK = mask[given["input_ids"].reshape(-1)].gather(1, ids[0].long())
            assert 0 < int(seen_TK.sum()) < seen_TK.numel()
            assert torch.equal(weights_TK > 0, seen_TK)
            torch.testing.assert_close(weights_TK.sum(dim=1), seen_TK.any(dim=1).float())


def test_who_looks_sees_no_choice_where_there_is_none() -> None:
    with quiet(), torch.no_grad():
        model = tiny("olmoe").eval()
        mask_routers(model, drawn())
        given = inputs(padded=False)
        with capture(find_routers(model, lambda: model(**given))) as seen:
            model(**given)
        for (name, mask), choices in zip(routing_masks(model).items(), seen.values(), strict=True):
            seen_TE = mask[given["input_ids"].reshape(-1)]
            few_T = seen_TE.sum(dim=1) < K
            assert name in seen and bool(few_T.any())
            assert torch.equal(choices.logits_TE > -math.inf, seen_TE)
            assert torch.equal(choices.ids_TK[:, 1] == E, few_T)
            assert bool((choices.ids_TK[:, 0] < E).all())


class Table(nn.Module):
    """Experts whose block writes weights into a table of all experts: the same expert twice is one with weight 0."""

    class Gate(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(16, E, bias=False)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            z = self.linear(x)
            weights, ids = z.softmax(dim=-1).topk(K, dim=-1)
            return z, weights, ids

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.gate = nn.Embedding(VOCABULARY, 16), self.Gate()
        self.experts = nn.Parameter(torch.randn(E, 16, 16))

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embed(input_ids).reshape(-1, 16)
        z, weights, ids = self.gate(x)
        table = torch.zeros_like(z).scatter(-1, ids, weights)
        return torch.einsum("te,eio,ti->to", table, self.experts, x)


def test_what_is_refused() -> None:
    with quiet():
        model = tiny("qwen3_moe").eval()
        for bad, word in [
            (drawn()[0][:50], "64 ids"),
            (drawn()[0][:, :4], "(V, 8)"),
            (drawn()[:1], "each of 2 routers"),
            ([*drawn(), drawn()[0]], "one more"),
            ({"model.layers.0.mlp.gate": drawn()[0]}, "each of 2 routers"),
        ]:
            with pytest.raises(InputError) as caught:
                mask_routers(model, bad)
            assert word in str(caught.value) and caught.value.do
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
        mask_routers(model, drawn())
        embeds = model.get_input_embeddings()(inputs()["input_ids"])
        with pytest.raises(InputError, match="input_ids"):
            model(inputs_embeds=embeds)
        with pytest.raises(InputError, match="a part of it"):
            model.model.layers[0].mlp(embeds)
        table, ids = Table(), {"input_ids": inputs()["input_ids"]}
        with pytest.raises(ConfigError, match="let every id see 2 experts"):
            mask_routers(table, drawn()[0], example=ids)
        mask_routers(
            table, drawn()[0] | drawn()[1] | draw_visible(torch.zeros(64).bool(), E, num_visible=2), example=ids
        )
        with pytest.raises(ConfigError, match="MoE layers"):
            mask_routers(nn.Linear(4, 4), drawn()[0])
        with pytest.raises(ConfigError, match="weights hold more"):
            mask_routers(tiny("phimoe"), drawn()[0])
