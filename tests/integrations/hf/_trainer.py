"""A real Trainer on a tiny MoE model, in one process or as one rank of several: what test_trainer_*.py run."""

from __future__ import annotations

import contextlib
import gc
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.data import Dataset, SequentialSampler

from _named import named
from _rounding import Float64
from contracts.law._model import policy as loss_policy
from integrations.hf.families import build

VOCABULARY, LENGTH, SAMPLES = 64, 10, 32
HOOKED = ("get_batch_samples", "evaluation_loop", "log", "_save", "_run_epoch", "_finalize_training", "backward")


def model(**config: Any) -> Any:
    from transformers import AutoModelForCausalLM, Qwen3MoeConfig

    torch.manual_seed(0)
    sizes = {"vocab_size": VOCABULARY, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64}
    experts = {"moe_intermediate_size": 8, "num_experts": 4, "num_experts_per_tok": 2}
    return AutoModelForCausalLM.from_config(Qwen3MoeConfig(**sizes | heads | experts | config))


class Text(Dataset):
    """Rows of uneven length, padded; of some the labels begin late, as behind a prompt."""

    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(i)
        ids = torch.randint(3, VOCABULARY, (LENGTH,), generator=generator)  # 0..2 are special in some families
        mask = (torch.arange(LENGTH) < 3 + i % 7).long()
        labels = ids.masked_fill((mask == 0) | (torch.arange(LENGTH) < i % 3), -100)
        return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def policy(description: dict) -> Any:
    from equipoise import ExpertBias

    if description["kind"] == "bias":
        return ExpertBias(**{key: value for key, value in description.items() if key != "kind"})
    return loss_policy(description)


class Recorder:
    """What a training gave: gradients and biases at each optimizer step, loads, logs, the end's weights."""

    def __init__(self, policies: list[dict], **options: Any) -> None:
        from transformers import TrainerCallback

        from equipoise.adapters.hf import BalanceCallback

        self.balance = BalanceCallback(named(policy(p) for p in policies), **options)
        self.gradients: list[dict[str, Tensor]] = []
        self.biases: list[dict[str, Tensor]] = []
        self.loads: list[list[list[int]]] = []
        recorder = self

        class Record(TrainerCallback):
            def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
                named = kwargs["model"].named_parameters()
                recorder.gradients.append({n: whole(p.grad).clone() for n, p in named if p.grad is not None})

            def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
                named = kwargs["model"].state_dict().items()
                recorder.biases.append(
                    {n: whole(b).clone().view(-1) for n, b in named if n.endswith("correction_bias")}
                )
                recorder.loads.append([counts_E.tolist() for counts_E in recorder.balance.balancer.load()])

        self.record = Record()
        self.callbacks = [self.balance, self.record]

    def result(self, trainer: Any) -> dict[str, Any]:
        built = trainer.accelerator.unwrap_model(trainer.model)
        return {
            "gradients": self.gradients,
            "biases": self.biases,
            "steps": self.loads,
            "loads": self.loads[-1],
            "logs": trainer.state.log_history,
            "weights": {n: whole(p).detach().clone() for n, p in built.named_parameters()},
            "coefficient": getattr(built, "router_aux_loss_coef", None),
            "own": [name for owner in (trainer, trainer.accelerator) for name in HOOKED if name in vars(owner)],
            "sharded": any(hasattr(p, "full_tensor") for p in built.parameters()),
        }


