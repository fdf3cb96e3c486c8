"""The balance loss of transformers' Mixtral, OLMoE and Qwen MoE models, as released: `load_balancing_loss_func`."""

from __future__ import annotations

import torch

from .task import Adapter, Answer, Task

__all__ = ["LoadBalancingLoss"]


class LoadBalancingLoss(Adapter):
    """What a step of transformers' models adds: one loss of all layers' logits, averaged over micro-batches."""

    name = "transformers, load_balancing_loss_func"
    masks = layers = True

    def step(self, task: Task) -> Answer:
        from transformers.models.qwen3_moe.modeling_qwen3_moe import load_balancing_loss_func

        weights_LED = task.weights_LED.clone().requires_grad_()
        for hidden_BSD, mask_BS in task.micro_batches:
            tokens_TD = hidden_BSD.flatten(0, 1)
            logits = tuple(task.forward(torch.nn.functional.linear, tokens_TD, weight_ED) for weight_ED in weights_LED)
            loss = load_balancing_loss_func(logits, task.num_experts, task.top_k, mask_BS)
            torch.as_tensor(task.coef * loss / len(task.micro_batches)).backward()
        return Answer(task.average(weights_LED.grad))  # type: ignore[arg-type]
