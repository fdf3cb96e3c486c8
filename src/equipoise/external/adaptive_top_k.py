"""Adaptive top-k on a whole model, ours or another library's: thresholds from a file, applied by one call.

model = AutoModelForCausalLM.from_pretrained(folder)
apply_adaptive_top_k(model, folder)  # or wherever `equipoise adapt` wrote the file
model.generate(...)
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..autograd.protocol import is_balanced_router
from ..errors import ConfigError, DataError
from ..functional.adaptive_top_k import check_threshold
from ..storage.adaptive_top_k_file import SavedThreshold, SavedTopK, read_top_k, top_k_file
from ..torch_internals import WRAPPED
from .discovery import routers_to_change
from .dropped_choices import skipping_experts, way_of
from .example_run import ExampleRun
from .observe import is_own_router
from .recognition import example_of
from .router import ExternalRouter

__all__ = ["Routers", "adaptable_routers", "apply_adaptive_top_k", "router_mark", "set_drop_thresholds"]

Routers = dict[str, Any]  # name, without what wraps a model -> `equipoise.Router` or `ExternalRouter`
CLOSE = 1e-3  # relative: the order in which a layer adds up its experts may change
SAME = 0.05  # of marks: a cast to bfloat16 moves one by 0.002, other weights by 1


def apply_adaptive_top_k(
    model: nn.Module, path: str | Path, *, example: Mapping[str, Any] | None = None
) -> dict[str, bool]:
    """From now on tokens use fewer experts where a saved file says that they can, in evaluation and generation.

    For a model of transformers by a hook on each router, which lasts as long as the model does; a router of ours keeps
    its threshold as a buffer, so that ``state_dict()`` has it. In training mode all K experts are used.

    Args:
        model: with routers of ours, or a MoE model of transformers; the model that was measured, or a copy of it in
            another dtype.
        path: what `equipoise adapt` wrote: the file, or the folder that it lies in.
        example: as of ``Balancer``.

    Returns: router name -> whether a dropped expert is really not computed. Experts of transformers leave it out in the
    implementations "grouped_mm" and "eager"; "batched_mm", to which `generate` switches on a GPU, and experts of remote
    code compute it and multiply by 0.

    Raises:
        DataError: no such file, or one of another model or of other weights.
        ConfigError: a model without routers, with one expert a token, or whose routers cannot drop any.

    >>> apply_adaptive_top_k(nn.Linear(1, 1), "nowhere")
    Traceback (most recent call last):
    equipoise.errors.DataError: expected thresholds of a model's routers in nowhere
      got: no such file
      do:  equipoise adapt MODEL writes adaptive_top_k.json; pass it or its folder
    """
    saved = read_top_k(path)
    routers = adaptable_routers(model, example)
    thresholds = {name: one.threshold for name, one in _matched(routers, saved, top_k_file(path)).items()}
    set_drop_thresholds(model, routers, thresholds, example=example)
    return {name: not _computed(router) for name, router in routers.items()}


def adaptable_routers(model: nn.Module, example: Mapping[str, Any] | None = None) -> Routers:
    """The routers of a model that can drop experts, by name.

    Raises ConfigError where there are none, and for one that has no expert to spare.
    """
    found: Routers = {name: module for name, module in model.named_modules() if is_balanced_router(module)}
    if not found:
        found = dict(routers_to_change(model, example))
    for name, router in found.items():
        if why := _why_not(router):
            raise ConfigError(
                expected="routers of ours or of transformers that choose two experts a token or more",
                got=f"{name!r}, {why}",
                do="leave this model as it is: adaptive top-k has nothing to drop there",
            )
    return {".".join(part for part in name.split(".") if part not in WRAPPED): one for name, one in found.items()}


def set_drop_thresholds(
    model: nn.Module,
    routers: Routers,
    thresholds: Mapping[str, float] | None,
    *,
    example: Mapping[str, Any] | None = None,
) -> None:
    """Sets what each router drops, by name; None: nothing any more.

    ``routers`` is what `adaptable_routers` found. Where a model of transformers gets its first thresholds, an example
    run tells whether its experts leave dropped choices out.

    Raises ConfigError as `Router.drop_below`, before a router is touched.
    """
    for name, router in routers.items():
        if thresholds is not None:
            check_threshold(thresholds[name], router.top_k)
    external = [router for router in routers.values() if isinstance(router, ExternalRouter)]
    first = thresholds is not None and any(router.dropped is None for router in external)
    for name, router in routers.items():
        router.drop_below(None if thresholds is None else thresholds[name])
    if first:
        _let_experts_skip(model, external, example)


def _why_not(router: Any) -> str:
    if not (isinstance(router, ExternalRouter) or is_own_router(router)):
        return f"a {type(router).__name__} that hands out its choice when it is made"
    if isinstance(router, ExternalRouter) and router.spec.idle:
        return "which chooses between experts and none by itself: how much a token needs is trained already"
    return "which chooses one expert a token" if router.top_k < 2 else ""


def _computed(router: Any) -> bool:
    return isinstance(router, ExternalRouter) and router.dropped is not None and router.dropped.computed


def _matched(routers: Routers, saved: SavedTopK, path: Path) -> dict[str, SavedThreshold]:
    """By the names of the model's routers; those of the file may be longer or shorter (a head, an adapter)."""
    found: dict[str, SavedThreshold] = {}
    for name in routers:
        alike = [one for one in saved.routers if f".{one}".endswith(f".{name}") or f".{name}".endswith(f".{one}")]
        alike = [name] if name in saved.routers else alike
        if len(alike) == 1:
            found[name] = saved.routers[alike[0]]
    sizes = {name: (router.num_experts, router.top_k) for name, router in routers.items()}
    there = {name: (one.experts, one.top_k) for name, one in found.items()}
    if sizes != there or len(found) != len(saved.routers):
        raise DataError(
            expected=f"thresholds of this model in {path}: {_shown(sizes)}",
            got=_shown({name: (one.experts, one.top_k) for name, one in saved.routers.items()}),
            do="run equipoise adapt on this model, and pass what it writes",
        )
    other = [name for name, one in found.items() if abs(one.mark - router_mark(routers[name])) > SAME]  # NaN: unknown
    if other:
        raise DataError(
            expected=f"thresholds of this model in {path}, with the router weights that it has",
            got=f"those of other weights at {other[0]!r}"
            + (f" and {len(other) - 1} more routers" if len(other) > 1 else ""),
            do="run equipoise adapt on this model again: thresholds belong to the weights they were measured with",
        )
    return found


