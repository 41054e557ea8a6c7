"""What adversarial training minimizes."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import implicitopt
from attacks.attack import Attack
from data.images import Images
from mdeq import Classifier


class Robust(nn.Module):
    """``objective(indices) -> (loss, logged)``: cross-entropy when attacked, and Jacobian penalty.

    Args:
        model: the classifier.
        attack: on the images of each step.
        images: to train on.
        jacobian: weight of the penalty, which is ‖∂f/∂z‖² per state entry.
        penalized: images of a step that it is estimated on.
        flips: mirror images at random.
    """

    def __init__(
        self,
        model: Classifier,
        attack: Attack,
        images: Images,
        *,
        jacobian: float,
        penalized: int,
        flips: bool,
    ) -> None:
        super().__init__()
        self.model, self.attack = model, attack
        self.jacobian, self.penalized, self.flips = jacobian, penalized, flips
        self.register_buffer("pixels", images.pixels, persistent=False)
        self.register_buffer("labels", images.labels, persistent=False)

    def forward(self, indices: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        images, labels = self.pixels[indices] / 255, self.labels[indices]
        if self.flips:
            images = mirrored(images)
        sol = self.attack(self.model, images, labels, sample_iterate=True)
        # The attack maximizes log ℓ, so that exp makes it ℓ, gradient and all.
        loss = sol.value.exp().mean()
        penalty = self.penalty(images[: self.penalized], *sol.iterate)
        logged = {"cross_entropy": loss, "penalty": penalty, "residual": sol.residuals.z.mean()}
        return loss + self.jacobian * penalty, logged

    def penalty(self, images: Tensor, z: tuple[Tensor, ...], delta: Tensor) -> Tensor:
        """‖∂f/∂z‖² per state entry, at a point of the attack's path."""
        few = len(images)
        z, delta = tuple(part[:few] for part in z), delta[:few]
        squares = implicitopt.jacobian_penalty(self.attack.map(self.model, images), z, delta)
        return squares.mean() / sum(part[0].numel() for part in z)


def mirrored(images: Tensor) -> Tensor:
    """Each image or, as often, its mirror image."""
    flip = torch.rand(len(images), 1, 1, 1, device=images.device) < 0.5
    return torch.where(flip, images.flip(3), images)
