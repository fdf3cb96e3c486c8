"""Lightning: a callback that balances the MoE model of a ``LightningModule``, all there is to add to a ``Trainer``.

Lightning divides each loss by ``accumulate_grad_batches`` after ``training_step`` and DDP averages over ranks, so the
loss is tapped where ``training_step`` returns it. The tokens of a step are counted before it begins: its micro-batches
are fetched a little earlier than Lightning would.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..autograd.protocol import is_balanced_router
from ..balancer.balancer import Balancer
from ..distributed import Ranks
from ..errors import ConfigError, DataError
from ..external.padding import router_tokens
from ..policies.from_data import OnePolicy, policies_from

if TYPE_CHECKING:
    from lightning.pytorch import Callback
else:  # one library under two names; a Trainer of either takes any object with these hooks
    NAMES = ("lightning.pytorch", "pytorch_lightning")
    FOUND = [name for name in NAMES if name in sys.modules]
    FOUND += [name for name in NAMES if importlib.util.find_spec(name.partition(".")[0])]
    Callback = importlib.import_module((FOUND or NAMES)[0]).Callback

__all__ = ["BalanceCallback"]


class BalanceCallback(Callback):
    """``Trainer(callbacks=[BalanceCallback([AuxLoss("global_batch", coef=1e-2)])])``.

    Args:
        policies: see ``Balancer``.
        ranks: which ranks see different tokens; default: all.
        module: name of the part of the LightningModule that is balanced; default: the model of transformers in it, else
            the whole of it, which has to hold layers of ours.
        tokens: router tokens of a batch, where batches are no dictionaries with ``input_ids`` and ``attention_mask``.
            Without either every micro-batch weighs the same, which is exact where all have equally many tokens.
        options: further keywords of ``Balancer``.

    The balancer lives from the beginning of ``fit`` to its end. Its metrics are logged by the LightningModule
    (``balance/...``, every ``log_every_n_steps``, so that other callbacks can monitor them), its state is in the
    Trainer's checkpoints. With ``automatic_optimization = False`` the loop is yours: ``callback.balancer.tap(loss)``
    before you scale the loss and call ``manual_backward``; an optimizer step without it is an error.

    Raises DataError where ``fit`` resumes from a checkpoint that was saved without this callback.

    >>> from equipoise import AuxLoss
    >>> BalanceCallback([AuxLoss("global_batch", coef=1e-2)]).balancer is None  # until training begins
    True
    """

    def __init__(
        self,
        policies: OnePolicy | Sequence[OnePolicy],
        *,
        ranks: Ranks | None = None,
        module: str | None = None,
        tokens: Callable[[Any], Tensor | int | None] | None = None,
        **options: Any,
    ) -> None:
        self.policies, self.ranks, self.options = policies_from(policies), ranks, options
        self.module, self.tokens = module, tokens or router_tokens
        self.balancer: Balancer | None = None
        self._ranks = Ranks()
        self._strategy: Any = None
        self._declared: tuple[float, int] | None = None
        self._state: dict[str, Any] = {}
        self._logged = 0  # steps

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """By now the model is on its device and inside its wrapper, and a checkpoint has been read."""
        resumes = trainer.global_step > 0
        if resumes and not self._state:
            raise DataError(
                expected="the balancer's state in the checkpoint",
                got=f"none after step {trainer.global_step}",
                do="resume from a checkpoint that was saved with BalanceCallback, or begin anew",
            )
        self._ranks = self.ranks or Ranks.default()
        self.balancer = Balancer(_balanced(pl_module, self.module), self.policies, ranks=self._ranks, **self.options)
        if resumes:
            self.balancer.load_state_dict(self._state)
        self._logged = self.balancer.step_count
        self._strategy, theirs = trainer.strategy, trainer.strategy.training_step
        if pl_module.automatic_optimization:  # an attribute hides the method of this one strategy until training ends
            self._strategy.training_step = lambda *args, **kwargs: self._tapped(theirs(*args, **kwargs))

    def _tapped(self, output: Any) -> Any:
        assert self.balancer is not None
        if isinstance(output, Mapping):
            return {**output, "loss": self.balancer.tap(output["loss"])} if "loss" in output else output
        return self.balancer.tap(output) if isinstance(output, Tensor) else output

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """The first micro-batch of a step: how many tokens the whole step has, on all ranks."""
        if not pl_module.automatic_optimization or batch_idx % trainer.accumulate_grad_batches:
            return
        following = _ahead(trainer, trainer.accumulate_grad_batches - 1)
        counts = [None] if following is None else [self.tokens(one) for one in (batch, *following)]
        on = {"dtype": torch.float64, "device": pl_module.device}
        known = [torch.as_tensor(count, **on) for count in counts if count is not None]
        if len(known) == len(counts):
            total = torch.stack(known).sum(dim=0, keepdim=True)
            self._declared = float(self._ranks.data.sum(total)), len(known)  # waits for the device once a step

    def on_before_backward(self, trainer: Any, pl_module: Any, loss: Tensor) -> None:  # noqa: ARG002
        """Lightning drops the gradients of the step before only now; had GradScaler skipped it, they tell of it."""
        if self._declared is not None and self.balancer is not None:
            (tokens, micro_batches), self._declared = self._declared, None
            self.balancer.begin_step(tokens=tokens, micro_batches=micro_batches)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:  # noqa: ARG002
        assert self.balancer is not None
        step = self.balancer.step_count
        if step > self._logged and step % trainer.log_every_n_steps == 0 and not trainer.barebones:
            pl_module.log_dict(self.balancer.metrics(), on_step=True, on_epoch=False)
        self._logged = step

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:  # noqa: ARG002
        """The model keeps its biases and is balanced by nobody; ``balancer`` still tells of the last step."""
        self._release()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:  # noqa: ARG002
        self._release()

    def _release(self) -> None:
        if self._strategy is not None and self.balancer is not None:
            vars(self._strategy).pop("training_step", None)
            self.balancer.remove()
            self._strategy, self._state = None, self.balancer.state_dict()

    def state_dict(self) -> dict[str, Any]:
        return self._state if self.balancer is None else self.balancer.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Lightning reads checkpoints before training begins."""
        self._state = state_dict


