"""A training step of the lab against one of transformers' Trainer: the same model, weights, text, threads, precision.

    python benchmarks/trainer_speed.py            # bf16 and fp32, one thread
    python benchmarks/trainer_speed.py --threads 2 --precision bf16
    python benchmarks/trainer_speed.py --theirs default:32 eager:32 grouped_mm:4
    python benchmarks/trainer_speed.py --where    # only where our time goes

Qwen3-MoE, 3 layers of width 128, 16 experts top-2, vocabulary 2048, 32
sequences of 256 tokens a step, AdamW, gradients clipped. Each contestant is a
process of its own that makes one step when it is told to; they take turns in a
changing order. "theirs" is IMPLEMENTATION:SEQUENCES, the Trainer with
experts_implementation and per_device_train_batch_size (the rest is
accumulated), output_router_logits=True; "ours" is the lab with the strategy
micro, and with global (load of the whole step). All balance with coefficient
0.02. Before its first step each says its loss on the first batch, without the
balance loss: they have to agree, or the benchmark stops.

With one thread times are CPU time, so that neighbours count little; with more,
wall time. Median and quartiles of a contestant's steps; ratios are of one
round, theirs over ours.

The table of where our time goes is from torch's profiler: backward counts where
its forward stood. The floor is floating-point operations over the rate that one
large product reaches on the same thread. Attention is counted whole, above the
diagonal too.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from _report import add_json, figure, quartiles, save

COEFFICIENT = 0.02
OURS = ["micro", "global"]
PRODUCTS = ("aten::mm", "aten::bmm", "aten::baddbmm", "aten::baddbmm_", "aten::addmm", "aten::addmm_")
PARTS = ("attention", "experts", "router", "loss", "norms", "embedding", "optimizer")
AGREE = {"fp32": 1e-4, "bf16": 1e-2}


def configuration(precision: str, threads: int, strategy: str = "micro") -> Any:
    from equipoise.lab.config.schema import ModelConfig, RunConfig, TrainConfig

    train = TrainConfig(precision=precision, threads=threads, fidelity_every=0, eval_every=0, checkpoint_every=0,
                        tensorboard=False)  # fmt: skip
    model = ModelConfig(layers=3, width=128, heads=4, experts=16, expert_hidden=128)
    return RunConfig(model=model, train=train, strategy=f"{strategy}@{COEFFICIENT}")


@contextmanager
def lab(config: Any) -> Iterator[Any]:
    """A run of the lab, before its first step."""
    import torch

    from equipoise.lab.training.distributed import join
    from equipoise.lab.training.process import keep_freed_memory
    from equipoise.lab.training.trainer import _Run

    torch.set_num_threads(config.train.threads)
    keep_freed_memory()
    with TemporaryDirectory() as folder, join() as context:
        run = _Run(config, Path(folder), context)
        run.start(None)
        try:
            yield run
        finally:
            run.close()


# ------------------------------------------------------------------------------------------- one contestant


def contest(turn: Callable[[], None], threads: int) -> None:
    """Answers every line with the seconds of one turn, until there are no more."""
    clock = time.process_time if threads == 1 else time.perf_counter
    for _ in sys.stdin:
        began = clock()
        turn()
        print(json.dumps(clock() - began), flush=True)


def ours(strategy: str, precision: str, threads: int) -> None:
    with lab(configuration(precision, threads, strategy)) as run:
        first = [tokens_BS for tokens_BS, _ in run.batches.step(0)]
        losses = [run.model.token_losses(tokens_BS[:, :-1], tokens_BS[:, 1:]).mean().item() for tokens_BS in first]
        print(json.dumps(statistics.mean(losses)), flush=True)
        contest(run.train_step, threads)


def theirs(setting: str, precision: str, threads: int) -> None:
    """The Trainer as it comes; a callback waits for a line before a step, and says what the one before took."""
    import torch
    import transformers
    from torch.utils.data import SequentialSampler

    from equipoise.lab.data.packing import BatchSampler, prepare
    from equipoise.lab.models.hf_weights import hugging_face_config, to_hugging_face
    from equipoise.lab.models.transformer import LanguageModel

    torch.set_num_threads(threads)
    implementation, each = setting.split(":")
    config = configuration(precision, threads)
    settings = hugging_face_config(config.model, max_positions=512)
    settings |= {"output_router_logits": True, "router_aux_loss_coef": COEFFICIENT}
    model = transformers.Qwen3MoeForCausalLM(transformers.Qwen3MoeConfig(**settings))
    model.load_state_dict(
        to_hugging_face(LanguageModel(config.model, seed=config.train.seed).state_dict(), config.model)
    )
    if implementation != "default":
        model.set_experts_implementation(implementation)
    batches = BatchSampler(prepare(), seed=config.train.seed, sequences_per_micro_batch=1, micro_batches=32)
    rows = [tokens_S for step in range(40) for one in batches.step(step) for tokens_S in one.tokens_BS]
    data = [{"input_ids": row[:-1], "labels": row[1:], "shift_labels": row[1:]} for row in rows]
    with torch.no_grad():
        batch = {name: torch.stack([row[name] for row in data[:32]]) for name in data[0]}
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            found = model(**batch)
        print(json.dumps((found.loss - COEFFICIENT * found.aux_loss).item()), flush=True)

    class Turns(transformers.TrainerCallback):
        began: float | None = None

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            clock = time.process_time if threads == 1 else time.perf_counter
            if self.began is not None:
                print(json.dumps(clock() - self.began), flush=True)
            if not sys.stdin.readline():
                os._exit(0)
            self.began = clock()

    class InOrder(transformers.Trainer):
        def _get_train_sampler(self, train_dataset: Any = None) -> SequentialSampler:  # noqa: ARG002, theirs calls it so
            return SequentialSampler(data)  # type: ignore[arg-type]

    with TemporaryDirectory() as folder:
        arguments = transformers.TrainingArguments(
            folder, per_device_train_batch_size=int(each), gradient_accumulation_steps=32 // int(each), max_steps=40,
            learning_rate=3e-3, weight_decay=0.1, adam_beta2=0.95, bf16=precision == "bf16", use_cpu=True, report_to=[],
            save_strategy="no", logging_strategy="no", disable_tqdm=True, remove_unused_columns=False,
        )  # fmt: skip
        InOrder(model, arguments, train_dataset=data, callbacks=[Turns()]).train()  # type: ignore[arg-type]


# ------------------------------------------------------------------------------------------- the race


class Contestant:
    def __init__(self, side: str, setting: str, precision: str, threads: int) -> None:
        self.name, self.times = f"{side} {setting}", []
        command = [sys.executable, __file__, "--child", side, setting, precision, str(threads)]
        environment = os.environ | {"OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false"}
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
                                        stderr=subprocess.DEVNULL, env=environment)  # fmt: skip
        self.loss = self.answer()

    def answer(self) -> float:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            try:
                return float(line)
            except ValueError:  # the Trainer says something
                continue
        raise SystemExit(f"{self.name} ended: run its command by itself, {self.process.args}")

    def step(self) -> float:
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        return self.answer()

    def end(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def race(precision: str, threads: int, settings: list[str], rounds: int) -> dict[str, Any]:
    """Prints who took how long, and returns it as a figure."""
    entries = [("theirs", one) for one in settings] + [("ours", one) for one in OURS]
    contestants = [Contestant(*entry, precision, threads) for entry in entries]
    low, high = (pick(one.loss for one in contestants) for pick in (min, max))
    if high - low > AGREE[precision]:
        raise SystemExit(f"not the same model: first losses {[(one.name, one.loss) for one in contestants]}")
    for one in contestants:
        for _ in range(2):  # the first steps make buffers, and learn
            one.step()
    for _ in range(rounds):
        for one in random.sample(contestants, len(contestants)):
            one.times.append(one.step())
    for one in contestants:
        one.end()
    tokens = 32 * 256
    print(f"\n{precision}, {threads} thread(s), {rounds} rounds; first loss {low:.4f} to {high:.4f}")
    print(f"{'':24}{'s/step: median, quartiles':>28}{'tokens/s':>10}   theirs / ours: micro, global")
    for one in contestants:
        low, middle, high = statistics.quantiles(one.times, n=4)
        print(f"{one.name:24}{middle:12.3f}   {low:.3f}-{high:.3f}{tokens / middle:10,.0f}", end="   ")
        if one.name.startswith("theirs"):
            for other in contestants[-2:]:
                ratios = [a / b for a, b in zip(one.times, other.times, strict=True)]
                low, middle, high = statistics.quantiles(ratios, n=4)
                print(f"{middle:.2f}x {low:.2f}-{high:.2f}", end="  ")
        print()
    bars = [
        (one.name.replace("theirs", "transformers' Trainer,").replace("ours", "the lab,"), quartiles(one.times))
        for one in contestants
    ]
    return figure(f"A training step, {precision}, {threads} thread(s)", "seconds", bars)


# ------------------------------------------------------------------------------------------- where our time goes


def flops(model: Any, tokens: int, length: int) -> dict[str, float]:
    """Floating-point operations of a step: 2 for a number of a weight and token, backward twice forward."""
    c = model.config
    heads, both = c.heads * c.head_dim, 2 * (c.kv_heads or c.heads) * c.head_dim
    each = {"attention": c.width * (2 * heads + both) + 2 * length * heads, "router": c.width * c.experts,
            "experts": c.top_k * 3 * c.width * c.expert_hidden}  # fmt: skip
    return {name: 6 * tokens * c.layers * size for name, size in each.items()} | {
        "loss": 6 * tokens * c.width * c.vocab_size
    }


def named(name: str, function: Callable) -> Callable:
    import torch

    def call(*arguments: Any, **more: Any) -> Any:
        with torch.profiler.record_function(f"part:{name}"):
            return function(*arguments, **more)

    return call


def name_parts(model: Any, optimizer: Any) -> None:
    from equipoise.lab.models import transformer as module

    module.linear_cross_entropy = named("loss", module.linear_cross_entropy)
    optimizer.step = named("optimizer", optimizer.step)
    model.model.embed_tokens.forward = named("embedding", model.model.embed_tokens.forward)
    for layer in model.model.layers:
        for norm in (layer.input_layernorm, layer.post_attention_layernorm):
            norm.forward = named("norms", norm.forward)
        layer.self_attn.forward = named("attention", layer.self_attn.forward)
        layer.mlp.gate.forward = named("router", layer.mlp.gate.forward)
        layer.mlp.experts.forward = named("experts", layer.mlp.experts.forward)
    model.model.norm.forward = named("norms", model.model.norm.forward)


def where(precision: str, steps: int = 3) -> None:
    """Self time of every operator, by the part of the model around it; of backward, around its forward."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    with lab(configuration(precision, 1, "global")) as run:
        name_parts(run.model, run.optimizer)
        for _ in range(3):
            run.train_step()
        began = time.process_time()
        for _ in range(steps):
            run.train_step()
        plain = (time.process_time() - began) / steps
        with profile(activities=[ProfilerActivity.CPU]) as found:
            for _ in range(steps):
                run.train_step()
        counted = flops(run.model, run.batches.tokens_per_step, 256)
    events = list(found.events() or [])

    def part_of(event: Any) -> str | None:
        while event is not None:
            if event.name.startswith("part:"):
                return event.name[5:]
            event = event.cpu_parent
        return None

    def forward_of(event: Any) -> int | None:
        while event is not None:
            if event.scope == 1 and event.sequence_nr >= 0:  # a node of backward
                return event.sequence_nr
            event = event.cpu_parent
        return None

    made = {e.sequence_nr: part for e in events if e.scope == 0 and e.sequence_nr >= 0 and (part := part_of(e))}
    spent: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
    for event in events:
        part = part_of(event) or made.get(forward_of(event) or -1) or "rest"
        spent[part][event.name not in PRODUCTS] += event.self_cpu_time_total / steps / 1e3
    kinds = {"fp32": torch.float32, precision: torch.bfloat16 if precision == "bf16" else torch.float32}
    rate = {name: product_rate(kind) for name, kind in kinds.items()}  # bf16 only if asked: it takes minutes on AVX2
    print(f"\nWhere a step of ours goes: {precision}, strategy global, one thread; milliseconds")
    print(f"{'':12}{'products':>10}{'the rest':>10}{'all':>8}{'floor':>8}   (of products, at "
          f"{rate[precision] / 1e9:.0f} GFLOP/s)")  # fmt: skip
    for part in (*PARTS, "rest"):
        products, rest = spent[part]
        floor = counted.get(part, 0) / rate["fp32" if part == "router" else precision] * 1e3
        print(f"{part:12}{products:10.0f}{rest:10.0f}{products + rest:8.0f}{floor:8.0f}")
    products, rest = (sum(column) for column in zip(*spent.values(), strict=True))
    total = sum(counted.values()) / rate[precision] * 1e3
    print(f"{'all':12}{products:10.0f}{rest:10.0f}{products + rest:8.0f}{total:8.0f}", end="   ")
    print(f"without profiler: {plain * 1e3:.0f}")
    print("rest: data, casts and sums between the parts, the balancer's bookkeeping, the record")


