"""Runs that go on from a Hugging Face folder, through the classes of transformers: measured, resumed, refused."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import pytest
import torch

from equipoise.adapters.biases import load_biases
from equipoise.cli import main
from equipoise.errors import ConfigError, DataError
from equipoise.lab.config.schema import CompareConfig, DataConfig, ModelConfig, RunConfig
from equipoise.lab.config.strategies import strategy_of
from equipoise.lab.data.packing import prepare
from equipoise.lab.data.tokenizer import given_tokenizer, load_tokenizer
from equipoise.lab.models.hf_export import export_run
from equipoise.lab.models.pretrained import adopt, build, prepare_text
from equipoise.lab.training.evaluation import evaluate
from equipoise.lab.training.trainer import train
from equipoise.storage.balancer_file import FILE, write_state
from equipoise.storage.run_record import read_run
from unit.lab.models._given import folder_of, run_of, tiny
from unit.lab.training.test_trainer import assert_same, numbers, weights

transformers = pytest.importorskip("transformers")
pytestmark = [
    pytest.mark.filterwarnings("ignore:Initializing zero-element tensors"),
    pytest.mark.filterwarnings("ignore:.*RoPE.*"),
]
FAMILIES = {"qwen3_moe": ("softmax", False), "deepseek_v3": ("sigmoid", True), "gpt_oss": ("softmax", False)}


@pytest.fixture(scope="module")
def folders(tmp_path_factory, corpus_file):
    root = tmp_path_factory.mktemp("models")
    return {name: folder_of(tiny(name), root / name, corpus_file) for name in FAMILIES}


def heldout(run: RunConfig):
    return prepare_text(run.model, replace(run.data, sequence_length=32))


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_measured_is_what_the_class_does(folders, corpus_file, family):
    """Loss by the class's own `labels`, load by what reaches its experts: neither goes through our code."""
    run = run_of(folders[family], corpus_file)
    gate, bias = FAMILIES[family]
    assert (run.model.gate, run.model.selection_bias, run.model.family) == (gate, bias, family)
    assert (run.model.layers, run.model.experts, run.model.top_k) == (2, 8, 2)
    data, model = heldout(run), build(run)
    found = evaluate(model, data, step=0, sequences=3)

    theirs = transformers.AutoModelForCausalLM.from_pretrained(folders[family]).eval()
    counts: list[torch.Tensor] = []
    for name, module in theirs.named_modules():
        if name.endswith("experts") and "shared" not in name:
            module.register_forward_pre_hook(
                lambda _, args: counts.append(torch.bincount(args[1].flatten(), minlength=8))
            )
    for place, domain in enumerate(data.domains):
        rows = torch.from_numpy(data.heldout[domain][:3].astype("int64"))
        counts.clear()
        with torch.no_grad():
            loss = theirs(input_ids=rows, labels=rows).loss  # 32 predictions a row: as many as ours
        counts_LE = counts.copy()
        counts.clear()
        with torch.no_grad():
            theirs(input_ids=rows[:, :-1])
        assert found.loss[domain] == pytest.approx(loss.item(), abs=1e-5)
        assert found.counts[place] == [layer_E.tolist() for layer_E in counts]
        assert [int(layer_E.sum()) for layer_E in counts_LE] == [3 * 33 * 2] * 2
    assert sum(found.tokens.values()) == 3 * 3 * 32


