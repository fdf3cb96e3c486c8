"""Writes docs/families.md: what the checks of tests/hf find out about every MoE family of the installed transformers.

Run it from the root of the repository: ``PYTHONPATH=tests python docs/families.py`` (a few minutes on one core).
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import transformers

from equipoise.readers import SPECIAL
from hf._cases import COMPILED, RECOMPUTED, USUAL, check_law, check_native_bias, check_own_bias
from hf.families import FAMILIES, NATIVE, OWN, REFUSED

HEAD = """# Families of transformers

Written by `docs/families.py` with transformers {transformers} and torch {torch}, on tiny random models of two MoE
layers on a CPU. A "yes" is a check that passed; "-" was not tried.

- loss: two steps of a sequence loss and a global-batch loss; gradients within 1e-5 of loops in float64, counts equal.
- padding: in the same steps, tokens that `attention_mask` leaves out are neither counted nor pushed.
- bias: "native" is the model's own, moved in fp32 where its checkpoint has it, also when the model is bf16; "ours" is
  added by the balancer and kept in `balancer.state_dict()`; "no": `ExpertBias` is refused.
- recompute: the same steps under gradient checkpointing of both kinds. compile: under `torch.compile("aot_eager")`.

| family | loss | padding | bias | recompute | compile | refused, because |
|---|---|---|---|---|---|---|
"""


def tried(check: object, *args: object, **kwargs: object) -> str:
    try:
        check(*args, **kwargs)  # type: ignore[operator]
    except Exception as error:  # the table says what failed
        print(f"{args[0]}: {type(error).__name__}: {str(error)[:200]}", file=sys.stderr)
        return f"no ({type(error).__name__})"
    return "yes"


def row(family: str) -> str:
    if family in REFUSED:
        cells = ["no", "", "no", "", "", SPECIAL[REFUSED[family]].refuse]
        return f"| {family} | {' | '.join(cells)} |\n"
    loss = tried(check_law, family)
    bias = "no"
    if family in NATIVE:
        held = tried(check_native_bias, family)
        bias = "native" if held == "yes" else f"native, bf16: {held}"
    elif family in OWN:
        held = tried(check_own_bias, family)
        bias = "ours" if held == "yes" else held
    if family == "diffusion_gemma":  # transformers itself: "not compatible with gradient checkpointing"
        return f"| {family} | {loss} | {loss} | {bias} | not in this model | - | |\n"
    kinds = {name: tried(check_law, family, prepare=prepare) for name, prepare in RECOMPUTED.items()}
    same = len(set(kinds.values())) == 1
    recompute = next(iter(kinds.values())) if same else ", ".join(f"{name}: {one}" for name, one in kinds.items())
    compiled = "-"
    if family in USUAL:
        torch.compiler.reset()
        compiled = tried(check_law, family, wrap=COMPILED)
    return f"| {family} | {loss} | {loss} | {bias} | {recompute} | {compiled} | |\n"


def main() -> None:
    torch.set_num_threads(1)
    head = HEAD.format(transformers=transformers.__version__, torch=torch.__version__.partition("+")[0])
    table = "".join(row(family) for family in sorted(FAMILIES))
    Path(__file__).with_name("families.md").write_text(head + table, encoding="utf-8")


if __name__ == "__main__":
    main()
