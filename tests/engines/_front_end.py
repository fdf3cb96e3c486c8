"""What every engine around transformers' Trainer has to give, in a training that its own command starts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from engines import _training

STEPS, SAVED = 3, 2
BALANCED: list[Any] = ["global@0.5"]


class FrontEnd:
    """Its tests, for a class that says how the engine is started.

    Each training has 3 steps of 2 micro-batches of 2 rows of uneven length, saves after steps 2 and 3, and logs all.
    """

    name: str  # as what our callback says of itself has it

    @classmethod
    def train(cls, folder: Path, policies: list[Any] | None, resume: Path | None = None, **more: Any) -> dict[str, Any]:
        """A training below ``folder``, recorded.

        Args:
            policies: None: without equipoise.
            resume: a checkpoint, which is the base model too: transformers' Trainer alone does not bring the experts
                of most families back (huggingface/transformers#48805).
            more: of the engine's configuration.
        """
        raise AssertionError("each engine has its own")

    def checkpoint(self, folder: Path, step: int) -> Path:
        (found,) = folder.rglob(f"checkpoint-{step}/trainer_state.json")
        return found.parent

    @pytest.fixture(scope="class")
    @classmethod
    def folder(cls, tmp_path_factory: pytest.TempPathFactory) -> Path:
        return tmp_path_factory.mktemp("engine")

    @pytest.fixture(scope="class")
    @classmethod
    def plain(cls, folder: Path) -> dict[str, Any]:
        return cls.train(folder / "plain", None)

    @pytest.fixture(scope="class")
    @classmethod
    def balanced(cls, folder: Path) -> dict[str, Any]:
        return cls.train(folder / "balanced", BALANCED)

    def test_loads_are_what_is_counted_beside_it(self, balanced):
        assert len(balanced["steps"]) == STEPS
        sizes = [[int(_training.valid(batch).sum()) for batch in step["batches"]] for step in balanced["steps"]]
        assert any(a != b for a, b in sizes), "micro-batches of equal size would hide how they are weighed"
        assert any(0 in batch["attention_mask"] for batch in balanced["steps"][0]["batches"])
        for step, tokens in zip(balanced["steps"], sizes, strict=True):
            assert step["loads"] == step["counts"]
            assert all(sum(load) == _training.TOP_K * sum(tokens) for load in step["loads"])

    def test_the_balance_part_of_the_gradient_is_the_law(self, balanced, plain, folder):
        wanted = _training.law(balanced, folder / "model")
        assert _training.distance(balanced, plain, wanted) < 1e-6
        assert _training.distance(balanced, plain, wanted, part="mlp.gate") < 1e-6

    def test_numbers_are_in_its_log_and_what_was_found_is_said(self, balanced, folder):
        entries = _training.logged(self.checkpoint(folder / "balanced", STEPS))
        assert len(entries) == STEPS
        assert all({"balance/global/loss", "balance/maxvio_global", "loss"} <= set(entry) for entry in entries)
        assert f"equipoise in {self.name}" in balanced["said"]
        assert "AuxLoss global_batch, coef 0.5, filled" in balanced["said"]
        assert "every token of a step weighs the same" in " ".join(balanced["said"].split())

    def test_its_own_loss_is_off_and_its_files_do_not_say_so(self, balanced, plain, folder):
        assert "router_aux_loss_coef, which was 0.001" in " ".join(balanced["said"].split())
        texts = {(self.checkpoint(folder / run, STEPS) / "config.json").read_text() for run in ("plain", "balanced")}
        assert len(texts) == 1, "a checkpoint says what it says without equipoise"

    def test_a_resumed_run_gives_the_same_numbers(self, balanced, folder):
        at = self.checkpoint(folder / "balanced", SAVED)
        again = self.train(folder / "again", BALANCED, resume=at)
        (step,) = again["steps"]
        assert step["loads"] == balanced["steps"][-1]["loads"]
        assert all(bool((again["end"][name] == weight).all()) for name, weight in balanced["end"].items())

    def test_without_policies_it_looks_and_changes_nothing(self, plain, folder):
        looked = self.train(folder / "looked", [])
        assert [step["loads"] for step in looked["steps"]] == [step["counts"] for step in plain["steps"]]
        assert all(bool((looked["end"][name] == weight).all()) for name, weight in plain["end"].items())
        assert any("balance/maxvio_global" in entry for entry in looked["logs"])
