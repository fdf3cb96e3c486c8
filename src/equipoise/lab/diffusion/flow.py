"""Rectified flow: straight lines from images to noise, what a model learns of them, and the way back."""

from __future__ import annotations

import torch
from torch import Tensor, nn

__all__ = ["flow_loss", "noised", "sample"]


def noised(images: Tensor, noise: Tensor, t_B: Tensor) -> tuple[Tensor, Tensor]:
    """(x_t, velocity) on the line x_t = (1 - t) · image + t · noise, of velocity noise - image (arXiv 2209.03003).

    >>> x, velocity = noised(torch.ones(1, 1, 1, 1), torch.full((1, 1, 1, 1), 3.0), torch.tensor([0.25]))
    >>> x.item(), velocity.item()
    (1.5, 2.0)
    """
    t = t_B.view(-1, *[1] * (images.dim() - 1))
    return (1 - t) * images + t * noise, noise - images


def flow_loss(model: nn.Module, images: Tensor, labels_B: Tensor, noise: Tensor, t_B: Tensor) -> Tensor:
    """(B,): the squared error of the velocity that the model predicts, mean over an image's pixels."""
    x, velocity = noised(images, noise, t_B)
    return (model(x, t_B, labels_B) - velocity).square().flatten(1).mean(dim=1)


@torch.no_grad()
def sample(model: nn.Module, noise: Tensor, labels_B: Tensor, steps: int) -> Tensor:
    """Images from noise by ``steps`` equal steps of Euler's method, in evaluation mode; the model's mode is restored.

    >>> class Straight(nn.Module):
    ...     def forward(self, x, t_B, labels_B):
    ...         return torch.ones_like(x)  # every image is the noise - 1
    >>> sample(Straight(), torch.zeros(2, 1, 1, 1), torch.zeros(2).long(), steps=4).flatten()
    tensor([-1., -1.])
    """
    was_training = model.training
    model.eval()
    x = noise
    for step in range(steps, 0, -1):
        x = x - model(x, torch.full((len(x),), step / steps), labels_B) / steps
    model.train(was_training)
    return x
