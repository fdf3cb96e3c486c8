"""Held-out sequences: loss of each modality, which experts compute it, and what the auxiliary routers get right."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from ...functional.expert_choice import prediction_counts, prediction_quality
from ...functional.metrics import dead_experts, maxvio, mutual_information
from ...functional.routing import Routing
from ...layers import ModalityMoE, choose_from_pools
from ...layers.expert_choice import ExpertChoiceRouter, TokenChoice
from ...layers.router import Router
from ...storage.run_record import Evaluation
from .config import ModelConfig
from .data import Fused
from .model import FusionModel
from .strategies import MODALITIES, Strategy

__all__ = ["Watch", "evaluate"]


class Watch:
    """What the layers of a model do with tokens of each modality, added up over the forwards that it watches.

    counts (2, L, E): pairs of a modality's tokens and experts; weights (2, L): sums of the experts' weights; of experts
    that choose, predicted (2, 2, 2): by modality, `prediction_counts`.
    """

    def __init__(self, layers: int, experts: int) -> None:
        self.counts = torch.zeros(2, layers, experts, dtype=torch.long)
        self.weights = torch.zeros(2, layers, dtype=torch.float64)
        self.predicted = torch.zeros(2, 2, 2, dtype=torch.long)
        self.class_ids_T = torch.empty(0, dtype=torch.long)  # of the tokens that a forward is about to read

    @contextmanager
    def watching(self, model: FusionModel, open_to: tuple[range, range]) -> Iterator[None]:
        """Inside, forwards are counted; before each, ``class_ids_T`` has to be set."""
        hooks = []
        for place, block in enumerate(model.blocks):
            layer: nn.Module = block.feed_forward  # type: ignore[assignment]
            groups = [(at, layer.groups[name]) for at, name in enumerate(MODALITIES)] if isinstance(
                layer, ModalityMoE) else [(None, layer)]  # fmt: skip
            for group, own in groups:
                first = 0 if group is None else open_to[group].start
                gate = getattr(own, "gate", None)
                watched = gate if isinstance(gate, Router | ExpertChoiceRouter) else own
                assert isinstance(watched, nn.Module)
                hooks.append(watched.register_forward_hook(partial(self._see, place=place, group=group, first=first)))
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _see(
        self, module: nn.Module, args: tuple, chosen: object, *, place: int, group: int | None, first: int
    ) -> None:
        tokens = args[0].shape[:-1].numel()
        class_T = self.class_ids_T if group is None else torch.full((tokens,), group)
        match chosen:
            case Routing() if isinstance(module, Router):
                kept_TK = chosen.expert_ids_TK < module.num_experts  # an id of E is no expert
                token_P, _ = kept_TK.nonzero(as_tuple=True)
                expert_P, weight_P = chosen.expert_ids_TK[kept_TK], chosen.weights_TK[kept_TK]
            case TokenChoice():
                token_P, expert_P, weight_P = chosen
            case _:  # a dense layer: one expert that computes every token
                token_P, expert_P = torch.arange(tokens), torch.zeros(tokens, dtype=torch.long)
                weight_P = torch.ones(tokens)
        class_P, experts = class_T[token_P], self.counts.shape[-1]
        pairs_P = class_P * experts + first + expert_P
        self.counts[:, place] += torch.bincount(pairs_P, minlength=2 * experts).view(2, experts)
        self.weights[:, place].index_add_(0, class_P, weight_P.double())
        if isinstance(module, ExpertChoiceRouter) and module.always_chooses:
            x_TD = args[0].flatten(0, -2)
            taken_TE = torch.zeros(tokens, module.num_experts, dtype=torch.bool)
            taken_TE[token_P, expert_P] = True
            predicted_TE = module.predict(x_TD)
            for at in (0, 1):
                self.predicted[at] += prediction_counts(predicted_TE[class_T == at], taken_TE[class_T == at])


@torch.no_grad()
def evaluate(
    model: FusionModel, data: Fused, model_config: ModelConfig, strategy: Strategy, *, step: int, sequences: int,
    batch: int,
) -> Evaluation:  # fmt: skip
    """``loss`` is of inference: causal, by the auxiliary routers where experts choose.

    ``choices`` then says what the choice itself, which sees tokens to come, would give: its loss, what auxiliary
    routers get right of it, and the experts that a token gets by them.
    """
    open_to = strategy.open_to(model_config)
    experts = max(of.stop for of in open_to)
    held = data.held(sequences).split(batch)
    was_training = model.training
    model.eval()
    watch = Watch(len(model.blocks), experts)
    loss, tokens = _losses(model, data, held, watch, open_to)
    read = torch.stack([(data.vocabulary.classes(torch.cat(list(held))[:, :-1]) == at).sum() for at in (0, 1)])
    choices: dict[str, float] = {}
    if strategy.experts_choose:
        chosen = Watch(len(model.blocks), experts)
        with choose_from_pools(model):
            of_choice, _ = _losses(model, data, held, chosen, open_to)
        for at, name in enumerate(MODALITIES):
            accuracy, precision, recall = prediction_quality(chosen.predicted[at])
            choices |= {
                f"loss {name}": of_choice[at], f"accuracy {name}": accuracy, f"precision {name}": precision,
                f"recall {name}": recall,
                f"experts {name} chosen": _experts(chosen.counts[at], read[at]),
            }  # fmt: skip
    for at, name in enumerate(MODALITIES):
        choices[f"experts {name}"] = _experts(watch.counts[at], read[at])
    model.train(was_training)
    total_LE = watch.counts.sum(dim=0)
    return Evaluation(
        step=step,
        loss=dict(zip(MODALITIES, loss, strict=True)),
        bits_per_byte={},
        tokens=dict(zip(MODALITIES, tokens, strict=True)),
        counts=watch.counts.tolist(),
        topk_score=(watch.weights / read.unsqueeze(1)).tolist(),
        maxvio_sequence=[],
        maxvio_micro_batch=[],
        maxvio_global=maxvio(total_LE).tolist(),
        dead_experts=dead_experts(total_LE).long().tolist(),
        mutual_information=mutual_information(watch.counts.movedim(0, -2)).tolist(),
        mutual_information_shuffled=[],
        choices=choices,
    )


def _losses(
    model: FusionModel, data: Fused, held: tuple[Tensor, ...], watch: Watch, open_to: tuple[range, range]
) -> tuple[list[float], list[int]]:
    """Mean loss and number of predicted tokens of each modality; marks are in neither."""
    total, count = torch.zeros(2, dtype=torch.float64), torch.zeros(2, dtype=torch.long)
    with watch.watching(model, open_to):
        for tokens_BS in held:
            read_BS, next_BS = tokens_BS[:, :-1], tokens_BS[:, 1:]
            class_ids_BS = data.vocabulary.classes(read_BS)
            watch.class_ids_T = class_ids_BS.flatten()
            loss_BS, kinds_BS = model(read_BS, next_BS, class_ids_BS).double(), data.vocabulary.kinds(next_BS)
            for at in (0, 1):
                total[at] += loss_BS[kinds_BS == at].sum()
                count[at] += (kinds_BS == at).sum()
    return (total / count).tolist(), count.tolist()


def _experts(counts_LE: Tensor, tokens: Tensor) -> float:
    """Experts per token, mean over layers."""
    return float(counts_LE.sum() / (len(counts_LE) * tokens))
