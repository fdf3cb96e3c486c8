"""LaDiMo's distillation: each MoE block is trained alone to imitate the feed-forward whose place it takes.

For a layer with inputs x of the dense model (its hidden states on given text, after the layer's norm) the loss is
mean((block(x) - ffn(x))²) / mean(ffn(x)²), the share of the feed-forward's output that the block misses, and beside it
whatever the policies of a `Balancer` add (arXiv 2408.04278; it does not say how it balances: the scope is a choice).

Hidden states go through the dense model a layer at a time, so that each layer of it is computed once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ...balancer.balancer import Balancer
from ...errors import ConfigError, StateError
from ...functional.metrics import maxvio, mutual_information
from ...functional.routing import count_choices
from ...layers.moe import MoE
from ..config.strategies import Strategy, parse_strategy
from ..training.micro_batching import uses_shuffle
from .profile import kept_shares
from .weights import ExpertWeights, Shape

__all__ = ["Distillation", "DistilledLayer", "LayerInputs", "distill_layer", "layer_inputs", "read_strategy"]

PASS_SEQUENCES = 8  # that go through a layer of the dense model together
WARMUP, MIN_LR_RATIO = 0.05, 0.1  # of the steps, and of the rate at the end of the cosine


@dataclass(frozen=True)
class Distillation:
    """How a block is trained.

    Args:
        strategy: how its experts are balanced, as ``equipoise compare --strategies`` names it, or none.
        tokens: of training text, each seen once a pass (LaDiMo: 100,000).
        passes: over them.
        batch: sequences of a step; each is a micro-batch.
        lr: peak rate of AdamW.
    """

    strategy: str = "global"
    tokens: int = 100_000
    passes: int = 4
    batch: int = 16
    lr: float = 1e-3

    def __post_init__(self) -> None:
        for name in ("tokens", "passes", "batch", "lr"):
            if not getattr(self, name) > 0:
                raise ConfigError(expected=f"--{name} above 0", got=str(getattr(self, name)), do="leave it out")
        read_strategy(self.strategy)


@dataclass(frozen=True)
class LayerInputs:
    """What a feed-forward is given on training and on held-out sequences (N, S, D), and the latter's domains (N,)."""

    train_NSD: Tensor
    held_out_NSD: Tensor
    domains_N: Tensor


@dataclass(frozen=True)
class DistilledLayer:
    """What training made of one layer. Numbers are of held-out text but for ``seconds``.

    Args:
        error_before, error: share of the feed-forward's output that the block misses (squared), before and after.
        maxvio: of the load on all of it.
        topk_score: mean sum of the K gate probabilities.
        information: nats between expert and domain.
        shares: `kept_shares` of the K weights.
    """

    experts: ExpertWeights
    router_ED: Tensor
    error_before: float
    error: float
    maxvio: float
    topk_score: float
    information: float
    shares: list[float]


def read_strategy(name: str) -> Strategy:
    """Raises ConfigError for a name that there is not, or a strategy whose bias or gate no class here could hold."""
    strategy = parse_strategy(name)
    if strategy.selection_bias or strategy.gate not in (None, "softmax"):
        raise ConfigError(
            expected="a strategy of losses, with a softmax gate: the MoE classes of these families have no other",
            got=f"{name!r}, which has a bias or another gate",
            do="take micro, global, sequence or none",
        )
    return strategy


def layer_inputs(network: Any, tokens_NS: Tensor, wanted: Sequence[int]) -> Iterator[tuple[int, nn.Module, Tensor]]:
    """(layer, its feed-forward, what that is given (N, S, D) in fp32) of the wanted layers, one after the other."""
    device = next(network.parameters()).device
    chunks = list(tokens_NS.to(device).split(PASS_SEQUENCES))
    calls = {size: _layer_calls(network, chunk) for size, chunk in {len(chunk): chunk for chunk in chunks}.items()}
    with torch.no_grad():
        hidden = [network.get_input_embeddings()(chunk) for chunk in chunks]
    for number, layer in enumerate(network.model.layers):
        if number > max(wanted, default=-1):
            return
        given: list[Tensor] = []
        hook = layer.mlp.register_forward_pre_hook(lambda _, args, given=given: given.append(args[0].detach()))
        try:
            with torch.no_grad():
                for at, one in enumerate(hidden):
                    out = layer(one, **calls[len(one)][number])
                    hidden[at] = out[0] if isinstance(out, tuple) else out
        finally:
            hook.remove()
        if number in wanted:
            yield number, layer.mlp, torch.cat(given).float()


