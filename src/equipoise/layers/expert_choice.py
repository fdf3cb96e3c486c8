"""Expert choice: a layer whose experts take tokens from a pool, so that all have equal loads without a loss (DiffMoE).

In training each expert takes the tokens of the pool that it scores highest. A pool of several samples makes them
compete, which no single sample can know at inference: there a small predictor, trained beside the model, says which
tokens an expert would take. `TokenPools` trains it, moves its thresholds and joins the pools of ranks.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..autograd.finite import check_logits
from ..distributed import ALONE, Group
from ..errors import ConfigError, InputError, StateError, unknown_name
from ..functional.expert_choice import check_capacity, choose_tokens, taken_pairs
from ..functional.routing import GATES, gate_scores, without_autocast
from ..torch_internals import current_backward
from .experts import Experts
from .moe import SwiGLU

__all__ = [
    "ExpertChoiceMoE",
    "ExpertChoiceRouter",
    "PoolState",
    "TokenChoice",
    "choose_among",
    "choose_from_pools",
]

SCOPES = ("sample", "micro_batch", "global_batch")
GATE_STD = 0.006  # of the released code: nearly even scores at first


class TokenChoice(NamedTuple):
    """Which token goes to which expert, as P pairs, expert after expert; the weights multiply the experts' outputs."""

    token_ids_P: Tensor
    expert_ids_P: Tensor
    weights_P: Tensor


