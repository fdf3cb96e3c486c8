"""Every number of an inspection against loops over tokens, on real models of families with different routers."""

from __future__ import annotations

import math

import numpy as np
import pytest

from equipoise.inspection import Request, inspect
from equipoise.inspection.results import ALIKE, _pairs
from unit.inspection import _naive
from unit.inspection._folders import hooked, windows_of

# a softmax over all, a sigmoid with a bias, experts chosen by a block, encoder and decoder with dropped tokens
FAMILIES = ["qwen3_moe", "deepseek_v3", "dbrx", "switch_transformers"]
TOKENS, LENGTH, BATCH, PASS = 480, 24, 2, 24 * 4  # digits have 17 windows: neither a whole batch nor pass at their end


@pytest.fixture(scope="module", params=FAMILIES)
def case(request, folder_of, tmp_path_factory, text):
    folder = folder_of(request.param)
    asked = Request(folder, data=text, tokens=TOKENS, length=LENGTH, micro_batch=BATCH, pass_tokens=PASS, device="cpu")
    found = inspect(asked, tmp_path_factory.mktemp("out"))
    windows = [rows[: TOKENS // LENGTH] for rows in windows_of(text, LENGTH)]
    return found, hooked(folder, windows), windows


def naive(case, layer):
    found, tokens, windows = case
    one = found.layers[layer]
    return one, _naive.measures(
        tokens, layer, experts=one.num_experts, top_k=one.top_k, micro_batch=BATCH, equal=min(map(len, windows)),
        tracked=sorted({t["id"] for t in tokens}),
    )  # fmt: skip


def test_all_numbers_are_those_of_the_loops(case):
    found, _, windows = case
    arrays = found.arrays
    assert [domain.name for domain in found.domains] == ["digits", "letters", "signs"]
    assert [domain.windows for domain in found.domains] == [len(rows) for rows in windows]
    assert found.facts.equal_windows == min(map(len, windows)) == 17
    assert found.facts.tracked_share == 1.0
    for layer in range(len(found.layers)):
        one, want = naive(case, layer)
        near = pytest.approx
        np.testing.assert_array_equal(arrays.counts_DLE[:, layer], want["counts"])
        np.testing.assert_array_equal(arrays.equal_counts_DLE[:, layer], want["equal_counts"])
        np.testing.assert_array_equal(arrays.coactivation_LEE[layer], want["pairs"])
        np.testing.assert_allclose(arrays.entropy_DL[:, layer], want["entropy"], rtol=1e-5)
        np.testing.assert_allclose(arrays.topk_score_DL[:, layer], want["score"], rtol=1e-5)
        np.testing.assert_allclose(arrays.probs_DLE[:, layer], want["mean_probs"], rtol=1e-4, atol=1e-7)
        np.testing.assert_allclose(arrays.maxvio_sequence_DL[:, layer], want["maxvio_sequence"], rtol=1e-9)
        np.testing.assert_allclose(arrays.maxvio_micro_batch_DL[:, layer], want["maxvio_micro_batch"], rtol=1e-9)
        np.testing.assert_allclose(arrays.routing_similarity_LEE[layer], want["correlation"], atol=2e-3)
        assert one.maxvio_sequence == near(np.mean(want["maxvio_sequence"]))
        assert one.maxvio_micro_batch == near(np.mean(want["maxvio_micro_batch"]))
        assert one.maxvio_global == near(want["maxvio_global"])
        assert one.information == near(want["information"], abs=1e-12)
        assert one.information_corrected == near(max(0.0, want["information"] - want["bias"]), abs=1e-12)
        assert one.entropy_token == near(np.mean(want["entropy"]), rel=1e-5)
        assert one.entropy_mean == near(want["entropy_mean"], rel=1e-5)
        assert one.topk_score == near(np.mean(want["score"]), rel=1e-5)
        assert one.id_share == near(want["id_share"])
        assert one.id_share_chance == near(want["id_share_chance"])
        assert (one.dead, one.idle) == (want["dead"], want["idle"])
        assert 0 <= one.information_shuffled <= one.information_shuffled_high <= math.log(3)


def test_token_ids_of_an_expert(case):
    """The ids that give an expert most of its load, in order; ties may stand in any."""
    found, *_ = case
    for layer in range(len(found.layers)):
        one, want = naive(case, layer)
        for e in range(one.num_experts):
            counts = sorted((c[e] for c in want["by_id"].values()), reverse=True)[: found.arrays.top_ids_LEJ.shape[-1]]
            ids, got = found.arrays.top_ids_LEJ[layer, e], found.arrays.top_id_counts_LEJ[layer, e]
            assert got.tolist() == counts + [0] * (len(got) - len(counts))
            for i, count, seen in zip(ids, got, found.arrays.top_id_seen_LEJ[layer, e], strict=True):
                assert (i == -1) == (count == 0)
                if i >= 0:
                    assert want["by_id"][int(i)][e] == count and want["seen"][int(i)] == seen
                    assert found.strings[int(i)]


def test_examples_and_passages_are_tokens_that_chose(case):
    found, tokens, windows = case
    at = {(t["domain"], t["window"], t["position"]): t for t in tokens}
    for layer in range(len(found.layers)):
        one = found.layers[layer]
        for e in range(one.num_experts):
            shown = found.arrays.examples_LEJC[layer, e]
            domains = found.arrays.example_domain_LEJ[layer, e]
            assert (domains >= 0).any() == any(e in t["choices"][layer] for t in tokens)
            for context, domain in zip(shown, domains, strict=True):
                if domain < 0:
                    assert (context == -1).all()
                    continue
                places = [
                    t for t in tokens
                    if t["domain"] == domain and e in t["choices"][layer]
                    and around(windows[domain][t["window"]], t["position"]) == context.tolist()
                ]  # fmt: skip
                assert places
    for n, (domain, ids) in enumerate(zip(found.arrays.passage_domain_N, found.arrays.passage_ids_NS, strict=True)):
        window = n - found.arrays.passage_domain_N.tolist().index(domain)
        assert ids.tolist() == windows[domain][window]
        for position in range(len(ids)):
            for layer in range(len(found.layers)):
                t = at[int(domain), window, position]
                one = found.layers[layer]
                p = _naive.probabilities(t["logits"][layer], t["gate"][layer])
                got = found.arrays.passage_experts_NSLK[n, position, layer, : one.top_k].tolist()
                assert sorted(got) == sorted(t["choices"][layer])
                assert [p[e] for e in got] == sorted((p[e] for e in got), reverse=True)


def around(ids, position):
    return [ids[i] if 0 <= i < len(ids) else -1 for i in range(position - 8, position + 9)]


def test_pairs_of_similar_experts_are_listed_once_the_most_similar_first():
    similarity_EE = np.full((4, 4), ALIKE - 0.01)
    for a, b, value in ((0, 3, 0.95), (1, 2, 0.99)):
        similarity_EE[a, b] = similarity_EE[b, a] = value
    similarity_EE[0, 1] = np.nan
    assert [(one.first, one.second, one.similarity) for one in _pairs(similarity_EE)] == [(1, 2, 0.99), (0, 3, 0.95)]
