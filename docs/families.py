"""Writes docs/families.md: what the checks of tests/integrations/hf find out about every MoE family of transformers.

Run it from the root of the repository: ``PYTHONPATH=tests python docs/families.py`` (half an hour).
"""

from __future__ import annotations

import multiprocessing
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch
import transformers

from equipoise.external.output_formats import FORMATS
from integrations.hf._cases import (
    COMPILED,
    NOT_COMPILED,
    RECOMPUTED,
    UNMEASURED,
    check_gradient_ratio,
    check_law,
    check_native_bias,
    check_own_bias,
)
from integrations.hf.families import FAMILIES, NATIVE, OWN, REFUSED

HEAD = """# Families of transformers

Written by `docs/families.py` with transformers {transformers} and torch {torch}, on tiny random models of two MoE
layers on a CPU. A "yes" is a check that passed.

- loss: two steps of a sequence loss and a global-batch loss; gradients equal to loops but for rounding, counts equal.
- padding: in the same steps, tokens that `attention_mask` leaves out are neither counted nor pushed.
- bias: "native" is the model's own, moved in fp32 where its checkpoint has it, also when the model is bf16; "ours" is
  added by the balancer and kept in `balancer.state_dict()`; "no": `ExpertBias` is refused.
- recompute: the same steps under gradient checkpointing of both kinds. compile: under `torch.compile("aot_eager")`.
  "not in this model": it fails there without a balancer, too.
- ratio: `gradient_ratio` in the metrics equals autograd's; "-": left out, because weights hold more than scores.

Routers have returned logits, weights and expert ids in one tuple since transformers 5.15, which is asked for. Every
family is tested with {transformers}; the first check also passed with 5.15.0 and 5.20.0 on qwen3_moe, qwen3_next,
mixtral, olmoe, deepseek_v3, gpt_oss, glm4_moe, granitemoe, llama4, minimax_m2 and ernie4_5_moe. In older versions many
blocks choose by themselves: the balancer finds no router there, and says so.

Of LongCat-Flash and Zaya, choices of experts that do no work (they hand a token back, or skip the layer) are no load:
f, P and the bias are of the experts that work, and how many choices go to the others is left to the model. The first
layers of DeepSeek-V4 follow token ids: a warning names them, and the other layers are balanced. Ernie 4.5 VL has one
router for text and one for pictures: each is balanced over its own tokens, and both are divided by all tokens.

| family | loss | padding | bias | recompute | compile | ratio | refused, because |
|---|---|---|---|---|---|---|---|
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
        cells = ["no", "", "no", "", "", "", FORMATS[REFUSED[family]].unsupported]
        return f"| {family} | {' | '.join(cells)} |\n"
    loss = tried(check_law, family)
    bias = "no"
    if family in NATIVE:
        held = tried(check_native_bias, family)
        bias = "native" if held == "yes" else f"native, bf16: {held}"
    elif family in OWN:
        held = tried(check_own_bias, family)
        bias = "ours" if held == "yes" else held
    torch.compiler.reset()  # torch's compiler fails on the backward of NOT_COMPILED, with or without a balancer
    compiled = "not in this model" if family in NOT_COMPILED else tried(check_law, family, wrap=COMPILED)
    ratio = tried(check_gradient_ratio, family)
    ratio = "-" if ratio == "yes" and family in UNMEASURED else ratio
    if family == "diffusion_gemma":  # transformers itself: "not compatible with gradient checkpointing"
        return f"| {family} | {loss} | {loss} | {bias} | not in this model | {compiled} | {ratio} | |\n"
    kinds = {name: tried(check_law, family, prepare=prepare) for name, prepare in RECOMPUTED.items()}
    same = len(set(kinds.values())) == 1
    recompute = next(iter(kinds.values())) if same else ", ".join(f"{name}: {one}" for name, one in kinds.items())
    return f"| {family} | {loss} | {loss} | {bias} | {recompute} | {compiled} | {ratio} | |\n"


def main() -> None:
    head = HEAD.format(transformers=transformers.__version__, torch=torch.__version__.partition("+")[0])
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(2, context, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        rows = list(pool.map(row, sorted(FAMILIES)))
    Path(__file__).with_name("families.md").write_text(head + "".join(rows), encoding="utf-8")


if __name__ == "__main__":
    main()
