"""What `equipoise inspect` adds to the bare forward pass.

    python benchmarks/inspect_cost.py                       # two models of random weights, about three minutes
    python benchmarks/inspect_cost.py --model FOLDER --device cuda

Each round times both in turn on the same windows, and the ratio is of each round's pair, so that a busy machine hurts
both alike: "bare" runs the model's body in evaluation and inference mode; "inspect" is what a round of an inspection
does, capture windows from the disk and all sums included. Saving, loading and concluding are not part of it. It is CPU
time on a CPU, wall time on a GPU.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _report import machine, pairs, span, versions

from equipoise.external.observe import capture
from equipoise.inspection.accumulator import Accumulator, Sizes
from equipoise.inspection.loading import LoadedModel, open_model
from equipoise.inspection.routers import find_routers
from equipoise.inspection.runner import Runner
from equipoise.inspection.windows import write_windows
from equipoise.lab.training.process import keep_freed_memory

VOCAB, LENGTH, BATCH = 4096, 512, 4


def lab_model(device: torch.device) -> LoadedModel:
    """A model of the lab: 3 layers, width 128, 16 experts, top-2, bf16."""
    from equipoise.lab.config.schema import ModelConfig
    from equipoise.lab.models.transformer import LanguageModel

    config = ModelConfig(layers=3, width=128, heads=4, experts=16, expert_hidden=128, vocab_size=VOCAB)
    model: Any = LanguageModel(config, compute_dtype=torch.bfloat16).to(device).eval()
    routers = find_routers(model, lambda: None)
    return LoadedModel("lab", model, routers, model.hidden, device, torch.bfloat16, VOCAB, None)


def qwen(device: torch.device) -> LoadedModel:
    """Qwen3-MoE with 2 layers of width 256, 64 experts, top-8: much narrower than any that is published, so dearer."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    config = Qwen3MoeConfig(
        vocab_size=VOCAB, hidden_size=256, moe_intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, num_experts=64, num_experts_per_tok=8, max_position_embeddings=LENGTH,
        use_cache=False, norm_topk_prob=True,
    )  # fmt: skip
    model: Any = Qwen3MoeForCausalLM(config)
    model.to(device, torch.bfloat16).eval()
    body: Any = model.base_model
    routers = find_routers(model, lambda: body(input_ids=torch.arange(32, device=device).view(1, 32)))
    return LoadedModel(
        "qwen3_moe", model, routers, lambda ids: body(input_ids=ids), device, torch.bfloat16, VOCAB, LENGTH
    )


def seconds(work: Callable[[], Any], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
        began = time.perf_counter()
        work()
        torch.cuda.synchronize()
        return time.perf_counter() - began
    began = time.process_time()
    work()
    return time.process_time() - began


def compare(name: str, loaded: LoadedModel, rounds: int, at_a_time: int, folder: Path) -> None:
    """Prints medians, quartiles and the median of the paired ratios."""
    draw = np.random.default_rng(0)
    domains = 2
    length = LENGTH
    zipf = 1 / np.arange(1, loaded.vocab_size + 1)
    ids = draw.choice(loaded.vocab_size, (domains, (rounds + 2) * at_a_time * length), p=zipf / zipf.sum())
    windows = write_windows(folder, lambda: iter([(f"domain{d}", ids[d]) for d in range(domains)]), length)
    sizes = Sizes(domains, windows.windows, windows.equal, length, BATCH, 0)
    accumulator = Accumulator(loaded.routers, sizes, windows.frequency(loaded.vocab_size), loaded.device)
    made = Runner(accumulator, windows, loaded, None, [], None, at_a_time)

    def bare(number: int) -> None:
        for domain in range(domains):
            given = windows.read(domain, number * at_a_time, (number + 1) * at_a_time)
            loaded.forward(torch.from_numpy(given).to(loaded.device))

    def inspected(number: int) -> None:
        with capture(loaded.routers) as seen:
            made._round(number, seen, {})

    times: dict[str, list[float]] = {"bare": [], "inspect": []}
    with torch.inference_mode():
        for number in range(rounds + 2):
            pair = [("bare", bare), ("inspect", inspected)]
            for label, work in pair if number % 2 else reversed(pair):
                took = seconds(lambda work=work, number=number: work(number), loaded.device)
                if number >= 2:  # warm
                    times[label].append(took)
    tokens = domains * at_a_time * length
    plain, full = (statistics.median(times[label]) for label in ("bare", "inspect"))
    both = span(pairs(times["inspect"], times["bare"]), digits=3)
    print(f"{name:<42}{tokens / plain:>10,.0f}{tokens / full:>10,.0f}  {both}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="a model folder or a run instead of the two models")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--pass-tokens", type=int, default=4096)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    keep_freed_memory()  # as an inspection does
    device = torch.device(arguments.device)
    at_a_time = BATCH * max(1, arguments.pass_tokens // (BATCH * LENGTH))
    print(
        f"{machine()}; {versions('torch', 'transformers')}; {arguments.threads} thread(s), {arguments.rounds} rounds\n"
    )
    print(f"{'tokens/s, median of pairs':<42}{'bare':>10}{'inspect':>10}  ratio, quartiles")
    made = {"lab, 3 x 16 experts top-2, width 128, bf16": lab_model, "qwen3_moe, 2 x 64 top-8, width 256, bf16": qwen}
    if arguments.model:
        made = {arguments.model.name: lambda device: open_model(arguments.model, device)}
    for name, make in made.items():
        with tempfile.TemporaryDirectory() as folder:
            compare(name, make(device), arguments.rounds, at_a_time, Path(folder))


if __name__ == "__main__":
    main()
