"""A run on several ranks is the run on one: same losses, same norms, same weights, whatever lies where."""

from __future__ import annotations

import json

import pytest
import torch

from equipoise.errors import ConfigError
from equipoise.lab.config.schema import ParallelConfig
from equipoise.lab.models.transformer import LanguageModel
from equipoise.lab.training.distributed import join
from equipoise.lab.training.trainer import CHECKPOINTS, train
from equipoise.storage import checkpoint
from equipoise.storage.run_record import RECORD_NAME, read_run
from unit.lab.training import distributed_cases
from unit.lab.training.test_trainer import assert_same, numbers, weights

pytestmark = pytest.mark.xdist_group("ranks")
CASES = "unit.lab.training.distributed_cases"
DP2, DP4 = (2, ParallelConfig()), (4, ParallelConfig(dp=4))
EP2, DP4_EP2 = (2, ParallelConfig(ep=2)), (4, ParallelConfig(ep=2))
FSDP2, FSDP4_EP2 = (2, ParallelConfig(fsdp=True)), (4, ParallelConfig(ep=2, fsdp=True))
LAYOUTS = [DP2, DP4, EP2, DP4_EP2, (4, ParallelConfig(ep=4)), FSDP2, FSDP4_EP2, (2, ParallelConfig(ep=2, fsdp=True))]


def name_of(layout) -> str:
    size, config = layout
    return f"dp{size}" + f"-ep{config.ep}" * (config.ep > 1) + "-fsdp" * config.fsdp


@pytest.fixture
def fp32_run(tiny_run):
    """Rounding stays small, and clipping is at work."""

    def make(strategy="global:exact@0.02+micro", **settings):
        return tiny_run(strategy, **{"precision": "fp32", "clip": 0.5} | settings)

    return make


@pytest.fixture(scope="session")
def whole_runs():
    return {}


def alone(config, tmp_path_factory, runs, name):
    """The run of one process, made once for all layouts that are compared with it."""
    if name not in runs:
        runs[name] = train(config, tmp_path_factory.mktemp("alone") / "run")
    return runs[name]


def assert_close(a, b, path="", rtol=2e-4, atol=2e-5) -> None:
    """Numbers and tensors that differ by rounding; whole numbers and names must be equal."""
    if isinstance(a, torch.Tensor) and a.is_floating_point():
        torch.testing.assert_close(a, b, rtol=rtol, atol=atol, msg=lambda m: f"{path}: {m}")
    elif isinstance(a, torch.Tensor):
        assert torch.equal(a, b), path
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), path
        for key in a:
            assert_close(a[key], b[key], f"{path}/{key}", rtol, atol)
    elif isinstance(a, list):
        assert len(a) == len(b), path
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_close(x, y, f"{path}/{i}", rtol, atol)
    elif isinstance(a, float) and not path.endswith("seconds"):
        assert a == pytest.approx(b, rel=rtol, abs=atol), path
    elif not path.endswith("seconds"):
        assert a == b, path


@pytest.mark.parametrize("layout", LAYOUTS, ids=name_of)
def test_the_loss_curve_is_that_of_one_process(ranks, fp32_run, tmp_path, tmp_path_factory, whole_runs, layout):
    size, parallel = layout
    config = fp32_run(fidelity_every=0)
    whole = alone(config, tmp_path_factory, whole_runs, "exact")
    losses = ranks.run(f"{CASES}:run", config, tmp_path / "run", parallel, size=size)
    assert all(seen == losses[0] for seen in losses)  # every rank knows the loss of the whole batch
    run, wanted = read_run(tmp_path / "run"), read_run(whole)
    assert run.status == "finished" and not run.problems
    assert run.header.parameters == wanted.header.parameters
    assert run.header.active_parameters == wanted.header.active_parameters
    assert run.header.config == wanted.header.config
    assert run.header.versions["layout"].startswith(f"dp={size}")
    assert_close(numbers(tmp_path / "run"), numbers(whole))
    assert_close(weights(tmp_path / "run")["model"], weights(whole)["model"])
    assert_close(weights(tmp_path / "run")["optimizer"], weights(whole)["optimizer"])
    assert {p.name for p in (tmp_path / "run").iterdir()} == {"record.jsonl", "checkpoints", "tokenizer.json"}


