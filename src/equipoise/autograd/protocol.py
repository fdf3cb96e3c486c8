"""What a balancer asks of a router: the contract between a model and `Balancer`, open to routers of your own."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple, Protocol, TypeGuard

from torch import Tensor, nn

from ..errors import ConfigError
from ..functional.routing import PLACES
from .router_state import RouterState

__all__ = ["BalancedRouter", "ClassBiasedRouter", "RouterTraits", "has_class_biases", "is_balanced_router"]

MEMBERS = (
    "balance_state",
    "num_experts",
    "top_k",
    "gate",
    "training",
    "module",
    "traits",
    "expert_bias",
    "bias_owner",
    "batch_context",
    "parameters",
    "enable_selection_bias",
    "disable_selection_bias",
)


class RouterTraits(NamedTuple):
    """What of a router its sizes do not tell. The defaults are a router that calls `record_logit_grad` itself.

    >>> RouterTraits(normalize=False).weights_form is None
    True
    """

    normalize: bool = True  # the K weights are divided by their sum
    scale: float = 1.0  # and multiplied by this
    # Ids from num_experts on that may be chosen and do no work: experts that are none, or one id for a choice that is
    # none, where a token may use fewer than K experts.
    idle_experts: int = 0
    returns_logits: bool = True  # False: probabilities, of which a z-loss knows nothing
    records_logit_grad: bool = True  # False: the LM's gradient at the logits is computed from that at the weights
    measures_norms: bool = True  # False: neither is possible
    bias_place: str = PLACES[0]  # where its selection bias acts: see `functional.route`
    bias_places: tuple[str, ...] = PLACES[:1]  # and may act: what `enable_selection_bias` takes
    selects: bool = False  # it says with each call how it chose (`Selection`), which the quantile rule asks for
    class_biases: bool = False  # it is a `ClassBiasedRouter`
    widths: tuple[int, ...] | None = None  # of the experts behind it, where these are unlike

    @property
    def weights_form(self) -> tuple[bool, float] | None:
        """(normalize, scale) where the gradient at the logits has to be computed from that at the weights."""
        return None if self.records_logit_grad else (self.normalize, self.scale)


class BalancedRouter(Protocol):
    """A router that can be balanced: `equipoise.Router`, another library's through `equipoise.external`, or your own.

    A module of your own that has all of these (see `is_balanced_router`), and that passes its weights through
    `attach_balance_gradient` while ``balance_state`` is set, is found by `Balancer` without registration.
    `equipoise.RouterCarrier` has them for you.
    """

    num_experts: int
    top_k: int
    gate: str  # "softmax", "sigmoid" or "sqrt_softplus": how probabilities follow from logits

    @property
    def balance_state(self) -> RouterState | None:
        """A plain attribute will do. Set by the balancer; None without one, and after ``remove()``."""
        ...

    @balance_state.setter
    def balance_state(self, state: RouterState | None) -> None: ...

    @property
    def training(self) -> bool: ...

    @property
    def module(self) -> nn.Module:
        """The module in the model: the router itself, or what it stands for."""
        ...

    @property
    def traits(self) -> RouterTraits: ...

    @property
    def expert_bias(self) -> Tensor | None:
        """(E,) fp32, for selection only, at ``traits.bias_place``; None: there is none."""
        ...

    @property
    def bias_owner(self) -> str:
        """Whose it is, for people: "none", "the router's", "the model's e_score_correction_bias", "the balancer's".

        "the balancer's" is in no weights of the model: its checkpoint is the balancer's own.
        """
        ...

    @property
    def batch_context(self) -> Any:
        """Who knows how its tokens lie (see `equipoise.external.batch_context`); None: it is told with each call."""
        ...

    def parameters(self) -> Iterator[nn.Parameter]: ...

    def enable_selection_bias(self, place: str = ...) -> None:
        """Adds a bias of zeros if there is none yet, which acts there. Raises ConfigError where none can be added.

        ``place``: one of ``traits.bias_places``; passed where it is not "scores", so a router that knows no other may
        leave the argument out.
        """
        ...

    def disable_selection_bias(self) -> None:
        """Takes away a bias that `enable_selection_bias` added."""
        ...


class ClassBiasedRouter(BalancedRouter, Protocol):
    """A router that can have biases of its own for the tokens of single classes: ``traits.class_biases`` says so.

    It is told with each call which tokens these are, also in evaluation, and adds them as
    `equipoise.functional.class_bias.token_biases` does. ``tokens`` None is the bias of all tokens.
    """

    @property
    def class_biases(self) -> Mapping[str, Tensor]:
        """Name of a class of tokens -> the bias (E,) of its tokens, fp32."""
        ...

    def enable_selection_bias(self, place: str = ..., tokens: str | None = ...) -> None: ...

    def disable_selection_bias(self, tokens: str | None = ...) -> None: ...


def has_class_biases(router: BalancedRouter) -> TypeGuard[ClassBiasedRouter]:
    """Whether a class of tokens may have a bias of its own there.

    >>> from equipoise import Router
    >>> has_class_biases(Router(dim=8, num_experts=4, top_k=2))
    True
    """
    return router.traits.class_biases


def is_balanced_router(module: nn.Module) -> TypeGuard[BalancedRouter]:
    """Whether a module of a model is a `BalancedRouter`.

    By ``hasattr``, and not by ``isinstance`` of a runtime protocol: from Python 3.12 on that does not see buffers, and
    a bias is one.

    Raises ConfigError for a module with a ``balance_state`` that lacks something else.

    >>> is_balanced_router(nn.Linear(2, 2))
    False
    """
    if not hasattr(module, MEMBERS[0]):
        return False
    if lacks := [name for name in MEMBERS if not hasattr(module, name)]:
        raise ConfigError(
            expected="a router with all that equipoise.autograd.protocol.BalancedRouter names",
            got=f"a {type(module).__name__} with balance_state and without {', '.join(lacks)}",
            do=f"give it {lacks[0]}, or an equipoise.RouterCarrier; without balance_state it is found by its output",
        )
    return True
