"""Trainings by OLMo-core's own Trainer on a CPU, one after the other in the same ranks: what each saw goes to a file.

python record_olmo.py CASES.json OUT.pt, with the environment that torchrun gives
"""

from __future__ import annotations

import json
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
warnings.simplefilter("ignore")

from engines.olmo import record_shim  # noqa: E402

record_shim.install()

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from olmo_core.config import DType  # noqa: E402
from olmo_core.data.data_loader import DataLoaderBase  # noqa: E402
from olmo_core.distributed import parallel  # noqa: E402
from olmo_core.distributed.parallel import DataParallelType  # noqa: E402
from olmo_core.nn.attention import AttentionBackendName  # noqa: E402
from olmo_core.nn.moe.router import MoERouter, MoERouterGatingFunction  # noqa: E402
from olmo_core.nn.transformer import TransformerConfig  # noqa: E402
from olmo_core.optim import AdamWConfig, SkipStepAdamWConfig  # noqa: E402
from olmo_core.train import (  # noqa: E402
    Duration,
    TrainerConfig,
    prepare_training_environment,
    teardown_training_environment,
)
from olmo_core.train.callbacks import Callback, CheckpointerCallback  # noqa: E402
from olmo_core.train.train_module import TransformerTrainModuleConfig  # noqa: E402
from olmo_core.train.train_module.transformer.config import (  # noqa: E402
    TransformerActivationCheckpointingConfig,
    TransformerActivationCheckpointingMode,
    TransformerDataParallelConfig,
)

from engines._law import Law  # noqa: E402

EXPERTS, TOP_K, LAYERS, LENGTH, BATCH, LETTERS = 8, 2, 2, 8, 2, 64
DOCUMENTS = ([3, 5], [8, 0])  # lengths, of the sequences of a micro-batch
INDEX = {f"blocks.{layer}.feed_forward_moe.router": layer for layer in range(LAYERS)}


