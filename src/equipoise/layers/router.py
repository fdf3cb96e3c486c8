"""The router: token -> logits in fp32 -> K experts and their weights, with selection bias."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..autograd.balance_gradient import attach_balance_gradient, record_logit_grad
from ..autograd.finite import check_logits
from ..autograd.protocol import RouterTraits
from ..autograd.router_state import RouterState
from ..autograd.routing_calls import RecordedCalls, ReplayedCalls
from ..autograd.token_classes import check_class_masks
from ..autograd.token_layout import TokenLayout
from ..errors import InputError
from ..functional.quantile import Selection
from ..functional.routing import (
    PLACES,
    Routing,
    check_mask_dtype,
    check_routing,
    choose,
    count_choices,
    weigh,
    without_autocast,
)
from ..kernels import RouterForm, gate_fits, gate_logits
from .fused_router import fused_route, fuses

__all__ = ["Router", "bias_name"]


def bias_name(place: str) -> str:
    """What a checkpoint calls the bias of a router: by where it acts.

    >>> bias_name("scores"), bias_name("logits")
    ('expert_bias', 'expert_bias_logits')
    """
    return "expert_bias" if place == PLACES[0] else f"expert_bias_{place}"


def _named_after(place: str) -> property:
    """The bias under its name in checkpoints, for tools that look such names up (DCP)."""
    return property(lambda router: router.expert_bias if router.bias_place == place else None)


class Router(nn.Module):
    """A linear gate over E experts with top-k selection (see ``functional.route`` for gate, groups, weights and scale).

    Args:
        normalize: divide the K weights by their sum. Default: for K > 1. One expert's share of itself is always 1, and
            the gradient of that at the logits 0: with ``top_k=1`` a weight is the probability, as in Switch
            Transformers (arXiv 2101.03961, eq. 2), through which the model's loss teaches the router.
        selection_bias: keep an ``expert_bias`` (E,) that is added before top-k only. It is fp32 whatever the model is
            cast to (in bf16 a step of 1e-3 is lost from 0.5 on), persistent in checkpoints, moved by ``ExpertBias``,
            which may let it act elsewhere: ``bias_place``, one of the places of ``functional.route``. Checkpoints name
            it ``expert_bias_multiply`` or ``expert_bias_logits`` then, so that nobody takes it for another.

    ``balance_state`` is None until a ``Balancer`` attaches one, ``routing_calls`` outside of ``record_routing`` and
    ``replay_routing``.

    >>> router = Router(dim=8, num_experts=4, top_k=2)
    >>> routing = router(torch.randn(6, 8))
    >>> routing.weights_TK.shape, int(routing.counts_E.sum())
    (torch.Size([6, 2]), 12)
    >>> router.normalize, Router(dim=8, num_experts=4, top_k=1).normalize
    (True, False)
    """

    expert_bias: Tensor | None
    bias_place = PLACES[0]

    def __init__(
        self,
        dim: int,
        num_experts: int,
        top_k: int,
        *,
        gate: str = "softmax",
        normalize: bool | None = None,
        scale: float = 1.0,
        num_groups: int = 1,
        top_groups: int = 1,
        selection_bias: bool = False,
    ) -> None:
        super().__init__()
        check_routing(num_experts, top_k, gate, num_groups, top_groups)
        self.dim, self.num_experts, self.top_k, self.gate = dim, num_experts, top_k, gate
        self.normalize = top_k > 1 if normalize is None else normalize
        self.scale, self.num_groups, self.top_groups = scale, num_groups, top_groups
        self.weight = nn.Parameter(torch.empty(num_experts, dim))
        self.balance_state: RouterState | None = None
        self.routing_calls: RecordedCalls | ReplayedCalls | None = None
        self.register_buffer("expert_bias", None)
        if selection_bias:
            self.enable_selection_bias()
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=1 / math.sqrt(self.dim))
        if self.expert_bias is not None:
            nn.init.zeros_(self.expert_bias)

    @property
    def module(self) -> nn.Module:
        return self

    @property
    def traits(self) -> RouterTraits:
        return RouterTraits(self.normalize, self.scale, bias_place=self.bias_place, bias_places=PLACES, selects=True)

    @property
    def bias_owner(self) -> str:
        return "none" if self.expert_bias is None else "the router's"

    @property
    def batch_context(self) -> None:
        """Told with each call: see ``forward``."""
        return

    def disable_selection_bias(self) -> None:
        """Takes the bias away."""
        self.expert_bias, self.bias_place = None, PLACES[0]

    def enable_selection_bias(self, place: str = PLACES[0]) -> None:
        """Adds the bias, zero, if there is none yet; it acts there from now on."""
        self.bias_place = place
        if self.expert_bias is None:
            self.expert_bias = torch.zeros(self.num_experts, dtype=torch.float32, device=self.weight.device)

    def forward(self, x_TD: Tensor, batch: TokenLayout | None = None) -> Routing:
        """Routes T tokens; ``batch`` says how they lie in sequences (default: one sequence, no padding).

        Raises InputError for a wrong width, a mask of the wrong length or kind, or NaN logits.
        """
        batch = self._checked(x_TD, batch or TokenLayout())
        with without_autocast(x_TD):  # fp32 even where the model computes in bf16
            if gate_fits(x_TD, self.weight):
                raw_TE = gate_logits(x_TD, self.weight)
            else:
                wide = torch.promote_types(x_TD.dtype, torch.float32)
                raw_TE = F.linear(x_TD.to(wide), self.weight.to(wide))
        state = self.balance_state
        if self.routing_calls is None and fuses(raw_TE, self.top_k, self.num_groups, state, batch):
            form = RouterForm(self.top_k, self.gate, self.normalize, self.scale)
            biased = self.expert_bias, self.bias_place
            return fused_route(raw_TE, form, *biased, state, batch, training=self.training)
        if state is None or state.raises_immediately:
            check_logits(raw_TE, name="" if state is None else state.name)
        logits_TE = raw_TE if state is None else record_logit_grad(state, raw_TE, training=self.training)
        weights_TK, ids_TK, probs_TE = choose(
            logits_TE,
            self.top_k,
            gate=self.gate,
            selection_bias_E=self.expert_bias,
            bias_place=self.bias_place,
            num_groups=self.num_groups,
            top_groups=self.top_groups,
            normalize=self.normalize,
            scale=self.scale,
        )
        replayed_T2 = None
        if self.routing_calls is not None:
            ids_TK, replayed_T2 = self.routing_calls.dispatch(ids_TK, raw_TE)
        if replayed_T2 is not None:
            weights_TK, probs_TE = weigh(logits_TE, ids_TK, gate=self.gate, normalize=self.normalize, scale=self.scale)
        counts_BE = count_choices(ids_TK, self.num_experts, batch.token_mask_T, batch.rows)
        if state is not None:
            weights_TK = attach_balance_gradient(
                state,
                weights_TK,
                raw_TE,
                ids_TK,
                counts_BE,
                batch,
                training=self.training,
                probs_TE=probs_TE,
                selection=Selection(self.expert_bias, self.bias_place, self.num_groups, self.top_groups),
                replayed_T2=replayed_T2,
            )
        return Routing(weights_TK, ids_TK, logits_TE, counts_BE.sum(dim=0))

    def _checked(self, x_TD: Tensor, batch: TokenLayout) -> TokenLayout:
        """The batch with a boolean mask and int64 documents, as everything behind the router expects them."""
        tokens = x_TD.shape[0]
        if x_TD.dim() != 2 or x_TD.shape[1] != self.dim:
            raise InputError(
                expected=f"tokens of shape (T, {self.dim})",
                got=str(tuple(x_TD.shape)),
                do="flatten the sequences, or build the router with this width",
            )
        if tokens % batch.rows:
            raise InputError(
                expected="T divisible by num_sequences",
                got=f"T={tokens}, num_sequences={batch.rows}",
                do="pad the sequences to one length and mask the padding",
            )
        for name, tensor in (("token_mask", batch.token_mask_T), ("document_ids", batch.document_T)):
            if tensor is not None and tensor.shape != (tokens,):
                raise InputError(
                    expected=f"{name} with one entry per token: ({tokens},)",
                    got=str(tuple(tensor.shape)),
                    do="pass the mask of the same tokens that reach the layer",
                )
        mask_T, document_T, classes = batch.token_mask_T, batch.document_T, batch.classes
        check_mask_dtype(mask_T)
        if classes is not None:
            check_class_masks(classes, (tokens,))
            classes = {name: class_T.to(x_TD.device) for name, class_T in classes.items()}
        return TokenLayout(
            batch.num_sequences,
            None if mask_T is None else mask_T.to(x_TD.device, torch.bool),
            None if document_T is None else document_T.to(x_TD.device, torch.long),
            classes=classes,
        )

    expert_bias_multiply, expert_bias_logits = _named_after("multiply"), _named_after("logits")

    def _save_to_state_dict(self, destination, prefix, keep_vars) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.bias_place != PLACES[0] and (bias_E := destination.pop(f"{prefix}expert_bias", None)) is not None:
            destination[prefix + bias_name(self.bias_place)] = bias_E

    def _load_from_state_dict(
        self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
    ) -> None:
        """A bias in the file is taken, also before a balancer asks for one: without it other experts would answer.

        It acts where it acted; an error where the router has a balancer and a bias that acts elsewhere.
        ``load_state_dict(assign=True)`` keeps the file's dtype; the bias stays fp32 all the same.
        """
        state_dict = dict(state_dict)
        for place in PLACES:
            if (bias_E := state_dict.pop(key := prefix + bias_name(place), None)) is None:
                continue
            if self.balance_state is not None and self.expert_bias is not None and place != self.bias_place:
                error_msgs.append(
                    f"expected a bias of place={self.bias_place!r}, as this router has it under its balancer; got "
                    f"{key!r}, of place={place!r}; load the weights first, then make the balancer with "
                    f"ExpertBias(place={place!r})"
                )
                continue
            self.enable_selection_bias(place)
            state_dict[f"{prefix}expert_bias"] = bias_E
        names = (local_metadata, strict, missing_keys, unexpected_keys, error_msgs)
        super()._load_from_state_dict(state_dict, prefix, *names)
        if self.expert_bias is not None and self.expert_bias.dtype != torch.float32:
            self.expert_bias = self.expert_bias.float()

    def _apply(self, fn, recurse: bool = True):
        """Casts and moves like any module, but the bias stays fp32 (B34, B38, B39) and is zero when it leaves meta."""
        before = self.expert_bias
        super()._apply(fn, recurse)
        after = self.expert_bias
        if before is not None and after is not None:
            if before.is_meta and not after.is_meta:
                self.expert_bias = torch.zeros_like(after, dtype=torch.float32)  # to_empty leaves garbage
            elif after.dtype != torch.float32:
                self.expert_bias = before.to(device=after.device, dtype=torch.float32)
        return self

    def extra_repr(self) -> str:
        return f"dim={self.dim}, num_experts={self.num_experts}, top_k={self.top_k}, gate={self.gate!r}"