@pytest.mark.parametrize(
    ("family", "strategy"),
    [("qwen3_moe", "global+micro"), ("qwen3_moe", "loss-free"), ("deepseek_v3", "loss-free"),
     ("deepseek_v3", "micro"), ("gpt_oss", "global"), ("gpt_oss", "none")],
)  # fmt: skip
def test_a_stopped_run_goes_on_to_the_same_bits(folders, corpus_file, tmp_path, family, strategy):
    config = run_of(folders[family], corpus_file, strategy, load_every=1)
    whole = train(config, tmp_path / "whole")

    class Killed(Exception):
        pass

    def kill(step):
        if step.step == 3:  # after the checkpoint of step 2
            raise Killed

    with pytest.raises(Killed):
        train(config, tmp_path / "killed", on_step=kill)
    train(config, tmp_path / "killed", resume=True)
    assert numbers(tmp_path / "killed") == numbers(whole)
    assert_same(weights(tmp_path / "killed"), weights(whole))

    run = read_run(whole)
    assert run.status == "finished" and not run.problems
    assert [sum(layer) for load in run.loads for layer in load.counts] == [4 * 2 * 32 * 2] * 8
    assert run.steps[-1].loss < run.steps[0].loss  # four steps, but it learns
    state = weights(whole)
    biases = {key: value for key, value in state["model"].items() if key.endswith("correction_bias")}
    if family == "deepseek_v3":  # its own bias, moved by the strategy that has one alone
        begun = build(config).state_dict()
        assert len(biases) == 2
        assert all(torch.equal(value, begun[key]) == (strategy == "micro") for key, value in biases.items())
    per_expert = sum(v.numel() for k, v in state["model"].items() if v.dim() == 3 and ".experts." in k) // 8
    total = sum(v.numel() for k, v in state["model"].items() if k not in biases)
    assert (run.header.parameters, run.header.active_parameters) == (total, total - 6 * per_expert)


def test_through_the_lab_and_through_transformers_a_run_is_the_same(folders, corpus_file, tmp_path):
    """Two implementations of one model, one data order, one strategy: losses that differ by rounding only."""
    runs = {}
    for through in ("lab", "transformers"):
        config = run_of(folders["qwen3_moe"], corpus_file, "global+micro", through, lr=3e-4)
        assert config.model.through == through
        runs[through] = read_run(train(config, tmp_path / through))
    for ours, theirs in zip(runs["lab"].steps, runs["transformers"].steps, strict=True):
        assert ours.loss == pytest.approx(theirs.loss, abs=1e-5)
        assert ours.grad_norm == pytest.approx(theirs.grad_norm, rel=1e-5)
        for name in ("balance/maxvio_global", "balance/global/loss"):
            assert ours.balance[name] == pytest.approx(theirs.balance[name], abs=1e-5)


