"""Which ids the tokens at another library's router have: read from the calls of the model around it.

A forward with a key-value cache has the ids of its new tokens alone, and so has the router. A recompute in backward
(gradient checkpointing) runs the router without the model, and so without its arguments: then the ids are those of the
forward with as many tokens that is still to be recomputed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..autograd.router_state import recomputes
from ..errors import InputError, StateError
from ..functional.routing_mask import hide, sees_too_few
from .batch_context import BatchContext
from .call_arguments import CallArguments

__all__ = ["RouterMask", "TokenIds"]

MOST = 64  # forwards that are remembered for a recompute


@dataclass
class _Forward:
    """One with gradient, until its recompute."""

    ids_BS: Tensor
    recomputed: bool = False


class TokenIds:
    """Follows the forwards of a model by hooks of its own, which stay until `remove`.

    Args:
        model: whose forward gets ``input_ids`` (B, S), or a part of which does.
        routers: names of its routers.
    """

    def __init__(self, model: nn.Module, routers: Sequence[str]) -> None:
        self._context = BatchContext(model, routers)
        self._context.before_forward.append(self._begin)
        self._keeps = False  # the forward that runs may be recomputed
        self._forwards: list[_Forward] = []

    def remove(self) -> None:
        self._context.remove()

    def _begin(self) -> None:
        """A forward of the model begins. Those that a backward has recomputed are over."""
        self._keeps = torch.is_grad_enabled() and not torch.compiler.is_compiling() and not recomputes()
        if self._keeps:
            self._forwards = [one for one in self._forwards if not one.recomputed][-MOST:]

    def of_call(self, router: str, tokens: int) -> Tensor:
        """(T,) those of the ``tokens`` rows that a router is called with now.

        Raises InputError where the model was called without ids, or the router sees other tokens than the model;
        StateError where several forwards may be the one that is recomputed.
        """
        calls = self._context.calls_around(router)
        running = [call for call in calls if call.running]
        if running:
            if (ids_BS := _ids(running, tokens)) is None:
                raise self._unknown(router, tokens, running)
            if self._keeps and not (self._forwards and self._forwards[-1].ids_BS is ids_BS):
                self._forwards.append(_Forward(ids_BS))
            return ids_BS.reshape(-1)
        if not torch.compiler.is_compiling() and recomputes():
            return self._recomputed(router, tokens)
        raise InputError(
            expected=f"router {router!r}, which has a mask by token id, in a forward of the model that was masked",
            got="a call of a part of it, or of a copy of it, where nothing tells the ids",
            do="call the whole model; of a copy: mask_routers(copy, routing_masks(model))",
        )

    def _recomputed(self, router: str, tokens: int) -> Tensor:
        alike = [one for one in self._forwards if one.ids_BS.numel() == tokens]
        first = alike[0].ids_BS if alike else None
        if first is None or any(
            one.ids_BS is not first and not torch.equal(one.ids_BS.reshape(-1), first.reshape(-1)) for one in alike[1:]
        ):
            raise StateError(
                expected="gradient checkpointing of one forward per backward, for a mask by token id",
                got=f"a recompute of router {router!r} on {tokens} tokens that may be of {len(alike)} forwards",
                do="send pairs of texts through the model as one batch, and forwards without a backward through "
                "torch.no_grad(); or call gradient_checkpointing_disable()",
            )
        for one in alike:  # which of them it is does not matter, and none may be left over
            one.recomputed = True
        return first.reshape(-1)

    @staticmethod
    def _unknown(router: str, tokens: int, running: Sequence[CallArguments]) -> InputError:
        seen = [call.ids for call in running if isinstance(call.ids, Tensor)]
        got = f"input_ids of {', '.join(str(one.numel()) for one in seen)}" if seen else "a forward without input_ids"
        return InputError(
            expected=f"the ids of the {tokens} tokens at router {router!r}, which has a mask by token id",
            got=got,
            do="call the model with input_ids (B, S) in place of embeddings, and without tiling; or take the mask away "
            "with unmask_routers(model)",
        )


def _ids(calls: Sequence[CallArguments], tokens: int) -> Tensor | None:
    """Of the innermost call that has as many; all calls have as many rows as the router."""
    for call in calls:
        ids = call.ids if call.ids is not None or not call.outermost else call.first
        if isinstance(ids, Tensor) and not ids.is_floating_point() and ids.numel() == tokens:
            return ids
    return None


class RouterMask:
    """The mask of one router: which experts each id sees, and where the ids come from.

    Args:
        visible_VE: see `draw_visible`.
        ids: of the model.
        router: its name there.
        top_k: K.
    """

    def __init__(self, visible_VE: Tensor, ids: TokenIds, router: str, top_k: int) -> None:
        self.visible_VE, self.ids, self._router = visible_VE, ids, router
        self.drops = sees_too_few(visible_VE, top_k)

    def hide(self, logits_TE: Tensor) -> Tensor:
        """The logits of this call with -inf where a token's id sees no expert."""
        if self.visible_VE.device != logits_TE.device:  # the model moved
            self.visible_VE = self.visible_VE.to(logits_TE.device)
        return hide(logits_TE, self.visible_VE, self.ids.of_call(self._router, len(logits_TE)))
