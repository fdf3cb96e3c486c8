"""torchtitan's own Trainer on a tiny Qwen3-MoE, each training recorded: see `engines.torchtitan.record`."""

from __future__ import annotations

import gc
import importlib.util
import io
import logging
import os
import time
import warnings
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.tensor import DTensor, distribute_tensor
from torchtitan.components.checkpointer import CheckpointManager
from torchtitan.components.dataloader import BaseDataLoader
from torchtitan.components.loss import BaseLoss, ChunkedLossWrapper, CrossEntropyLoss
from torchtitan.components.metrics import MetricsProcessor
from torchtitan.components.optimizer import LRSchedulersContainer, default_adamw
from torchtitan.components.tokenizer import BaseTokenizer
from torchtitan.components.validate import Validator
from torchtitan.config.configs import (
    CompileConfig,
    DebugConfig,
    ParallelismConfig,
    TrainingConfig,
)
from torchtitan.distributed.activation_checkpoint import FullAC, SelectiveAC
from torchtitan.models import qwen3
from torchtitan.models.common.attention import ScaledDotProductAttention
from torchtitan.models.common.embedding import Embedding
from torchtitan.models.common.linear import Linear
from torchtitan.models.common.moe import GroupedExperts, MoE
from torchtitan.models.common.rope import CosSinRoPE
from torchtitan.models.qwen3.model import Qwen3Model
from torchtitan.tools.logging import init_logger, logger
from torchtitan.trainer import Trainer

from engines import _law as law
from engines.torchtitan import record_shim
from equipoise.adapters.torchtitan import balanced

EXPERTS, TOP_K, LENGTH, ROWS, LETTERS, LAYERS = 8, 2, 16, 2, 128, 2


@dataclass(kw_only=True)
class Case:
    """One training.

    Args:
        policies: as a file has them; None: torchtitan alone.
        reference: torchtitan alone, with the balance losses of ``policies`` written out in float64.
        upstream: a file with ``register_global_batch_loss``, which torchtitan is then given.
        whole: experts in float32, not in torchtitan's bfloat16.
        own: MoE.Config.load_balance_coeff.
        saves: a checkpoint after each so many steps; 0: none.
        folder: where checkpoints lie; default: a folder of its own, so that nothing is resumed.
    """

    name: str
    policies: list[Any] | None = None
    reference: bool = False
    upstream: str = ""
    whole: bool = False
    own: float | None = None
    gate: str = "softmax"
    accumulate: int = 1
    recompute: str = "none"
    steps: int = 1
    saves: int = 0
    folder: str = ""
    begins: int = -1  # the checkpoint's step
    skips: bool = False  # what the checkpoint has not of ours
    spmd: str = "partial_dtensor"
    experts: int = 1  # expert_parallel_degree
    replicas: int = 1  # data_parallel_replicate_degree
    chunks: int = 0  # ChunkedLossWrapper
    precision: str = "float32"
    compiled: str = ""  # the backend that compiles the model's blocks
    strict: bool = True
    validates: bool = False  # after each step
    options: dict[str, Any] = field(default_factory=dict)


class Data(BaseDataLoader):
    """Row r of micro-batch m is drawn by its number alone; documents end inside rows."""

    @dataclass(kw_only=True, slots=True)
    class Config(BaseDataLoader.Config):
        infinite: bool = True  # torchtitan's validator says so

    def __init__(self, config: Any, *, dp_world_size: int, dp_rank: int, local_batch_size: int, **_: Any) -> None:
        self.ranks, self.rank, self.rows, self.at = dp_world_size, dp_rank, local_batch_size, 0

    def __iter__(self) -> Any:
        while True:
            draw = torch.Generator().manual_seed(100 + self.at * self.ranks + self.rank)
            x = torch.randint(0, LETTERS, (self.rows, LENGTH + 1), generator=draw)
            positions = torch.arange(LENGTH).repeat(self.rows, 1)
            for row in positions:
                cut = int(torch.randint(4, LENGTH - 4, (), generator=draw))
                row[cut:] -= cut
            self.at += 1
            yield {"input": x[:, :-1].contiguous(), "positions": positions}, x[:, 1:].contiguous()

    def state_dict(self) -> dict[str, int]:
        return {"at": self.at}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.at = state["at"]


