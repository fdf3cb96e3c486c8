"""What the summary, the text and the page say of runs whose numbers are known; hostile names stay text."""

from __future__ import annotations

import math
from html.parser import HTMLParser

import numpy as np
import pytest

from equipoise import DataError
from equipoise.lab.diffusion.page import render_html, write_html
from equipoise.lab.diffusion.png import encode_png
from equipoise.lab.diffusion.summary import read_runs, summarize
from equipoise.lab.diffusion.text import render
from equipoise.report.data.statistics import t_quantile
from equipoise.storage.run_record import End, Evaluation, Header, RecordWriter, Step

LEVELS = ["0.25", "0.75"]
CONFIG = {"model": {"capacity": 1.0}, "train": {"images": 8}, "data": {"data": None}}


def record(
    root, strategy: str, seed: int, losses, *, counts=None, step=10, folder=None, end="finished", lr=None, data="c0ffee"
):
    """A run of 2 levels, 1 layer, 2 experts, 10 tokens a level."""
    path = root / (folder or f"{strategy}-seed{seed}".replace("/", "_").replace("<", "_"))
    path.mkdir()
    config = CONFIG if lr is None else CONFIG | {"train": {"images": 8, "lr": lr}}
    header = Header(
        strategy=strategy, policies=["a layer"], seed=seed, config=config, num_layers=1, num_experts=2, top_k=1,
        domains=LEVELS, corpus_sha256=data, versions={"torch": "1"}, parameters=2000, active_parameters=1500,
        started="2026", task="images",
    )  # fmt: skip
    with RecordWriter(path) as writer:
        writer.write(header)
        writer.write(Step(step, 1.0, 0.1, 1.0, 20, 0.5))
        if losses:
            writer.write(
                Evaluation(
                    step=step, loss=dict(zip(LEVELS, losses, strict=True)), bits_per_byte={},
                    tokens=dict.fromkeys(LEVELS, 10), counts=counts or [[[5, 5]], [[5, 5]]], topk_score=[[0.5], [0.5]],
                    maxvio_sequence=[0.5], maxvio_micro_batch=[0.25], maxvio_global=[0.0], dead_experts=[0],
                    mutual_information=[0.125], mutual_information_shuffled=[0.0],
                )
            )  # fmt: skip
        writer.write(End(step, end, 75.0, 20, 1, "out of luck" if end == "failed" else ""))
    return path


@pytest.fixture
def three(tmp_path):
    for seed, (base, treated) in enumerate(
        [((0.5, 0.3), (0.45, 0.26)), ((0.6, 0.3), (0.56, 0.25)), ((0.5, 0.2), (0.46, 0.15))]
    ):
        record(tmp_path, "sample", seed, base)
        record(tmp_path, "batch", seed, treated, counts=[[[2, 0]], [[8, 10]]])
    return tmp_path


def test_differences_are_paired_by_seed_at_every_level(three):
    compared = summarize(read_runs(three, ["sample", "batch"]))
    sample, batch = compared.strategies
    assert (compared.baseline, compared.levels, compared.step) == ("sample", [0.25, 0.75], 10)
    assert sample.difference is None and sample.loss.mean == pytest.approx(0.4)
    by_seed = [-0.045, -0.045, -0.045]
    assert batch.difference.mean == pytest.approx(np.mean(by_seed))
    first, second = batch.level_differences
    values = [-0.05, -0.04, -0.04]
    half = t_quantile(2) * np.std(values, ddof=1) / math.sqrt(3)
    assert (first.mean, first.low, first.high) == pytest.approx(
        (np.mean(values), np.mean(values) - half, np.mean(values) + half)
    )
    assert second.mean == pytest.approx(-0.14 / 3)
    assert "batch lower, -0.0450" in compared.headline


def test_who_computes_which_level(three):
    batch = summarize(read_runs(three, ["sample", "batch"])).strategies[1]
    assert batch.experts_per_token == pytest.approx([0.2, 1.8])
    assert np.asarray(batch.share).tolist() == [[[0.4, 0.0], [1.6, 2.0]]], (
        "over the even share, half of a level's tokens"
    )


def test_another_baseline_and_one_seed_without_an_interval(tmp_path):
    record(tmp_path, "global", 0, (0.5, 0.3))
    record(tmp_path, "batch", 0, (0.4, 0.3))
    compared = summarize(read_runs(tmp_path), "batch")
    assert compared.baseline == "batch"
    assert {one.name: one.difference and one.difference.low for one in compared.strategies} == {
        "batch": None,
        "global": None,
    }
    assert "global not told apart" in compared.headline


