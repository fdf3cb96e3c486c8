"""The meter of one router: what its tokens chose, where backward writes it, and the pressure that backward reads.

A meter is a plain attribute of a router, neither Parameter nor buffer: optimizers, DDP's buffer broadcast and
checkpoints do not see it. All statistics are additive and fp64, so counts are exact to 2^53 and one sum over
micro-batches and ranks is all it takes. Legend: T tokens, B sequences, S tokens a sequence, E experts, N loss terms.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .errors import InputError
from .functional.losses import load_fractions
from .functional.metrics import maxvio
from .functional.routing import count_choices, gate_probs, gate_slope, without_autocast

__all__ = [
    "Batch",
    "ForwardPass",
    "LocalTerm",
    "Measured",
    "Meter",
    "Placed",
    "Plan",
    "Tables",
    "Taken",
    "measure",
    "shared_counts",
]

SCALARS = (
    "tokens",  # valid ones of the micro-batch: what the step's losses are divided by
    "reached",  # those that came to this router
    "calls",
    "sequences",
    "topk_score",
    "lse_square",
    "maxvio_sequence",
    "maxvio_micro_batch",
    "rows",
)


class Batch(NamedTuple):
    """How the T tokens that reach a router lie: B sequences of T / B tokens, which are real, and where documents end.

    ``document_T`` numbers the documents of a pack inside the micro-batch: integers in [0, T), or in [0, T * shards)
    where other ranks hold the rest of each sequence. ``valid_T``: the tokens that are no padding, where a router gets
    only some of them; ``token_mask_T`` then leaves out what goes to another router too.
    """

    num_sequences: int = 1
    token_mask_T: Tensor | None = None
    document_T: Tensor | None = None
    valid_T: Tensor | None = None


class Placed(NamedTuple):
    """How the tokens of one call of another library's router lie, read beside the call and not from its arguments."""

    tokens: int  # rows of the call
    batch: Batch
    rows_T: Tensor | None = None  # which tokens of the batch its rows are; None: all of them, in order


class LocalTerm(NamedTuple):
    """Over which tokens a loss term measures f; ``late``: only the tap knows (other micro-batches, other ranks)."""

    kind: str  # "late", "sequences", "micro_batch", "document"
    sequences: int = 1  # for "sequences": how many neighbouring ones share an f
    unbiased: bool = False  # f of the top-k without selection bias and groups, as in DeepSeek-V3's sequence loss


class Plan(NamedTuple):
    """What a meter measures; constant while a balancer is attached, so that a compiled graph may rely on it."""

    num_experts: int
    top_k: int
    gate: str
    terms: tuple[LocalTerm, ...] = ()
    z_loss: bool = False
    norms: bool = True  # squared gradient norms of every term and of the language-model loss at the logits
    micro_sequences: int | None = None  # sequences of one micro-batch where several run as one pass
    gram: bool = False  # sum of J^T J over tokens: turns any difference in f into a difference of gradients
    shards: int = 1  # ranks that hold parts of the same sequences: the tap adds up their loads
    weights: tuple[bool, float] | None = None  # (normalized, scale) of scores: the norm behind, if no probe can stand
    idle: int = 0  # expert ids from num_experts on that may be chosen and do no work: they are no load

    @property
    def unbiased(self) -> bool:
        return any(term.unbiased for term in self.terms)

    # The statistics: counts E, probs E, [unbiased counts E], scalars, N term values | lm norm, N + 1 norms.
    @property
    def scalars_at(self) -> int:
        return (3 if self.unbiased else 2) * self.num_experts

    def at(self, scalar: str) -> int:
        return self.scalars_at + SCALARS.index(scalar)

    @property
    def values_at(self) -> int:
        return self.scalars_at + len(SCALARS)

    @property
    def forward_size(self) -> int:
        """Statistics that forward already knows; the gradient norms behind them are known in backward only."""
        return self.values_at + len(self.terms)

    @property
    def size(self) -> int:
        return self.forward_size + 2 + len(self.terms)

    @property
    def pressure_size(self) -> int:
        """A row of E and a factor for each term, then the z-loss factor and the count flag."""
        return len(self.terms) * (self.num_experts + 1) + 2


class Tables(NamedTuple):
    """What one call of a router shares with the ranks that hold other parts of its B sequences.

    C = 1, the dispatched choices, or 2 with the unbiased ones behind; R rows of documents, numbered by ``document_T``.
    """

    counts_CBE: Tensor
    probs_BE: Tensor
    counts_CRE: Tensor | None
    probs_RE: Tensor | None
    document_T: Tensor | None


