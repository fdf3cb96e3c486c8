"""What a balancer costs in a training step of a transformers model, on a CPU.

    python benchmarks/hf_cost.py                        # all, about ten minutes
    python benchmarks/hf_cost.py calls
    python benchmarks/hf_cost.py step --rounds 30
    python benchmarks/hf_cost.py step --sizes 128,16,2,4,2048 256,64,8,4,2048
    python benchmarks/hf_cost.py memory --tokens 2048

step: forward, backward and optimizer step (SGD, the cheapest, so that nothing
    is hidden behind it) of a Qwen3-MoE: plain; with a Balancer and one
    global-batch loss; the same without its gradient norms; with the bias
    rule's counting only; and with the model's own loss instead
    (output_router_logits=True). All models have the same weights and text, and
    take turns in a changing order. Times are CPU time of this process, so that
    neighbours count little; a ratio is that of one round, and what is printed
    is the median, its 95 % interval (from the ranks of the rounds, nothing
    assumed) and the quartiles. Sizes are hidden,E,K,L,T. "own / ours" is how
    much the model's own loss adds, divided by how much we add.
calls: how many torch operations each adds, per layer and once a step, counted.
    A small operation costs a few microseconds whatever it computes, so in
    small models this is the cost.
memory: bytes that are kept for backward between forward and backward (every
    storage once, as autograd's own hooks see them), and the most that is alive
    at any moment. Plain subtracted, per layer and token and per token once,
    from two depths; with and without gradient checkpointing.

The same loss computed by itself from what routers return, at 24 layers x 64
experts x 8192 tokens: `python benchmarks/balance_cost.py loss`.
"""

from __future__ import annotations

import argparse
import gc
import platform
import random
import statistics
import time
import warnings
import weakref
from collections.abc import Callable
from typing import Any

import torch
import transformers
from balance_cost import Live
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, Qwen3MoeConfig

from equipoise import AuxLoss, Balancer, ExpertBias

SIZES = ["64,8,2,2,1024", "128,16,2,4,1024", "256,32,4,4,1024", "256,64,8,8,1024", "512,64,8,4,2048", "64,64,8,24,1024"]
VARIANTS = ["plain", "ours", "no norms", "bias", "own"]
VOCABULARY, LENGTH = 1024, 256


