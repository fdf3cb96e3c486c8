"""What runs in each rank for test_replay_ranks.py."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from contracts.law._model import loss_of, make_step, net
from equipoise import AuxLoss, Balancer, ExpertBias, record_routing, replay_routing


def one_rank_replays(replaying: int) -> dict[str, Any]:
    """One rank replays one of its two micro-batches, the others nothing; then all take a step without a replay."""
    model, other = net(gate="sigmoid"), net(seed=1, gate="sigmoid")
    balancer = Balancer(model, [AuxLoss("global_batch", 0.3), ExpertBias(rate=0.01)])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    step = make_step(dist.get_rank(), micro_batches=2, masked=True)
    gaps = []
    for replays in (True, False):
        for m, micro in enumerate(step):
            if replays and m == 1 and dist.get_rank() == replaying:
                with record_routing(other) as record, torch.no_grad():
                    loss_of(other, micro)
                seen: list[torch.Tensor] = []

                def see(_router: Any, _args: Any, routing: Any, seen: list[torch.Tensor] = seen) -> None:
                    seen.append(routing.logits_TE)

                hooks = [router.register_forward_hook(see) for router in balancer.routers.values()]
                with replay_routing(model, record):
                    (balancer.tap(loss_of(model, micro)) / 2).backward()
                for hook in hooks:
                    hook.remove()
                mask_T = micro.mask_BS.flatten().tolist()
                for logits_TE, (ids_TK,) in zip(seen, record.ids.values(), strict=True):
                    pairs = zip(mask_T, ids_TK.tolist(), logits_TE.topk(2).indices.tolist(), strict=True)
                    rows = [(ids, own) for valid, ids, own in pairs if valid]
                    gaps.append((sum(e not in own for ids, own in rows for e in ids), 2 * len(rows)))
            else:
                (balancer.tap(loss_of(model, micro)) / 2).backward()
        optimizer.step()
        optimizer.zero_grad()
        if replays:
            first = [router.expert_bias.tolist() for router in balancer.routers.values()]
            metrics = balancer.metrics()
    second = [router.expert_bias.tolist() for router in balancer.routers.values()]
    return {"metrics": metrics, "gaps": gaps, "replayed": first, "plain": second, "last": balancer.metrics()}
