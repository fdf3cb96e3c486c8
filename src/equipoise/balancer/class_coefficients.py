"""The coefficients of a balance loss of one class of tokens: its own f, and 1 / T_c in the place of 1 / T."""

from __future__ import annotations

import torch
from torch import Tensor

from ..functional.load_view import LoadView, seen_load
from ..functional.losses import load_fractions
from ..policies.estimators import ESTIMATORS
from ..policies.losses import AuxLoss
from ..policies.token_classes import of_class
from .layer_group import LayerGroup

__all__ = ["class_coefficients"]


def class_coefficients(
    group: LayerGroup, policy: AuxLoss, view: LoadView | None, taken_LS: Tensor, push_L: Tensor, number: int
) -> tuple[Tensor, Tensor, Tensor]:
    """(row (L, E), factor (L,), deferred value (L,)): a row for an f chosen here, a factor for one of forward's.

    ``push_L`` holds 1 / T, with T as for a policy of all tokens. Over the share of the class in the step's tokens, as
    the policy's estimator knows it, that is 1 / T_c. Where it knows of no token of the class nothing is pushed: in a
    first step under ``previous``; and under ``filled``, in the first step with the class, if ranks that have it did not
    share it yet.

    Args:
        view: the policy's, as these layers have it.
        taken_LS: the statistics of this micro-batch.
        number: of the micro-step, 1 = the first.
    """
    spec, history = group.spec, group.histories.of_class[str(policy.tokens)]
    experts, (_, probs_LE, _) = spec.num_experts, spec.of_class(taken_LS, str(policy.tokens))
    zero_LE, zero_L = torch.zeros_like(probs_LE), torch.zeros_like(push_L)
    estimate_LX = ESTIMATORS[policy.estimator](history, policy.decay, number)
    if estimate_LX is None:
        return zero_LE, zero_L, zero_L
    fraction_LE, share_L = of_class(estimate_LX)
    push_L = torch.where(share_L > 0, push_L / share_L.clamp(min=torch.finfo(share_L.dtype).tiny), 0.0)
    if policy.scope in ("sequence", "document", "micro_batch"):
        return zero_LE, push_L, zero_L
    if policy.scope == "data_parallel":
        assert history.current_E is not None
        fraction_LE = load_fractions(history.current_E[:, :experts])
    fraction_LE = seen_load(view, fraction_LE)
    return push_L.unsqueeze(1) * fraction_LE, zero_L, experts * (fraction_LE * probs_LE).sum(dim=1)
