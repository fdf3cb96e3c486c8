"""How long a bias has moved one way: that it chases a load which it does not meet.

Legend: L layers, E experts.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..functional.load_view import LoadView, target_violation

__all__ = ["LONG", "bias_drift"]

# A step counts where an expert had less than half of its share (1), or more than half too much (-1). The average is
# beyond LONG after 230 such steps in a row, and below it again after 11 others. The sign of what a bias moved by would
# need a MaxVio above chance beside it, which an expert without tokens hardly changes where experts are many: with the
# masked expert below that shows in no seed at 1e-3.
# Measured on random logits (standard deviation 1) with a sigmoid gate, 1,200 steps, five seeds, 8 experts top-2 of 512
# tokens and 64 top-4 of 1,024. Even logits: at rates of 1e-5 to 1e-1 no step of any seed. Experts apart by a standard
# deviation of 1: at 1e-5 and 1e-4 all seeds, from step 230 to the end; at 1e-3 it takes up to 300 and 560 steps to
# settle, and those above 230 show in 2 and 5 seeds; at 1e-2 and 1e-1 none, and none at 1e-3 where they are apart by
# 0.3. An expert whose logits are masked: all seeds, at rates of 1e-5 to 1e-2 to the end.
DECAY, FAR, LONG = 0.99, 0.5, 0.9


def bias_drift(drift_LE: Tensor | None, counts_LE: Tensor, view: LoadView | None, moved_L1: Tensor) -> Tensor:
    """(L, E) fp64, from -1 to 1, after a step: 1 where an expert has lacked tokens for long, whatever its bias did.

    Args:
        drift_LE: before it; None: 0.
        counts_LE, view: of the step, and how the rule sees them.
        moved_L1: whether the bias of a layer followed them; where not, or where nothing was counted, all stays.

    >>> bias_drift(None, torch.tensor([[4, 5, 0]]), None, torch.tensor([[True]]))
    tensor([[ 0.0000, -0.0100,  0.0100]], dtype=torch.float64)
    """
    mean_L1 = counts_LE.double().mean(dim=-1, keepdim=True)
    lacks_LE = 1 - counts_LE / mean_L1 if view is None else target_violation(view, counts_LE)
    far_LE = (lacks_LE / FAR).clamp(-1, 1).trunc()
    old_LE = torch.zeros_like(far_LE) if drift_LE is None else drift_LE
    return torch.where(moved_L1 & (mean_L1 > 0), old_LE.lerp(far_LE, 1 - DECAY), old_LE)
