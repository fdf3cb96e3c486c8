"""What an adapter was asked to balance by, as a user wrote it and as policies."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..errors import ConfigError
from ..policies import Policy
from ..policies.from_data import OnePolicy, as_list, policies_from
from ..policies.schedule import Schedule

__all__ = ["NO_END", "NO_POLICIES", "Asked"]

NO_POLICIES = 'policies=[] measures and changes nothing; ["global"] balances'
NO_END = 2**62  # steps: where nobody knows how many there will be


@dataclass(frozen=True)
class Asked:
    """``said``: names, tables and policies; ``policies``: what they mean."""

    said: list[OnePolicy]
    policies: list[Policy]
    schedule: Schedule

    @classmethod
    def read(
        cls, policies: OnePolicy | Sequence[OnePolicy] | None, steps: int = NO_END, *, do: str = NO_POLICIES
    ) -> Asked:
        """Raises ConfigError for what is no policy, and for None: what nobody asked for is not done in silence.

        >>> len(Asked.read(["global+micro"]).policies)
        2
        """
        if policies is None:
            raise ConfigError(expected="policies of the balance", got="none", do=do)
        said = as_list(policies)
        built = policies_from(said, steps=steps)
        return cls(said, built, Schedule(built))

    def refuse_counting(self, why: str) -> None:
        """Raises ConfigError for what needs a pass over a step's micro-batches before the step."""
        if any(loss.needs_counting for _, loss in self.schedule.losses):
            raise ConfigError(
                expected="policies that need no counting pass over a step's micro-batches",
                got="scope 'shuffle' or estimator 'exact'",
                do=f"take estimator 'filled': {why}",
            )

    def describe(self, own: str) -> str:
        """The first lines of an adapter's ``describe()``: what was asked for, what becomes of the engine's own."""
        return f"asked for      {', '.join(map(str, self.said)) or 'nothing: []'}\nits balancing  {own}\n"