def test_runs_that_are_not_comparable_are_named(three):
    record(three, "dense", 0, (0.1, 0.1), step=5)
    record(three, "micro", 0, None, end="failed")
    compared = summarize(read_runs(three))
    assert [one.name for one in compared.strategies] == ["batch", "sample"]
    told = "\n".join(compared.problems)
    assert "dense-seed0: at step 5, not compared" in told
    assert "micro-seed0: not evaluated" in told and "micro-seed0: failed, out of luck" in told


def test_runs_of_other_settings_or_data_are_not_paired_without_a_word(tmp_path, three):
    assert summarize(read_runs(three)).problems == []
    record(tmp_path, "micro", 0, (0.4, 0.3), lr=0.5)
    (said,) = summarize(read_runs(tmp_path)).problems
    assert "the runs differ in train.lr, not in the strategy alone" in said and "0.5" in said
    record(tmp_path, "global", 0, (0.4, 0.3), data="decaf")
    assert any("2 different data sets" in text for text in summarize(read_runs(tmp_path)).problems)


def test_where_there_is_nothing_to_compare(tmp_path):
    with pytest.raises(DataError, match="runs of images in"):
        read_runs(tmp_path)
    record(tmp_path, "micro", 0, None, end="failed")
    with pytest.raises(DataError, match="a run that was evaluated"):
        summarize(read_runs(tmp_path))


def test_text_has_80_columns_and_all_numbers(three):
    for name in ("samples:8", "global@0.0123+micro@1e-4", "dense", "loss-free"):
        record(three, name, 0, (0.7, 0.7))
    said = render(summarize(read_runs(three, ["sample", "batch"])))
    assert max(map(len, said.splitlines())) <= 80
    for part in ("0.4000", "-0.0450 [-0.0450, -0.0450]", "0.125", "1.80", "samples:8"):
        assert part in said


class Elements(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict]] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))


def test_the_page_holds_everything_and_loads_nothing(three, tmp_path_factory):
    png = encode_png(np.zeros((9, 9, 1), dtype=np.uint8))
    (three / "batch-seed0" / "samples.png").write_bytes(png)
    (three / "sample-seed0" / "samples.png").write_bytes(b"half a file")
    compared = summarize(read_runs(three, ["sample", "batch"]))
    page = tmp_path_factory.mktemp("page") / "new" / "report.html"
    write_html(compared, page)
    text = page.read_text(encoding="utf-8")
    assert text == render_html(compared), "equal runs give equal bytes"
    elements = Elements(text).found
    assert not [tag for tag, _ in elements if tag in ("script", "link", "iframe")]
    sources = [attributes["src"] for _, attributes in elements if "src" in attributes]
    assert len(sources) == 1 and sources[0].startswith("data:image/png;base64,")
    links = [attributes["href"] for _, attributes in elements if "href" in attributes]
    assert links and all(link.startswith("#") for link in links)
    pictures = [attributes["aria-label"] for tag, attributes in elements if tag == "svg"]
    assert pictures[:2] == ["errors by noise level", "Difference from sample by noise level"]
    assert sum("noise levels that each of 2 experts takes" in one for one in pictures) == 2
    for part in ("0.4000", "−0.0450", "c0ffee", "1 min 15 s"):
        assert part in text


def test_a_map_s_shades_are_the_shares(three):
    text = render_html(summarize(read_runs(three, ["batch"]), "batch"))
    batch = text[text.index("which experts") if "which experts" in text else 0 :]
    shades = [
        attributes for tag, attributes in Elements(batch).found if tag == "path" and "shade" in attributes["class"]
    ]
    kinds = {attributes["class"]: attributes["d"].count("M") for attributes in shades}
    # batch: 0.4, 0, 1.6 and 2 of the even share; sample: four times 1
    assert kinds == {"shade0": 1, "shade2": 1, "shade6": 1, "shade8": 1, "shade4": 4}


def test_a_hostile_name_stays_text(tmp_path):
    name = '"><script>alert(1)</script>'
    record(tmp_path, name, 0, (0.5, 0.3), folder="a")
    record(tmp_path, "sample", 0, (0.5, 0.3))
    text = render_html(summarize(read_runs(tmp_path)))
    assert not [tag for tag, _ in Elements(text).found if tag in ("script", "img")]
    assert "&lt;script&gt;" in text