class Measured(NamedTuple):
    """One micro-batch at one router, as forward sees it; none of it carries a gradient."""

    probs_TE: Tensor
    statistics: Tensor  # (plan.forward_size,) fp64
    fraction_NBE: Tensor  # f of the local terms per sequence; zero rows for the others
    fraction_NTE: Tensor | None  # f of the document terms per token
    gram_EE: Tensor | None
    tables: Tables | None  # where the plan is sharded


class Taken(NamedTuple):
    """What forward proposed at one router for one micro-batch, on this rank."""

    statistics: Tensor  # (plan.forward_size,), added up over the calls of the router
    gram_EE: Tensor
    tables: list[Tables]  # one per call
    placed: list[Placed]  # one per call with gradient, of another library's router


class ForwardPass:
    """How a part of the model is being run: set around its forward, shared by its meters."""

    without_grad = False


class Meter:
    """The tensors of one router. ``leaf.grad`` collects what backward counted; ``slots`` what forward proposed.

    ``pressure`` keeps its address for life: compiled graphs and saved tensors hold it, and the tap writes it late.
    """

    def __init__(self, plan: Plan, device: torch.device | str = "cpu") -> None:
        self.plan = plan
        self.leaf = torch.zeros(plan.size, dtype=torch.float64, device=device, requires_grad=True)
        self.pressure = torch.zeros(plan.pressure_size, dtype=torch.float64, device=device)
        # The first pass of a reentrant checkpoint runs without gradient and must still be seen by the tap, while a
        # whole model run without gradient (a reference model, an evaluation) must not mix with either: three slots.
        self.forward_pass = ForwardPass()
        square = (plan.num_experts, plan.num_experts) if plan.gram else (0, 0)
        self.slots = torch.zeros(3, plan.forward_size, dtype=torch.float64, device=device)
        self.grams = [torch.zeros(square, dtype=torch.float64, device=device) for _ in range(3)]
        self.tables: list[list[Tables]] = [[], [], []]
        self.placed: list[Placed] = []  # calls since the last tap, for their recompute
        self.late: list = []  # per call, what the tap made of its tables: see `equipoise.shards`
        self.placed_late: list[Placed] = []  # the calls that the running backward may recompute
        self.key = _METERS.enter(self)
        self.pool: list[Tensor] | None = None  # expert ids of a counting pass, kept for the shuffle control only
        self.owner: object = None  # the balancer: it has to live as long as the model it balances

    @staticmethod
    def of(key: int) -> Meter:
        """The meter with this ``key``: how an operator inside a compiled graph finds it."""
        return _METERS.meters[key]

    def take(self) -> Taken:
        """The micro-batch that just went forward; empties the slots."""
        ran = (self.slots[:, self.plan.at("calls")] > 0).unbind()

        def first_that_ran(of: Sequence[Tensor]) -> Tensor:
            return torch.where(ran[0], of[0], torch.where(ran[1], of[1], of[2]))

        gram_EE = first_that_ran(self.grams) if self.plan.gram else self.grams[2].clone()
        taken = Taken(
            first_that_ran(self.slots.unbind()),
            gram_EE,
            next((tables for tables in self.tables if tables), []),
            self.placed,
        )
        self.clear_slots()
        return taken

    @property
    def which_slot(self) -> int:
        """0 with gradient, 1 without inside a pass that has it (reentrant checkpoint), 2 a pass without."""
        return 0 if torch.is_grad_enabled() else 2 if self.forward_pass.without_grad else 1

    def clear_slots(self, first: int = 0) -> None:
        self.slots[first:].data.zero_()
        for gram_EE in self.grams[first:] if self.plan.gram else ():
            gram_EE.data.zero_()
        self.tables[first:] = [[] for _ in self.tables[first:]]
        self.placed = self.placed if first else []

    def move(self, device: torch.device) -> None:
        """Follows the model to another device, statistics included."""
        grad = self.leaf.grad
        if self.leaf.is_meta:  # attached before the model had memory: nothing was measured yet
            fresh = Meter(self.plan, device)
            fresh.pressure[-1] = 1.0  # as a new step begins: counting needs no tap
            self.leaf, self.pressure, self.slots, self.grams = fresh.leaf, fresh.pressure, fresh.slots, fresh.grams
            return
        self.leaf = self.leaf.detach().to(device).requires_grad_()
        self.leaf.grad = None if grad is None else grad.to(device)
        self.pressure = self.pressure.to(device)
        self.slots, self.grams = self.slots.to(device), [g.to(device) for g in self.grams]

    def __deepcopy__(self, memo: dict) -> None:
        """A copied model (an EMA, a teacher) is not balanced by anybody: its routers get no meter."""
        return

    def __reduce__(self):
        return type(None), ()  # the same for pickled models