@pytest.mark.parametrize(
    ("layout", "strategy", "checkpointing"),
    [
        (DP4_EP2, "deepseek-v3", "reentrant"),
        (FSDP4_EP2, "deepseek-v3", "non_reentrant"),
        (FSDP2, "global:ema", "reentrant"),
        (EP2, "loss-free:momentum", "non_reentrant"),
        (DP2, "micro", "none"),
    ],
    ids=lambda value: name_of(value) if isinstance(value, tuple) else value,
)
def test_recompute_and_other_strategies(ranks, fp32_run, tmp_path, layout, strategy, checkpointing):
    size, parallel = layout
    model = {"checkpointing": checkpointing, "shared_experts": 1, "tie_embeddings": checkpointing == "none"}
    config = fp32_run(strategy, model=model, steps=4, fidelity_every=0)
    ranks.run(f"{CASES}:run", config, tmp_path / "run", parallel, size=size)
    whole = train(config, tmp_path / "alone")
    assert_close(numbers(tmp_path / "run"), numbers(whole))
    assert_close(weights(tmp_path / "run")["model"], weights(whole)["model"])


@pytest.mark.parametrize("layout", [EP2, FSDP4_EP2], ids=name_of)
def test_bf16(ranks, tiny_run, tmp_path, layout):
    config = tiny_run(steps=4, fidelity_every=0)
    ranks.run(f"{CASES}:run", config, tmp_path / "run", layout[1], size=layout[0])
    whole = train(config, tmp_path / "alone")
    for step, wanted in zip(read_run(tmp_path / "run").steps, read_run(whole).steps, strict=True):
        assert step.loss == pytest.approx(wanted.loss, rel=2e-3)


@pytest.mark.parametrize("layout", LAYOUTS, ids=name_of)
@pytest.mark.parametrize("clip", [0.0, 0.1])
def test_gradients_and_their_norm(ranks, tiny_run, layout, clip):
    """Against autograd of one process on all sequences, whatever each rank began with."""
    size, parallel = layout
    config = tiny_run()
    first, *others = ranks.run(f"{CASES}:gradients", config, parallel, clip, size=size)
    assert all(other["norm"] == first["norm"] for other in others)
    model = LanguageModel(config.model, seed=0)
    tokens_BS = torch.randint(0, 300, (4, 17), generator=torch.Generator().manual_seed(0))
    model(tokens_BS[:, :-1], tokens_BS[:, 1:]).backward()
    wanted = {name: p.grad for name, p in model.named_parameters()}
    norm = torch.stack([grad.double().square().sum() for grad in wanted.values()]).sum().sqrt().item()
    assert first["norm"] == pytest.approx(norm, rel=1e-5) and norm > 0.1
    factor = clip / norm if clip else 1.0
    for name, grad in wanted.items():  # weights before and after a step are about 1: their difference has 7 digits
        torch.testing.assert_close(first["gradients"][name], grad * factor, rtol=1e-3, atol=3e-7, msg=name)


@pytest.mark.parametrize(
    ("first", "then"),
    [
        (1, DP4),
        (DP4, EP2),
        (FSDP2, DP2),
        (EP2, FSDP4_EP2),
        (FSDP4_EP2, 1),
    ],
    ids=lambda value: "alone" if value == 1 else name_of(value),
)
def test_a_run_goes_on_with_another_layout(ranks, fp32_run, tmp_path, tmp_path_factory, whole_runs, first, then):
    config = fp32_run(fidelity_every=0)
    whole = alone(config, tmp_path_factory, whole_runs, "exact")
    folder = tmp_path / "run"
    for layout, end in ((first, 4), (then, None)):
        if layout == 1 and end:
            ranks.run(f"{CASES}:run_with_a_signal", config, folder, ParallelConfig(), 0, end, size=1)
        elif layout == 1:
            train(config, folder, resume=True)
        elif end:
            ranks.run(f"{CASES}:run_with_a_signal", config, folder, layout[1], 0, end, size=layout[0])
        else:
            ranks.run(f"{CASES}:run", config, folder, layout[1], True, size=layout[0])
    assert_close(numbers(folder), numbers(whole))
    assert_close(weights(folder), weights(whole))
    headers = [json.loads(line) for line in (folder / RECORD_NAME).read_text().splitlines() if '"header"' in line]
    assert [header["resumed_at"] for header in headers] == [0, 4]


