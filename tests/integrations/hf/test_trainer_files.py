"""What BalanceCallback keeps on disk: a resumed run is the run, the best model has its own biases, files are whole."""

from __future__ import annotations

import resource
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers", reason="the hf extra is not installed")
pytest.importorskip("accelerate", reason="the hf extra is not installed")

from equipoise import ConfigError, DataError, OutputError, Ratio, Target
from integrations.hf._trainer import as_rank, checkpoint, make, train
from integrations.hf.families import build

pytestmark = [
    pytest.mark.xdist_group("ranks"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*pin_memory.*"),
    pytest.mark.filterwarnings("ignore:ExpertBias moves biases"),
]
FILE = "balancer.equipoise"
BIAS = {"kind": "bias", "rule": "momentum", "rate": 0.05}
LOSSES: list[dict] = [
    {"kind": "aux", "scope": "global_batch", "coef": 0.3, "estimator": "previous"},
    {"kind": "aux", "scope": "global_batch", "coef": 0.3, "estimator": "ema"},
    {"kind": "aux", "scope": "global_batch", "coef": 0.3, "estimator": "filled"},
]
SAVES = {"save_strategy": "steps", "save_steps": 2}


def steps_of(run: dict[str, Any], first: int) -> list[dict[str, Any]]:
    """The logs of the steps from ``first`` on, without what is measured by the clock."""
    return [e for e in run["logs"] if "loss" in e and e["step"] >= first]


@pytest.mark.parametrize("family", ["inkling", "gpt_oss"])
def test_a_resumed_run_is_the_run(tmp_path, family):
    """B35, B36, B55: previous f, ema, bias and its momentum come back; steps 3 and 4 are equal to the bit.

    The bias is the model's own (inkling) and ours (gpt_oss). In most families a Trainer of transformers 5.23 resumes
    with other experts than it saved, with or without this callback: files name them one by one, and it says "missing".
    """
    policies = [*LOSSES, BIAS]
    whole = train(policies, 4, 2, 4, str(tmp_path), family=family, **SAVES)
    moved = tmp_path / "elsewhere" / "kept"  # a checkpoint may have been copied
    shutil.copytree(checkpoint(tmp_path, 2), moved)
    again = train(policies, 4, 2, 4, str(tmp_path / "new"), family=family, resume=str(moved))
    assert again["steps"] == whole["steps"][2:]
    for got, want in zip(again["gradients"], whole["gradients"][2:], strict=True):
        assert all(torch.equal(got[name], want[name]) for name in want)
    assert steps_of(again, 3) == steps_of(whole, 3)
    assert steps_of(again, 3)[0]["balance/policy_0/loss"] > 0.9  # 0 without the step before


@pytest.mark.parametrize(
    "rule", [Ratio(0.1, start=0.3, decay=0.5, limits=(1e-3, 9.0)), Target(0.2, start=0.3, rate=0.5)]
)
def test_a_coefficient_that_sets_itself_goes_on(tmp_path, rule):
    """All that such a policy remembers is its number: a Trainer keeps it where nothing else is to be kept."""
    policies = [{"kind": "aux", "scope": "micro_batch", "coef": rule}]
    whole = train(policies, 4, 2, 4, str(tmp_path), family="gpt_oss", **SAVES)
    again = train(policies, 4, 2, 4, str(tmp_path / "new"), family="gpt_oss", resume=checkpoint(tmp_path, 2))
    assert steps_of(again, 3) == steps_of(whole, 3)
    shown = [step["balance/policy_0/coef"] for step in steps_of(whole, 1)]
    assert len(set(shown)) == len(shown) >= 3


@pytest.mark.parametrize("family", ["minimax_m2", "ernie4_5_moe"])
def test_a_bias_that_transformers_does_not_find_again(tmp_path, family):
    """B50, B35: the files of some families name the bias otherwise; a Trainer alone resumes with zeros."""
    bias = {"kind": "bias", "rule": "proportional", "rate": 0.1}
    trainer, recorder = make([bias], 4, 2, 2, str(tmp_path), family=family, **SAVES)
    trainer.train()
    want = [layer.router.expert_bias.clone() for layer in recorder.balance.balancer._layers]
    still = bias | {"rate": 0.0}
    trainer, recorder = make([still], 4, 2, 3, str(tmp_path), family=family)
    trainer.train(resume_from_checkpoint=checkpoint(tmp_path, 2))
    for layer, bias_E in zip(recorder.balance.balancer._layers, want, strict=True):
        assert bias_E.any() and torch.equal(layer.router.expert_bias, bias_E)


def resumed_rank(folder: str, sharded: bool) -> tuple[dict[str, Any], dict[str, Any]]:
    """A run of three steps, and its third step again from the second's checkpoint."""
    given = {"family": "deepseek_v3" if sharded else "gpt_oss", "sharded": sharded}
    with as_rank():
        whole = train([*LOSSES, BIAS], 2, 2, 3, folder, **given, **SAVES)
        resume = {"resume": checkpoint(Path(folder), 2)}
        return whole, train([*LOSSES, BIAS], 2, 2, 3, folder + "/new", **given, **resume)


@pytest.mark.parametrize("sharded", [pytest.param(False, marks=pytest.mark.full), True])
def test_two_ranks_resume(ranks, tmp_path, sharded):
    """B35, B40, B55: one rank writes what all of them read; FSDP2's own files hold the experts whole."""
    call = f"{resumed_rank.__module__}:{resumed_rank.__name__}"
    for whole, again in ranks.run(call, str(tmp_path), sharded, size=2, timeout=120):
        assert again["sharded"] == sharded
        assert again["steps"] == whole["steps"][2:]
        assert all(torch.equal(again["gradients"][0][n], g) for n, g in whole["gradients"][2].items())
        assert all(torch.equal(again["biases"][0][n], b) for n, b in whole["biases"][2].items())
        assert steps_of(again, 3) == steps_of(whole, 3)


def test_a_run_begun_without_the_state_is_another(tmp_path):
    """The test above can fail: with the state of another step the gradient differs."""
    whole = train(LOSSES, 4, 2, 4, str(tmp_path), family="gpt_oss", save_strategy="steps", save_steps=1)
    shutil.copy(Path(checkpoint(tmp_path, 1)) / FILE, checkpoint(tmp_path, 2))
    again = train(LOSSES, 4, 2, 4, str(tmp_path), family="gpt_oss", resume=checkpoint(tmp_path, 2))
    name = "model.layers.0.mlp.router.weight"
    assert not torch.equal(again["gradients"][0][name], whole["gradients"][2][name])


def test_a_checkpoint_without_it_or_with_part_of_it_is_refused(tmp_path):
    train(LOSSES, 4, 2, 2, str(tmp_path), **SAVES)
    file = Path(checkpoint(tmp_path, 2)) / FILE
    content = file.read_bytes()

    def refused(message: str) -> None:
        with pytest.raises(DataError, match=message):
            train(LOSSES, 4, 2, 4, str(tmp_path), resume=checkpoint(tmp_path, 2))

    for length in (0, len(content) // 2):
        file.write_bytes(content[:length])
        refused("cut short")
    file.unlink()
    refused("whose training kept biases or loads of the past")


def test_what_servers_take_for_weights_is_the_models(tmp_path):
    """vLLM and its kind load every file that ends like weights. The name that ended so, of before, is still read."""
    whole = train([*LOSSES, BIAS], 4, 2, 3, str(tmp_path), family="gpt_oss", **SAVES)
    file = Path(checkpoint(tmp_path, 2)) / FILE
    taken = [one.name for one in file.parent.iterdir() if one.suffix in (".safetensors", ".bin", ".pt", ".pth")]
    theirs = ["model.safetensors", "optimizer.pt", "rng_state.pth", "scheduler.pt", "training_args.bin"]
    assert sorted(taken) == theirs
    file.rename(file.with_name("balancer.safetensors"))
    again = train([*LOSSES, BIAS], 4, 2, 3, str(tmp_path), family="gpt_oss", resume=str(file.parent))
    assert steps_of(again, 3) == steps_of(whole, 3)


def test_without_a_past_there_is_no_file_and_a_resumed_run_is_the_run(tmp_path):
    """Losses of this step alone need nothing but the step, which the Trainer knows; the change at step 3 is on time."""
    from equipoise import AuxLoss, Switch

    def run(folder, **resume):
        trainer, recorder = make([], 4, 2, 4, str(folder), family="gpt_oss", **SAVES)
        recorder.balance.policies = [
            AuxLoss("sequence", coef=0.3),
            Switch(at=3, to=AuxLoss("global_batch", coef=0.3, estimator="prefix")),
        ]
        trainer.train(**resume)
        return recorder.result(trainer), recorder.balance.balancer.step_count

    (Path(checkpoint(tmp_path, 2))).mkdir(parents=True)
    (Path(checkpoint(tmp_path, 2)) / FILE).write_text("of an earlier training into this folder")
    whole, steps = run(tmp_path)
    assert not list(tmp_path.rglob("balancer*"))
    again, same = run(tmp_path / "new", resume_from_checkpoint=checkpoint(tmp_path, 2))
    assert steps == same == 4
    assert steps_of(again, 3) == steps_of(whole, 3)
    assert "balance/global/loss" in steps_of(again, 4)[0]


def test_balancing_begins_in_a_run_that_had_none(tmp_path):
    """Its first step is that of a new balancer, also in the checkpoints that follow; and it is said."""
    plain, other = make([], 4, 2, 2, str(tmp_path), **SAVES)
    for callback in other.callbacks:
        plain.remove_callback(callback)
    plain.train()
    trainer, recorder = make(LOSSES, 4, 2, 4, str(tmp_path), **SAVES)
    with pytest.warns(UserWarning, match="begins there with its own step 0"):
        trainer.train(resume_from_checkpoint=checkpoint(tmp_path, 2))
    assert recorder.balance.balancer.step_count == 2
    trainer, recorder = make(LOSSES, 4, 2, 5, str(tmp_path))
    trainer.train(resume_from_checkpoint=checkpoint(tmp_path, 4))
    assert recorder.balance.balancer.step_count == 3


def biased(folder: Path, family: str, bias: dict, **arguments: Any) -> tuple[Any, Any, list[dict[str, torch.Tensor]]]:
    """A training of 3 steps whose first checkpoint is the best; biases of our own or the model's after each step."""
    from transformers import TrainerCallback

    after: list[dict[str, torch.Tensor]] = []

    class Worse(TrainerCallback):
        def on_evaluate(self, args: Any, state: Any, control: Any, metrics: dict, **kwargs: Any) -> None:
            layers = recorder.balance.balancer._layers
            after.append({layer.name: layer.router.expert_bias.clone() for layer in layers})

    trainer, recorder = make(
        [bias], 4, 2, 3, str(folder), family=family, trainer={"callbacks": [Worse()]}, save_strategy="steps",
        save_steps=1, eval_strategy="steps", eval_steps=1, load_best_model_at_end=True,
        metric_for_best_model="eval_loss", greater_is_better=True, learning_rate=0.1, **arguments,
    )  # fmt: skip
    trainer.train()
    return trainer, recorder, after


@pytest.mark.parametrize("family", ["deepseek_v3", "gpt_oss"])
def test_the_best_model_has_the_biases_of_its_step(tmp_path, family):
    """Of the model's own as of ours, which no file of the model holds: weights and biases belong together."""
    bias = {"kind": "bias", "rule": "proportional", "rate": 0.1}
    trainer, recorder, after = biased(tmp_path, family, bias)
    best = trainer.state.best_global_step
    assert best == 1, "the learning rate is so large that the loss rises"
    balancer = recorder.balance.balancer
    for layer in balancer._layers:
        assert torch.equal(layer.router.expert_bias, after[best - 1][layer.name])
        assert not torch.equal(layer.router.expert_bias, after[-1][layer.name])
    assert balancer.step_count == best


@pytest.mark.parametrize("place", ["scores", "logits"])
def test_biases_of_ours_go_with_the_model(tmp_path, place):
    """A family without a bias of its own: the saved model alone chooses otherwise; load_biases makes it whole again."""
    from transformers import AutoModelForCausalLM

    from equipoise.adapters.hf import load_biases

    bias = {"kind": "bias", "rule": "proportional", "rate": 0.5, "place": place}
    trainer, recorder = make([bias], 4, 2, 2, str(tmp_path), family="mixtral")
    with pytest.warns(UserWarning, match="load_biases"):
        trainer.train()
    trained = trainer.model.eval()
    trainer.save_model(str(tmp_path / "model"))
    recorder.balance.save(tmp_path / "model")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()
    ids = torch.arange(3, 43).view(4, 10)
    with torch.no_grad():
        want = trained(ids).logits
        assert not torch.allclose(again(ids).logits, want, atol=1e-3)
        load_biases(again, tmp_path / "model")
        assert torch.allclose(again(ids).logits, want, atol=1e-5)
    for other, said in [
        (build("gpt_oss"), r"model\.layers\.0\.mlp\.router \(8 experts\)"),
        (build("mixtral", num_hidden_layers=3), r"model\.layers\.2\.mlp\.gate"),
        (build("mixtral", num_experts=4), r"model\.layers\.0\.mlp\.gate \(4 experts\)"),
    ]:
        with pytest.raises(DataError, match=rf"biases of this model, .*{said}.*in .*{FILE}"):
            load_biases(other, tmp_path / "model")


@pytest.mark.parametrize(("trained", "now"), [("logits", "scores"), ("scores", "multiply")])
def test_a_checkpoint_whose_bias_acts_elsewhere(tmp_path, trained, now):
    """Refused with nothing put back; where it was said, the bias begins at zero and a warning names each router."""
    bias = {"kind": "bias", "rule": "proportional", "rate": 0.5, "place": trained}
    train([bias], 4, 2, 2, str(tmp_path), family="mixtral", **SAVES)
    other = [bias | {"place": now, "rate": 0.0}]
    options = {"family": "mixtral", "resume": checkpoint(tmp_path, 2)}
    with pytest.raises(ConfigError, match=rf"(?s)place='{trained}' in the state.*BalanceCallback\(..., strict=False\)"):
        train(other, 4, 2, 3, str(tmp_path / "other"), **options)
    with pytest.warns(UserWarning, match=r"not restored .*model\.layers\.0\.mlp\.gate: a bias that acts with"):
        got = train(other, 4, 2, 3, str(tmp_path / "other"), **options, balance={"strict": False})
    (last,) = [entry for entry in got["logs"] if "loss" in entry and entry["step"] == 3]
    assert last["balance/bias_max"] == 0


def test_a_folder_without_biases_is_refused(tmp_path):
    """Never trained with a bias, or none at all: the error says which, and that nothing has to be put back."""
    from equipoise.adapters.hf import load_biases

    trainer, recorder = make(LOSSES, 4, 2, 1, str(tmp_path))
    trainer.train()
    model = trainer.model
    with pytest.raises(DataError, match="got: no such folder"):
        load_biases(model, tmp_path / "nowhere")
    with pytest.raises(DataError, match=rf"(?s)got: no {FILE}.*its model is whole as it is"):
        load_biases(model, tmp_path)
    recorder.balance.save(tmp_path)
    with pytest.raises(DataError, match=rf"(?s)got: {FILE} without any.*its model is whole as it is"):
        load_biases(model, tmp_path)


def test_a_disk_that_takes_no_more_is_an_error(tmp_path):
    """A file that is not all there is not there: the next resume takes the checkpoint before."""
    trainer, recorder = make(LOSSES, 4, 2, 1, str(tmp_path))
    trainer.train()
    limit, ignored = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, limit[1]))
    try:
        with pytest.raises(OutputError, match="make room"):
            recorder.balance.save(tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        signal.signal(signal.SIGXFSZ, ignored)
    assert not list(tmp_path.glob("balancer*"))
    with pytest.raises(OutputError, match="to write"):
        recorder.balance.save(tmp_path / "no folder")
