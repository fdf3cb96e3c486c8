"""Questions made of held-out text: what is true of each, and what a guesser gets."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from equipoise.errors import ConfigError, DataError
from equipoise.evidence.downstream_tasks import OTHERS, SAME, TASKS, TaskSizes, make_questions, write_tasks
from equipoise.lab.data.packing import prepare
from equipoise.lab.data.tokenizer import END_ID, load_tokenizer

SIZES = TaskSizes(prefix=12, continuation=6, per_domain=1000)


@pytest.fixture(scope="module")
def data(corpus_file):
    return prepare(corpus_file, vocab_size=300, sequence_length=32)


@pytest.fixture(scope="module")
def tokenizer(data):
    return load_tokenizer(data.tokenizer_path)


@pytest.fixture(scope="module")
def made(data, tokenizer):
    return make_questions(data, tokenizer, SIZES)


@pytest.mark.parametrize("task", TASKS)
def test_the_true_continuation_follows_its_prefix_in_held_out_text(made, data, tokenizer, task):
    windows = {name: {tuple(row) for row in rows.tolist()} for name, rows in data.heldout.items()}
    for question in made[task]:
        ids = tokenizer.encode(question.prefix + question.choices[question.answer]).ids
        assert len(ids) == 18 and END_ID not in ids
        assert any(tuple(ids) == row[at : at + 18] for row in windows[question.domain] for at in range(len(row) - 17))


@pytest.mark.parametrize("task", TASKS)
def test_the_harness_cuts_every_choice_where_it_was_cut(made, tokenizer, task):
    for question in made[task]:
        prefix = tokenizer.encode(question.prefix).ids
        assert len(prefix) == 12 and question.prefix == question.prefix.rstrip()
        assert len(set(question.choices)) == 4
        for choice in question.choices:
            joined = tokenizer.encode(question.prefix + choice).ids
            assert joined[:12] == prefix and len(joined) == 18 and choice[0].isspace()


def test_wrong_choices_are_of_the_domain_or_of_three_others(made, data):
    true = {
        domain: {one.choices[one.answer] for task in TASKS for one in made[task] if one.domain == domain}
        for domain in data.domains
    }
    for task in TASKS:
        for question in made[task]:
            wrong = [choice for i, choice in enumerate(question.choices) if i != question.answer]
            homes = [{name for name in data.domains if choice in true[name]} for choice in wrong]
            assert all((question.domain in home) == (task == SAME) for home in homes)
            if task == OTHERS:  # as many other domains as there are: two here
                assert len(set.union(*homes)) == 2


def test_the_same_seed_asks_the_same_and_another_seed_other_wrong_choices(made, data, tokenizer):
    assert make_questions(data, tokenizer, SIZES) == made
    other = make_questions(data, tokenizer, replace(SIZES, seed=1))
    assert other != made
    assert [one.prefix for one in other[SAME]] == [one.prefix for one in made[SAME]]


@pytest.mark.parametrize("task", TASKS)
def test_who_does_not_read_the_prefix_guesses(made, task):
    """Length, alphabet or place say nothing: a quarter is right, within four standard errors."""
    rules = [lambda c: c, lambda c: c[::-1], len, lambda c: c.count(" ")]
    for rule in rules:
        shares = [max(question.choices, key=rule) == question.choices[question.answer] for question in made[task]]
        assert abs(sum(shares) / len(shares) - 0.25) < 4 * (0.25 * 0.75 / len(shares)) ** 0.5
    for place in range(4):
        share = sum(question.answer == place for question in made[task]) / len(made[task])
        assert abs(share - 0.25) < 4 * (0.25 * 0.75 / len(made[task])) ** 0.5


def test_so_many_questions_of_each_domain(data, tokenizer):
    for of_task in make_questions(data, tokenizer, replace(SIZES, per_domain=7)).values():
        assert [sum(one.domain == name for one in of_task) for name in data.domains] == [7, 7, 7]


def test_one_domain_has_one_task(corpus_file, tokenizer):
    alone = prepare(corpus_file, vocab_size=300, sequence_length=32, domains=["prose"])
    assert list(make_questions(alone, load_tokenizer(alone.tokenizer_path), SIZES)) == [SAME]


def test_sizes_that_cannot_work_are_refused(data, tokenizer):
    with pytest.raises(ConfigError, match="33 tokens together"):
        make_questions(data, tokenizer, replace(SIZES, prefix=30, continuation=4))
    for wrong in ({"prefix": 0}, {"continuation": 0}, {"per_domain": 3}):
        with pytest.raises(ConfigError, match="or more"):
            replace(SIZES, **wrong)


def test_text_without_a_place_to_ask_at_is_refused(data, tokenizer):
    rows = {name: rows * 0 + tokenizer.token_to_id("a") for name, rows in data.heldout.items()}
    with pytest.raises(DataError, match="places in the held-out text of"):
        make_questions(replace(data, heldout=rows), tokenizer, SIZES)


def test_text_that_repeats_itself_asks_nothing(data, tokenizer):
    ids = tokenizer.encode(" a b" * 33).ids[:33]
    rows = {name: rows[:8].copy() for name, rows in data.heldout.items()}
    rows["prose"][:] = ids
    made = make_questions(replace(data, heldout=rows), tokenizer, SIZES)
    assert not [one for one in made[SAME] if one.domain == "prose"]
    assert [one for one in made[SAME] if one.domain != "prose"]


def test_the_harness_files_hold_the_questions(made, tmp_path):
    yaml = pytest.importorskip("yaml", reason="PyYAML comes with transformers")
    write_tasks(tmp_path, made)
    for task in TASKS:
        settings = yaml.safe_load((tmp_path / f"{task}.yaml").read_text())
        lines = Path(settings["dataset_kwargs"]["data_files"]["test"]).read_text(encoding="utf-8").splitlines()
        assert [json.loads(line) for line in lines] == [one._asdict() for one in made[task]]
        fields = [settings[f"doc_to_{name}"] for name in ("text", "choice", "target")]
        assert set(fields) < set(json.loads(lines[0])) and settings["target_delimiter"] == ""
