"""`equipoise adapt`: a model, a text, and what its tokens lose with fewer experts; thresholds saved for generation.

OUT/adaptive_top_k.json   the thresholds, which `equipoise.apply_adaptive_top_k` takes
OUT/adaptive.json         every number        OUT/adaptive.html   the curve and all tables
"""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..adaptive import (
    AdaptableModel,
    Held,
    SweepPoint,
    allocate,
    cache_use,
    evaluate,
    knee,
    measure_sensitivity,
    prefetch_hits,
    record_choices,
    stack_distances,
    sweep,
    thresholds_of,
)
from ..adaptive.caches import even, hits_by_size
from ..adaptive.choices import most_used
from ..adaptive.sweep import ALL, check_budgets
from ..errors import ConfigError, DataError, OutputError
from ..external.adaptive_top_k import router_mark
from ..storage.adaptive_record import (
    RECORD_NAME,
    AdaptedLayer,
    Adaptive,
    AdaptiveFacts,
    CacheRow,
    CurvePoint,
    write_adaptive,
)
from ..storage.adaptive_top_k_file import SavedThreshold, SavedTopK, write_top_k
from ..storage.locks import locked
from .loading import LoadedModel, describe_versions, is_run, open_model, open_tokenizer
from .run import Request, data_name, device_named, name_of_device, windows_for
from .windows import Windows

__all__ = ["AdaptOptions", "adapt"]

TOKENS = "tokens"
Progress = Callable[[str, float], None]


@dataclass(frozen=True, kw_only=True)
class AdaptOptions:
    """What to measure.

    Args:
        budgets: T in nats, ascending: the points of the curve; none: ten steps from no experts dropped to all but one.
        save: the budget to save; None: that of the knee.
        memory: shares of all experts that caches hold, ascending; none: no simulation.
        each_layer: measure, too, what each layer does to the loss with one expert a token: a pass of the text a layer.
        targets: of the gradients, see `measure_sensitivity`.
    """

    budgets: tuple[float, ...] = ()
    save: float | None = None
    memory: tuple[float, ...] = (0.25, 0.5, 0.75)
    each_layer: bool = False
    targets: str = "model"

    def __post_init__(self) -> None:
        check_budgets(self.budgets)
        check_budgets([] if self.save is None else [self.save])
        check_budgets(self.memory, "shares of memory")
        if self.memory and self.memory[-1] > 1:
            raise ConfigError(
                expected="--memory in percent of all experts", got=f"{100 * self.memory[-1]:g}", do="e.g. 25,50,75"
            )


