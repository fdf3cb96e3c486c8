"""A tiny model of transformers on ranks that FSDP2 shards it over, or DDP copies it to: what test_sharded.py runs."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from integrations.hf._cases import inputs, loss_of, quiet
from integrations.hf.families import NATIVE, build

__all__ = ["ddp_step", "fsdp_step", "upcycled_step", "whole_step"]

TOKENS, STEPS = 15, 2  # of `inputs`, two halves


def policies(family: str, rate: float) -> list[Any]:
    from equipoise import AuxLoss, ExpertBias

    found: list[Any] = [AuxLoss("sequence", 0.3), AuxLoss("global_batch", 0.3, estimator="exact")]
    return [*found, ExpertBias(rate=rate)] if family in NATIVE else found


def rows(of: range) -> list[dict[str, Tensor]]:
    """For each step some rows of a batch of four, of uneven length."""
    steps = []
    for seed in range(STEPS):
        given = inputs(seed, batch=4)
        steps.append({key: value[of.start : of.stop] for key, value in given.items()})
    return steps


def whole_step(family: str, rate: float = 0.005) -> dict[str, Any]:
    """One process with all rows, the loss a mean over all tokens of all ranks: what ranks have to agree with."""
    from equipoise import Balancer

    with quiet():
        model = build(family)
        balancer = Balancer(model, policies(family, rate))
        return train(model, model, balancer, rows(range(4)), 1)


def fsdp_step(family: str, attach_first: bool, mixed: bool, rate: float = 0.005) -> dict[str, Any]:
    """This rank's two rows under ``fully_shard`` of each decoder layer and the root."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    from equipoise import Balancer

    with quiet():
        model = build(family)
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16) if mixed else MixedPrecisionPolicy()
        balancer = Balancer(model, policies(family, rate)) if attach_first else None
        for layer in model.model.layers:
            fully_shard(layer, mp_policy=policy)
        fully_shard(model, mp_policy=policy)
        balancer = balancer or Balancer(model, policies(family, rate))
        start = 2 * dist.get_rank()
        found = train(model, model, balancer, rows(range(start, start + 2)), dist.get_world_size())
        return found | {"saved": get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))}


def upcycled_step() -> bool:
    """Attaches a bias to two experts that are copies, one on each rank; whether this rank's shards are unchanged."""
    from torch.distributed.fsdp import fully_shard

    from equipoise import Balancer, ExpertBias

    with quiet():
        model = build("qwen3_moe", num_experts=2, num_experts_per_tok=1, norm_topk_prob=False)
        for layer in model.model.layers:
            for parameter in layer.mlp.experts.parameters():
                parameter.data.copy_(parameter.data[:1].expand_as(parameter))
            fully_shard(layer)
        before = {name: value.to_local().clone() for name, value in model.named_parameters() if "layers" in name}
        assert {len(local) for name, local in before.items() if "experts" in name} == {1}
        Balancer(model, [ExpertBias("proportional", rate=1e-3)])
        return all(torch.equal(dict(model.named_parameters())[name].to_local(), x) for name, x in before.items())


def ddp_step(family: str, rate: float = 0.005) -> dict[str, Any]:
    """DDP sends rank 0's buffers to the others before each pass: the biases must be the same everywhere anyway."""
    from equipoise import Balancer

    with quiet():
        model = build(family)
        wrapped = torch.nn.parallel.DistributedDataParallel(model, find_unused_parameters=True)
        balancer = Balancer(wrapped, policies(family, rate))
        start = 2 * dist.get_rank()
        return train(model, wrapped, balancer, rows(range(start, start + 2)), dist.get_world_size())


def train(model: Any, called: Any, balancer: Any, steps: list[dict[str, Tensor]], ranks: int) -> dict[str, Any]:
    """Gradients of the last step, loads and the biases that a checkpoint has."""
    from integrations.hf._law import bias_of

    called.train()
    optimizer = torch.optim.SGD(called.parameters(), lr=0.0)
    loads = []
    for given in steps:
        model.zero_grad()
        tokens = torch.tensor(float(given["attention_mask"].sum()))
        if ranks > 1:
            dist.all_reduce(tokens)
        balancer.begin_step(tokens=float(tokens), micro_batches=1)
        loss = loss_of(called, given)
        balancer.tap(loss).backward()
        optimizer.step()
        loads.append([c.tolist() for c in balancer.load()])
    full = {n: _whole(p.grad) for n, p in model.named_parameters() if p.grad is not None}
    return {"gradients": full, "loads": loads, "biases": {n: _whole(b).clone() for n, b in bias_of(model).items()}}


def _whole(x: Any) -> Tensor:
    return (x.full_tensor() if hasattr(x, "full_tensor") else x).detach().clone()
