"""Front-ends without their engines: what stands in a configuration, the callback that it becomes, what is refused."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import yaml

pytest.importorskip("transformers")

from equipoise.adapters import axolotl, llamafactory, ms_swift
from equipoise.adapters.engine import Engine
from equipoise.adapters.front_end import EngineCallback, Settings
from equipoise.errors import ConfigError
from equipoise.policies import policies_from
from equipoise.policies.names import NAMES
from equipoise.policies.recipes import RECIPES
from integrations.hf._trainer import Text, arguments_of, in_order, little_garbage, model, quiet

TRANSFORMERS = Engine("transformers", "transformers", importlib.metadata.version("transformers"))
ENGINES = {"axolotl": "axolotl==0.19.0", "swift": "ms-swift==4.6.0", "llamafactory": "llamafactory==0.9.5"}


PAGES = {"axolotl": axolotl.AXOLOTL, "ms-swift": ms_swift.MS_SWIFT, "llama-factory": llamafactory.LLAMA_FACTORY}
DOCS = Path(__file__).parents[3] / "docs"


def without(engine):
    return pytest.mark.skipif(importlib.util.find_spec(engine) is not None, reason=f"{engine} is installed")


def train(settings, folder, **arguments):
    from transformers import TrainingArguments

    quiet()
    callback = EngineCallback(TRANSFORMERS, Settings.read(settings))
    args = TrainingArguments(**arguments_of(str(folder), 2, 2, 2, **arguments))
    trainer = in_order()(model(), args, train_dataset=Text(), callbacks=[callback])
    with little_garbage():
        trainer.train()
    return trainer, callback


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (None, r"policies: \[\] measures and changes nothing"),
        ({}, r"policies: \[global@1e-3\] balances"),
        ({"policies": None}, "with policies: below it"),
        ("global", "with policies: below it"),
        ([1], "with policies: below it"),
        ({"policy": []}, "did you mean 'policies'"),
        ({"policies": [], "layrs": True}, "did you mean 'layers'"),
        ({"policies": [], "layers": "yes"}, "True, False"),
        ({"policies": [], "tokens": "labels"}, "counted, micro_batch"),
        ({"policies": ["globl"]}, "did you mean 'global'"),
        ({"policies": 3}, "list of names and tables"),
    ],
)
def test_what_stands_under_equipoise_is_checked_at_once(data, words):
    with pytest.raises(ConfigError, match=words):
        Settings.read(data)


def test_what_it_reads_it_writes():
    table = {"kind": "Switch", "at": 5, "to": {"kind": "ZLoss"}}
    for data in ({"policies": "global"}, {"policies": ["global", table], "tokens": "micro_batch", "layers": True}):
        read = Settings.read(data)
        assert Settings.read(json.loads(json.dumps(read.plain()))) == read
    assert Settings.read({"policies": "global"}).policies == ["global"]


def test_a_training_has_the_policies_of_its_configuration(tmp_path, capsys):
    trainer, callback = train({"policies": ["global@0.02", {"kind": "ZLoss", "coef": "1e-4"}]}, tmp_path)
    said = capsys.readouterr().out
    assert "equipoise in transformers:" in said
    assert "asked for     global@0.02, " in said
    assert "what names leave open is the library's default" in said
    assert "AuxLoss global_batch, coef 0.02, filled; ZLoss" in said
    assert callback.balancer is not None
    assert [one for entry in trainer.state.log_history for one in entry if one == "balance/global/loss"]


def test_a_schedule_ends_with_the_training(tmp_path):
    with pytest.warns(UserWarning, match="ExpertBias moves biases"):
        _, callback = train({"policies": ["loss-free:proportional:linear@0.01"]}, tmp_path)
    (bias,) = callback.policies
    assert [bias.schedule(step) for step in range(3)] == [1.0, 0.5, 0.0]  # of 2 steps


def test_another_release_is_warned_of_once():
    other = Engine("pytest", "pytest", "0.0.1")
    with pytest.warns(UserWarning, match=r"tried with pytest 0\.0\.1 and not with"):
        other.require()
    with warnings.catch_warnings(action="error"):
        other.require()
        TRANSFORMERS.require()


@without("axolotl")
def test_axolotl_is_asked_for():
    with pytest.raises(ConfigError, match=f"pip install {ENGINES['axolotl']}"):
        axolotl.EquipoisePlugin()


@without("llamafactory")
def test_llamafactory_is_asked_for(capsys):
    with pytest.raises(ConfigError, match=f"pip install {ENGINES['llamafactory']}"):
        llamafactory.train({"stage": "sft", "equipoise": {"policies": []}})
    assert llamafactory.main(["train.yaml"]) == 2
    assert f"pip install {ENGINES['llamafactory']}" in capsys.readouterr().err


@without("swift")
def test_ms_swift_is_asked_for():
    with pytest.raises(ConfigError, match=f"pip install {ENGINES['swift']}"):
        ms_swift.register()


def test_ms_swift_gets_a_file_in_a_folder_that_hides_no_module():
    done = subprocess.run(
        [sys.executable, "-m", "equipoise.adapters.ms_swift"], capture_output=True, text=True, check=True, timeout=300
    )
    assert done.stdout.strip() == str(ms_swift.PLUGIN)
    others = {path.stem for path in ms_swift.PLUGIN.parent.glob("*.py")}
    assert others == {"__init__", "__main__", "equipoise_plugin"}


@pytest.mark.parametrize(
    ("text", "policies"),
    [
        ("global+micro", ["global+micro"]),
        ("[]", []),
        ("[global@0.001, {kind: ZLoss, coef: 1e-4}]", ["global@0.001", {"kind": "ZLoss", "coef": "1e-4"}]),
        ('["micro->global:100"]', ["micro->global:100"]),
        ("{policies: [z], layers: true}", ["z"]),
        (str(["global", {"kind": "ZLoss"}]), ["global", {"kind": "ZLoss"}]),  # ms-swift's ENV: writes str() of a list
    ],
)
def test_ms_swift_reads_policies_from_the_environment(text, policies, tmp_path):
    assert ms_swift.settings(text).policies == policies
    (tmp_path / "policies.yaml").write_text(text)
    assert ms_swift.settings(str(tmp_path / "policies.yaml")).policies == policies


@pytest.mark.parametrize(
    ("text", "words"),
    [(None, "measures and changes nothing"), ("", "measures"), ("[", "YAML or JSON"), ("no.yaml", "No such file")],
)
def test_ms_swift_without_policies_says_what_to_write(text, words):
    with pytest.raises(ConfigError, match=words):
        ms_swift.settings(text)


@pytest.mark.parametrize("page", PAGES)
def test_a_page_looks_first_and_says_which_release_was_tried(page):
    """Every YAML block of it is a configuration that is taken, the first of them measures only."""
    text = (DOCS / f"{page}.md").read_text(encoding="utf-8")
    engine = PAGES[page]
    assert f"## Tried\n\n{engine.name} {engine.tried} (" in text
    assert text.split("\n")[2].startswith("Look first:")
    blocks = [yaml.safe_load(block) for block in re.findall(r"```yaml\n(.*?)```", text, flags=re.DOTALL)]
    told = [ms_swift.settings(one["ENV"][ms_swift.VARIABLE]) for one in blocks if "ENV" in one]
    told += [Settings.read(one["equipoise"]) for one in blocks if "equipoise" in one]
    told += [ms_swift.settings(line) for line in re.findall(rf"export {ms_swift.VARIABLE}='?(.*?)'?\n", text)]
    assert len(told) >= 2
    assert [] in [one.policies for one in told]


def test_the_page_on_policies_is_what_is_read():
    text = (DOCS / "policies.md").read_text(encoding="utf-8")
    for block in re.findall(r"```yaml\n(.*?)```", text, flags=re.DOTALL):
        assert policies_from(yaml.safe_load(block)["policies"])
    names = {
        name for cell in re.findall(r"^\| (`.*?) \|", text, flags=re.MULTILINE) for name in re.findall(r"`(.*?)`", cell)
    }
    assert {name.partition(":")[0] for name in names} == set(NAMES)
    for name, recipe in RECIPES.items():
        (row,) = [line for line in text.splitlines() if line.startswith(f"| `{name}` |")]
        assert row.endswith(f"| {recipe.source} | {recipe.missing or '-'} |")
        kinds = [spec["kind"] for spec in recipe.policies]
        assert re.findall(r"`(\w+)\(", row) == kinds
    for word in re.findall(r"`((?:global|micro|loss-free|sequences)[@:>+-][^` ]*)`", text):
        if word not in ("micro:sigmoid", "loss-free:proportional@R"):
            assert policies_from(word, steps=10**6), word
