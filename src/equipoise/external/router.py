"""A router of another library, balanced through a forward hook; the model's own code stays as it is."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..autograd.balance_gradient import attach_balance_gradient
from ..autograd.finite import check_logits
from ..autograd.protocol import RouterTraits
from ..autograd.router_state import RouterState
from ..autograd.routing_calls import RecordedCalls, ReplayedCalls
from ..autograd.token_layout import TokenPlacement, are_pieces, same_placement
from ..errors import ConfigError, InputError, StateError
from ..functional.quantile import Selection
from ..functional.routing import PLACES, choose, count_choices, weigh
from ..functional.routing_mask import drop_hidden
from ..torch_internals import current_backward
from .batch_context import BatchContext
from .bias_support import check_choice, why_other_weights
from .correction_bias import CorrectionBias
from .dropped_choices import DroppedChoices
from .example_run import RouterCall
from .gate_fitting import log_probabilities
from .output_formats import RouterOutput, parse_output
from .padding import padding_unknown
from .router_spec import RouterSpec
from .token_ids import RouterMask

__all__ = ["ExternalRouter", "attached_routers"]


class ExternalRouter:
    """Another library's router with the attributes of ``equipoise.layers.Router`` that a balancer uses.

    ``expert_bias`` is the model's own correction bias if it has one, so that its checkpoints contain it; else one of
    ours, with which the hook chooses experts again, and which the balancer's ``state_dict`` contains.

    Choices of no-op experts (LongCat's identity experts, Zaya's that skips the layer) are no load: f, P and the bias
    are those of the other experts, as if no-op experts were no choice. How many choices go to no-op experts is left to
    the model; the distance of their biases from the mean of the others stays. A choice that the router dropped (id -1:
    capacity, dynamic k, expert dropout) is counted as one of a further no-op expert. That costs ten small operations a
    call, and is omitted for the classes of transformers, which drop none. So is one that a mask by token id leaves
    without an expert: its weight is 0, and to the block it is the token's first expert once more.

    Args:
        module: the router.
        trained: the module whose parameters train the router: PEFT's wrapper, the router itself, or the nearest module
            around it with parameters.
        spec: what was found out about it.
        correction_bias: the model's own bias.
        call: a call of the router, to check before a state is attached whether a bias can be added.
    """

    def __init__(
        self,
        module: nn.Module,
        trained: nn.Module,
        spec: RouterSpec,
        correction_bias: CorrectionBias | None,
        call: RouterCall | None = None,
    ) -> None:
        self.module, self.trained, self.spec = module, trained, spec
        self.num_experts, self.top_k, self.gate = spec.num_experts, spec.top_k, spec.gate
        self.idle = spec.idle + spec.may_drop
        self.own_bias: Tensor | None = None
        self.mask: RouterMask | None = None  # by token id; it stays with the model, as a bias of ours does
        self.drops = False  # with that mask some choices are none: an id of E
        self._bias_place = PLACES[0]  # of a bias of ours
        self._correction_bias, self._call = correction_bias, call
        self._balance_state: RouterState | None = None
        self._routing_calls: RecordedCalls | ReplayedCalls | None = None
        self._replays = False  # it was looked at whether its weights can be made for other experts
        self.dropped: DroppedChoices | None = None  # choices that evaluation leaves out
        self._hook: Any = None
        self._recomputed = (-1, 0)  # the backward that recomputes pieces of a forward, and how many it has recomputed

    def set_context(self, context: BatchContext, name: str) -> None:
        """Its tokens are those of the model that ``context`` follows, in which it has this name."""
        self.batch_context, self.name, self._calls_around = context, name, context.calls_around(name)

    @property
    def training(self) -> bool:
        return self.module.training

    @property
    def traits(self) -> RouterTraits:
        spec = self.spec
        return RouterTraits(
            spec.normalize,
            spec.scale,
            idle_experts=self.idle,
            returns_logits=not spec.probabilities,
            records_logit_grad=False,  # no hook sees the language model's gradient at the logits
            measures_norms=spec.exact,
            bias_place=self._bias_place,
            bias_places=PLACES if self._correction_bias is None else PLACES[:1],
            selects=self._groups is not None,
        )

    @property
    def _groups(self) -> tuple[int, int] | None:
        """(groups, how many of them a token may choose from) of the choice; None where it is not known.

        With a bias of ours the choice is made again here, without groups; a model that has a bias of its own says them
        as DeepSeek-V3's router does, which many others copy.
        """
        if self._correction_bias is None:
            return 1, 1
        of = [getattr(self.module, name, None) for name in ("num_group", "topk_group")]
        return (of[0], of[1]) if all(isinstance(one, int) for one in of) else None  # type: ignore[return-value]

    def parameters(self) -> Iterator[nn.Parameter]:
        return self.trained.parameters()

    @property
    def balance_state(self) -> RouterState | None:
        return self._balance_state

    @balance_state.setter
    def balance_state(self, state: RouterState | None) -> None:
        """Attaches the balance gradient to the outputs from now on; None stops that, but keeps a bias of ours."""
        self._balance_state, self._call = state, None
        self.batch_context.reads_kinds = state is not None and bool(state.spec.classes)
        if state is None:
            self.batch_context.remove()
        self._keep_hook()

    @property
    def routing_calls(self) -> RecordedCalls | ReplayedCalls | None:
        """What records its choices, or takes their place; with a balancer or without."""
        return self._routing_calls

    @routing_calls.setter
    def routing_calls(self, calls: RecordedCalls | ReplayedCalls | None) -> None:
        self._routing_calls = calls
        self._keep_hook()

    @property
    def only_waits(self) -> bool:
        """Whether its hook does nothing but wait, after a replay, for a recompute that comes too late."""
        waits = self._routing_calls is not None and self._routing_calls.ended
        return waits and self._balance_state is None and not self._chooses and self.dropped is None

    def drop_below(self, threshold: float | None) -> None:
        """Adaptive top-k in evaluation; see `equipoise.functional.drop_experts`. None: all K choices again."""
        if threshold is None:
            if self.dropped is not None:
                self.dropped.leave_out((), eager=False)
            self.dropped = None
        elif self.dropped is None:
            self.dropped = DroppedChoices(threshold, self.spec)
        else:
            self.dropped.threshold = threshold
        self._keep_hook()

    def _keep_hook(self) -> None:
        """A hook as long as there is something to do; a bias of ours and a mask stay with the model."""
        parts = (self._balance_state, self._routing_calls, self.mask, self.dropped)
        wanted = any(one is not None for one in parts)
        if wanted and self._hook is None:
            self._hook = self.module.register_forward_hook(self._hooked, with_kwargs=True)
        elif not wanted and self._hook is not None and self.own_bias is None:
            self._hook.remove()
            self._hook = None

    @property
    def _chooses(self) -> bool:
        """Whether experts are chosen again in the hook."""
        return self.own_bias is not None or self.mask is not None

    def set_mask(self, mask: RouterMask | None) -> None:
        """Lets a token choose among what its id sees alone; None: among all. Not while there is a balancer.

        Raises ConfigError where its choice cannot be repeated.
        """
        if mask is not None:
            self._check_choice("a router whose choices could be made again with a mask", "leave this model without one")
            self._call = None
        self.mask = mask
        self.drops = mask is not None and mask.drops
        self.idle = self.spec.idle + (self.spec.may_drop or self.drops)
        self._keep_hook()

    @property
    def expert_bias(self) -> Tensor | None:
        """(E,), in fp32 if an ``ExpertBias`` moves it; None without a bias."""
        return self.own_bias if self._correction_bias is None else self._correction_bias.view()

    @property
    def bias_owner(self) -> str:
        if self._correction_bias is not None:
            return f"the model's {self._correction_bias.name}"
        return "none" if self.own_bias is None else "the balancer's"

    def disable_selection_bias(self) -> None:
        """Removes a bias of ours; one of the model stays."""
        self.own_bias, self._bias_place = None, PLACES[0]

    def enable_selection_bias(self, place: str = PLACES[0]) -> None:
        """Takes over the model's bias, in fp32, or adds one, which acts at ``place``.

        Raises ConfigError where the router's choice cannot be repeated with a bias added.
        """
        if self._correction_bias is not None:
            self._correction_bias.take_over()
            self.batch_context.before_forward.append(self._correction_bias.keep_exact)
            return
        if self.own_bias is not None:
            self._bias_place = place
            return
        expected = "a router that owns a correction bias, or whose choices could be made again with one"
        self._check_choice(expected, "use AuxLoss for this model")
        device = next((p.device for p in self.parameters()), torch.device("cpu"))
        self.own_bias = torch.zeros(self.num_experts, dtype=torch.float32, device=device)
        self._bias_place = place

    def _check_choice(self, expected: str, do: str) -> None:
        """Raises ConfigError where its choice cannot be made again here."""
        own = None if self._correction_bias is None else self._correction_bias.view()
        check_choice(self.module, self._call, self.spec, own, self._groups, (expected, do))

    def _choose_again(self, logits_TE: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
        """(weights, ids) with a bias of ours, or with a mask; an id of E is no expert."""
        if self._balance_state is None or self._balance_state.raises_immediately:
            check_logits(logits_TE, masked=True, name="" if self._balance_state is None else self._balance_state.name)
        groups, top_groups = self._groups or (1, 1)
        weights_TK, ids_TK, _ = choose(
            logits_TE,
            top_k,
            gate=self.gate,
            selection_bias=self.expert_bias,
            bias_place=self._bias_place,
            num_groups=groups,
            top_groups=top_groups,
            normalize=self.spec.normalize,
            scale=self.spec.scale,
            masked=True,
        )
        if self.drops:
            ids_TK = drop_hidden(ids_TK, logits_TE)
        return weights_TK, ids_TK

    def _hooked(self, module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> Any:
        parsed = parse_output(module, args, kwargs, output, swapped=self.spec.swapped)
        if parsed is None:
            return None
        logits_TE, weights_TK, ids_TK = parsed.parts
        returned_TE = logits_TE
        if self.spec.probabilities:
            logits_TE = log_probabilities(logits_TE)
        if self._chooses:
            if self.own_bias is not None and self.own_bias.device != logits_TE.device:  # the model moved
                self.own_bias = self.own_bias.to(logits_TE.device)
            if self.spec.probabilities:
                logits_TE = logits_TE.masked_fill(returned_TE == 0, float("-inf"))
            if self.mask is not None:
                logits_TE = self.mask.hide(logits_TE)
            again_TK, ids_TK = self._choose_again(logits_TE, ids_TK.shape[1])
            weights_TK = again_TK.to(weights_TK.dtype)
        choice_TK, replayed_T2 = ids_TK, None
        if self._routing_calls is not None:
            ids_TK, replayed_T2 = self._routing_calls.dispatch(choice_TK, logits_TE)
        if replayed_T2 is not None:
            if self.mask is None:
                self._check_replays(RouterOutput(logits_TE, weights_TK, choice_TK))
            masked = self.mask is not None  # and the record may be of a router without the mask
            shown_TK = drop_hidden(ids_TK, logits_TE) if masked else ids_TK
            form = {"normalize": self.spec.normalize, "scale": self.spec.scale, "drops": self.drops or masked}
            made_TK, _ = weigh(logits_TE, shown_TK, gate=self.gate, **form)
            as_chosen_T1 = (ids_TK == choice_TK).all(dim=-1, keepdim=True)  # there its own weights, to the last bit
            weights_TK = torch.where(as_chosen_T1, weights_TK, made_TK.to(weights_TK.dtype))
        if self._balance_state is not None and self._balance_state.measures(training=module.training):
            weights_TK = self._attach(
                self._balance_state, weights_TK, logits_TE[:, : self.num_experts], ids_TK, replayed_T2
            )
        other_ids = self._chooses or replayed_T2 is not None
        if self.dropped is not None and not module.training:
            weights_TK, ids_TK = self.dropped(weights_TK, ids_TK)
            other_ids = other_ids or self.dropped.none is not None
        if weights_TK is parsed.parts.weights_TK:  # nothing changed
            return None
        if self.drops:  # no block but one that skips knows an id of E, and its weight is 0
            ids_TK = torch.where(ids_TK == self.num_experts, ids_TK[:, :1], ids_TK)
        return parsed.replace(weights_TK, ids_TK if other_ids else None)

    def _check_replays(self, live: RouterOutput) -> None:
        """Once, in eager mode. Raises ConfigError where weights for other experts cannot be made of its logits."""
        if self._replays or torch.compiler.is_compiling():
            return
        if why := why_other_weights(live, self.spec):
            raise ConfigError(
                expected="a router whose weights follow from its logits, for a replay",
                got=f"{type(self.module).__name__} ({self.name}): {why}",
                do="let it return the logits that its weights are made of (docs/own-router.md)",
            )
        self._replays = True

    def _attach(
        self,
        state: RouterState,
        weights_TK: Tensor,
        logits_TE: Tensor,
        ids_TK: Tensor,
        replayed_T2: Tensor | None,
    ) -> Tensor:
        placed = self.batch_context.on(self._placed(state, len(ids_TK)), ids_TK.device)
        self._check(placed, state)
        batch, rows_T, given_TK = placed.batch, placed.rows_T, weights_TK
        if rows_T is not None:  # scattered to their places in the sequences; the other tokens are masked
            assert batch.valid_T is not None
            whole = len(batch.valid_T)
            weights_TK, logits_TE, ids_TK = (
                x.new_zeros(whole, x.shape[1]).index_copy(0, rows_T, x) for x in (weights_TK, logits_TE, ids_TK)
            )
            if replayed_T2 is not None:
                replayed_T2 = replayed_T2.new_zeros(whole, 2).index_copy(0, rows_T, replayed_T2)
        choices = self.num_experts + self.idle
        if self.spec.may_drop:
            ids_TK = ids_TK.masked_fill(ids_TK < 0, choices - 1)
        counts_BE = count_choices(ids_TK, choices, batch.token_mask_T, batch.rows)[:, : self.num_experts]
        selection = None
        if state.spec.needs_selection:
            selection = Selection(self.expert_bias, self._bias_place, *(self._groups or (1, 1)), masked=True)
        tied_TK = attach_balance_gradient(
            state,
            weights_TK,
            logits_TE,
            ids_TK,
            counts_BE,
            batch,
            training=self.module.training,
            selection=selection,
            replayed_T2=replayed_T2,
        )
        if tied_TK is weights_TK:
            return given_TK
        return tied_TK if rows_T is None else tied_TK[rows_T]

    def _check(self, placed: TokenPlacement, state: RouterState) -> None:
        """Raises InputError where padding is unknown, or for a load inside a micro-batch that comes in pieces."""
        trains = self.training and torch.is_grad_enabled()
        if placed.unread and (trains or state.evaluation is not None):
            raise padding_unknown(self.name, placed.tokens, placed.unread)
        inside = [term.kind for term in state.spec.terms if term.kind != "deferred"]
        inside += ["micro_batch"] * bool(state.spec.micro_rules)
        if placed.piece and inside and trains:
            raise InputError(
                expected="all tokens of a forward in one call of a router, for a scope inside a micro-batch",
                got=f"router {self.name!r} that sees them in pieces (tiles), and scope {inside[0]!r}",
                do="use scope 'global_batch' or 'data_parallel', or switch the tiling off",
            )

    def _placed(self, state: RouterState, tokens: int) -> TokenPlacement:
        """How the tokens of this call lie; in a recompute, as in its forward, for the model may have run since.

        Raises StateError where a loss has several forwards and nothing says which of them is recomputed.
        """
        name = self.name if self.training or state.evaluation is not None else ""
        if torch.compiler.is_compiling():
            return self.batch_context.place(self._calls_around, tokens, self.spec.images)
        backward = current_backward()
        forward = backward == self.batch_context.backward_id  # or the whole model is recomputed
        known = [] if forward else [placed for placed in state.recompute_placements if placed.tokens == tokens]
        if not known:
            counts = state.pending_index == 0 if self.training else state.evaluation is not None
            if forward and counts and not self.batch_context.runs:
                raise StateError(
                    expected="a forward of the model that Balancer was given: its arguments tell padding and sequences",
                    got=f"a {type(self.module).__name__} that runs in a call of a part of it",
                    do="call the whole model, or pass part= to Balancer, the name of the part that you call",
                )
            placed = self.batch_context.place(self._calls_around, tokens, self.spec.images, router=name)
            if forward and self.training and state.pending_index < 2:
                state.placed.append(placed)
            return placed
        if are_pieces(known):  # recomputed in their order
            self._recomputed = (backward, self._recomputed[1] + 1 if self._recomputed[0] == backward else 0)
            return known[self._recomputed[1] % len(known)]
        if not all(same_placement(known[0], other) for other in known[1:]):
            raise StateError(
                expected="gradient checkpointing of one pass per loss, or of passes whose padding and documents agree",
                got=f"{len(known)} passes of {tokens} tokens that differ in them; a recompute does not tell which",
                do="send them through the model as one batch, or call gradient_checkpointing_disable()",
            )
        return known[0]


def attached_routers(model: nn.Module) -> list[tuple[str, ExternalRouter]]:
    """The routers of a model that have a hook: of a balancer, of the bias that one left, of a record or a replay."""
    return [
        (name, router)
        for name, module in model.named_modules()
        for hook in module._forward_hooks.values()
        if isinstance(router := getattr(hook, "__self__", None), ExternalRouter) and not router.only_waits
    ]
