"""A trained run becomes a folder that transformers loads without us, and a folder becomes the lab's model again."""

from __future__ import annotations

import json
import os
import resource

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from equipoise.cli import main
from equipoise.errors import ConfigError, DataError, OutputError
from equipoise.lab.config.schema import DataConfig, ModelConfig, RunConfig, TrainConfig
from equipoise.lab.config.strategies import strategy_of
from equipoise.lab.data.tokenizer import load_tokenizer
from equipoise.lab.models.hf_export import export_run
from equipoise.lab.models.hf_files import read_weights
from equipoise.lab.models.hf_weights import architecture, join_experts, model_config, split_experts
from equipoise.lab.models.pretrained import adopt, build
from equipoise.lab.models.transformer import LanguageModel
from equipoise.lab.training.trainer import train
from equipoise.storage import checkpoint
from equipoise.storage.run_record import read_run
from unit.lab.models._given import folder_of

pytestmark = pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
transformers = pytest.importorskip("transformers")
TEXTS = ["def f(x): return 12", "the cat\n\n  sat  on <|endoftext|>", "Ünïcode 漢字 🙂", ""]
SHAPES = {
    "softmax": ("global", {}),
    "softmax, tied, grouped queries": ("micro", {"tie_embeddings": True, "kv_heads": 1, "normalize_weights": False}),
    "sigmoid, bias, shared, groups": ("loss-free", {"shared_experts": 1, "num_groups": 4, "top_groups": 2,
                                                    "weight_scale": 2.5}),
    "sigmoid, none shared": ("micro:sigmoid", {}),
}  # fmt: skip


def spread_weights(folder) -> LanguageModel:
    """The run's last checkpoint with weights (norms and biases too) far from what one step made of them."""
    config = RunConfig(**{"model": ModelConfig(), **_config(folder)})
    model = LanguageModel(strategy_of(config).apply(config.model))
    step, state = checkpoint.load_latest(folder / "checkpoints")
    draw = torch.Generator().manual_seed(1)
    for key, value in state["model"].items():
        bias = key.endswith("expert_bias")
        std = 0.2 if bias else 0.3 if value.dim() == 1 else value.shape[-1] ** -0.5
        value.normal_(1.0 if value.dim() == 1 and not bias else 0.0, std, generator=draw)
    if config.model.tie_embeddings:
        state["model"]["lm_head.weight"].copy_(state["model"]["model.embed_tokens.weight"])
    checkpoint.save(folder / "checkpoints", step, state)
    model.load_state_dict(state["model"])
    return model.eval()


def _config(folder) -> dict:
    from equipoise.lab.config.schema import from_dict

    found = from_dict(RunConfig, read_run(folder).header.config)
    return {name: getattr(found, name) for name in ("model", "data", "train", "strategy", "policies")}


def tokens() -> torch.Tensor:
    return torch.randint(0, 300, (2, 30), generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="module")
def one_run(tmp_path_factory, corpus_file):
    """A run of three evaluated checkpoints, of which the newest two are kept."""
    model = ModelConfig(layers=1, width=16, heads=2, head_dim=8, experts=4, expert_hidden=8, vocab_size=300)
    short = TrainConfig(steps=6, micro_batches=2, warmup=1, eval_every=2, eval_sequences=2, checkpoint_every=2,
                        load_every=0, fidelity_every=0, tensorboard=False)  # fmt: skip
    data = DataConfig(data=str(corpus_file), sequence_length=16)
    return train(RunConfig(model=model, data=data, train=short), tmp_path_factory.mktemp("runs") / "run")


