"""How many micro-batches run as one forward and backward: what fits, or few where a policy depends on the passes.

A pass of many costs less than as many passes, and where a step is one pass its load is known without a counting pass.
The numbers are those of single passes (`equipoise.Balancer(sequences_per_micro_batch=)`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ...policies import AuxLoss, Policy
from ...policies.schedule import Schedule

if TYPE_CHECKING:
    from ..config.schema import RunConfig

__all__ = ["max_pass_size", "num_passes", "uses_shuffle"]

PIECE = 4  # micro-batches of a pass where a step must have several passes
# Tokens x width x layers: 8192 tokens of 3 layers of width 128 are one pass. Beyond, tensors grow out of the cache and
# memory counts.
FITS = 1 << 22


def max_pass_size(config: RunConfig, policies: Sequence[Policy], *, compares: bool) -> int:
    """The most micro-batches of one pass: ``train.micro_batches_per_pass``, or chosen here where that is 0.

    ``compares``: in this step the estimators of the load are compared, most of which see it grow pass by pass. So do
    the policies with such an estimator, at every step.

    >>> from equipoise.lab.config.schema import RunConfig
    >>> max_pass_size(RunConfig(), [AuxLoss(estimator="exact")], compares=False)
    128
    >>> max_pass_size(RunConfig(), [AuxLoss(estimator="prefix")], compares=False)
    4
    """
    train, model = config.train, config.model
    if train.micro_batches_per_pass:
        return train.micro_batches_per_pass
    in_pieces = compares or any(_depends(scheduled.policy) for scheduled in Schedule(policies))
    if in_pieces or model.through == "transformers":  # whose memory is not known here
        return PIECE
    tokens = train.sequences_per_micro_batch * config.data.sequence_length
    return max(PIECE, FITS // (tokens * model.width * model.layers))


def num_passes(micro_batches: int, most: int) -> int:
    """The fewest passes of at most so many micro-batches that share them evenly.

    >>> num_passes(32, 42), num_passes(32, 5), num_passes(7, 4)
    (1, 8, 7)
    """
    return next(n for n in range(1, micro_batches + 1) if micro_batches % n == 0 and micro_batches // n <= most)


def uses_shuffle(policies: Sequence[Policy]) -> bool:
    """Whether a policy draws tokens of the whole step: it needs a counting pass also where the step is one pass."""
    return Schedule(policies).shuffles


def _depends(policy: object) -> bool:
    """Whether, by its definition, a policy's loss depends on the passes that a step is cut into."""
    if not isinstance(policy, AuxLoss):
        return False
    grows = policy.scope == "global_batch" and policy.estimator in ("prefix", "filled")
    return grows or policy.scope in ("data_parallel", "shuffle")
