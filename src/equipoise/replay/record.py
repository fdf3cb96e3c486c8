"""What routers chose, call after call: a record that is cut, joined, moved and saved.

Legend: T tokens of a call, B sequences of S tokens, K experts per token.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ..errors import InputError, described
from ..functional.specialization import churn

__all__ = ["RoutingRecord"]


class RoutingRecord:
    """The expert ids of each router, (T, K) a call, as `record_routing` yields them and `replay_routing` takes them.

    Args:
        ids: router name -> its calls in their order, integer ids (T, K) on any device. A row of -1 is a token of which
            nothing is known: it goes where the router chooses. An engine that serves rollouts gives such tensors too;
            `record_routing` shows the names.

    Raises InputError for ids that are no integers (T, K), repeated or below 0 in a row that is not -1 throughout.

    ``torch.save(record.state_dict(), path)`` and ``RoutingRecord(torch.load(path))`` keep one on disk.

    >>> record = RoutingRecord({"gate": [torch.tensor([[0, 3], [1, 2]])]})
    >>> record
    RoutingRecord(1 router, 1 call, 2 tokens)
    >>> record.tokens(torch.tensor([1])).ids
    {'gate': [tensor([[1, 2]])]}
    """

    def __init__(self, ids: Mapping[str, Sequence[Tensor]]) -> None:
        self.ids = {name: list(calls) for name, calls in ids.items()}
        for name, calls in self.ids.items():
            for i, ids_TK in enumerate(calls):
                if why := _why_no_ids(ids_TK):
                    raise InputError(
                        expected=f"integer expert ids (T, K) in call {i} of {name!r}, distinct, or -1 in all of a row",
                        got=why,
                        do="flatten (B, S, K) to (B * S, K); write -1 for all K of a token that has no record",
                    )

    @property
    def num_calls(self) -> int:
        """The most calls that a router has."""
        return max(map(len, self.ids.values()), default=0)

    def __getitem__(self, call: int | slice) -> RoutingRecord:
        """Call number ``call`` of every router, or a range of them: one micro-batch of several.

        >>> RoutingRecord({"gate": [torch.tensor([[0]]), torch.tensor([[1]])]})[1].ids
        {'gate': [tensor([[1]])]}
        """
        at = call if isinstance(call, slice) else slice(call, call + 1 or None)
        if not isinstance(call, slice) and not -self.num_calls <= call < self.num_calls:
            raise IndexError(f"call {call} of a record of {self.num_calls}")
        return self._with({name: calls[at] for name, calls in self.ids.items()})

    def tokens(self, index_T: Tensor) -> RoutingRecord:
        """Of every call these tokens, by number or a mask (T,): sequences dropped, reordered, cut into micro-batches.

        For sequences 2 and 0 of (B, S): ``record.tokens(torch.arange(B * S).view(B, S)[[2, 0]].flatten())``.
        """
        return self._with({name: [one[index_T.to(one.device)] for one in calls] for name, calls in self.ids.items()})

    def joined(self, num_sequences: int, length: int | None = None) -> RoutingRecord:
        """All calls as one, sequence by sequence: a prompt and the tokens that followed it one by one, with a cache.

        Args:
            num_sequences: B, the same in every call.
            length: S of the batch to replay; what is not recorded behind a sequence (its last token, which no forward
                has seen) is -1. Default: what was recorded.

        Raises InputError where a call's tokens are not B sequences, or ``length`` is less than what was recorded.

        >>> calls = [torch.tensor([[0], [1], [2], [3]]), torch.tensor([[4], [5]])]  # two prompts of two tokens; a step
        >>> RoutingRecord({"gate": calls}).joined(2, length=4).ids["gate"][0].T
        tensor([[ 0,  1,  4, -1,  2,  3,  5, -1]])
        """
        if num_sequences < 1:
            raise InputError(
                expected="one sequence or more", got=str(num_sequences), do="pass the B of the recorded batches"
            )
        joined = {}
        for name, calls in self.ids.items():
            if not calls:  # a router that did not run
                joined[name] = []
                continue
            lengths = [len(one) / num_sequences for one in calls]
            missing = 0 if length is None else length - sum(lengths)
            if any(one % 1 for one in lengths) or missing < 0:
                raise InputError(
                    expected=f"calls of {num_sequences} sequences"
                    + ("" if length is None else f", of {length} tokens together at most"),
                    got=f"calls of {', '.join(str(len(one)) for one in calls[:8])} tokens at {name!r}",
                    do="pass the B of the recorded batches, and the S of the batch to replay",
                )
            parts = [one.reshape(num_sequences, -1, one.shape[-1]) for one in calls]
            if missing:
                parts.append(parts[-1].new_full((num_sequences, int(missing), parts[-1].shape[-1]), -1))
            joined[name] = [torch.cat(parts, dim=1).flatten(0, 1)]
        return self._with(joined)

    def churn(self, other: RoutingRecord, num_experts: int | None = None) -> dict[str, float]:
        """Of each router the share of choices that ``other``, a record of the same tokens, does not have.

        Over all calls: of each token the share of its K experts that are not among its K in the other record, mean over
        the tokens that both know; NaN where there are none. Recorded on a fixed batch every so often, it says how much
        of the routing is still changing (routing fluctuation, arXiv 2204.08396). ``num_experts``: of a router with
        ``top_p``, whose ids may be E, which is no expert and no choice.

        Raises InputError where the other record is of other routers, calls, tokens or K.

        >>> earlier, later = RoutingRecord({"gate": [torch.tensor([[0, 3]])]}), torch.tensor([[3, 1]])
        >>> RoutingRecord({"gate": [later]}).churn(earlier)
        {'gate': 0.5}
        """
        for name in dict.fromkeys((*self.ids, *other.ids)):
            own, others = _shapes(self.ids.get(name)), _shapes(other.ids.get(name))
            if own != others:
                pairs = zip(own or [], others or [], strict=False)
                at = next((f", first in call {i}" for i, (a, b) in enumerate(pairs) if a != b), "")
                raise InputError(
                    expected="two records of the same routers, calls, tokens and K",
                    got=f"at router {name!r} {_shown(own)} here, {_shown(others)} there{at}",
                    do="record the same batches with the same model both times; RoutingRecord({name: ids}) renames",
                )
        found = {}
        for name, calls in self.ids.items():
            pairs = zip(calls, other.ids[name], strict=True)
            parts = [churn(mine, one.to(mine.device), num_experts) for mine, one in pairs]
            found[name] = float(torch.cat(parts).nanmean()) if parts else math.nan
        return found

    def to(self, device: torch.device | str) -> RoutingRecord:
        """On another device; a record may lie on the CPU while the model does not."""
        return self._with({name: [one.to(device) for one in calls] for name, calls in self.ids.items()})

    def state_dict(self) -> dict[str, list[Tensor]]:
        """The plain tensors, for ``torch.save``; ``RoutingRecord(state)`` is the record again."""
        return {name: list(calls) for name, calls in self.ids.items()}

    @staticmethod
    def _with(ids: dict[str, list[Tensor]]) -> RoutingRecord:
        """Of ids that were looked at before."""
        record = RoutingRecord({})
        record.ids = ids
        return record

    def __repr__(self) -> str:
        tokens = sum(map(len, next(iter(self.ids.values()), [])))
        parts = (len(self.ids), "router"), (self.num_calls, "call"), (tokens, "token")
        return f"RoutingRecord({', '.join(f'{n} {one}' + 's' * (n != 1) for n, one in parts)})"


def _shapes(calls: Sequence[Tensor] | None) -> list[tuple[int, ...]] | None:
    return None if calls is None else [tuple(one.shape) for one in calls]


def _shown(shapes: list[tuple[int, ...]] | None) -> str:
    """A record of a rollout has thousands of calls."""
    if shapes is None:
        return "nothing"
    return f"{len(shapes)} calls of {', '.join(map(str, shapes[:3]))}{', ...' * (len(shapes) > 3)}"


def _why_no_ids(ids_TK: Tensor) -> str:
    if (
        not isinstance(ids_TK, Tensor)
        or ids_TK.dim() != 2
        or ids_TK.is_floating_point()
        or ids_TK.is_complex()
        or ids_TK.dtype == torch.bool
    ):
        return described(ids_TK)
    unknown_T1 = (ids_TK == -1).all(dim=1, keepdim=True)
    sorted_TK = ids_TK.sort(dim=1).values
    twice_TK = sorted_TK.diff(dim=1) == 0
    if ids_TK.numel() and not bool((ids_TK[:, 0] == ids_TK.amax()).any()):  # may be E, no expert: nobody's first choice
        twice_TK &= sorted_TK[:, 1:] != ids_TK.amax()
    bad_T = ((ids_TK < 0).any(dim=1) | twice_TK.any(dim=1)) & ~unknown_T1.squeeze(1)
    return f"{ids_TK[bad_T][0].tolist()}, and {int(bad_T.sum())} such rows" if bool(bad_T.any()) else ""
