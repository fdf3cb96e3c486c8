"""Accumulates statistics of what routers chose, in memory that does not grow with the text.

Shapes: D domains, L layers, E experts (the most of any layer), V token ids, M of them tracked, R shuffles, J examples,
B windows of a micro-batch, S tokens of a window, N passages of C tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..errors import InputError
from ..external.observe import Choices, ObservedRouter
from ..functional.metrics import maxvio
from ..functional.routing import count_choices
from ..functional.specialization import chosen, coactivation, log_probs, overlap

__all__ = ["Accumulator", "Sizes"]

SHUFFLES = 20
EXAMPLES = 4
TRACKED_CELLS = 1 << 22  # M · L · E at most: 16 MB of counts
PASSAGES, PASSAGE_TOKENS = 2, 128


@dataclass(frozen=True)
class Sizes:
    """Sizes that the statistics depend on."""

    domains: int
    windows: Sequence[int]  # of each domain
    equal_windows: int  # the first windows of each domain, which enter comparisons of domains
    length: int  # S
    micro_batch: int  # B
    seed: int


class Accumulator:
    """Call ``add`` for a pass of every domain (whole micro-batches), then ``close_round``; ``state`` holds all sums.

    ``frequency_V`` are counts of the token ids in the text: the M most frequent ids are counted per expert.
    """

    def __init__(self, routers: Sequence[ObservedRouter], sizes: Sizes, frequency_V: np.ndarray, device: torch.device,
                 *, against: bool = False) -> None:  # fmt: skip
        self.routers, self.sizes, self.device = list(routers), sizes, device
        layers, experts = len(routers), max(one.num_experts for one in routers)
        domains, top_k = sizes.domains, max(one.top_k for one in routers)
        tracked = int(min((frequency_V > 0).sum(), max(16, TRACKED_CELLS // (layers * experts))))
        ids_M = np.argsort(-frequency_V, kind="stable")[:tracked]
        slot_V = np.full(len(frequency_V), tracked)  # the last slot is for all other ids
        slot_V[ids_M] = np.arange(tracked)
        self.tracked_M, self.slot_V = ids_M, torch.from_numpy(slot_V).to(device)

        def zeros(*shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        wide, length = torch.float64, min(PASSAGE_TOKENS, sizes.length)
        self.state: dict[str, Tensor] = {
            "tokens_D": zeros(domains),
            "counts_DLE": zeros(domains, layers, experts),
            "equal_DLE": zeros(domains, layers, experts),
            "squares_DLE": zeros(domains, layers, experts),
            "shuffled_RDLE": zeros(SHUFFLES, domains, layers, experts),
            "score_DL": zeros(domains, layers, dtype=wide),
            "entropy_DL": zeros(domains, layers, dtype=wide),
            "probs_DLE": zeros(domains, layers, experts, dtype=wide),
            "products_LEE": zeros(layers, experts, experts, dtype=wide),
            "pairs_LEE": zeros(layers, experts, experts),
            "sequence_vio_DL": zeros(domains, layers, dtype=wide),
            "batch_vio_DL": zeros(domains, layers, dtype=wide),
            "batches_D": zeros(domains),
            "ids_LME": zeros(layers, (tracked + 1) * experts, dtype=torch.int32),
            "seen_M": zeros(tracked + 1),
            "example_key_LEJ": zeros(layers, experts, EXAMPLES) - 1,
            "example_place_LEJ": zeros(layers, experts, EXAMPLES) - 1,
            "passages_NCLK": zeros(domains * PASSAGES, length, layers, top_k, dtype=torch.int16) - 1,
        }
        if against:
            self.state |= {"shared_DL": zeros(domains, layers), "other_LE": zeros(layers, experts)}
        self._round: list[tuple[int, Tensor]] = []  # (domain, counts (n, L, E)) of equal windows in this round

    def add(
        self, domain: int, first: int, ids_BS: Tensor, seen: Sequence[Choices], other: Sequence[Choices] = ()
    ) -> None:
        """Adds one pass: windows ``first``, ``first`` + 1, ... of a domain, and what each router chose.

        ``other`` is what the routers of the other checkpoint chose.

        Raises InputError where router logits are not finite.
        """
        state, (batch, length) = self.state, ids_BS.shape
        slots_T = self.slot_V[ids_BS.reshape(-1)]
        state["tokens_D"][domain] += batch * length
        state["seen_M"].index_add_(0, slots_T, torch.ones_like(slots_T))
        keys_T = self._keys(domain, first, batch * length)
        window_counts = []
        entropies, scores, examples = [], [], []
        for layer, (one, (logits_TE, ids_TK)) in enumerate(zip(self.routers, seen, strict=True)):
            ids_TK, experts = ids_TK.long(), one.num_experts
            one_TK, at_TK = ids_TK < experts, ids_TK.clamp(max=experts - 1)  # an id of E is no choice
            logs_TE = log_probs(logits_TE, one.gate)
            probs_TE = logs_TE.exp()
            entropies.append((probs_TE * logs_TE).sum().neg())  # summed over tokens
            scores.append((probs_TE.gather(-1, at_TK) * one_TK).sum())
            state["probs_DLE"][domain, layer, :experts] += probs_TE.sum(dim=0)
            state["products_LEE"][layer, :experts, :experts] += probs_TE.T @ probs_TE
            state["pairs_LEE"][layer, :experts, :experts] += coactivation(chosen(ids_TK, experts))
            counts_BE = count_choices(ids_TK, experts, num_sequences=batch)
            window_counts.append(self._wide(counts_BE))
            cells_TK = slots_T.unsqueeze(1) * state["pairs_LEE"].shape[-1] + at_TK
            state["ids_LME"][layer].index_add_(0, cells_TK.reshape(-1), one_TK.reshape(-1).int())
            examples.append(self._largest_keys(keys_T, at_TK, one_TK))
            if other:
                state["shared_DL"][domain, layer] += (overlap(ids_TK.where(one_TK, -1), other[layer].ids_TK)).sum()
                state["other_LE"][layer, :experts] += count_choices(other[layer].ids_TK.long(), experts)[0]
            self._keep_passages(domain, first, layer, batch, probs_TE, at_TK, one_TK)
        entropy_L = torch.stack(entropies).double()
        self._check(entropy_L)
        state["entropy_DL"][domain] += entropy_L
        state["score_DL"][domain] += torch.stack(scores).double()
        self._add_loads(domain, first, torch.stack(window_counts, dim=1))
        self._merge_examples(torch.stack(examples), domain, first, length)

    def close_round(self, number: int) -> None:
        """Call it after one pass of each domain: shuffles the domain labels of the windows of this round."""
        if self._round:
            counts_NX = torch.cat([counts for _, counts in self._round])
            shape = counts_NX.shape
            label_N = np.concatenate([np.full(len(counts), domain) for domain, counts in self._round])
            draw = np.random.default_rng([self.sizes.seed, number])
            dealt_RN = np.stack([draw.permutation(label_N) for _ in range(SHUFFLES)])
            of_RDN = dealt_RN[:, None] == np.arange(self.sizes.domains)[:, None]
            of = torch.from_numpy(of_RDN.reshape(-1, len(label_N))).to(self.device, torch.float64)
            sums = of @ counts_NX.reshape(len(label_N), -1).double()
            self.state["shuffled_RDLE"] += sums.long().view(SHUFFLES, self.sizes.domains, *shape[1:])
        self._round = []

    # --------------------------------------------------------------------------------------------- parts of `add`

    def _wide(self, counts_BE: Tensor) -> Tensor:
        """Padded to the largest number of experts of any layer."""
        return torch.nn.functional.pad(counts_BE, (0, self.state["pairs_LEE"].shape[-1] - counts_BE.shape[-1]))

    def _add_loads(self, domain: int, first: int, counts_BLE: Tensor) -> None:
        state, batch = self.state, len(counts_BLE)
        total_LE = counts_BLE.sum(dim=0)
        state["counts_DLE"][domain] += total_LE
        state["sequence_vio_DL"][domain] += self._maxvio(counts_BLE).sum(dim=0)
        size = min(self.sizes.micro_batch, self.sizes.windows[domain])
        whole = batch // size  # a shorter rest is left out
        groups = counts_BLE[: whole * size].view(whole, size, *total_LE.shape).sum(dim=1)
        state["batch_vio_DL"][domain] += self._maxvio(groups).sum(dim=0)
        state["batches_D"][domain] += whole
        equal_BLE = counts_BLE[: max(0, self.sizes.equal_windows - first)]
        if len(equal_BLE):
            state["equal_DLE"][domain] += equal_BLE.sum(dim=0)
            state["squares_DLE"][domain] += equal_BLE.square().sum(dim=0)
            self._round.append((domain, equal_BLE))

    def _maxvio(self, counts_LE: Tensor) -> Tensor:
        """(..., L): each layer over its own number of experts."""
        numbers = {one.num_experts for one in self.routers}
        if numbers == {counts_LE.shape[-1]}:
            return maxvio(counts_LE)
        return torch.stack([maxvio(counts_LE[..., i, : one.num_experts]) for i, one in enumerate(self.routers)], dim=-1)

    def _keys(self, domain: int, first: int, tokens: int) -> Tensor:
        """A random number for every token, with the token's index in its lower 32 bits."""
        draw = np.random.default_rng([self.sizes.seed, 7, domain, first])
        keys_T = draw.integers(0, 1 << 30, tokens) << 32 | np.arange(tokens)
        return torch.from_numpy(keys_T).to(self.device)

    def _largest_keys(self, keys_T: Tensor, ids_TK: Tensor, one_TK: Tensor) -> Tensor:
        """(E,) the largest key of the tokens that chose each expert, a uniform sample of one; -1 if none did."""
        best_E = torch.full((self.state["pairs_LEE"].shape[-1],), -1, dtype=torch.int64, device=self.device)
        keys_TK = keys_T.unsqueeze(1).where(one_TK, -1)
        return best_E.scatter_reduce_(0, ids_TK.reshape(-1), keys_TK.reshape(-1), "amax")

    def _merge_examples(self, keys_LE: Tensor, domain: int, first: int, length: int) -> None:
        """Keeps the J largest keys, each of another pass, and the positions of their tokens."""
        token_LE = keys_LE & 0xFFFFFFFF
        place_LE = (domain << 56) + ((first + token_LE // length) << 24) + token_LE % length
        place_LE = torch.where(keys_LE >= 0, place_LE, -1)
        keys = torch.cat([self.state["example_key_LEJ"], keys_LE.unsqueeze(-1)], dim=-1)
        places = torch.cat([self.state["example_place_LEJ"], place_LE.unsqueeze(-1)], dim=-1)
        best, at = keys.topk(EXAMPLES, dim=-1)
        self.state["example_key_LEJ"], self.state["example_place_LEJ"] = best, places.gather(-1, at)

    def _keep_passages(
        self, domain: int, first: int, layer: int, batch: int, probs_TE: Tensor, ids_TK: Tensor, one_TK: Tensor
    ) -> None:
        """Keeps the start of the first windows of each domain; experts sorted by probability, -1 behind the last."""
        passages = self.state["passages_NCLK"]
        rows = min(PASSAGES - first, batch)
        if rows <= 0:
            return
        probs_TK = probs_TE.gather(-1, ids_TK).where(one_TK, -1)
        order_TK = probs_TK.argsort(dim=-1, descending=True, stable=True)
        ids_BSK = ids_TK.where(one_TK, -1).gather(-1, order_TK).view(batch, -1, ids_TK.shape[-1])
        start = domain * PASSAGES + first
        passages[start : start + rows, :, layer, : ids_TK.shape[-1]] = ids_BSK[:rows, : passages.shape[1]].short()

    def _check(self, entropy_L: Tensor) -> None:
        finite_L = torch.isfinite(entropy_L)
        if not bool(finite_L.all()):
            name = self.routers[int((~finite_L).nonzero()[0])].name
            raise InputError(
                expected="finite router logits",
                got=f"NaN or infinity in {name}",
                do="look for NaN in the checkpoint's weights, or inspect with --dtype float32",
            )
