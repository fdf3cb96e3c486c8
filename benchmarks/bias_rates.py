"""How large a step a softmax gate can take: the MaxVio that a bias starts from, and what it goes on swinging by.

    python benchmarks/bias_rates.py                                   # a minute or two
    python benchmarks/bias_rates.py --experts 1024 --shares 0.1       # one size alone

Normal logits, those of each expert shifted once and for all by 0.7 of a standard deviation, are routed anew at each
step; nothing learns. A step is given as a share of a softmax score: of 1/E where the bias is added to scores, of any
score where it is added to logits. What remains after 100 steps is the mean over the last 20, beside what even routing
shows by chance alone.
"""

from __future__ import annotations

import argparse

import torch
from _report import machine, versions

from equipoise import ExpertBias
from equipoise.functional import maxvio, maxvio_noise_floor, route

SHARES = (0.01, 0.05, 0.1, 0.2, 0.5, 1.0)
SIZES = ((8, 2), (64, 8), (256, 8))
ASSIGNMENTS = 256  # per expert and step
SPREAD, STEPS, JUDGED, CHUNK = 0.7, 100, 20, 8192


def simulate(place: str, rate: float, experts: int, top_k: int, tokens: int, rule: str = "sign") -> list[float]:
    """MaxVio at each step."""
    generator = torch.Generator().manual_seed(0)
    policy = ExpertBias(rule, rate, place=place)
    bias_E, momentum_E = torch.zeros(experts), torch.zeros(experts, dtype=torch.float64)
    shift_E = SPREAD * torch.randn(experts, generator=generator)
    seen = []
    for step in range(STEPS):
        counts_E = torch.zeros(experts, dtype=torch.int64)
        for size in torch.full((tokens // CHUNK,), CHUNK).tolist() + [tokens % CHUNK] * (tokens % CHUNK > 0):
            logits_TE = torch.randn(size, experts, generator=generator) + shift_E
            counts_E += route(logits_TE, top_k, selection_bias_E=bias_E, bias_place=place).counts_E
        seen.append(float(maxvio(counts_E)))
        bias_E, momentum_E = policy.step(bias_E, counts_E, momentum_E, step)
    return seen


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--experts", type=int, help="one size alone")
    parser.add_argument("--top-k", type=int, default=8)
    parser.add_argument("--shares", type=float, nargs="+", default=SHARES, metavar="SHARE")
    args = parser.parse_args()
    print(machine(), versions(), sep="\n")
    titles = f"{'experts':>7} {'K':>2} {'bias on':<8} {'rule':<13} {'step 0':>7} {'chance':>7}"
    print(f"{titles}  after steps of a share of a score:")
    print(" " * 47 + "".join(f"{share:>7g}" for share in args.shares))
    for experts, top_k in [(args.experts, args.top_k)] if args.experts else SIZES:
        tokens = ASSIGNMENTS * experts // top_k
        for place, rule in (("scores", "sign"), ("logits", "sign"), ("logits", "proportional")):
            unit = experts if place == "scores" else 1
            runs = [simulate(place, share / unit, experts, top_k, tokens, rule) for share in args.shares]
            remains = "".join(f"{sum(seen[-JUDGED:]) / JUDGED:>7.2f}" for seen in runs)
            chance = maxvio_noise_floor(tokens, top_k, experts)
            print(
                f"{experts:>7} {top_k:>2} {place:<8} {rule:<13} {runs[0][0]:>7.2f} {chance:>7.2f} {remains}", flush=True
            )


if __name__ == "__main__":
    main()
