"""Implicit MAML: its outer gradient needs the weights that a task led to, and not the way there."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.func import grad, vjp, vmap

from .network import Gradient, Weights
from .tasks import Episode, Tasks


def dot(left: Weights, right: Weights) -> Tensor:
    """The inner product, ``()``."""
    return torch.stack([(left[name] * right[name]).sum() for name in left]).sum()


def plus(left: Weights, scale: Tensor | float, right: Weights) -> Weights:
    """left + scale · right."""
    return {name: w + scale * right[name] for name, w in left.items()}


def conjugate_gradients(
    product: Callable[[Weights], Weights], right: Weights, steps: int
) -> Weights:
    """Some steps from 0 towards the v with product(v) = v + Hv/λ = right.

    Of a convex loss H is not negative. Where it proves to be, along a direction, the system may be
    singular and the next step far too long: the steps end, and if that is at the first, v is
    ``right``.
    """
    found = {name: torch.zeros_like(w) for name, w in right.items()}
    residual, direction, square = right, right, dot(right, right)
    going, first = torch.ones_like(square, dtype=torch.bool), None
    for _ in range(steps):
        image = product(direction)
        curvature = dot(direction, image)
        going = going & (curvature > LEAST * dot(direction, direction))
        first = going if first is None else first
        length = torch.where(going, square / curvature, 0)
        found, residual = plus(found, length, direction), plus(residual, -length, image)
        square, before = dot(residual, residual), square
        direction = plus(residual, torch.where(before > 0, square / before, 0), direction)
    return {name: torch.where(first, w, right[name]) for name, w in found.items()}


#: The least curvature of I + H/λ where H is not negative, which is 1, less room for rounding.
LEAST = 0.9


class Imaml(Gradient):
    """Trained at the weights φ that each task leads to, by the implicit function theorem.

        φ = argmin over φ   CE(φ; support) + λ/2 ‖φ − θ‖²
        d CE(φ; query) / dθ = (I + H/λ)⁻¹ ∇CE(φ; query),    H = ∇²CE(φ; support)

    The system is solved by conjugate gradients, of which a step costs one more backward pass, and
    no step towards φ is kept. The formula holds at the minimizer: after few gradient steps, or few
    of conjugate gradients, the gradient is biased. With convolutions H is often indefinite at φ,
    and conjugate gradients end early, another bias; the authors' code adds to I and to λ instead.

    Source: Rajeswaran, Finn, Kakade, Levine, "Meta-learning with implicit gradients", NeurIPS 2019
    (its algorithms 1 and 2).

    Args:
        tasks, network, steps, rate: as for ``Gradient``.
        decay: λ.
        cg_steps: of conjugate gradients.
    """

    def __init__(
        self,
        tasks: Tasks,
        network: nn.Module,
        steps: int,
        rate: float,
        decay: float,
        cg_steps: int,
    ) -> None:
        super().__init__(tasks, network, steps, rate)
        if not decay > 0 or cg_steps < 1:
            raise ValueError(
                f"decay and cg_steps must be positive; got {decay} and {cg_steps}. Without decay "
                "the weights that a task leads to do not depend on those before."
            )
        self.decay, self.cg_steps = decay, cg_steps

    def adapted(self, weights: Weights, images: Tensor, labels: Tensor) -> Weights:
        start = weights
        for _ in range(self.steps):
            slope = grad(self.task_loss)(weights, images, labels)
            weights = {
                name: w - self.rate * (slope[name] + self.decay * (w - start[name]))
                for name, w in weights.items()
            }
        return weights

    def outer(
        self, own: Weights, images: Tensor, labels: Tensor, query: Tensor, query_labels: Tensor
    ) -> Weights:
        """The outer gradient of a task that led to the weights ``own``."""
        slope = grad(self.task_loss)(own, query, query_labels)
        _, curve = vjp(lambda w: grad(self.task_loss)(w, images, labels), own)

        def product(v: Weights) -> Weights:
            return plus(v, 1 / self.decay, curve(v)[0])  # H is symmetric: vᵀH is (Hv)ᵀ

        return conjugate_gradients(product, slope, self.cg_steps)

    def loss(self, episode: Episode) -> tuple[Tensor, dict[str, Tensor]]:
        support = (episode.support, episode.support_labels)
        own = self.each_adapted(self.constant(), *support)
        slopes = vmap(self.outer)(own, *support, episode.query, episode.query_labels)
        slope = {name: w.mean(dim=0) for name, w in slopes.items()}
        return self.reported(self.each_answer(own, episode.query), episode, slope)
