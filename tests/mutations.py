"""Plants nine mistakes of other engines in a copy of the library and shows that the core's tests catch each.

Run by hand: ``python tests/mutations.py [name ...]``. Exit code 1 when a mistake survives.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Mutation:
    """One textual change and the tests that must fail for it."""

    file: str
    before: str
    after: str
    tests: str  # a file of tests/core and, after a space, what -k selects in it


MUTATIONS = {
    "counted in forward, so twice under recompute (B20, B22)": Mutation(
        "tie.py",
        "    measured = measure(meter.plan, logits_TE, ids_TK, counts_BE, batch)\n",
        "    measured = measure(meter.plan, logits_TE, ids_TK, counts_BE, batch)\n"
        "    if meter.leaf.grad is None:\n"
        "        meter.leaf.grad = torch.zeros_like(meter.leaf)\n"
        "    meter.leaf.grad[: meter.plan.forward_size] += measured.statistics\n",
        "test_modes.py bit_equal and selective",
    ),
    "the loss's scale ignored, so 1/M is wrong (B07)": Mutation(
        "pressure.py",
        "push = per_scale * scale.to(device=per_scale.device, dtype=torch.float64).reshape(())",
        "push = per_scale * 1.0",
        "test_modes.py any_cut and 4-plain or plain-4",
    ),
    "f not divided by K (B11, B13)": Mutation(
        "functional/losses.py",
        "return counts_E / counts_E.sum(dim=-1, keepdim=True).clamp(min=1)",
        "return 2 * counts_E / counts_E.sum(dim=-1, keepdim=True).clamp(min=1)",
        "test_tie.py uniform",
    ),
    "padding counted (B56, B62)": Mutation(
        "functional/routing.py",
        "    if token_mask_T is None:\n        ones =",
        "    if True:\n        ones =",
        "test_tie.py padding",
    ),
    "counts in bf16 (B34)": Mutation(
        "meter.py",
        "    parts = [counts_BE.sum(dim=0).double(),",
        "    parts = [counts_BE.sum(dim=0).bfloat16().double(),",
        "test_tie.py half_precision",
    ),
    "bias moved at every micro-batch (B44)": Mutation(
        "balancer.py",
        "        self._micro_steps += 1\n",
        "        self._micro_steps += 1\n"
        "        for layer, (statistics, _) in zip(self._layers, taken, strict=True):\n"
        "            with torch.no_grad():\n"
        "                self._move_bias(layer, statistics[: layer.meter.plan.num_experts])\n",
        "test_lifetimes.py bias_rules and sign",
    ),
    "evaluation counted and pushed (B26, B28)": Mutation(
        "tie.py",
        "    if not training:\n        return weights_TK\n",
        "",
        "test_stated_results.py evaluation",
    ),
    "Tie replaced by the identity (B06, B42)": Mutation(
        "tie.py",
        "    return _Tie.apply(\n",
        "    return weights_TK\n    return _Tie.apply(\n",
        "test_tie.py router_options",
    ),
    "the count flag ignored, so two backwards count twice": Mutation(
        "tie.py",
        "counted = torch.cat([statistics, zero, squares]) * pressure[-1]",
        "counted = torch.cat([statistics, zero, squares])",
        "test_stated_results.py two_backwards",
    ),
}


def survives(mutation: Mutation) -> bool:
    """Whether the tests pass although the mistake is there. Raises ValueError when its text is gone from the source."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "src"
        shutil.copytree(ROOT / "src", source, ignore=shutil.ignore_patterns("__pycache__"))
        file = source / "equipoise" / mutation.file
        text = file.read_text()
        if text.count(mutation.before) != 1:
            raise ValueError(f"{mutation.file} has {text.count(mutation.before)} times: {mutation.before!r}")
        file.write_text(text.replace(mutation.before, mutation.after))
        tests, _, selection = mutation.tests.partition(" ")
        command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", f"tests/core/{tests}"]
        command += ["-k", selection, "--override-ini", f"pythonpath={source} tests"]
        environment = os.environ | {"PYTHONPATH": str(source), "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
        if done.returncode not in (0, 1):  # 1: tests failed, as they must; anything else is our own mistake
            raise RuntimeError(done.stdout[-2000:] + done.stderr[-2000:])
        return done.returncode == 0


def main(names: list[str]) -> int:
    alive = 0
    for name, mutation in MUTATIONS.items():
        if names and not any(part in name for part in names):
            continue
        survived = survives(mutation)
        alive += survived
        print(f"{'SURVIVED' if survived else 'caught':9} {name}  [{mutation.tests}]", flush=True)
    return 1 if alive else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
