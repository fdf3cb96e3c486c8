"""docs/doctor.md says the truth: its output is what the command prints, and its tables name what there is."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from equipoise.cli import build_parser
from equipoise.cli.doctor import EPILOG
from equipoise.doctor import ENGINES, Options, diagnose, render
from equipoise.doctor.families import family_of

TEXT = (Path(__file__).parents[3] / "docs" / "doctor.md").read_text(encoding="utf-8")


def test_the_output_is_what_the_command_prints(tmp_path):
    pytest.importorskip("yaml", reason="PyYAML is not installed")
    transformers = pytest.importorskip("transformers", reason="the hf extra is not installed")
    (yaml,) = re.findall(r"```yaml\n(.*?)```", TEXT, re.S)
    ((command, shown),) = re.findall(r"```console\n\$ equipoise doctor (.*?)\n(.*?)```", TEXT, re.S)
    (tmp_path / command.split()[0]).write_text(yaml, encoding="utf-8")
    printed = render(diagnose([str(tmp_path / command.split()[0])], Options(world=8)))
    assert " ".join(shown.split()) == " ".join(printed.replace(transformers.__version__, "5.23.0").split())


def test_every_engine_is_in_the_table():
    assert set(re.findall(r"^\| `([a-z-]+)` \|", TEXT, re.M)) == set(ENGINES)
    for module in ENGINES.values():
        version = getattr(module, "VERSION", "5.23.0")
        assert version in TEXT, module.NAME
        assert module.NAME.lower().partition("-")[0] in TEXT.lower()


def test_the_examples_of_the_help_are_arguments_that_work():
    parser = build_parser()
    commands = re.findall(r"^  equipoise (doctor .*?)(?:   .*)?$", EPILOG, re.M)
    assert len(commands) == 6
    for command in commands:
        assert parser.parse_args(command.split()).inputs


def test_thirty_families_and_more_have_no_loss():
    pytest.importorskip("transformers", reason="the hf extra is not installed")
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    from equipoise import ConfigError

    without = set()
    for kind in CONFIG_MAPPING:
        try:
            family = family_of({"model_type": kind})
        except ConfigError:  # dense
            continue
        if not family.adds_loss:
            without.add(CONFIG_MAPPING[kind].__module__)
    assert len(without) >= 34


def test_it_names_the_tests_that_there_are():
    for path in re.findall(r"`(tests/[\w/.]+)`", TEXT):
        assert (Path(__file__).parents[3] / path).exists()
