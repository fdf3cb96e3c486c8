"""Settings of a command line: presets < flags < --set, the rate of a pretrained model, and absolute paths."""

from __future__ import annotations

import argparse
from pathlib import Path

from equipoise.cli.settings import GIVEN_LR, add_settings, read, settings
from equipoise.lab.config.schema import RunConfig


def parsed(*arguments: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("config", nargs="?")
    add_settings(parser)
    return parser.parse_args(arguments)


def test_the_later_source_wins():
    presets = {"train.steps": 1, "train.lr": 1.0, "seeds": 1}
    found = settings(parsed("--steps", "2", "--lr", "0.5", "--set", "train.lr=0.25"), presets)
    assert found == {"train.steps": 2, "train.lr": 0.25, "seeds": 1}


def test_a_pretrained_model_has_a_rate_of_its_own_unless_a_file_or_a_flag_sets_one():
    assert settings(parsed("--model", "folder")) == {"model.folder": "folder", "train.lr": GIVEN_LR}
    assert settings(parsed("--model", "folder", "--lr", "1"))["train.lr"] == 1
    assert "train.lr" not in settings(parsed("run.toml", "--model", "folder"))


def test_a_path_is_absolute_in_the_configuration():
    arguments = parsed("--data", "my.jsonl")
    config = read(RunConfig, arguments, settings(arguments))
    assert config.data.data == str(Path("my.jsonl").resolve())