class _Meters:
    """Every meter by its number, for as long as it lives."""

    def __init__(self) -> None:
        self.meters: weakref.WeakValueDictionary[int, Meter] = weakref.WeakValueDictionary()
        self._numbers = itertools.count()

    def enter(self, meter: Meter) -> int:
        key = next(self._numbers)
        self.meters[key] = meter
        return key


_METERS = _Meters()


@torch.no_grad()
def measure(plan: Plan, logits_TE: Tensor, ids_TK: Tensor, counts_BE: Tensor, batch: Batch) -> Measured:
    """All statistics of one micro-batch at one router. ``counts_BE`` are the dispatched choices per sequence."""
    num_sequences, num_experts = counts_BE.shape
    probs_TE = gate_probs(logits_TE, plan.gate)
    mask_T1 = None if batch.token_mask_T is None else batch.token_mask_T.to(probs_TE.dtype).unsqueeze(-1)
    valid_TE = probs_TE if mask_T1 is None else probs_TE * mask_T1
    length = probs_TE.shape[0] // num_sequences
    probs_BE = _sum_tokens(valid_TE.view(num_sequences, length, num_experts))
    if plan.unbiased:
        plain_TK = logits_TE.topk(plan.top_k, dim=-1).indices
        plain_BE = count_choices(plain_TK, num_experts, batch.token_mask_T, num_sequences)
    else:
        plain_TK, plain_BE = ids_TK, counts_BE

    of_documents: dict[bool, Tensor] = {}  # unbiased or not -> (R, E) counts
    fraction_BE, values, documents = [], [], []
    for term in plan.terms:
        term_BE = shared_counts(plain_BE if term.unbiased else counts_BE, term)
        fraction_BE.append(load_fractions(term_BE))
        if term.kind == "document":
            if term.unbiased not in of_documents:
                chosen_TK = plain_TK if term.unbiased else ids_TK
                of_documents[term.unbiased] = _document_counts(chosen_TK, plan, batch)
            fraction_TE = load_fractions(of_documents[term.unbiased])[batch.document_T]
            documents.append(fraction_TE.to(probs_TE.dtype))
            values.append((fraction_TE * valid_TE).sum(dtype=torch.float64))
        else:
            values.append((fraction_BE[-1] * probs_BE).sum())
    fraction_NBE = torch.stack(fraction_BE) if fraction_BE else counts_BE.new_zeros((0, num_sequences, num_experts))

    parts = [counts_BE.sum(dim=0).double(), probs_BE.sum(dim=0)]
    if plan.unbiased:
        parts.append(plain_BE.sum(dim=0).double())
    parts.append(_scalars(plan, logits_TE, valid_TE, ids_TK, counts_BE, batch))
    if values:
        parts.append(num_experts * torch.stack(values))
    gram_EE = _gram(valid_TE, gate_slope(logits_TE, plan.gate)) if plan.gram else None
    tables = None
    if plan.shards > 1:
        counts_CBE = torch.stack([counts_BE, plain_BE] if plan.unbiased else [counts_BE])
        tables = _tables(counts_CBE, probs_BE, of_documents, valid_TE, batch)
    fraction_NTE = torch.stack(documents) if documents else None
    return Measured(probs_TE, torch.cat(parts), fraction_NBE, fraction_NTE, gram_EE, tables)


def _sum_tokens(x_BSE: Tensor) -> Tensor:
    """Sum over S in fp64: blocks of 64 tokens in fp32 first, because a sum that casts copies all of x before."""
    blocks = x_BSE.shape[1] // 64
    if blocks < 2:
        return x_BSE.sum(dim=1, dtype=torch.float64)
    whole = x_BSE[:, : 64 * blocks].unflatten(1, (blocks, 64)).sum(dim=2).sum(dim=1, dtype=torch.float64)
    return whole + x_BSE[:, 64 * blocks :].sum(dim=1, dtype=torch.float64)


def _tables(
    counts_CBE: Tensor, probs_BE: Tensor, of_documents: dict[bool, Tensor], valid_TE: Tensor, batch: Batch
) -> Tables:
    if not of_documents:
        return Tables(counts_CBE.double(), probs_BE, None, None, None)
    any_RE = next(iter(of_documents.values()))
    kinds = [False, True][: len(counts_CBE)]
    counts_CRE = torch.stack([of_documents.get(kind, torch.zeros_like(any_RE)) for kind in kinds])
    assert batch.document_T is not None
    probs_RE = torch.zeros_like(any_RE, dtype=torch.float64).index_add_(0, batch.document_T, valid_TE.double())
    return Tables(counts_CBE.double(), probs_BE, counts_CRE.double(), probs_RE, batch.document_T)


