"""Steps whose tokens are of classes with biases of their own, those biases by loops, and what runs in each rank."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

from contracts.law._reference import naive_bias_step, naive_chosen_by, naive_rule, naive_select
from contracts.law._token_class_cases import Kinds, class_net, class_step, cut_kinds, make_kinds
from equipoise import Balancer, ExpertBias, Ranks

RATE = 0.03


class Marked(Kinds):
    """Beside text and images a class that shares tokens with both of what is no text: images, and no class."""

    @property
    def classes(self) -> dict[str, Tensor]:
        return super().classes | {"marked": self.kinds_BS >= 1}


def marked(whole: Kinds, parts: int = 1) -> list[Marked]:
    return [Marked(*one) for one in cut_kinds(whole, parts)]


def without_images(whole: Kinds) -> Kinds:
    return whole._replace(kinds_BS=torch.where(whole.kinds_BS == 1, 0, whole.kinds_BS))


def biased(policies: list[ExpertBias], **options: Any) -> tuple[Any, Balancer, torch.optim.Optimizer]:
    model = class_net(**options)
    return model, Balancer(model, policies), torch.optim.SGD(model.parameters(), lr=0.0)


def biases_in(model: Any) -> list[dict[str, Tensor]]:
    """Of each layer, by the names of its buffers."""
    return [{name: bias_E.clone() for name, bias_E in block.gate.named_buffers()} for block in model.blocks]


# ------------------------------------------------------------------------------------------------ the law by loops


class Naive:
    """The biases of one layer; ``of[None]`` is that of all tokens. Everything in float64, token by token."""

    def __init__(self, policies: list[ExpertBias], experts: int = 6, top_k: int = 2, gate: str = "sigmoid") -> None:
        self.policies, self.experts, self.top_k, self.gate = policies, experts, top_k, gate
        self.of = {policy.tokens: [0.0] * experts for policy in policies}
        self.momenta = {policy.tokens: [0.0] * experts for policy in policies}
        self.counts = {policy.tokens: [0] * experts for policy in policies}

    def choose(self, logits_TE: Tensor, micro: Kinds) -> list[set[int]]:
        """What each token goes to; the valid ones are counted, for each class that they are of."""
        found = []
        valid = micro.mask_BS.reshape(-1).tolist()
        classes = {name: mask.reshape(-1).tolist() for name, mask in micro.classes.items()}
        for t, row_E in enumerate(logits_TE.double()):
            own = [name for name in self.of if name is None or (valid[t] and classes[name][t])]
            total = [0.0] * self.experts
            for name in own:
                if self.policies[0].place == "multiply":
                    total = [(1 + a) * (1 + b) - 1 for a, b in zip(total, self.of[name], strict=True)]
                else:
                    total = [a + b for a, b in zip(total, self.of[name], strict=True)]
            (by,) = naive_chosen_by(row_E.unsqueeze(0), self.gate, total, self.policies[0].place)
            chosen = naive_select(by, self.top_k)
            found.append(chosen)
            for name in own if valid[t] else ():
                for e in chosen:
                    self.counts[name][e] += 1
        return found

    def step(self) -> None:
        """A step is over: the bias of each class moves by its own counts, and stays where there are none."""
        for policy in self.policies:
            name, counts = policy.tokens, self.counts[policy.tokens]
            self.counts[name] = [0] * self.experts
            if not sum(counts):
                continue
            if policy.rule == "momentum":
                _, move = naive_bias_step([0.0] * self.experts, counts, "momentum", 1.0, self.momenta[name])
                self.momenta[name] = move
            else:
                move = naive_rule(counts, policy.rule)
            moved = [b + policy.rate * m for b, m in zip(self.of[name], move, strict=True)]
            mean = sum(moved) / self.experts
            multiplies = policy.place == "multiply"
            self.of[name] = [(1 + b) / (1 + mean) - 1 if multiplies else b - mean for b in moved]


# ------------------------------------------------------------------------------------------------ the library


def watched(model: Any) -> list[list[Any]]:
    """Of each layer what its router returned, call by call."""
    seen: list[list[Any]] = [[] for _ in model.blocks]
    for block, calls in zip(model.blocks, seen, strict=True):
        block.gate.register_forward_hook(lambda _module, _args, routing, calls=calls: calls.append(routing))
    return seen


def trained(names: list[str | None], rule: str, micro_batches: int, shards: int, steps: int = 3) -> Any:
    """(biases of each step, metrics of each step) on this rank, which has its part of eight sequences.

    ``shards``: so many ranks hold parts of the same sequences. The second step has no image.
    """
    rank, size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    ranks = None
    if shards > 1:
        mesh = init_device_mesh("cpu", (size // shards, shards), mesh_dim_names=("dp", "cp"))
        ranks = Ranks.from_mesh(mesh, data=["dp"], sequence_shards=["cp"])
    model = class_net()
    balancer = Balancer(model, [ExpertBias(rule, RATE, tokens=name) for name in names], ranks=ranks)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    found = []
    for seed in range(steps):
        whole = make_kinds(seed, sequences=8, length=6)
        whole = without_images(whole) if seed == 1 else whole
        data, shard = divmod(rank, shards)
        part = cut_kinds(whole, size // shards)[data]
        part = Kinds(*(tensor.chunk(shards, dim=1)[shard] for tensor in part))
        balancer.begin_step(tokens=int(whole.mask_BS.sum()), micro_batches=micro_batches)
        class_step(model, balancer, optimizer, marked(part, micro_batches))
        maxvio = {key: n for key, n in balancer.metrics(layers=False).items() if key.endswith("maxvio")}
        found.append((biases_in(model), maxvio))
    return found