def test_a_finished_run_is_exported_again(folders, corpus_file, tmp_path):
    """deepseek_v3 stays deepseek_v3, with the trained bias in its file and its tokenizer beside it."""
    config = run_of(folders["deepseek_v3"], corpus_file, "loss-free")
    run = train(config, tmp_path / "run")
    assert export_run(run, tmp_path / "out").architecture == "DeepseekV3ForCausalLM"
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    state = {key.removeprefix("network."): value for key, value in weights(run)["model"].items()}
    for key, value in theirs.state_dict().items():
        assert torch.equal(value, state[key]), key
    given = (folders["deepseek_v3"] / "tokenizer_config.json").read_bytes()
    assert (tmp_path / "out" / "tokenizer_config.json").read_bytes() == given
    softmax = train(run_of(folders["qwen3_moe"], corpus_file, "loss-free", steps=1), tmp_path / "own-bias")
    with pytest.raises(ConfigError, match="a selection bias, which this class does not have"):
        export_run(softmax, tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_strategies_on_a_given_model(folders, corpus_file):
    softmax, sigmoid = (run_of(folders[name], corpus_file).model for name in ("qwen3_moe", "deepseek_v3"))

    def policies(name, model):
        return list(strategy_of(RunConfig(model=model, strategy=name)).policies)

    assert policies("loss-free", softmax)[0] | {"kind": 0} == {
        "kind": 0, "rule": "proportional", "rate": 0.1 / 8, "schedule": "cosine"}  # fmt: skip
    assert policies("loss-free@1e-4", softmax)[0]["rule"] == "sign"  # what was said holds, or is refused
    control = policies("loss-free:micro_batch", softmax)[0]
    assert control == policies("loss-free", softmax)[0] | {"scope": "micro_batch"}  # which is in its scope alone
    loud = RunConfig(model=softmax, strategy="loss-free@1e-1")
    with pytest.raises(ConfigError, match="proportional"):
        strategy_of(loud).check(loud)
    assert policies("loss-free", sigmoid)[0]["rule"] == "sign"
    assert policies("micro", sigmoid)[1] == {"kind": "ExpertBias", "rate": 0.0}
    assert len(policies("micro", softmax)) == 1
    with pytest.raises(ConfigError, match="the gate that this model has: softmax"):
        policies("micro:sigmoid", softmax)


@pytest.fixture(scope="module")
def biased(folders, tmp_path_factory):
    """A folder whose training moved biases that its class has no place for."""
    folder = tmp_path_factory.mktemp("biased") / "model"
    shutil.copytree(folders["qwen3_moe"], folder)
    draw = torch.Generator().manual_seed(0)
    biases = {f"model.layers.{i}.mlp.gate": 0.1 * torch.randn(8, generator=draw) for i in range(2)}
    write_state({"biases": biases}, folder / FILE)
    return folder, biases


@pytest.mark.parametrize("through", ["lab", "transformers"])
def test_a_run_begins_with_the_biases_beside_the_weights(biased, corpus_file, tmp_path, through):
    """It chooses as the model did that was trained, keeps them under a strategy without a bias, and says so."""
    folder, biases = biased
    config = run_of(folder, corpus_file, "micro", through, steps=2)
    assert (config.model.biases, config.model.selection_bias) == (str(folder / FILE), True)
    assert strategy_of(config).policies[-1] == {"kind": "ExpertBias", "rate": 0.0}
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    tokens = torch.arange(60).view(2, 30)
    with torch.no_grad():
        found = build(config)(tokens)
        assert not torch.allclose(found, theirs(tokens).logits, atol=1e-2)
        load_biases(theirs, folder)
        assert torch.allclose(found, theirs(tokens).logits, atol=1e-5)

    run = train(config, tmp_path / "run")
    assert read_run(run).header.config["model"]["biases"] == str(folder / FILE)
    kept = weights(run)["balancer"]["layers"]
    assert [
        torch.equal(one["expert_bias_E"], biases[f"model.layers.{i}.mlp.gate"]) for i, one in enumerate(kept.values())
    ] == [True] * 2
    with pytest.raises(ConfigError, match="bias"):
        export_run(run, tmp_path / "out")


@pytest.mark.parametrize("through", ["lab", "transformers"])
def test_biases_beside_the_weights_act_where_they_acted(biased, corpus_file, tmp_path, through):
    """Of a strategy whose bias acts there too; any other is refused, with the policy that would keep them."""
    given, biases = biased
    shutil.copytree(given, folder := tmp_path / "model")
    layers = {name: {"bias_place": "logits"} for name in biases}
    write_state({"biases": {name: 4 * bias_E for name, bias_E in biases.items()}, "layers": layers}, folder / FILE)
    config = run_of(folder, corpus_file, "loss-free:logits", through, steps=2)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    load_biases(theirs, folder)
    tokens = torch.arange(60).view(2, 30)
    with torch.no_grad():
        assert torch.allclose(build(config)(tokens), theirs(tokens).logits, atol=1e-5)
        write_state({"biases": {name: 4 * bias_E for name, bias_E in biases.items()}}, folder / FILE)
        assert not torch.allclose(build(config)(tokens), theirs(tokens).logits, atol=1e-2)
        write_state({"biases": biases, "layers": layers}, folder / FILE)
    train(config, tmp_path / "run")
    with pytest.raises(ConfigError, match=r"(?s)place='logits'.*other experts would answer"):
        train(run_of(folder, corpus_file, "micro", through, steps=2), tmp_path / "other")


def test_biases_that_are_gone_or_of_another_model(biased, corpus_file, tmp_path):
    folder, biases = biased
    shutil.copytree(folder, tmp_path / "model")
    config = run_of(tmp_path / "model", corpus_file, through="lab")
    (tmp_path / "model" / FILE).unlink()
    with pytest.raises(DataError, match="as they were when the run was set up"):
        build(config)
    for other in ({"model.layers.0.mlp.gate": torch.ones(8)}, {name: bias_E[:4] for name, bias_E in biases.items()}):
        write_state({"biases": other}, tmp_path / "model" / FILE)
        for through in ("lab", "transformers"):
            with pytest.raises(DataError, match="of another training"):
                run_of(tmp_path / "model", corpus_file, through=through)


def test_the_folders_tokenizer_cuts_the_text(folders, corpus_file, tmp_path):
    run = run_of(folders["qwen3_moe"], corpus_file)
    data = heldout(run)
    tokenizer = load_tokenizer(data.tokenizer_path, given=True)
    assert max(len(one.ids) for one in tokenizer.encode_batch(["a b c d e f g h i j k l m n o p"])) > 8  # not cut off
    with open(corpus_file, encoding="utf-8") as file:
        documents = [json.loads(line)["text"] for line in file]
    for domain in data.domains:
        text = tokenizer.decode(data.train[domain][0].tolist(), skip_special_tokens=False)
        assert any(part and part in document for part in [text.partition("<|")[0]] for document in documents)
        targets = data.heldout[domain][:, 1:]
        exact = sum(len(tokenizer.decode(row.tolist()).encode()) for row in targets)
        assert data.heldout_bytes[domain] == pytest.approx(exact, rel=0.01)


def test_a_vocabulary_above_16_bits(folders, corpus_file, tmp_path):
    folder = tmp_path / "large"
    shutil.copytree(folders["qwen3_moe"], folder)
    made = json.loads((folder / "tokenizer.json").read_text())
    made["model"]["vocab"] |= {f"<none {i}>": i for i in range(300, 70_000)}
    made["added_tokens"].append({**made["added_tokens"][0], "id": 70_000, "content": "<end>"})
    (folder / "tokenizer.json").write_text(json.dumps(made))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<end>"}))
    given = given_tokenizer(str(folder))
    assert given.end >= 65_536
    data = prepare(corpus_file, sequence_length=32, tokenizer=given)
    assert data.train["code"].dtype == "uint32"
    assert (data.train["code"] == given.end).any()


def test_what_does_not_fit_is_said_at_once(folders, corpus_file, tmp_path):
    def of(folder, length=32, cls=RunConfig, **model):
        data = DataConfig(data=str(corpus_file), sequence_length=length)
        return adopt(cls(model=ModelConfig(folder=str(folder), **model), data=data))

    def changed(name, **settings):
        shutil.copytree(folders["qwen3_moe"], tmp_path / name)
        path = tmp_path / name / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | settings))
        return tmp_path / name

    dense = transformers.LlamaConfig(vocab_size=320, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
                                     num_attention_heads=2, max_position_embeddings=64)  # fmt: skip
    folder_of(transformers.LlamaForCausalLM(dense), tmp_path / "dense", corpus_file)
    for case, expected, said in [
        (lambda: of(tmp_path / "dense"), ConfigError, "it is dense"),
        (lambda: of(tmp_path), DataError, "config.json"),
        (lambda: of(folders["gpt_oss"], 128), ConfigError, r"data\.sequence_length=64"),
        (lambda: of(folders["qwen3_moe"], 128, CompareConfig), ConfigError, r"data\.sequence_length=64"),
        (lambda: of(changed("small", vocab_size=290)), ConfigError, "ids up to 299"),
        (lambda: of(folders["qwen3_moe"], experts=64), ConfigError, r"model\.experts = 64"),
        (lambda: of(folders["gpt_oss"], through="lab"), ConfigError, "gpt_oss"),
        (lambda: of(changed("unknown", model_type="no_such_model")), DataError, "AutoModelForCausalLM"),
    ]:
        with pytest.raises(expected, match=said):
            case()
    bare = folder_of(tiny("qwen3_moe"), tmp_path / "bare", None)
    with pytest.raises(DataError, match=r"copy tokenizer\.json"):
        of(bare)
    shutil.copyfile(folders["qwen3_moe"] / "tokenizer.json", bare / "tokenizer.json")
    for name in ("config.json", "generation_config.json"):
        settings = json.loads((bare / name).read_text())
        (bare / name).write_text(json.dumps(settings | {"eos_token_id": None}))
    with pytest.raises(DataError, match="eos_token"):
        of(bare)
    cut = changed("cut", num_hidden_layers=3)  # weights of a layer are missing: transformers would draw them
    with pytest.raises(DataError, match="missing"):
        of(cut, through="transformers")


