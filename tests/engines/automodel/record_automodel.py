"""Trainings of NeMo Automodel's Qwen3-MoE on a CPU, in a loop that weighs tokens as its recipes do.

python record_automodel.py CASES.json RANK WORLD STORE OUT.pt: one after the other in the same ranks
"""

from __future__ import annotations

import sys
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
warnings.simplefilter("ignore")

from engines._ranks import in_group  # noqa: E402
from engines.automodel import record_shim  # noqa: E402

record_shim.install()

from nemo_automodel.components.distributed.activation_checkpointing import checkpoint_wrapper  # noqa: E402
from nemo_automodel.components.models.common.utils import BackendConfig  # noqa: E402
from nemo_automodel.components.models.qwen3_moe.model import Qwen3MoeForCausalLM  # noqa: E402
from nemo_automodel.components.moe.config import MoEConfig  # noqa: E402
from nemo_automodel.components.moe.layers import Gate  # noqa: E402
from torch.distributed.device_mesh import init_device_mesh  # noqa: E402
from torch.distributed.fsdp import fully_shard  # noqa: E402
from torch.distributed.tensor import Replicate, distribute_tensor  # noqa: E402
from transformers import Qwen3MoeConfig  # noqa: E402

from engines._law import Law  # noqa: E402

EXPERTS, TOP_K, LAYERS, LENGTH, BATCH, LETTERS, DIM = 8, 2, 2, 16, 2, 128, 32


class Training:
    """A model, FSDP2 around it on several ranks, AdamW, and uneven text."""

    def __init__(self, case: dict[str, Any]) -> None:
        self.case, self.world, self.rank = case, dist.get_world_size(), dist.get_rank()
        torch.manual_seed(7)
        sizes = {"vocab_size": LETTERS, "hidden_size": DIM, "intermediate_size": DIM, "moe_intermediate_size": DIM}
        heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16, "max_position_embeddings": 64}
        experts = {"num_experts": EXPERTS, "num_experts_per_tok": TOP_K, "norm_topk_prob": True}
        rest = {"num_hidden_layers": LAYERS, "tie_word_embeddings": False, "torch_dtype": "float32"}
        moe = {"n_routed_experts": EXPERTS, "n_shared_experts": 0, "n_activated_experts": TOP_K, "n_expert_groups": 1,
               "n_limited_groups": 1, "train_gate": True, "gate_bias_update_factor": 0.0, "aux_loss_coeff": 0.0,
               "score_func": "softmax", "route_scale": 1.0, "dim": DIM, "inter_dim": DIM, "moe_inter_dim": DIM,
               "norm_topk_prob": True, "softmax_before_topk": True, "dtype": torch.float32}  # fmt: skip
        backend = BackendConfig(attn="sdpa", linear="torch", rms_norm="torch", rope_fusion=False, experts="torch",
                                dispatcher="torch", enable_hf_state_dict_adapter=False)  # fmt: skip
        self.model = Qwen3MoeForCausalLM(
            Qwen3MoeConfig(**sizes | heads | experts | rest), moe_config=MoEConfig(**moe | case.get("moe", {})),
            backend=backend,
        )  # fmt: skip
        self.model.initialize_weights(buffer_device=torch.device("cpu"), dtype=torch.float32)
        with torch.no_grad():
            for gate in self.gates():
                gate.weight.mul_(30)  # they prefer something
        blocks = self.model.model.layers
        if case.get("recompute"):
            for name, block in list(blocks.named_children()):
                blocks.register_module(name, checkpoint_wrapper(block))
        if self.world > 1:
            mesh = init_device_mesh("cpu", (self.world,))
            for block in blocks.children():
                fully_shard(block, mesh=mesh)
            fully_shard(self.model, mesh=mesh)
            for gate in self.gates():
                if gate.e_score_correction_bias is not None:  # as apply_fsdp of its parallelizer
                    whole_bias = distribute_tensor(gate.e_score_correction_bias, mesh, [Replicate()])
                    gate.e_score_correction_bias = whole_bias
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-2)
        self.balance: Any = None
        self.logits: list[list[torch.Tensor]] = []  # micro-batch -> layer -> (B, S, E)
        self.loads: list[list[list[int]]] = []

    @property
    def micro_batches(self) -> int:
        return self.case.get("accumulation", 2)

    def gates(self) -> list[Gate]:
        return [module for module in self.model.modules() if isinstance(module, Gate)]

    def attach(self) -> None:
        """Balances, looks, or adds the law to the loss, as the case says; notes the logits of every first pass."""
        if "policies" in self.case:
            from equipoise.adapters.automodel import AutomodelBalancer

            self.balance = AutomodelBalancer([self.model], self.case["policies"], layers=True)
        for gate in self.gates():
            gate._route_scores = self._noted(gate._route_scores)

    def _noted(self, route: Any) -> Any:
        def noted(scores_TE: torch.Tensor) -> Any:
            if len(self.logits[-1]) < LAYERS:  # recompute comes again
                self.logits[-1].append(scores_TE.unflatten(0, (BATCH, LENGTH)))
            return route(scores_TE)

        return noted

    def batches(self, step: int) -> list[dict[str, torch.Tensor]]:
        """Of this rank, padding at the end of the last sequence of some."""
        found = []
        for m in range(self.micro_batches):
            seed = (step * self.micro_batches + m) * self.world + self.rank
            draw = torch.Generator().manual_seed(1000 + seed)
            text = torch.randint(0, LETTERS, (BATCH, LENGTH + 1), generator=draw)
            text[0] %= 11
            mask = torch.ones(BATCH, LENGTH, dtype=torch.long)
            if self.case.get("padded"):
                mask[-1, LENGTH - 3 * (m + 1) :] = 0
            labels = text[:, 1:].masked_fill(mask == 0, -100)
            found.append({"input_ids": text[:, :-1].contiguous(), "labels": labels, "attention_mask": mask})
        return found

    def _summed(self, number: int) -> int:
        total = torch.tensor([number])
        dist.all_reduce(total)
        return int(total)

    def step(self, step: int) -> dict[str, torch.Tensor]:
        """One optimizer step; the gradients that the optimizer got."""
        batches = self.batches(step)
        labels = self._summed(sum(int((one["labels"] != -100).sum()) for one in batches))
        tokens = self._summed(sum(int(one["attention_mask"].sum()) for one in batches))
        if "law" in self.case:
            score = self.case.get("moe", {}).get("score_func", "softmax")
            law = Law(self.case["law"], EXPERTS, TOP_K, score)
        if self.balance is not None:
            self.balance.begin_step(batches)
        for batch in batches:
            self.logits.append([])
            real_BS = batch["attention_mask"].bool()
            masks = {"attention_mask": batch["attention_mask"], "padding_mask": ~real_BS} if not real_BS.all() else {}
            out = self.model(batch["input_ids"], **masks)
            logits = getattr(out, "logits", out)
            loss = F.cross_entropy(logits.flatten(0, 1).float(), batch["labels"].flatten(), reduction="sum") / labels
            if "law" in self.case:
                rows = self.logits[-1] if real_BS.all() else [one[real_BS][None] for one in self.logits[-1]]
                loss = loss + law.loss(rows, torch.arange(LENGTH).expand(BATCH, -1), tokens).float()
            if self.balance is not None:
                loss = self.balance.tap(loss)
            (loss * self.world).backward()  # as its recipes: the mean over ranks is undone
        gradients = {plain(name): whole(p.grad) for name, p in self.model.named_parameters() if p.grad is not None}
        self.optimizer.step()
        self.optimizer.zero_grad()
        if any(gate.bias_update_factor > 0 for gate in self.gates()) or self.case.get("calls_update"):
            for gate in self.gates():
                gate.update_bias()
        if self.balance is not None:
            self.loads.append([counts_E.tolist() for counts_E in self.balance.balancer.load()])
        return gradients


