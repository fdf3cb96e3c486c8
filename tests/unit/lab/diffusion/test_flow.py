"""Straight lines between images and noise: what is learned of them, and Euler's way back along them."""

from __future__ import annotations

import torch
from torch import nn

from equipoise.lab.diffusion.flow import flow_loss, noised, sample


class Field(nn.Module):
    """A velocity that depends on place and level, and a record of the levels that it was asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[float] = []

    def forward(self, x, t_B, labels_B):
        self.asked.append(t_B[0].item())
        assert not self.training and (t_B == t_B[0]).all()
        return x.sin() * t_B.view(-1, 1, 1, 1) + labels_B.view(-1, 1, 1, 1)


class Exact(nn.Module):
    """Knows the one image: the velocity towards the noise is (x - image) / t."""

    def __init__(self, image):
        super().__init__()
        self.image = image

    def forward(self, x, t_B, labels_B):
        return (x - self.image) / t_B.view(-1, 1, 1, 1)


def test_the_ends_of_the_line_and_its_velocity():
    images, noise = torch.randn(3, 1, 4, 4), torch.randn(3, 1, 4, 4)
    x, velocity = noised(images, noise, torch.tensor([0.0, 0.5, 1.0]))
    assert torch.equal(x[0], images[0]) and torch.equal(x[2], noise[2])
    torch.testing.assert_close(x[1], (images[1] + noise[1]) / 2)
    torch.testing.assert_close(velocity, noise - images)


def test_the_loss_is_the_mean_square_per_image():
    images, noise, t_B = torch.randn(3, 1, 2, 2), torch.randn(3, 1, 2, 2), torch.rand(3)
    found = flow_loss(Field().eval().requires_grad_(False), images[:1], torch.tensor([0]), noise[:1], t_B[:1])
    t = t_B[0].item()
    total = 0.0
    for image, eps in zip(images[0].flatten().tolist(), noise[0].flatten().tolist(), strict=True):
        guess = torch.tensor((1 - t) * image + t * eps).sin().item() * t
        total += (guess - (eps - image)) ** 2
    torch.testing.assert_close(found, torch.tensor([total / 4]))


def test_sampling_is_euler_s_method_and_keeps_the_mode():
    model, noise, labels_B = Field().train(), torch.randn(2, 1, 2, 2), torch.tensor([0, 1])
    found = sample(model, noise, labels_B, steps=4)
    x = noise
    for t in (1.0, 0.75, 0.5, 0.25):
        x = x - 0.25 * (x.sin() * t + labels_B.view(-1, 1, 1, 1))
    torch.testing.assert_close(found, x)
    assert model.asked == [1.0, 0.75, 0.5, 0.25] and model.training


def test_with_the_exact_velocity_any_number_of_steps_arrives():
    image = torch.randn(1, 1, 4, 4)
    for steps in (1, 3, 10):
        torch.testing.assert_close(sample(Exact(image), torch.randn(1, 1, 4, 4), torch.tensor([0]), steps), image)
