"""``equipoise inspect`` on folders of many families, on a run, and on what it cannot inspect."""

from __future__ import annotations

import json
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("transformers")

from equipoise.cli import main
from equipoise.lab.config.schema import RunConfig, from_dict
from equipoise.storage.inspection_record import read_inspection
from equipoise.storage.run_record import read_run
from integrations.hf._cases import quiet
from integrations.hf.families import build
from unit.inspection._folders import windows_of, write_text, write_tokenizer

# softmax and sigmoid, with groups and biases, scores only, choices made in blocks, in attention, with capacity
FAMILIES = ["qwen3_moe", "mixtral", "olmoe", "deepseek_v3", "gpt_oss", "llama4", "granitemoe", "phimoe", "dbrx",
            "jetmoe", "zaya", "longcat_flash", "nllb_moe"]  # fmt: skip


@pytest.fixture(scope="session")
def words(tmp_path_factory):
    path = tmp_path_factory.mktemp("words") / "words.jsonl"
    write_text(path, documents=12)
    return path


def written(family, folder, **more):
    with quiet():
        build(family, **more).save_pretrained(folder)
    write_tokenizer(folder)
    return folder


@pytest.fixture(scope="session")
def qwen(tmp_path_factory):
    return written("qwen3_moe", tmp_path_factory.mktemp("qwen"))


def small(words):
    return ["--data", str(words), "--tokens", "192", "--length", "24", "--device", "cpu"]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family(family, words, tmp_path, capsys):
    folder = written(family, tmp_path / "model")
    assert main(["inspect", str(folder), *small(words), "--out", str(tmp_path / "out")]) == 0
    said = capsys.readouterr()
    assert max(map(len, said.out.splitlines())) <= 80 or str(tmp_path) in said.out
    found = read_inspection(tmp_path / "out")
    assert found.facts.family.replace("-", "_").startswith(family)
    assert [domain.tokens for domain in found.domains] == [120, 192, 192]
    for i, layer in enumerate(found.layers):
        assert (found.arrays.counts_DLE[:, i].sum(-1) == np.array([120, 192, 192]) * layer.top_k).all()
        assert 0 < layer.topk_score <= 1
        assert 0 < layer.entropy_token < np.log(layer.num_experts) + 1e-6
        assert layer.information is not None


def test_a_run_is_measured_as_it_measured_itself(tiny, here, capsys):
    """The counts of the run's last evaluation, domain by domain, layer by layer."""
    assert main(["train", *tiny, "--strategy", "loss-free", "--out", "run", "--plain"]) == 0
    assert main(["inspect", "run", "--tokens", str(4 * 32), "--dtype", "auto"]) == 0
    said = capsys.readouterr().out
    assert "inspection: inspections/run" in said
    run, found = read_run("run"), read_inspection("inspections/run")
    last = run.evaluations[-1]
    assert found.arrays.counts_DLE.tolist() == [last.counts[run.header.domains.index(d.name)] for d in found.domains]
    config = from_dict(RunConfig, run.header.config)
    assert found.facts.micro_batch == config.train.sequences_per_micro_batch
    assert found.layers[0].gate == "sigmoid"
    assert [layer.maxvio_global for layer in found.layers] == pytest.approx(last.maxvio_global)
    assert [layer.maxvio_sequence for layer in found.layers] == pytest.approx(last.maxvio_sequence)
    assert [layer.maxvio_micro_batch for layer in found.layers] == pytest.approx(last.maxvio_micro_batch)
    assert [layer.information for layer in found.layers] == pytest.approx(last.mutual_information)
    score = np.array([last.topk_score[run.header.domains.index(d.name)] for d in found.domains])
    np.testing.assert_allclose(found.arrays.topk_score_DL, score, rtol=1e-5)
    shutil.rmtree("run/checkpoints")
    assert main(["inspect", "run", "--overwrite"]) == 4
    assert "checkpoint" in capsys.readouterr().err