@pytest.mark.parametrize(("strategy", "options"), SHAPES.values(), ids=SHAPES.keys())
def test_transformers_computes_what_the_lab_computes(tiny_run, tmp_path, strategy, options, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    run = train(tiny_run(strategy, steps=1, fidelity_every=0, model=options), tmp_path / "run")
    ours = spread_weights(run)
    done = export_run(run, tmp_path / "out")
    assert (done.step, done.architecture) == (1, "Qwen3MoeForCausalLM" if "softmax" in ours.config.gate else
                                              "Dots1ForCausalLM")  # fmt: skip

    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert type(theirs).__name__ == done.architecture and theirs.dtype == torch.float32
    with torch.no_grad():
        logits = ours(tokens())
        torch.testing.assert_close(theirs.eval()(tokens()).logits, logits, rtol=0, atol=1e-5)
    assert logits.std() > 0.5  # the comparison is about something

    words = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    own = load_tokenizer(run / "tokenizer.json")
    for text in [t for t in TEXTS if "<|" not in t]:
        assert words(text).input_ids == own.encode(text, add_special_tokens=False).ids
        assert words.decode(words(text).input_ids) == text
    assert words.eos_token_id == words.bos_token_id == words.pad_token_id == words("<|endoftext|>").input_ids[0] == 0
    asked = words(["the a of", "x"], return_tensors="pt", padding=True, padding_side="left")
    said = theirs.generate(**asked, max_new_tokens=8, do_sample=False)
    assert said.shape == (2, asked.input_ids.shape[1] + 8) or (said[:, -1] == 0).all()
    assert all(isinstance(line, str) for line in words.batch_decode(said))

    folder_of(theirs, tmp_path / "again", None)  # the file has the keys, shapes and values that transformers writes
    files = [safe_open(tmp_path / name / "model.safetensors", "pt") for name in ("out", "again")]
    assert set(files[0].keys()) == set(files[1].keys())
    assert all(torch.equal(files[0].get_tensor(key), files[1].get_tensor(key)) for key in files[1].keys())  # noqa: SIM118

    for name in ("out", "again"):  # and back
        there = RunConfig(model=ModelConfig(folder=str(tmp_path / name)), data=DataConfig(sequence_length=16))
        if name == "again":
            for file in ("tokenizer.json", "tokenizer_config.json"):
                (tmp_path / name / file).write_bytes((tmp_path / "out" / file).read_bytes())
        adopted = adopt(there)
        assert adopted.model.through == "lab"
        with torch.no_grad():
            assert torch.equal(build(adopted).eval()(tokens()), logits)


def test_experts_in_one_tensor_or_each_its_own(one_run, tmp_path):
    """Both layouts of a file are read; splitting and joining are inverses."""
    export_run(one_run, tmp_path / "out")
    single = load_file(tmp_path / "out" / "model.safetensors")
    joined = join_experts(single)
    assert sum("experts.gate_up_proj" in key for key in joined) == 1 < sum("gate_proj" in key for key in single)
    again = split_experts(joined)
    assert again.keys() == single.keys() and all(torch.equal(again[key], single[key]) for key in single)
    assert join_experts(joined).keys() == joined.keys()
    here = [
        build(adopt(RunConfig(model=ModelConfig(folder=str(tmp_path / "out")), data=DataConfig(sequence_length=16))))
    ]
    os.remove(tmp_path / "out" / "model.safetensors")
    names = sorted(joined)  # two shards and an index, as large models are saved
    for number, some in enumerate((names[::2], names[1::2])):
        save_file({key: joined[key] for key in some}, tmp_path / "out" / f"model-{number}.safetensors")
    index = {"weight_map": {key: f"model-{i % 2}.safetensors" for i, key in enumerate(names)}}
    (tmp_path / "out" / "model.safetensors.index.json").write_text(json.dumps(index))
    here.append(
        build(adopt(RunConfig(model=ModelConfig(folder=str(tmp_path / "out")), data=DataConfig(sequence_length=16))))
    )
    assert torch.equal(here[0](tokens()), here[1](tokens()))


def test_which_checkpoint(one_run, tmp_path, capsys):
    losses = {one.step: one.mean_loss for one in read_run(one_run).evaluations if one.step > 2}
    assert export_run(one_run, tmp_path / "last").step == 6
    assert export_run(one_run, tmp_path / "best", which="best").step == min(losses, key=lambda step: losses[step])
    assert main(["export", str(one_run), str(tmp_path / "four"), "--step", "4"]) == 0
    assert "Qwen3MoeForCausalLM, step 4" in capsys.readouterr().out
    four = checkpoint.load(one_run / "checkpoints", 4)[1]["model"]["lm_head.weight"]
    assert torch.equal(read_weights(tmp_path / "four")["lm_head.weight"], four)
    with pytest.raises(DataError, match=r"step 2.*\n.*6, 4"):
        export_run(one_run, tmp_path / "two", which=2)
    assert main(["export", str(one_run), str(tmp_path / "x"), "--checkpoint", "newest"]) == 2
    assert main(["export", str(tmp_path), str(tmp_path / "x")]) == 4
    assert not (tmp_path / "x").exists() and not (tmp_path / "two").exists()


def test_a_folder_is_replaced_only_when_told_and_only_if_it_is_one(one_run, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    export_run(one_run, out)  # an empty one is as good as none
    (out / "config.json").write_text("old")
    with pytest.raises(OutputError, match="--force"):
        export_run(one_run, out)
    assert (out / "config.json").read_text() == "old"
    export_run(one_run, out, force=True)
    assert json.loads((out / "config.json").read_text())["model_type"] == "qwen3_moe"
    (out / "thesis.txt").write_text("years")
    with pytest.raises(OutputError, match=r"thesis\.txt"):
        export_run(one_run, out, force=True)
    (tmp_path / "file").write_text("mine")
    with pytest.raises(OutputError, match="a file"):
        export_run(one_run, tmp_path / "file", force=True)
    assert (out / "thesis.txt").read_text() == "years"


@pytest.mark.parametrize("limit", [300, 4000])
def test_a_full_disk_leaves_nothing(one_run, tmp_path, limit):
    (tmp_path / "here").mkdir()
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))  # the process ignores SIGXFSZ: python sees EFBIG
    try:
        with pytest.raises(OutputError, match="free disk space"):
            export_run(one_run, tmp_path / "here" / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert list((tmp_path / "here").iterdir()) == []


def test_a_run_without_its_tokenizer_or_class_is_refused(tiny_run, one_run, tmp_path, monkeypatch):
    softmax_bias = train(tiny_run("loss-free:softmax:proportional@1e-3", steps=1), tmp_path / "run")
    with pytest.raises(ConfigError, match="a Hugging Face architecture"):
        export_run(softmax_bias, tmp_path / "out")
    (softmax_bias / "tokenizer.json").rename(tmp_path / "gone")
    monkeypatch.setenv("EQUIPOISE_CACHE", str(tmp_path / "empty"))
    sigmoid = train(tiny_run("loss-free", steps=1), tmp_path / "other")
    (sigmoid / "tokenizer.json").unlink()
    monkeypatch.setenv("EQUIPOISE_CACHE", str(tmp_path / "emptied"))
    with pytest.raises(DataError, match="tokenizer"):
        export_run(sigmoid, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_only_what_the_lab_computes_is_taken_over():
    qwen = transformers.Qwen3MoeConfig(head_dim=32, tie_word_embeddings=False).to_dict()
    assert model_config(qwen, "a").top_k == qwen["num_experts_per_tok"]
    before_5 = {**qwen, "rope_theta": 1e6, "rope_scaling": None, "num_experts": 128}
    del before_5["rope_parameters"], before_5["num_local_experts"]
    assert model_config(before_5, "a").rope_theta == 1e6
    for change, named in [
        ({"mlp_only_layers": [0]}, "mlp_only_layers"),
        ({"attention_bias": True}, "attention_bias"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"use_sliding_window": True}, "use_sliding_window"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0}}, "yarn"),
        ({"quantization_config": {"quant_method": "fp8"}}, "quantized"),
        ({"model_type": "qwen2_moe"}, "qwen2_moe"),
    ]:
        with pytest.raises(ConfigError, match=named):
            model_config(qwen | change, "a")
    dots = transformers.Dots1Config(n_routed_experts=8, n_shared_experts=1, num_experts_per_tok=2, n_group=1,
                                    topk_group=1, first_k_dense_replace=0, sliding_window=None).to_dict()  # fmt: skip
    assert model_config(dots, "a").selection_bias
    for change in ({"first_k_dense_replace": 3}, {"sliding_window": 64, "layer_types": ["sliding_attention"]}):
        with pytest.raises(ConfigError, match=next(iter(change))):
            model_config(dots | change, "a")


@pytest.mark.parametrize(
    "settings", [{"expert_widths": "arithmetic"}, {"top_p": 0.6, "normalize_weights": False}], ids=["widths", "top-p"]
)
def test_unlike_experts_have_no_class(settings):
    with pytest.raises(ConfigError, match="experts of one width, and as many for every token"):
        architecture(ModelConfig(**settings))


def test_weights_that_do_not_fit_are_refused(one_run, tmp_path):
    export_run(one_run, tmp_path / "out")
    config = adopt(RunConfig(model=ModelConfig(folder=str(tmp_path / "out")), data=DataConfig(sequence_length=16)))
    weights = load_file(tmp_path / "out" / "model.safetensors")
    del weights["model.norm.weight"]
    save_file(weights, tmp_path / "out" / "model.safetensors")
    with pytest.raises(DataError, match=r"model\.norm\.weight"):
        build(config)
    (tmp_path / "out" / "model.safetensors").write_bytes(b"half")
    with pytest.raises(DataError, match="weights in"):
        build(config)
