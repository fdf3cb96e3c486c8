"""The text of inspections for the page: passages with the experts of every token, and the tokens of every expert."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ...storage.inspection_record import Inspection
from ..data.curves import thin
from ..data.formatting import clean
from ..data.inspections import NamedInspection

__all__ = ["left_out", "passages_of", "vocabulary_of"]

# Limits for all inspections together; beyond them contexts, passages and layers are left out.
MOST_EXPERT_IDS = 1_500_000  # of passages: tokens × layers × K
MOST_VOCABULARY_IDS = 500_000  # tokens × their contexts
CONTEXT, TOKENS = 11, 4  # tokens around an example, and examples of an expert: what fits a line and a glance


def passages_of(one: NamedInspection, inspections: int) -> dict[str, Any]:
    """Passages, starting with one of every domain, each with its ids (S) and experts (layers × S × K, flat).

    To fit the page, passages are dropped first, then the end of each passage, then layers.
    """
    arrays, most = one.inspection.arrays, MOST_EXPERT_IDS // inspections
    experts_NSLK = arrays.passage_experts_NSLK
    if not experts_NSLK.size:
        return {"name": clean(one.name), "layers": [], "passages": [], "strings": {}, "top_k": 0}
    _, length, layers, top_k = experts_NSLK.shape
    order = _one_of_each(arrays.passage_domain_N)
    domains = len(one.inspection.domains)
    kept = order[: max(domains, most // (length * layers * top_k))]
    length = max(16, min(length, most // (len(kept) * layers * top_k)))
    shown = thin(list(range(layers)), max(1, most // (len(kept) * length * top_k)))
    passages = [
        {
            "domain": clean(one.inspection.domains[int(arrays.passage_domain_N[n])].name),
            "ids": arrays.passage_ids_NS[n, :length].tolist(),
            "experts": experts_NSLK[n, :length][:, shown].transpose(1, 0, 2).reshape(len(shown), -1).tolist(),
        }
        for n in kept
    ]
    used = {token for passage in passages for token in passage["ids"]}
    return {
        "name": clean(one.name), "layers": shown, "top_k": top_k, "passages": passages,
        "strings": _strings(one.inspection, used),
    }  # fmt: skip


def left_out(found: Sequence[NamedInspection], shown: Sequence[dict[str, Any]]) -> str:
    """A sentence, after a space, about recorded passages that are not on the page; empty if all are."""
    said = []
    for one, page in zip(found, shown, strict=True):
        passages, length, layers, _ = one.inspection.arrays.passage_experts_NSLK.shape
        kept = len(page["passages"])
        cuts = (
            (kept, passages, "passages"),
            (len(page["passages"][0]["ids"]) if kept else length, length, "tokens of each"),
            (len(page["layers"]) if kept else layers, layers, "layers"),
        )
        parts = [f"{few} of {many} {what}" for few, many, what in cuts if few < many]
        said += [f"{', '.join(parts)} of {one.name}"] if parts else []
    return f" To keep the page small it has {'; '.join(said)}: the inspection's folder has all." if said else ""


def vocabulary_of(one: NamedInspection, inspections: int) -> dict[str, Any]:
    """[layer][expert][token]: id, share of the expert's load, share of the id's choices, domain, context."""
    arrays, most = one.inspection.arrays, MOST_VOCABULARY_IDS // inspections
    layers, experts, tokens = arrays.top_ids_LEJ.shape
    tokens = min(tokens, TOKENS)
    wide = arrays.examples_LEJC.shape[-1]
    middle, half = wide // 2, min(CONTEXT, wide) // 2
    shown = thin(list(range(layers)), most // max(1, experts * tokens * (2 * half + 4)))
    load_LE = arrays.counts_DLE.sum(0)
    used: set[int] = set()
    found = []
    for layer in shown:
        rows = []
        for expert in range(one.inspection.layers[layer].num_experts):
            entries = []
            for j in range(tokens):
                token = int(arrays.top_ids_LEJ[layer, expert, j])
                if token < 0:
                    continue
                count, seen = (
                    int(arrays.top_id_counts_LEJ[layer, expert, j]),
                    int(arrays.top_id_seen_LEJ[layer, expert, j]),
                )
                context = arrays.examples_LEJC[layer, expert, j, middle - half : middle + half + 1].tolist()
                entries.append([
                    token, round(count / max(1, int(load_LE[layer, expert])), 4), round(count / max(1, seen), 4),
                    int(arrays.example_domain_LEJ[layer, expert, j]), context,
                ])  # fmt: skip
                used.update(context, (token,))
            rows.append(entries)
        found.append(rows)
    return {
        "name": clean(one.name), "layers": shown, "experts": found, "half": half,
        "domains": [clean(domain.name) for domain in one.inspection.domains],
        "strings": _strings(one.inspection, used - {-1}),
    }  # fmt: skip


def _one_of_each(domain_N: np.ndarray) -> list[int]:
    """Indices with the first passage of every domain, then the second of every domain, ...

    >>> _one_of_each(np.array([0, 0, 1, 1]))
    [0, 2, 1, 3]
    """
    seen: dict[int, int] = {}
    rounds = []
    for index, domain in enumerate(domain_N.tolist()):
        seen[domain] = seen.get(domain, 0) + 1
        rounds.append((seen[domain], index))
    return [index for _, index in sorted(rounds)]


def _strings(inspection: Inspection, used: set[int]) -> dict[str, str]:
    return {str(token): inspection.strings.get(token, f"⟨{token}⟩") for token in sorted(used)}
