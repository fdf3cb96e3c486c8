"""torchtitan: ``balanced(config, [...])`` around a configuration of its, whose Trainer then balances what it trains."""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

from torch import Tensor

from ..balancer.balancer import Balancer
from ..distributed import Group, Ranks
from ..errors import ConfigError, DataError
from ..policies import Policy
from ..policies.from_data import OnePolicy, as_list, policies_from
from ..policies.schedule import Schedule
from ..storage.balancer_file import pack_state, unpack_state
from .asked import NO_END
from .engine import Engine
from .logs import worth_logging
from .plain_state import load_plain_state, plain_state
from .torchtitan_limits import check_limits, check_policies, own_balancing_off, warn_of_untried
from .torchtitan_routers import BIAS, hook_routers, moe_layers

__all__ = ["BalancedTrainer", "Settings", "balanced"]

TORCHTITAN = Engine("torchtitan", "torchtitan", "0.3.0")
MEASURE_ONLY = 'balanced(config, []) measures and changes nothing; balanced(config, ["global"]) balances'
KEY = "equipoise"  # among the states of a checkpoint
SHOWN = {"maxvio": "maxvio_global", "worst layer": "maxvio_global_worst", "dead experts": "dead_experts"}

Trainer: Any = object
FOUND = importlib.util.find_spec("torchtitan") is not None
if FOUND:
    Trainer = importlib.import_module("torchtitan.trainer").Trainer
    NO_FLAG = importlib.import_module("tyro").conf.Suppress  # policies stand in Python


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What a balanced configuration holds beside torchtitan's own: see ``balanced``.

    Raises ConfigError.

    >>> Settings.read("global", layers=False, strict=True, on_fault="raise").policies_of(steps=10)[0].scope
    'global_batch'
    """

    policies: tuple[Any, ...]
    layers: bool
    strict: bool
    on_fault: str

    @classmethod
    def read(cls, policies: Any, **rest: Any) -> Settings:
        """Raises ConfigError, also without policies: what nobody asked for is not done in silence."""
        if policies is None:
            raise ConfigError(expected="policies of the balance", got="none", do=MEASURE_ONLY)
        settings = cls(policies=tuple(as_list(policies)), **rest)
        settings.policies_of(NO_END)
        return settings

    def policies_of(self, steps: int) -> list[Policy]:
        """Of a run of so many steps: names and tables as ``policies_from`` reads them, policies as they are."""
        return policies_from(self.policies, steps=steps)

    def to_dict(self) -> dict[str, Any]:
        """For torchtitan's record of a configuration."""
        return dataclasses.asdict(self) | {"policies": [str(one) for one in self.policies]}


class BalancedTrainer(Trainer):
    """torchtitan's Trainer with a Balancer at work: ``balancer``, and what it found in ``describe()``.

    Built by a configuration that ``balanced`` made. The tokens of a step are known: every token of its
    ``global_batch_size`` sequences reaches every router. Metrics go where torchtitan's own go, the balancer's state
    into its checkpoints, under ``equipoise``.

    Raises ConfigError for a configuration that was never tried and would fail in silence, for a router that is not
    torchtitan's own, and where a bias that a checkpoint brought would stand still while the routers learn.
    """

    if FOUND:

        @dataclass(kw_only=True, slots=True)
        class Config(Trainer.Config):
            equipoise: Annotated[Settings | None, NO_FLAG] = None

    def __init__(self, config: Any) -> None:
        TORCHTITAN.require()
        self.settings: Settings = config.equipoise
        self._policies = self.settings.policies_of(config.training.steps)
        check_limits(config)
        self._own = own_balancing_off(config, self._policies)
        super().__init__(config)
        warn_of_untried(config, self.parallel_dims.world_size)
        check_policies(self._policies, self.gradient_accumulation_steps)
        schedule = Schedule(self._policies)
        inside = any(loss.scope == "document" for _, loss in schedule.losses)
        hook_routers(self.model_parts, takes_bias=bool(schedule.biases), documents=inside)
        self.balancer = Balancer(
            self.model_parts,
            self._policies,
            self.optimizers,
            ranks=Ranks(Group.world()),  # of the axes that are not refused, all see other sequences
            reduction="sum",  # each rank's loss is a sum over the tokens of all
            on_fault=self.settings.on_fault,
        )
        self._moves_bias = bool(schedule.biases)
        self._sequences = config.training.local_batch_size * self._ranks * self.gradient_accumulation_steps
        self._untapped, self.loss_fn = self.loss_fn, self._tapped
        self._log, self.metrics_processor.log = self.metrics_processor.log, self._logged
        if self._policies and config.checkpoint.enable:
            self.checkpointer.states[KEY] = _SavedState(self.balancer, strict=self.settings.strict)
        self._began = False

    @property
    def _ranks(self) -> int:
        return self.parallel_dims.get_mesh("batch").size() if self.parallel_dims.dp_enabled else 1

    def train_step(self, data_iterator: Iterator[Any]) -> None:
        """One optimizer step of torchtitan's, its tokens declared before it."""
        self.balancer.begin_step(tokens=self._sequences * self.config.training.seq_len)
        if not self._began:
            self._began = True
            self._check_bias()
            if Group.world().rank == 0:
                _logger().info("equipoise in torchtitan:\n%s", self.describe())
        super().train_step(data_iterator)

    def _tapped(self, *args: Any, **named: Any) -> tuple[Tensor, dict[str, Tensor]]:
        loss, metrics = self._untapped(*args, **named)
        return self.balancer.tap(loss), metrics

    def _logged(self, step: int, *args: Any, extra_metrics: Mapping[str, Any] | None = None, **named: Any) -> None:
        ours = worth_logging(self.balancer.metrics(), layers=self.settings.layers)
        self._log(step, *args, extra_metrics={**(extra_metrics or {}), **ours}, **named)
        shown = {word: ours[key] for word, name in SHOWN.items() if (key := f"balance/{name}") in ours}
        pushes = {name: x for name, x in ours.items() if name.endswith(("/loss", "/gradient_ratio"))}
        shown |= {name.partition("/")[2]: x for name, x in pushes.items() if "/layer_" not in name}
        _logger().info("balance: %2d  %s", step, "  ".join(f"{word}: {x:.4g}" for word, x in shown.items()))

    def _check_bias(self) -> None:
        """After a checkpoint was read: one that torchtitan or ``ExpertBias`` moved, and now nobody does."""
        if not self._policies or self._moves_bias:
            return
        for name, moe in moe_layers(self.model_parts):
            bias_E = getattr(moe, BIAS)
            if bias_E is not None and bool(bias_E.any()):
                raise ConfigError(
                    expected=f"a policy that moves {BIAS}, which the routers choose with",
                    got=f"{name}.{BIAS} that is not zero, and torchtitan's own updates switched off",
                    do='add ExpertBias() ("loss-free"), or ExpertBias(rate=0.0) to keep it as it is',
                )

    def describe(self) -> str:
        """``Balancer.describe``, what was asked for, what became of torchtitan's own balancing, Balance BSZ."""
        asked = ", ".join(map(str, self.settings.policies)) or "nothing: []"
        local, length = self.config.training.local_batch_size, self.config.training.seq_len
        micro = self.gradient_accumulation_steps
        sizes = f"micro_batch {local}, data_parallel {local * self._ranks}, global_batch {self._sequences} sequences"
        return (
            f"asked for     {asked}\nits own bias  {self._own}\n"
            f"Balance BSZ   {sizes} of {length} tokens ({self._ranks} ranks, {micro} micro-batches a step)\n"
            f"{self.balancer.describe()}"
        )


