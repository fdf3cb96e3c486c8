"""What a router keeps beside its weight: biases, a threshold, a mask; saved under their names, exact in any cast."""

from __future__ import annotations

import re

import torch
from torch import Tensor, nn

from ..autograd.router_state import RouterState
from ..errors import InputError, StateError
from ..functional.adaptive_top_k import check_threshold
from ..functional.routing import PLACES
from ..functional.routing_mask import check_visible, sees_too_few

__all__ = ["RouterBuffers", "bias_name"]

MASK_NAME = "visible_experts"
BIAS_NAME = re.compile(rf"expert_bias(?:_({'|'.join(PLACES[1:])}))?(?:_of_([^.]+))?")


def bias_name(place: str, tokens: str | None = None) -> str:
    """What a checkpoint calls a bias of a router: by where it acts, and by the class of its tokens.

    >>> bias_name("scores"), bias_name("logits"), bias_name("logits", "image")
    ('expert_bias', 'expert_bias_logits', 'expert_bias_logits_of_image')
    """
    of = "" if tokens is None else f"_of_{tokens}"
    return ("expert_bias" if place == PLACES[0] else f"expert_bias_{place}") + of


def _named_after(place: str) -> property:
    """The bias under its name in checkpoints, for tools that look such names up (DCP)."""
    return property(lambda router: router.expert_bias if router.bias_place == place else None)


