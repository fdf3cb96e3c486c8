"""What a router under test gets, and what it gives back."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

__all__ = ["SCOPES", "Adapter", "Answer", "MicroBatch", "Task", "lengths"]

SCOPES = ("sequence", "micro_batch", "global_batch")


class MicroBatch(NamedTuple):
    """Hidden states (B, S, D) of a micro-batch, and which positions are tokens, (B, S) bool; None: all are."""

    hidden_BSD: Tensor
    mask_BS: Tensor | None


class Answer(NamedTuple):
    """What one rank has after its optimizer step.

    Args:
        gradient_LED: of the balance loss at the weights of all routers, as the optimizer sees it: averaged over ranks.
        counts_LE: how many choices each expert got in this step, over all ranks; None where it is not known.
        bias_LE: the selection bias after the step; None without one.
    """

    gradient_LED: Tensor
    counts_LE: Tensor | None = None
    bias_LE: Tensor | None = None


@dataclass(frozen=True)
class Task:
    """One optimizer step of one rank.

    Args:
        weights_LED: of the routers of L layers, each a linear map from hidden states to logits without a bias.
        micro_batches: this rank's, in their order.
        top_k: experts for each token.
        coef: of the balance loss, in the convention where perfect balance is worth 1.
        tokens: that are no padding, in the whole step, over all ranks: for those who divide by them.
        bias_rate: by how much a selection bias moves; 0 without one.
        recompute: "", "reentrant" or "non-reentrant": how `forward` runs what it is given.
        evaluates: whether `forward` evaluates before.
    """

    weights_LED: Tensor
    micro_batches: tuple[MicroBatch, ...]
    top_k: int
    coef: float
    tokens: int
    bias_rate: float = 0.0
    recompute: str = ""
    evaluates: bool = False
    rank: int = 0
    world: int = 1
    mean: Callable[[Tensor], None] | None = field(default=None, repr=False)  # over ranks, in place; `average` uses it

    @property
    def num_experts(self) -> int:
        return self.weights_LED.shape[1]

    @property
    def hidden_size(self) -> int:
        return self.weights_LED.shape[2]

    def forward(self, module: Callable[..., Any], *inputs: Any) -> Any:
        """``module(*inputs)``, recomputed in backward or with an evaluation before it where the check is about that.

        A checkpoint takes what returns tensors, or a tuple of them. The inputs have a gradient there, as hidden states
        have inside a model: without one, a reentrant checkpoint gives no gradient to the layer either.
        """
        if self.evaluates:
            with _evaluation(module), torch.no_grad():
                module(*inputs)
        if not self.recompute:
            return module(*inputs)
        inside = [one.detach().requires_grad_() if _is_text(one) else one for one in inputs]
        return checkpoint(module, *inside, use_reentrant=self.recompute == "reentrant")

    def average(self, tensor: Tensor) -> Tensor:
        """The mean over ranks, as data-parallel training makes of every gradient."""
        mean = tensor.detach().double().clone()
        if self.mean is not None:
            self.mean(mean)
        return mean

    def add(self, tensor: Tensor) -> Tensor:
        """The sum over ranks, for counts that each rank keeps of its own tokens."""
        return self.average(tensor) * self.world


class Adapter(ABC):
    """Runs one optimizer step of the router under test; a subclass says what it offers and implements `step`.

    Attributes:
        name: as it is printed.
        scope: over which tokens its loss measures f: "sequence", "micro_batch" or "global_batch".
        gate: "softmax", or "sigmoid" divided by its sum over the experts: what P is a mean of.
        masks: whether it can be told of padding.
        counts: whether it says how many choices each expert got.
        bias_rate: of its selection bias, moved by the sign of the load's error; 0: it has none.
        layers: whether several layers can be given to it at once.
        ranks: the most ranks it can be run on here.

    >>> class Nothing(Adapter):
    ...     def step(self, task):
    ...         return Answer(torch.zeros_like(task.weights_LED))
    >>> Nothing().scope
    'micro_batch'
    """

    name: ClassVar[str] = ""
    scope: ClassVar[str] = "micro_batch"
    gate: ClassVar[str] = "softmax"
    masks: ClassVar[bool] = False
    counts: ClassVar[bool] = False
    bias_rate: ClassVar[float] = 0.0
    layers: ClassVar[bool] = False
    ranks: ClassVar[int] = 8

    @abstractmethod
    def step(self, task: Task) -> Answer:
        """Builds the routers, runs forward and backward of ``task.micro_batches``, and says what came out."""

    @classmethod
    def title(cls) -> str:
        return cls.name or cls.__name__


@contextmanager
def _evaluation(module: Callable[..., Any]) -> Iterator[None]:
    """A function has no mode: it alone knows what it calls."""
    if isinstance(module, torch.nn.Module):
        module.eval()
    yield
    if isinstance(module, torch.nn.Module):
        module.train()


def _is_text(one: Any) -> bool:
    return isinstance(one, Tensor) and one.is_floating_point() and not one.requires_grad


def lengths(micro_batches: Sequence[MicroBatch]) -> list[int]:
    """Tokens that are no padding, in each."""
    return [
        int(mask.sum()) if mask is not None else hidden.shape[0] * hidden.shape[1] for hidden, mask in micro_batches
    ]
