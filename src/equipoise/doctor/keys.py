"""Names in a configuration that look as if they balanced something, and that its engine does not know."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable

__all__ = ["looks_like_balancing", "unknown_keys"]

BALANCING = re.compile(
    r"(?<![a-z])(aux|auxiliary|balanc\w*|lbl|z|router\w*)_?loss|load_?balanc|balanc\w*_(coef|weight|rate|loss|type)"
    r"|router_(aux|z|bias|logits|load)|expert_?bias|router_logits|aux_loss|z_loss|moe_aux"
)


def looks_like_balancing(name: str) -> bool:
    """Whether a name speaks of balancing experts.

    >>> [name for name in ("moe_aux_loss_coef", "router_z_loss", "learning_rate") if looks_like_balancing(name)]
    ['moe_aux_loss_coef', 'router_z_loss']
    """
    return bool(BALANCING.search(name.replace("-", "_").lower()))


def unknown_keys(names: Iterable[str], known: Iterable[str]) -> dict[str, str]:
    """Names that look like balancing and are not among the known ones -> the nearest known name, or "".

    >>> unknown_keys(["moe_aux_loss_coef", "lr"], ["moe_aux_loss_coeff", "moe_z_loss_coeff"])
    {'moe_aux_loss_coef': 'moe_aux_loss_coeff'}
    """
    known = list(known)
    found = {}
    for name in names:
        if name not in known and looks_like_balancing(name):
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.75)
            found[name] = near[0] if near else ""
    return found