class ExpertChoiceRouter(nn.Module):
    """A linear gate whose experts choose: see `ExpertChoiceMoE` for the arguments.

    ``thresholds`` (E,) of the predictor's scores are fp32 whatever the model is cast to, persistent in checkpoints, and
    NaN until the first step has moved them.

    >>> router = ExpertChoiceRouter(dim=8, num_experts=4, scope="sample")
    >>> router(torch.randn(3, 16, 8)).expert_ids_P.bincount()  # 4 of the 16 tokens of each of 3 samples
    tensor([12, 12, 12, 12])
    """

    thresholds: Tensor | None

    def __init__(
        self,
        dim: int,
        num_experts: int,
        *,
        scope: str | int = "global_batch",
        capacity: float = 1.0,
        gate: str = "softmax",
    ) -> None:
        super().__init__()
        check_capacity(num_experts, capacity)
        if gate not in GATES:
            raise unknown_name("gate", gate, GATES)
        if scope not in SCOPES and not (isinstance(scope, int) and not isinstance(scope, bool) and scope >= 1):
            raise ConfigError(
                expected=f"a scope of the pool: {', '.join(SCOPES)}, or a number of samples",
                got=repr(scope),
                do='"global_batch" is the pool of DiffMoE, "sample" that of EC-DiT',
            )
        self.dim, self.num_experts, self.capacity, self.gate = dim, num_experts, capacity, gate
        self.scope = 1 if scope == "sample" else scope
        self.weight = nn.Parameter(torch.empty(num_experts, dim))
        self.predictor: nn.Sequential | None = None
        self.register_buffer("thresholds", None)
        if self.scope != 1:  # a sample is a pool that inference has, too
            self.predictor = nn.Sequential(nn.Linear(dim, dim), nn.SiLU(), nn.Linear(dim, num_experts))
            self.thresholds = torch.full((num_experts,), math.nan, dtype=torch.float32)
        self.pool_state: PoolState | None = None
        self.always_chooses = False  # see `choose_from_pools`
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=GATE_STD)
        if self.predictor is not None and self.thresholds is not None:
            for linear in (self.predictor[0], self.predictor[2]):
                linear.reset_parameters()  # type: ignore[operator]
            self.thresholds.fill_(math.nan)

    def forward(self, x_BSD: Tensor) -> TokenChoice:
        """Of B samples of S tokens; token ids are numbers in (B * S).

        Raises:
            InputError: a wrong shape or width, samples that no whole pools can be made of, a pool of which an expert
                would get no token, NaN logits.
            StateError: evaluation before the first step; a pool over ranks that nobody has joined.
        """
        if x_BSD.dim() != 3 or x_BSD.shape[-1] != self.dim:
            raise InputError(
                expected=f"samples of tokens of width {self.dim}: (B, S, {self.dim})",
                got=str(tuple(x_BSD.shape)),
                do="build the router with this width" if x_BSD.dim() == 3 else "x.unsqueeze(0) of (T, D) is one sample",
            )
        x_TD = x_BSD.flatten(0, 1)
        with without_autocast(x_TD):  # fp32 even where the model computes in bf16
            wide = torch.promote_types(x_TD.dtype, torch.float32)
            logits_TE = F.linear(x_TD.to(wide), self.weight.to(wide))
        check_logits(logits_TE)
        scores_TE = gate_scores(logits_TE, self.gate)
        state = self.pool_state
        if self.training or self.predictor is None or self.always_chooses:
            taken_TE = self._choose(scores_TE.detach(), len(x_BSD))
            if self.training and self.predictor is not None and state is not None:
                state.see(x_TD.detach(), taken_TE)
        else:
            taken_TE = self.predict(x_TD)
        token_ids_P, expert_ids_P = taken_pairs(taken_TE)
        return TokenChoice(token_ids_P, expert_ids_P, scores_TE[token_ids_P, expert_ids_P])

    def predictor_logits(self, x_TD: Tensor) -> Tensor:
        """(T, E), fp32 or wider: how likely each expert is to take each token. No gradient reaches the tokens."""
        assert self.predictor is not None
        first: nn.Linear = self.predictor[0]  # type: ignore[assignment]
        logits_TE = self.predictor(x_TD.detach().to(first.weight.dtype))
        return logits_TE.to(torch.promote_types(logits_TE.dtype, torch.float32))

    def _choose(self, scores_TE: Tensor, samples: int) -> Tensor:
        """(T, E): the tokens that experts take from their pools."""
        if self.scope == "micro_batch":
            return choose_tokens(scores_TE, self.capacity)
        if self.scope == "global_batch":
            if self.pool_state is not None:
                return self.pool_state.choose(scores_TE, self.capacity)
            if (size := Group.world().size) > 1:
                raise StateError(
                    expected="a TokenPools, which joins the pools of all ranks",
                    got=f"a pool over the global batch on one of {size} ranks by itself",
                    do="make TokenPools(model, optimizer) before the first step, or take scope='micro_batch'",
                )
            return choose_tokens(scores_TE, self.capacity)
        assert isinstance(self.scope, int)
        if samples % self.scope:
            raise InputError(
                expected=f"a number of samples that pools of {self.scope} divide",
                got=f"{samples} samples",
                do="change the micro-batch or the scope",
            )
        if not samples:  # no pool
            return torch.zeros_like(scores_TE, dtype=torch.bool)
        pools_NTE = scores_TE.unflatten(0, (samples // self.scope, -1))
        return choose_tokens(pools_NTE, self.capacity).flatten(0, 1)

    def predict(self, x_TD: Tensor) -> Tensor:
        """(T, E) bool: the tokens whose predicted score is above the threshold of an expert.

        Raises StateError before the first step, and for a pool of one sample, which has no predictor.
        """
        if self.thresholds is None:
            raise StateError(
                expected="a capacity predictor",
                got=f"scope={self.scope!r}: a sample is chosen from at inference, too",
                do='take scope="micro_batch" or "global_batch"',
            )
        if bool(self.thresholds.isnan().any()):
            raise StateError(
                expected="thresholds of the capacity predictor, which the steps of training move",
                got="none yet",
                do="train with TokenPools(model, optimizer) first, or load a checkpoint that has them",
            )
        return self.predictor_logits(x_TD).sigmoid() > self.thresholds

    def _apply(self, fn, recurse: bool = True):
        """Casts and moves like any module, but thresholds stay fp32, and are NaN again when they leave meta."""
        before = self.thresholds
        super()._apply(fn, recurse)
        after = self.thresholds
        if before is not None and after is not None:
            if before.is_meta and not after.is_meta:
                self.thresholds = torch.full_like(after, math.nan, dtype=torch.float32)
            elif after.dtype != torch.float32:
                self.thresholds = before.to(device=after.device, dtype=torch.float32)
        return self

    def _load_from_state_dict(self, *args, **kwargs) -> None:
        """``load_state_dict(assign=True)`` keeps the file's dtype; thresholds stay fp32 all the same."""
        super()._load_from_state_dict(*args, **kwargs)
        if self.thresholds is not None:
            self.thresholds = self.thresholds.float()

    def extra_repr(self) -> str:
        sizes = f"dim={self.dim}, num_experts={self.num_experts}, scope={self.scope!r}, capacity={self.capacity:g}"
        return f"{sizes}, gate={self.gate!r}"


class ExpertChoiceMoE(nn.Module):
    """Replaces a feed-forward layer: each expert takes floor(T · C / E) of the T tokens of a pool (arXiv 2503.14487).

    For models without a future to hide, as diffusion: which tokens are taken depends on all tokens of the pool. In
    evaluation a token goes to an expert if the capacity predictor's score is above that expert's threshold, whatever
    else is in the batch; a pool of one sample is chosen from there as in training.

    Args:
        dim, hidden: width D of a token, and of one expert.
        scope: whose tokens a pool holds. "sample": one sample's (expert choice of EC-DiT). A number n: those of n
            neighbouring samples. "micro_batch": all of one forward. "global_batch": all ranks, and all micro-batches of
            `TokenPools.micro_batches`.
        capacity: C, experts that a token uses on average; above 0 and at most E.
        num_shared: shared experts, as one SwiGLU of width ``num_shared * hidden``, for every token.
        gate: of the scores: "softmax", "sigmoid", "sqrt_softplus". A sigmoid's do not depend on how many experts are
            there.

    Raises ConfigError for sizes below 1, a capacity or a scope that cannot be, and ``num_shared`` below 0.

    >>> layer = ExpertChoiceMoE(dim=8, hidden=16, num_experts=4)
    >>> layer(torch.randn(2, 6, 8)).shape
    torch.Size([2, 6, 8])
    """

    def __init__(
        self,
        dim: int,
        hidden: int,
        num_experts: int,
        *,
        scope: str | int = "global_batch",
        capacity: float = 1.0,
        num_shared: int = 0,
        gate: str = "softmax",
    ) -> None:
        super().__init__()
        if type(num_shared) is not int or num_shared < 0 or (num_shared and not isinstance(hidden, int)):
            raise ConfigError(
                expected="num_shared of 0 or more, whole, and one width for all experts, of which it is a multiple",
                got=f"num_shared={num_shared}, hidden={hidden}",
                do="leave num_shared out for a layer without shared experts",
            )
        self.gate = ExpertChoiceRouter(dim, num_experts, scope=scope, capacity=capacity, gate=gate)
        self.experts = Experts(num_experts, dim, hidden)
        self.shared_experts: SwiGLU | None = SwiGLU(dim, num_shared * hidden) if num_shared else None

    def forward(self, x_BSD: Tensor) -> Tensor:
        """(B, S, D), B samples of S tokens, or (T, D) of one sample; the same shape out. A token that no expert takes
        gets zeros, or what the shared experts add.

        Raises what `ExpertChoiceRouter.forward` raises, and InputError for another number of dimensions.
        """
        if x_BSD.dim() not in (2, 3):
            raise InputError(
                expected="tokens of shape (B, S, D) or (T, D)",
                got=str(tuple(x_BSD.shape)),
                do="merge what lies between: x.flatten(1, -2) of (B, H, W, D) is (B, S, D)",
            )
        x_TD = x_BSD.reshape(-1, x_BSD.shape[-1])
        choice = self.gate(x_BSD if x_BSD.dim() == 3 else x_BSD.unsqueeze(0))
        pairs = choice.expert_ids_P.unsqueeze(1), choice.weights_P.unsqueeze(1)
        y_PD = self.experts(x_TD[choice.token_ids_P], *pairs)
        none_TD, at_P = torch.zeros_like(x_TD, dtype=y_PD.dtype), choice.token_ids_P
        if y_PD.is_cuda:  # where index_add has atomics, and a recompute other bits; this sorts
            y_TD = none_TD.index_put((at_P,), y_PD, accumulate=True)
        else:
            y_TD = none_TD.index_add(0, at_P, y_PD)
        if self.shared_experts is not None:
            y_TD = y_TD + self.shared_experts(x_TD)
        return y_TD.view_as(x_BSD)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draws all weights anew and forgets the thresholds; needed after ``to_empty`` on a model built on meta."""
        self.gate.reset_parameters()
        self.experts.reset_parameters()
        if self.shared_experts is not None:
            self.shared_experts.reset_parameters()


class PoolState:
    """What `TokenPools` keeps in a router during a step. A copy of the model, or a pickle, has none."""

    def __init__(self, group: Group = ALONE) -> None:
        self.group = group
        self.seen: tuple[Tensor, Tensor] | None = None  # tokens and who took them, until the predictor has learned it
        self.predicted: list[Tensor] = []  # the predictor's scores of this step's tokens
        # scores and choice of each micro-batch that shares the pool of this step
        self.choices: list[tuple[Tensor, Tensor]] = []
        self.tokens = 0  # in the pool of the step, of all its micro-batches and ranks
        self.place: int | None = None  # the micro-batch at hand, where there are several
        # the scores of all layers that have not chosen yet among several, in the order of their calls
        self.collected: list[tuple[PoolState, Tensor]] | None = None

    def __reduce__(self):
        return type(None), ()

    def see(self, x_TD: Tensor, taken_TE: Tensor) -> None:
        """Overwrites, never adds: a recompute sees nothing new, and what only chooses teaches nothing."""
        if self.collected is None and current_backward() == -1:
            self.seen = x_TD, taken_TE

    def weight(self, tokens: int) -> float:
        """Of a micro-batch's mean, where micro-batches and ranks are averaged and the mean of all tokens is meant."""
        return tokens * len(self.choices) * self.group.size / max(self.tokens, 1)

    def choose(self, scores_TE: Tensor, capacity: float) -> Tensor:
        """From the pool of all ranks and micro-batches. A recompute finds what was chosen, and asks no rank again."""
        if current_backward() != -1 and self.choices:
            return self._chosen_before(scores_TE)
        if self.collected is not None:
            self.collected.append((self, scores_TE))
            return torch.zeros_like(scores_TE, dtype=torch.bool)  # nobody yet: what comes of it is not used
        if self.place is None:
            (taken_TE,), self.tokens = choose_among([scores_TE], capacity, self.group)
            self.choices = [(scores_TE, taken_TE)]
            return taken_TE
        _, taken_TE = self.choices[self.place]
        if len(taken_TE) != len(scores_TE):
            raise InputError(
                expected=f"the {len(taken_TE)} tokens of micro-batch {self.place} that experts have chosen from",
                got=f"{len(scores_TE)} tokens",
                do="put the micro-batch that TokenPools.micro_batches yields into the model, as it is",
            )
        self.choices[self.place] = scores_TE, taken_TE
        return taken_TE

    def _chosen_before(self, scores_TE: Tensor) -> Tensor:
        """Of several micro-batches it is the one with these scores; they may be a rounding apart."""

        def distance(place: int) -> tuple[float, bool]:
            before_TE = self.choices[place][0]
            far = before_TE.shape != scores_TE.shape
            if far or not len(scores_TE):  # no tokens of this group in the micro-batch: there is nothing to choose
                return math.inf if far else 0.0, place != self.place
            return float((before_TE - scores_TE).abs().max()), place != self.place

        return self.choices[min(range(len(self.choices)), key=distance) if len(self.choices) > 1 else 0][1]


def choose_among(parts: list[Tensor], capacity: float, group: Group) -> tuple[list[Tensor], int]:
    """What experts take of each part (T, E) of this rank's scores, and the tokens of the pool, all parts of all ranks.

    >>> scores_TE = torch.tensor([[0.9, 0.1], [0.8, 0.2], [0.7, 0.3], [0.6, 0.4]])
    >>> taken, tokens = choose_among(list(scores_TE.split(2)), 1.0, ALONE)
    >>> [taken_TE.int().tolist() for taken_TE in taken], tokens
    ([[[1, 0], [1, 0]], [[0, 1], [0, 1]]], 4)
    """
    own_TE = torch.cat(parts)
    all_TE, sizes = group.gather_sized(own_TE)
    start = sum(sizes[: group.rank])
    taken_TE = choose_tokens(all_TE, capacity)[start : start + len(own_TE)]
    return list(taken_TE.split([len(part) for part in parts])), sum(sizes)


@contextmanager
def choose_from_pools(model: nn.Module) -> Iterator[None]:
    """Inside, experts choose from pools in evaluation too, as in training, where else a predictor would say what they
    take. For measuring what the predictor costs; tokens then depend on those behind them.

    >>> layer = ExpertChoiceMoE(dim=8, hidden=16, num_experts=4).eval()
    >>> with choose_from_pools(layer):
    ...     layer.gate(torch.randn(2, 8, 8)).expert_ids_P.bincount()  # without thresholds, and equally many
    tensor([4, 4, 4, 4])
    """
    routers = [one for one in model.modules() if isinstance(one, ExpertChoiceRouter) and not one.always_chooses]
    for router in routers:
        router.always_chooses = True
    try:
        yield
    finally:
        for router in routers:
            router.always_chooses = False
