"""What routers see while a model is evaluated: counted beside the step, summed once at the end."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from ..autograd.router_state import gathered
from ..errors import StateError
from .faults import not_finite
from .layer_group import Bank
from .metrics import Committed, metrics
from .reconcile import sums_size
from .reduction import Ledger

__all__ = ["evaluating"]

OF_WHOLE_SEQUENCES = ("sequences", "maxvio_sequence", "micro_batches", "maxvio_micro_batch")


@contextmanager
def evaluating(banks: Sequence[Bank], ledger: Ledger, device: torch.device) -> Iterator[dict[str, float]]:
    """Yields a dict that holds numbers once the context is left; see ``Balancer.evaluation``."""
    found: dict[str, float] = {}
    meters = [(meter, bank.plan.to_look) for bank in banks for meter in bank.meters]
    with torch.inference_mode(False):  # added to in whatever mode the caller's loop has
        for meter, plan in meters:
            meter.evaluation = torch.zeros(plan.forward_size, dtype=torch.float64, device=meter.leaf.device)
    try:
        with torch.no_grad():
            yield found
            found |= _numbers(ledger, device)
    finally:
        for meter, _ in meters:
            meter.evaluation = None


def _numbers(ledger: Ledger, device: torch.device) -> dict[str, float]:
    """Of all layers and ranks. Raises StateError where nobody saw anything, InputError for NaN logits."""
    *sums, _ = ledger.start(torch.zeros(0, dtype=torch.float64, device=device), _sums)()
    committed = []
    for sheet, summed in zip(ledger.sheets, sums, strict=True):
        plan = sheet.plan.to_look
        biases = [(rows, bank.biases()) for bank, rows in sheet.own]
        committed.append(Committed(plan, sheet.places, summed[:, : sums_size(plan)], biases))
    if not any(bool(one.of("calls").any()) for one in committed):
        raise StateError(
            expected="forwards of the model in evaluation mode inside balancer.evaluation()",
            got="none in which a router ran, on any rank",
            do="call model.eval() first, and run the model inside the context",
        )
    bad = [
        sheet.names[row]
        for sheet, one in zip(ledger.sheets, committed, strict=True)
        for row in one.probs.sum(dim=1).isnan().nonzero().view(-1).tolist()
    ]
    if bad:
        raise not_finite(f"NaN or infinity in {', '.join(map(repr, bad[:3]))}, in an evaluation")
    return metrics(committed, [], 0)


def _sums(bank: Bank) -> Tensor:
    """(L, sums_size): what the routers of a bank saw; of sequences that are cut over ranks their parts tell nothing."""
    plan = bank.plan.to_look
    seen_LS = gathered([meter.evaluation for meter in bank.meters if meter.evaluation is not None], bank.device)
    if bank.plan.shards > 1:
        for name in OF_WHOLE_SEQUENCES:
            seen_LS[:, plan.at(name)] = 0.0
    return torch.nn.functional.pad(seen_LS, (0, sums_size(bank.plan) - plan.forward_size))