def plain(name: str) -> str:
    return name.replace("_checkpoint_wrapped_module.", "")


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).detach().clone()


def train(case: dict[str, Any], saved: dict[str, Any]) -> dict[str, Any]:
    training = Training(case)
    if (name := case.get("load")) is not None:
        training.model.load_state_dict(saved[name]["model"])
        training.optimizer.load_state_dict(saved[name]["optimizer"])
    training.attach()
    if name is not None:
        training.balance.load_state_dict(saved[name]["balance"])
    first = case.get("first_step", 0)
    gradients = [training.step(first + step) for step in range(case.get("steps", 1))]
    if (name := case.get("save")) is not None:
        saved[name] = {"model": training.model.state_dict(), "optimizer": training.optimizer.state_dict(),
                       "balance": training.balance.state_dict()}  # fmt: skip
    found: dict[str, Any] = {
        "gradients": gradients[0], "loads": training.loads,
        "logits": [[z.detach() for z in layers] for layers in training.logits],
        "weights": {plain(name): whole(p) for name, p in training.model.named_parameters()},
        "bias": [None if (b := gate.e_score_correction_bias) is None else whole(b) for gate in training.gates()],
        "state": sorted(map(plain, training.model.state_dict())),
    }  # fmt: skip
    if training.balance is not None:
        found |= {"described": training.balance.describe(), "metrics": training.balance.metrics()}
        training.balance.remove()
        found["left"] = [one for gate in training.gates() for one in vars(gate) if "equipoise" in one]
    return found


def main(cases: dict[str, dict[str, Any]], out: Path) -> None:
    saved: dict[str, Any] = {}
    found: dict[str, Any] = {}
    for name, case in cases.items():
        try:
            found[name] = train(case, saved)
        except Exception as error:
            if not case.get("fails"):
                raise
            found[name] = {"error": f"{type(error).__name__}: {error}"}
    torch.save(found, out)


if __name__ == "__main__":
    in_group(main)