def test_another_folder_is_noticed_on_resume(folders, corpus_file, tmp_path):
    shutil.copytree(folders["qwen3_moe"], tmp_path / "model")
    config = run_of(tmp_path / "model", corpus_file, through="lab")
    with pytest.raises(ZeroDivisionError):
        train(config, tmp_path / "run", on_step=lambda step: 1 / (3 - step.step))
    path = tmp_path / "model" / "generation_config.json"
    path.write_text(path.read_text() + " ")
    with pytest.raises(DataError, match="as it was when the run began"):
        train(config, tmp_path / "run", resume=True)


def test_bf16_and_recompute(folders, corpus_file, tmp_path):
    config = run_of(folders["deepseek_v3"], corpus_file, "loss-free", steps=1, eval_every=0)
    losses = {}
    for name, model, precision in [("plain", {}, "fp32"), ("narrow", {}, "bf16"),
                                   ("again", {"checkpointing": "reentrant"}, "fp32")]:  # fmt: skip
        from dataclasses import replace

        one = replace(config, model=replace(config.model, **model), train=replace(config.train, precision=precision))
        folder = train(one, tmp_path / name)
        losses[name] = read_run(folder).steps[0].loss, read_run(folder).loads[0].counts
        assert all(v.dtype == torch.float32 for v in weights(folder)["model"].values() if v.is_floating_point())
    assert losses["again"] == losses["plain"]
    assert losses["narrow"][0] == pytest.approx(losses["plain"][0], rel=0.02) and losses["narrow"] != losses["plain"]


