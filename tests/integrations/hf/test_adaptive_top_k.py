"""Adaptive top-k in models of transformers: what they return, what they compute, in every way of computing experts.

One family of each kind of router; with ``-m full``, all.
"""

from __future__ import annotations

import copy
import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("transformers")

from equipoise import ConfigError, DataError, apply_adaptive_top_k, mask_routers
from equipoise.adapters.biases import put_back
from equipoise.adaptive import AdaptableModel, record_choices
from equipoise.external.adaptive_top_k import adaptable_routers, router_mark, set_drop_thresholds
from equipoise.external.output_formats import parse_output
from equipoise.functional import draw_visible
from equipoise.storage.adaptive_top_k_file import SavedThreshold, SavedTopK, write_top_k
from integrations.hf._cases import inputs, loss_of, quiet, tiers
from integrations.hf.families import SERVED, build

IDLE = ["longcat_flash", "zaya"]  # they choose between experts and none by themselves
ADAPTED = [family for family in SERVED if family not in IDLE]


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with quiet():
        yield
    torch.set_num_threads(before)


def limits_of(model: nn.Module) -> dict[str, float]:
    """Thresholds that drop about half of the second experts: between two values of each router, of the same inputs."""
    smaller: dict[str, list[float]] = {}
    handles = []
    for name, router in adaptable_routers(model).items():

        def note(module: nn.Module, args: tuple, kwargs: dict, output: Any, name=name, spec=router.spec) -> None:
            parsed = parse_output(module, args, kwargs, output)
            assert parsed is not None
            weights = parsed.parts.weights_TK.float()
            smaller[name] = (weights.amin(-1) / (weights.sum(-1) if spec.normalize else 1.0)).tolist()

        handles.append(router.module.register_forward_hook(note, with_kwargs=True))
    outputs(model)
    for handle in handles:
        handle.remove()
    found = {}
    for name, values in smaller.items():
        ordered = sorted(set(values))
        gaps = [(b - a, (a + b) / 2) for a, b in itertools.pairwise(ordered)]
        middle = gaps[len(gaps) // 3 : 2 * len(gaps) // 3 + 1]
        found[name] = max(middle)[1] if middle else ordered[0] + 0.1  # a new gate may weigh all alike
    return found


def saved(model: nn.Module, limits: dict[str, float] | float, folder) -> str:
    """The file of these thresholds."""
    routers = {
        name: SavedThreshold(
            experts=one.num_experts, top_k=one.top_k, mark=router_mark(one),
            threshold=limits if isinstance(limits, float) else limits.get(name, 0.0),
        )
        for name, one in adaptable_routers(model).items()
    }  # fmt: skip
    write_top_k(folder, SavedTopK(routers=routers))
    return str(folder)


def drop_by_hand(model: nn.Module, limits: dict[str, float]) -> list[Any]:
    """Hooks that give the second expert of two a weight of 0, token by token, and leave its id."""
    handles = []
    for name, router in adaptable_routers(model).items():
        limit = limits.get(name, 0.0)

        def hook(module: nn.Module, args: tuple, kwargs: dict, output: Any, limit=limit, spec=router.spec) -> Any:
            parsed = parse_output(module, args, kwargs, output)
            assert parsed is not None
            rows = []
            for first, second in parsed.parts.weights_TK.tolist():
                large, small = max(first, second), min(first, second)
                share = small / (large + small) if spec.normalize else small
                whole = large + small if spec.normalize else large
                if share < limit:
                    rows.append([whole, 0.0] if first >= second else [0.0, whole])
                else:
                    rows.append([first, second])
            return parsed.replace(torch.tensor(rows), None)

        handles.append(router.module.register_forward_hook(hook, with_kwargs=True))
    return handles


def outputs(model: nn.Module, **sizes: int) -> Tensor:
    with torch.no_grad():
        return loss_of(model, inputs(padded=False, **sizes))


FEW = {"batch": 1, "length": 4}  # tokens, so that some expert is nobody's first choice


@pytest.mark.parametrize("family", tiers(ADAPTED))
def test_a_family_computes_what_a_weight_of_zero_would(family, tmp_path):
    plain, model = build(family).eval(), build(family).eval()
    whole, limits = outputs(plain), limits_of(plain)
    folder = saved(model, limits, tmp_path)
    handles = drop_by_hand(plain, limits)
    wanted = outputs(plain)
    for handle in handles:
        handle.remove()
    apply_adaptive_top_k(model, folder)
    assert torch.allclose(outputs(model), wanted, rtol=1e-5, atol=1e-6)
    assert not torch.equal(wanted, whole), "the case drops nothing"
    set_drop_thresholds(model, adaptable_routers(model), None)
    assert torch.equal(outputs(model), whole)


def without_others(model: nn.Module) -> None:
    """NaN for the weights of all experts that no token uses with a weight above 0."""
    used: dict[int, set[int]] = {}
    handles = []
    routers = list(adaptable_routers(model).values())
    for place, router in enumerate(routers):
        used[place] = set()

        def note(_module: nn.Module, _args: tuple, output: Any, place: int = place) -> None:
            _, weights, ids = output
            used[place] |= set(ids[weights > 0].tolist())

        handles.append(router.module.register_forward_hook(note))
    outputs(model, **FEW)
    for handle in handles:
        handle.remove()
    for place, router in enumerate(routers):
        block = next(m for m in model.modules() if any(child is router.module for child in m.children()))
        others = sorted(set(range(router.num_experts)) - used[place])
        assert others, "the case leaves no expert out"
        with torch.no_grad():
            for weight in block.experts.parameters():  # type: ignore[union-attr]
                weight[others] = math.nan


@pytest.mark.parametrize("way", ["grouped_mm", "eager"])
@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3", "gpt_oss"])
def test_dropped_experts_are_not_computed(family, way, tmp_path):
    """Experts that only dropped choices went to hold NaN, which a weight of 0 does not take away."""
    model = build(family).eval()
    folder = saved(model, 1e9, tmp_path)
    model.set_experts_implementation(way)
    left_out = apply_adaptive_top_k(model, folder)
    wanted = outputs(model, **FEW)
    without_others(model)
    if family == "gpt_oss" and way == "eager":  # its own code looks every id up
        assert not any(left_out.values()) and not bool(outputs(model, **FEW).isfinite())
    else:
        assert all(left_out.values()) and torch.equal(outputs(model, **FEW), wanted)


def test_the_way_of_computing_may_change_afterwards(tmp_path):
    """As `generate` changes it on a GPU, and a user may: the output stays, whoever computes what is dropped."""
    model = build("gpt_oss").eval()
    apply_adaptive_top_k(model, saved(model, 0.4, tmp_path))
    found = []
    for way in ("grouped_mm", "batched_mm", "eager", "grouped_mm"):
        model.set_experts_implementation(way)
        found.append(outputs(model))
    assert all(torch.allclose(one, found[0], rtol=1e-5, atol=1e-6) for one in found)
    assert torch.equal(found[0], found[-1])


def test_generation_with_a_cache_is_that_without(tmp_path):
    model = build("qwen3_moe").eval()
    prompt = torch.randint(3, 60, (2, 7), generator=torch.Generator().manual_seed(1))
    settings = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    whole = model.generate(prompt, use_cache=True, **settings)
    apply_adaptive_top_k(model, saved(model, 0.45, tmp_path))
    tokens = prompt
    with torch.no_grad():
        for _ in range(8):
            tokens = torch.cat([tokens, model(input_ids=tokens, use_cache=False).logits[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(model.generate(prompt, use_cache=True, **settings), tokens)
    assert not torch.equal(whole, tokens), "the case changes nothing"


def test_training_uses_all_experts_and_a_copy_drops_as_well(tmp_path):
    model = build("qwen3_moe").eval()
    whole = outputs(model)
    apply_adaptive_top_k(model, saved(model, 0.4, tmp_path))
    dropped = outputs(model)
    assert torch.equal(outputs(copy.deepcopy(model)), dropped) and not torch.equal(whole, dropped)
    assert torch.equal(outputs(model.train()), whole)
    assert torch.equal(outputs(model.eval()), dropped)


@pytest.mark.parametrize("family", IDLE)
def test_routers_that_choose_none_by_themselves_are_refused(family):
    with pytest.raises(ConfigError, match="by itself"):
        adaptable_routers(build(family).eval())


def test_one_expert_a_token_has_nothing_to_drop():
    with pytest.raises(ConfigError, match="one expert a token"):
        adaptable_routers(build("qwen3_moe", num_experts_per_tok=1).eval())


def test_a_file_of_another_model_is_refused(tmp_path):
    """Other sizes, fewer layers, another family of the same names and sizes, the same family with other weights."""
    model = build("qwen3_moe").eval()
    folder, trained = saved(model, 0.4, tmp_path), build("qwen3_moe").eval()
    with torch.no_grad():
        for router in adaptable_routers(trained).values():
            router.module.weight.add_(0.3 * torch.randn(router.module.weight.shape))
    smaller = build("qwen3_moe", num_experts=4), build("qwen3_moe", num_hidden_layers=1)
    for other in (*smaller, build("mixtral"), trained):
        before = outputs(other.eval())
        with pytest.raises(DataError, match="thresholds of this model"):
            apply_adaptive_top_k(other, folder)
        assert torch.equal(outputs(other), before)
    assert all(apply_adaptive_top_k(build("qwen3_moe").bfloat16().eval(), folder).values()), (
        "the same, in half precision"
    )


def test_a_model_without_its_head_takes_the_file(tmp_path):
    model = build("qwen3_moe").eval()
    folder = saved(model, 0.4, tmp_path)
    assert all(apply_adaptive_top_k(model.model, folder).values())


def test_a_bias_chooses_first_whichever_is_loaded_first(tmp_path):
    """Mixtral's files have no place for a bias: a hook chooses with it, and another drops behind it."""
    found = []
    for bias_first in (True, False):
        model = build("mixtral").eval()
        folder, biases = saved(model, 0.45, tmp_path), {"file": tmp_path / "balancer.equipoise", "place": "scores"}
        biases["biases"] = {name: torch.linspace(-0.3, 0.3, 8) for name in adaptable_routers(model)}
        steps = [lambda m=model, b=biases: put_back(m, **b), lambda m=model, f=folder: apply_adaptive_top_k(m, f)]
        for step in steps if bias_first else steps[::-1]:
            step()
        found.append(outputs(model))
        alone = build("mixtral").eval()
        apply_adaptive_top_k(alone, folder)
        assert not torch.equal(outputs(alone), found[-1]), "the bias changes nothing"
    assert torch.equal(*found)


def test_what_the_layer_before_would_choose_knows_no_threshold():
    """A prediction is of K experts, against the gate applied by hand to what the gate before it was given."""
    lm = build("qwen3_moe").eval()
    model = AdaptableModel.of(lm, lambda ids_BS: lm(input_ids=ids_BS, use_cache=False).logits)
    ids_BS = inputs(padded=False)["input_ids"]
    limits, seen = dict.fromkeys(model.routers, 0.6), []  # all but the first: with K = 2 a second has a half at most
    handles = [one.module.register_forward_pre_hook(lambda _m, a: seen.append(a[0])) for one in model.routers.values()]
    found = record_choices(model, [ids_BS], limits)
    for handle in handles:
        handle.remove()
    assert (found.used_TLK[..., 1] == -1).all() and (found.used_TLK[..., 0] >= 0).all()
    gate = lm.model.layers[1].mlp.gate  # the last three calls: layer 0, layer 1, the prediction of layer 1
    ahead = (seen[-3].reshape(-1, gate.weight.shape[1]) @ gate.weight.T).topk(2).indices
    assert (found.predicted_TLK[:, 1] == ahead.numpy()).all()
    assert not any(one.module._forward_pre_hooks for one in model.routers.values())


@pytest.mark.parametrize("first", ["mask", "thresholds"])
def test_masks_by_token_id_and_thresholds_go_together(first, tmp_path):
    """In either order: an expert that an id does not see is chosen by nobody, and of what is left the small ones go."""
    model = build("qwen3_moe").eval()
    folder, names = saved(model, 0.45, tmp_path), adaptable_routers(model)
    vocabulary = model.get_input_embeddings().num_embeddings
    visible_VE = draw_visible(torch.arange(vocabulary) % 3 == 0, next(iter(names.values())).num_experts, num_visible=3)
    steps = [lambda: mask_routers(model, visible_VE), lambda: apply_adaptive_top_k(model, folder)]
    for step in steps if first == "mask" else reversed(steps):
        step()
    ids_BS = torch.randint(vocabulary, (2, 9), generator=torch.Generator().manual_seed(0))
    seen: list[Any] = []
    for router in names.values():
        router.module.register_forward_hook(
            lambda m, a, k, out: seen.append(parse_output(m, a, k, out)), with_kwargs=True
        )
    with torch.no_grad():
        model(input_ids=ids_BS)
    for parsed in seen:
        weights, chosen = parsed.parts.weights_TK, parsed.parts.ids_TK
        used = weights > 0
        token_ids = ids_BS.flatten().unsqueeze(1).expand_as(chosen)
        assert bool(visible_VE[token_ids[used], chosen[used]].all()) and bool(used.any(1).all())
        assert torch.allclose(weights.sum(1), torch.ones(18))
        assert bool((used.sum(1)[ids_BS.flatten() % 3 == 0] == 1).all())
        assert bool((weights[used.sum(1) == 2] >= 0.45 - 1e-6).all()) and 18 <= int(used.sum()) < 36