class Tokenizer(BaseTokenizer):
    @dataclass(kw_only=True, slots=True)
    class Config(BaseTokenizer.Config):
        pass

    def __init__(self, config: Any, tokenizer_path: str | None = None, **_: Any) -> None:
        super().__init__()
        self.eos_id = 0

    def encode(self, *_: Any, **__: Any) -> list[int]:
        return []

    def decode(self, *_: Any, **__: Any) -> str:
        return ""

    def get_vocab_size(self) -> int:
        return LETTERS


class ReferenceLoss(BaseLoss):
    """The language model's loss and, in float64, the balance losses that a recorder captured the logits for."""

    @dataclass(kw_only=True, slots=True)
    class Config(BaseLoss.Config):
        pass

    recorder: Recorder

    def __init__(self, config: Any, *, compile_config: Any = None) -> None:
        self.inner = CrossEntropyLoss.Config().build(compile_config=compile_config)

    def __call__(self, pred: Tensor, labels: Tensor, tokens: Tensor | None = None, **rest: Any) -> Any:
        loss, metrics = self.inner(pred, labels, tokens, **rest)
        return loss + self.recorder.balance_loss().to(loss.dtype), metrics


class WholeExperts(GroupedExperts):
    """torchtitan's experts in the precision of their weights.

    Its own multiply in bfloat16: a gradient that differs in its last bit may round to another number, 0.4 % away.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(GroupedExperts.Config):
        pass

    def forward(self, x_RD: Tensor, num_tokens_per_expert_E: Tensor) -> Tensor:
        weights = (self.w1_EFD, self.w2_EDF, self.w3_EFD)
        w1_EFD, w2_EDF, w3_EFD = (w.to_local() if isinstance(w, DTensor) else w for w in weights)
        sizes = num_tokens_per_expert_E.long().tolist()
        out = [
            (F.silu(x @ w1_EFD[e].T) * (x @ w3_EFD[e].T)) @ w2_EDF[e].T
            for e, x in enumerate(x_RD[: sum(sizes)].split(sizes))
        ]
        return torch.cat([*out, torch.zeros_like(x_RD[sum(sizes) :])])


class Recorder:
    """What a training did, counted here and not by equipoise."""

    def __init__(self, case: Case) -> None:
        self.case = case
        self.counts = torch.zeros(LAYERS, EXPERTS, dtype=torch.int64)
        self.steps: list[dict[str, Any]] = []
        self.gradients: dict[str, Tensor] = {}
        self.logits: list[Tensor] = []
        self.positions: Tensor | None = None
        self.law = law.Law(case.policies or [], EXPERTS, TOP_K, case.gate) if case.reference else None

    def watch(self, trainer: Any) -> None:
        self.trainer = trainer
        if self.law is not None:
            trainer.loss_fn.recorder = self
        trainer.optimizers.register_step_pre_hook(lambda *_: self.before_step())
        trainer.optimizers.register_step_post_hook(lambda *_: self.after_step())
        trainer.model_parts[0].register_forward_pre_hook(self.begin, with_kwargs=True)
        moes = [m for part in trainer.model_parts for m in part.modules() if isinstance(m, MoE)]
        assert len(moes) == LAYERS
        for layer, moe in enumerate(moes if not self.case.compiled else ()):  # a hook of ours would be compiled too
            moe.router.register_forward_hook(lambda router, _, out, layer=layer: self.count(router, layer, out[1]))
            if self.law is not None:
                moe.router.gate.register_forward_hook(lambda gate, _, out: self.capture(out))
        self.moes = moes

    def begin(self, model: nn.Module, given: tuple, named: dict[str, Any]) -> None:
        self.positions = named.get("positions")

    @property
    def recomputes(self) -> bool:
        return torch._C._current_graph_task_id() != -1

    def count(self, router: nn.Module, layer: int, ids: Tensor) -> None:
        if router.training and torch.is_grad_enabled() and not self.recomputes:
            self.counts[layer] += torch.bincount(ids.flatten(), minlength=EXPERTS)

    def capture(self, logits: Tensor) -> None:
        if not self.recomputes:
            self.logits.append(logits)

    def balance_loss(self) -> Tensor:
        tokens = self.trainer.config.training.global_batch_size * LENGTH
        logits, self.logits = self.logits, []
        return self.law.loss(logits, self.positions, tokens)

    def before_step(self) -> None:
        if not self.gradients:
            self.gradients = {
                plain(name): whole(p.grad).clone()
                for part in self.trainer.model_parts
                for name, p in part.named_parameters()
                if p.grad is not None
            }

    def after_step(self) -> None:
        counts = self.counts.clone()
        if dist.get_world_size() > 1:
            dist.all_reduce(counts)
        balancer = getattr(self.trainer, "balancer", None)
        # this hook may run before the balancer's own, so what it committed is read at the end of the training step
        self.steps.append({"counts": counts.tolist(), "balancer": balancer})
        self.counts.zero_()

    def note(self) -> None:
        step = self.steps[-1]
        balancer = step.pop("balancer")
        step["loads"] = [counts_E.tolist() for counts_E in balancer.load()] if balancer is not None else None
        step["metrics"] = balancer.metrics() if balancer is not None else None
        step["bias"] = [
            moe.expert_bias_E.detach().clone().tolist() if moe.expert_bias_E is not None else None for moe in self.moes
        ]


def begin_log() -> None:
    init_logger()


def plain(name: str) -> str:
    return name.replace("_checkpoint_wrapped_module.", "")


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


@torch.no_grad()
def fill(model: nn.Module) -> None:
    """The same weights however they are sharded, in routers that prefer something.

    On a CPU torchtitan 0.3.0 draws every rank's shard from the same numbers: experts in pairs of twins, between which a
    router learns nothing.
    """
    draw = torch.Generator().manual_seed(7)
    for name, p in model.named_parameters():
        if p.dim() > 1:
            full = torch.randn(p.shape, generator=draw) * (0.4 if name.endswith("router.gate.weight") else 0.1)
            p.copy_(distribute_tensor(full, p.device_mesh, p.placements) if isinstance(p, DTensor) else full)


def configuration(case: Case, folder: Path) -> Any:
    dim, ranks = 32, int(os.environ.get("WORLD_SIZE", "1"))
    layers = qwen3._build_qwen3_moe_layers(
        n_layers=LAYERS, dim=dim, n_heads=2, n_kv_heads=1, head_dim=16, moe_hidden_dim=32, num_experts=EXPERTS,
        top_k=TOP_K, attn_backend="flex", moe_comm_backend="standard",
        rope=CosSinRoPE.Config(dim=16, max_seq_len=64, theta=1e4),
    )  # fmt: skip
    for layer in layers:
        layer.attention.inner_attention = ScaledDotProductAttention.Config()  # flex has no backward on a CPU
        layer.moe.load_balance_coeff = case.own
        layer.moe.router.score_func = case.gate
        if case.whole:
            experts = layer.moe.routed_experts
            given = {one.name: getattr(experts.inner_experts, one.name) for one in fields(experts.inner_experts)}
            experts.inner_experts = WholeExperts.Config(**given)
    model = Qwen3Model.Config(
        vocab_size=LETTERS,
        dim=dim,
        norm=qwen3._qwen3_norm(dim),
        tok_embeddings=Embedding.Config(num_embeddings=LETTERS, embedding_dim=dim, param_init=qwen3._EMBEDDING_INIT),
        lm_head=Linear.Config(in_features=dim, out_features=LETTERS, param_init=qwen3._LINEAR_INIT),
        layers=layers,
    )
    spec = qwen3.model_registry("debugmodel_moe")
    theirs = spec.parallelize_fn
    spec.model, spec.state_dict_adapter = model, None
    spec.parallelize_fn = lambda model, **rest: record_shim.sums_on_gloo(theirs(model, **rest))
    if case.upstream:
        found = importlib.util.spec_from_file_location("upstream", case.upstream)
        assert found is not None and found.loader is not None
        module = importlib.util.module_from_spec(found)
        found.loader.exec_module(module)
        more = {"coef": law.COEF, "tokens": ROWS * case.accumulate * ranks * LENGTH}
        spec.post_optimizer_build_fn = lambda *built: module.register_global_batch_loss(*built, **more)
    loss: Any = CrossEntropyLoss.Config()
    if case.chunks:
        loss = ChunkedLossWrapper.Config(num_chunks=case.chunks)
    if case.reference:
        loss = ReferenceLoss.Config()
    recompute = {"none": None, "full": FullAC.Config(), "selective": SelectiveAC.Config()}[case.recompute]
    config = Trainer.Config(
        model_spec=spec,
        dump_folder=str(folder / (case.folder or case.name)),
        tokenizer=Tokenizer.Config(),
        dataloader=Data.Config(),
        loss=loss,
        optimizer=default_adamw(lr=1e-2),
        lr_scheduler=LRSchedulersContainer.Config(warmup_steps=0),
        metrics=MetricsProcessor.Config(log_freq=1, enable_tensorboard=True, disable_color_printing=True),
        training=TrainingConfig(
            local_batch_size=ROWS, global_batch_size=ROWS * case.accumulate * ranks, seq_len=LENGTH,
            steps=case.steps, max_norm=1e9, disable_cuda_graphs=True, mixed_precision_param=case.precision,
        ),
        parallelism=ParallelismConfig(
            spmd_backend=case.spmd, expert_parallel_degree=case.experts, data_parallel_replicate_degree=case.replicas
        ),
        checkpoint=CheckpointManager.Config(
            enable=bool(case.saves), interval=max(case.saves, 1), last_save_model_only=False, keep_latest_k=0,
            load_step=case.begins, exclude_from_loading=["equipoise"] if case.skips else [],
        ),
        activation_checkpoint=recompute,
        compile=CompileConfig(enable=bool(case.compiled), components=["model"], backend=case.compiled or "inductor"),
        validator=Validator.Config(enable=case.validates, freq=1, steps=2, dataloader=Data.Config()),
        debug=DebugConfig(seed=7, enable_structured_logging=False),
    )  # fmt: skip
    if case.policies is None or case.reference:
        return config
    return balanced(config, case.policies, strict=case.strict, **case.options)


def train(case: Case, folder: Path) -> dict[str, Any]:
    said = io.StringIO()
    handler = logging.StreamHandler(said)
    logger.addHandler(handler)
    trainer, recorder, began = None, Recorder(case), time.perf_counter()
    try:
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            trainer = configuration(case, folder).build()
            for part in trainer.model_parts:
                fill(part)
            recorder.watch(trainer)
            step = trainer.train_step

            def noted(iterator: Any) -> None:
                step(iterator)
                recorder.note()

            trainer.train_step = noted
            trainer.train()
            end = {plain(n): whole(v).detach().clone() for p in trainer.model_parts for n, v in p.state_dict().items()}
            describe = trainer.describe() if hasattr(trainer, "describe") else ""
            keys = sorted(trainer.checkpointer.states) if case.saves else []
        result: dict[str, Any] = {
            "steps": recorder.steps, "gradients": recorder.gradients, "end": end, "describe": describe, "keys": keys,
            "warned": [str(one.message) for one in warned if "equipoise" in str(one.message)], "error": None,
        }  # fmt: skip
    except (Exception, CheckpointException) as error:  # what is refused is part of the record
        result = {"error": f"{type(error).__name__}: {error}", "steps": recorder.steps}
    finally:
        logger.removeHandler(handler)
        if trainer is not None:
            trainer.close()
        if dist.is_initialized():
            dist.destroy_process_group()
        gc.collect()
    return result | {"said": said.getvalue(), "seconds": time.perf_counter() - began}
