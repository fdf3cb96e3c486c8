"""The numbers of a comparison against sums made by hand, and that nothing is compared in silence."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest

from equipoise.errors import ConfigError
from equipoise.functional.metrics import maxvio_noise_floor
from equipoise.report import Comparison, load_runs
from equipoise.report.data.statistics import Difference
from equipoise.report.data.summarize import summarize, to_json
from equipoise.storage.run_record import RecordWriter, read_run
from unit.report.synthetic import DOMAINS, KINDS, header, write_run


def summary_of(*folders) -> Comparison:
    return summarize([read_run(folder) for folder in folders])


def gain(comparison: Comparison, name: str) -> Difference:
    """Its difference in perplexity from the baseline."""
    found = comparison[name].differences["perplexity"]
    assert found is not None
    return found


def test_the_baseline_comes_first_and_everything_is_there(comparison):
    assert [one.name for one in comparison.strategies] == ["micro", "global", "global+micro", "loss-free"]
    assert (comparison.baseline, comparison.step, comparison.domains) == ("micro", 150, DOMAINS)
    assert (comparison.warnings, comparison.problems) == ([], [])
    for one in comparison.strategies:
        known = {key: value for key, value in one.values.items() if key not in ("active_width", "experts_per_token")}
        assert all(value is not None and value.n == 2 for value in known.values()), one.name
        assert len(one.values) == len(known) + 2, "these two are of experts of unlike widths, and of top-p"
        assert bool(one.differences) == (one.name != "micro")
        assert [run.seed for run in one.runs] == [0, 1]


def test_values_are_what_the_records_say(comparison, folder):
    runs = [read_run(folder / f"global-s{seed}") for seed in (0, 1)]
    found = comparison["global"].values
    last = [run.evaluations[-1] for run in runs]
    losses = [sum(one.loss.values()) / len(one.loss) for one in last]
    assert found["perplexity"].mean == pytest.approx(math.exp(sum(losses) / 2))
    assert found["mutual_information"].by_seed == pytest.approx(
        {seed: sum(one.mutual_information) / 3 for seed, one in enumerate(last)}
    )
    quarter = [step.balance["balance/maxvio_global"] for step in runs[1].steps if step.step > 150 - 150 // 4]
    assert found["train_maxvio_global"].by_seed[1] == pytest.approx(sum(quarter) / len(quarter))
    assert found["dead_experts"].mean == sum(sum(one.dead_experts) for one in last) / 2
    seconds = sorted(step.seconds for step in runs[0].steps)
    assert found["seconds_per_step"].by_seed[0] == pytest.approx((seconds[74] + seconds[75]) / 2)
    bits = sum(one.bits_per_byte["cpp"] for one in last) / 2
    assert comparison["global"].domain_bits["cpp"].mean == pytest.approx(bits)


def test_differences_are_paired_by_seed(comparison, folder):
    loss = {
        (name, seed): read_run(folder / f"{name}-s{seed}").evaluations[-1].mean_loss
        for name in ("global", "micro")
        for seed in (0, 1)
    }
    by_hand = {seed: math.expm1(loss["global", seed] - loss["micro", seed]) for seed in (0, 1)}
    found = gain(comparison, "global")
    assert found.low is not None
    assert found.high is not None
    assert found.by_seed == pytest.approx(by_hand)
    assert found.low < found.mean < found.high < 0
    same = comparison["global"].domain_differences["json"]  # in the made-up runs all domains gain alike
    assert same.mean == pytest.approx(found.mean)


def test_the_noise_floor_is_the_library_s(comparison):
    floor = comparison.noise_floor
    assert floor["train_maxvio_global"] == pytest.approx(maxvio_noise_floor(8192, 2, 16))
    assert floor["train_maxvio_micro_batch"] == pytest.approx(maxvio_noise_floor(1024, 2, 16))
    assert floor["train_maxvio_sequence"] == pytest.approx(maxvio_noise_floor(256, 2, 16))
    assert floor["heldout_maxvio_global"] == pytest.approx(maxvio_noise_floor(6 * 16384, 2, 16))


def test_fidelity_says_which_estimator_was_trained_with(comparison, folder):
    records = [one for seed in (0, 1) for one in read_run(folder / f"global-s{seed}").fidelities]
    found = {one.name: one for one in comparison["global"].estimators}
    assert {name for name, one in found.items() if one.in_use} == {"prefix"}
    by_hand = sum(one.relative_error["ema"] for one in records) / len(records)
    assert (found["ema"].relative_error, found["ema"].n) == (pytest.approx(by_hand), len(records))


def test_another_corpus_is_never_compared(tmp_path):
    write_run(tmp_path / "a", header("micro", 0, steps=50))
    write_run(tmp_path / "b", header("global", 0, steps=50, corpus_sha256="ab" * 32))
    found = summary_of(tmp_path / "a", tmp_path / "b")
    assert "cannot be ranked" in found.headline
    assert found["global"].differences == {}
    assert any("corpus" in text and "abab" in text for text in found.warnings)


@pytest.mark.parametrize(
    ("table", "key", "value", "same_text"),
    [("train", "lr", 1e-3, True), ("model", "width", 64, True), ("model", "vocab_size", 512, False),
     ("data", "sequence_length", 128, False)],
)  # fmt: skip
def test_other_settings_are_said_aloud(tmp_path, table, key, value, same_text):
    write_run(tmp_path / "a", header("micro", 0, steps=50))
    other = header("global", 0, steps=50)
    config = {**other.config, table: {**other.config[table], key: value}}
    write_run(tmp_path / "b", replace(other, config=config))
    found = summary_of(tmp_path / "a", tmp_path / "b")
    assert any(f"{table}.{key}" in text and str(value) in text for text in found.warnings)
    assert bool(found["global"].differences) is same_text
    assert (f"{table}.{key}" if same_text else "cannot be ranked") in found.headline + found.quality


def test_settings_that_change_nothing_are_not_a_warning(tmp_path):
    write_run(tmp_path / "a", header("micro", 0, steps=50))
    other = header("global", 0, steps=50)
    quiet = {"checkpoint_every": 7, "threads": 2, "tensorboard": False}
    write_run(tmp_path / "b", replace(other, config={**other.config, "train": {**other.config["train"], **quiet}}))
    assert summary_of(tmp_path / "a", tmp_path / "b").warnings == []


def test_other_lengths_are_compared_where_both_were_evaluated(tmp_path):
    write_run(tmp_path / "a", header("micro", 0, steps=100))
    write_run(tmp_path / "b", header("global", 0, steps=150))
    found = summary_of(tmp_path / "a", tmp_path / "b")
    assert found.step == 100
    assert any("at step 100" in text for text in found.warnings)
    assert any("train.steps (100 | 150)" in text for text in found.warnings)
    assert found["global"].runs[0].seen_at == 100
    assert found["global"].runs[0].step == 150


def test_a_run_that_did_not_get_there_is_shown_but_not_compared(tmp_path):
    write_run(tmp_path / "a", header("micro", 0, steps=100))
    write_run(tmp_path / "b", header("global", 0, steps=100))
    write_run(tmp_path / "c", header("loss-free", 0, steps=100), until=60, end="failed")
    found = summary_of(*(tmp_path / name for name in "abc"))
    late = found["loss-free"]
    assert (found.step, late.compared, late.runs[0].status) == (100, False, "failed")
    assert late.values["perplexity"] is not None
    assert late.differences == {}
    assert any("loss-free was not evaluated at step 100" in text for text in found.warnings)
    assert any("failed at step 60: the loss is NaN" in text for text in found.problems)
    assert found.headline.startswith("The experts of global tell")
    assert "loss-free" not in found.headline + found.quality


def test_running_runs_are_compared_at_their_last_common_step(tmp_path):
    write_run(tmp_path / "a", header("micro", 0, steps=200), until=170, end="")
    write_run(tmp_path / "b", header("global", 0, steps=200), until=120, end="")
    found = summary_of(tmp_path / "a", tmp_path / "b")
    assert found.step == 100
    assert found["global"].runs[0].status == "running"
    assert gain(found, "global").n == 1


def test_one_name_with_two_settings_is_two_strategies(tmp_path):
    for number, lr in enumerate((1e-3, 3e-3)):
        head = header("global", 0, steps=50)
        config = {**head.config, "train": {**head.config["train"], "lr": lr}}
        write_run(tmp_path / str(number), replace(head, config=config))
    found = summary_of(tmp_path / "0", tmp_path / "1")
    assert [one.name for one in found.strategies] == ["global (lr=0.001)", "global (lr=0.003)"]
    assert any("train.lr" in text for text in found.warnings)


def test_a_repeated_seed_is_used_once(tmp_path):
    write_run(tmp_path / "a", header("micro", 0, steps=50), until=20, end="interrupted")
    write_run(tmp_path / "b", header("micro", 0, steps=50))
    found = summary_of(tmp_path / "a", tmp_path / "b")
    assert [run.path for run in found["micro"].runs] == [str(tmp_path / "b")]
    assert any("repeat a seed" in text for text in found.warnings)


def test_unequal_seeds_are_said_aloud_and_only_shared_ones_compared(tmp_path):
    for seed in (0, 1):
        write_run(tmp_path / f"m{seed}", header("micro", seed, steps=50))
    write_run(tmp_path / "g", header("global", 1, steps=50))
    found = summary_of(tmp_path / "m0", tmp_path / "m1", tmp_path / "g")
    assert list(gain(found, "global").by_seed) == [1]
    assert any("micro 0, 1; global 1" in text for text in found.warnings)


def test_records_of_the_wrong_shape_are_left_out_and_named(tmp_path):
    folder = write_run(tmp_path / "a", header("micro", 0, steps=50))
    good = read_run(folder)
    with RecordWriter(folder) as writer:
        writer.write(replace(good.evaluations[-1], step=51, counts=[[[1, 2]]]))
        writer.write(replace(good.evaluations[-1], step=51, loss={"python": 3.0}))
        writer.write(replace(good.loads[-1], counts=[[1, 2], [3]]))
    found = summary_of(folder)
    assert found.step == 50
    assert [text.split(":")[1].split("(")[0].strip() for text in found.problems] == ["2 evaluation", "1 load"]


def test_numbers_that_are_missing_stay_missing(tmp_path):
    folder = tmp_path / "bare"
    folder.mkdir()
    full = read_run(write_run(tmp_path / "full", header("micro", 0, steps=20)))
    with RecordWriter(folder) as writer:
        writer.write(replace(full.header, config={}))
        for step in full.steps:
            writer.write(replace(step, balance={}, loss=math.nan, seconds=0.0))
    found = summary_of(folder)
    assert all(value is None for value in found["micro"].values.values())
    assert found.step is None
    assert "no run has a held-out evaluation" in found.headline


def test_no_run_or_an_unknown_baseline_is_an_error(folder):
    with pytest.raises(ConfigError, match="at least one run"):
        summarize([])
    with pytest.raises(ConfigError, match="did you mean 'global'"):
        summarize(load_runs([folder])[0], baseline="globl")
    found = summarize(load_runs([folder])[0], baseline="global")
    assert found.strategies[0].name == "global"
    assert gain(found, "micro").mean > 0


def test_json_holds_the_numbers_and_only_what_json_knows(comparison):
    text = json.dumps(to_json(comparison), allow_nan=False)
    data = json.loads(text)
    assert [one["name"] for one in data["strategies"]] == [one.name for one in comparison.strategies]
    assert data["strategies"][1]["values"]["perplexity"]["mean"] == comparison["global"].values["perplexity"].mean
    assert set(KINDS) == {one["name"] for one in data["strategies"]}
    assert len(text) < 100_000


def test_the_difference_over_the_run_is_paired_and_has_its_interval(comparison, folder):
    curve = comparison["global"].charts.difference
    assert curve is not None
    assert curve.steps[-1] == comparison.step
    found = gain(comparison, "global")
    last = (curve.mean[-1], curve.low[-1], curve.high[-1])
    assert last == pytest.approx([100 * found.mean, 100 * found.low, 100 * found.high])
    assert comparison["micro"].charts.difference is None
    one = summarize([read_run(folder / f"{name}-s0") for name in ("micro", "global")])
    assert one["global"].charts.difference is None


def test_a_seed_that_did_not_get_there_is_said_aloud(tmp_path):
    for name in ("micro", "global"):
        for seed in (0, 1):
            write_run(tmp_path / f"{name}{seed}", header(name, seed, steps=100))
    write_run(tmp_path / "micro2", header("micro", 2, steps=100))
    write_run(tmp_path / "global2", header("global", 2, steps=100), until=60, end="interrupted")
    found = summary_of(*sorted(tmp_path.iterdir()))
    assert "global: seed 2 was not evaluated at step 100 and left out." in found.warnings
    difference, micro = gain(found, "global"), found["micro"].values["perplexity"]
    assert list(difference.by_seed) == [0, 1]
    assert micro is not None
    assert f"against micro ({math.sqrt(micro.by_seed[0] * micro.by_seed[1]):.1f}): " in found.quality


def test_what_the_balancer_saw_at_the_end_is_a_warning_where_most_seeds_show_it(tmp_path):
    """Two seeds of three in one strategy, one of three in the other; layers: the most of any."""
    shown = {("micro", 0): 2.0, ("micro", 2): 1.0, ("global", 1): 3.0}
    runs = []
    for strategy in ("micro", "global"):
        for seed in range(3):
            run = read_run(write_run(tmp_path / f"{strategy}-{seed}", header(strategy, seed, steps=20)))
            signals = {"balance/signals/outweighs": shown.get((strategy, seed), 0.0), "balance/signals/flat_gate": 0.0}
            steps = [*run.steps[:-1], replace(run.steps[-1], balance=run.steps[-1].balance | signals)]
            runs.append(replace(run, steps=steps))
    found = summarize(runs)
    (line,) = [line for line in found.warnings if "signal" in line]
    assert line.startswith("micro ended with the signal outweighs in 2 layers (2 of 3 seeds): docs/measures.md says")
    assert not any("signals" in name for name in found["micro"].charts.training)


def test_routing_that_still_changes_at_the_end_is_a_warning_where_most_seeds_show_it(tmp_path):
    """In the last evaluation alone; what an older record does not have warns of nothing."""
    shares = {
        "micro": ([], [0.5, 0.1, 0.5], [0.1, 0.6, 0.1]),
        "global": ([0.5], [], []),
        "loss-free": ([0.1, math.nan],),
    }
    runs = []
    for strategy, of_seeds in shares.items():
        for seed, churn in enumerate(of_seeds):
            run = read_run(write_run(tmp_path / f"{strategy}-{seed}", header(strategy, seed, steps=100)))
            early, last = replace(run.evaluations[0], routing_churn=[0.9] * 3), run.evaluations[-1]
            runs.append(replace(run, evaluations=[early, replace(last, routing_churn=churn)]))
    found = summarize(runs)
    (line,) = [line for line in found.warnings if "signal" in line]
    assert line.startswith("micro ended with the signal routing_churn in 2 layers (2 of 3 seeds): docs/measures.md")
    values = {one.name: one.values["routing_churn"] for one in found.strategies}
    assert values["micro"].mean == pytest.approx((1.1 / 3 + 0.8 / 3) / 2)
    assert found["micro"].layers["routing_churn"] == pytest.approx([0.3, 0.35, 0.3])


def unlike(folder, name: str, widths: list[int], **model: object):
    head = header(name, 0, steps=50, experts=4)
    config = head.config | {"model": head.config["model"] | {"expert_hidden": 10, "experts": 4} | model}
    return write_run(folder / name, replace(head, config=config, expert_widths=widths))


def test_which_widths_are_used_and_what_a_token_costs_by_that(tmp_path):
    widths = [4, 4, 12, 20]
    comparison = summary_of(unlike(tmp_path, "global", widths), unlike(tmp_path, "micro", []))
    one = read_run(tmp_path / "global").evaluations[-1]
    counts, tokens, layers = one.counts, sum(one.tokens.values()), len(one.counts[0])
    width = sum(c * h for of in counts for row in of for c, h in zip(row, widths, strict=True)) / (tokens * layers)
    found = comparison["global"]
    assert found.values["active_width"].mean == pytest.approx(width)
    loads: dict[int, list[float]] = {}
    for layer in range(layers):
        row = [sum(of[layer][e] for of in counts) for e in range(4)]
        for h, c in zip(widths, row, strict=True):
            loads.setdefault(h, []).append(c / (sum(row) / 4))
    assert found.load_by_width == pytest.approx({h: sum(of) / len(of) for h, of in loads.items()})
    assert comparison["micro"].load_by_width == {} and comparison["micro"].values["active_width"] is None
    assert json.dumps(to_json(comparison))


def test_with_top_p_chance_is_that_of_the_choices_that_are_made(tmp_path):
    few = summary_of(unlike(tmp_path / "few", "micro", [], top_p=0.6))
    run = read_run(tmp_path / "few" / "micro")
    one = run.evaluations[-1]
    choices = sum(c for of in one.counts for row in of for c in row) / (sum(one.tokens.values()) * len(one.counts[0]))
    assert few["micro"].values["experts_per_token"].mean == pytest.approx(choices)
    tokens = sum(one.tokens.values())
    assert few.noise_floor["heldout_maxvio_global"] == pytest.approx(maxvio_noise_floor(tokens, choices, 4), rel=1e-6)


def test_a_setting_that_came_later_is_no_difference_where_it_is_off(tmp_path):
    old, new = unlike(tmp_path, "micro", []), unlike(tmp_path, "global", [], top_p=0.0, expert_widths="")
    assert not any("differ in more" in line for line in summary_of(old, new).warnings)
    other = unlike(tmp_path, "loss-free", [1, 2, 3, 4], expert_widths="1:2:3:4")
    assert any("expert_widths" in line for line in summary_of(old, new, other).warnings)


def test_a_strategy_that_does_not_balance_yet_is_named(tmp_path):
    """Its experts may know domains well, and unlearn that while they become even."""
    runs = [read_run(write_run(tmp_path / name, header(name, 0))) for name in ("micro", "loss-free")]
    last = runs[1].evaluations[-1]
    skewed = [[[2 * sum(of_E)] + [0] * (len(of_E) - 1) for of_E in of_LE] for of_LE in last.counts]
    evaluations = [
        replace(one, counts=skewed, maxvio_global=[1.7] * len(one.maxvio_global)) for one in runs[1].evaluations
    ]
    said = [line for line in summarize([runs[0], replace(runs[1], evaluations=evaluations)]).warnings if "yet" in line]
    assert len(said) == 1 and said[0].startswith("loss-free has not balanced yet") and "2.7 times" in said[0]
