"""Classes of tokens: what a policy of one of them may ask, and its load and its number of tokens in a step.

The law asks for the T_c tokens of a class in the whole step, which forward does not know and which differs between
micro-batches far more than T does. So T_c is estimated as f is: a class's load is counted beside the rest, and every
estimator of `equipoise.policies.estimators` gives of both together what a step holds. Legend: E experts.
"""

from __future__ import annotations

import re

import torch
from torch import Tensor

from ..errors import ConfigError
from .scopes import Scope

__all__ = ["check_class_name", "check_tokens", "class_load", "of_class"]

SCOPES = ("sequence", "document", "micro_batch", "data_parallel", "global_batch")


def check_class_name(tokens: object) -> None:
    """Raises ConfigError for a name that cannot be part of a metric's.

    >>> check_class_name("image")
    """
    if not (isinstance(tokens, str) and re.fullmatch(r"[A-Za-z0-9_.-]+", tokens)):
        raise ConfigError(
            expected="tokens: the name of a class of tokens, of letters, digits, '_', '-' and '.'",
            got=repr(tokens),
            do="for example tokens='image'; which tokens are of it is said with each call, beside the mask",
        )


def check_tokens(tokens: object, scope: Scope, counts: str) -> None:
    """Raises ConfigError as `check_class_name`, and for what a loss does not measure of a class alone.

    >>> check_tokens("image", "global_batch", "dispatched")
    """
    check_class_name(tokens)
    if scope not in SCOPES:
        raise ConfigError(
            expected=f"a scope that is measured of a class of tokens alone: {', '.join(SCOPES)}",
            got=f"scope={scope!r} with tokens={tokens!r}",
            do="take one of these, or leave tokens out",
        )
    if counts != "dispatched":
        raise ConfigError(
            expected="counts='dispatched' with tokens=, of whose tokens the unbiased choices are not counted",
            got=f"counts={counts!r} with tokens={tokens!r}",
            do="leave counts out, or tokens",
        )


def class_load(counts_E: Tensor, counts_cE: Tensor, tokens: Tensor, tokens_c: Tensor) -> Tensor:
    """(..., E + 3): choices of a class, those of all others, tokens of the class, all others; additive.

    An estimator that fills what is missing of a step measures that by their sum: a class that has come whole early, or
    late, does not look as if it were missing.

    Args:
        counts_E: (..., E) of all tokens.
        counts_cE: (..., E) of the class.
        tokens, tokens_c: (...) how many there are of both.

    >>> two, four = torch.tensor([2, 0]), torch.tensor([3, 1])
    >>> class_load(four, two, torch.tensor(4), torch.tensor(2))
    tensor([2, 0, 2, 2, 2])
    """
    rest = (counts_E - counts_cE).sum(dim=-1)
    return torch.cat([counts_cE, torch.stack([rest, tokens_c, tokens - tokens_c], dim=-1)], dim=-1)


def of_class(fraction: Tensor) -> tuple[Tensor, Tensor]:
    """(f of the class (..., E), its share of the tokens (...)) from an estimate (..., E + 3) of `class_load`.

    Both are 0 where no token of it is known of: nothing is pushed then.

    >>> of_class(torch.tensor([0.25, 0.0, 0.25, 0.25, 0.25], dtype=torch.float64))
    (tensor([1., 0.], dtype=torch.float64), tensor(0.5000, dtype=torch.float64))
    """
    smallest = torch.finfo(fraction.dtype).tiny
    load_E, (_, own, others) = fraction[..., :-3], fraction[..., -3:].unbind(dim=-1)
    return load_E / load_E.sum(dim=-1, keepdim=True).clamp(min=smallest), own / (own + others).clamp(min=smallest)