class Text(DataLoaderBase):
    """Random letters, other ones for each step and rank; sequences differ."""

    def __init__(self, case: dict[str, Any], folder: str) -> None:
        self.case, world = case, dist.get_world_size()
        tokens = BATCH * LENGTH * case.get("accumulation", 1) * world
        super().__init__(work_dir=folder, global_batch_size=tokens, dp_world_size=world, dp_rank=dist.get_rank())

    @property
    def total_batches(self) -> int:
        return 100

    def state_dict(self) -> dict[str, Any]:
        return {"batches": self.batches_processed}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.batches_processed = state_dict["batches"]

    def reshuffle(self, epoch: int | None = None, **_: Any) -> None:
        self._epoch = epoch or 1

    def _batch(self, seed: int) -> dict[str, Any]:
        draw = torch.Generator().manual_seed(seed)
        rows = BATCH * self.case.get("accumulation", 1)
        text = torch.randint(0, LETTERS, (rows, LENGTH), generator=draw)
        text[::2] %= 7
        batch: dict[str, Any] = {"input_ids": text}
        if labelled := self.case.get("labelled"):  # of the first sequences alone
            batch["label_mask"] = (torch.arange(rows) < labelled).unsqueeze(1).expand(-1, LENGTH)
        if self.case.get("documents"):  # without max_doc_lens: attention on a CPU does not mask them
            batch["doc_lens"] = torch.tensor([*DOCUMENTS] * (rows // 2))
        return batch

    def _iter_batches(self):
        while True:
            yield self._batch(1000 + self.batches_processed * self.dp_world_size + self.dp_rank)

    def get_mock_batch(self) -> dict[str, Any]:
        if not self.case.get("dry_run"):
            return super().get_mock_batch()  # which the Trainer takes for none
        return self._batch(7)

    def global_num_tokens_in_batch(self, batch: dict[str, Any]) -> int:
        return batch["input_ids"].numel() * self.dp_world_size


@dataclass
class Record(Callback):
    """Notes logits, gradients and loads, and adds the law to the loss of a training without equipoise."""

    case: Any = None
    priority: ClassVar[int] = -10  # after all others

    def pre_train(self) -> None:
        self.logits: list[list[torch.Tensor]] = []  # micro-batch -> layer
        self.gradients: dict[str, torch.Tensor] = {}
        self.loads: list[list[list[int]]] = []
        self.logged: list[dict[str, float]] = []
        self.live = False
        module = self.trainer.train_module
        self.forward, module.model_forward = module.model_forward, self._forward
        for router in routers(module.model):
            router.get_expert_logits = self._noted(router.get_expert_logits)

    def _noted(self, logits_of: Any) -> Any:
        def noted(x: torch.Tensor) -> torch.Tensor:
            z = logits_of(x)
            if self.live and torch.is_grad_enabled() and len(self.logits[-1]) < LAYERS:  # recompute comes again
                self.logits[-1].append(z)
            return z

        return noted

    @property
    def micro_batches(self) -> int:
        return self.case.get("accumulation", 1)

    def _forward(self, input_ids: torch.Tensor, labels: torch.Tensor | None = None, **named: Any) -> Any:
        if not self.live or not torch.is_grad_enabled():
            return self.forward(input_ids, labels=labels, **named)
        self.logits.append([])
        output = self.forward(input_ids, labels=labels, **named)
        if "law" not in self.case:
            return output
        if len(self.logits) % self.micro_batches == 1 % self.micro_batches:
            self.law = Law(self.case["law"], EXPERTS, TOP_K, self.case.get("gate", "softmax"))
        world = dist.get_world_size()  # the engine averages over ranks, and has divided by M
        tokens = BATCH * LENGTH * self.micro_batches * world
        law = world * self.law.loss(self.logits[-1], positions(self.case), tokens)
        return output._replace(loss=output.loss + law.to(output.loss.dtype))

    def pre_epoch(self) -> None:  # the dry run is over
        self.live = True

    def pre_optim_step(self) -> None:
        if not self.gradients:
            model = self.trainer.train_module.model
            self.gradients = {plain(name): whole(p.grad) for name, p in model.named_parameters() if p.grad is not None}

    def post_train_batch(self) -> None:
        if (balancer := balancer_of(self.trainer)) is not None and balancer.step_count:
            self.loads.append([counts_E.tolist() for counts_E in balancer.load()])

    def log_metrics(self, step: int, metrics: dict[str, float]) -> None:
        self.logged.append({"step": step, **metrics})


def balancer_of(trainer: Any) -> Any:
    return getattr(trainer.callbacks.get("balance"), "balancer", None)


def routers(model: torch.nn.Module) -> list[Any]:
    return [module for module in model.modules() if isinstance(module, MoERouter)]


def plain(name: str) -> str:
    return name.replace("_checkpoint_wrapped_module.", "").removeprefix("module.")


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).detach().clone()


def positions(case: dict[str, Any]) -> torch.Tensor:
    if not case.get("documents"):
        return torch.arange(LENGTH).expand(BATCH, -1)
    return torch.stack([torch.cat([torch.arange(size) for size in sizes]) for sizes in DOCUMENTS])


def train_module(case: dict[str, Any]) -> Any:
    torch.manual_seed(7)
    config = TransformerConfig.llama_like_moe(
        d_model=32, vocab_size=LETTERS, n_layers=LAYERS, n_heads=2, num_experts=EXPERTS, top_k=TOP_K,
        expert_hidden_size=32, dropless=not case.get("capacity"), capacity_factor=case.get("capacity"),
        lb_loss_weight=case.get("lb"), z_loss_weight=case.get("z"), attn_backend=AttentionBackendName.torch,
    )  # fmt: skip
    router = config.block.feed_forward_moe.router
    router.gating_function = MoERouterGatingFunction(case.get("gate", "softmax"))
    for name, value in case.get("router", {}).items():
        setattr(router, name, value)
    model = config.build(init_device="cpu")
    skips = case.get("skip_steps")
    optim = SkipStepAdamWConfig(lr=1e-2, rolling_interval_length=4, sigma_factor=6) if skips else AdamWConfig(lr=1e-2)
    recompute = None
    if mode := case.get("recompute"):
        recompute = TransformerActivationCheckpointingConfig(
            mode=TransformerActivationCheckpointingMode(mode), modules=case.get("modules")
        )
    spread = None
    if dist.get_world_size() > 1 and case.get("dp", "fsdp"):
        narrow = DType(case["param_dtype"]) if "param_dtype" in case else None
        spread = TransformerDataParallelConfig(name=DataParallelType(case.get("dp", "fsdp")), param_dtype=narrow)
    parallel._WORLD_MESH = None  # one training a process is what it expects
    module = TransformerTrainModuleConfig(
        rank_microbatch_size=BATCH * LENGTH, max_sequence_length=LENGTH, optim=optim, max_grad_norm=case.get("clip"),
        ac_config=recompute, dp_config=spread,
        autocast_precision=DType(case["autocast"]) if "autocast" in case else None,
    ).build(model)  # fmt: skip
    with torch.no_grad():
        for one in routers(module.model):
            one.weight.mul_(30)  # they prefer something
    return module


def train(case: dict[str, Any], folder: str) -> dict[str, Any]:
    record = Record(case=case)
    callbacks: dict[str, Any] = {"record": record}
    if "policies" in case:
        from equipoise.adapters.olmo_core import BalanceCallback

        callbacks["balance"] = BalanceCallback(case["policies"], layers=True, **case.get("options", {}))
    if case.get("save_at"):
        callbacks["checkpointer"] = CheckpointerCallback(
            save_interval=case["save_at"], save_async=False, pre_train_checkpoint=False
        )
    module = train_module(case)
    if case.get("skip_steps"):
        spike(module.optim, case["skip_steps"])
    config = TrainerConfig(
        save_folder=folder, no_checkpoints=not case.get("save_at"), no_evals=True, save_overwrite=True,
        max_duration=Duration.steps(case.get("steps", 1)), metrics_collect_interval=case.get("collect", 1),
        callbacks=callbacks,
    )  # fmt: skip
    trainer = config.build(module, Text(case, folder))
    trainer.fit()
    found: dict[str, Any] = {
        "gradients": record.gradients, "loads": record.loads, "logged": record.logged,
        "logits": [[z.detach() for z in layers] for layers in record.logits],
        "weights": {plain(name): whole(p) for name, p in module.model.named_parameters()},
        "bias": [getattr(one, "score_bias", None) for one in routers(module.model)],
        "state": sorted(module.model.state_dict()),
    }  # fmt: skip
    if (balancer := balancer_of(trainer)) is not None:
        balance = trainer.callbacks["balance"]
        found |= {"described": balance.describe(), "metrics": balancer.metrics(), "steps": balancer.step_count}
        found["console"] = trainer.callbacks["console_logger"].metrics
        balance.remove()
        found["left"] = [type(m).__name__ for m in module.model.modules() if "Carrier" in type(m).__name__]
    return found


def spike(optim: Any, at: int) -> None:
    """Lets the optimizer find the loss of one step far above the others, and none else."""
    optim.get_step_factor = lambda: torch.tensor(float(len(optim._losses) != at))


def main(cases: dict[str, dict[str, Any]], out: Path) -> None:
    found: dict[str, Any] = {}
    for name, case in cases.items():
        folder = str(out.parent / "runs" / case.get("folder", name).replace(" ", "-"))
        try:
            found[name] = train(case, folder)
        except Exception as error:
            if not case.get("fails"):
                raise
            found[name] = {"error": f"{type(error).__name__}: {error}"}
        dist.barrier()
    torch.save(found, out)


if __name__ == "__main__":
    torch.set_num_threads(1)
    prepare_training_environment(seed=7, backend="gloo")
    main(json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2]).absolute())
    teardown_training_environment()