def _balanced(pl_module: nn.Module, name: str | None) -> nn.Module:
    """What the balancer takes: the named part, layers of ours, or the one model of transformers that is trained."""
    if name is not None:
        return pl_module.get_submodule(name)
    found: dict[str, nn.Module] = {}
    for at, module in pl_module.named_modules():
        if is_balanced_router(module):
            return pl_module
        inside = any(at.startswith(f"{outer}.") for outer in found)
        known = isinstance(getattr(module, "dummy_inputs", None), Mapping)
        if known and not inside and any(p.requires_grad for p in module.parameters()):
            found[at] = module
    if len(found) > 1:
        raise ConfigError(
            expected="one model of transformers to balance",
            got=f"{', '.join(found)} in {type(pl_module).__name__}",
            do=f"name it: BalanceCallback(..., module={next(iter(found))!r})",
        )
    return next(iter(found.values()), pl_module)


class _Peeked:
    """An iterator that knows what comes next."""

    def __init__(self, inner: Iterator) -> None:
        self.inner, self.waiting = inner, []

    def __iter__(self) -> _Peeked:
        return self

    def __next__(self) -> Any:
        return self.waiting.pop(0) if self.waiting else next(self.inner)

    def peek(self, number: int) -> list[Any]:
        """The next ``number`` items, or as many as there are."""
        while len(self.waiting) < number:
            try:
                self.waiting.append(next(self.inner))
            except StopIteration:
                break
        return self.waiting[: max(0, number)]


def _ahead(trainer: Any, number: int) -> list[Any] | None:
    """The batches that Lightning will fetch next, fewer at an epoch's end; None where the module fetches by itself.

    Lightning has no public way to look ahead. Between steps nothing is held back, so that a loader's state fits.
    """
    fetcher: Any = getattr(trainer.fit_loop, "_data_fetcher", None)
    if number == 0 or getattr(fetcher, "done", False):
        return []
    if getattr(fetcher, "iterator", None) is None or hasattr(fetcher, "iterator_wrapper"):
        return None
    number = min(number, trainer.num_training_batches - trainer.fit_loop.epoch_loop.batch_progress.current.ready)
    if not isinstance(fetcher.iterator, _Peeked):
        fetcher.iterator = _Peeked(fetcher.iterator)
    held = list(getattr(fetcher, "batches", ()))  # of a loader without length Lightning itself fetches one ahead
    return [item[0] for item in (*held, *fetcher.iterator.peek(number - len(held)))][:number]
