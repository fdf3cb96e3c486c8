"""What stands beside a router whose code you can edit or subclass: the balancer finds it, the router calls it."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from ..autograd.balance_gradient import attach_balance_gradient, record_logit_grad
from ..autograd.protocol import RouterTraits
from ..autograd.router_state import RouterState
from ..autograd.token_layout import TokenLayout
from ..errors import ConfigError, InputError, StateError
from ..functional.routing import check_routing, count_choices
from .correction_bias import CorrectionBias

__all__ = ["RouterCarrier"]


class RouterCarrier(nn.Module):
    """Makes a router of an engine, or of your own, one that `Balancer` finds: a child of it, and two calls.

    It has no parameters and no buffers: nothing of it is in a checkpoint, and without a balancer both calls return what
    they were given. A bias stays the router's own tensor, moved in place, so that its checkpoints and exports have it.

    Args:
        router: the module that chooses; its parameters are those that train the choice.
        num_experts, top_k: E, K.
        gate: "softmax", "sigmoid" or "sqrt_softplus": how probabilities follow from the logits.
        bias: name of the tensor (E,) of ``router`` that it adds to its scores to choose, and to nothing else. Only one
            that nobody else moves: switch the engine's own updates off.
        bias_of: the module that holds it, where that is not the router but, say, the layer around it.
        without_bias: what to do for a bias where there is none, in words, for the error.
        sequence_first: tokens lie (S, B), not (B, S); logits then are (S, B, E).
        drops: choices may be left out (-1, or a row of the map with fewer than K): they are no load.

    Raises ConfigError for a gate or sizes that cannot route, and for a ``bias`` that is no tensor there.

    >>> class Gate(nn.Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.linear = nn.Linear(4, 8, bias=False)
    ...         self.balance = RouterCarrier(self, num_experts=8, top_k=2, gate="softmax")
    ...
    ...     def forward(self, x):
    ...         raw = self.linear(x)
    ...         logits = self.balance.record(raw)  # first call: choose by these
    ...         weights, ids = logits.softmax(dim=-1).topk(2, dim=-1)
    ...         return self.balance.attach(weights, raw, ids, TokenLayout(num_sequences=1)), ids
    >>> from equipoise import AuxLoss, Balancer
    >>> gate = Gate()
    >>> balancer = Balancer(gate, [AuxLoss("micro_batch", coef=1e-2)])
    >>> balancer.tap(gate(torch.randn(16, 4))[0].square().mean()).backward()
    >>> balancer.step()
    >>> balancer.metrics()["balance/tokens"]
    16.0
    """

    module: nn.Module  # the router
    batch_context = None  # it is told with each call how the tokens lie

    def __init__(
        self,
        router: nn.Module,
        *,
        num_experts: int,
        top_k: int,
        gate: str,
        bias: str | None = None,
        bias_of: nn.Module | None = None,
        without_bias: str = "balance this router with AuxLoss",
        sequence_first: bool = False,
        drops: bool = False,
    ) -> None:
        super().__init__()
        check_routing(num_experts, top_k, gate)
        owner = router if bias_of is None else bias_of
        if bias is not None and not isinstance(getattr(owner, bias, None), Tensor):
            raise ConfigError(
                expected=f"a tensor {bias!r} of the {type(owner).__name__} that it chooses with",
                got=f"{getattr(owner, bias, None)!r}",
                do="create it before the carrier, or leave bias= out",
            )
        object.__setattr__(self, "module", router)  # not a child: it is the parent
        self.num_experts, self.top_k, self.gate = num_experts, top_k, gate
        self.balance_state: RouterState | None = None
        self.sequence_first, self.drops, self._without_bias = sequence_first, drops, without_bias
        self._bias = None if bias is None else CorrectionBias(owner, bias, num_experts, [])
        self._recorded = False

    @property
    def traits(self) -> RouterTraits:
        return RouterTraits(idle_experts=int(self.drops))

    def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]:
        """Those of the router, which are not the carrier's own (``recurse=False``: none)."""
        return self.module.parameters() if recurse else iter(())

    @property
    def expert_bias(self) -> Tensor | None:
        return None if self._bias is None else self._bias.view()

    @property
    def bias_owner(self) -> str:
        return "none" if self._bias is None else f"the model's {self._bias.name}"

    def enable_selection_bias(self) -> None:
        """Takes the router's own bias over, in fp32. Raises ConfigError where it has none."""
        if self._bias is None:
            raise ConfigError(
                expected="a router that chooses with a bias",
                got=f"{type(self.module).__name__} without one",
                do=self._without_bias,
            )
        self._bias.take_over()

    def disable_selection_bias(self) -> None:
        """The bias is the router's and stays."""

    def record(self, logits: Tensor) -> Tensor:
        """``logits``, unchanged: choose and weigh by what this returns, where the other losses' gradient is measured.

        The original ones go to `attach`, once, and nowhere else.
        """
        if self._bias is not None:
            self._bias.keep_exact()  # a cast of the model may have rounded it
        self._recorded = True
        state = self.balance_state
        return logits if state is None else record_logit_grad(state, logits, training=self.training)

    def attach(self, weights: Tensor, logits: Tensor, choices: Tensor, layout: TokenLayout) -> Tensor:
        """``weights``, unchanged: use what this returns. Its backward adds the balance gradient at ``logits``.

        Args:
            weights: of any shape: what the experts' outputs are multiplied by.
            logits: (T, E), (B, S, E), or (S, B, E) with ``sequence_first``: what `record` was given.
            choices: expert ids (..., K), integers; or a map (..., E), bool, as wide as the logits.
            layout: B, and the masks (T,) of all tokens, sequence after sequence.

        Raises InputError for shapes that do not fit, StateError when `record` was not called before.
        """
        state = self.balance_state
        recorded, self._recorded = self._recorded, False
        if state is None or not state.measures(training=self.training):
            return weights
        if state.spec.norms and not recorded:
            raise StateError(
                expected=f"record(logits) before attach(), in {type(self.module).__name__}.forward",
                got="attach() alone",
                do="choose by logits = carrier.record(raw), and pass raw to attach()",
            )
        layout = layout.checked(logits.shape[:-1].numel()).on(logits.device)
        logits_TE, ids_TK, counts_BE = self._arrange(logits, choices, layout)
        return attach_balance_gradient(state, weights, logits_TE, ids_TK, counts_BE, layout, training=self.training)

    def _arrange(self, logits: Tensor, choices: Tensor, layout: TokenLayout) -> tuple[Tensor, Tensor, Tensor]:
        """(logits (T, E), ids (T, K), counts (B, E)) with the tokens of a sequence side by side."""
        experts, rows = self.num_experts, layout.rows
        if logits.shape[:-1] != choices.shape[:-1] or logits.shape[-1] != experts:
            raise InputError(
                expected=f"logits (..., {experts}) and choices of the same tokens",
                got=f"{tuple(logits.shape)} and {tuple(choices.shape)}",
                do="pass both before they are flattened, padded or permuted",
            )
        logits_TE, choices = self._rows(logits, rows), self._rows(choices, rows)
        if choices.dtype == torch.bool:
            picked_TK, ids_TK = choices.long().topk(self.top_k, dim=-1)
            ids_TK = ids_TK.masked_fill(picked_TK == 0, experts) if self.drops else ids_TK
            mask_T = layout.token_mask_T
            picked_TE = choices if mask_T is None else choices & mask_T.to(choices.device).unsqueeze(1)
            return logits_TE, ids_TK, picked_TE.view(rows, -1, experts).sum(dim=1)
        ids_TK = choices.long()
        ids_TK = ids_TK.masked_fill(ids_TK < 0, experts) if self.drops else ids_TK
        counts_BE = count_choices(ids_TK, experts + self.drops, layout.token_mask_T, rows)[:, :experts]
        return logits_TE, ids_TK, counts_BE

    def _rows(self, x: Tensor, sequences: int) -> Tensor:
        """(T, ...) sequence after sequence."""
        x = x.flatten(0, -2)  # first: the gradient at (S, B, E) then lies as an engine's own does
        return x.unflatten(0, (-1, sequences)).transpose(0, 1).flatten(0, 1) if self.sequence_first else x