def _scalars(
    plan: Plan, logits_TE: Tensor, valid_TE: Tensor, ids_TK: Tensor, counts_BE: Tensor, batch: Batch
) -> Tensor:
    """The SCALARS, in order, as fp64."""
    counts_E = counts_BE.sum(dim=0)
    one = torch.ones((), dtype=torch.float64, device=logits_TE.device)
    reached = counts_E.sum().double() / plan.top_k  # an int64 tensor over an int would be fp32
    if plan.idle:  # where not every choice is a load
        reached = one * len(logits_TE) if batch.token_mask_T is None else batch.token_mask_T.sum().double()
    tokens = reached if batch.valid_T is None else batch.valid_T.sum().double()
    micro_BE = shared_counts(counts_BE, LocalTerm("sequences", plan.micro_sequences or 1))
    full_B = (counts_BE.sum(dim=-1) > 0).double()
    lse_square = torch.zeros_like(one)
    if plan.z_loss:
        lse_T = logits_TE.float().logsumexp(dim=-1).double().square()
        lse_square = (lse_T if batch.token_mask_T is None else lse_T * batch.token_mask_T).sum()
    scores_TK = valid_TE.gather(-1, ids_TK.clamp(max=plan.num_experts - 1) if plan.idle else ids_TK)
    if plan.idle:
        scores_TK = scores_TK * (ids_TK < plan.num_experts)
    return torch.stack(
        [
            tokens,
            reached,
            one,
            full_B.sum(),
            scores_TK.sum(dtype=torch.float64),
            lse_square,
            maxvio(counts_BE).sum(),
            maxvio(counts_E) if plan.micro_sequences is None else maxvio(micro_BE).mean(),
            one * (counts_BE.shape[0] if len(logits_TE) else 0),
        ]
    )


def shared_counts(counts_BE: Tensor, term: LocalTerm) -> Tensor:
    """Counts that each sequence's f is made of: its own, those of its group of n, or the whole micro-batch's."""
    num_sequences, num_experts = counts_BE.shape
    if term.kind == "micro_batch" or (term.kind == "sequences" and term.sequences >= num_sequences > 1):
        return counts_BE.sum(dim=0, keepdim=True).expand(num_sequences, -1)
    if term.kind == "sequences" and term.sequences > 1 and num_sequences > 1:
        group_B = torch.arange(num_sequences, device=counts_BE.device) // term.sequences
        groups = -(-num_sequences // term.sequences)
        group_GE = torch.zeros(groups, num_experts, dtype=counts_BE.dtype, device=counts_BE.device)
        return group_GE.index_add_(0, group_B, counts_BE)[group_B]
    if term.kind == "sequences":
        return counts_BE
    return torch.zeros_like(counts_BE)


def _document_counts(ids_TK: Tensor, plan: Plan, batch: Batch) -> Tensor:
    """(R, E) choices of each document."""
    if batch.document_T is None:
        raise InputError(
            expected="document_ids for a policy with scope 'document'",
            got="none",
            do="pass document_ids_BS to the MoE layer, or balance per sequence",
        )
    (tokens, top_k), choices = ids_TK.shape, plan.num_experts + plan.idle
    flat_TK = batch.document_T.unsqueeze(1) * choices + ids_TK
    one_T = torch.ones_like(batch.document_T) if batch.token_mask_T is None else batch.token_mask_T.long()
    counts = torch.zeros(tokens * plan.shards * choices, dtype=torch.int64, device=ids_TK.device)
    counts.scatter_add_(0, flat_TK.reshape(-1), one_T.unsqueeze(1).expand(-1, top_k).reshape(-1))
    return counts.view(-1, choices)[:, : plan.num_experts]


def _gram(valid_TE: Tensor, slope_TE: Tensor) -> Tensor:
    """Sum over tokens of J^T J, where J f = h (f - <p, f>) is the gradient at the logits that a fraction f causes."""
    square_TE = (slope_TE * valid_TE).square()
    with without_autocast(valid_TE):
        cross_EE = square_TE.T @ valid_TE
        outer_EE = valid_TE.T @ (square_TE.sum(dim=-1, keepdim=True) * valid_TE)
    return (torch.diag(square_TE.sum(dim=0)) - cross_EE - cross_EE.T + outer_EE).double()