def product_rate(dtype: Any) -> float:
    """Of one large product, operations a second, the best of ten."""
    import torch

    left, right = torch.randn(2048, 1024).to(dtype), torch.randn(1024, 1024).to(dtype)
    best = float("inf")
    for _ in range(10):
        began = time.process_time()
        torch.mm(left, right)
        best = min(best, time.process_time() - began)
    return 2 * 2048 * 1024 * 1024 / best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--precision", nargs="+", default=["bf16", "fp32"], choices=["bf16", "fp32"])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--theirs", nargs="+", default=["default:32"], metavar="IMPLEMENTATION:SEQUENCES")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--where", action="store_true", help="only the table of where our time goes")
    parser.add_argument("--child", nargs=4, help=argparse.SUPPRESS)
    add_json(parser)
    arguments = parser.parse_args()
    if arguments.child:
        side, setting, precision, threads = arguments.child
        {"ours": ours, "theirs": theirs}[side](setting, precision, int(threads))
        return
    import torch
    import transformers

    print(f"{platform.processor() or platform.machine()}, torch {torch.__version__}, transformers "
          f"{transformers.__version__}, Python {platform.python_version()}")  # fmt: skip
    if not arguments.where:
        races = [
            race(precision, arguments.threads, arguments.theirs, arguments.rounds) for precision in arguments.precision
        ]
        save(arguments.json, races)
    where(arguments.precision[0])


if __name__ == "__main__":
    main()
