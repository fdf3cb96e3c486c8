"""An upcycling from a request to a folder: what it says of itself is true, and what is there is whole."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from equipoise.errors import ConfigError, DataError, OutputError
from equipoise.lab.data.packing import prepare
from equipoise.lab.data.tokenizer import given_tokenizer
from equipoise.lab.models.pretrained import quiet_transformers
from equipoise.lab.upcycling import Distillation, Request, Shape, read_result, shape_of, upcycle
from equipoise.lab.upcycling.run import REQUEST_NAME
from unit.lab.upcycling._dense import LAYERS, VOCABULARY, dense_folder, logits_of, settings_of

SHORT = Distillation("global", tokens=1024, passes=4, batch=4, lr=5e-3)


@pytest.fixture(scope="module")
def dense(corpus_file, tmp_path_factory):
    return dense_folder(tmp_path_factory.mktemp("dense"), "qwen3", corpus_file)


def distilled(dense, corpus_file, **more) -> Request:
    asked = {"shape": Shape(4, 2, 4), "data": corpus_file, "length": 32, "eval_sequences": 2, "distillation": SHORT}
    return Request(dense=dense, method="distill", **asked | more)


def loaded(folder):
    from transformers import AutoModelForCausalLM

    with quiet_transformers():
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def by_hand(folder, dense, corpus_file, sequences):
    """Held-out loss of each domain, window by window."""
    data = prepare(corpus_file, sequence_length=32, tokenizer=given_tokenizer(dense))
    model, found = loaded(folder), {}
    for name in data.domains:
        losses = []
        for row in data.heldout[name][:sequences]:
            ids_S = torch.from_numpy(row.astype("int64"))
            with torch.no_grad():
                logits_SV = model(input_ids=ids_S[None, :-1]).logits[0]
            losses.append(F.cross_entropy(logits_SV, ids_S[1:]).item())
        found[name] = sum(losses) / len(losses)
    return found


def test_copies_and_what_they_cost(dense, corpus_file, tmp_path):
    """Parameters against those of the loaded model, losses against windows by hand, noise that hardly matters."""
    out = tmp_path / "moe"
    found = upcycle(Request(dense=dense, text=True, data=corpus_file, length=32, eval_sequences=2), out)
    model = loaded(out)
    sizes = {name: one.numel() for name, one in model.named_parameters()}
    experts = sum(size for name, size in sizes.items() if ".experts." in name)
    assert found.parameters == sum(sizes.values())
    assert found.active_parameters == sum(sizes.values()) - experts * 6 // 8
    assert found.dense_parameters == sum(one.numel() for one in loaded(dense).parameters())
    assert found.dense_loss == pytest.approx(by_hand(dense, dense, corpus_file, 2), rel=1e-5)
    assert found.loss == pytest.approx(by_hand(out, dense, corpus_file, 2), rel=1e-5)
    assert found.loss == pytest.approx(found.dense_loss, rel=1e-2) and found.loss != found.dense_loss
    assert found.noise == 0.01 and found.seconds > 0
    assert not (out / REQUEST_NAME).exists() and not (out / ".lock").exists()
    assert repr(read_result(out / "upcycle.json")) == repr(found)  # NaN is not equal to itself


def test_tokenizer_and_generation_come_along(dense, tmp_path):
    from transformers import AutoTokenizer

    upcycle(Request(dense=dense), tmp_path / "moe")
    with quiet_transformers():
        theirs, ours = AutoTokenizer.from_pretrained(dense), AutoTokenizer.from_pretrained(tmp_path / "moe")
    assert theirs("a line = 1").input_ids == ours("a line = 1").input_ids
    with torch.no_grad():
        loaded(tmp_path / "moe").generate(torch.tensor([[5, 6, 7]]), max_new_tokens=3, do_sample=False)


def test_half_precision_stays(tmp_path):
    folder = dense_folder(tmp_path / "dense", "llama", dtype=torch.bfloat16)
    upcycle(Request(dense=folder, method="split", shape=shape_of("split"), noise=0.0), tmp_path / "moe")
    assert settings_of(tmp_path / "moe")["dtype"] == "bfloat16"
    ids_BS = torch.randint(VOCABULARY, (2, 20), generator=torch.Generator().manual_seed(1))
    moe, dense = logits_of(tmp_path / "moe", ids_BS, torch.float32), logits_of(folder, ids_BS, torch.float32)
    torch.testing.assert_close(moe, dense, rtol=0, atol=1e-5)  # twice a number is exact in bf16


def test_the_same_request_gives_the_same_files(dense, tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        upcycle(Request(dense=dense, seed=seed), tmp_path / name)
    layer = "model-00002-of-00004.safetensors"
    from safetensors.torch import load_file

    a, b, c = (load_file(tmp_path / name / layer) for name in "abc")
    assert all(a[key].equal(b[key]) for key in a)
    assert not a["model.layers.0.mlp.gate.weight"].equal(c["model.layers.0.mlp.gate.weight"])


def test_distilled_layers_go_into_the_model(dense, corpus_file, tmp_path):
    """The block in the folder misses what its report says, measured through the whole model of transformers."""
    told = []
    request = distilled(dense, corpus_file, layers="0,2", share=1.0)
    found = upcycle(request, tmp_path / "moe", on_layer=lambda *now: told.append(now))
    assert [one.moe for one in found.layers] == [True, False, True] and found.top_k == 2
    assert settings_of(tmp_path / "moe")["mlp_only_layers"] == [1]
    assert found.tokens == 1024 and found.loss and found.dense_loss
    assert any("step 32/32" in text for _, _, text in told) and told[-1][0] == LAYERS
    teacher, student = loaded(dense), loaded(tmp_path / "moe")
    data = prepare(corpus_file, sequence_length=32, tokenizer=given_tokenizer(dense))
    held = torch.cat([torch.from_numpy(data.heldout[name][:2, :-1].astype("int64")) for name in data.domains])
    for number in (0, 2):
        given: list[torch.Tensor] = []
        hook = teacher.model.layers[number].mlp.register_forward_pre_hook(
            lambda _, args, given=given: given.append(args[0])
        )
        with torch.no_grad():
            teacher(input_ids=held)
            hook.remove()
            wanted = teacher.model.layers[number].mlp(given[0])
            off = student.model.layers[number].mlp(given[0]) - wanted
        missed = (off.square().mean() / wanted.square().mean()).item()
        assert found.layers[number].error == pytest.approx(missed, rel=1e-3)
        assert found.layers[number].error < found.layers[number].error_before


def test_the_fewest_experts_that_keep_the_share(dense, corpus_file, tmp_path):
    found = upcycle(distilled(dense, corpus_file, shape=Shape(4, 3, 4), share=0.5), tmp_path / "moe")
    needs = [next(k for k, share in enumerate(one.shares, 1) if share >= 0.5) for one in found.layers]
    assert [one.top_k for one in found.layers] == needs
    assert found.top_k == max(needs) < 3 == settings_of(tmp_path / "moe")["num_experts_per_tok"] + 3 - max(needs)


def test_what_no_number_says_is_said(dense, tmp_path):
    found = upcycle(Request(dense=dense, method="split", shape=Shape(4, 2, 4)), tmp_path / "fine")
    assert "2 of 4 parts run" in found.notes[0]
    found = upcycle(Request(dense=dense, shape=Shape(4, 1, 1)), tmp_path / "one")
    assert "does not train the router" in found.notes[0]
    assert upcycle(Request(dense=dense), tmp_path / "plain").notes == []


def test_an_interrupted_one_goes_on(dense, corpus_file, tmp_path):
    """Stopped in the second layer: the first one's file stays as it is, and the whole is that of an unbroken run."""
    request = distilled(dense, corpus_file)
    upcycle(request, tmp_path / "whole")

    def stop(layer, layers, text):
        if layer == 1 and "step 2" in text:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        upcycle(request, tmp_path / "moe", on_layer=stop)
    first = tmp_path / "moe" / "model-00002-of-00004.safetensors"
    before = first.stat().st_mtime_ns, first.read_bytes()
    assert not (tmp_path / "moe" / "config.json").exists()
    with pytest.raises(OutputError, match="another seed"):
        upcycle(replace(request, seed=1), tmp_path / "moe")
    told = []
    upcycle(replace(request, device="cpu:0"), tmp_path / "moe", on_layer=lambda *now: told.append(now))
    assert (first.stat().st_mtime_ns, first.read_bytes()) == before
    assert not any(layer == 0 and "step" in text for layer, _, text in told)
    ids_BS = torch.arange(40).view(2, 20)
    assert logits_of(tmp_path / "moe", ids_BS).equal(logits_of(tmp_path / "whole", ids_BS))