def whole(tensor: Tensor) -> Tensor:
    """All of a sharded tensor."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor  # type: ignore[operator]


def arguments_of(folder: str, batch: int, accumulate: int, steps: int, **more: Any) -> dict[str, Any]:
    return {
        "output_dir": folder, "per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulate,
        "max_steps": steps, "max_grad_norm": 0, "learning_rate": 1e-3, "lr_scheduler_type": "constant",
        "logging_steps": 1, "save_strategy": "no", "use_cpu": True, "report_to": [], "disable_tqdm": True,
        "dataloader_pin_memory": False,
    } | more  # fmt: skip


def quiet() -> None:
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.set_num_threads(1)


@contextlib.contextmanager
def little_garbage() -> Iterator[None]:
    """A Trainer collects garbage when it begins: not in all that pytest and the libraries hold, which takes longer."""
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def in_order(kind: Any = None) -> Any:
    """A Trainer that takes rows in their order."""
    from transformers import Trainer

    class InOrder(kind or Trainer):  # type: ignore[misc]
        def _get_train_sampler(self, *args: Any, **kwargs: Any) -> Any:
            return SequentialSampler(self.train_dataset)

    return InOrder


def make(
    policies: list[dict], batch: int, accumulate: int, steps: int, folder: str, **arguments: Any
) -> tuple[Any, Recorder]:
    """A Trainer with BalanceCallback, and what records it.

    Args:
        arguments: of TrainingArguments, and ``family`` (of families.py; else a Qwen3-MoE), ``config`` (of the model),
            ``model`` (used as it is), ``prepare`` (a function of it), ``sharded`` (FSDP2), ``trainer`` (keywords of
            the Trainer), ``kind`` (a subclass of it), ``balance`` (keywords of BalanceCallback).
    """
    from transformers import TrainingArguments

    quiet()
    family, config, sharded = (arguments.pop(key, None) for key in ("family", "config", "sharded"))
    options, prepare, kind, balance = (arguments.pop(k, None) for k in ("trainer", "prepare", "kind", "balance"))
    built = arguments.pop("model", None) or (build(family, **config or {}) if family else model(**config or {}))
    if prepare is not None:
        built = prepare(built) or built
    more = fsdp(built) if sharded else {}
    args = TrainingArguments(**arguments_of(folder, batch, accumulate, steps, **more | arguments))
    if sharded:
        let_accelerate_shard(args)
    recorder = Recorder(policies, **balance or {})
    options = {"train_dataset": Text(), "eval_dataset": Text()} | (options or {})
    options["callbacks"] = [*recorder.callbacks, *options.pop("callbacks", [])]
    return in_order(kind)(None if "model_init" in options else built, args, **options), recorder


def train(
    policies: list[dict], batch: int, accumulate: int, steps: int, folder: str | None = None, **arguments: Any
) -> dict[str, Any]:
    """One training, from ``resume`` on, with ``float64`` (of a family) in no other type; see ``make``."""
    resume, wide = (arguments.pop(key, None) for key in ("resume", "float64"))
    if wide:
        arguments["model"] = build(arguments["family"]).double()
        arguments["model"].set_experts_implementation("eager")  # grouped_mm knows no float64
    width = Float64() if wide else contextlib.nullcontext()
    with width, little_garbage(), tempfile.TemporaryDirectory() as scratch:
        trainer, recorder = make(policies, batch, accumulate, steps, folder or scratch, **arguments)
        trainer.train(resume_from_checkpoint=resume)
        return recorder.result(trainer)


def fsdp(built: Any) -> dict[str, Any]:
    """FSDP2 in the words of TrainingArguments, one shard unit per layer."""
    layers = {type(m).__name__ for n, m in built.named_modules() if n.rpartition(".")[2] in ("0", "1")}
    layers = {name for name in layers if name.endswith("DecoderLayer")}
    assert layers, "no decoder layer to shard"
    return {"fsdp": True, "fsdp_config": {"version": 2, "transformer_layer_cls_to_wrap": sorted(layers)}}


def let_accelerate_shard(args: Any) -> None:
    """accelerate 1.15 passes over ``fsdp`` on a CPU without a word; only its look at the device is changed here."""
    from accelerate.state import PartialState
    from accelerate.utils import DistributedType

    assert args.device.type == "cpu"  # sets PartialState up
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU


@contextlib.contextmanager
def as_rank() -> Iterator[None]:
    """accelerate finds the process group that runs."""
    from accelerate.state import AcceleratorState, PartialState

    rank = str(dist.get_rank())
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": str(dist.get_world_size()), "ACCELERATE_USE_CPU": "true"}
    names |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}  # asked for, not used: the process group is there
    before = dict(os.environ)
    os.environ |= names
    try:
        yield
    finally:
        AcceleratorState._reset_state(True)
        PartialState._reset_state()
        os.environ.clear()
        os.environ |= before


def train_rank(policies: list[dict], batch: int, accumulate: int, steps: int, arguments: dict) -> dict[str, Any]:
    """The same as one rank of the process group that runs."""
    with as_rank():
        return train(policies, batch, accumulate, steps, **arguments)


def checkpoint(folder: Path, step: int) -> str:
    return str(folder / f"checkpoint-{step}")


STEP_POLICIES: list[dict] = [{"scope": "sequence", "coef": 0.3}, {"scope": "global_batch", "coef": 0.3}]


def ddp_step(sequences: int, tokens: int) -> dict[str, Tensor]:
    """One rank's half of a step of a model inside DDP; its gradients."""
    from torch.nn.parallel import DistributedDataParallel

    from equipoise import AuxLoss, Balancer

    torch.set_num_threads(1)
    net: Any = DistributedDataParallel(model())
    balancer = Balancer(net, named(AuxLoss(**p) for p in STEP_POLICIES))
    balancer.begin_step(tokens=tokens, micro_batches=1)
    half = sequences // dist.get_world_size()
    rows = [Text()[i] for i in range(half * dist.get_rank(), half * (dist.get_rank() + 1))]
    batch = {key: torch.stack([row[key] for row in rows]) for key in rows[0]}
    net.train()
    balancer.tap(net(**batch).logits.square().mean()).backward()
    return {n.removeprefix("module."): p.grad.clone() for n, p in net.named_parameters()}
