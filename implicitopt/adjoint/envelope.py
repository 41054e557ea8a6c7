"""The envelope theorem: the gradient of ℓ_outer = ±ℓ without differentiating the solver."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from implicitopt.kkt import KKT, Point
from implicitopt.solution import AdjointReport

__all__ = ["Attached", "Envelope", "FirstOrderValue", "optimal_value", "refuse"]

_REMEDIES = (
    "pass adjoint=implicitopt.Implicit() to solve() to differentiate through the solution, or "
    "take the gradient of sol.value, or call .detach() to use the solution as a constant"
)


class Attached(NamedTuple):
    """The solution with its gradient attached: matrices, and the value ``(B,)``."""

    z: Tensor
    mu: Tensor
    x: Tensor
    value: Tensor


@dataclass(frozen=True)
class Envelope:
    """Differentiate the optimal value only (the default).

    At a solution v* = (z*, μ*, x*) the value V(θ) = ℓ(z*, x*; θ) has the gradient

        dV/dθ = ∂L/∂θ (z*, μ*, x*; θ)

    for every θ that f, the loss or the constraint reads: one more sweep, and no linear solve
    (JIIO eq. 19, which leaves out the loss's own parameters). Backward through ``sol.x``,
    ``sol.z`` or ``sol.mu``, and second derivatives of ``sol.value``, raise a ``RuntimeError``.

    >>> import torch, implicitopt
    >>> theta = torch.tensor(2.0, requires_grad=True)
    >>> sol = implicitopt.solve(
    ...     lambda z, x: 0.5 * z + x,                      # z* = 2x
    ...     lambda z, x: ((z - theta) ** 2 + x**2).sum(),  # least at x = 2θ/5, where V = θ²/5
    ...     torch.zeros(1), tol=1e-6,
    ... )
    >>> sol.value.backward()
    >>> round(theta.grad.item(), 4)
    0.8
    """

    def attach(self, kkt: KKT, point: Point, value: Tensor, report: AdjointReport) -> Attached:
        lagrangian = optimal_value(kkt, point)
        value = FirstOrderValue.apply(lagrangian, value, "Envelope")
        z, mu, x = (refuse(block, lagrangian, "Envelope") for block in point)
        return Attached(z, mu, x, value)


def optimal_value(kkt: KKT, point: Point) -> Tensor:
    """A ``(B,)`` tensor whose gradient at the constant ``point`` is that of the optimal value.

    A moving constraint counts too: −∇ₓL lies in the normal cone of C at x*, so that ∇ₓLᵀ P_C(x −
    ∇ₓL; θ) has the derivative of the value in the parameters of P_C.
    """
    lagrangian = kkt.lagrangian(point)
    if kkt.project is None:
        return lagrangian
    with torch.no_grad():
        grad = kkt.sweep(point).grad
    return lagrangian + (grad * kkt.project(point.x - grad)).sum(dim=1)


class FirstOrderValue(torch.autograd.Function):
    """The value, with the Lagrangian's gradient; asking for a second derivative is an error."""

    @staticmethod
    def forward(ctx: Any, lagrangian: Tensor, value: Tensor, adjoint: str) -> Tensor:
        ctx.adjoint = adjoint
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "a second derivative of sol.value was asked for (create_graph=True), but "
                f"adjoint={ctx.adjoint}() holds the input constant and has only the first; "
                "pass adjoint=implicitopt.Implicit() to solve()"
            )
        return grads[0], None, None


class _Refuse(torch.autograd.Function):
    """The identity in the forward direction; an error that names the remedies in the other."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, anchor: Tensor, adjoint: str) -> Tensor:
        ctx.adjoint = adjoint
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, None, None]:
        raise RuntimeError(
            f"backward through a solution that adjoint={ctx.adjoint}() does not differentiate: "
            + _REMEDIES
        )


def refuse(value: Tensor, anchor: Tensor, adjoint: str) -> Tensor:
    """``value``, raising if a gradient is taken through it; ``anchor`` says if one could be."""
    refused: Tensor = _Refuse.apply(value, anchor, adjoint)
    return refused
