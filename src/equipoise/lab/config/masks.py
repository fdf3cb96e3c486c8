"""Masks by token id in settings and in names of strategies: ``global:rare=0.2:visible=4``."""

from __future__ import annotations

import re
from typing import Any

from ...errors import ConfigError

__all__ = ["check_mask", "split_mask"]

DETAIL = re.compile(r":(rare|visible)=([^:@+\s]*?)(?=[:@+\s]|->|$)")


def check_mask(rare: float, visible: int, experts: int, *, given: bool) -> None:
    """Raises ConfigError for ``model.mask_rare`` and ``model.mask_visible`` that cannot be.

    Args:
        given: the model comes from a folder.

    >>> check_mask(0.2, 4, 8, given=False)
    """
    if rare > 1:
        raise ConfigError(
            expected="model.mask_rare, a share of the training text, of at most 1",
            got=f"mask_rare = {rare}",
            do="0.2 lets the ids see one expert that the last 20 % of the text are of, 1 all ids",
        )
    if visible > experts:
        raise ConfigError(
            expected="model.mask_visible <= model.experts",
            got=f"mask_visible = {visible}, experts = {experts}",
            do="lower it, or leave it out: then frequent ids see all experts",
        )
    if given and (rare or visible):
        raise ConfigError(
            expected="a model without model.mask_rare and model.mask_visible, where it is given with model.folder",
            got=f"mask_rare = {rare}, mask_visible = {visible}",
            do="leave them out; equipoise.mask_routers masks a model of transformers in a training loop of your own",
        )


def split_mask(name: str) -> tuple[str, dict[str, Any]]:
    """The name of a strategy without details of a mask, and the settings of the model that these are.

    >>> split_mask("global:rare=0.2+micro@1e-4")
    ('global+micro@1e-4', {'mask_rare': 0.2})
    """
    mask: dict[str, Any] = {}
    for word, value in DETAIL.findall(name):
        try:
            number = float(value) if word == "rare" else int(value)
        except ValueError:
            number = -1
        if not number > 0 or f"mask_{word}" in mask:
            raise ConfigError(
                expected="one rare=SHARE above 0 and one visible=EXPERTS of 1 or more in a strategy",
                got=repr(name),
                do="for example global:rare=0.2, global:rare=0.2:visible=4",
            )
        mask[f"mask_{word}"] = number
    return DETAIL.sub("", name), mask
