"""Trainings of Megatron-core on a CPU, one after the other in the same ranks: what each saw goes to a file.

python record_megatron.py CASES.json RANK WORLD STORE OUT.pt
"""

from __future__ import annotations

import sys
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
warnings.simplefilter("ignore")

from engines._law import Law  # noqa: E402
from engines._ranks import in_group  # noqa: E402
from engines.megatron import record_shim  # noqa: E402

record_shim.install()

from megatron.core import parallel_state  # noqa: E402
from megatron.core.distributed import (  # noqa: E402
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec  # noqa: E402
from megatron.core.models.gpt.gpt_model import GPTModel  # noqa: E402
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer  # noqa: E402
from megatron.core.pipeline_parallel import get_forward_backward_func  # noqa: E402
from megatron.core.tensor_parallel.random import initialize_rng_tracker  # noqa: E402
from megatron.core.transformer.module import Float16Module  # noqa: E402
from megatron.core.transformer.transformer_config import TransformerConfig  # noqa: E402

EXPERTS, TOP_K, LAYERS, LENGTH, BATCH, LETTERS = 8, 2, 2, 16, 2, 128
SIZES = {"tensor": "tensor_model_parallel_size", "context": "context_parallel_size",
         "pipeline": "pipeline_model_parallel_size", "expert": "expert_model_parallel_size",
         "expert tensor": "expert_tensor_parallel_size"}  # fmt: skip
RECOMPUTE = {
    "full": {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
    "moe": {"recompute_granularity": "selective", "recompute_modules": ["moe"]},
}


def config_of(case: dict[str, Any]) -> TransformerConfig:
    sizes = {"num_layers": LAYERS, "hidden_size": 32, "num_attention_heads": 2, "ffn_hidden_size": 32}
    experts = {"num_moe_experts": EXPERTS, "moe_router_topk": TOP_K, "moe_ffn_hidden_size": 32}
    on_cpu = {"use_cpu_initialization": True, "moe_grouped_gemm": False, "moe_token_dispatcher_type": "allgather",
              "gradient_accumulation_fusion": False, "bias_dropout_fusion": False, "masked_softmax_fusion": False,
              "apply_rope_fusion": False}  # fmt: skip
    exact = {"attention_dropout": 0.0, "hidden_dropout": 0.0, "add_bias_linear": False, "moe_router_dtype": "fp64",
             "params_dtype": torch.float64}  # fmt: skip
    exact |= {"moe_aux_loss_coeff": 0.0, "moe_router_load_balancing_type": "none"}
    parts = {"expert_model_parallel_size": case.get("expert_parallel", 1),
             "calculate_per_token_loss": case.get("loss") == "per token"}  # fmt: skip
    parts |= {SIZES[name]: size for name, size in case.get("parallel", {}).items()}
    parts |= {"sequence_parallel": parts.get(SIZES["tensor"], 1) > 1, "pipeline_dtype": torch.float64}
    recompute = RECOMPUTE.get(case.get("recompute", ""), {})
    types = {"bf16": torch.bfloat16, "fp16": torch.float16}
    half = {name: True for name in types if name == case.get("precision")}
    half |= {"params_dtype": types[name], "moe_router_dtype": "fp32"} if (name := case.get("precision")) else {}
    return TransformerConfig(**sizes | experts | on_cpu | exact | parts | recompute | half | case.get("config", {}))


def text_of(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A micro-batch, and what comes after each of its letters."""
    text = torch.randint(0, LETTERS, (BATCH, LENGTH + 1), generator=torch.Generator().manual_seed(seed))
    text[0] = text[0] % 11  # sequences that differ
    return text[:, :-1].contiguous(), text[:, 1:].contiguous()


class Training:
    """A model, Megatron's data parallelism, optimizer and schedule around it, and uneven text."""

    def __init__(self, case: dict[str, Any]) -> None:
        self.case, self.config = case, config_of(case)
        model = self.gpt().to(self.config.params_dtype)
        sharded = case.get("distributed_optimizer", False)
        ddp = DistributedDataParallelConfig(grad_reduce_in_fp32=False, use_distributed_optimizer=sharded)
        inside = Float16Module(self.config, model) if self.config.bf16 or self.config.fp16 else model
        self.model = DistributedDataParallel(self.config, ddp, inside)
        self.config.finalize_model_grads_func = finalize_model_grads
        dtype, kind = self.config.params_dtype, {"bf16": self.config.bf16, "fp16": self.config.fp16}
        kind |= {"use_distributed_optimizer": sharded, "initial_loss_scale": case.get("loss_scale", 2.0**8)}
        settings = OptimizerConfig(optimizer="adam", lr=1e-2, clip_grad=0.0, params_dtype=dtype, **kind)
        self.optimizer = get_megatron_optimizer(settings, [self.model])
        self.config.grad_scale_func = self.optimizer.scale_loss
        self.balance: Any = None
        self.logits: list[list[torch.Tensor]] = []  # micro-batch -> layer
        self.reports: list[dict[str, float]] = []
        self.reads = 0

    def gpt(self) -> GPTModel:
        torch.manual_seed(7)
        spec = get_gpt_layer_local_spec(num_experts=EXPERTS, moe_grouped_gemm=False)
        model = GPTModel(self.config, spec, LETTERS, 64, position_embedding_type="learned_absolute")
        with torch.no_grad():
            for name, weight in model.named_parameters():
                if name.endswith("router.weight"):
                    weight.mul_(20)
        return model

    @property
    def micro_batches(self) -> int:
        return self.case.get("accumulation", 1)

    def routers(self) -> dict[str, Any]:
        return {name: one for name, one in self.model.named_modules() if type(one).__name__ == "TopKRouter"}

    def attach(self) -> None:
        """Balances, looks, or adds the law to the loss, as the case says; and notes the logits of every first pass."""
        policies = self.case.get("policies")
        if policies is not None:
            from equipoise.adapters.megatron import MegatronBalancer

            self.balance = MegatronBalancer(self.model, self.optimizer, policies, layers=True)
            read = self.balance.balancer.metrics

            def counted(**named: Any) -> dict[str, float]:
                self.reads += 1
                return read(**named)

            self.balance.balancer.metrics = counted
        for router in self.routers().values():
            router.register_forward_hook(lambda one, given, _: self._note(one.gating(given[0])))

    def refusal(self, policies: Any) -> str:
        """What another balancer for this model is answered."""
        from equipoise.adapters.megatron import MegatronBalancer
        from equipoise.errors import EquipoiseError

        try:
            MegatronBalancer(self.model, self.optimizer, policies)
        except EquipoiseError as error:
            return str(error)
        return ""

    def _note(self, logits_SBE: torch.Tensor) -> None:
        if len(self.logits[-1]) < LAYERS:  # recompute comes again
            flat = logits_SBE.flatten(0, 1)  # whose gradient then lies as the engine wants it
            self.logits[-1].append(flat.unflatten(0, (LENGTH, BATCH)).transpose(0, 1))

    def _law(self) -> torch.Tensor:
        """What the law adds to this micro-batch's mean loss, which the engine divides by M and averages over ranks."""
        if len(self.logits) % self.micro_batches == 1 % self.micro_batches:
            self.law = Law(self.case["law"], EXPERTS, TOP_K, self.config.moe_router_score_function)
        parts = self.micro_batches * dist.get_world_size()
        real_BS = ~self.padding_BS
        logits = [one[real_BS][None] for one in self.logits[-1]] if self.padding_BS.any() else self.logits[-1]
        positions_BS = torch.arange(LENGTH).expand(BATCH, -1)
        return parts * self.law.loss(logits, positions_BS, int(real_BS.sum()) * parts)

    def text(self, step: int):
        replicas, replica = parallel_state.get_data_parallel_world_size(), parallel_state.get_data_parallel_rank()
        for m in range(self.micro_batches):
            yield text_of(1000 * step + m * replicas + replica)

    def losses(self, model: Any, text: torch.Tensor, mask: torch.Tensor, after: torch.Tensor, **padding: Any) -> Any:
        return model(text, torch.arange(LENGTH).expand(BATCH, -1), mask, labels=after, **padding)

    def forward_step(self, iterator: Any, model: Any) -> tuple[torch.Tensor, Any]:
        text, after = next(iterator)
        self.logits.append([])
        mask = torch.ones(1, 1, LENGTH, LENGTH).triu(1).bool()
        self.padding_BS = torch.zeros(BATCH, LENGTH, dtype=torch.bool)
        if padded := self.case.get("padding"):
            self.padding_BS[-1, -padded:] = True
        padding = {"padding_mask": self.padding_BS} if padded else {}
        losses = self.losses(model, text, mask, after, **padding)
        has_labels = (len(self.logits) - 1) % self.micro_batches < self.case.get("labels", self.micro_batches)

        def loss_function(losses: torch.Tensor) -> tuple[Any, ...]:
            total, number = losses.sum() * has_labels, torch.tensor(losses.numel() * has_labels, dtype=torch.int)
            if "law" in self.case:
                total = total + number.clamp(min=1) * self._law()
            report = {"lm loss": (total / number.clamp(min=1)).detach()}
            mean = total / number / parallel_state.get_context_parallel_world_size()  # the schedule multiplies it again
            return (mean, report) if self.case.get("loss", "mean") == "mean" else (total, number, report)

        return losses, loss_function

    def step(self, step: int) -> dict[str, torch.Tensor]:
        """One optimizer step; the gradients that the optimizer got."""
        self.model.zero_grad_buffer()
        self.optimizer.zero_grad()
        forward = self.forward_step if self.balance is None else self.balance.forward_step(self.forward_step)
        told = get_forward_backward_func()(
            forward_step_func=forward, data_iterator=self.text(step), model=[self.model], seq_length=LENGTH,
            num_microbatches=self.micro_batches, micro_batch_size=BATCH, forward_only=False,
        )  # fmt: skip
        told = told[-1] if told else {}  # a last stage alone reports
        self.reports.append({name: float(value) for name, value in told.items()})
        gradients = {name: weight.main_grad.clone() for name, weight in self.model.named_parameters()}
        self.optimizer.step()
        return gradients


def train(case: dict[str, Any]) -> dict[str, Any]:
    training = Training(case)
    if case.get("load"):
        state = torch.load(case["load"], weights_only=False)
        training.model.load_state_dict(state["model"])
        training.optimizer.load_state_dict(state["optimizer"])
    training.attach()
    if case.get("load") and training.balance:
        training.balance.load(Path(case["load"]).parent)
    first = case.get("first_step", 0)
    gradients = [training.step(first + step) for step in range(case.get("steps", 1))]
    routers = training.routers()
    if case.get("save"):
        if dist.get_rank() == 0:
            torch.save(
                {"model": training.model.state_dict(), "optimizer": training.optimizer.state_dict()}, case["save"]
            )
        training.balance.save(Path(case["save"]).parent)
    found: dict[str, Any] = {
        "gradients": gradients, "reports": training.reports, "names": list(routers),
        "logits": [[one.detach() for one in layers] for layers in training.logits],
        "weights": {name: weight.detach().clone() for name, weight in training.model.named_parameters()},
        "bias": [getattr(one, "expert_bias", None) for one in routers.values()],
        "state": sorted(training.model.state_dict()),
    }  # fmt: skip
    if case.get("tries"):
        found["errors"] = [training.refusal(one) for one in case["tries"]]
    if training.balance:
        found["reads"], balancer = training.reads, training.balance.balancer
        found |= {"load": balancer.load(), "metrics": balancer.metrics()} if balancer.step_count else {"metrics": {}}
        found["described"] = training.balance.describe()
        training.balance.remove()
    return found


def main(cases: dict[str, dict[str, Any]], out: Path) -> None:
    """All cases share how experts are spread over ranks."""
    (degree,) = {case.get("expert_parallel", 1) for case in cases.values()}
    parallel_state.initialize_model_parallel(expert_model_parallel_size=degree)
    initialize_rng_tracker(inference_rng_tracker=True)
    torch.save({name: train(case) for name, case in cases.items()}, out)


if __name__ == "__main__":
    in_group(main)