def test_checkpoints_of_a_run_go_through_time(tiny, here, capsys):
    """Every kept checkpoint gives the numbers of the run's own evaluation at that step."""
    more = ["--set=train.keep_checkpoints=0", "--set=train.checkpoint_every=2", "--set=train.eval_every=2"]
    assert main(["train", *tiny, *more, "--out", "run", "--plain"]) == 0
    for step in (2, 4, 8):
        assert main(["inspect", "run", "--step", str(step), "--tokens", str(4 * 32)]) == 0
    assert main(["inspect", "run", "--tokens", str(4 * 32)]) == 0  # the newest, which is that of step 8
    evaluations = {one.step: one for one in read_run("run").evaluations}
    for name, step in (("run-step-2", 2), ("run-step-4", 4), ("run-step-8", 8), ("run", 8)):
        found = read_inspection(f"inspections/{name}")
        assert found.facts.step == step
        assert [one.maxvio_global for one in found.layers] == pytest.approx(evaluations[step].maxvio_global)
    capsys.readouterr()
    assert main(["report", *(f"inspections/run-step-{step}" for step in (8, 2, 4)), "--out", "page.html"]) == 0
    said = capsys.readouterr().out
    assert said.startswith("run from step 2 to 8: MaxVio over all text ")
    lines = said[said.index("run through training") :].splitlines()[2:6]
    assert [line.split()[0] for line in lines] == ["step", "2", "4", "8"]
    assert "Through training" in (here / "page.html").read_text()
    assert main(["inspect", "run", "--step", "3"]) == 4
    assert "those of 2, 4, 6, 8" in capsys.readouterr().err


@pytest.mark.full
def test_a_run_of_a_given_model_chooses_with_its_bias(here, tmp_path, capsys):
    """Mixtral has no place for a bias: it is in the run's balancer, and the run chose with it."""
    folder, data = written("mixtral", tmp_path / "model"), tmp_path / "words.jsonl"
    write_text(data, documents=60, uneven=False)
    sizes = ["--set=data.sequence_length=24", "--set=train.eval_sequences=4", "--set=model.through=transformers"]
    strategy = ["--strategy", "loss-free:proportional", "--steps", "3"]
    assert (
        main(["train", "--model", str(folder), "--data", str(data), *strategy, *sizes, "--plain", "--out", "run"]) == 0
    )
    assert main(["inspect", "run", "--tokens", "96"]) == 0
    run, found = read_run("run"), read_inspection("inspections/run")
    last = run.evaluations[-1]
    assert found.arrays.counts_DLE.tolist() == [last.counts[run.header.domains.index(d.name)] for d in found.domains]


@pytest.fixture(scope="module")
def biased(tmp_path_factory):
    """A checkpoint of a Trainer that moved biases which Mixtral's files have no place for."""
    pytest.importorskip("accelerate", reason="the hf extra is not installed")
    from integrations.hf._trainer import checkpoint, make

    root = tmp_path_factory.mktemp("biased")
    bias = {"kind": "bias", "rule": "proportional", "rate": 0.5}
    trainer, _ = make([bias], 4, 1, 2, str(root), family="mixtral", save_strategy="steps", save_steps=2)
    with pytest.warns(UserWarning, match="load_biases"):
        trainer.train()
    write_tokenizer(checkpoint(root, 2))
    return Path(checkpoint(root, 2))


def choices(folder, words, biased):
    """(L, E) of all windows, from what reaches the experts of the class itself."""
    from transformers import AutoModelForCausalLM

    from equipoise.adapters.hf import load_biases

    windows = [one for rows in windows_of(words, 24) for one in rows[:8]]
    with quiet():
        model = AutoModelForCausalLM.from_pretrained(folder).eval()
        if biased:
            load_biases(model, folder)
    counts: dict[str, torch.Tensor] = {}
    for name, module in model.named_modules():
        if name.endswith("experts"):
            module.register_forward_pre_hook(
                lambda _, args, name=name: counts.update({name: torch.bincount(args[1].flatten(), minlength=8)})
            )
    with torch.no_grad():
        model(torch.tensor(windows))
    return [counts_E.tolist() for counts_E in counts.values()]


def test_a_checkpoint_chooses_with_the_biases_of_its_training(biased, words, start, here, capsys):
    """In a process of its own: what is counted is what the trained model does; where the biases are from is said."""
    done = start("inspect", str(biased), *small(words), "--out", "out", "--json")
    said, errors = done.communicate(timeout=120)
    assert done.returncode == 0, errors
    assert json.loads(said)["facts"]["biases"] == str(biased / "balancer.equipoise")
    counts = read_inspection("out").arrays.counts_DLE.sum(0).tolist()
    assert counts == choices(biased, words, True) != choices(biased, words, False)
    assert main(["inspect", str(biased), *small(words), "--out", "out"]) == 0
    assert "chosen with the expert biases of" in " ".join(capsys.readouterr().out.split())

    shutil.copytree(biased, "plain")
    Path("plain", "balancer.equipoise").unlink()
    assert main(["inspect", "plain", *small(words)]) == 0
    assert "biases" not in capsys.readouterr().out
    assert read_inspection("inspections/plain").arrays.counts_DLE.sum(0).tolist() == choices(biased, words, False)


