"""The table of output formats: its classes exist, and their outputs are what it says."""

from __future__ import annotations

import importlib
from importlib.util import find_spec

import pytest
import torch

pytest.importorskip("transformers")

from equipoise.external.output_formats import FORMATS, parse_output
from integrations.hf._cases import quiet
from integrations.hf.families import FAMILIES, build


@pytest.mark.parametrize("name", sorted(FORMATS))
def test_every_special_class_exists_in_the_installed_version(name: str) -> None:
    """A line for a class that was renamed would protect nobody."""
    folders = sorted({family.folder for family in FAMILIES.values()})
    names = [f"transformers.models.{folder}.modeling_{folder}" for folder in folders]
    here = [f"transformers.models.{folder}" for folder in folders]
    modules = [importlib.import_module(name) for name, of in zip(names, here, strict=True) if find_spec(of)]
    if len(modules) < len(names) and not any(hasattr(module, name) for module in modules):
        pytest.skip("the class is of a model that this older transformers, which is supported, does not have yet")
    assert any(hasattr(module, name) for module in modules)


def test_llama4_scores_are_taken_apart_as_the_model_chose() -> None:
    with quiet():
        model = build("llama4")
    router = model.get_submodule("model.layers.0.feed_forward.router")
    scores_TE, logits_TE = router(torch.randn(7, 32))
    parsed = parse_output(router, (), {}, (scores_TE, logits_TE))
    assert parsed is not None
    found = parsed.parts
    for t in range(7):
        assert set(found.ids_TK[t].tolist()) == set(scores_TE[t].nonzero().view(-1).tolist())
        assert torch.equal(found.weights_TK[t], scores_TE[t][found.ids_TK[t]])