def adapt(
    request: Request,
    out: Path,
    options: AdaptOptions | None = None,
    *,
    overwrite: bool = False,
    on_progress: Progress | None = None,
) -> Adaptive:
    """Measures a model and writes the result to the folder ``out``.

    Of each domain the first half of the text is for sensitivities, the second for losses. Of ``request`` the model, the
    text and how it is cut are read; see `equipoise.inspection.inspect`.

    Raises:
        DataError: the model, tokenizer or text is missing, cannot be read, or is too short.
        ConfigError: a model without routers, with one expert a token, or without a head; settings that do not fit.
        OutputError: a folder that cannot be written, or holds another result.
    """
    options, say = options or AdaptOptions(), on_progress or (lambda _text, _share: None)
    began = time.monotonic()
    with locked(out):
        if (out / RECORD_NAME).exists() and not overwrite:
            raise OutputError(
                expected=f"a new folder: {out}",
                got="the result of an earlier equipoise adapt",
                do="choose another --out, or begin anew with --overwrite",
            )
        device = device_named(request.device)
        loaded = open_model(request.model, device, request.dtype)
        model = _adaptable(loaded, is_run(request.model))
        tokenizer = open_tokenizer(request.tokenizer or request.model)
        shutil.rmtree(out / TOKENS, ignore_errors=True)  # of a run that was stopped, perhaps of other text
        windows = windows_for(out / TOKENS, request, loaded, tokenizer, on_progress)
        windows.frequency(loaded.vocab_size)
        measured, held = _halves(windows, tokenizer.begin, max(1, request.pass_tokens // windows.length))
        numbers = _measured(model, measured, held, options, say)
        facts = AdaptiveFacts(
            model=str(request.model), family=loaded.family, data=data_name(request), targets=options.targets,
            measured_tokens=sum(one[:, 1:].numel() for one in measured),
            held_tokens=sum(one[:, 1:].numel() for one in held), sequence_length=windows.length,
            device=name_of_device(device), dtype=str(loaded.dtype).removeprefix("torch."),
            created=datetime.now(UTC).isoformat(timespec="seconds"), seconds=round(time.monotonic() - began, 1),
            versions=describe_versions(),
        )  # fmt: skip
        found = Adaptive(facts=facts, problems=windows.problems, **numbers)
        _write(out, found, model)
        shutil.rmtree(out / TOKENS, ignore_errors=True)
    return found


def _write(out: Path, found: Adaptive, model: AdaptableModel) -> None:
    from ..report.html.adaptive_page import write_adaptive_page

    point, start = found.saved, found.curve[0]
    write_top_k(
        out,
        SavedTopK(
            routers={
                one.name: SavedThreshold(
                    experts=one.experts, top_k=one.top_k, threshold=one.threshold, sensitivity=one.sensitivity,
                    mark=router_mark(model.routers[one.name]),
                )
                for one in found.layers
            },
            budget=point.budget,
            measured={"model": found.facts.model, "data": found.facts.data, "fewer_experts": point.fewer,
                      "loss": point.loss, "loss_before": start.loss},
        ),
    )  # fmt: skip
    write_adaptive_page(out / "adaptive.html", found)
    write_adaptive(out, found)  # last: it says that the folder is whole


def _adaptable(loaded: LoadedModel, from_lab: bool) -> AdaptableModel:
    """The model with its logits. Raises ConfigError where it does not predict the next token."""
    network: Any = loaded.model
    if from_lab:
        return AdaptableModel.of(network.routed, network)

    def logits(ids_BS: Tensor) -> Tensor:
        output = network(input_ids=ids_BS)
        found = getattr(output, "logits", None)
        if found is None or found.shape[:2] != ids_BS.shape:
            raise ConfigError(
                expected="a causal language model, whose loss says what an expert is worth",
                got=f"{type(network).__name__}, which returns no logits of next tokens",
                do="name a folder of a class ...ForCausalLM",
            )
        return found

    if getattr(network.config, "is_encoder_decoder", False):
        raise ConfigError(
            expected="a causal language model",
            got=f"{type(network).__name__}, an encoder and a decoder",
            do="adapt a decoder; equipoise inspect shows what these experts do",
        )
    return AdaptableModel.of(network, logits)


def _halves(windows: Windows, begin: int | None, at_a_time: int) -> tuple[list[Tensor], list[Tensor]]:
    """Batches of the first half of each domain's windows and of the second, domains in turn.

    Raises DataError where no domain has two windows.
    """
    places = [(domain, window) for window in range(max(windows.windows)) for domain in range(len(windows.domains))
              if window < windows.windows[domain]]  # fmt: skip
    first = [one for one in places if one[1] < windows.windows[one[0]] // 2]
    if not first:
        raise DataError(
            expected="two windows of a domain at least: one to measure sensitivities, one for losses",
            got=f"one of {windows.length} tokens",
            do="pass more text with --data or --tokens, or a smaller --length",
        )
    second = [one for one in places if one not in set(first)]
    return list(_batches(windows, first, begin, at_a_time)), list(_batches(windows, second, begin, at_a_time))


def _batches(
    windows: Windows, places: Sequence[tuple[int, int]], begin: int | None, at_a_time: int
) -> Iterator[Tensor]:
    rows = [torch.from_numpy(windows.read(domain, window, window + 1)) for domain, window in places]
    ids_NS = torch.cat(rows)
    if begin is not None:
        ids_NS = torch.cat([ids_NS.new_full((len(ids_NS), 1), begin), ids_NS], dim=1)
    yield from ids_NS.split(at_a_time)


def _measured(
    model: AdaptableModel, measured: list[Tensor], held: list[Tensor], options: AdaptOptions, say: Progress
) -> dict[str, Any]:
    """All fields of the result but the facts and the problems."""

    def of(text: str) -> Callable[[int, int], None]:
        return lambda done, total: say(text, done / total)

    profile = measure_sensitivity(model, measured, targets=options.targets, on_batch=of("sensitivities"))
    curve = sweep(model, profile, held, budgets=_with_zero(options.budgets), on_point=of("the curve"))
    start = curve[0].held
    points = [_point(model, one, start) for one in curve]
    at = knee([one.fewer for one in points], [one.loss for one in points])
    chosen = curve[at]
    if options.save is not None:
        known = [one for one in curve if one.budget == options.save]
        chosen = known[0] if known else sweep(model, profile, held, budgets=[options.save])[0]
    saved, used = _point(model, chosen, start), chosen.held.experts
    thresholds = thresholds_of(profile, saved.budget)
    say("choices", 0.0)
    alone = _alone(model, held, start, of("layer by layer")) if options.each_layer else {}
    caches, ahead = _cached(model, measured, held, thresholds, options.memory, say)
    layers = [
        AdaptedLayer(
            name=name, experts=router.num_experts, top_k=router.top_k, sensitivity=profile.sensitivity[name],
            alone=profile.alone[name], alone_measured=alone.get(name, math.nan), threshold=thresholds[name],
            used=used[name], **ahead[name],
        )
        for name, router in model.routers.items()
    ]  # fmt: skip
    return {"layers": layers, "curve": points, "knee": at, "saved": saved, "caches": caches}


def _with_zero(budgets: Sequence[float]) -> list[float]:
    """Increases are over the loss with all experts, which the curve begins with."""
    return [] if not budgets else [*([0.0] if budgets[0] > 0 else []), *budgets]


def _point(model: AdaptableModel, one: SweepPoint, start: Held) -> CurvePoint:
    return CurvePoint(
        budget=one.budget, fewer=one.held.fewer(model, start), loss=one.held.loss, control_weight=one.weight,
        control_fewer=one.control.fewer(model, start), control_loss=one.control.loss,
    )  # fmt: skip


def _alone(
    model: AdaptableModel, held: list[Tensor], before: Held, on_layer: Callable[[int, int], None]
) -> dict[str, float]:
    """The measured increase of the loss where each router in turn keeps one expert a token."""
    found = {}
    for place, name in enumerate(model.routers):
        with model.dropping({other: ALL if other == name else 0.0 for other in model.routers}):
            found[name] = evaluate(model, held).loss - before.loss
        on_layer(place + 1, len(model.routers))
    return found


def _cached(
    model: AdaptableModel,
    measured: list[Tensor],
    held: list[Tensor],
    thresholds: dict[str, float],
    memory: Sequence[float],
    say: Progress,
) -> tuple[list[CacheRow], dict[str, dict[str, float]]]:
    """The simulated caches, and how well each router's experts are foreseen."""
    rows: list[CacheRow] = []
    ahead: dict[str, dict[str, float]] = {}
    for adaptive in (False, True) if memory else (False,):
        say("choices", 0.2 + 0.4 * adaptive)
        other, choices = (record_choices(model, text, thresholds if adaptive else None) for text in (measured, held))
        experts = max(choices.num_experts)
        if not adaptive:
            share_L, whole_L = prefetch_hits(choices)
            busiest_L, _ = prefetch_hits(choices, most_used(other, choices.used_TLK.shape[2]))
            ahead = {
                name: {"predicted": float(share_L[i]), "predicted_whole": float(whole_L[i]),
                       "most_used": float(busiest_L[i])}
                for i, name in enumerate(model.routers)
            }  # fmt: skip
        distances_TLK = stack_distances(choices.used_TLK, experts)
        hits_LC = hits_by_size(stack_distances(other.used_TLK, experts), experts)
        for kept in memory:
            total = round(kept * sum(choices.num_experts))
            for fitted in (False, True):
                sizes = allocate(hits_LC, total) if fitted else even(len(choices.num_experts), total)
                use = cache_use(choices, distances_TLK, sizes)
                rows.append(CacheRow(kept=kept, adaptive=adaptive, fitted=fitted, sizes=sizes, hits=use.hits,
                                     loads=use.loads, waits=use.waits))  # fmt: skip
    return sorted(rows, key=lambda row: (row.kept, row.adaptive, row.fitted)), ahead
