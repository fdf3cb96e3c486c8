"""Refuses to measure inside a micro-batch whose sequences nobody has told apart."""

from __future__ import annotations

from .errors import InputError
from .meter import Plan, TokenLayout

__all__ = ["check_layout"]


def check_layout(plan: Plan, layout: TokenLayout, tokens: int) -> None:
    """Raises InputError for a policy with scope sequence, Sequences(n) or document where the layout is not known.

    One guessed sequence would give another load and another gradient, and look healthy.
    """
    if layout.num_sequences is not None:
        return
    if plan.inside or (layout.document_T is None and any(term.kind == "document" for term in plan.terms)):
        raise InputError(
            expected="to know how tokens lie in sequences, for a scope inside a micro-batch",
            got=f"{tokens} tokens, and nobody said which of them are one sequence",
            do="MoE(..., batch_first=True) where inputs are (B, S, D), batch_first=False where they are (S, B, D); "
            "a router called by itself takes router(x_TD, TokenLayout(num_sequences=B)); a model of another library "
            "has to be called with input_ids or inputs_embeds (B, S, ...)",
        )
