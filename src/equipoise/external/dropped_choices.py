"""Leaves out choices of another library's router whose weight a token can spare, so that they are not computed."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from ..functional.adaptive_top_k import drop_experts
from .router_spec import RouterSpec

__all__ = ["DroppedChoices", "skipping_experts", "way_of"]

# How the experts of transformers are computed (`ExpertsInterface`). These take an id behind the last expert as none:
# "grouped_mm" leaves it out, "batched_mm" computes some expert for it and multiplies by the weight of 0; "eager" may.
TAKE_NONE = ("grouped_mm", "batched_mm")
LOOKS_FOR_NONE = "_is_expert_parallel"  # they look for such ids where a module says that its experts lie on many ranks


class DroppedChoices:
    """What a router's weights and ids become; see `equipoise.functional.drop_experts` for the rule.

    Args:
        threshold: of the weight that a token may lose.
        spec: of the router.
    """

    def __init__(self, threshold: float, spec: RouterSpec) -> None:
        self.threshold, self.spec = threshold, spec
        self.experts: Sequence[nn.Module] = ()  # of its block, where they take an id of E as none
        self.ways = TAKE_NONE  # of computing them

    def __call__(self, weights_TK: Tensor, ids_TK: Tensor) -> tuple[Tensor, Tensor]:
        none, given_TK = self.none, ids_TK
        if self.spec.may_drop:  # an id of -1 is dropped as it is
            weights_TK = weights_TK.masked_fill(given_TK < 0, 0.0)
        weights_TK, ids_TK = drop_experts(
            weights_TK, given_TK, self.threshold, normalize=self.spec.normalize, none=none
        )
        if self.spec.may_drop and none is not None:
            ids_TK = ids_TK.where(given_TK >= 0, given_TK)
        return weights_TK, ids_TK

    @property
    def none(self) -> int | None:
        """The id of a dropped choice; None where its expert is computed and its weight is 0."""
        takes = bool(self.experts) and all(way_of(one) in self.ways for one in self.experts)
        return self.spec.num_experts if takes else None

    @property
    def computed(self) -> bool:
        """Whether the expert of a dropped choice is computed all the same."""
        return self.none is None or any(way_of(one) == "batched_mm" for one in self.experts)

    def leave_out(self, experts: Sequence[nn.Module], *, eager: bool) -> None:
        """Lets these experts, those of its block, leave out dropped choices; none of them: all are computed.

        ``eager``: also in the code of the model's own class.
        """
        for module in (*self.experts, *experts):
            setattr(module, LOOKS_FOR_NONE, module in experts)
        self.experts, self.ways = experts, (*TAKE_NONE, "eager") if eager else TAKE_NONE


def skipping_experts(block: nn.Module) -> list[nn.Module]:
    """The experts in a router's block that can be told to leave out an id; none where they lie on several ranks."""
    found = [module for module in block.modules() if hasattr(module, LOOKS_FOR_NONE)]
    return [] if any(getattr(module, LOOKS_FOR_NONE) for module in found) else found


def way_of(experts: nn.Module) -> str | None:
    """How they are computed: the name of an implementation of transformers."""
    return getattr(experts.config, "_experts_implementation", None)