def test_biases_of_another_model_are_refused(biased, words, here, capsys):
    written("qwen3_moe", Path("model"), num_experts=4)
    shutil.copyfile(biased / "balancer.equipoise", "model/balancer.equipoise")
    assert main(["inspect", "model", *small(words)]) == 4
    said = capsys.readouterr().err
    assert "(4 experts)" in said and "(8 experts)" in said and "of another training" in said


def test_json_and_a_second_call(qwen, words, capsys, here):
    assert main(["inspect", str(qwen), *small(words), "--json"]) == 0
    first = json.loads(capsys.readouterr().out)
    assert len(first["layers"]) == 2 and first["facts"]["family"] == "qwen3_moe"
    assert main(["inspect", str(qwen), *small(words), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == first
    assert main(["inspect", str(qwen), *small(words), "--json", "--seed", "1"]) == 5
    assert main(["inspect", str(qwen), *small(words), "--json", "--seed", "1", "--overwrite"]) == 0


def test_ctrl_c_saves(start, qwen, words, here):
    """A real process, stopped between rounds, goes on with the same command."""
    command = ["inspect", str(qwen), "--data", str(words), "--length", "12", "--tokens", "all", "--micro-batch", "1",
               "--pass-tokens", "24", "--device", "cpu", "--out", "out", "--save-every", "0"]  # fmt: skip
    process = start(*command)
    deadline = time.monotonic() + 120
    while not list((here / "out" / "state").glob("step_*[0-9]")) and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130, said
    assert "the same command goes on" in said
    assert not (here / "out" / "inspection.json").exists()
    assert main(command[:-2]) == 0
    assert main([*command[:-4], "--out", "whole"]) == 0
    one, other = read_inspection("out"), read_inspection("whole")
    assert one.layers == other.layers


def test_one_domain_shows_what_can_be_shown(qwen, tmp_path, capsys):
    path = tmp_path / "one.jsonl"
    path.write_text("".join(json.dumps({"text": "a b c d e f g h " * 9, "domain": "only"}) + "\n" for _ in range(4)))
    assert main(["inspect", str(qwen), *small(path), "--out", str(tmp_path / "out")]) == 0
    assert "one domain" in capsys.readouterr().out
    found = read_inspection(tmp_path / "out")
    assert found.layers[0].information is None and found.layers[0].maxvio_global >= 0


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_text_that_names_no_domain_is_of_its_file(kind, qwen, tmp_path, capsys):
    path = tmp_path / f"poems.{kind}"
    rows = [{"text": "a b c d e f g h " * 9}] * 4
    if kind == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        arrow = pytest.importorskip("pyarrow")
        pytest.importorskip("pyarrow.parquet").write_table(arrow.Table.from_pylist(rows), path)
    assert main(["inspect", str(qwen), *small(path), "--out", str(tmp_path / "out")]) == 0
    assert [domain.name for domain in read_inspection(tmp_path / "out").domains] == ["poems"]


def test_a_short_domain_is_left_out_by_name(qwen, words, tmp_path, capsys):
    path = tmp_path / "short.jsonl"
    path.write_text(words.read_text() + json.dumps({"text": "a b", "domain": "brief"}) + "\n")
    assert main(["inspect", str(qwen), *small(path), "--out", str(tmp_path / "out")]) == 0
    assert "brief: left out" in capsys.readouterr().out
    assert len(read_inspection(tmp_path / "out").domains) == 3


def test_domains_are_chosen(qwen, words, tmp_path, capsys):
    assert main(["inspect", str(qwen), *small(words), "--domains", "signs,letters", "--out", str(tmp_path / "a")]) == 0
    assert [domain.name for domain in read_inspection(tmp_path / "a").domains] == ["letters", "signs"]
    assert main(["inspect", str(qwen), *small(words), "--domains", "sings", "--out", str(tmp_path / "b")]) == 4
    assert "sings" in capsys.readouterr().err


def dense(folder):
    from transformers import Qwen3Config, Qwen3ForCausalLM

    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "vocab_size": 64, "head_dim": 8}
    with quiet():
        Qwen3ForCausalLM(Qwen3Config(**sizes, num_attention_heads=2, num_key_value_heads=1)).save_pretrained(folder)
    write_tokenizer(folder)


def doge(folder):
    written("doge", folder)


def no_tokenizer(folder):
    written("qwen3_moe", folder)
    for path in folder.glob("tokenizer*"):
        path.unlink()


def cut_weights(folder):
    written("qwen3_moe", folder)
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:5000])


