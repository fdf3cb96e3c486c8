"""A small model of ours in every mode that training meets, and the loop of one optimizer step."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from _rounding import allowed
from contracts.law._reference import History
from equipoise import AuxLoss, Balancer, EntropyLoss, ExpertBias, MoE, Sequences, ZLoss
from equipoise.functional import draw_visible

DIM = 8
SMALL: dict[str, Any] = {"experts": (5,), "top_k": (2,), "gate": "sigmoid"}
BIAS = ExpertBias(rule="sign", rate=0.01)
MATMULS = {torch.ops.aten.mm.default, torch.ops.aten.bmm.default, torch.ops.aten.addmm.default}


class Micro(NamedTuple):
    x_BSD: Tensor
    target_BSD: Tensor
    mask_BS: Tensor | None = None
    documents_BS: Tensor | None = None


class Net(nn.Module):
    """A linear layer, then residual MoE layers; ``mode`` says how each block is run."""

    def __init__(
        self,
        experts: Sequence[int] = (6, 6),
        top_k: Sequence[int] = (2, 2),
        *,
        mode: str = "plain",
        dropout: float = 0.0,
        widths: Sequence[int | Sequence[int]] | None = None,
        **router: Any,
    ) -> None:
        super().__init__()
        self.inp = nn.Linear(DIM, DIM)
        self.drop = nn.Dropout(dropout)
        self.blocks: Any = nn.ModuleList(
            MoE(DIM, h, e, k, batch_first=True, **router)
            for h, e, k in zip(widths or [8] * len(experts), experts, top_k, strict=True)
        )
        self.mode = mode

    def forward(self, x_BSD: Tensor, mask_BS: Tensor | None = None, documents_BS: Tensor | None = None) -> Tensor:
        h = self.inp(x_BSD)
        for block in self.blocks:
            run = functools.partial(block, token_mask_BS=mask_BS, document_ids_BS=documents_BS)
            h = h + self.drop(self._run(run, h))
        return h

    def _run(self, run: Callable[[Tensor], Tensor], h: Tensor) -> Tensor:
        match self.mode:
            case "plain":
                return run(h)
            case "reentrant":
                return checkpoint(run, h, use_reentrant=True)
            case "non_reentrant":
                return checkpoint(run, h, use_reentrant=False)
            case "selective":
                context = functools.partial(create_selective_checkpoint_contexts, _save_matmuls)
                return checkpoint(run, h, use_reentrant=False, context_fn=context)
        raise AssertionError(self.mode)


class MaskedNet(Net):
    """Its routers have masks by token id. What the id of a token is follows from the token, in every cut."""

    IDS = 5

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        rare_V = torch.arange(self.IDS) < 2
        for seed, block in enumerate(self.blocks):
            visible = block.gate.num_experts - 1 if seed else 3
            block.gate.enable_mask(draw_visible(rare_V, block.gate.num_experts, num_visible=visible, seed=seed))

    @classmethod
    def ids_of(cls, x: Tensor) -> Tensor:
        return (4 * x[..., 0]).long().abs() % cls.IDS

    def forward(self, x_BSD: Tensor, mask_BS: Tensor | None = None, documents_BS: Tensor | None = None) -> Tensor:
        h = self.inp(x_BSD)
        for block in self.blocks:
            said = {"document_ids_BS": documents_BS, "token_ids_BS": self.ids_of(x_BSD)}
            h = h + self._run(functools.partial(block, token_mask_BS=mask_BS, **said), h)
        return h


def _save_matmuls(_context: Any, op: Any, *_args: Any, **_kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if op in MATMULS else CheckpointPolicy.PREFER_RECOMPUTE


def net(seed: int = 0, dtype: torch.dtype = torch.float32, *, by_id: bool = False, **kwargs: Any) -> Any:
    torch.manual_seed(seed)
    return (MaskedNet if by_id else Net)(**kwargs).to(dtype)


def make_step(
    seed: int = 0,
    micro_batches: int = 1,
    sequences: int = 2,
    length: int = 5,
    *,
    masked: bool = False,
    documents: bool = False,
    dtype: torch.dtype = torch.float32,
) -> list[Micro]:
    """A global batch as micro-batches; skewed, so that the load is uneven and f differs between sequences."""
    generator = torch.Generator().manual_seed(100 + seed)
    total = micro_batches * sequences
    centre = 1.5 * torch.randn(total, 1, DIM, generator=generator)
    x = (torch.randn(total, length, DIM, generator=generator) + centre).to(dtype)
    target = torch.randn(total, length, DIM, generator=generator).to(dtype)
    mask = torch.rand(total, length, generator=generator) < 0.7 if masked else None
    ids = None
    if documents:
        ids = torch.randint(0, 2, (total, length), generator=generator).cumsum(1).clamp(max=length - 1)
    return cut([Micro(x, target, mask, ids)], micro_batches)


def cut(step: list[Any], micro_batches: int) -> list[Micro]:
    """The same sequences in the same order, as another number of equal micro-batches."""
    whole = [None if step[0][i] is None else torch.cat([m[i] for m in step]) for i in range(4)]
    parts = [[None] * micro_batches if w is None else list(w.chunk(micro_batches)) for w in whole]
    return [Micro(*fields) for fields in zip(*parts, strict=True)]  # type: ignore[arg-type]


def loss_of(model: Any, micro: Micro) -> Tensor:
    return (model(micro.x_BSD, micro.mask_BS, micro.documents_BS) - micro.target_BSD).square().mean()


def rounding(step: list[Micro], **options: Any) -> float:
    """What another order of sums may change: from the gradients of a model without a balancer in both widths."""
    found = []
    for dtype in (torch.float32, torch.float64):
        model = net(dtype=dtype, **options)
        for m in step:
            loss_of(model, m._replace(x_BSD=m.x_BSD.to(dtype), target_BSD=m.target_BSD.to(dtype))).backward()
        found.append(gradients(model))
    return allowed(*found)


def policy(description: dict) -> AuxLoss | EntropyLoss | ZLoss:
    """equipoise's object for a plain description of the reference."""
    rest = {k: v for k, v in description.items() if k not in ("kind", "n", "scope")}
    if description["kind"] in ("z", "entropy"):
        return {"z": ZLoss, "entropy": EntropyLoss}[description["kind"]](**rest)
    scope = Sequences(description["n"]) if description["scope"] == "sequences" else description["scope"]
    return AuxLoss(scope, **rest)


