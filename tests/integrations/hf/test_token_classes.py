"""Vision-language models whose routers serve words and pictures alike: their classes are read from the model's call."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("transformers")

from _rounding import OURS, Float64
from equipoise import AuxLoss, Balancer, ExpertBias, InputError, TokenLayout
from integrations.hf._cases import RECOMPUTED, double, inputs, loss_of, quiet, same_gradients
from integrations.hf._law import Twin, probs
from integrations.hf.families import TINY, build, names_of

COEF, PICTURE = 0.3, 61
POLICIES = [AuxLoss("global_batch", COEF, tokens="image"), AuxLoss("sequence", COEF, tokens="text")]


def vision_language() -> Any:
    """Tiny, random, and in float64; pictures are not shown to it: their placeholders are tokens like others."""
    modeling = pytest.importorskip("transformers.models.qwen3_vl_moe.modeling_qwen3_vl_moe")
    config = modeling.Qwen3VLMoeForConditionalGeneration.config_class
    text = {key: value for key, value in TINY.items() if key in names_of(type(config().text_config))}
    text["rope_parameters"] = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}
    vision = {"hidden_size": 16, "depth": 1, "num_heads": 2, "intermediate_size": 16, "out_hidden_size": 32}
    made = config(text_config=text, vision_config=vision, image_token_id=PICTURE, video_token_id=62)
    made.text_config.use_cache = False
    torch.manual_seed(0)
    return double(modeling.Qwen3VLMoeForConditionalGeneration._from_config(made)).train()


def with_pictures(seed: int, rows: slice = slice(None)) -> dict[str, Tensor]:
    """One in the first row, one in the second that ends in padding, none in the third."""
    given = inputs(seed)
    given["input_ids"][0, :4] = given["input_ids"][1, 3:] = PICTURE
    return {name: tensor[rows] for name, tensor in given.items()}


def law(twins: list[dict[str, Any]], given: list[dict[str, Tensor]]) -> Tensor:
    """Of the step: pictures with their f over it, words with that of their sequence, each over its own tokens."""
    total = torch.zeros((), dtype=torch.float64)
    classes: list[dict[str, list[tuple[int, int]]]] = []  # of each micro-batch: (sequence, token)
    for one in given:
        length, found = one["input_ids"].shape[1], {"image": [], "text": []}
        pairs = zip(one["input_ids"].view(-1).tolist(), one["attention_mask"].view(-1).tolist(), strict=True)
        for t, (number, real) in enumerate(pairs):
            if real:
                found["image" if number == PICTURE else "text"].append((t // length, t))
        classes.append(found)
    for name in twins[0]["logits"]:
        ids = [one["ids"][name].tolist() for one in twins]
        for kind in ("image", "text"):
            tokens = [(m, s, t) for m, found in enumerate(classes) for s, t in found[kind]]
            for m, s, t in tokens:
                p_E = probs(twins[m]["logits"][name], "softmax")[t]
                mates = tokens if kind == "image" else [one for one in tokens if one[:2] == (m, s)]
                load = [sum(e in ids[k][u] for k, _, u in mates) for e in range(len(p_E))]
                f = torch.tensor(load, dtype=torch.float64) / sum(load)
                total = total + COEF * len(p_E) * (f * p_E).sum() / len(tokens)
    return total


@pytest.mark.parametrize("told", ["mm_token_type_ids", "input_ids"])
def test_pictures_and_words_of_one_router_are_balanced_apart(told: str) -> None:
    """Two micro-batches, of three rows and of two: padding, more pictures in one than in the other."""
    with quiet(), Float64():
        model, other = vision_language(), vision_language()
        twin = Twin(other, "qwen3_vl_moe")
        balancer = Balancer(model, [dataclasses.replace(one, estimator="exact") for one in POLICIES])
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        step, seen = [with_pictures(0), with_pictures(1, slice(1, 3))], []
        for given in step:
            own = loss_of(other, given) / 2
            seen.append({"logits": dict(twin.logits), "ids": dict(twin.ids)})
            own.backward(retain_graph=True)
        law(seen, step).backward()
        called = list(step)
        if told == "mm_token_type_ids":
            called = [one | {told: (one["input_ids"] == PICTURE).long()} for one in step]
        with balancer.counting():
            for given in called:
                loss_of(model, given)
        for given in called:
            (balancer.tap(loss_of(model, given)) / 2).backward()
        optimizer.step()
        same_gradients(model, other, OURS)
    metrics = balancer.metrics()
    assert metrics["balance/global_image/loss"] > 0.9 < metrics["balance/sequence_text/loss"]


@pytest.mark.parametrize("how", RECOMPUTED)
def test_a_recompute_knows_the_pictures_of_its_forward(how: str) -> None:
    """The model ran on another batch since."""
    found = []
    with quiet():
        for recompute in (False, True):
            model = vision_language()
            if recompute:
                RECOMPUTED[how](model)
            balancer = Balancer(model, POLICIES)
            loss = balancer.tap(loss_of(model, with_pictures(0)))
            with torch.no_grad():
                loss_of(model, with_pictures(1))
            loss.backward()
            torch.optim.SGD(model.parameters(), lr=0.0).step()
            found.append((model, balancer.metrics(layers=False)))
        same_gradients(found[1][0], found[0][0], 1e-12)
    assert found[1][1] == pytest.approx(found[0][1], rel=1e-9)


def test_a_batch_of_words_alone_is_no_mistake() -> None:
    with quiet():
        model = vision_language()
        balancer = Balancer(model, POLICIES)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        balancer.tap(loss_of(model, inputs())).backward()
        optimizer.step()
    metrics = balancer.metrics()
    assert "balance/global_image/loss" not in metrics
    assert metrics["balance/sequence_text/loss"] > 0.9


def test_a_router_of_pictures_alone_has_no_words() -> None:
    """Ernie's: each of its two routers balances its own tokens, and of the other class it has none."""
    with quiet():
        model = build("ernie4_5_vl_moe")
        balancer = Balancer(model, [*POLICIES, ExpertBias(rate=0.0)])
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        model.train()
        given = inputs()
        kinds_BS = torch.zeros_like(given["input_ids"])
        kinds_BS[0, :4] = 1
        balancer.tap(loss_of(model, given | {"moe_mm_token_type_ids": kinds_BS})).backward()
        optimizer.step()
    metrics = balancer.metrics()
    assert metrics["balance/global_image/loss"] > 0.9 < metrics["balance/sequence_text/loss"]


def test_where_nothing_tells_of_pictures_the_layout_does() -> None:
    """The text model alone sees embeddings, or ids of which no configuration says which are placeholders."""
    with quiet():
        model = build("qwen3_vl_moe").train()
        balancer = Balancer(model, POLICIES)
        given = inputs()
        with pytest.raises(InputError, match="tokens are of class 'image'"):
            model(**given)
        balancer.discard()
        image_T = torch.arange(18) < 5
        layout = TokenLayout(3, given["attention_mask"].bool().view(-1), classes={"image": image_T, "text": ~image_T})
        with balancer.layout(layout):
            balancer.tap(loss_of(model, given)).backward()
        torch.optim.SGD(model.parameters(), lr=0.0).step()
    assert balancer.metrics()["balance/global_image/loss"] > 0.9
