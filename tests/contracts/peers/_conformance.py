"""Released peers as adapters of `equipoise.conformance`: what `equipoise conformance FILE:NAME` prints of them.

Megatron-core needs ``PYTHONPATH=build/peers`` (see `test_megatron`), and believes here that a CPU is its device.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any, ClassVar
from unittest import mock

import torch
import torch.distributed as dist

from equipoise.conformance import Adapter, Answer, Task

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # tests, in processes that pytest did not start


class Megatron(Adapter):
    """`TopKRouter` with `aux_loss`, as its schedule and its data parallelism run it."""

    name = "megatron-core 0.16.1, aux_loss"
    kind: ClassVar[str] = "aux_loss"
    masks = True

    def step(self, task: Task) -> Answer:
        from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler

        from contracts.peers import _megatron as peer

        group: Any = dist.group.WORLD if self.kind == "global_aux_loss" else None
        router = peer.router(self.kind, top_k=task.top_k, group=group, **self.settings(task))
        MoEAuxLossAutoScaler.set_loss_scale(torch.tensor(1 / len(task.micro_batches)))
        weight_ED = task.weights_LED[0].float().requires_grad_()

        def forward(hidden_SBD: torch.Tensor, padding_SB: torch.Tensor | None) -> torch.Tensor:
            probs, _ = router.routing(hidden_SBD @ weight_ED.T, padding_SB)
            return probs.square()  # as experts would save something behind the router

        for hidden_BSD, mask_BS in task.micro_batches:
            padding_SB = None if mask_BS is None else ~mask_BS.T
            hidden_SBD = hidden_BSD.float().transpose(0, 1)
            if task.evaluates:
                router.eval()
                with torch.no_grad():
                    forward(hidden_SBD, padding_SB)
                router.train()
            (0 * task.forward(forward, hidden_SBD, padding_SB).sum()).backward()
        gradient_ED = task.average(torch.zeros_like(weight_ED) if weight_ED.grad is None else weight_ED.grad)
        return Answer(gradient_ED[None], *self.bias(router, task))

    def settings(self, task: Task) -> dict[str, Any]:
        return {}

    def bias(self, router: Any, task: Task) -> tuple[Any, Any]:
        return None, None


class MegatronGlobal(Megatron):
    name = "megatron-core 0.16.1, global_aux_loss"
    kind = "global_aux_loss"
    scope = "global_batch"


class MegatronSequence(Megatron):
    name = "megatron-core 0.16.1, seq_aux_loss"
    kind = "seq_aux_loss"
    scope = "sequence"


class MegatronBias(MegatronSequence):
    name = "megatron-core 0.16.1, expert bias and seq_aux_loss"
    gate = "sigmoid"
    bias_rate = 1e-3
    counts = True

    def settings(self, task: Task) -> dict[str, Any]:
        return {"moe_router_score_function": "sigmoid", "moe_router_enable_expert_bias": True}

    def bias(self, router: Any, task: Task) -> tuple[Any, Any]:
        from megatron.core import parallel_state
        from megatron.core.transformer.moe.moe_utils import get_updated_expert_bias

        counts_E = router.local_tokens_per_expert.clone()
        with mock.patch.object(parallel_state, "get_tensor_and_data_parallel_group", return_value=dist.group.WORLD):
            moved_E = get_updated_expert_bias(router.local_tokens_per_expert, router.expert_bias, task.bias_rate)
        return task.add(counts_E)[None], moved_E[None]
