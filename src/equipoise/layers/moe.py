"""A dropless mixture-of-experts layer: route, compute each token's K experts, add what is shared."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..autograd.token_layout import TokenLayout, check_class_masks
from ..devices import host_readable
from ..errors import ConfigError, InputError, described
from .experts import Experts
from .router import Router

__all__ = ["MoE", "SwiGLU"]


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x)): the shared expert, computed for every token.

    >>> SwiGLU(4, 8)(torch.randn(2, 4)).shape
    torch.Size([2, 4])
    """

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(dim, hidden, bias=False)
        self.up_proj = nn.Linear(dim, hidden, bias=False)
        self.down_proj = nn.Linear(hidden, dim, bias=False)

    def reset_parameters(self) -> None:
        for linear in (self.gate_proj, self.up_proj, self.down_proj):
            nn.init.normal_(linear.weight, std=1 / math.sqrt(linear.in_features))

    def forward(self, x_TD: Tensor) -> Tensor:
        gate_TH, up_TH = _cast_linear(self.gate_proj, x_TD), _cast_linear(self.up_proj, x_TD)
        return _cast_linear(self.down_proj, F.silu(gate_TH) * up_TH)


def _cast_linear(linear: nn.Linear, x: Tensor) -> Tensor:
    """In the dtype of x, as Experts computes: fp32 master weights may meet bf16 tokens."""
    return F.linear(x, linear.weight.to(x.dtype))


