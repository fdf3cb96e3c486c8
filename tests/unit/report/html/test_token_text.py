"""The text of inspections on the page: which passages, tokens and layers fit, and what is said of the rest."""

from __future__ import annotations

import re

from equipoise.report.data.inspections import name_inspections
from equipoise.report.html import token_text
from equipoise.report.html.page import render_html
from equipoise.report.html.token_text import left_out, passages_of, vocabulary_of
from unit.report.synthetic_inspection import synthetic_inspection


def test_passages_that_do_not_fit_are_said_to_be_missing(tmp_path):
    small, large = (synthetic_inspection(domains=2, layers=2, experts=16, top_k=8, passages=n, passage_length=128,
                                         model=f"m{n}") for n in (1, 400))  # fmt: skip
    assert "To keep the page small" not in render_html(None, [small])
    said = re.search(r"To keep the page small it has (\d+) of 800 passages of m400:", render_html(None, [small, large]))
    assert 2 < int(said[1]) < 800


def test_every_token_has_the_experts_of_the_record(inspections):
    (one,) = name_inspections(inspections[:1])
    page, arrays = passages_of(one, 1), inspections[0].arrays
    assert page["layers"] == [0, 1, 2]
    order = [int(n) for n in arrays.passage_domain_N.argsort(kind="stable")]
    first_of_each = order[::2] + order[1::2]  # two passages a domain
    for passage, n in zip(page["passages"], first_of_each, strict=True):
        assert passage["ids"] == arrays.passage_ids_NS[n].tolist()
        for layer, experts in enumerate(passage["experts"]):
            assert experts == arrays.passage_experts_NSLK[n, :, layer].ravel().tolist()
    assert left_out([one], [page]) == ""


def test_passages_go_first_then_tokens_then_layers(monkeypatch, inspections):
    (one,) = name_inspections(inspections[:1])
    whole = 8 * 64 * 3 * 2  # passages, tokens, layers, experts
    for most, kept in (
        (whole, (8, 64, 3)),
        (whole // 2, (4, 64, 3)),
        (whole // 4, (4, 32, 3)),
        (4 * 16 * 2, (4, 16, 1)),
    ):
        monkeypatch.setattr(token_text, "MOST_EXPERT_IDS", most)
        page = passages_of(one, 1)
        assert (len(page["passages"]), len(page["passages"][0]["ids"]), len(page["layers"])) == kept
        said = left_out([one], [page])
        assert ("4 of 8 passages" in said, f"{kept[1]} of 64 tokens" in said, "1 of 3 layers" in said) == (
            kept[0] < 8, kept[1] < 64, kept[2] < 3
        )  # fmt: skip


def test_the_vocabulary_of_an_expert_is_its_most_frequent_ids(inspections):
    (one,) = name_inspections(inspections[:1])
    page, arrays = vocabulary_of(one, 1), inspections[0].arrays
    load = arrays.counts_DLE.sum(0)[1, 5]
    for j, (token, of_load, of_id, domain, context) in enumerate(page["experts"][1][5]):
        assert token == arrays.top_ids_LEJ[1, 5, j]
        assert of_load == round(arrays.top_id_counts_LEJ[1, 5, j] / load, 4)
        assert of_id == round(arrays.top_id_counts_LEJ[1, 5, j] / arrays.top_id_seen_LEJ[1, 5, j], 4)
        assert domain == arrays.example_domain_LEJ[1, 5, j]
        assert context == arrays.examples_LEJC[1, 5, j, 3:14].tolist()
