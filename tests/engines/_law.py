"""The balance losses of one training step in float64, from the logits of its micro-batches; imports nothing of ours."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

COEF = 0.5  # of the global loss: its gradient stands above the rounding of the language model's


class Law:
    """coef * E * <f, sum of p_t> / T for each layer and policy, f held constant.

    Args:
        policies: tables with ``scope`` and ``coef``; the global one is pushed by what came so far in the step, as
            every estimator but "exact" is in the first step of a run.
        precision: of the probabilities; in the model's own this is how far plain autograd is off.
    """

    def __init__(
        self, policies: list[dict], experts: int, top_k: int, gate: str, precision: torch.dtype = torch.float64
    ) -> None:
        self.policies, self.experts, self.top_k, self.gate = policies, experts, top_k, gate
        self.precision = precision
        self.come_LE = torch.tensor(0.0)

    def chosen(self, logits: list[Tensor]) -> tuple[list[Tensor], Tensor]:
        """Ids (B, S, K) and counts (E,) of each layer."""
        ids = [z.detach().topk(self.top_k, dim=-1).indices for z in logits]
        return ids, torch.stack([self._counts(one.flatten(0, 1)) for one in ids])

    def loss(self, logits: list[Tensor], positions_BS: Tensor, tokens: int, everywhere: Tensor | None = None) -> Tensor:
        """Of one micro-batch; ``logits`` (B, S, E) a layer, ``tokens`` of the whole step.

        ``everywhere``: counts of all ranks, from a process that plays all of them and moves ``come_LE`` itself.
        """
        ids, here = self.chosen(logits)
        if everywhere is None:
            everywhere = here.clone()
            if dist.is_initialized() and dist.get_world_size() > 1:
                dist.all_reduce(everywhere)
            self.come_LE = self.come_LE + everywhere
        total = torch.zeros((), dtype=torch.float64)
        for layer, z in enumerate(logits):
            p = self._probs(z)
            for policy in self.policies:
                f = self._fractions(policy["scope"], layer, ids[layer], here, everywhere, positions_BS)
                total = total + float(policy["coef"]) * self.experts * (f.to(p.dtype) * p).sum() / tokens
        return total

    def _fractions(
        self, scope: str, layer: int, ids_BSK: Tensor, here: Tensor, everywhere: Tensor, positions_BS: Tensor
    ) -> Tensor:
        """f of every token, broadcastable to (B, S, E)."""
        match scope:
            case "global_batch":
                return self.come_LE[layer] / self.come_LE[layer].sum()
            case "data_parallel":
                return everywhere[layer] / everywhere[layer].sum()
            case "micro_batch":
                return here[layer] / here[layer].sum()
            case "sequence":
                groups = torch.arange(len(ids_BSK)).unsqueeze(1).expand(ids_BSK.shape[:2])
            case "document":
                begins = positions_BS == 0
                groups = begins.flatten().cumsum(0).view_as(begins)
            case _:
                number = int(scope.removeprefix("sequences:"))
                groups = (torch.arange(len(ids_BSK)) // number).unsqueeze(1).expand(ids_BSK.shape[:2])
        f = torch.zeros(*ids_BSK.shape[:2], self.experts, dtype=torch.float64)
        for group in groups.unique():
            counts_E = self._counts(ids_BSK[groups == group])
            f[groups == group] = counts_E / counts_E.sum()
        return f

    def _counts(self, ids_TK: Tensor) -> Tensor:
        return torch.bincount(ids_TK.flatten(), minlength=self.experts).double()

    def _probs(self, z: Tensor) -> Tensor:
        if self.gate == "softmax":
            return z.to(self.precision).softmax(-1)
        p = z.to(self.precision).sigmoid()
        return p / p.sum(-1, keepdim=True)
