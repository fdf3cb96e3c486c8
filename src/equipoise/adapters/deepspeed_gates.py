"""The gates of DeepSpeed's own MoE layers: a carrier in each, between its logits and what it makes of them."""

from __future__ import annotations

import importlib
import types
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..autograd.token_layout import TokenLayout
from ..errors import ConfigError
from ..external.carrier import RouterCarrier
from .plain_state import CHILD

__all__ = ["balance_gate", "gates_of", "let_go"]

GATING = {1: "top1gating", 2: "top2gating"}  # what turns logits into choices, by k; else topkgating


def gates_of(model: nn.Module) -> dict[str, Any]:
    """Every ``MOELayer`` by name. Raises ConfigError for a gate that could not be balanced, or never was here."""
    theirs = importlib.import_module("deepspeed.moe.sharded_moe")
    found = {name: one for name, one in model.named_modules() if isinstance(one, theirs.MOELayer)}
    if not found:
        raise ConfigError(
            expected="a model with deepspeed.moe.layer.MoE in it",
            got=type(model).__name__,
            do="MoE models of transformers: BalanceCallback in its Trainer, or Balancer (docs/deepspeed.md)",
        )
    for name, layer in found.items():
        for got, do in _refused(layer, theirs):
            raise ConfigError(expected="a MoE layer that equipoise was run with", got=f"{name}: {got}", do=do)
    return found


def _refused(layer: Any, theirs: Any) -> Iterator[tuple[str, str]]:
    gate = layer.gate
    if type(gate).forward is not theirs.TopKGate.forward or "forward" in vars(gate):
        own = CHILD in gate._modules
        yield (
            f"a {type(gate).__name__} {'with a carrier already' if own else 'with a forward of its own'}",
            "pass all policies to one DeepSpeedBalancer, or remove() the first"
            if own
            else "put a RouterCarrier into that gate (docs/own-router.md) and make the Balancer yourself",
        )
    if gate.noisy_gate_policy not in (None, "None"):
        yield f"noisy_gate_policy={gate.noisy_gate_policy!r}", "leave it out: no test has run it"
    if gate.drop_tokens:
        yield (
            "drop_tokens=True",
            "set drop_tokens=False: of what is over a capacity nobody is told which expert it was for",
        )
    if layer.use_tutel:
        yield "use_tutel=True", "leave it out: no test has run it"


def balance_gate(layer: Any, *, replaces_loss: bool, sequence_first: bool) -> None:
    """Leads a gate's logits and weights through a carrier. Without a balancer nothing changes."""
    gate = layer.gate
    carrier = RouterCarrier(
        gate,
        num_experts=gate.wg.out_features,
        top_k=gate.k,
        gate="softmax",
        without_bias="balance it with AuxLoss: DeepSpeed's TopKGate chooses by its logits and has no bias",
        sequence_first=sequence_first,
    )
    gate.add_module(CHILD, carrier)
    name, rows, raw = GATING.get(gate.k, "topkgating"), [1], []
    plain = type(gate).forward
    choose = plain.__globals__[name]

    def recorded(logits_TE: Tensor, *args: Any, **named: Any) -> Any:
        raw[:] = [logits_TE]
        seen_TE = carrier.record(logits_TE)
        # top2gating adds its noise to the second choice in place
        return choose(seen_TE.clone() if carrier.balance_state is not None else seen_TE, *args, **named)

    # Their own code, with one name of its module read as ours: the logits are made and used inside it.
    theirs = types.FunctionType(plain.__code__, {**plain.__globals__, name: recorded}, name, plain.__defaults__)

    def forward(hidden_TD: Tensor, used_token: Tensor | None = None, *args: Any, **named: Any) -> Any:
        if used_token is not None:
            raise ConfigError(
                expected="MoE layers that are called with their hidden states alone",
                got="used_token",
                do="leave it out: with two choices and more DeepSpeed routes such tokens all the same",
            )
        loss, capacity, experts, ids_KT, places, weights_KT, counts = theirs(gate, hidden_TD, None, *args, **named)
        (logits_TE,) = raw
        raw.clear()
        weights_KT = carrier.attach(weights_KT, logits_TE, ids_KT.t(), TokenLayout(num_sequences=rows[0]))
        return torch.zeros_like(loss) if replaces_loss else loss, capacity, experts, ids_KT, places, weights_KT, counts

    def note_rows(_layer: nn.Module, given: tuple[Any, ...]) -> None:
        shape = given[0].shape
        rows[0] = shape[1 if sequence_first else 0] if len(shape) > 2 else 1

    gate.forward = forward
    layer._equipoise_hook = layer.register_forward_pre_hook(note_rows)


def let_go(layers: dict[str, Any]) -> None:
    """Undoes `balance_gate`."""
    for layer in layers.values():
        if "_equipoise_hook" in vars(layer):
            vars(layer).pop("_equipoise_hook").remove()
        layer.gate.__dict__.pop("forward", None)
        layer.gate._modules.pop(CHILD, None)
