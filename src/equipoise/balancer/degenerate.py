"""Routing that no load can show to be ill: weights that teach the router nothing, and choices that are none."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

from ..autograd.protocol import BalancedRouter
from ..errors import ConfigError
from ..policies.schedule import Schedule

__all__ = ["FoundRouter", "check_degenerate"]

FoundRouter = tuple[int, str, BalancedRouter]  # (part of the model, name, router)

STEPS = 4  # of the stack from a warning here to the line that makes a Balancer


def check_degenerate(routers: Sequence[FoundRouter], schedule: Schedule) -> None:
    """Looks at (part, name, router) of this library or of another.

    Top-1 with normalised weights: the one weight is always 1, whatever the logits, so the model's loss gives the router
    no gradient; in balance it routes at random, and every measure of load calls that perfect. A warning and no error,
    because a balance loss or a loss of the user's own on the logits still trains the router, because checkpoints with
    such routers exist, and because a model may have been made with it on purpose (a control with random routing). A
    weight that is scaled by 0 is the same. (Switch Transformers, arXiv 2101.03961, eq. 2, weigh by the probability.)

    All experts for every token (K = E, a soft mixture; E = 1 among them): each load is 1/E by definition, so nothing
    that measures load can push. Where no router has a choice, a policy that should push is an error; where some have,
    the others are named in a warning. A coefficient or rate of 0 only measures, which is always allowed.

    Raises ConfigError: a policy that measures load, on routers of which none leaves an expert out.
    """
    for told in (_untaught(routers, schedule), _without_choice(routers, schedule)):
        if told:
            warnings.warn(told, stacklevel=STEPS)


def _untaught(routers: Sequence[FoundRouter], schedule: Schedule) -> str | None:
    """What to warn of where the weights do not depend on the logits of a router that should learn."""
    learning = [(name, router) for _, name, router in routers if any(p.requires_grad for p in router.parameters())]
    alike = [name for name, router in learning if router.top_k == 1 and router.traits.normalize]
    zero = [name for name, router in learning if router.traits.scale == 0]
    if not alike and not zero:
        return None
    got = f"top-1 with normalised weights, each of them 1 whatever the logits ({_some(alike)})"
    do = (
        "weigh by the probability (Router(normalize=False), the default for top_k=1; norm_topk_prob=False in a "
        "configuration of transformers), or choose two experts"
    )
    if zero:
        got, do = f"weights that are multiplied by 0 ({_some(zero)})", "give the router a scale other than 0"
    pushes = any(loss.coef != 0 for _, loss in (*schedule.terms, *schedule.z_losses))
    left = "only the policies' own loss moves it" if pushes else "nothing moves it"
    return (
        f"expected weights through which the model's loss teaches the router; got {got}: its gradient there is 0 and "
        f"{left}, while a balanced load looks healthy; {do}"
    )


def _without_choice(routers: Sequence[FoundRouter], schedule: Schedule) -> str | None:
    """What to warn of where some routers send every token to all experts; raises where all of them do."""
    every = [(name, router) for _, name, router in routers if _takes_all(router)]
    if not every or not schedule.balances_load:
        return None
    router = every[0][1]
    names = _some([name for name, _ in every])
    error = ConfigError(
        expected="routers that leave some experts out, because a load is balanced by who is chosen",
        got=f"top_k={router.top_k} of {router.num_experts} experts ({names}): each load is 1/E, whatever the gate says",
        do="choose fewer (top_k < num_experts); or keep the soft mixture with [ZLoss()], or AuxLoss(coef=0.0) to "
        "measure alone: balance/maxvio_gate shows how evenly its gate weighs",
    )
    if len(every) == len(routers):
        raise error
    return f"not balanced, because every token goes to every expert there: {names}"


def _takes_all(router: BalancedRouter) -> bool:
    """Experts that do no work (LongCat's) may be chosen too, and then the others have a load to balance."""
    return router.top_k >= router.num_experts + router.traits.idle_experts


def _some(names: Sequence[str]) -> str:
    return ", ".join(name or "the model itself" for name in names[:3]) + (
        f" and {len(names) - 3} more" if len(names) > 3 else ""
    )
