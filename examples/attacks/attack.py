"""The inner problem of adversarial training: the change of an image that hurts most."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import one_hot, softplus

import implicitopt
from mdeq import Classifier

State = tuple[Tensor, ...]


def log_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """The logarithm of the cross-entropy of each image, ``(B,)``.

    It has the maximizers of the cross-entropy, whose gradient vanishes exponentially where the
    classifier is sure; this one's does not, and float32 has digits left for it.
    """
    right = one_hot(labels, logits.shape[1]).bool()
    others = logits.masked_fill(right, float("-inf")).logsumexp(dim=1)
    behind = others - logits.gather(1, labels[:, None])[:, 0]
    # The cross-entropy is softplus(behind): exp(behind), to float32, far below 0.
    return torch.where(behind < -20, behind, softplus(behind.clamp(min=-20)).log())


@dataclass(frozen=True)
class Attack:
    """The change δ of an image that raises its loss most.

        maximize over δ   log CE(z, label)   subject to   z = f(z, image + δ)   and   ‖δ‖₂ ≤ ε

    Args:
        radius: ε, for pixels in [0, 1]; 0 leaves the images as they are.
        max_steps: sweeps, or steps of PGD.
        solver: for ``implicitopt.solve``.
        clip: image + δ is cut to [0, 1].
        tol: relative KKT residual at which an image is done with; 0: all get the same work.

    Source: JIIO eq. 25-26. The paper divides the gradient by its norm; log CE makes that needless.
    """

    radius: float
    max_steps: int
    solver: Any | None = None
    clip: bool = False
    tol: float = 0.0

    @classmethod
    def pgd(
        cls, radius: float, steps: int, *, rate: float, inner_steps: int = 10, clip: bool = False
    ) -> Attack:
        """Projected gradient ascent in steps of length ``rate``, with a whole solve for each."""
        optimizer = partial(implicitopt.ProjectedGradient, lr=rate)
        solver = implicitopt.Nested(optimizer, inner_steps=inner_steps, inner_tol=1e-3)
        return cls(radius, steps, solver, clip)

    def __call__(
        self, model: Classifier, images: Tensor, labels: Tensor, *, sample_iterate: bool = False
    ) -> implicitopt.Solution:
        """The solution: δ is its ``x``, and ``value`` log CE with its gradient in the weights."""
        return implicitopt.solve(
            self.map(model, images),
            lambda z, delta: log_cross_entropy(model.logits(z), labels),
            torch.zeros_like(images),
            model.start,
            solver=self.solver,
            project=implicitopt.L2Ball(self.radius),
            maximize=True,
            max_steps=self.max_steps,
            tol=self.tol,
            sample_iterate=sample_iterate,
        )

    def change(self, model: Classifier, images: Tensor, labels: Tensor) -> Tensor:
        """The attacked images."""
        with torch.no_grad():
            return self.attacked(images, self(model, images, labels).x)

    def map(self, model: Classifier, images: Tensor) -> Callable[[State, Tensor], State]:
        """f(z, δ)."""
        return lambda z, delta: model.f(z, self.attacked(images, delta))

    def attacked(self, images: Tensor, delta: Tensor) -> Tensor:
        """The images that the classifier sees."""
        # A cut never leads out of the ball, since the images themselves lie in [0, 1].
        return (images + delta).clamp(0, 1) if self.clip else images + delta
