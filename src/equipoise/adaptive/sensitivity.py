"""How much the loss depends on the experts that a layer could drop, from gradients over a text."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import ConfigError, InputError
from ..functional.adaptive_top_k import dropped_weight, loss_per_squared_weight
from .model import AdaptableModel, Seen, watched

__all__ = ["Profile", "measure_sensitivity"]

TARGETS = ("model", "text")
AT_ONCE = 512  # tokens whose distributions lie in memory beside their logits
Progress = Callable[[int, int], None]  # batches done, of how many


@dataclass(frozen=True)
class Profile:
    """What a text told about dropping experts, by router name.

    Args:
        sensitivity: S, in nats per squared weight: dropping weights of the sum m costs S m².
        lost: the weight m of each cut of each token, (T, K - 1): see `dropped_weight`. 0 is the cut of a choice that is
            none, of a token that uses fewer than K experts (top-p, a mask by token id).
        alone: by how much the mean loss would grow, in nats, if the router used one expert for every token.
    """

    sensitivity: dict[str, float]
    lost: dict[str, Tensor]
    alone: dict[str, float]
    tokens: int

    @property
    def choices(self) -> int:
        """How many choices of an expert the tokens made, over all routers."""
        return sum(len(one) + int((one > 0).sum()) for one in self.lost.values())


def measure_sensitivity(
    model: AdaptableModel,
    batches: Sequence[Tensor],
    *,
    targets: str = "model",
    seed: int = 0,
    on_batch: Progress | None = None,
) -> Profile:
    """S of each layer: the mean of `equipoise.functional.loss_per_squared_weight` over the tokens of a text.

    One forward and one backward of the text, without gradients of parameters.

    Args:
        batches: token ids (B, S + 1) each; the loss is of the last S of them.
        targets: "model" draws the next tokens from the model's own prediction, which makes the mean of squared
            gradients the Fisher information, and that the Gauss-Newton part of the Hessian: AdapMoE's argument to the
            letter. "text" takes those of the text, the empirical Fisher information, which a model that fits its text
            badly makes too large.
        seed: of the drawn targets.

    Raises ConfigError for other ``targets``, and where every token has one expert; InputError without a batch, and for
    gradients that are not finite.

    >>> from equipoise.lab.config.schema import ModelConfig
    >>> from equipoise.lab.models.transformer import LanguageModel
    >>> lm = LanguageModel(ModelConfig(layers=2, width=32, heads=2, head_dim=16, experts=4, expert_hidden=16)).eval()
    >>> profile = measure_sensitivity(AdaptableModel.of(lm, lm), [torch.arange(20).view(2, 10)])
    >>> profile.tokens, {name: tuple(one.shape) for name, one in profile.lost.items()}
    (18, {'model.layers.0.mlp.gate': (18, 1), 'model.layers.1.mlp.gate': (18, 1)})
    """
    if targets not in TARGETS:
        raise ConfigError(expected=f"targets of {' or '.join(TARGETS)}", got=repr(targets), do="leave them out")
    if not batches:
        raise InputError(expected="at least one batch of text", got="none", do="pass more text")
    draw = torch.Generator().manual_seed(seed)
    costs: dict[str, list[Tensor]] = {name: [] for name in model.routers}
    lost: dict[str, list[Tensor]] = {name: [] for name in model.routers}
    with _frozen(model.module), torch.enable_grad():
        for number, ids_BS in enumerate(batches):
            for name, (weights_TK, gradients_TK) in _gradients(model, ids_BS, targets, draw).items():
                normalize = model.routers[name].traits.normalize
                costs[name].append(loss_per_squared_weight(weights_TK, gradients_TK, normalize=normalize).cpu())
                lost[name].append(dropped_weight(weights_TK, normalize=normalize).float().cpu())
            if on_batch is not None:
                on_batch(number + 1, len(batches))
    lost_TJ = {name: torch.cat(parts) for name, parts in lost.items()}
    costs_TJ = {name: torch.cat(parts) for name, parts in costs.items()}
    _check_some(lost_TJ)
    return Profile(
        sensitivity={name: _mean_of_cuts(one, lost_TJ[name]) for name, one in costs_TJ.items()},
        lost=lost_TJ,
        alone={name: float((one[:, -1] * lost_TJ[name][:, -1].double().square()).mean())
               for name, one in costs_TJ.items()},
        tokens=len(next(iter(lost_TJ.values()))),
    )  # fmt: skip


def _check_some(lost: dict[str, Tensor]) -> None:
    if not any(bool((one > 0).any()) for one in lost.values()):
        raise ConfigError(
            expected="tokens that choose two experts or more, to drop some",
            got="one expert for every token of the text, by a mask or by top-p",
            do="leave this model as it is: adaptive top-k has nothing to drop there",
        )


def _mean_of_cuts(costs_TJ: Tensor, lost_TJ: Tensor) -> float:
    """Over those that take an expert away; 0 where no token has one to spare."""
    real_TJ = lost_TJ > 0
    if bool(real_TJ.all()):
        return float(costs_TJ.mean())
    return float(costs_TJ[real_TJ].mean()) if bool(real_TJ.any()) else 0.0


def _gradients(
    model: AdaptableModel, ids_BS: Tensor, targets: str, draw: torch.Generator
) -> dict[str, tuple[Tensor, Tensor]]:
    """Of each router the weights of a batch, and the gradient of the summed loss at them."""
    added: dict[str, Tensor] = {}
    weights: dict[str, Tensor] = {}

    def see(seen: Seen) -> Tensor:
        if seen.name in added:
            raise ConfigError(
                expected=f"a router that sees all tokens of a forward in one call: {seen.name}",
                got="a second call",
                do="switch off tiling or recomputation for this measurement",
            )
        weights[seen.name] = seen.weights_TK.detach()
        added[seen.name] = torch.zeros_like(seen.weights_TK, dtype=torch.float32).requires_grad_()
        return seen.weights_TK + added[seen.name].to(seen.weights_TK.dtype)

    ids_BS = ids_BS.to(model.device)
    with watched(model, see):
        logits_BSV = model.logits(ids_BS[:, :-1]).float()
    next_BS = ids_BS[:, 1:] if targets == "text" else _drawn(logits_BSV, draw)
    loss = F.cross_entropy(logits_BSV.flatten(0, 1), next_BS.flatten(), reduction="sum")
    if missing := [name for name in model.routers if name not in added]:
        raise ConfigError(
            expected="routers that text reaches",
            got=f"no token at {missing[0]}",
            do="adapt a model of text: routers of images or of sounds see no tokens here",
        )
    found = torch.autograd.grad(loss, [added[name] for name in model.routers])
    for name, gradient_TK in zip(model.routers, found, strict=True):
        if not bool(torch.isfinite(gradient_TK).all()):
            raise InputError(
                expected=f"finite gradients at the weights of {name}",
                got="NaN or infinity",
                do="measure in float32 or bfloat16: float16 overflows in a sum over many tokens",
            )
    return {name: (weights[name], gradient_TK) for name, gradient_TK in zip(model.routers, found, strict=True)}


def _drawn(logits_BSV: Tensor, draw: torch.Generator) -> Tensor:
    """A token (B, S) from each prediction, the same on every device: by inverting the distribution function."""
    logits_TV = logits_BSV.detach().flatten(0, 1)
    uniform_T1 = torch.rand(len(logits_TV), 1, generator=draw).to(logits_TV.device)
    drawn = []
    for z_tV, uniform_t1 in zip(logits_TV.split(AT_ONCE), uniform_T1.split(AT_ONCE), strict=True):
        below_tV = z_tV.softmax(dim=-1).cumsum(dim=-1)
        drawn.append((below_tV < uniform_t1 * below_tV[:, -1:]).sum(dim=-1).clamp(max=z_tV.shape[-1] - 1))
    return torch.cat(drawn).view(logits_BSV.shape[:2])


@contextmanager
def _frozen(module: nn.Module) -> Any:
    """Without gradients of parameters, as they were afterwards."""
    learned = [p for p in module.parameters() if p.requires_grad]
    try:
        for p in learned:
            p.requires_grad_(False)
        yield
    finally:
        for p in learned:
            p.requires_grad_(True)