@pytest.mark.parametrize("layout", [DP2, EP2, FSDP4_EP2], ids=name_of)
def test_a_stop_asked_of_one_rank_stops_all_and_resumes_to_the_same_bits(ranks, tiny_run, tmp_path, layout):
    size, parallel = layout
    config = tiny_run("global:prefix")
    ranks.run(f"{CASES}:run", config, tmp_path / "whole", parallel, size=size)
    said = ranks.run(f"{CASES}:run_with_a_signal", config, tmp_path / "run", parallel, size - 1, 4, size=size)
    assert said == ["stopped"] * size
    run = read_run(tmp_path / "run")
    assert run.status == "interrupted" and run.end.step == 4
    assert checkpoint.load_latest(tmp_path / "run" / CHECKPOINTS)[0] == 4
    ranks.run(f"{CASES}:run", config, tmp_path / "run", parallel, True, size=size)
    assert numbers(tmp_path / "run") == numbers(tmp_path / "whole")
    assert_same(weights(tmp_path / "run"), weights(tmp_path / "whole"))


@pytest.mark.parametrize("damage", ["cut", "one bit"])
def test_a_damaged_checkpoint_is_passed_over_by_all_ranks_alike(ranks, tiny_run, tmp_path, damage):
    config = tiny_run(checkpoint_every=2)
    ranks.run(f"{CASES}:run_with_a_signal", config, tmp_path / "run", DP2[1], 0, 4, size=2)
    newest = tmp_path / "run" / CHECKPOINTS / "step_000004" / "tensors.safetensors"
    content = bytearray(newest.read_bytes())
    if damage == "cut":
        content = content[:-1]
    else:
        content[len(content) // 2] ^= 1
    newest.write_bytes(content)
    warned = ranks.run(f"{CASES}:resume_and_warn", config, tmp_path / "run", EP2[1], size=2)
    assert "step_000004" in warned[0][0] and warned[1] == []  # rank 0 looks for all
    whole = train(config, tmp_path / "alone")
    assert read_run(tmp_path / "run").status == "finished"
    for step, wanted in zip(read_run(tmp_path / "run").steps, read_run(whole).steps, strict=True):
        assert step.loss == pytest.approx(wanted.loss, rel=2e-3)


def test_evaluation_is_that_of_one_process_to_the_last_bit(ranks, tiny_run, tmp_path):
    """Also where the micro-batches are no multiple of the ranks: 3 domains x 5 sequences in micro-batches of 2."""
    config = tiny_run("none", steps=1, lr=1e-30, eval_sequences=5, precision="fp32", fidelity_every=0)
    ranks.run(f"{CASES}:run", config, tmp_path / "run", ParallelConfig(), size=4)
    here, there = (read_run(folder).evaluations for folder in (train(config, tmp_path / "alone"), tmp_path / "run"))
    assert here == there


def test_routing_churn_is_that_of_one_process(ranks, tiny_run, tmp_path):
    """Of two models, on ranks that each see a part of the text."""
    config = tiny_run()
    seen = ranks.run(f"{CASES}:evaluated_twice", config, size=2)
    assert seen[0] == seen[1] == distributed_cases.evaluated_twice(config)
    assert 0.1 < min(seen[0]) < 1


def test_what_does_not_fit_is_refused_on_all_ranks_and_said_by_one(ranks, tiny_run, tmp_path):
    config = tiny_run()
    cases = [
        (config, ParallelConfig(dp=3), "ConfigError", "--dp 2"),
        (config, ParallelConfig(ep=3), "ConfigError", "--ep that divides"),
        (tiny_run(model={"experts": 7}), ParallelConfig(ep=2), "ConfigError", "model.experts divisible by 2"),
        (tiny_run(micro_batches=5), ParallelConfig(), "ConfigError", "train.micro_batches divisible by 2"),
        (tiny_run(data={"data": str(tmp_path / "none.jsonl")}), ParallelConfig(), "DataError", "none.jsonl"),
    ]
    for number, (run, layout, kind, words) in enumerate(cases):
        first, second = ranks.run(f"{CASES}:refused", run, tmp_path / str(number), layout, size=2)
        assert first[0] == second[0] == kind and words in first[1] == second[1]
        assert not (tmp_path / str(number) / RECORD_NAME).exists()
        if number not in (0, 1):  # those two are raised before the ranks know each other
            assert (first[2], second[2]) == (False, True)


def test_a_folder_that_holds_a_run_is_refused_by_all(ranks, tiny_run, tmp_path):
    config = tiny_run(steps=1)
    train(config, tmp_path / "run")
    before = (tmp_path / "run" / RECORD_NAME).read_bytes()
    found = ranks.run(f"{CASES}:refused", config, tmp_path / "run", ParallelConfig(), size=4)
    assert [(kind, silent) for kind, _, silent in found] == [("OutputError", rank > 0) for rank in range(4)]
    assert (tmp_path / "run" / RECORD_NAME).read_bytes() == before


def test_resuming_a_finished_run_changes_nothing(ranks, tiny_run, tmp_path):
    config = tiny_run(steps=1)
    train(config, tmp_path / "run")
    before = (tmp_path / "run" / RECORD_NAME).read_bytes()
    assert ranks.run(f"{CASES}:run", config, tmp_path / "run", ParallelConfig(), True, size=2) == [[], []]
    assert (tmp_path / "run" / RECORD_NAME).read_bytes() == before


def test_nan_stops_all_ranks_with_the_weights_before(ranks, tiny_run, tmp_path):
    config = tiny_run("none", lr=1e30, warmup=0, clip=0.0, steps=20, checkpoint_every=0)
    found = ranks.run(f"{CASES}:refused", config, tmp_path / "run", EP2[1], size=2)
    assert {kind for kind, _, _ in found} == {"DivergedError"}
    assert "finite loss and gradient" in found[0][1]
    run = read_run(tmp_path / "run")
    assert run.status == "failed" and run.end.step == run.steps[-1].step >= 1


def test_what_one_machine_lacks_is_said_by_all(ranks, tmp_path):
    found = ranks.run(f"{CASES}:one_rank_cannot", tmp_path, size=4)
    assert {text for text, _ in found} == {"expected text\n  got: none\n  do:  copy it here"}
    assert sum(not silent for _, silent in found) == 1


def test_other_text_on_one_machine_is_refused(ranks):
    assert all("expected one text" in text for text in ranks.run(f"{CASES}:different", "a"))
    assert ranks.run(f"{CASES}:different", "b") == ["", ""]


@pytest.mark.parametrize("layout", [ParallelConfig(dp=2), ParallelConfig(ep=2), ParallelConfig(fsdp=True)])
def test_several_ranks_without_torchrun_are_refused(layout):
    words = r"(?s)started by torchrun.*one process alone.*torchrun --nproc-per-node"
    with pytest.raises(ConfigError, match=words), join(layout):
        pass


def test_one_process_of_torchrun_is_one_process(tiny_run, tmp_path, monkeypatch):
    environment = {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": 0}
    for name, value in environment.items():
        monkeypatch.setenv(name, str(value))
    config = tiny_run(steps=2)
    train(config, tmp_path / "torchrun")
    assert not torch.distributed.is_initialized()
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name)
    assert numbers(train(config, tmp_path / "alone")) == numbers(tmp_path / "torchrun")
