"""What happens around the steps of a model whose experts choose: the predictor's loss, its thresholds, wide pools."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ..distributed import Ranks
from ..errors import ConfigError, StateError
from ..functional.expert_choice import capacity_loss, kth_largest, tokens_per_expert
from .expert_choice import ExpertChoiceRouter, PoolState, choose_among

__all__ = ["TokenPools"]

X = TypeVar("X")


class TokenPools:
    """Trains what `ExpertChoiceMoE` layers need beside the model's own loss, and joins their pools.

    - ``loss()`` teaches the capacity predictors what experts took in the last forward. It reaches nothing else.
    - When ``optimizer`` has stepped, each threshold moves: t <- decay · t + (1 - decay) · s, where s is the K-th
      largest score that the predictor gave to the step's tokens, of all ranks and micro-batches, and K what an expert
      takes of them. The first step sets it. A recompute in backward counts once, evaluation never.
    - ``micro_batches`` gives layers of scope "global_batch" one pool where a step has several micro-batches.

    Args:
        model: holds the layers, on every rank the same ones.
        optimizer: whose steps move the thresholds.
        ranks: those that see different tokens are ``ranks.data``; default: all.
        decay: of the thresholds.

    Raises:
        ConfigError: no such layer, an optimizer of another model, or a decay outside [0, 1).
        StateError: layers that have a TokenPools already; a step without ``loss()``.

    >>> from equipoise import ExpertChoiceMoE
    >>> model = ExpertChoiceMoE(dim=8, hidden=16, num_experts=4)
    >>> optimizer = torch.optim.AdamW(model.parameters())
    >>> pools = TokenPools(model, optimizer)
    >>> x = torch.randn(6, 16, 8)
    >>> loss = (model(x) - x).square().mean() + pools.loss()
    >>> loss.backward()
    >>> optimizer.step()
    >>> model.eval()(x).shape  # by the thresholds
    torch.Size([6, 16, 8])
    """

    def __init__(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, *, ranks: Ranks | None = None, decay: float = 0.95
    ) -> None:
        self.routers = {name: m for name, m in model.named_modules() if isinstance(m, ExpertChoiceRouter)}
        if not self.routers:
            raise ConfigError(
                expected="a model with layers whose experts choose",
                got=f"{type(model).__name__} without any",
                do="build its feed-forward layers from equipoise.ExpertChoiceMoE",
            )
        trained = {id(one) for group in getattr(optimizer, "param_groups", []) for one in group["params"]}
        if not any(id(parameter) in trained for parameter in model.parameters()):
            raise ConfigError(
                expected="the optimizer that trains this model, whose steps move the thresholds",
                got=f"{type(optimizer).__name__} without any of its parameters",
                do="make it of model.parameters(), after the model is wrapped",
            )
        if not 0 <= decay < 1:
            raise ConfigError(expected="a decay in [0, 1)", got=f"decay={decay}", do="0.95 is that of the paper")
        if taken := [name for name, router in self.routers.items() if router.pool_state is not None]:
            raise StateError(
                expected="one TokenPools for a model",
                got=f"another one at {taken[0] or 'the layer'}",
                do="call remove() of the first, or keep it",
            )
        self.decay, self._ranks = decay, ranks or Ranks.default()
        self.group = self._ranks.data
        for router in self.routers.values():
            router.pool_state = PoolState(self.group)
        self._states = [router.pool_state for router in self.routers.values()]
        self._hook = optimizer.register_step_post_hook(lambda *_: self._after_step())

    def loss(self) -> Tensor:
        """Mean cross-entropy of the predictors on the last forward's tokens, summed over layers (nats, fp32 scalar).

        A layer of scope "global_batch" weighs its mean by the forward's share of the pool, so that the mean over
        micro-batches and ranks is that of all tokens, where they have unequally many (`ModalityMoE`).

        Call it once after each forward in training mode, and add it to the loss; scale it as the loss is scaled.

        Raises StateError without such a forward, and where a step has more than one and layers of scope "global_batch"
        did not choose among all of them.
        """
        self._ranks.check_default()
        total = torch.zeros((), device=next(iter(self.routers.values())).weight.device)
        for name, router, state in self._learning():
            if state.seen is None:
                raise StateError(
                    expected=f"a forward of {name or 'the layer'} in training mode before each loss()",
                    got="none since the last one",
                    do="call model.train(), run the model, then call loss() once",
                )
            if router.scope == "global_batch" and len(state.predicted) >= len(state.choices):
                raise StateError(
                    expected="one pool for all micro-batches of a step (scope='global_batch')",
                    got="a second micro-batch with a pool of its own",
                    do="loop over TokenPools.micro_batches(inputs, model), take scope='micro_batch', or after a step "
                    "that was skipped call discard()",
                )
            x_TD, taken_TE = state.seen
            logits_TE = router.predictor_logits(x_TD)
            weight = state.weight(len(x_TD)) if router.scope == "global_batch" else 1.0
            total = total + weight * capacity_loss(logits_TE, taken_TE)
            state.predicted.append(logits_TE.detach().sigmoid())
            state.seen = None
        return total

    def micro_batches(self, inputs: Iterable[X], forward: Callable[[X], Any]) -> Iterator[X]:
        """Yields the micro-batches of one step, after experts have chosen among the tokens of all of them.

        The choice of a layer depends on that of the layer before it, so that with several micro-batches ``forward``
        runs on each of them once for every layer of scope "global_batch", without gradient, before the first is
        yielded. It has to give the layers what the forward in the loop gives them: what is random in it (noise,
        dropout) is drawn before. Ranks have equally many micro-batches.

        Raises StateError where a layer is not called exactly once by each ``forward``, in training mode.

        >>> from equipoise import ExpertChoiceMoE
        >>> model = ExpertChoiceMoE(dim=8, hidden=16, num_experts=4)
        >>> optimizer = torch.optim.AdamW(model.parameters())
        >>> pools = TokenPools(model, optimizer)
        >>> for x in pools.micro_batches(torch.randn(4, 2, 4, 8), model):  # an expert takes 8 of 32 tokens
        ...     loss = (model(x) - x).square().mean() + pools.loss()
        ...     (loss / 4).backward()
        >>> optimizer.step()
        """
        inputs = list(inputs)
        wide = {name: state for name, router, state in self._learning() if router.scope == "global_batch"}
        if len(inputs) < 2 or not wide:
            yield from inputs
            return
        if idle := [name for name in wide if not self.routers[name].training]:
            raise StateError(
                expected="layers of scope 'global_batch' in training mode, for a pool of several micro-batches",
                got=f"{idle[0] or 'the layer'} in evaluation mode",
                do="call model.train(): in evaluation a token joins by the thresholds, whatever else is in the batch",
            )
        try:
            self._settle(wide, inputs, forward)
            for place, one in enumerate(inputs):
                for state in wide.values():
                    state.place = place
                yield one
        finally:
            for state in wide.values():
                state.place = state.collected = None

    def discard(self) -> None:
        """Forgets the step so far: after a step that a GradScaler skipped, or gradients that were thrown away."""
        for _, _, state in self._learning():
            state.seen, state.predicted = None, []

    def remove(self) -> None:
        """Detaches from model and optimizer; thresholds stay as they are."""
        self._hook.remove()
        for router, state in zip(self.routers.values(), self._states, strict=True):
            if router.pool_state is state:
                router.pool_state = None

    def _learning(self) -> Iterator[tuple[str, ExpertChoiceRouter, PoolState]]:
        """The routers with a predictor."""
        for name, router in self.routers.items():
            if router.predictor is not None and router.pool_state is not None:
                yield name, router, router.pool_state

    @torch.no_grad()
    def _settle(self, wide: dict[str, PoolState], inputs: list[X], forward: Callable[[X], Any]) -> None:
        """Layer by layer: each pass gives the scores of one layer more that nothing before it will change."""
        self._ranks.check_default()
        waiting = dict(wide)
        at = next(iter(self.routers.values())).weight.device
        with torch.random.fork_rng([at] if at.type == "cuda" else []):
            while waiting:
                calls: list[tuple[PoolState, Tensor]] = []
                for state in waiting.values():
                    state.collected = calls
                for place, one in enumerate(inputs):
                    for state in wide.values():
                        state.place = place
                    forward(one)
                first = calls[0][0] if calls else None
                scores = [scores_TE for state, scores_TE in calls if state is first]
                if first is None or len(scores) != len(inputs):
                    raise StateError(
                        expected="each layer of scope 'global_batch' once in each forward, in training mode",
                        got=f"{len(scores)} calls of one in {len(inputs)} forwards, {len(waiting)} layers left",
                        do="call model.train(); a layer that is used twice or not at all needs scope='micro_batch'",
                    )
                name = next(name for name, state in waiting.items() if state is first)
                taken, first.tokens = choose_among(scores, self.routers[name].capacity, self.group)
                first.choices, first.collected = list(zip(scores, taken, strict=True)), None
                del waiting[name]

    def _after_step(self) -> None:
        """Moves the thresholds by all tokens of the step, in one gather a layer."""
        for name, router, state in self._learning():
            if not state.predicted:
                raise StateError(
                    expected="TokenPools.loss() in the loss of every step: nothing else trains the predictors",
                    got=f"a step without it at {name or 'the layer'}",
                    do="add pools.loss() to the loss, or call remove() where the layers are not trained",
                )
            scores_TE = self.group.gather_rows(torch.cat(state.predicted))
            state.predicted = []
            if not len(scores_TE):  # a step without a token of the group that these experts are of
                continue
            last_E = kth_largest(scores_TE, tokens_per_expert(len(scores_TE), router.num_experts, router.capacity))
            assert router.thresholds is not None
            moved_E = self.decay * router.thresholds + (1 - self.decay) * last_E
            router.thresholds.copy_(torch.where(router.thresholds.isnan(), last_E, moved_E))