@torch.no_grad()
def router_mark(router: Any) -> float:
    """A number that tells a router's weights from others, also after a cast: the cosine with fixed random signs, scaled
    so that it is about 1 in size. NaN where the router holds no matrix that can be read.

    >>> from equipoise import Router
    >>> router = Router(dim=8, num_experts=4, top_k=2)
    >>> abs(router_mark(router) - router_mark(router.bfloat16())) < SAME
    True
    """
    held = [p for p in router.module.parameters() if p.dim() > 1]
    if not held or any(not p.is_floating_point() or p.is_meta or hasattr(p, "full_tensor") for p in held):
        return math.nan
    flat = torch.cat([p.detach().flatten().to("cpu", torch.float64) for p in held])
    signs = torch.randint(2, flat.shape, generator=torch.Generator().manual_seed(0)) * 2 - 1
    return float((flat * signs).sum() / flat.norm().clamp(min=1e-30))


def _shown(sizes: Mapping[str, tuple[int, int]]) -> str:
    named = [f"{name} ({experts} experts, top-{top_k})" for name, (experts, top_k) in list(sizes.items())[:2]]
    return (", ".join(named) or "none") + (f" and {len(sizes) - 2} more" if len(sizes) > 2 else "")


# --------------------------------------------------------------------------- do the experts leave out what is dropped?


def _let_experts_skip(model: nn.Module, routers: list[ExternalRouter], example: Mapping[str, Any] | None) -> None:
    """Lets the experts leave dropped choices out, where the model's outputs stay those of a weight of 0."""
    if (inputs := example_of(model, example)) is None:
        return
    drops = [
        (router.dropped, skipping_experts(_block_of(model, router.module)))
        for router in routers
        if router.dropped is not None
    ]
    if not all(experts for _, experts in drops):
        return
    run = ExampleRun(model, inputs)
    before = [one.threshold for one, _ in drops]
    eager = all(one.device.type == "cpu" for one in model.parameters()) and all(
        way_of(module) == "eager" for _, experts in drops for module in experts
    )  # an id that is looked up there is an error; on a GPU it would be the end
    try:
        for one, _ in drops:
            one.threshold = math.inf
        computed = run({})
        for one, experts in drops:
            one.leave_out(experts, eager=eager)
        try:
            left_out = run({})
        except (IndexError, RuntimeError):  # the id was looked up
            left_out = []
        if not _close(left_out, computed):
            for one, _ in drops:
                one.leave_out((), eager=False)
    finally:
        for (one, _), threshold in zip(drops, before, strict=True):
            one.threshold = threshold


def _close(found: list[Tensor], wanted: list[Tensor]) -> bool:
    return len(found) == len(wanted) and all(
        bool((a - b).abs().amax() <= CLOSE * b.abs().amax()) for a, b in zip(found, wanted, strict=True) if b.numel()
    )


def _block_of(model: nn.Module, module: nn.Module) -> nn.Module:
    name = next(name for name, one in model.named_modules() if one is module)
    return model.get_submodule(name.rpartition(".")[0])
