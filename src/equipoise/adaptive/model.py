"""The model that is measured: its routers, what it predicts, and hooks that see and change what the routers return."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import StateError
from ..external.adaptive_top_k import Routers, adaptable_routers, set_drop_thresholds
from ..external.output_formats import parse_output
from ..external.router import ExternalRouter

__all__ = ["AdaptableModel", "Seen", "watched"]

See = Callable[["Seen"], "Tensor | None"]


@dataclass(frozen=True)
class AdaptableModel:
    """A language model whose routers can drop experts.

    Args:
        module: the model, in evaluation mode.
        logits: of token ids (B, S), the logits (B, S, V) of the tokens that follow.
        routers: by name, as `adaptable_routers` finds them.

    >>> from equipoise.lab.config.schema import ModelConfig
    >>> from equipoise.lab.models.transformer import LanguageModel
    >>> lm = LanguageModel(ModelConfig(layers=2, width=32, heads=2, head_dim=16, experts=4, expert_hidden=16)).eval()
    >>> model = AdaptableModel.of(lm, lm)
    >>> list(model.routers)
    ['model.layers.0.mlp.gate', 'model.layers.1.mlp.gate']
    """

    module: nn.Module
    logits: Callable[[Tensor], Tensor]
    routers: Routers

    @classmethod
    def of(
        cls, module: nn.Module, logits: Callable[[Tensor], Tensor], *, example: Mapping[str, Any] | None = None
    ) -> AdaptableModel:
        """Finds the routers. Raises what `adaptable_routers` raises, and StateError where one drops experts already."""
        routers = adaptable_routers(module, example)
        if dropping := [name for name, router in routers.items() if _threshold(router) is not None]:
            raise StateError(
                expected="a model without thresholds, to measure what its experts are worth",
                got=f"router {dropping[0]!r}, which drops experts already",
                do="load the model again without apply_adaptive_top_k; of a router of ours: drop_below(None)",
            )
        return cls(module, logits, routers)

    @property
    def device(self) -> torch.device:
        return next(self.module.parameters()).device

    @property
    def choices(self) -> int:
        """K, over all layers."""
        return sum(router.top_k for router in self.routers.values())

    @contextmanager
    def dropping(self, thresholds: Mapping[str, float] | None) -> Iterator[None]:
        """Inside the context each router drops what stays below its threshold; None: nothing."""
        set_drop_thresholds(self.module, self.routers, thresholds)
        try:
            yield
        finally:
            set_drop_thresholds(self.module, self.routers, None)


def _threshold(router: Any) -> Any:
    return router.dropped if isinstance(router, ExternalRouter) else router.drop_threshold


@dataclass(frozen=True)
class Seen:
    """One call of a router: its arguments, and what it returned after dropping."""

    name: str
    args: tuple
    kwargs: dict[str, Any]
    weights_TK: Tensor
    ids_TK: Tensor


@contextmanager
def watched(model: AdaptableModel, see: See) -> Iterator[None]:
    """Inside the context ``see`` is called after each router; weights that it returns take the place of its own."""
    handles = []
    for name, router in model.routers.items():

        def hook(module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any, name=name, router=router) -> Any:
            if isinstance(router, ExternalRouter):
                parsed = parse_output(module, args, kwargs, output, swapped=router.spec.swapped)
                if parsed is None:
                    return None
                weights_TK = see(Seen(name, args, kwargs, parsed.parts.weights_TK, parsed.parts.ids_TK))
                return None if weights_TK is None else parsed.replace(weights_TK, None)
            weights_TK = see(Seen(name, args, kwargs, output.weights_TK, output.expert_ids_TK))
            return None if weights_TK is None else output._replace(weights_TK=weights_TK)

        handles.append(router.module.register_forward_hook(hook, with_kwargs=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
