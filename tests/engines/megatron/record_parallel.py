"""A step of Megatron-core cut over tensor, context, pipeline, expert and data ranks, and the same in one process.

python record_parallel.py CASES.json RANK WORLD STORE OUT.pt

All cases are cut alike. In the one process no schedule, no data parallelism and no optimizer of Megatron's takes part:
its model alone, and one backward of the mean loss of all micro-batches with the law added.
"""

from __future__ import annotations

import sys
import zlib
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from engines._law import Law
from engines._ranks import in_group
from engines.megatron import record_megatron as whole

BATCH, EXPERTS, LENGTH, LETTERS, TOP_K = whole.BATCH, whole.EXPERTS, whole.LENGTH, whole.LETTERS, whole.TOP_K

from megatron.core import parallel_state  # noqa: E402
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec  # noqa: E402
from megatron.core.models.gpt.gpt_model import GPTModel  # noqa: E402
from megatron.core.tensor_parallel.random import initialize_rng_tracker  # noqa: E402
from megatron.core.transformer.transformer_block import (  # noqa: E402
    TransformerBlockSubmodules,
    get_num_layers_to_build,
)
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset  # noqa: E402
from megatron.core.utils import get_batch_on_this_cp_rank  # noqa: E402


class Norm(torch.nn.LayerNorm):
    """Megatron's own without CUDA refuses sequence parallelism; all that this takes is the mark on its weights."""

    def __init__(self, config: Any, hidden_size: int, eps: float = 1e-5, **_: Any) -> None:
        super().__init__(hidden_size, eps)
        for weight in self.parameters():
            weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]


