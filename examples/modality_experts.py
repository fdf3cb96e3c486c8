"""Experts for text and experts for images (MoMa) in a loop of your own: source code and digits as one sequence.

A byte of text is a token, a pixel of scikit-learn's 8 x 8 digits is another (pip install 'equipoise[images]'). In
training each expert takes, of all tokens of its modality in the step, those that it scores highest, tokens to come
among them. Afterwards an auxiliary router says of each token by itself which experts would take it: only that is a
language model. Printed are both losses, and how often the auxiliary routers are right.

    python examples/modality_experts.py                    # one or two minutes on two cores
    python examples/modality_experts.py --capacity 2       # two experts for a token, on average
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F

from equipoise import ExpertChoiceMoE, ModalityMoE, TokenPools, choose_from_pools
from equipoise.functional import prediction_counts, prediction_quality

GREY, BEGIN, END = 256, 273, 274  # bytes, 17 greys, two marks
SEQUENCES, TEXT, DIM = 16, 62, 64


class Model(nn.Module):
    """Causal attention, then experts of each token's own modality, twice."""

    def __init__(self, capacity: float) -> None:
        super().__init__()
        self.embed, self.place = nn.Embedding(END + 1, DIM), nn.Parameter(torch.zeros(TEXT + 66, DIM))
        self.mix = nn.ModuleList(nn.MultiheadAttention(DIM, 4, batch_first=True) for _ in range(2))
        groups = [{name: ExpertChoiceMoE(DIM, 128, 4, capacity=capacity) for name in ("text", "image")} for _ in "12"]
        self.experts = nn.ModuleList(ModalityMoE(one) for one in groups)
        self.out = nn.Linear(DIM, END + 1)

    def forward(self, tokens: Tensor) -> Tensor:
        """(2,): nats per predicted token of text, and of images."""
        read, target = tokens[:, :-1], tokens[:, 1:]
        h, hidden = self.embed(read) + self.place[: read.shape[1]], torch.ones(2 * [read.shape[1]]).triu(1).bool()
        for mix, experts in zip(self.mix, self.experts, strict=True):
            x = F.rms_norm(h, h.shape[-1:])
            h = h + mix(x, x, x, attn_mask=hidden, need_weights=False)[0]
            h = h + experts(F.rms_norm(h, h.shape[-1:]), (read >= GREY).long())
        losses = F.cross_entropy(self.out(F.rms_norm(h, h.shape[-1:])).mT, target, reduction="none")
        return torch.stack([losses[target < GREY].mean(), losses[target >= GREY].mean()])


def batch(text: Tensor, digits: Tensor) -> Tensor:
    """A digit between its marks, then a piece of text."""
    starts = torch.randint(len(text) - TEXT, (SEQUENCES,)).tolist()
    shown, mark = digits[torch.randint(len(digits), (SEQUENCES,))], torch.ones(SEQUENCES, 1, dtype=torch.long)
    return torch.cat([BEGIN * mark, shown, END * mark, torch.stack([text[at : at + TEXT] for at in starts])], dim=1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--capacity", type=float, default=1.0, help="experts that a token has on average")
    parser.add_argument("--steps", type=int, default=300)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    text = torch.tensor(list(Path(nn.functional.__file__).read_bytes()))
    digits = torch.from_numpy(load_digits().images).long().flatten(1) + GREY
    model = Model(arguments.capacity)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    pools = TokenPools(model, optimizer)  # trains the auxiliary routers
    for _ in range(arguments.steps):
        loss = model(batch(text[:-20_000], digits[:-200])).mean()
        (loss + pools.loss()).backward()
        optimizer.step()
        optimizer.zero_grad()
    print(f"step {arguments.steps}: {loss:.3f} nats per token")
    counts = torch.zeros(2, 2, dtype=torch.long)

    def compare(gate: nn.Module, args: tuple, choice) -> None:
        predicted = gate.predict(args[0].flatten(0, 1))
        taken = torch.zeros_like(predicted)
        taken[choice.token_ids_P, choice.expert_ids_P] = True
        counts.add_(prediction_counts(predicted, taken))

    model.eval()
    held_out = [batch(text[-20_000:], digits[-200:]) for _ in range(4)]
    with torch.no_grad():
        causal = torch.stack([model(one) for one in held_out]).mean(0).tolist()
        for gate in pools.routers.values():
            gate.register_forward_hook(compare)
        with choose_from_pools(model):
            ahead = torch.stack([model(one) for one in held_out]).mean(0).tolist()
    right, precise, found = prediction_quality(counts)
    print("causal: {:.3f} text, {:.3f} image".format(*causal))
    print("chosen: {:.3f} text, {:.3f} image, seeing tokens to come".format(*ahead))
    print(f"auxiliary routers: {right:.0%} right, {precise:.0%} precise, {found:.0%} found")


if __name__ == "__main__":
    main()