def build(variant: str, hidden: int, experts: int, top_k: int, layers: int) -> tuple[Any, Balancer | None]:
    torch.manual_seed(0)
    heads = {"num_attention_heads": max(1, hidden // 64), "num_key_value_heads": max(1, hidden // 128), "head_dim": 64}
    sizes = {"hidden_size": hidden, "moe_intermediate_size": 3 * hidden // 8, "num_hidden_layers": layers}
    routing = {"num_experts": experts, "num_experts_per_tok": top_k, "output_router_logits": variant == "own"}
    config = Qwen3MoeConfig(vocab_size=VOCABULARY, use_cache=False, **heads, **sizes, **routing)
    model = AutoModelForCausalLM.from_config(config).train()
    loss = AuxLoss("global_batch", coef=1e-3)
    match variant:
        case "ours":
            return model, Balancer(model, [loss])
        case "no norms":
            return model, Balancer(model, [loss], gradient_norms=False)
        case "bias":
            return model, Balancer(model, [ExpertBias("rms", rate=1e-4)], gradient_norms=False)
    return model, None


def text(tokens: int) -> dict[str, Tensor]:
    ids = torch.randint(VOCABULARY, (max(1, tokens // LENGTH), min(LENGTH, tokens)))
    return {"input_ids": ids, "labels": ids}


# ---------------------------------------------------------------- time


def stepper(variant: str, size: tuple[int, ...]) -> Callable[[], float]:
    """One training step; returns its CPU seconds."""
    *shape, tokens = size
    model, balancer = build(variant, *shape)
    optimizer, batch = torch.optim.SGD(model.parameters(), lr=1e-4), text(tokens)

    def step() -> float:
        start = time.process_time()
        loss = model(**batch).loss
        (balancer.tap(loss) if balancer else loss).backward()
        optimizer.step()
        optimizer.zero_grad()
        return time.process_time() - start

    return step


def interval(values: list[float]) -> tuple[float, float]:
    """95 % of the median: the ranks between which it lies whatever the distribution."""
    ordered, n = sorted(values), len(values)
    reach = int(0.98 * n**0.5) + 1
    return ordered[max(0, n // 2 - reach)], ordered[min(n - 1, n // 2 + reach)]


def show_step(arguments: argparse.Namespace) -> None:
    print(
        f"CPU time of a step against plain, {arguments.rounds} rounds: median [95 %] (quartiles); then what each adds\n"
    )
    for size in arguments.sizes:
        steps = {variant: stepper(variant, size) for variant in VARIANTS}
        times: dict[str, list[float]] = {variant: [] for variant in VARIANTS}
        for index in range(arguments.rounds + 2):
            for variant in random.sample(VARIANTS, len(VARIANTS)):
                gc.collect()
                took = steps[variant]()
                if index >= 2:
                    times[variant].append(took)
        hidden, experts, top_k, layers, tokens = size
        plain = statistics.median(times["plain"])
        shape = f"hidden {hidden}, {experts} experts top-{top_k}, {layers} layers, {tokens} tokens"
        print(f"{shape}: {1e3 * plain:.0f} ms plain")
        added: dict[str, float] = {}
        for variant in VARIANTS[1:]:
            ratios = [a / b for a, b in zip(times[variant], times["plain"], strict=True)]
            low, middle, high = statistics.quantiles(ratios, n=4)
            from_, to = interval(ratios)
            added[variant] = (middle - 1) * plain
            each = 1e6 * added[variant] / layers
            print(f"{variant:>10}  {middle:.3f}x [{from_:.3f}-{to:.3f}] ({low:.3f}-{high:.3f})  {each:6.0f} us a layer")
        if added["ours"] > 0:
            print(f"{'own / ours':>10}  {added['own'] / added['ours']:.1f}x")
        print(flush=True)


# ---------------------------------------------------------------- calls


class Calls(TorchDispatchMode):
    """Counts torch operations."""

    number = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.number += 1
        return func(*args, **(kwargs or {}))


def calls_of(variant: str, layers: int) -> int:
    """Torch operations of a training step."""
    step, calls = stepper(variant, (64, 8, 2, layers, 64)), Calls()
    step()
    with calls:
        step()
    return calls.number


def show_calls(_arguments: argparse.Namespace) -> None:
    print("Torch operations of a step beyond plain\n")
    plain = [calls_of("plain", layers) for layers in (2, 4)]
    for variant in VARIANTS[1:]:
        few, more = (calls_of(variant, layers) - without for layers, without in zip((2, 4), plain, strict=True))
        print(f"{variant:>10}  {(more - few) / 2:.0f} a layer, {2 * few - more:.0f} once")
    print()


# ---------------------------------------------------------------- memory


def kept_and_most(variant: str, shape: tuple[int, ...], tokens: int, *, recompute: bool) -> tuple[int, int]:
    """(bytes kept for backward after forward, the most that is alive in both)."""
    model, balancer = build(variant, *shape)
    if recompute:
        model.gradient_checkpointing_enable()
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    saved: list[weakref.ref] = []  # of a graph that is dropped during forward nothing may be held, or counted

    def note(tensor: Tensor) -> Tensor:
        saved.append(weakref.ref(tensor.untyped_storage()))
        return tensor

    batch = text(tokens)
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        loss = model(**batch).loss
    kept = {storage.data_ptr(): storage.nbytes() for one in saved if (storage := one()) is not None}
    number = sum(size for address, size in kept.items() if address not in own)
    (balancer.tap(loss) if balancer else loss).backward()
    model.zero_grad()
    if balancer:
        balancer.discard()
    live = Live()
    with live:
        loss = model(**batch).loss
        (balancer.tap(loss) if balancer else loss).backward()
    return number, live.most


def show_memory(arguments: argparse.Namespace) -> None:
    hidden, top_k = 128, 4
    print(f"Bytes beyond plain, {arguments.tokens} tokens, 4 and 8 layers; kept for backward, and at the peak\n")
    print(f"{'':>10} {'recompute':>10} {'experts':>8}   kept / layer, token   peak / layer, token  / token")
    for experts in (16, 64):
        for recompute in (False, True):
            cost = {
                (variant, layers): kept_and_most(
                    variant, (hidden, experts, top_k, layers), arguments.tokens, recompute=recompute
                )
                for variant in VARIANTS
                for layers in (4, 8)
            }
            for variant in VARIANTS[1:]:
                added = {n: [a - b for a, b in zip(cost[variant, n], cost["plain", n], strict=True)] for n in (4, 8)}
                kept, peak = ((added[8][i] - added[4][i]) / 4 / arguments.tokens for i in (0, 1))
                once = added[4][1] / arguments.tokens - 4 * peak
                said = f"{variant:>10} {'yes' if recompute else 'no':>10} {experts:8}"
                print(f"{said} {kept:20.1f} {peak:20.1f} {once:8.1f}", flush=True)


# ---------------------------------------------------------------- the command


def size(given: str) -> tuple[int, ...]:
    found = tuple(int(part) for part in given.split(","))
    if len(found) != 5 or min(found) < 1:
        raise argparse.ArgumentTypeError(f"expected hidden,E,K,L,T, got {given}; for example 128,16,2,4,1024")
    return found


PARTS = {"calls": show_calls, "step": show_step, "memory": show_memory}


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("part", nargs="*", metavar="part", help=f"{', '.join(PARTS)}; default: all")
    made.add_argument("--sizes", nargs="+", type=size, default=[size(s) for s in SIZES], metavar="hidden,E,K,L,T")
    made.add_argument("--rounds", type=int, default=20, help="each runs every model once")
    made.add_argument("--tokens", type=int, default=1024, help="of memory")
    return made


def main() -> None:
    arguments = parser().parse_args()
    if unknown := set(arguments.part) - set(PARTS):
        parser().error(f"expected {', '.join(PARTS)}, got {', '.join(sorted(unknown))}")
    warnings.simplefilter("ignore")  # that a bias of ours is not in the model's checkpoint
    torch.set_num_threads(1)
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}, Python {platform.python_version()}"
    print(f"{platform.processor() or platform.machine()}, one thread, {versions}\n")
    for name in arguments.part or PARTS:
        PARTS[name](arguments)


if __name__ == "__main__":
    main()
