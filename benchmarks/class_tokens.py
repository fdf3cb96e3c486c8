"""How well the tokens of a class are known before a step is over: what T_c is, by each estimator, beside the true one.

    python benchmarks/class_tokens.py        # half a minute

Sequences of 256 tokens; some of them hold a picture, of a tenth to nine tenths of their tokens. A loss of the class
gives each of its tokens 1 / T_c; over a step these weights sum to 1 where T_c is that of the step. Printed is their
sum, mean and standard deviation over steps in which there are pictures, when every micro-batch weighs the same.
"""

from __future__ import annotations

import argparse
import statistics

import torch
from _report import machine, versions

from equipoise.policies.estimators import ESTIMATORS, LoadHistory
from equipoise.policies.token_classes import class_load, of_class

LENGTH, STEPS = 256, 1000
CASES = ((8, 4, 0.3), (8, 4, 0.05), (32, 4, 0.3), (4, 16, 0.3))  # micro-batches, their sequences, how many show one
NAMES = ("exact", "filled", "prefix", "ema", "previous")


def sums(micro_batches: int, sequences: int, share: float) -> dict[str, list[float]]:
    """Of each estimator the sum of the weights in each step after the first."""
    draw = torch.Generator().manual_seed(0)
    tokens, history = float(sequences * LENGTH), LoadHistory()
    found: dict[str, list[float]] = {name: [] for name in NAMES}
    for _ in range(STEPS):
        size = (micro_batches, sequences)
        shows = torch.rand(size, generator=draw) < share
        part = 0.1 + 0.8 * torch.rand(size, generator=draw)
        own = (LENGTH * part * shows).floor().double().sum(dim=1)
        if not own.any():
            continue
        one = torch.tensor([tokens], dtype=torch.float64)
        loads = [class_load(one, mine.view(1), one[0], mine) for mine in own]
        first, weights = history.previous_E is None, dict.fromkeys(NAMES, 0.0)
        for number, (load, mine) in enumerate(zip(loads, own.tolist(), strict=True), start=1):
            history.add_micro_step(load)
            history.counted_E = torch.stack(loads).sum(dim=0)
            for name in NAMES:
                estimate = ESTIMATORS[name](history, 0.9, number)
                if estimate is not None and mine:
                    weights[name] += mine / tokens / micro_batches / float(of_class(estimate)[1])
        history.commit(torch.stack(loads).sum(dim=0), {0.9})
        for name in () if first else NAMES:
            found[name].append(weights[name])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args()
    print(f"{machine()}, {versions('torch')}")
    print(f"{'M':>3} {'sequences':>9} {'share':>6}  " + "  ".join(f"{name:>12}" for name in NAMES))
    for micro_batches, sequences, share in CASES:
        found = sums(micro_batches, sequences, share)
        cells = (f"{statistics.fmean(one):.2f} +- {statistics.stdev(one):.2f}" for one in found.values())
        print(f"{micro_batches:3} {sequences:9} {share:6}  " + "  ".join(f"{cell:>12}" for cell in cells))


if __name__ == "__main__":
    main()