class _SavedState:
    """The balancer's state as torchtitan's checkpointer asks for it: bytes, since sizes grow with the first steps."""

    def __init__(self, balancer: Balancer, *, strict: bool) -> None:
        self._balancer, self._strict = balancer, strict

    def state_dict(self) -> dict[str, bytes]:
        return {"state": pack_state(plain_state(self._balancer))}

    def load_state_dict(self, state_dict: dict[str, bytes]) -> None:
        try:
            state = unpack_state(state_dict["state"])
        except (KeyError, ValueError) as error:
            raise DataError(
                expected=f"the balancer's state under {KEY!r} in the checkpoint",
                got=f"something else ({error})",
                do=f"--checkpoint.exclude_from_loading {KEY} begins it anew",
            ) from error
        for line in load_plain_state(self._balancer, state, strict=self._strict):
            _logger().warning("equipoise: %s", line)


def balanced(
    config: Any,
    policies: OnePolicy | Sequence[OnePolicy] | None = None,
    *,
    layers: bool = False,
    strict: bool = True,
    on_fault: str = "raise",
) -> Any:
    """The same configuration of torchtitan, whose ``build()`` makes a ``BalancedTrainer`` (docs/torchtitan.md).

    Args:
        config: a ``torchtitan.trainer.Trainer.Config``.
        policies: policies, or what ``policies_from`` takes: names and tables. [] measures and changes nothing, the
            engine's own balancing included.
        layers: log the numbers of each layer too.
        strict: a resumed run has to find the state of these policies; False takes what fits.
        on_fault: see ``Balancer``.

    Raises ConfigError without torchtitan, without policies, for a configuration that is balanced already, and for one
    of another Trainer.

    >>> balanced(None)
    Traceback (most recent call last):
    equipoise.errors.ConfigError: expected policies of the balance
      got: none
      do:  balanced(config, []) measures and changes nothing; balanced(config, ["global"]) balances
    """
    settings = Settings.read(policies, layers=layers, strict=strict, on_fault=on_fault)
    TORCHTITAN.require()
    if isinstance(config, BalancedTrainer.Config):
        raise ConfigError(
            expected="a configuration that is not balanced yet",
            got=f"one with policies {list(config.equipoise.policies) if config.equipoise else None}",
            do="pass all policies to one balanced(): their gradients add up",
        )
    if type(config) is not Trainer.Config:
        raise ConfigError(
            expected="a torchtitan.trainer.Trainer.Config",
            got=f"a {type(config).__module__}.{type(config).__qualname__}",
            do="balance a configuration of torchtitan's own Trainer; for another one write what BalancedTrainer does",
        )
    given = {one.name: getattr(config, one.name) for one in dataclasses.fields(config)}
    return BalancedTrainer.Config(**given, equipoise=settings)


def _logger() -> Any:
    return importlib.import_module("torchtitan.tools.logging").logger
