"""A model's own balance loss: switched off while a balancer has policies, and restored afterwards."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from torch import nn

__all__ = ["OwnLoss"]


class _Change(NamedTuple):
    """One attribute that switches the model's own loss on, with its value and the value that switches it off."""

    owner: Any  # a configuration, or a module
    name: str
    was: Any
    off: Any

    def put_back(self) -> bool:
        """Restores the value and returns True, unless it was set to something else in the meantime."""
        if getattr(self.owner, self.name, None) != self.off:
            return False
        setattr(self.owner, self.name, self.was)
        return True

    @property
    def in_words(self) -> str:
        kind = type(self.owner).__name__
        if self.name == "output_router_logits":
            return f"{kind}.{self.name}, the model's own balance loss"
        return f"{kind}.{self.name}, which was {self.was}"


class OwnLoss:
    """Switches a model's own balance loss off, so that nothing is balanced twice, and restores it.

    The loss of transformers is pooled over layers and scaled by the engine (B09, B11, B12 in docs/defects.md).

    >>> from types import SimpleNamespace
    >>> model = nn.Linear(1, 1)
    >>> model.config = SimpleNamespace(output_router_logits=True)
    >>> own = OwnLoss()
    >>> with warnings.catch_warnings(action="ignore"):
    ...     own.switch_off(model)
    >>> with own.as_it_was():
    ...     model.config.output_router_logits
    True
    >>> model.config.output_router_logits, own.words
    (False, ["SimpleNamespace.output_router_logits, the model's own balance loss"])
    >>> own.restore()
    >>> model.config.output_router_logits, own.words
    (True, [])
    """

    def __init__(self) -> None:
        self._changes: list[_Change] = []

    @property
    def words(self) -> list[str]:
        """What is switched off, one entry per attribute."""
        return [change.in_words for change in self._changes]

    def switch_off(self, model: nn.Module) -> None:
        """Switches it off in all parts of a model; warns where the model adds that loss to its own."""
        configs = {id(c): c for m in model.modules() if (c := getattr(m, "config", None)) is not None}
        on = [config for config in configs.values() if getattr(config, "output_router_logits", False)]
        found = [_Change(config, "output_router_logits", config.output_router_logits, False) for config in on]
        owners = [module for module in model.modules() if hasattr(module, "router_aux_loss_coef")]
        for owner in owners or configs.values():  # a model without the attribute reads its configuration
            coef = getattr(owner, "router_aux_loss_coef", None)
            if isinstance(coef, float | int) and coef:
                found.append(_Change(owner, "router_aux_loss_coef", coef, 0.0))
        for change in found:
            setattr(change.owner, change.name, change.off)
            self._changes.append(change)
        if on:
            warnings.warn(
                "this model's own balance loss (output_router_logits) is switched off: the balancer's policies replace "
                "it until the balancer is removed or, with BalanceCallback, training ends",
                stacklevel=4,
            )

    def restore(self) -> None:
        """Restores what was switched off, except what was set to something else in the meantime."""
        while self._changes:
            self._changes.pop().put_back()

    @contextmanager
    def as_it_was(self) -> Iterator[None]:
        """Inside the context, the user's values are restored: for saving, so that ``config.json`` contains them."""
        back = [change for change in self._changes if change.put_back()]
        try:
            yield
        finally:
            for change in back:
                setattr(change.owner, change.name, change.off)
