"""Masks by token id on the routers of a model, ours or another library's: put on, taken away, kept in a file.

MaskMoE, arXiv 2407.09816; `equipoise.functional.routing_mask` makes the masks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ConfigError, InputError, StateError
from ..functional.routing_mask import check_visible, sees_too_few
from ..storage.mask_file import read_masks, write_masks
from .discovery import routers_to_change
from .example_run import ExampleRun
from .output_formats import parse_output
from .recognition import example_of
from .router import ExternalRouter, attached_routers
from .token_ids import RouterMask, TokenIds

__all__ = ["load_masks", "mask_routers", "routing_masks", "save_masks", "unmask_routers"]

CLOSE = 1e-4  # relative: products of other shapes round otherwise


def mask_routers(
    model: nn.Module,
    masks: Tensor | Sequence[Tensor] | Mapping[str, Tensor],
    *,
    example: Mapping[str, Any] | None = None,
) -> list[str]:
    """Lets every router of a model choose, for each token, from the experts alone that the token's id sees.

    p = softmax(W h + m_v) with m_v = -inf for the others; the top K inside (MaskMoE, arXiv 2407.09816). A token whose
    id sees fewer than K experts uses these alone: the other choices have weight 0 and are no load. From now on, in
    training, evaluation and generation, the model needs token ids: ours as ``MoE(...)(x, token_ids_BS=ids)``, one of
    transformers as ``input_ids``, which hooks read from its calls.

    Make the ``Balancer`` afterwards. Masks of our routers are in ``state_dict``; those of another library's are in no
    file of the model: `save_masks` writes them beside it.

    Args:
        model: with routers of ours, or a MoE model of transformers.
        masks: bool (V, E), True where an id sees an expert: one for all routers, or one each, in order or by name.
        example: as of ``Balancer``.

    Returns the names of the routers.

    Raises:
        ConfigError: a model without routers, or one whose routers' choices cannot be made again here.
        InputError: masks of another number of experts, another vocabulary or other routers; an id that sees no expert.
        StateError: a model that has a balancer.

    >>> from equipoise import MoE
    >>> from equipoise.functional import draw_visible, rare_ids
    >>> layer = MoE(dim=8, hidden=16, num_experts=4, top_k=2)
    >>> mask_routers(layer, draw_visible(rare_ids(torch.tensor([90, 9, 1]), 0.2), num_experts=4))
    ['gate']
    >>> layer(torch.randn(5, 8), token_ids_BS=torch.tensor([0, 1, 2, 0, 2])).shape
    torch.Size([5, 8])
    """
    routers = _routers(model, example)
    for name, router in routers.items():
        if router.balance_state is not None:
            raise StateError(
                expected="masks before the Balancer, which is told once what its routers may choose",
                got=f"router {name!r} with a balancer",
                do="call balancer.remove(), then mask_routers, and make the Balancer again",
            )
    of_routers = _assigned(model, routers, masks)
    own = {name: router for name, router in routers.items() if not isinstance(router, ExternalRouter)}
    for name, router in own.items():
        router.enable_mask(of_routers[name])
    if len(own) < len(routers):
        _mask_external(model, example, routers, of_routers)
    return list(routers)


def unmask_routers(model: nn.Module) -> None:
    """Every router chooses from all experts again; a model without masks stays as it is.

    >>> unmask_routers(nn.Linear(1, 1))
    """
    for router in _own(model).values():
        router.disable_mask()
    masked = [router for _, router in attached_routers(model) if router.mask is not None]
    for ids in {id(router.mask.ids): router.mask.ids for router in masked if router.mask is not None}.values():
        ids.remove()
    for router in masked:
        router.set_mask(None)


def routing_masks(model: nn.Module) -> dict[str, Tensor]:
    """The masks of a model by the names of its routers, bool (V, E); empty without any.

    >>> routing_masks(nn.Linear(1, 1))
    {}
    """
    own = {name: router.visible_experts for name, router in _own(model).items() if router.visible_experts is not None}
    theirs = {name: router.mask.visible_VE for name, router in attached_routers(model) if router.mask is not None}
    return own | theirs


def save_masks(model: nn.Module, folder: str | Path) -> Path:
    """Writes a model's masks beside its weights, as ``routing_masks.equipoise``; returns the file.

    Raises InputError for a model without masks, OutputError where the folder cannot be written.

    >>> import tempfile
    >>> from equipoise import MoE
    >>> layer, folder = MoE(dim=8, hidden=16, num_experts=4, top_k=2), tempfile.mkdtemp()
    >>> _ = mask_routers(layer, torch.eye(4).bool())
    >>> save_masks(layer, folder).name, load_masks(folder)["gate"].equal(torch.eye(4).bool())
    ('routing_masks.equipoise', True)
    """
    if not (masks := routing_masks(model)):
        raise InputError(
            expected="a model with masks",
            got=f"{type(model).__name__} without any",
            do="mask_routers(model, masks) first",
        )
    return write_masks({name: visible_VE.cpu() for name, visible_VE in masks.items()}, folder)


def load_masks(folder: str | Path) -> dict[str, Tensor]:
    """What `save_masks` or ``equipoise export`` wrote, for `mask_routers`.

    Raises DataError where there is no such file, or one that is cut short.

    >>> load_masks("nowhere")
    Traceback (most recent call last):
    equipoise.errors.DataError: expected routing masks in nowhere/routing_masks.equipoise
      got: no such file
      do:  pass the folder that save_masks wrote to, or equipoise export --masks
    """
    return read_masks(folder)


def _own(model: nn.Module) -> dict[str, Any]:
    """Routers that are told the ids with each call."""
    return {name: module for name, module in model.named_modules() if hasattr(module, "enable_mask")}


def _routers(model: nn.Module, example: Mapping[str, Any] | None) -> dict[str, Any]:
    """By name: ours, else those of another library. Raises ConfigError where there is none."""
    if own := _own(model):
        return own
    found = routers_to_change(model, example)
    for name, router in found.items():
        if router.spec.images is not None:
            raise ConfigError(
                expected="routers that see all tokens of a text, for a mask by token id",
                got=f"router {name!r}, which gets the tokens of {'images' if router.spec.images else 'text'} alone",
                do="leave this model without a mask",
            )
    return found


def _assigned(
    model: nn.Module, routers: Mapping[str, Any], masks: Tensor | Sequence[Tensor] | Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """The mask of each router, checked."""
    given = list(routers) if isinstance(masks, Tensor) else list(masks) if isinstance(masks, Mapping) else []
    if isinstance(masks, Tensor):
        found = dict.fromkeys(routers, masks)
    elif isinstance(masks, Mapping):
        found = {name: masks[name] for name in routers if name in masks}
    elif isinstance(masks, Sequence):
        found = dict(zip(routers, masks, strict=False))
        given = list(routers)[: len(masks)] + ["one more"] * max(len(masks) - len(routers), 0)
    else:
        found, given = {}, [f"a {type(masks).__name__}"]
    if len(found) != len(routers) or len(given) != len(routers):
        raise InputError(
            expected=f"a mask for each of {len(routers)} routers: {', '.join(list(routers)[:3])}, ...",
            got=f"{len(given)}: {', '.join(given[:3])}",
            do="pass one mask (V, E) for all, or as many as there are routers, in their order or by these names",
        )
    vocabulary = _vocabulary(model)
    for name, visible_VE in found.items():
        check_visible(visible_VE, routers[name].num_experts, name)
        if vocabulary is not None and len(visible_VE) != vocabulary:
            raise InputError(
                expected=f"a routing mask of {vocabulary} ids, as many as the model embeds",
                got=f"one of {len(visible_VE)} for router {name!r}",
                do=f"count with torch.bincount(ids, minlength={vocabulary}), with the model's own tokenizer",
            )
    return found


def _vocabulary(model: nn.Module) -> int | None:
    """The ids that a model of transformers embeds; None where nobody says it."""
    for module in model.modules():
        if hasattr(module, "get_input_embeddings"):
            try:
                return len(module.get_input_embeddings().weight)  # type: ignore[operator]
            except (RuntimeError, AttributeError, TypeError):
                return None
    return None


def _mask_external(
    model: nn.Module,
    example: Mapping[str, Any] | None,
    routers: Mapping[str, ExternalRouter],
    of_routers: Mapping[str, Tensor],
) -> None:
    drops = [name for name, router in routers.items() if sees_too_few(of_routers[name], router.top_k)]
    before = next((router.mask.ids for router in routers.values() if router.mask is not None), None)
    if drops and not any(router.drops for router in routers.values()):  # else it was checked under the mask before
        _check_fewer(model, example, {name: routers[name] for name in drops})
    ids = TokenIds(model, list(routers))
    done: list[ExternalRouter] = []
    try:
        for name, router in routers.items():
            router.set_mask(RouterMask(of_routers[name], ids, name, router.top_k))
            done.append(router)
    except ConfigError:
        for router in done:
            router.set_mask(None)
        ids.remove()
        raise
    if before is not None:
        before.remove()


def _check_fewer(model: nn.Module, example: Mapping[str, Any] | None, routers: Mapping[str, ExternalRouter]) -> None:
    """Raises ConfigError where a block does not take a token's first expert again, with weight 0, for none.

    A block that writes weights into a table of all experts would overwrite the first one's with 0.
    """
    inputs = example_of(model, example)
    if inputs is None:
        return

    def hook(swapped: bool, again: bool, module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> Any:
        if (parsed := parse_output(module, args, kwargs, output, swapped=swapped)) is None:
            return None
        _, weights_TK, ids_TK = parsed.parts
        first_TK = torch.zeros_like(weights_TK)
        first_TK[:, 0] = weights_TK[:, 0]
        return parsed.replace(first_TK, ids_TK[:, :1].expand_as(ids_TK).contiguous() if again else None)

    run = ExampleRun(model, inputs)
    kept, same = (
        run({router.module: partial(hook, router.spec.swapped, again) for router in routers.values()})
        for again in (False, True)
    )
    pairs = zip(kept, same, strict=True)
    if not all(torch.allclose(a, b, rtol=CLOSE, atol=CLOSE * float(a.abs().amax())) for a, b in pairs):
        name, router = next(iter(routers.items()))
        raise ConfigError(
            expected=f"experts that take a token twice, once with weight 0: an id may see fewer than K={router.top_k}",
            got=f"the block around {type(router.module).__name__} ({name}), whose output is another then",
            do=f"let every id see {router.top_k} experts or more",
        )
