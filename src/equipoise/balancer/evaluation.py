"""What routers see while a model is evaluated: counted beside the step, summed once at the end."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from ..autograd.router_state import stack_on
from ..errors import StateError
from ..policies.schedule import Schedule
from .faults import not_finite
from .layer_group import LayerGroup
from .metrics import StepStats, metrics
from .reduction import StepReduction

__all__ = ["evaluating"]

OF_WHOLE_SEQUENCES = ("nonempty_sequences", "maxvio_sequence", "nonempty_micro_batches", "maxvio_micro_batch")


@contextmanager
def evaluating(
    groups: Sequence[LayerGroup], reduction: StepReduction, device: torch.device
) -> Iterator[dict[str, float]]:
    """Yields a dict that holds numbers once the context is left; see ``Balancer.evaluation``."""
    found: dict[str, float] = {}
    states = [(state, group.spec.observing) for group in groups for state in group.states]
    with torch.inference_mode(False):  # added to in whatever mode the caller's loop has
        for state, spec in states:
            state.evaluation = torch.zeros(spec.forward_size, dtype=torch.float64, device=state.grad_accumulator.device)
    try:
        with torch.no_grad():
            yield found
            found |= _numbers(reduction, device)
    finally:
        for state, _ in states:
            state.evaluation = None


def _numbers(reduction: StepReduction, device: torch.device) -> dict[str, float]:
    """Of all layers and ranks. Raises StateError where nobody saw anything, InputError for NaN logits."""
    *sums, _ = reduction.start(torch.zeros(0, dtype=torch.float64, device=device), _sums)()
    committed = []
    for table, summed in zip(reduction.tables, sums, strict=True):
        spec = table.spec.observing
        own = [(rows, group.biases(), None, {}) for group, rows in table.own]
        committed.append(StepStats(spec, table.places, summed[:, : spec.step_size], own))
    if not any(bool(one.of("calls").any()) for one in committed):
        raise StateError(
            expected="forwards of the model in evaluation mode inside balancer.evaluation()",
            got="none in which a router ran, on any rank",
            do="call model.eval() first, and run the model inside the context",
        )
    bad = [
        table.names[row]
        for table, one in zip(reduction.tables, committed, strict=True)
        for row in one.probs.sum(dim=1).isnan().nonzero().view(-1).tolist()
    ]
    if bad:
        raise not_finite(f"NaN or infinity in {', '.join(map(repr, bad[:3]))}, in an evaluation")
    return metrics(committed, Schedule([]), 0)


def _sums(group: LayerGroup) -> Tensor:
    """(L, step_size): what a group's routers saw; parts of sequences that are cut over ranks tell nothing."""
    spec = group.spec.observing
    seen_LS = stack_on(
        [state.evaluation for state in group.states if state.evaluation is not None],
        group.device,
    )
    if group.spec.shards > 1:
        for name in OF_WHOLE_SEQUENCES:
            spec.scalar(seen_LS, name).zero_()
    return torch.nn.functional.pad(seen_LS, (0, group.spec.step_size - spec.forward_size))