def aux(scope: str, coef: float = 0.3, **rest: Any) -> dict:
    """A coefficient so large that a wrong balance gradient cannot hide in the language model's."""
    return {"kind": "aux", "scope": scope, "coef": coef, "estimator": "prefix"} | rest


def gradients(model: nn.Module) -> dict[str, Tensor]:
    found = {n: p.grad for n, p in model.named_parameters()}
    return {n.removeprefix("_orig_mod."): g.clone() for n, g in found.items() if g is not None}


def train_step(
    model: Any,
    balancer: Balancer,
    optimizer: torch.optim.Optimizer,
    step: list[Micro],
    *,
    between: Callable[[int], None] | None = None,
    count: bool | None = None,
) -> dict[str, Tensor]:
    """One optimizer step as a user writes it; returns the gradients that the optimizer saw."""
    if balancer.needs_counting if count is None else count:
        with balancer.counting():
            for micro in step:
                model(micro.x_BSD, micro.mask_BS, micro.documents_BS)
    for m, micro in enumerate(step):
        loss = loss_of(model, micro)
        if between is not None:
            between(m)
        (balancer.tap(loss) / len(step)).backward()
    found = gradients(model)
    optimizer.step()
    optimizer.zero_grad()
    return found


def twin(model: Any) -> Any:
    """The same weights without a balancer, run plainly: what the reference trains."""
    other = copy.deepcopy(model)
    other.mode = "plain"
    return other


def new_history() -> History:
    return History()


def assert_close(got: dict[str, Tensor], expected: dict[str, Tensor], relative: float, only: str = "") -> None:
    """Relative to the largest entry of each tensor."""
    assert got.keys() <= expected.keys()
    checked = 0
    for name in got:
        if only in name:
            error = (got[name].double() - expected[name].double()).abs().max().item()
            size = expected[name].double().abs().max().item()
            assert error <= relative * max(size, 1e-30), f"{name}: error {error:.3g} of {size:.3g}"
            checked += 1
    assert checked, "nothing was compared"


def setup(*policies: Any, **options: Any) -> tuple[Any, Balancer, torch.optim.Optimizer]:
    """A one-layer model with its balancer (default: two losses and a bias) and its optimizer."""
    model = net(**(SMALL | options))
    balancer = Balancer(model, list(policies) or [AuxLoss("micro_batch", 0.3), AuxLoss("global_batch", 0.3), BIAS])
    return model, balancer, torch.optim.SGD(model.parameters(), lr=0.05)


def plain_step(step: list[Micro], *policies: Any, **options: Any) -> tuple[dict[str, Tensor], Balancer, Any]:
    """What an undisturbed step of a fresh model gives."""
    model, balancer, optimizer = setup(*policies, **options)
    return train_step(model, balancer, optimizer, step), balancer, model


def same(a: Balancer, b: Balancer) -> None:
    assert [x.tolist() for x in a.load()] == [x.tolist() for x in b.load()]
    assert a.metrics() == pytest.approx(b.metrics(), rel=1e-6)