def test_no_surprise_on_disk(dense, tmp_path):
    out = tmp_path / "mine"
    out.mkdir()
    (out / "thesis.tex").write_text("x")
    with pytest.raises(OutputError, match=r"thesis\.tex"):
        upcycle(Request(dense=dense), out)
    assert [path.name for path in out.iterdir()] == ["thesis.tex"]
    with pytest.raises(OutputError, match="a file"):
        upcycle(Request(dense=dense), out / "thesis.tex")
    upcycle(Request(dense=dense), tmp_path / "moe")
    with pytest.raises(OutputError, match="choose another folder"):  # it is finished
        upcycle(Request(dense=dense), tmp_path / "moe")


def test_the_text_is_part_of_the_request(dense, corpus_file, tmp_path):
    one, other = Request(dense=dense, text=True, data=corpus_file), Request(dense=dense)
    assert one.key() != other.key() and not other.key().keys() & {"dense", "data", "length", "device"}
    assert distilled(dense, corpus_file).key() != distilled(dense, corpus_file, share=0.9).key()
    assert replace(other, share=0.9).key() == other.key() == replace(other, device="cuda").key()
    settings = json.loads((dense / "config.json").read_text())
    (tmp_path / "d").mkdir()
    for path in dense.iterdir():
        (tmp_path / "d" / path.name).write_bytes(path.read_bytes())
    (tmp_path / "d" / "config.json").write_text(json.dumps(settings | {"rms_norm_eps": 1e-5}))
    assert replace(other, dense=tmp_path / "d").key() != other.key()


