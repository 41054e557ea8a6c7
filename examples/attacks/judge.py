"""What a classifier says once its state has come to rest: the judge of every attack here."""

from __future__ import annotations

import warnings
from typing import NamedTuple

import torch
from torch import Tensor, nn

import implicitopt
from attacks.attack import log_cross_entropy
from mdeq import Classifier


class Settled(nn.Module):
    """Images ``(B, C, H, W)`` to logits at the equilibrium, whose gradient is the implicit one."""

    def __init__(self, model: Classifier, max_steps: int = 100, tol: float = 1e-4) -> None:
        super().__init__()
        self.model, self.max_steps, self.tol = model, max_steps, tol

    def state(self, images: Tensor) -> tuple[Tensor, ...]:
        """z = f(z, images)."""
        with warnings.catch_warnings():
            # Not every image reaches tol; what was reached is in the verdict.
            warnings.simplefilter("ignore", implicitopt.ConvergenceWarning)
            return implicitopt.fixed_point(
                self.model.cell,
                self.model.inject(images),
                self.model.start(images),
                max_steps=self.max_steps,
                tol=self.tol,
                adjoint_tol=1e-3,
            )

    def forward(self, images: Tensor) -> Tensor:
        return self.model.logits(self.state(images))


class Verdict(NamedTuple):
    """What came of a batch of images, one number each, ``(B,)``."""

    right: Tensor  #: whether the class is right
    loss: Tensor  #: cross-entropy
    residual: Tensor  #: ‖f(z) − z‖ / (1 + ‖z‖)
    answer: Tensor  #: the class


@torch.no_grad()
def judge(model: Classifier, images: Tensor, labels: Tensor) -> Verdict:
    """The classifier's verdict on images, at their equilibria."""
    z = Settled(model).state(images)
    after = model.f(z, images)
    flat = [torch.cat([part.flatten(1) for part in state], dim=1) for state in (z, after)]
    residual = (flat[1] - flat[0]).norm(dim=1) / (1 + flat[0].norm(dim=1))
    logits = model.logits(z)
    answer = logits.argmax(dim=1)
    return Verdict(answer == labels, log_cross_entropy(logits, labels).exp(), residual, answer)
