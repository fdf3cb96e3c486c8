"""Runs whose routers have masks by token id: drawn from the text, trained, kept, exported with a word, inspected."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from equipoise import load_masks, mask_routers, routing_masks
from equipoise.cli import main
from equipoise.errors import ConfigError, DataError
from equipoise.functional import frequency_class, rare_ids
from equipoise.inspection.loading import open_model
from equipoise.lab.config.schema import ModelConfig
from equipoise.lab.config.strategies import parse_strategy, strategy_of
from equipoise.lab.models.hf_export import export_run
from equipoise.lab.models.pretrained import adopt, build, prepare_text
from equipoise.lab.models.text_masks import mask_by_text
from equipoise.lab.training.trainer import train
from equipoise.storage import checkpoint
from equipoise.storage.mask_file import MASKS
from equipoise.storage.run_record import read_run

SHORT = {"steps": 2, "checkpoint_every": 2, "eval_every": 2, "load_every": 2, "fidelity_every": 0, "warmup": 1}


def masked(config):
    """(the model of a run as its trainer makes it, its masks)."""
    model = build(config)
    mask_by_text(model, strategy_of(config).apply(config.model), prepare_text(config.model, config.data), 0)
    return model, routing_masks(model)


def test_masks_are_those_of_the_text_and_of_the_seed(tiny_run):
    config = tiny_run("global:rare=0.4:visible=5")
    data, (model, masks) = prepare_text(config.model, config.data), masked(config)
    assert list(masks) == ["model.layers.0.mlp.gate", "model.layers.1.mlp.gate"]
    counts = torch.zeros(300, dtype=torch.float64)
    for name in data.domains:
        tokens = torch.from_numpy(data.train[name][:, :-1].astype("int64")).flatten()
        counts += torch.bincount(tokens, minlength=300) / len(tokens)
    rare_V = rare_ids(counts, 0.4)
    assert 0 < rare_V.sum() < 300
    first, second = masks.values()
    for visible_VE in (first, second):
        assert torch.equal(visible_VE.sum(dim=1), torch.where(rare_V, 1, 5))
    assert not torch.equal(first, second)  # each layer draws for itself
    plain = build(replace(config, strategy="global"))
    weights = {name: value for name, value in model.state_dict().items() if not name.endswith("visible_experts")}
    assert weights.keys() == plain.state_dict().keys()  # and draws nothing of the weights
    assert all(torch.equal(value, plain.state_dict()[name]) for name, value in weights.items())
    assert routing_masks(plain) == {}


@pytest.mark.parametrize("strategy", ["global+micro:rare=0.4", "loss-free:rare=1", "global:visible=3"])
def test_a_run_is_trained_measured_and_kept(tiny_run, tmp_path, strategy):
    config = tiny_run(strategy, **SHORT)
    run = read_run(train(config, tmp_path))
    tokens = 256
    for layer in run.loads[-1].counts:
        fewest = {"global+micro:rare=0.4": tokens, "loss-free:rare=1": tokens, "global:visible=3": 2 * tokens}
        most = {"global+micro:rare=0.4": 2 * tokens - 1, "loss-free:rare=1": tokens, "global:visible=3": 2 * tokens}
        assert fewest[strategy] <= sum(layer) <= most[strategy]
    found = run.evaluations[-1].loss_by_frequency
    assert set(found) == {"input", "target"}
    assert all(len(of) == 10 and any(map(math.isfinite, of)) for of in found.values())
    _, state = checkpoint.load_latest(tmp_path / "checkpoints")
    again = build(config)
    again.load_state_dict(state["model"])  # the mask comes with the weights
    assert all(torch.equal(one, masked(config)[1][name]) for name, one in routing_masks(again).items())
    assert len(routing_masks(again)) == 2
    assert open_model(tmp_path, torch.device("cpu")).routers[0].drops == ("visible" not in strategy)


def test_loss_by_frequency_is_a_mean_over_tokens(tiny_run, tmp_path):
    config = tiny_run("global", **SHORT, eval_sequences=0, precision="fp32")
    run, data = read_run(train(config, tmp_path)), prepare_text(config.model, config.data)
    model = build(config)
    model.load_state_dict(checkpoint.load_latest(tmp_path / "checkpoints")[1]["model"])
    class_V = frequency_class(torch.from_numpy(data.frequencies)).tolist()
    sums = {side: [[] for _ in range(10)] for side in ("input", "target")}
    for name in data.domains:
        for row in data.heldout[name].astype("int64").tolist():
            losses = model.token_losses(torch.tensor([row[:-1]]), torch.tensor([row[1:]]))[0].tolist()
            for t, loss in enumerate(losses):
                sums["input"][class_V[row[t]]].append(loss)
                sums["target"][class_V[row[t + 1]]].append(loss)
    for side, classes in sums.items():
        want = [sum(one) / len(one) if one else math.nan for one in classes]
        assert run.evaluations[-1].loss_by_frequency[side] == pytest.approx(want, rel=1e-5, nan_ok=True)


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
@pytest.mark.parametrize("strategy", ["global:rare=0.4", "loss-free:rare=0.4"])
def test_an_export_is_refused_or_has_its_masks_beside_it(tiny_run, tmp_path, strategy, capsys):
    transformers = pytest.importorskip("transformers")
    run = train(tiny_run(strategy, **SHORT, precision="fp32"), tmp_path / "run")
    with pytest.raises(ConfigError, match="add --masks"):
        export_run(run, tmp_path / "out")
    assert main(["export", str(run), str(tmp_path / "out")]) == 2
    assert not (tmp_path / "out").exists()
    assert main(["export", str(run), str(tmp_path / "out"), "--masks"]) == 0
    assert main(["export", str(run), str(tmp_path / "out"), "--masks", "--force"]) == 0
    capsys.readouterr()

    own = open_model(run, torch.device("cpu")).model
    ids = torch.randint(300, (2, 20), generator=torch.Generator().manual_seed(0))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    with torch.no_grad():
        want = own(ids)
        assert not torch.allclose(theirs(ids).logits, want, atol=1e-3)
        mask_routers(theirs, load_masks(tmp_path / "out"))
        torch.testing.assert_close(theirs(ids).logits, want, rtol=1e-4, atol=1e-5)
        inspected = open_model(tmp_path / "out", torch.device("cpu"))
        torch.testing.assert_close(inspected.model(input_ids=ids).logits, want, rtol=1e-4, atol=1e-5)

        for through in ("lab", "transformers"):  # the start of other runs
            model = ModelConfig(folder=str(tmp_path / "out"), through=through)
            config = adopt(replace(tiny_run("global", **SHORT, precision="fp32"), model=model, strategy="none"))
            assert config.model.masks == str(tmp_path / "out" / MASKS)
            torch.testing.assert_close(build(config).eval()(ids), want, rtol=1e-4, atol=1e-5)
    went_on = train(config, tmp_path / "went on")
    with pytest.raises(ConfigError, match="add --masks"):
        export_run(went_on, tmp_path / "again")
    export_run(went_on, tmp_path / "again", masks=True)
    assert all(
        torch.equal(one, load_masks(tmp_path / "again")[name]) for name, one in load_masks(tmp_path / "out").items()
    )
    (tmp_path / "out" / MASKS).unlink()
    with pytest.raises(DataError, match="no such file"):
        build(config)


@pytest.mark.parametrize(
    ("word", "call"),
    [
        ("rare=SHARE", lambda: parse_strategy("global:rare=x")),
        ("rare=SHARE", lambda: parse_strategy("global:rare=0.2:rare=0.3")),
        ("rare=SHARE", lambda: parse_strategy("global:visible=2.5")),
        ("mask_rare", lambda: ModelConfig(mask_rare=1.5)),
        ("mask_visible = 9", lambda: ModelConfig(mask_visible=9)),
        ("model.folder", lambda: ModelConfig(folder="somewhere", mask_rare=0.2)),
    ],
)
def test_settings_that_cannot_be_are_refused(word, call):
    with pytest.raises(ConfigError) as caught:
        call()
    assert word in str(caught.value)
    assert caught.value.do


def test_a_strategy_that_wants_more_visible_experts_than_there_are_is_refused_at_once(tiny_run):
    with pytest.raises(ConfigError, match="mask_visible = 9"):
        strategy_of(tiny_run("global:visible=9"))