@pytest.mark.parametrize(
    ("more", "error", "said"),
    [
        ({"length": 65}, ConfigError, "--length of at most 64"),
        ({"device": "cuda:99"}, ConfigError, "leave --device out"),
        ({"layers": "3"}, ConfigError, "this model has 3 layers"),
        ({"shape": Shape(5, 5, 5)}, ConfigError, "granularity that divides"),
    ],
)
def test_what_does_not_fit_the_model(dense, corpus_file, tmp_path, more, error, said):
    with pytest.raises(error, match=said):
        upcycle(Request(dense=dense, text=True, data=corpus_file, **more), tmp_path / "moe")
    assert not (tmp_path / "moe").exists()


def test_without_a_tokenizer_or_silu(corpus_file, tmp_path):
    folder = dense_folder(tmp_path / "dense", "llama", hidden_act="gelu")
    upcycle(Request(dense=folder), tmp_path / "moe")  # which needs neither
    with pytest.raises(DataError, match=r"tokenizer\.json"):
        upcycle(Request(dense=folder, text=True, data=corpus_file), tmp_path / "other")
    upcycle(Request(dense=folder), tmp_path / "other")  # nothing had been written there
    with pytest.raises(ConfigError, match="experts with silu"):
        upcycle(distilled(folder, corpus_file), tmp_path / "third")


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: shape_of("copi"), "did you mean 'copy'"),
        (lambda: shape_of("copy", granularity=2), "take --method split"),
        (lambda: Request(dense=None, noise=-1.0), "--noise of 0 or more"),
        (lambda: Request(dense=None, noise=math.inf), "--noise of 0 or more"),
        (lambda: Request(dense=None, share=0.0), "--share above 0"),
        (lambda: Request(dense=None, eval_sequences=-1), "--eval-sequences of 0 or more"),
        (lambda: Request(dense=None, method="distill", shape=Shape(4, 1, 2)), "teaches a router nothing"),
    ],
)
def test_requests_that_cannot_be(make, said):
    with pytest.raises(ConfigError, match=said):
        make()
