"""A user's loop over DeepSpeed's engine and its own MoE layers on CPUs, one training after the other, to a file.

python record_loop.py CASES.json RANK WORLD PORT OUT.pt
"""

from __future__ import annotations

import json
import os
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
warnings.simplefilter("ignore")

from engines._law import Law  # noqa: E402
from engines.deepspeed import record_shim  # noqa: E402

record_shim.install()

import deepspeed  # noqa: E402
from deepspeed.moe.layer import MoE  # noqa: E402
from deepspeed.moe.utils import split_params_into_different_moe_groups_for_optimizer as by_group  # noqa: E402
from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_grad  # noqa: E402

EXPERTS, LAYERS, LENGTH, BATCH, LETTERS, WIDTH = 8, 2, 16, 2, 128, 32


class Expert(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.up(x)))


class Model(nn.Module):
    def __init__(self, case: dict[str, Any]) -> None:
        super().__init__()
        self.recompute, self.own = case.get("recompute", False), case.get("l_aux", 0.0)
        options = {"k": 2, "drop_tokens": False, "top2_2nd_expert_sampling": False} | case.get("moe", {})
        self.embed = nn.Embedding(LETTERS, WIDTH)
        self.mix = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(LAYERS))
        self.moe = nn.ModuleList(MoE(WIDTH, Expert(), num_experts=EXPERTS, **options) for _ in range(LAYERS))
        self.head = nn.Linear(WIDTH, LETTERS, bias=False)

    def block(self, i: int, x: Tensor) -> tuple[Tensor, Tensor]:
        x = x + self.mix[i](x)
        y, l_aux, _ = self.moe[i](x)
        return x + y, l_aux

    def forward(self, text: Tensor, after: Tensor) -> Tensor:
        x, total = self.embed(text), torch.zeros(())
        for i in range(LAYERS):
            x, l_aux = checkpoint(self.block, i, x, use_reentrant=False) if self.recompute else self.block(i, x)
            total = total + l_aux
        return F.cross_entropy(self.head(x).flatten(0, 1), after.flatten()) + self.own * total


class Training:
    def __init__(self, case: dict[str, Any]) -> None:
        self.case, self.micro_batches = case, case.get("accumulation", 2)
        torch.manual_seed(7)
        model = Model(case)
        with torch.no_grad():
            for name, weight in model.named_parameters():
                if "experts" not in name:
                    dist.broadcast(weight, 0)
                if "wg" in name:
                    weight.mul_(5)
            torch.manual_seed(8 + dist.get_rank())  # DeepSpeed makes experts as copies of one; spread, ranks differ
            for name, weight in model.named_parameters():
                if "experts" in name:
                    weight.normal_(std=0.2)  # copies on several ranks are made alike by the engine
        groups = by_group({"params": list(model.parameters()), "name": "all"})
        config = {
            "train_micro_batch_size_per_gpu": BATCH, "gradient_accumulation_steps": self.micro_batches,
            "zero_optimization": {"stage": case.get("stage", 0)}, "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False, "steps_per_print": 1000, **case.get("config", {}),
        }  # fmt: skip
        optimizer = torch.optim.AdamW(groups, lr=1e-2)
        self.engine: Any = deepspeed.initialize(model=model, optimizer=optimizer, config=config)[0]
        self.balance: Any = None
        self.logits: list[Tensor] = []
        self.counts: list[Tensor] = []  # as the gates count, of each call in forward
        self.gradients: list[dict[str, Tensor]] = []

    def attach(self) -> None:
        if self.case.get("policies") is not None:
            from equipoise.adapters.deepspeed import DeepSpeedBalancer

            self.balance = DeepSpeedBalancer(self.engine, self.case["policies"])
        for layer in self.engine.module.moe:
            layer.deepspeed_moe.gate.register_forward_hook(self._note)

    def _note(self, gate: Any, given: Any, output: Any) -> None:
        if torch._C._current_graph_task_id() == -1 and self.engine.training:  # recompute comes again
            self.counts.append(output[-1].clone())
        if "law" in self.case:
            z_TE = F.linear(given[0].float(), gate.wg.weight.float())
            self.logits.append(z_TE.unflatten(0, (BATCH, LENGTH)))

    def text(self, step: int, m: int) -> tuple[Tensor, Tensor]:
        seed = 1000 * step + m * dist.get_world_size() + dist.get_rank()
        text = torch.randint(0, LETTERS, (BATCH, LENGTH + 1), generator=torch.Generator().manual_seed(seed))
        text[0] = text[0] % 11  # sequences that differ
        return text[:, :-1], text[:, 1:]

    def step(self, step: int) -> None:
        parts = self.micro_batches * dist.get_world_size()
        top_k = self.case.get("moe", {}).get("k", 2)
        precision = getattr(torch, self.case.get("precision", "float64"))
        law = Law(self.case["law"], EXPERTS, top_k, "softmax", precision) if "law" in self.case else None
        for m in range(self.micro_batches):
            self.logits.clear()
            loss = self.engine(*self.text(step, m))
            if law is not None:
                positions_BS = torch.arange(LENGTH).expand(BATCH, -1)
                loss = loss + parts * law.loss(self.logits, positions_BS, BATCH * LENGTH * parts)
            self.engine.backward(loss)
            if m == self.micro_batches - 1:
                names = [(n, p) for n, p in self.engine.module.named_parameters() if "experts" not in n]
                found = {name: safe_get_full_grad(weight) for name, weight in names}
                self.gradients.append({name: g.clone() for name, g in found.items() if g is not None})
            self.engine.step()


def train(case: dict[str, Any]) -> dict[str, Any]:
    try:
        training = Training(case)
        training.attach()
    except Exception as error:
        if not case.get("refused"):
            raise
        return {"error": str(error)}
    engine, first = training.engine, case.get("first_step", 0)
    engine.train()
    if case.get("load"):
        engine.load_checkpoint(case["load"])
        training.balance.load(case["load"])
    loads = []
    for step in range(case.get("steps", 1)):
        training.step(first + step)
        if training.balance is not None and training.balance.balancer.step_count:
            loads.append(training.balance.balancer.load())
    if case.get("save"):
        engine.save_checkpoint(case["save"])
        training.balance.save(case["save"])
    found = {name: safe_get_full_fp32_param(weight) for name, weight in engine.module.named_parameters()}
    weights = {n: (p if found[n] is None else found[n]).detach().clone() for n, p in engine.module.named_parameters()}
    told: dict[str, Any] = {}
    if (balance := training.balance) is not None:
        told = {"described": balance.describe(), "metrics": balance.balancer.metrics() if loads else {}}
        balance.remove()
        told["left"] = [name for name, _ in engine.module.named_modules() if "equipoise" in name]
    return {"gradients": training.gradients, "loads": loads, "weights": weights, "counts": training.counts,
            "state": list(engine.module.state_dict()), **told}  # fmt: skip


def main() -> None:
    cases, rank, world, port, out = sys.argv[1:]
    record_shim.as_rank(int(rank), int(world), port)
    torch.set_num_threads(1)
    deepspeed.init_distributed("gloo")
    found = {}
    for name, case in json.loads(Path(cases).read_text()).items():
        found[name] = train(case)
        print(f"{time.process_time():.1f} {name}", flush=True)
    torch.save(found, out)
    os._exit(0)  # gloo's threads may still talk


if __name__ == "__main__":
    main()
