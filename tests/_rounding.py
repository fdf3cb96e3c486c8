"""How far fp32 may be from float64: measured where it is needed, on a model without a balancer, never written down.

The order of a sum depends on the processor (AVX2, AVX-512, AMX) and on its libraries, and how much a model makes of the
last bit depends on the model: a bound that one machine keeps, another breaks. So the model itself is run in both widths
on the machine that runs the test, and what is compared may be ``FACTOR`` times as far off.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

__all__ = ["FACTOR", "OURS", "Float64", "allowed", "distance", "part_distance", "worst"]

# Another order of the same sums (cut, recomputed, compiled, over ranks) is as far off as the plain order, by chance
# more or less: 0.6 to 1.9 times, whatever libraries and instructions were tried.
FACTOR = 6.0
OURS = 1e-9  # in float64, where nothing hides a mistake: measured 3e-15
LARGEST = 1e-4  # a model that rounds more than this shows nothing in fp32: FACTOR times it is near 1e-3


def worst(got: Mapping[str, Tensor], want: Mapping[str, Tensor]) -> tuple[float, str]:
    """The largest error and its tensor: relative to its largest entry, or to a thousandth of the largest of all."""
    largest = max(float(tensor.abs().max()) for tensor in want.values())
    errors = [
        (float((got[name].double() - tensor.double()).abs().max()) / _size(tensor, largest), name)
        for name, tensor in want.items()
    ]
    return max(errors)


def _size(tensor: Tensor, largest: float) -> float:
    return max(float(tensor.abs().max()), 1e-3 * largest, 1e-30)


def distance(got: Mapping[str, Tensor], want: Mapping[str, Tensor]) -> float:
    return worst(got, want)[0]


def allowed(fp32: Mapping[str, Tensor], float64: Mapping[str, Tensor]) -> float:
    """What a run in fp32 may be off, from two runs of the plain model."""
    rounding = distance(fp32, float64)
    assert 0 < rounding < LARGEST, f"the plain model's own rounding is {rounding:.3g}: nothing to compare in fp32"
    return FACTOR * rounding


Gradients = Mapping[str, Tensor]


def part_distance(law: Gradients, bare: Gradients, balanced: Gradients, plain: Gradients, part: str = "") -> float:
    """How far the balance part of a gradient, ``balanced - plain``, is from ``law - bare``, relative to it."""
    names = [name for name in law if part in name]
    assert names and set(names) <= set(balanced)
    wanted = {name: law[name].double() - bare[name].double() for name in names}
    got = {name: balanced[name].double() - plain[name].double() for name in names}
    off = sum(float((got[name] - wanted[name]).square().sum()) for name in names)
    return (off / sum(float(one.square().sum()) for one in wanted.values())) ** 0.5


class Float64(TorchFunctionMode):
    """Everything in float64, also where a model asks for fp32 by name (norms, softmax, rotary tables, losses).

    Such islands make a ``model.double()`` no better than fp32: of gpt_oss its gradient is 1.4e-5 off. Calls that torch
    makes itself while a recomputed or compiled part runs do not pass here.
    """

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        if func is torch.Tensor.float:
            func = torch.Tensor.double
        return func(*map(_wider, args), **{key: _wider(value) for key, value in (kwargs or {}).items()})


def _wider(value: Any) -> Any:
    return torch.float64 if value is torch.float32 else value