class RouterBuffers(nn.Module):
    """The buffers of a `Router`, none of which it has unless somebody asks for it.

    ``expert_bias`` (E,), those of classes of tokens, ``drop_threshold`` (), ``visible_experts`` (V, E).
    """

    weight: nn.Parameter
    expert_bias: Tensor | None
    drop_threshold: Tensor | None
    visible_experts: Tensor | None
    drops: bool  # whether some of its choices may be none: an id of E, for tokens that use fewer than K experts
    bias_place = PLACES[0]
    bias_classes: tuple[str, ...] = ()  # in the order of their names: the sum of their biases depends on it

    def __init__(self, num_experts: int, top_k: int, top_p: float | None) -> None:
        super().__init__()
        self.num_experts, self.top_k, self.top_p, self.drops = num_experts, top_k, top_p, top_p is not None
        self.balance_state: RouterState | None = None
        for name in ("expert_bias", "drop_threshold", MASK_NAME):
            self.register_buffer(name, None)

    @property
    def bias_owner(self) -> str:
        return "the router's" if self._biases() else "none"

    @property
    def class_biases(self) -> dict[str, Tensor]:
        """Name of a class of tokens -> the bias (E,) of its tokens alone."""
        return {name: getattr(self, bias_name(self.bias_place, name)) for name in self.bias_classes}

    def _biases(self) -> dict[str, Tensor]:
        """All of them, under the names of their buffers."""
        of_all = {} if self.expert_bias is None else {"expert_bias": self.expert_bias}
        return of_all | {bias_name(self.bias_place, name): bias_E for name, bias_E in self.class_biases.items()}

    def disable_selection_bias(self, tokens: str | None = None) -> None:
        """Takes the bias away, of all tokens or of a class."""
        own = self.class_biases
        if tokens is None:
            self.expert_bias = None
        else:
            own.pop(tokens, None)
        self._keep(own, self.bias_place if own or self.expert_bias is not None else PLACES[0])

    def enable_selection_bias(self, place: str = PLACES[0], tokens: str | None = None) -> None:
        """Adds the bias, zero, if there is none yet, of all tokens or of a class; all act there from now on."""
        own, zero_E = self.class_biases, torch.zeros(self.num_experts, dtype=torch.float32, device=self.weight.device)
        if tokens is not None:
            own.setdefault(tokens, zero_E)
        elif self.expert_bias is None:
            self.expert_bias = zero_E
        self._keep(own, place)

    def _exact(self) -> dict[str, Tensor]:
        """Buffers that stay fp32 whatever the router is cast to, by their names."""
        return self._biases() | ({} if self.drop_threshold is None else {"drop_threshold": self.drop_threshold})

    def _keep(self, of_classes: dict[str, Tensor], place: str) -> None:
        """These and no others, under the names that they have at this place."""
        for name in self.bias_classes:
            delattr(self, bias_name(self.bias_place, name))
        self.bias_place, self.bias_classes = place, tuple(sorted(of_classes))
        for name in self.bias_classes:
            self.register_buffer(bias_name(place, name), of_classes[name])

    @property
    def adapts(self) -> bool:
        """Whether choices are dropped now, as `drop_below` says."""
        return self.drop_threshold is not None and not self.training

    def drop_below(self, threshold: float | None) -> None:
        """Adaptive top-k in evaluation: drops a token's smallest weights while they stay below ``threshold`` together.

        See `equipoise.functional.drop_experts`. The threshold is a buffer, in ``state_dict()``; None takes it away.

        Raises ConfigError for a threshold below 0 or NaN, and where a token has one expert.

        >>> from equipoise import Router
        >>> router = Router(dim=8, num_experts=4, top_k=2).eval()
        >>> router.drop_below(0.6)  # the second of two normalised weights is below one half
        >>> int(router(torch.randn(6, 8)).counts_E.sum())
        6
        """
        if threshold is None:
            self.drop_threshold = None
            return
        check_threshold(threshold, self.top_k)
        self.drop_threshold = torch.tensor(threshold, dtype=torch.float32, device=self.weight.device)

    def enable_mask(self, visible_VE: Tensor) -> None:
        """From now on a token chooses from the experts alone that its id sees, (V, E) bool: see ``draw_visible``.

        Raises InputError for a mask that does not fit, StateError while the router has a balancer, which is told once
        what may be chosen.
        """
        if self.balance_state is not None:
            raise StateError(
                expected="a mask before the Balancer, which is told once what its routers may choose",
                got=f"router {self.balance_state.name!r} with a balancer",
                do="call balancer.remove(), then enable_mask, and make the Balancer again",
            )
        check_visible(visible_VE, self.num_experts)
        at = visible_VE.device if self.weight.is_meta else self.weight.device
        self.visible_experts = visible_VE.to(at, copy=True)
        self.drops = self.top_p is not None or sees_too_few(visible_VE, self.top_k)

    def disable_mask(self) -> None:
        """Every token chooses from all experts."""
        self.visible_experts, self.drops = None, self.top_p is not None

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
        if self.drop_threshold is None and f"{prefix}drop_threshold" in state_dict:
            self.drop_threshold = torch.zeros((), dtype=torch.float32, device=self.weight.device)
        for key in [key for key in state_dict if key.startswith(f"{prefix}expert_bias")]:
            if (named := BIAS_NAME.fullmatch(key.removeprefix(prefix))) is None:
                continue
            (place, tokens), bias_E = named.groups(default=None), state_dict.pop(key)
            place = place or PLACES[0]
            if self.balance_state is not None and self._biases() and place != self.bias_place:
                error_msgs.append(
                    f"expected a bias of place={self.bias_place!r}, as this router has it under its balancer; got "
                    f"{key!r}, of place={place!r}; load the weights first, then make the balancer with "
                    f"ExpertBias(place={place!r})"
                )
                continue
            self.enable_selection_bias(place, tokens)
            state_dict[f"{prefix}expert_bias" if tokens is None else key] = bias_E
        self._load_mask(state_dict, prefix, error_msgs)
        names = (local_metadata, strict, missing_keys, unexpected_keys, error_msgs)
        super()._load_from_state_dict(state_dict, prefix, *names)
        for name, buffer in self._exact().items():
            setattr(self, name, buffer.float())

    def _load_mask(self, state_dict: dict, prefix: str, error_msgs: list[str]) -> None:
        """Takes the mask in the file, also where the router has none, or one of another vocabulary."""
        visible_VE, own_VE = state_dict.get(prefix + MASK_NAME), self.visible_experts
        if visible_VE is None or (own_VE is not None and own_VE.equal(visible_VE.to(own_VE.device))):
            return
        try:
            self.enable_mask(visible_VE)
        except (InputError, StateError) as error:
            error_msgs.append(f"{prefix}{MASK_NAME}: {error}")
            del state_dict[prefix + MASK_NAME]

    def _apply(self, fn, recurse: bool = True):
        """Casts and moves like any module, but biases stay fp32 (B34, B38, B39) and are zero when they leave meta, and
        a mask stays what it is."""
        before, visible_VE = self._exact(), self.visible_experts
        super()._apply(fn, recurse)
        if visible_VE is not None:  # nothing draws it again: not where to_empty leaves garbage, and not from meta
            at = self.weight.device
            self.visible_experts = visible_VE if at.type == "meta" else visible_VE.to(at)
        for name, after in self._exact().items():
            if before[name].is_meta and not after.is_meta:
                setattr(self, name, torch.zeros_like(after, dtype=torch.float32))  # to_empty leaves garbage
            elif after.dtype != torch.float32:
                setattr(self, name, before[name].to(device=after.device, dtype=torch.float32))
        return self
