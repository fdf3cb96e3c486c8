"""Experts in groups by class of token: text tokens meet text experts, image tokens image experts (MoMa)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ..errors import ConfigError, InputError, described
from ..functional.routing import count_choices
from .expert_choice import ExpertChoiceRouter

__all__ = ["ModalityMoE"]


class ModalityMoE(nn.Module):
    """Replaces a feed-forward layer: each class of tokens has a layer of its own, which sees its tokens alone.

    The hard split of MoMa (arXiv 2407.21770). A group is an ``MoE``, whose tokens choose, an ``ExpertChoiceMoE``, whose
    experts choose from the pool of the group's tokens, a ``SwiGLU``, or any module (T, D) -> (T, D). Groups are told
    apart by the token's class, which is known: nothing is learned there and nothing can collapse.

    A ``Balancer`` finds the routers of all groups: each is a layer with a load, a global batch and a T of its own.
    Where micro-batches have unequally many tokens of a class, the step has to be counted first (`Balancer.counting`) or
    told (``begin_step(tokens={router: number})``). Experts that choose need a ``TokenPools``.

    Args:
        groups: name of a class -> its layer. Class ids are places in it.

    Raises ConfigError for no group, one without experts, or experts that choose inside a sample: a group has of each
    sequence another number of tokens, and at inference no sample to choose from.

    >>> from equipoise import ExpertChoiceMoE, MoE
    >>> layer = ModalityMoE({"text": MoE(8, 16, 4, top_k=1), "image": ExpertChoiceMoE(8, 16, 4)})
    >>> layer(torch.randn(2, 8, 8), torch.tensor([[0] * 4 + [1] * 4, [1] * 8])).shape
    torch.Size([2, 8, 8])
    """

    def __init__(self, groups: Mapping[str, nn.Module]) -> None:
        super().__init__()
        if not groups or not isinstance(groups, Mapping):
            raise ConfigError(
                expected="a name and a layer for each class of tokens",
                got=f"{type(groups).__name__}" if groups else "no group",
                do='for example ModalityMoE({"text": MoE(...), "image": MoE(...)})',
            )
        for name, group in groups.items():
            if not isinstance(name, str) or not name or "." in name:
                raise ConfigError(
                    expected="names of groups without dots, which are part of those of their parameters",
                    got=repr(name),
                    do="for example 'text' and 'image'",
                )
            if not isinstance(group, nn.Module):
                raise ConfigError(
                    expected=f"a layer (T, D) -> (T, D) for group {name!r}",
                    got=repr(group),
                    do="pass an MoE, an ExpertChoiceMoE or a SwiGLU; a group has at least one expert",
                )
            for router in group.modules():
                if isinstance(router, ExpertChoiceRouter) and isinstance(router.scope, int):
                    raise ConfigError(
                        expected=f"a pool of group {name!r} that is no sample: 'micro_batch' or 'global_batch'",
                        got="'sample'" if router.scope == 1 else f"{router.scope} samples",
                        do="a group has unequally many tokens of each; a wider pool has a predictor for inference",
                    )
        self.groups = nn.ModuleDict(dict(groups))

    def forward(self, x_BSD: Tensor, class_ids_BS: Tensor, *, token_mask_BS: Tensor | None = None) -> Tensor:
        """(B, S, D) or (T, D) in, the same shape out. The host waits for the sizes of the groups.

        Args:
            class_ids_BS: integers in [0, groups), (B, S) or (T,): whose layer computes the token. A class may have no
                token: its layer is called with none, so that its weights have a gradient, of zeros.
            token_mask_BS: True = a real token. Padding is of no group, whatever its id, and its output is 0.

        Raises InputError for ids of another shape or kind, or out of range, and, with the group's name, what the
        group's layer raises: of experts that choose, a pool that is not empty and smaller than they need.
        """
        x_TD, order_T, counts = self._sorted(x_BSD, class_ids_BS, token_mask_BS)
        outputs = []
        for (name, group), part_TD in zip(self.groups.items(), x_TD[order_T].split(counts), strict=True):
            try:
                outputs.append(group(part_TD))
            except InputError as error:
                raise InputError(
                    expected=f"for the group {name!r}: {error.expected}", got=error.got, do=error.do
                ) from None
        y_TD = torch.cat(outputs)
        return y_TD.new_zeros(len(x_TD), y_TD.shape[1]).index_copy(0, order_T, y_TD).view_as(x_BSD)

    def _sorted(
        self, x_BSD: Tensor, class_ids_BS: Tensor, token_mask_BS: Tensor | None
    ) -> tuple[Tensor, Tensor, list[int]]:
        """(tokens (T, D), places of the valid ones, group after group, how many each group has)."""
        shape, many = tuple(x_BSD.shape[:-1]), len(self.groups)
        if x_BSD.dim() not in (2, 3):
            raise InputError(
                expected="tokens of shape (B, S, D) or (T, D)",
                got=str(tuple(x_BSD.shape)),
                do="merge what lies between: x.flatten(1, -2) of (B, H, W, D) is (B, S, D)",
            )
        integers = isinstance(class_ids_BS, Tensor) and not class_ids_BS.is_floating_point()
        if not integers or class_ids_BS.dtype == torch.bool or class_ids_BS.shape != shape:
            raise InputError(
                expected=f"class_ids_BS, an integer for each token: {shape}",
                got=described(class_ids_BS),
                do="number the classes by their place in groups: (tokens >= first_image_token).long()",
            )
        bools = isinstance(token_mask_BS, Tensor) and token_mask_BS.dtype == torch.bool
        if token_mask_BS is not None and not (bools and token_mask_BS.shape == shape):
            raise InputError(
                expected=f"token_mask_BS, a bool for each token: {shape}",
                got=described(token_mask_BS),
                do="pass the mask of the same tokens",
            )
        # places: 0 is an id below the range, 1 .. G the groups, then an id above it, then padding
        place_T = class_ids_BS.reshape(-1).to(x_BSD.device, torch.long).clamp(-1, many) + 1
        if token_mask_BS is not None:
            place_T = place_T.masked_fill(~token_mask_BS.reshape(-1).to(x_BSD.device), many + 2)
        below, *counts, above, _ = count_choices(place_T.unsqueeze(1), many + 3)[0].tolist()  # the one wait of the host
        if below or above:
            raise InputError(
                expected=f"class ids in [0, {many}): {', '.join(self.groups)}",
                got=f"{below + above} of {place_T.numel()} tokens with another one",
                do="give the class a group, or take the tokens out with token_mask_BS",
            )
        order_T = place_T.argsort(stable=True)[: sum(counts)]
        return x_BSD.reshape(-1, x_BSD.shape[-1]), order_T, counts

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draws all weights anew; needed after ``to_empty`` on a model built on the meta device."""
        for group in self.groups.values():
            group.reset_parameters()  # type: ignore[operator]
