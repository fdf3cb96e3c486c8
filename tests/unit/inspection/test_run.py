"""An inspection as a whole: stopped and gone on with, against a second checkpoint, what its folder may hold."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import fields

import numpy as np
import pytest
import torch

from equipoise.errors import ConfigError, DataError, EquipoiseError, OutputError
from equipoise.inspection import Request, inspect
from equipoise.inspection.run import REQUEST_NAME
from equipoise.storage.inspection_record import Arrays, read_inspection
from integrations.hf._cases import quiet
from unit.inspection._folders import hooked, windows_of

LENGTH = 24


@pytest.fixture
def asked(folder_of, text):
    def make(family="qwen3_moe", **more):
        given = {"data": text, "tokens": 480, "length": LENGTH, "micro_batch": 2, "pass_tokens": 48, "device": "cpu"}
        return Request(folder_of(family), **given | more)

    return make


def assert_same(one, other):
    for field in fields(Arrays):
        np.testing.assert_array_equal(getattr(one.arrays, field.name), getattr(other.arrays, field.name))
    assert (one.layers, one.domains, one.strings) == (other.layers, other.domains, other.strings)


class Killed(Exception):
    pass


def test_stopped_after_any_round_it_goes_on_to_the_same_numbers(asked, tmp_path):
    whole = inspect(asked(), tmp_path / "whole")
    for at in (1, 5, 9):
        out = tmp_path / f"stopped{at}"

        def stop(done, rounds, tokens, at=at):
            if done == at:
                raise Killed  # after the sums of a round, before they are saved

        with pytest.raises(Killed):
            inspect(asked(), out, save_every=0.0, on_round=stop)
        with pytest.raises(DataError, match="goes on"):
            read_inspection(out)
        begun = []
        assert_same(inspect(asked(), out, on_round=lambda *now, begun=begun: begun.append(now)), whole)
        assert begun[0][0] == at  # the round that was lost, and none before it
        assert not (out / "state").exists()


def test_killed_it_goes_on_to_the_same_numbers(asked, folder_of, text, tmp_path):
    """SIGKILL to a real process as soon as something is saved."""
    whole, out = inspect(asked(), tmp_path / "whole"), tmp_path / "killed"
    program = (
        "import sys, time\nfrom pathlib import Path\nfrom equipoise.inspection import Request, inspect\n"
        "request = Request(Path(sys.argv[1]), data=Path(sys.argv[2]), tokens=480, length=24, micro_batch=2,"
        " pass_tokens=48, device='cpu')\n"
        "inspect(request, Path(sys.argv[3]), save_every=0.0, on_round=lambda *_: time.sleep(0.05))\n"
    )
    arguments = [sys.executable, "-c", program, str(folder_of("qwen3_moe")), str(text), str(out)]
    with subprocess.Popen(arguments, env=os.environ | {"OMP_NUM_THREADS": "1"}) as process:
        deadline = time.monotonic() + 120
        while not list((out / "state").glob("step_*[0-9]")) and time.monotonic() < deadline:
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
    assert not (out / "inspection.json").exists()
    assert list((out / "state").glob("step_*"))
    assert_same(inspect(asked(), out), whole)


def test_a_folder_holds_one_inspection(asked, tmp_path):
    first = inspect(asked(), tmp_path)
    again = inspect(asked(), tmp_path, on_round=lambda *_: pytest.fail("it was finished"))
    assert_same(first, again)
    with pytest.raises(OutputError, match="other settings: seed"):
        inspect(asked(seed=1), tmp_path)
    for wrong in ({"layers": "9"}, {"data": tmp_path / "none.jsonl"}, {"device": "nowhere"}):
        with pytest.raises(EquipoiseError):
            inspect(asked(**wrong), tmp_path, overwrite=True)
    assert_same(first, inspect(asked(), tmp_path, on_round=lambda *_: pytest.fail("it was finished")))
    other = inspect(asked(tokens=120), tmp_path, overwrite=True)
    assert other.facts.equal_windows == 5
    (tmp_path / REQUEST_NAME).unlink()
    with pytest.raises(OutputError, match="request is gone"):
        inspect(asked(), tmp_path)


def test_one_that_failed_before_it_counted_does_not_hold_its_folder(asked, tmp_path):
    with pytest.raises(ConfigError, match="windows of"):
        inspect(asked(length=100_000), tmp_path)
    with pytest.raises(DataError, match="none of nowhere"):
        inspect(asked(domains=("nowhere",)), tmp_path)
    assert inspect(asked(tokens=120), tmp_path).facts.equal_windows == 5
    with pytest.raises(OutputError, match="other settings: tokens"):
        inspect(asked(), tmp_path)


def test_a_damaged_state_says_so(asked, tmp_path):
    def stop(done, rounds, tokens):
        if done == 4:
            raise Killed

    with pytest.raises(Killed):
        inspect(asked(), tmp_path, save_every=0.0, on_round=stop)
    (file,) = (tmp_path / "state").glob("step_*/tensors.safetensors")
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(DataError, match="--overwrite"):
        inspect(asked(), tmp_path)
    inspect(asked(), tmp_path, overwrite=True)


def test_saturation_is_the_overlap_of_choices(asked, folder_of, text, tmp_path):
    found = inspect(asked(against=folder_of("qwen3_moe", seed=7)), tmp_path / "two")
    windows = [rows[: 480 // LENGTH] for rows in windows_of(text, LENGTH)]
    one, other = (hooked(folder_of("qwen3_moe", seed=seed), windows) for seed in (0, 7))
    for layer, said in enumerate(found.layers):
        shared, number, load = [0, 0, 0], [0, 0, 0], [[0] * said.num_experts for _ in range(2)]
        for a, b in zip(one, other, strict=True):
            shared[a["domain"]] += len(set(a["choices"][layer]) & set(b["choices"][layer]))
            number[a["domain"]] += 2
            for e in a["choices"][layer]:
                load[0][e] += 1
            for e in b["choices"][layer]:
                load[1][e] += 1
        share = [s / n for s, n in zip(shared, number, strict=True)]
        np.testing.assert_allclose(found.arrays.saturation_DL[:, layer], share)
        assert said.saturation == pytest.approx(np.mean(share))
        total = sum(load[0])
        assert said.saturation_chance == pytest.approx(2 * sum(a * b for a, b in zip(*load, strict=True)) / total**2)
        assert said.saturation_chance < said.saturation < 1
    with pytest.raises(ConfigError, match="another checkpoint"):
        inspect(asked(against=folder_of("dbrx")), tmp_path / "other")


def test_the_same_model_is_saturated(asked, folder_of, tmp_path):
    found = inspect(asked(against=folder_of("qwen3_moe")), tmp_path)
    assert [layer.saturation for layer in found.layers] == [1.0, 1.0]


def test_layers_are_chosen(asked, tmp_path):
    whole, last = inspect(asked(), tmp_path / "all"), inspect(asked(layers="-1"), tmp_path / "last")
    assert [layer.name for layer in last.layers] == [whole.layers[1].name]
    np.testing.assert_array_equal(last.arrays.counts_DLE[:, 0], whole.arrays.counts_DLE[:, 1])
    with pytest.raises(ConfigError, match="2 routers"):
        inspect(asked(layers="2"), tmp_path / "wrong")


def test_a_token_that_begins_a_text_is_read_and_not_counted(folder_of, text, tmp_path):
    from tokenizers import processors
    from transformers import AutoModel, AutoTokenizer

    folder = tmp_path / "model"
    shutil.copytree(folder_of("mixtral"), folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    tokenizer.save_pretrained(folder)
    found = inspect(Request(folder, data=text, tokens=48, length=24, device="cpu"), tmp_path / "out")
    assert sum(domain.tokens for domain in found.domains) == 3 * 48
    with quiet():
        model = AutoModel.from_pretrained(folder).eval()
    counts = np.zeros((3, 8), int)
    router = next(m for m in model.modules() if type(m).__name__ == "MixtralTopKRouter")
    got = []
    router.register_forward_hook(lambda _m, _a, out: got.append(out[2]))
    for d, rows in enumerate(windows_of(text, 24)):
        for ids in rows[:2]:
            with torch.no_grad():
                model(input_ids=torch.tensor([[1, *ids]]))
            counts[d] += np.bincount(got[-1][1:].reshape(-1).numpy(), minlength=8)
    np.testing.assert_array_equal(found.arrays.counts_DLE[:, 0], counts)


def test_what_is_saved_does_not_name_more_than_the_request(asked, tmp_path):
    inspect(asked(), tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir() if not p.name.startswith(".")) == [
        "arrays.npz", "inspection.json", "request.json",
    ]  # fmt: skip
    assert json.loads((tmp_path / REQUEST_NAME).read_text())["tokens"] == 480