class Gathered(torch.autograd.Function):
    """(S, ...) of every context-parallel rank, one after the other."""

    @staticmethod
    def forward(_, x: torch.Tensor) -> torch.Tensor:
        group = parallel_state.get_context_parallel_group()
        of_all = [torch.empty_like(x) for _ in range(group.size())]
        dist.all_gather(of_all, x.contiguous(), group=group)
        return torch.cat(of_all)

    @staticmethod
    def backward(_, grad: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        group, grad = parallel_state.get_context_parallel_group(), grad.clone()
        dist.all_reduce(grad, group=group)
        return grad.chunk(group.size())[group.rank()]


class Attention(torch.nn.Module):
    """Over context-parallel ranks: Megatron leaves that to Transformer Engine, which needs CUDA."""

    def __init__(self, config: Any, **_: Any) -> None:
        super().__init__()
        self.scale = config.kv_channels**-0.5

    def forward(self, query: Any, key: Any, value: Any, *_: Any, **__: Any) -> torch.Tensor:
        mine = of_this_rank(torch.arange(LENGTH)[None])[0]
        keys, values, places = Gathered.apply(key), Gathered.apply(value), Gathered.apply(mine)
        scores = torch.einsum("sbhd,tbhd->bhst", query, keys) * self.scale
        scores = scores.masked_fill(places[None, :] > mine[:, None], -torch.inf)
        return torch.einsum("bhst,tbhd->sbhd", scores.softmax(dim=-1), values).flatten(2)


def of_this_rank(x_BS: torch.Tensor) -> torch.Tensor:
    """The part of each sequence that Megatron gives to this context-parallel rank: one early, one late."""
    return get_batch_on_this_cp_rank({"": x_BS})[""]


def gpt_of(config: Any) -> GPTModel:
    """This rank's part of one model: each weight is drawn whole, by its name, and cut."""
    first, pattern = get_transformer_layer_offset(config), config.moe_layer_freq
    layers = []
    for at in range(first, first + get_num_layers_to_build(config)):
        has_experts = pattern == 1 or pattern[at]
        layer = get_gpt_layer_local_spec(num_experts=EXPERTS if has_experts else None, moe_grouped_gemm=False)
        layer.submodules.input_layernorm = layer.submodules.pre_mlp_layernorm = Norm
        if config.context_parallel_size > 1:
            layer.submodules.self_attention.submodules.core_attention = Attention
        layers.append(layer)
    held = TransformerBlockSubmodules(layers, layer_norm=Norm)
    ends = {"pre_process": parallel_state.is_pipeline_first_stage(),
            "post_process": parallel_state.is_pipeline_last_stage()}  # fmt: skip
    embedding = {"position_embedding_type": "learned_absolute", "parallel_output": False}
    model = GPTModel(config, held, LETTERS, 64, **embedding, **ends)
    model = model.to(config.params_dtype)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            known, (dim, rank, size) = place(model, name, weight)
            shape = list(weight.shape)
            shape[dim] *= size
            drawn = torch.randn(shape, generator=torch.Generator().manual_seed(zlib.crc32(known.encode())))
            level = 1.0 if "norm.weight" in known else 0.0
            drawn = level + drawn.double() * (0.4 if known.endswith("router.weight") else 0.1)
            weight.copy_(drawn.chunk(size, dim)[rank])
    return model


def place(model: GPTModel, name: str, weight: torch.Tensor) -> tuple[str, tuple[int, int, int]]:
    """(its name in the whole model, (the dimension it is cut in, which part, of how many))."""
    steps = name.split(".")
    if "layers" in steps:
        at = steps.index("layers") + 1
        steps[at] = str(model.decoder.layers[int(steps[at])].layer_number - 1)
    if "local_experts" in steps:
        at, held = steps.index("local_experts") + 1, EXPERTS // parallel_state.get_expert_model_parallel_world_size()
        steps[at] = str(int(steps[at]) + held * parallel_state.get_expert_model_parallel_rank())
        rank = parallel_state.get_expert_tensor_parallel_rank()
        size = parallel_state.get_expert_tensor_parallel_world_size()
    else:
        rank = parallel_state.get_tensor_model_parallel_rank()
        size = parallel_state.get_tensor_model_parallel_world_size()
    cut = getattr(weight, "tensor_model_parallel", False) and size > 1
    return ".".join(steps), (weight.partition_dim, rank, size) if cut else (0, 0, 1)  # type: ignore[attr-defined]


def losses_of(model: Any, text: torch.Tensor, mask: torch.Tensor, after: torch.Tensor, **padding: Any) -> torch.Tensor:
    """Of each letter, in float64: Megatron's own cross entropy computes in fp32. An inner stage has none."""
    padding = {name: of_this_rank(mask_BS) for name, mask_BS in padding.items()}
    out = model(of_this_rank(text), of_this_rank(torch.arange(LENGTH).expand(BATCH, -1)), mask, **padding)
    if not parallel_state.is_pipeline_last_stage():
        return out
    return torch.nn.functional.cross_entropy(out.transpose(1, 2), of_this_rank(after), reduction="none")


class Training(whole.Training):
    """Its own weights; texts, losses and optimizer as in the other tests."""

    def gpt(self) -> GPTModel:
        return gpt_of(self.config)

    def losses(self, *args: Any, **padding: Any) -> torch.Tensor:
        return losses_of(*args, **padding)

    def _note(self, logits_SBE: torch.Tensor) -> None:
        if len(self.logits[-1]) < len(self.routers()):
            self.logits[-1].append(logits_SBE.detach().transpose(0, 1))


class OneProcess:
    """The step as one graph."""

    def __init__(self, case: dict[str, Any]) -> None:
        self.case, self.config = case, whole.config_of({k: v for k, v in case.items() if k != "recompute"})
        self.model, self.seen = gpt_of(self.config), []
        for module in self.model.modules():
            if type(module).__name__ == "TopKRouter":
                module.register_forward_hook(lambda one, given, _: self.seen.append(one.gating(given[0])))

    def losses(self, number: int) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """(of each letter, logits (B, S, E) of each layer)."""
        text, after = whole.text_of(number)
        mask = torch.ones(1, 1, LENGTH, LENGTH).triu(1).bool()
        self.seen.clear()
        losses = losses_of(self.model, text, mask, after)
        flat = [one.flatten(0, 1) for one in self.seen]  # whose gradient then lies as the engine wants it
        return losses, [one.unflatten(0, (LENGTH, BATCH)).transpose(0, 1) for one in flat]

    def gradients(self) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        """(of every weight, counts (L, E))."""
        case, replicas, micro = self.case, self.case["replicas"], self.case.get("accumulation", 1)
        law = Law(case["law"], EXPERTS, TOP_K, self.config.moe_router_score_function)
        real_BS = torch.ones(BATCH, LENGTH, dtype=torch.bool)
        if padded := case.get("padding"):
            real_BS[-1, -padded:] = False
        total = torch.zeros(())
        for m in range(micro):
            of_all = [self.losses(m * replicas + replica) for replica in range(replicas)]
            logits = [[z[real_BS][None] if padded else z for z in zs] for _, zs in of_all]
            everywhere = torch.stack([law.chosen(zs)[1] for zs in logits]).sum(dim=0)
            law.come_LE = law.come_LE + everywhere
            for (losses, _), zs in zip(of_all, logits, strict=True):
                tokens, parts = int(real_BS.sum()), micro * replicas
                pushed = law.loss(zs, torch.arange(LENGTH).expand(BATCH, -1), tokens * parts, everywhere)
                total = total + losses.mean() / parts + pushed
        total.backward()
        return {name: weight.grad for name, weight in self.model.named_parameters()}, law.come_LE


def one_process(case: dict[str, Any]) -> dict[str, Any]:
    return dict(zip(("gradients", "load"), OneProcess(case).gradients(), strict=True))


def cut(case: dict[str, Any]) -> dict[str, Any]:
    training, files = Training(case), f"model{dist.get_rank()}.pt"
    scale, first = case.get("loss_scale", 1.0), case.get("first_step", 0)
    if scale != 1.0:
        training.config.grad_scale_func = lambda loss: loss * scale
    if case.get("load"):
        state = torch.load(Path(case["load"]) / files, weights_only=False)
        training.model.load_state_dict(state["model"])
        training.optimizer.load_state_dict(state["optimizer"])
    training.attach()
    if case.get("load"):
        training.balance.load(case["load"])
    gradients = [training.step(first + step) for step in range(case.get("steps", 1))]
    if case.get("save"):
        state = {"model": training.model.state_dict(), "optimizer": training.optimizer.state_dict()}
        torch.save(state, Path(case["save"]) / files)
        training.balance.save(case["save"])
    inside = training.model.module
    found: dict[str, Any] = {
        "gradients": {name: gradient / scale for name, gradient in gradients[0].items()},
        "places": {name: place(inside, name.removeprefix("module."), weight)
                   for name, weight in training.model.named_parameters()},
        "weights": {name: weight.detach().clone() for name, weight in training.model.named_parameters()},
        "bias": [getattr(one, "expert_bias", None) for one in training.routers().values()],
        "reports": training.reports,
        "routers": [place(inside, name.removeprefix("module."), one.weight)[0]
                    for name, one in training.routers().items()],
        "described": training.balance.describe() if training.balance else "",
    }  # fmt: skip
    if balance := training.balance:
        found |= {"load": balance.balancer.load(), "metrics": balance.balancer.metrics()}
        balance.remove()
    return found


def main(cases: dict[str, dict[str, Any]], out: Path) -> None:
    (parallel,) = {tuple(sorted(case.get("parallel", {}).items())) for case in cases.values()}
    parallel_state.initialize_model_parallel(**{whole.SIZES[name]: size for name, size in parallel})
    initialize_rng_tracker(inference_rng_tracker=True)
    torch.cuda.synchronize = lambda *_: None  # type: ignore[assignment]
    run = one_process if dist.get_world_size() == 1 else cut
    torch.save({name: run(case) for name, case in cases.items()}, out)


if __name__ == "__main__":
    in_group(main)