def missing_weights(folder):
    from safetensors.torch import load_file, save_file

    written("qwen3_moe", folder)
    state = load_file(folder / "model.safetensors")
    save_file(
        {k: v for k, v in state.items() if "gate.weight" not in k}, folder / "model.safetensors", {"format": "pt"}
    )


def nan_weights(name):
    def make(folder):
        with quiet():
            model = build("qwen3_moe")
        with torch.no_grad():
            model.get_parameter(name).view(-1)[5] = torch.nan
        model.save_pretrained(folder)
        write_tokenizer(folder)

    return make


def other_tokenizer(folder):
    written("qwen3_moe", folder, vocab_size=8)


def strange_config(folder):
    written("qwen3_moe", folder)
    (folder / "config.json").write_text('{"model_type": "never_heard_of"}')


def empty(folder):
    folder.mkdir()


def nothing(folder):
    pass


@pytest.mark.parametrize(
    ("make", "code", "says"),
    [
        (dense, 2, ["dense model", "MoE layers"]),
        (doge, 2, ["DogeCDMoE", "families.md", 'register_router("DogeCDMoE", read=']),
        (no_tokenizer, 4, ["a tokenizer in", "--tokenizer"]),
        (cut_weights, 4, ["weights of Qwen3MoeForCausalLM"]),
        (missing_weights, 4, ["2 missing", "gate.weight"]),
        (nan_weights("model.layers.1.mlp.gate.weight"), 2, ["NaN", "model.layers.1.mlp.gate"]),
        (nan_weights("model.layers.0.self_attn.q_proj.weight"), 2, ["NaN or infinity in model.layers.0.mlp.gate"]),
        (other_tokenizer, 4, ["below the model's 8", "--tokenizer"]),
        (strange_config, 4, ["transformers knows", "never_heard_of"]),
        (empty, 4, ["config.json", "an empty folder"]),
        (nothing, 4, ["no such folder"]),
    ],
)
def test_what_cannot_be_inspected_says_what_to_do(make, code, says, words, tmp_path, capsys):
    make(tmp_path / "model")
    assert main(["inspect", str(tmp_path / "model"), *small(words), "--out", str(tmp_path / "out")]) == code
    error = capsys.readouterr().err
    assert "expected" in error and "got:" in error and "do:" in error
    assert all(word in error for word in says), error
    assert not (tmp_path / "out" / "inspection.json").exists()


@pytest.mark.parametrize(
    ("options", "code", "says"),
    [
        (["--length", "100"], 2, "--length 100"),
        (["--length", "1"], 2, "--length 1"),
        (["--length", "60", "--tokens", "30", "--domains", "digits"], 0, ""),
        (["--tokens", "many"], 2, "--tokens"),
        (["--tokens", "0"], 2, "--tokens"),
        (["--layers", "9"], 2, "2 routers"),
        (["--device", "cuda:77"], 2, "--device"),
        (["--data", "nowhere.jsonl"], 4, "nowhere.jsonl"),
        (["--against", "nowhere"], 4, "no such folder"),
    ],
)
def test_settings_that_cannot_work(options, code, says, qwen, words, tmp_path, capsys):
    assert main(["inspect", str(qwen), *small(words), "--out", str(tmp_path / "out"), *options]) == code
    assert says in capsys.readouterr().err


def test_text_shorter_than_a_window(qwen, tmp_path, capsys):
    path = tmp_path / "tiny.jsonl"
    path.write_text(
        json.dumps({"text": "a b c", "domain": "x"}) + "\n" + json.dumps({"text": "1", "domain": "y"}) + "\n"
    )
    assert main(["inspect", str(qwen), *small(path), "--out", str(tmp_path / "out")]) == 4
    assert "window of 24 tokens" in capsys.readouterr().err