def distill_layer(
    start: tuple[ExpertWeights, Tensor],
    inputs: LayerInputs,
    ffn: Callable[[Tensor], Tensor],
    shape: Shape,
    settings: Distillation,
    *,
    seed: int = 0,
    on_step: Callable[[int, int, float], None] | None = None,
) -> DistilledLayer:
    """Trains one block from ``start`` (experts and router) to compute what ``ffn`` does.

    ``on_step`` is called with (steps done, steps, share missed). Raises StateError where the loss becomes NaN.
    """
    device, dim = inputs.train_NSD.device, inputs.train_NSD.shape[-1]
    block = _block(start, shape, dim).to(device)
    strategy = read_strategy(settings.strategy)
    batches = _batches(len(inputs.train_NSD), settings, seed)
    optimizer = torch.optim.AdamW(block.parameters(), lr=settings.lr, weight_decay=0.0, betas=(0.9, 0.95))
    policies = strategy.build(len(batches))
    shuffles = uses_shuffle(policies)
    balancer = Balancer(block, policies, optimizer, sequences_per_micro_batch=1) if policies else None
    power = _power(ffn, inputs.train_NSD)
    before = _missed(block, ffn, inputs.held_out_NSD)
    for step, chosen_B in enumerate(batches):
        for group in optimizer.param_groups:
            group["lr"] = settings.lr * _rate(step + 1, len(batches))
        x_BSD = inputs.train_NSD[chosen_B]
        with torch.no_grad():
            wanted_BSD = ffn(x_BSD)
        if balancer and balancer.needs_counting and shuffles:  # the step is one pass: else its own counts are there
            with balancer.counting():
                block(x_BSD)
        loss = (block(x_BSD) - wanted_BSD).square().mean() / power
        if not math.isfinite(missed := loss.item()):
            raise StateError(expected=f"a finite loss at step {step + 1}", got=str(missed), do="lower --lr")
        (balancer.tap(loss) if balancer else loss).backward()
        optimizer.step()
        optimizer.zero_grad()
        if on_step:
            on_step(step + 1, len(batches), missed)
    if balancer:
        balancer.remove()
    weights = ExpertWeights(block.experts.gate_up_proj.detach(), block.experts.down_proj.detach())
    return DistilledLayer(
        weights, block.gate.weight.detach(), before, _missed(block, ffn, inputs.held_out_NSD),
        **_routing(block, inputs, shape),
    )  # fmt: skip


def _layer_calls(network: Any, tokens_BS: Tensor) -> list[dict[str, Any]]:
    """What the model gives each of its layers beside the hidden states: positions, masks."""
    calls: list[dict[str, Any]] = []

    def note(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:  # noqa: ARG001
        calls.append({name: value for name, value in kwargs.items() if name != "hidden_states"})

    hooks = [layer.register_forward_pre_hook(note, with_kwargs=True) for layer in network.model.layers]
    try:
        with torch.no_grad():
            network.eval().model(input_ids=tokens_BS, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return calls


def _block(start: tuple[ExpertWeights, Tensor], shape: Shape, dim: int) -> MoE:
    (gate_up_EFD, down_EDF), router_ED = start
    block = MoE(dim, down_EDF.shape[-1], shape.experts, shape.top_k, batch_first=True, gate="softmax", normalize=True)
    with torch.no_grad():
        block.experts.gate_up_proj.copy_(gate_up_EFD)
        block.experts.down_proj.copy_(down_EDF)
        block.gate.weight.copy_(router_ED)
    return block


def _batches(sequences: int, settings: Distillation, seed: int) -> list[Tensor]:
    """Steps of neighbouring sequences, which are of all domains in turn; in a new order each pass."""
    steps = list(torch.arange(sequences).split(settings.batch))
    steps = steps[:-1] if len(steps) > 1 and len(steps[-1]) < settings.batch else steps
    draw = torch.Generator().manual_seed(seed)
    return [steps[at] for _ in range(settings.passes) for at in torch.randperm(len(steps), generator=draw).tolist()]


def _rate(step: int, steps: int) -> float:
    """Up a line, then down a cosine."""
    warmup = max(1, round(WARMUP * steps))
    if step <= warmup:
        return step / warmup
    done = (step - warmup) / max(1, steps - warmup)
    return MIN_LR_RATIO + (1 - MIN_LR_RATIO) * (1 + math.cos(math.pi * done)) / 2


@torch.no_grad()
def _power(ffn: Callable[[Tensor], Tensor], x_NSD: Tensor) -> float:
    """Mean square of the feed-forward's output."""
    sums = [ffn(one).double().square().mean().item() * len(one) for one in x_NSD.split(PASS_SEQUENCES)]
    return math.fsum(sums) / len(x_NSD) or 1.0


@torch.no_grad()
def _missed(block: MoE, ffn: Callable[[Tensor], Tensor], x_NSD: Tensor) -> float:
    """Share of the feed-forward's output that the block misses, squared; without anything counted as training."""
    block.eval()
    missed = [(block(one) - ffn(one)).double().square().mean().item() * len(one) for one in x_NSD.split(PASS_SEQUENCES)]
    block.train()
    return math.fsum(missed) / len(x_NSD) / _power(ffn, x_NSD)


@torch.no_grad()
def _routing(block: MoE, inputs: LayerInputs, shape: Shape) -> dict[str, Any]:
    """How held-out tokens are routed."""
    logits_NSE = torch.nn.functional.linear(inputs.held_out_NSD, block.gate.weight).double()
    top_NSK = logits_NSE.softmax(dim=-1).topk(shape.top_k, dim=-1)
    ids_TK = top_NSK.indices.flatten(0, 1)
    counts_NE = count_choices(ids_TK, shape.experts, num_sequences=len(inputs.held_out_NSD)).cpu()
    domains = int(inputs.domains_N.max()) + 1
    counts_DE = counts_NE.new_zeros(domains, shape.experts).index_add_(0, inputs.domains_N, counts_NE)
    return {
        "maxvio": maxvio(counts_DE.sum(dim=0)).item(),
        "topk_score": top_NSK.values.sum(dim=-1).mean().item(),
        "information": mutual_information(counts_DE).item(),
        "shares": kept_shares(top_NSK.values.flatten(0, 1)),
    }
