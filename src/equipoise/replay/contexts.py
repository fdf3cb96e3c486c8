"""``record_routing`` and ``replay_routing``: one router after another is told what to keep, or what to dispatch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..autograd.protocol import is_balanced_router
from ..autograd.routing_calls import RecordedCalls, ReplayedCalls
from ..errors import ConfigError, InputError, StateError
from ..external.bias_support import why_no_replay
from ..external.discovery import routers_to_change
from ..external.router import ExternalRouter
from ..torch_internals import WRAPPED
from .record import RoutingRecord

__all__ = ["record_routing", "replay_routing"]

Routers = dict[str, Any]  # name -> equipoise.Router, ExternalRouter, or a router of one's own with ``routing_calls``


@contextmanager
def record_routing(model: nn.Module, *, example: Mapping[str, Any] | None = None) -> Iterator[RoutingRecord]:
    """Inside the context, keeps what every router of the model dispatches; nothing of the model changes.

    In any mode, with gradient or without, with a ``Balancer`` or without (then the routers of another library are found
    by a small example run each time the context is entered). A recompute of activation checkpointing is no call.

    Args:
        model: with routers of ours, or a MoE model of transformers.
        example: as of ``Balancer``.

    Yields a `RoutingRecord`, empty until the context is left; its ids lie where the routers do, two bytes each.

    Raises ConfigError for a model without routers that can be recorded, StateError inside another such context.

    >>> import torch
    >>> from equipoise import MoE
    >>> model = MoE(dim=8, hidden=16, num_experts=4, top_k=2)
    >>> with record_routing(model) as record:
    ...     _ = model(torch.randn(2, 6, 8))
    >>> record
    RoutingRecord(1 router, 1 call, 12 tokens)
    """
    routers = _routers(model, example)
    kept = {name: RecordedCalls(router.num_experts) for name, router in routers.items()}
    record = RoutingRecord({})
    _enter(routers, kept)
    try:
        yield record
    finally:
        _take_away(routers)
        record.ids = {name: calls.take() for name, calls in kept.items()}


@contextmanager
def replay_routing(
    model: nn.Module, record: RoutingRecord, *, example: Mapping[str, Any] | None = None
) -> Iterator[None]:
    """Inside the context, every router dispatches what was recorded, in the order of the calls.

    Weights are made of the live scores at the recorded ids, in the router's own form and with gradient (R2 and R3 of
    arXiv 2510.11370: g_i = I_i exp(s_i) / sum_j I_j exp(s_j) for a normalized softmax). Loads count what was
    dispatched, losses take f from it and act on the live p, and no ``ExpertBias`` moves in a step with a replay.
    ``balance/replay_gap`` is the share of the replayed choices that the router would not have made.

    Call ``backward`` inside as well where activation checkpointing runs routers again: a recompute gets the entry of
    its forward. Each context begins with the first call.

    Args:
        model: whose routers have the names of the record, but for what wrappers (DDP, FSDP, PEFT, the compiler) put
            before or between them.
        record: what `record_routing` yielded, or a part of it.
        example: as of ``Balancer``.

    Raises:
        ConfigError: a router whose weights cannot be made for experts that it did not choose, by name.
        InputError: a record of other routers, ids of more experts than there are; in a forward, another number of
            tokens, of K, or more calls than recorded; at the end, fewer.
        StateError: inside another such context; a recompute after its end.

    >>> import torch
    >>> from equipoise import MoE
    >>> model = MoE(dim=8, hidden=16, num_experts=4, top_k=2)
    >>> x_BSD = torch.randn(2, 6, 8)
    >>> with record_routing(model) as record:
    ...     y_BSD = model(x_BSD)
    >>> with replay_routing(model, record):
    ...     torch.equal(model(x_BSD), y_BSD)
    True
    """
    routers = _routers(model, example)
    given = {name: ReplayedCalls(name, calls) for name, calls in _matched(routers, record).items()}
    _enter(routers, given)
    try:
        yield
        _check_all_ran(given)
    except BaseException:
        _take_away(routers)
        raise
    for name, router in routers.items():
        given[name].end(router)


def _routers(model: nn.Module, example: Mapping[str, Any] | None) -> Routers:
    """By name, wrappers left out. Raises ConfigError where there are none, or one that has no ``routing_calls``."""
    found: Routers = {name: module for name, module in model.named_modules() if is_balanced_router(module)}
    if not found:
        found = dict(routers_to_change(model, example))
    for name, router in found.items():
        if not hasattr(router, "routing_calls"):
            raise ConfigError(
                expected="routers that dispatch what they are told: equipoise.Router, or one of transformers",
                got=f"{name!r}, a {type(router).__name__} that hands out its choice when it is made",
                do="record and replay with its engine's own switch; give a router of your own ``routing_calls = None`` "
                "and pass each choice through its dispatch()",
            )
    return {".".join(part for part in name.split(".") if part not in WRAPPED): one for name, one in found.items()}


def _matched(routers: Routers, record: RoutingRecord) -> dict[str, list[Tensor]]:
    """What was recorded for each router, by its name, or the end of it. Checks both."""
    names = {}
    for name, router in routers.items():
        if isinstance(router, ExternalRouter) and (why := why_no_replay(router.spec)):
            raise ConfigError(
                expected="routers whose weights can be made for experts that they did not choose",
                got=f"{type(router.module).__name__} ({name}): {why}",
                do="let it return the logits that its weights follow from, and its block use its ids "
                "(docs/own-router.md); or train this model without a replay",
            )
        alike = [other for other in record.ids if f".{other}".endswith(f".{name}") or f".{name}".endswith(f".{other}")]
        alike = [name] if name in record.ids else alike
        if len(alike) == 1:
            names[name] = alike[0]
    if not len(set(names.values())) == len(routers) == len(record.ids):
        missing = [name for name in routers if name not in names]
        raise InputError(
            expected=f"a record of these {len(routers)} routers: {', '.join(list(routers)[:3])}, ...",
            got=f"one of {len(record.ids)}: {', '.join(list(record.ids)[:3])}, ..."
            + (f"; nothing for {missing[0]!r}" if missing else ""),
            do="record a model of the same layers; RoutingRecord({name: ids, ...}) renames or leaves out",
        )
    found = {name: record.ids[other] for name, other in names.items()}
    _check_ids(routers, found)
    return found


def _check_ids(routers: Routers, recorded: Mapping[str, list[Tensor]]) -> None:
    """Waits for the device that a record lies on, once."""
    calls = [(name, ids_TK) for name, of_router in recorded.items() for ids_TK in of_router if ids_TK.numel()]
    if not calls:
        return
    device = calls[0][1].device
    seen = [torch.stack([ids_TK.amax().long(), _twice(ids_TK, routers[name].num_experts)]) for name, ids_TK in calls]
    for (name, _), (most, twice) in zip(calls, torch.stack([one.to(device) for one in seen]).tolist(), strict=True):
        if twice:
            raise InputError(
                expected=f"each expert at most once for a token at router {name!r}",
                got=f"{twice} that come again",
                do="replay a record as it was made",
            )
        if most >= routers[name].num_experts + getattr(routers[name], "drops", False):  # E: no expert
            raise InputError(
                expected=f"expert ids below {routers[name].num_experts} at router {name!r}",
                got=f"an id of {most}",
                do="replay a record of a model with as many experts",
            )


def _twice(ids_TK: Tensor, num_experts: int) -> Tensor:
    """How many choices of an expert come again for the same token; an id of E is none, and -1 is not known."""
    sorted_TK = ids_TK.sort(dim=1).values
    again_TK = (sorted_TK.diff(dim=1) == 0) & (sorted_TK[:, 1:] >= 0) & (sorted_TK[:, 1:] < num_experts)
    return again_TK.sum()


def _check_all_ran(given: Mapping[str, ReplayedCalls]) -> None:
    left = {name: calls.left_over for name, calls in given.items() if calls.left_over}
    if left:
        name, calls = next(iter(left.items()))
        raise InputError(
            expected="as many calls inside replay_routing as were recorded",
            got=f"{calls} fewer at router {name!r}"
            + (f", and others at {len(left) - 1} more" if len(left) > 1 else ""),
            do="replay the part that runs: record[0], record[1], ... for one micro-batch after the other",
        )


def _enter(routers: Routers, calls: Mapping[str, RecordedCalls | ReplayedCalls]) -> None:
    for name, router in routers.items():
        if router.routing_calls is not None and not router.routing_calls.ended:
            raise StateError(
                expected="one record_routing or replay_routing at a time",
                got=f"another around router {name!r}",
                do="leave the first with block before the next",
            )
    for name, router in routers.items():
        if router.routing_calls is not None:
            calls[name].before = [one for one in router.routing_calls.before if not one.recomputed]
        router.routing_calls = calls[name]


def _take_away(routers: Routers) -> None:
    for router in routers.values():
        router.routing_calls = None
