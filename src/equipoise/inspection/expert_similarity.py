"""Similarity of the experts of a layer by their weights."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..functional.specialization import similarity

__all__ = ["weight_similarity"]

SAMPLE = 1 << 16  # elements compared of each matrix; the standard error of the cosine is about 1 / 256
UP = 2  # levels above the router in which its experts are looked for


@torch.no_grad()
def weight_similarity(model: nn.Module, router: str, num_experts: int) -> Tensor | None:
    """Cosines between the weights of a layer's experts, (E, E) float64; None where the experts are not found, or are of
    unlike widths.

    Experts are looked for in the module that contains the router: one tensor (E, ..., ...) for all, or a list of E
    modules. Large matrices are compared on a sample of 65,536 elements, the same ones for every expert.
    """
    modules = dict(model.named_modules())
    if getattr(modules[router], "expert_widths", None) is not None:
        return None
    place = router
    for _ in range(UP):
        place = place.rpartition(".")[0]
        if stacks := _stacks(modules[place], modules[router], num_experts):
            gram_EE = torch.zeros(num_experts, num_experts, dtype=torch.float64)
            for stack in stacks:
                gram_EE += _gram(stack).cpu()
            return similarity(gram_EE)
    return None


def _stacks(block: nn.Module, router: nn.Module, num_experts: int) -> list[list[Tensor] | Tensor]:
    """For each matrix of an expert, those of all experts: a tensor (E, ...), or a list of E."""
    own = {id(p) for p in router.parameters()}
    whole = [p for p in block.parameters() if p.dim() >= 3 and len(p) == num_experts and id(p) not in own]
    for child in block.modules():
        if type(child).__name__ == "DbrxExpertGLU":  # its matrices are those of all experts, concatenated
            whole += [p.view(num_experts, -1, p.shape[-1]) for p in child.parameters()]
    if whole:
        return [p for p in whole if p.is_floating_point()]
    for child in block.modules():
        if isinstance(child, nn.ModuleList) and len(child) == num_experts:
            columns = [dict(expert.named_parameters()) for expert in child]
            names = [n for n, p in columns[0].items() if p.dim() >= 2 and p.is_floating_point()]
            if all(
                {n: c[n].shape for n in names if n in c} == {n: columns[0][n].shape for n in names} for c in columns
            ):
                return [[column[name] for column in columns] for name in names]
    return []


def _gram(stack: list[Tensor] | Tensor) -> Tensor:
    """Inner products between the experts' numbers, scaled up from the sample."""
    size = stack[0].numel()
    if size > SAMPLE:
        places = torch.randint(size, (SAMPLE,), generator=torch.Generator().manual_seed(0)).to(stack[0].device)
        rows = torch.stack([one.reshape(-1)[places] for one in stack])
    else:
        rows = torch.stack([one.reshape(-1) for one in stack])
    rows = rows.float()
    return (rows @ rows.T).double() * (size / rows.shape[1])
