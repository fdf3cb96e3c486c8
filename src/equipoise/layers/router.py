"""The router: token -> logits in fp32 -> K experts and their weights, with selection bias."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..autograd.balance_gradient import attach_balance_gradient, record_logit_grad
from ..autograd.finite import check_logits
from ..autograd.protocol import RouterTraits
from ..autograd.routing_calls import RecordedCalls, ReplayedCalls
from ..autograd.token_classes import class_masks
from ..autograd.token_layout import TokenLayout
from ..errors import ConfigError, InputError
from ..functional.adaptive_top_k import drop_experts
from ..functional.class_bias import token_biases
from ..functional.quantile import Selection
from ..functional.routing import (
    PLACES,
    Routing,
    check_routing,
    choose,
    count_choices,
    weigh,
    without_autocast,
)
from ..functional.routing_mask import drop_hidden, hide
from ..kernels import RouterForm, gate_fits, gate_logits
from .fused_router import fused_route, fuses
from .router_buffers import RouterBuffers

__all__ = ["Router"]


class Router(RouterBuffers):
    """A linear gate over E experts with top-k selection (see ``functional.route`` for gate, groups, weights and scale).

    Args:
        normalize: divide the K weights by their sum. Default: for K > 1. One expert's share of itself is always 1, and
            the gradient of that at the logits 0: with ``top_k=1`` a weight is the probability, as in Switch
            Transformers (arXiv 2101.03961, eq. 2), through which the model's loss teaches the router. So they are with
            ``top_p``, where a token may have one expert.
        selection_bias: keep an ``expert_bias`` (E,) that is added before top-k only. It is fp32 whatever the model is
            cast to (in bf16 a step of 1e-3 is lost from 0.5 on), persistent in checkpoints, moved by ``ExpertBias``,
            which may let it act elsewhere: ``bias_place``, one of the places of ``functional.route``. Checkpoints name
            it ``expert_bias_multiply`` or ``expert_bias_logits`` then, so that nobody takes it for another.
        top_p: a token uses the fewest experts, the best first, whose probabilities sum to this or more, and K at most
            (arXiv 2403.07652; HMoE, arXiv 2408.10681, takes 0.6). The ids of the other choices are E, no expert. With
            K = 1 it could not matter and is refused.

    ``ExpertBias(tokens="image")`` adds ``expert_bias_of_image`` (E,), kept alike, which acts at the same place for the
    tokens of that class alone (see ``functional.class_bias``). A router with such a bias asks with each call which
    tokens these are, in evaluation and generation too, and chooses in plain PyTorch.

    ``enable_mask`` adds a mask by token id, ``visible_experts`` (V, E), persistent in checkpoints: which experts the
    tokens of each id may choose (MaskMoE, see ``mask_routers``). Such a router asks with each call for the ids, and
    chooses in plain PyTorch. A token that sees fewer than K experts has choices with the id E: no expert, no load.

    ``balance_state`` is None until a ``Balancer`` attaches one, ``routing_calls`` outside of ``record_routing`` and
    ``replay_routing``.

    >>> router = Router(dim=8, num_experts=4, top_k=2)
    >>> routing = router(torch.randn(6, 8))
    >>> routing.weights_TK.shape, int(routing.counts_E.sum())
    (torch.Size([6, 2]), 12)
    >>> router.normalize, Router(dim=8, num_experts=4, top_k=1).normalize
    (True, False)
    """

    expert_widths: tuple[int, ...] | None = None  # of the experts behind it, where they are unlike; `MoE` sets it

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
        top_p: float | None = None,
    ) -> None:
        super().__init__(num_experts, top_k, top_p)
        check_routing(num_experts, top_k, gate, num_groups, top_groups, top_p)
        if type(dim) is not int or dim < 1:
            raise ConfigError(
                expected="dim of 1 or more, a whole number", got=f"dim={dim!r}", do="give the width of the tokens"
            )
        if top_p is not None and top_k == 1 < num_experts:
            raise ConfigError(
                expected="top_k of 2 or more beside top_p: the most experts that a token may have",
                got=f"top_k=1, top_p={top_p}",
                do=f"top_k={num_experts} leaves it open; or leave top_p out: every token has one expert then",
            )
        self.dim, self.gate = dim, gate
        self.normalize = (top_k > 1 and top_p is None) if normalize is None else normalize
        self.scale, self.num_groups, self.top_groups = scale, num_groups, top_groups
        self.weight = nn.Parameter(torch.empty(num_experts, dim))
        self.routing_calls: RecordedCalls | ReplayedCalls | None = None
        if selection_bias:
            self.enable_selection_bias()
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=1 / math.sqrt(self.dim))
        for bias_E in self._biases().values():
            nn.init.zeros_(bias_E)

    @property
    def module(self) -> nn.Module:
        return self

    @property
    def traits(self) -> RouterTraits:
        return RouterTraits(
            *(self.normalize, self.scale, int(self.drops)),
            bias_place=self.bias_place,
            bias_places=PLACES,
            selects=True,
            class_biases=True,
            widths=None if self.expert_widths is None else tuple(self.expert_widths),
        )

    @property
    def batch_context(self) -> None:
        """Told with each call: see ``forward``."""
        return

    def _hidden(self, logits_TE: Tensor, batch: TokenLayout) -> Tensor:
        """-inf for the experts that a token's id does not see; InputError where nobody said the ids."""
        assert self.visible_experts is not None
        if batch.token_ids_T is None:
            raise InputError(
                expected="the ids of the tokens, for a router with a mask by token id",
                got=f"{len(logits_TE)} tokens without ids",
                do="say them with each call: MoE(...)(x, token_ids_BS=ids), router(x, TokenLayout(B, token_ids_T=ids))",
            )
        return hide(logits_TE, self.visible_experts, batch.token_ids_T)

    def _selection_bias(self, batch: TokenLayout, tokens: int) -> Tensor | None:
        """(E,), or (T, E) where a class has its own; InputError where nobody said which tokens are of it."""
        if not self.bias_classes:
            return self.expert_bias
        masks, own = class_masks(self.bias_classes, batch, tokens, self.weight.device), self.class_biases
        return token_biases(self.expert_bias, [(masks[name], own[name]) for name in own], self.bias_place)

    def _choose(self, logits_TE: Tensor, selection_bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
        """(weights (T, K), expert ids (T, K), p (T, E) where the weights were taken from it)."""
        masked = self.visible_experts is not None
        weights_TK, ids_TK, probs_TE = choose(
            logits_TE,
            self.top_k,
            gate=self.gate,
            selection_bias=selection_bias,
            bias_place=self.bias_place,
            num_groups=self.num_groups,
            top_groups=self.top_groups,
            normalize=self.normalize,
            scale=self.scale,
            masked=masked,
            top_p=self.top_p,
        )
        return weights_TK, drop_hidden(ids_TK, logits_TE) if masked and self.drops else ids_TK, probs_TE

    def forward(self, x_TD: Tensor, batch: TokenLayout | None = None) -> Routing:
        """Routes T tokens; ``batch`` says how they lie in sequences (default: one sequence, no padding).

        Raises InputError for a wrong width, a mask of the wrong length or kind, NaN logits, a class of tokens that has
        a bias of its own and is not in ``batch.classes``, or ids that a mask asks for and ``batch`` does not say.
        """
        batch = self._checked(x_TD, batch or TokenLayout())
        selection_bias = self._selection_bias(batch, len(x_TD))
        with without_autocast(x_TD):  # fp32 even where the model computes in bf16
            if gate_fits(x_TD, self.weight):
                raw_TE = gate_logits(x_TD, self.weight)
            else:
                wide = torch.promote_types(x_TD.dtype, torch.float32)
                raw_TE = F.linear(x_TD.to(wide), self.weight.to(wide))
        state = self.balance_state
        masked = self.visible_experts is not None
        plain = self.routing_calls is not None or bool(self.bias_classes) or self.drops or self.adapts or masked
        if not plain and fuses(raw_TE, self.top_k, self.num_groups, state, batch):
            form = RouterForm(self.top_k, self.gate, self.normalize, self.scale)
            biased = self.expert_bias, self.bias_place
            return fused_route(raw_TE, form, *biased, state, batch, training=self.training)
        if state is None or state.raises_immediately:
            check_logits(raw_TE, name="" if state is None else state.name)
        if masked:
            raw_TE = self._hidden(raw_TE, batch)
        logits_TE = raw_TE if state is None else record_logit_grad(state, raw_TE, training=self.training)
        weights_TK, ids_TK, probs_TE = self._choose(logits_TE, selection_bias)
        replayed_T2 = None
        if self.routing_calls is not None:
            ids_TK, replayed_T2 = self.routing_calls.dispatch(ids_TK, raw_TE)
        if replayed_T2 is not None:
            shown_TK = drop_hidden(ids_TK, raw_TE) if masked else ids_TK  # a record may be of a router without the mask
            more = {"normalize": self.normalize, "scale": self.scale, "drops": self.drops or masked}
            weights_TK, probs_TE = weigh(logits_TE, shown_TK, gate=self.gate, **more)
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
                selection=Selection(selection_bias, self.bias_place, self.num_groups, self.top_groups, masked),
                replayed_T2=replayed_T2,
            )
        if self.adapts:  # behind the balancer, which counts what the router chose
            assert self.drop_threshold is not None
            form = {"normalize": self.normalize, "none": self.num_experts}
            weights_TK, ids_TK = drop_experts(weights_TK, ids_TK, self.drop_threshold, **form)
            counts_BE = count_choices(ids_TK, self.num_experts, batch.token_mask_T, batch.rows)
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
        return batch.checked(tokens).on(x_TD.device)

    def extra_repr(self) -> str:
        return f"dim={self.dim}, num_experts={self.num_experts}, top_k={self.top_k}, gate={self.gate!r}"
