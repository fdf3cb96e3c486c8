"""A router of another library, tied to a meter by a forward hook; the model's own code stays as it is."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..autograd.balance_gradient import attach_balance_gradient
from ..autograd.finite import check_logits
from ..autograd.protocol import RouterTraits
from ..autograd.router_state import RouterState
from ..autograd.token_layout import Placed
from ..errors import ConfigError, InputError, StateError
from ..functional.routing import choose, count_choices
from ..torch_internals import current_backward
from .batch_context import Layout, not_read
from .bias_support import what_else_it_does
from .correction_bias import NativeBias
from .example_run import Call
from .output_formats import take_apart
from .router_spec import Facts

__all__ = ["ForeignRouter"]


class ForeignRouter:
    """Another library's router with what a balancer asks of ours; see ``equipoise.layers.Router``.

    ``expert_bias`` is the model's own correction bias where it has one, so that its checkpoints carry it, else one of
    ours, with which the hook chooses again; that one is in the balancer's ``state_dict``.

    Choices of idle experts (LongCat's that hand a token back, Zaya's that skips the layer) are no load: f, P and the
    bias are those of the experts that work, as if the others were no choice. How many choices go to idle experts is
    left to the model; their biases keep their distance from the mean of the others. A choice that the router dropped
    (id -1: capacity, dynamic k, expert dropout) is counted as one of an idle expert behind these. That costs ten
    small operations a call, and is left out for transformers' own classes, which drop none.
    """

    def __init__(
        self,
        module: nn.Module,
        shell: nn.Module,
        facts: Facts,
        native: NativeBias | None,
        call: Call | None = None,
    ) -> None:
        """``shell`` trains the router: what wraps it (PEFT), the router itself, or the nearest with parameters.

        ``call`` is one of the router's own, for what has to be tried before a meter is set.
        """
        self.module, self.shell, self.facts = module, shell, facts
        self.num_experts, self.top_k, self.gate = facts.num_experts, facts.top_k, facts.gate
        self.idle = facts.idle + facts.may_drop
        self.own_bias: Tensor | None = None
        self._native, self._call = native, call
        self._balance_state: RouterState | None = None
        self._hook: Any = None
        self._again = (-1, 0)  # the backward that runs pieces of a forward again, and how many it has run

    def lies_in(self, layout: Layout, name: str) -> None:
        """Its tokens are those of the model that ``layout`` follows, where it has this name."""
        self.layout, self.name, self._way = layout, name, layout.way_to(name)

    @property
    def training(self) -> bool:
        return self.module.training

    @property
    def traits(self) -> RouterTraits:
        facts = self.facts
        return RouterTraits(
            facts.normalize,
            facts.scale,
            idle_experts=self.idle,
            returns_logits=not facts.probabilities,
            records_logit_grad=False,  # the language model's gradient at the logits passes inside the module
            measures_norms=facts.exact,
        )

    @property
    def bias_owner(self) -> str:
        if self._native is not None:
            return f"the model's {self._native.name}"
        return "none" if self.own_bias is None else "the balancer's"

    @property
    def batch_context(self) -> Layout:
        return self.layout

    def parameters(self) -> Iterator[nn.Parameter]:
        return self.shell.parameters()

    @property
    def balance_state(self) -> RouterState | None:
        return self._balance_state

    @balance_state.setter
    def balance_state(self, state: RouterState | None) -> None:
        """Ties the outputs from now on; None unties them, but goes on choosing with a bias of ours."""
        self._balance_state, self._call = state, None
        if state is not None and self._hook is None:
            self._hook = self.module.register_forward_hook(self._tied, with_kwargs=True)
        elif state is None:
            self.layout.remove()
            if self._hook is not None and self.own_bias is None:
                self._hook.remove()
                self._hook = None

    @property
    def expert_bias(self) -> Tensor | None:
        """(E,), always fp32 where an ``ExpertBias`` moves it."""
        return self.own_bias if self._native is None else self._native.view()

    def disable_selection_bias(self) -> None:
        """Takes away the bias of ours; one of the model stays."""
        self.own_bias = None

    def enable_selection_bias(self) -> None:
        """Takes the model's bias over, in fp32, or adds one.

        Raises ConfigError where the router's choice cannot be made again with a bias added.
        """
        if self._native is not None:
            self._native.take_over()
            self.layout.before_each.append(self._native.keep_exact)
            return
        if self.own_bias is not None:
            return
        does = self.facts.no_bias or ("" if self._call is None else what_else_it_does(*self._as_called()))
        if does:
            kind = type(self.module).__name__
            do = "use AuxLoss for this model"
            if not self.facts.no_bias:
                do = f"let {kind} return the logits that it chooses by, noise and masks (-inf) included, or use AuxLoss"
            raise ConfigError(
                expected="a router that owns a correction bias, or whose choices could be made again with one",
                got=f"{kind}: {does}",
                do=do,
            )
        device = next((p.device for p in self.parameters()), torch.device("cpu"))
        self.own_bias = torch.zeros(self.num_experts, dtype=torch.float32, device=device)

    def _as_called(self) -> tuple[nn.Module, Call, Facts]:
        assert self._call is not None
        return self.module, self._call, self.facts

    def _tied(self, module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> Any:
        parts = take_apart(module, args, kwargs, output, swapped=self.facts.swapped)
        if parts is None:
            return None
        logits_TE, weights_TK, ids_TK = parts.found
        returned_TE = logits_TE
        if self.facts.probabilities:
            logits_TE = logits_TE.clamp(min=torch.finfo(logits_TE.dtype).tiny).log()
        if self.own_bias is not None:
            if self.own_bias.device != logits_TE.device:  # the model moved
                self.own_bias = self.own_bias.to(logits_TE.device)
            if self.facts.probabilities:
                logits_TE = logits_TE.masked_fill(returned_TE == 0, float("-inf"))
            if self._balance_state is None or self._balance_state.raises_immediately:
                check_logits(
                    logits_TE, masked=True, name="" if self._balance_state is None else self._balance_state.name
                )
            again_TK, ids_TK, _ = choose(
                logits_TE,
                self.top_k,
                gate=self.gate,
                selection_bias_E=self.own_bias,
                num_groups=1,
                top_groups=1,
                normalize=self.facts.normalize,
                scale=self.facts.scale,
                masked=True,
            )
            weights_TK = again_TK.to(weights_TK.dtype)
        if self._balance_state is not None and self._balance_state.measures(training=module.training):
            weights_TK = self._tie(self._balance_state, weights_TK, logits_TE[:, : self.num_experts], ids_TK)
        if weights_TK is parts.found.weights_TK:  # only looked at
            return None
        return parts.put(weights_TK, None if self.own_bias is None else ids_TK)

    def _tie(self, state: RouterState, weights_TK: Tensor, logits_TE: Tensor, ids_TK: Tensor) -> Tensor:
        placed = self.layout.on(self._placed(state, len(ids_TK)), ids_TK.device)
        self._check(placed, state)
        batch, rows_T, given_TK = placed.batch, placed.rows_T, weights_TK
        if rows_T is not None:  # back to where the tokens lie in their sequences; the others are masked
            assert batch.valid_T is not None
            whole = len(batch.valid_T)
            weights_TK, logits_TE, ids_TK = (
                x.new_zeros(whole, x.shape[1]).index_copy(0, rows_T, x) for x in (weights_TK, logits_TE, ids_TK)
            )
        choices = self.num_experts + self.idle
        if self.facts.may_drop:
            ids_TK = ids_TK.masked_fill(ids_TK < 0, choices - 1)
        counts_BE = count_choices(ids_TK, choices, batch.token_mask_T, batch.rows)[:, : self.num_experts]
        tied_TK = attach_balance_gradient(
            state, weights_TK, logits_TE, ids_TK, counts_BE, batch, training=self.module.training
        )
        if tied_TK is weights_TK:
            return given_TK
        return tied_TK if rows_T is None else tied_TK[rows_T]

    def _check(self, placed: Placed, state: RouterState) -> None:
        """Raises InputError where padding is not known, or a load inside a micro-batch comes in pieces."""
        trains = self.training and torch.is_grad_enabled()
        if placed.unread and (trains or state.evaluation is not None):
            raise not_read(self.name, placed.tokens, placed.unread)
        inside = [term.kind for term in state.spec.terms if term.kind != "deferred"]
        if placed.piece and inside and trains:
            raise InputError(
                expected="all tokens of a forward in one call of a router, for a scope inside a micro-batch",
                got=f"router {self.name!r} that sees them in pieces (tiles), and scope {inside[0]!r}",
                do="use scope 'global_batch' or 'data_parallel', or switch the tiling off",
            )

    def _placed(self, state: RouterState, tokens: int) -> Placed:
        """How the tokens of this call lie; in a recompute, as they lay in forward: the model may have run since.

        Raises StateError where a loss was made of several passes and nothing tells which of them runs again.
        """
        name = self.name if self.training or state.evaluation is not None else ""
        if torch.compiler.is_compiling():
            return self.layout.place(self._way, tokens, self.facts.pictures)
        backward = current_backward()
        forward = backward == self.layout.noted_in  # or all of the model runs again
        known = [] if forward else [placed for placed in state.recompute_placements if placed.tokens == tokens]
        if not known:
            counts = state.which_pending == 0 if self.training else state.evaluation is not None
            if forward and counts and not self.layout.runs:
                raise StateError(
                    expected="a forward of the model that Balancer was given: its arguments tell padding and sequences",
                    got=f"a {type(self.module).__name__} that runs in a call of a part of it",
                    do="call the whole model, or pass part= to Balancer, the name of the part that you call",
                )
            placed = self.layout.place(self._way, tokens, self.facts.pictures, router=name)
            if forward and self.training and state.which_pending < 2:
                state.placed.append(placed)
            return placed
        if _are_pieces(known):  # a router's run again in their order
            self._again = (backward, self._again[1] + 1 if self._again[0] == backward else 0)
            return known[self._again[1] % len(known)]
        if not all(_same(known[0], other) for other in known[1:]):
            raise StateError(
                expected="gradient checkpointing of one pass per loss, or of passes whose padding and documents agree",
                got=f"{len(known)} passes of {tokens} tokens that differ in them; a recompute does not tell which",
                do="send them through the model as one batch, or call gradient_checkpointing_disable()",
            )
        return known[0]


def _are_pieces(placed: list[Placed]) -> bool:
    """Whether these calls of a router were pieces of one forward of the model."""
    begins = [one.piece for one in placed if one.piece is not None]
    return len(begins) == len(placed) > 1 and all(a < b for a, b in itertools.pairwise(begins))


def _same(one: Placed, other: Placed) -> bool:
    """Waits for the device where they are two objects: passes of one loss that were not given the same mask."""
    if one is other:
        return True
    pairs = zip((*one.batch[1:], one.rows_T), (*other.batch[1:], other.rows_T), strict=True)
    return one.batch.num_sequences == other.batch.num_sequences and all(
        a is b or (a is not None and b is not None and torch.equal(a, b)) for a, b in pairs
    )
