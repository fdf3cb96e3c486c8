"""Tiny model folders of transformers families with a tokenizer, and text of three domains."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("transformers")

from integrations.hf._cases import quiet
from integrations.hf.families import build
from unit.inspection._folders import write_text, write_tokenizer


@pytest.fixture(scope="session", autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EQUIPOISE_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.jsonl"
    write_text(path)
    return path


@pytest.fixture(scope="session")
def folder_of(tmp_path_factory):
    """The folder of a family's tiny model, as from_pretrained finds it; written once."""
    made: dict[tuple, object] = {}

    def get(family: str, seed: int = 0, **more):
        key = (family, seed, *sorted(more.items()))
        if key not in made:
            path = tmp_path_factory.mktemp(family)
            with quiet():
                model = build(family, **more)
                if seed:
                    torch.manual_seed(seed)
                    with torch.no_grad():
                        for parameter in model.parameters():
                            parameter.add_(0.05 * torch.randn_like(parameter))
                model.save_pretrained(path)
                write_tokenizer(path)
            made[key] = path
        return made[key]

    return get
