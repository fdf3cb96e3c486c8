"""An inspection in a terminal: what specializes, what is dead, what is out of balance; 80 columns, plain text."""

from __future__ import annotations

import math

from ..report.data.formatting import clean, plural
from ..report.text.table import align, rule, wrap
from ..storage.inspection_record import Inspection, Layer

__all__ = ["summarize_inspection"]

CLEAR = 2.0  # times what chance shows


def summarize_inspection(found: Inspection) -> str:
    """The findings in sentences, then a line per layer."""
    facts = found.facts
    tokens = sum(domain.tokens for domain in found.domains)
    head = (f"{facts.model} ({facts.family}): {plural(len(found.layers), 'router')}, {_sizes(found)}; "
            f"{tokens:,} tokens of {len(found.domains)} domains")  # fmt: skip
    if facts.biases is not None:
        head += f"; chosen with the expert biases of {facts.biases}"
    parts = [wrap(clean(head)), "\n".join(wrap(clean(line), "  ") for line in _findings(found)), _table(found)]
    if found.problems:
        parts.append("\n".join(wrap(clean(f"note: {problem}")) for problem in found.problems))
    return "\n\n".join(part for part in parts if part)


def _findings(found: Inspection) -> list[str]:
    return [*_specialization(found), *_balance(found.layers), *_experts(found.layers), *_second(found)]


def _specialization(found: Inspection) -> list[str]:
    layers = [layer for layer in found.layers if layer.information is not None]
    if not layers:
        return []
    most = max(layers, key=lambda layer: layer.information_corrected or 0.0)
    clear = [layer for layer in layers if (layer.information or 0) > (layer.information_shuffled_high or 0)]
    mean = sum(layer.information_corrected or 0.0 for layer in layers) / len(layers)
    chance = sum(layer.information_shuffled or 0.0 for layer in layers) / len(layers)
    told = (f"Domains: {len(clear)} of {plural(len(layers), 'layer')} tell them apart beyond chance; expert and domain "
            f"share {mean:.3f} nats on average (shuffled labels {chance:.3f}, at most "
            f"{math.log(len(found.domains)):.2f}), most in "
            f"layer {found.layers.index(most)}: {most.information_corrected:.3f}.")  # fmt: skip
    lines = [told]
    exclusive_D = found.exclusive_DLE().sum((1, 2))
    if exclusive_D.any():
        counts = sorted(zip(exclusive_D.tolist(), found.domains, strict=True), key=lambda one: -one[0])[:6]
        lines.append("Experts of one domain only (chosen twice as often as in uniform routing): "
                     + ", ".join(f"{domain.name} {count}" for count, domain in counts) + ".")  # fmt: skip
    ids = sum(layer.id_share for layer in layers) / len(layers)
    by_load = sum(layer.id_share_chance for layer in layers) / len(layers)
    lines.append(
        f"Token ids: {ids:.0%} of an id's choices go to its usual experts (to the busiest ones: {by_load:.0%})."
    )
    return lines


def _balance(layers: list[Layer]) -> list[str]:
    worst = max(layers, key=lambda layer: layer.maxvio_global)
    beyond = [layer for layer in layers if layer.maxvio_global > CLEAR * layer.noise_global]
    told = (
        f"Balance: over all text the busiest expert of layer {layers.index(worst)} has {1 + worst.maxvio_global:.1f} "
        f"times the mean load (MaxVio {worst.maxvio_global:.2f}, random routing {worst.noise_global:.2f}); "
        f"{len(beyond)} of {len(layers)} layers are clearly beyond random."
    )
    return [told]


def _experts(layers: list[Layer]) -> list[str]:
    total = sum(layer.num_experts for layer in layers)
    dead, idle = sum(len(layer.dead) for layer in layers), sum(len(layer.idle) for layer in layers)
    lines = [f"Experts: {dead} of {total} dead, {idle} with less than a tenth of the mean load."]
    for name, pairs in (("weights", [layer.alike_weights for layer in layers]),
                        ("routing", [layer.alike_routing for layer in layers])):  # fmt: skip
        if number := sum(map(len, pairs)):
            place = next(i for i, one in enumerate(pairs) if one)
            pair = pairs[place][0]
            lines.append(f"Alike by {name}: {number} pairs, such as {pair.first} and {pair.second} of layer {place} "
                         f"({pair.similarity:.2f}).")  # fmt: skip
    return lines


def _second(found: Inspection) -> list[str]:
    if found.facts.against is None:
        return []
    values = [(layer.saturation or 0.0, layer.saturation_chance or 0.0) for layer in found.layers]
    mean, chance = (sum(column) / len(values) for column in zip(*values, strict=True))
    return [f"Against {found.facts.against}: {mean:.0%} of choices are the same (by chance {chance:.0%})."]


def _table(found: Inspection) -> str:
    """One line per layer; information is corrected for its bias."""
    head = ["layer", "MaxVio", "random", "micro", "seq", "dead", "idle", "info", "chance", "entropy", "ids"]
    rows = [_row(i, layer) for i, layer in enumerate(found.layers)]
    lines = align([head, *rows], gaps=(0,), least=(6, 8, 8, 7, 7, 6, 6, 8, 8, 9, 6))
    return "\n".join([lines[0], rule(len(lines[0])), *lines[1:]])


def _row(index: int, layer: Layer) -> list[str]:
    entropy = layer.entropy_token / max(math.log(layer.num_experts), 1e-9)
    loads = (layer.maxvio_global, layer.noise_global, layer.maxvio_micro_batch, layer.maxvio_sequence)
    information = (layer.information_corrected, layer.information_shuffled)
    return [str(index), *(f"{one:.2f}" for one in loads), str(len(layer.dead)), str(len(layer.idle)),
            *("-" if one is None else f"{one:.3f}" for one in information),
            f"{entropy:.0%} ", f"{layer.id_share:.0%} "]  # fmt: skip


def _sizes(found: Inspection) -> str:
    sizes = list(dict.fromkeys((layer.num_experts, layer.top_k) for layer in found.layers))
    return ", ".join(f"{experts} experts top-{top_k}" for experts, top_k in sizes[:3])