class MoE(nn.Module):
    """Replaces a feed-forward layer. No token is dropped, whatever the load.

    Args:
        dim: width D of a token.  hidden: width of one expert (fine-grained: small hidden, many experts, larger K), or
            a list with a width for each.
        batch_first: how inputs of three dimensions lie: True (B, S, D), False (S, B, D). None leaves it to a mask or
            document numbers (B, S), and open where there are none: then nothing that depends on it is measured, and
            a policy with a scope inside a micro-batch is refused.
        num_shared: shared experts, as one SwiGLU of width ``num_shared * hidden`` (or ``shared_hidden``).
        recompute_router: backward computes logits, probabilities and choice again from the layer's input, so that
            nothing of E numbers a token is kept for it; output, gradients and loads stay what they are. Inside a
            checkpoint of the whole layer it only costs time.
        router: every keyword of ``Router``: gate, normalize, scale, num_groups, top_groups, selection_bias, top_p.
            Weights are normalised unless ``top_k`` is 1 or there is a ``top_p``: one expert's share of itself teaches a
            router nothing.

    Raises ConfigError where `Router` or `Experts` does, for shared experts of a width below 0, and for ``num_shared``
    of experts of unlike widths.

    The forward pass: 1. flatten (B, S, D) to T tokens; 2. route; 3. experts; 4. shared experts, for all tokens.

    >>> layer = MoE(dim=8, hidden=16, num_experts=4, top_k=2)
    >>> layer(torch.randn(2, 5, 8)).shape
    torch.Size([2, 5, 8])
    """

    def __init__(
        self,
        dim: int,
        hidden: int | Sequence[int],
        num_experts: int,
        top_k: int,
        *,
        batch_first: bool | None = None,
        num_shared: int = 0,
        shared_hidden: int | None = None,
        recompute_router: bool = False,
        **router,
    ) -> None:
        super().__init__()
        self.batch_first, self.recompute_router = batch_first, recompute_router
        self.gate = Router(dim, num_experts, top_k, **router)
        self.experts = Experts(num_experts, dim, hidden)
        if not self.experts.even:
            self.gate.expert_widths = self.experts.widths
            if num_shared and shared_hidden is None:
                raise ConfigError(
                    expected="the width of the shared experts beside experts of unlike widths",
                    got=f"num_shared={num_shared}",
                    do="pass shared_hidden, the width of all shared experts together",
                )
        shared = shared_hidden if shared_hidden is not None else num_shared * self.experts.widths[0]
        if type(shared) is not int or shared < 0:
            raise ConfigError(
                expected="num_shared and shared_hidden of 0 or more, whole numbers",
                got=f"num_shared={num_shared}, shared_hidden={shared_hidden}",
                do="leave them out for a layer without shared experts",
            )
        self.shared_experts: SwiGLU | None = SwiGLU(dim, shared) if shared else None

    def forward(
        self,
        x_BSD: Tensor,
        *,
        token_mask_BS: Tensor | None = None,
        document_ids_BS: Tensor | None = None,
        token_classes_BS: Mapping[str, Tensor] | None = None,
        token_ids_BS: Tensor | None = None,
    ) -> Tensor:
        """(B, S, D), (S, B, D) or (T, D) in, the same shape out.

        Args:
            token_mask_BS: True = a real token. Padding gets an output but is neither counted nor balanced.
            document_ids_BS: the document of each token inside its sequence, integers in [0, S), for scope "document";
                where other ranks hold the rest of each sequence, numbered through the whole of it.
            token_classes_BS: name of a class of tokens -> True where a token is of it, for policies with ``tokens=``.
            token_ids_BS: ids in the vocabulary, for a router with a mask by token id.

        All are (B, S) whatever ``batch_first``, as PyTorch's padding masks are.
        """
        if x_BSD.dim() not in (2, 3):
            raise InputError(
                expected="tokens of shape (B, S, D) or (T, D)",
                got=str(tuple(x_BSD.shape)),
                do="merge what lies between: x.flatten(1, -2) of (B, H, W, D) is (B, S, D)",
            )
        if x_BSD.dim() == 3 and self.batch_first is False:
            said = token_mask_BS, document_ids_BS, token_classes_BS, token_ids_BS
            return self._forward(x_BSD.transpose(0, 1), *said).transpose(0, 1)
        return self._forward(x_BSD, token_mask_BS, document_ids_BS, token_classes_BS, token_ids_BS)

    def _forward(
        self,
        x_BSD: Tensor,
        token_mask_BS: Tensor | None,
        document_ids_BS: Tensor | None,
        token_classes_BS: Mapping[str, Tensor] | None,
        token_ids_BS: Tensor | None,
    ) -> Tensor:
        sequences = x_BSD.unsqueeze(0) if x_BSD.dim() == 2 else x_BSD
        num_sequences, length, dim = sequences.shape
        x_TD = sequences.reshape(-1, dim)
        told = any(  # a mask (B, S) tells which of the two is the batch, where they differ
            one is not None and one.shape == (num_sequences, length) and num_sequences != length
            for one in (token_mask_BS, document_ids_BS)
        )
        known = x_BSD.dim() == 3 and (self.batch_first is not None or told)
        batch = _batch(num_sequences, length, token_mask_BS, document_ids_BS, self.gate)
        if not known:  # documents tell by themselves where flat tokens belong, but not which of two axes is the batch
            documents_T = batch.document_T if x_BSD.dim() == 2 else None
            batch = batch._replace(num_sequences=None, document_T=documents_T)
        if token_classes_BS:
            shape = (num_sequences, length) if x_BSD.dim() == 3 else (length,)
            check_class_masks(token_classes_BS, shape, "token_classes_BS")
            batch = batch._replace(classes={name: mask.reshape(-1) for name, mask in token_classes_BS.items()})
        if token_ids_BS is not None:
            _check_shape("token_ids_BS", token_ids_BS, num_sequences, length)
            batch = batch._replace(token_ids_T=token_ids_BS.reshape(-1))
        if self.recompute_router and torch.is_grad_enabled():
            routing = checkpoint(self.gate, x_TD, batch, use_reentrant=False)
        else:
            routing = self.gate(x_TD, batch)
        y_TD = self.experts(x_TD, routing.expert_ids_TK, routing.weights_TK, drops=self.gate.drops or self.gate.adapts)
        if self.shared_experts is not None:
            y_TD = y_TD + self.shared_experts(x_TD)
        return y_TD.view_as(x_BSD)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draws all weights anew; needed after ``to_empty`` on a model built on the meta device."""
        self.gate.reset_parameters()
        self.experts.reset_parameters()
        if self.shared_experts is not None:
            self.shared_experts.reset_parameters()


def _batch(
    num_sequences: int, length: int, token_mask_BS: Tensor | None, document_ids_BS: Tensor | None, router: Router
) -> TokenLayout:
    for name, tensor in (("token_mask_BS", token_mask_BS), ("document_ids_BS", document_ids_BS)):
        if tensor is not None:
            _check_shape(name, tensor, num_sequences, length)
    mask_T = None if token_mask_BS is None else token_mask_BS.reshape(-1)
    document_T = None
    if document_ids_BS is not None:
        most = length * (
            1 if router.balance_state is None else router.balance_state.spec.shards
        )  # documents that a sequence can have
        document_ids_BS = _checked_documents(document_ids_BS.reshape(num_sequences, length), most, router)
        # number them through the micro-batch: a document never crosses a sequence
        start_B1 = torch.arange(num_sequences, device=document_ids_BS.device).unsqueeze(1) * most
        document_T = (document_ids_BS + start_B1).reshape(-1)
    return TokenLayout(max(num_sequences, 1), mask_T, document_T)


def _check_shape(name: str, tensor: Tensor, num_sequences: int, length: int) -> None:
    shape = tuple(tensor.shape) if isinstance(tensor, Tensor) else None
    if shape not in ((num_sequences, length), (num_sequences * length,)):
        swapped = num_sequences != length and shape == (length, num_sequences)
        raise InputError(
            expected=f"{name} of shape ({num_sequences}, {length})",
            got=described(tensor),
            do="say batch_first=False to a layer whose inputs are (S, B, D); what is said of tokens is (B, S) always"
            if swapped
            else "pass one entry per token",
        )


def _checked_documents(document_ids_BS: Tensor, most: int, router: Router) -> Tensor:
    """Raises InputError for numbers out of range; where nobody may look now, they are 0 and the step is told."""
    state = router.balance_state
    if not document_ids_BS.numel():
        return document_ids_BS
    if (
        host_readable(document_ids_BS.device)
        and not torch.compiler.is_compiling()
        and (state is None or state.raises_immediately)
    ):
        low, high = (int(end) for end in torch.aminmax(document_ids_BS))
        if low < 0 or high >= most:
            raise InputError(
                expected=f"document numbers in [0, {most}), the length of a sequence",
                got=f"{low} .. {high}",
                do="number the documents of each sequence from 0",
            )
    elif state is not None and router.training and state.spec.has_documents:
        if state.grad_accumulator.device != document_ids_BS.device:
            state.move(document_ids_BS.device)
        bad_BS = (document_ids_BS < 0) | (document_ids_BS >= most)
        state.bad_documents.add_(bad_BS.sum())
        return document_ids_BS.masked_fill(bad_BS, 0)
    return document_ids_BS