def test_compare_on_the_command_line(folders, corpus_file, tmp_path, monkeypatch, capsys):
    """Workers of their own, the report, and the same command again."""
    monkeypatch.chdir(tmp_path)
    settings = ["data.sequence_length=32", "train.micro_batches=2", "train.eval_sequences=2", "train.warmup=1",
                "train.fidelity_every=0", "train.tensorboard=false", "train.eval_every=0", "train.checkpoint_every=0",
                "model.through=transformers"]  # fmt: skip
    command = ["compare", "--model", str(folders["gpt_oss"]), "--data", str(corpus_file), "--steps", "2",
               "--seeds", "1", "--out", "all", "--strategies", "micro,loss-free",
               *(f"--set={one}" for one in settings)]  # fmt: skip
    assert main(command) == 0
    assert (tmp_path / "all" / "report.html").exists()
    runs = [read_run(tmp_path / "all" / f"{name}-seed0") for name in ("micro", "loss-free")]
    assert runs[0].steps[0].loss == runs[1].steps[0].loss
    assert runs[0].header.config["train"]["lr"] == 3e-4
    assert "ExpertBias(rule='proportional', rate=0.0125" in runs[1].header.policies[0]
    assert set(runs[0].evaluations[0].loss) == {"code", "numbers", "prose"}
    capsys.readouterr()
    assert main([*command, "--experts", "4"]) == 2
    assert "model.experts = 4" in capsys.readouterr().err
