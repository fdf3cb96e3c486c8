"""A second opinion on balancing a transformers model: hooks on a twin, naive loops over tokens in float64, autograd.

Nothing here imports equipoise. The choices are those that reach the experts; logits are read where the common
protocol of routers has them, and the gate of each family is written down by hand.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["Twin", "bias_of", "gate_of", "law", "naive_bias_step"]

# fmt: off
SIGMOID = frozenset([
    "afmoe", "axk1", "axk2", "bailing_hybrid", "beam", "deepseek_v3", "deepseek_v32", "dots1", "dots3_note",
    "exaone_moe", "flint", "glm4_moe", "glm4_moe_lite", "glm4v_moe", "glm5_next", "glm_moe_dsa", "hy_v3", "hy_v4",
    "inkling", "inkling2", "kimi_linear", "kolibri1", "laguna", "lfm2_moe", "llama4", "mimo_v2_flash", "minimax_m2",
    "minimax_m3_vl", "muse_spark", "nemotron_h", "solar_open", "step3p7",
])
# fmt: on
ROUTER = re.compile(r"((?<!Hash)Router|MoEV1Gate)$")  # hash routers follow token ids
IDLE = {"longcat_flash": 2, "zaya": 1}  # the last choices do no work


def gate_of(family: str) -> str:
    return "sqrt_softplus" if family == "deepseek_v4" else "sigmoid" if family in SIGMOID else "softmax"


@dataclass
class Twin:
    """What the routers of a model returned and its experts were given, call by call; logits keep their graph."""

    model: nn.Module
    family: str
    logits: dict[str, Tensor] = field(default_factory=dict)
    ids: dict[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, module in self.model.named_modules():
            if ROUTER.search(type(module).__name__):
                module.register_forward_hook(self._logits(name))
                block = self.model.get_submodule(name.rpartition(".")[0])
                if self.family not in ("llama4", "zaya"):
                    block.experts.register_forward_pre_hook(self._ids(name), with_kwargs=True)  # type: ignore[union-attr]

    def _logits(self, name: str) -> Any:
        def note(_module: nn.Module, _args: tuple, output: tuple) -> None:
            place = 1 if self.family == "llama4" else 0
            if self.family.startswith("granitemoe") and not output[0].is_floating_point():  # ids first, until 5.20
                place = 2
            self.logits[name] = output[place]
            if self.family in ("gemma4", "diffusion_gemma"):
                self.logits[name] = output[0].log()
            if self.family == "zaya":  # its experts are told 0 where a token skips them
                scores_TE = output[0].detach().softmax(dim=1) + _module.balancing_biases
                self.ids[name] = scores_TE.topk(output[2].shape[1]).indices
            if self.family == "llama4":  # every expert gets every token, times a score that is 0 where not chosen
                self.ids[name] = torch.stack([row.nonzero().view(-1) for row in output[0].detach()])

        return note

    def _ids(self, name: str) -> Any:
        def note(_module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            (ids_TK,) = [x for x in (*args, *kwargs.values()) if isinstance(x, Tensor) and x.dtype == torch.int64]
            self.ids[name] = ids_TK

        return note

    def counts(self, mask_T: list[bool]) -> dict[str, list[int]]:
        """Tokens of each expert, padding left out."""
        out = {}
        for name, ids_TK in self.ids.items():
            total = [0] * self.working(name)
            for t, row in enumerate(ids_TK.tolist()):
                if mask_T[t]:
                    for e in row:
                        if e < len(total):
                            total[e] += 1
            out[name] = total
        return out

    def working(self, name: str) -> int:
        """How many of a router's choices are experts that work."""
        return self.logits[name].shape[1] - IDLE.get(self.family, 0)


def probs(logits_TE: Tensor, gate: str) -> Tensor:
    z = logits_TE.double()
    if gate == "softmax":
        return z.softmax(dim=1)
    s = z.sigmoid() if gate == "sigmoid" else torch.nn.functional.softplus(z).sqrt()
    return s / s.sum(dim=1, keepdim=True)


def law(
    twin: Twin,
    group_T: list[int],
    mask_T: list[bool],
    coef: float,
    previous: dict[str, list[int]] | None = None,
) -> Tensor:
    """coef * sum over layers of the mean over tokens of E <f, p>, with f of the token's group, or of ``previous``."""
    total = torch.zeros((), dtype=torch.float64)
    for name, logits_TE in twin.logits.items():
        size = twin.working(name)
        p_TE = probs(logits_TE[:, :size], gate_of(twin.family))
        loads: dict[int, list[int]] = {}
        for t, row in enumerate(twin.ids[name].tolist()):
            load = loads.setdefault(group_T[t], [0] * size)
            if mask_T[t]:
                for e in row:
                    if e < size:
                        load[e] += 1
        layer = torch.zeros((), dtype=torch.float64)
        for t in range(len(p_TE)):
            if mask_T[t]:
                load = loads[group_T[t]] if previous is None else previous[name]
                f = torch.tensor([c / max(1, sum(load)) for c in load], dtype=torch.float64)
                layer = layer + size * (f * p_TE[t]).sum()
        total = total + layer / sum(mask_T)
    return coef * total


def bias_of(model: nn.Module) -> dict[str, Tensor]:
    """The correction biases of a model by the name its checkpoint has for them, as (E,)."""
    names = re.compile(r"(e_score_correction_bias|expert_bias|balancing_biases)$")
    return {name: value.view(-1) for name, value in model.state_dict().items() if names.search(name)}


def naive_bias_step(bias: list[float], counts: list[int], rate: float) -> list[float]:
    """The sign rule of loss-free balancing, centred."""
    mean = sum(counts) / len(counts)
    moved = [b + rate * ((c < mean) - (c > mean)) for b, c in zip(bias, counts, strict=True)]
    middle = sum(moved) / len(moved)
    return [b - middle for b in moved]
