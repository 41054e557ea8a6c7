"""The augmented system: the stationarity conditions of problem (P), each equation once.

With the Lagrangian  L(z, μ, x) = ℓ(z, x) + μᵀ(f(z, x) − z)  [JIIO eq. 13], a solution of

    minimize over x   ℓ(z, x)   subject to   z = f(z, x),  x ∈ C

is a fixed point of the augmented map [eq. 9-11]

    z⁺ = f(z, x)                                     (∇_μ L = z⁺ − z)
    μ⁺ = (∂f/∂z)ᵀ μ + (∂ℓ/∂z)ᵀ                       (∇_z L = μ⁺ − μ)
    x⁺ = P_C( x − α g ),  g = (∂f/∂x)ᵀ μ + (∂ℓ/∂x)ᵀ   (∇_x L = g)

One vector-Jacobian product of f gives f, (∂f/∂z)ᵀμ and (∂f/∂x)ᵀμ together; with the loss's gradient
that is one *sweep*, the unit of work everywhere in this library.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar, cast

import torch
from torch import Tensor

from implicitopt.autocast import Scope
from implicitopt.pullback import Pull, guarded_pullback, pullback
from implicitopt.tree import Layout, Tree

__all__ = [
    "KKT",
    "Point",
    "Residuals",
    "Sizes",
    "Sweep",
    "Work",
    "at_hand",
    "choose",
    "norm",
    "row_mask",
    "some",
]

Row = TypeVar("Row")


class Point(NamedTuple):
    """State z and adjoint μ, both ``(B, n)``, and input x, ``(B, d)``."""

    z: Tensor
    mu: Tensor
    x: Tensor

    @classmethod
    def split(cls, v: Tensor, n: int) -> Point:
        """The blocks of v = (z, μ, x), ``(B, 2n + d)``: views of it."""
        return cls(*v.split([n, n, v.shape[1] - 2 * n], dim=1))

    def joined(self) -> Tensor:
        """v = (z, μ, x), ``(B, 2n + d)``."""
        return torch.cat(self, dim=1)

    def contiguous(self) -> Point:
        """Blocks with memory of their own, as f may ask of z and x, and as rounding depends on."""
        return Point(*(block.contiguous() for block in self))

    @property
    def warm(self) -> Tensor:
        """Which problems an earlier solve has been at, ``(B,)``: where none has, μ is 0."""
        return norm(self.mu) > 0


class Residuals(NamedTuple):
    """Per-problem norms of the three KKT blocks, each over 1 + ‖(z, μ, x)‖.

    The root of their sum of squares is the relative KKT residual that ``tol`` bounds.

    >>> import torch, implicitopt
    >>> sol = implicitopt.solve(
    ...     lambda z, x: 0.5 * z + x, lambda z, x: ((z - 1) ** 2).sum(-1), torch.zeros(2, 3)
    ... )
    >>> [bool((block <= sol.tol).all()) for block in sol.residuals]
    [True, True, True]
    """

    z: Tensor  #: ‖f(z, x) − z‖
    mu: Tensor  #: ‖(∂f/∂z)ᵀ μ + (∂ℓ/∂z)ᵀ − μ‖
    x: Tensor  #: ‖x − P_C(x − ∇ₓL)‖

    @property
    def total(self) -> Tensor:
        """The relative KKT residual, one number per problem."""
        return cast(Tensor, torch.linalg.vector_norm(torch.stack(self), dim=0))


class Sizes(NamedTuple):
    """Of a point, each ``(B,)``: its blocks' norms, and what residuals are relative to."""

    z: Tensor
    mu: Tensor
    x: Tensor
    state: Tensor  #: 1 + ‖(z, x)‖
    whole: Tensor  #: 1 + ‖(z, μ, x)‖


class Sweep(NamedTuple):
    """What one sweep at a :class:`Point` finds."""

    f: Tensor  #: f(z, x), ``(B, n)``
    mu: Tensor  #: (∂f/∂z)ᵀ μ + (∂ℓ/∂z)ᵀ, ``(B, n)``
    grad: Tensor  #: ∇ₓL, ``(B, d)``
    value: Tensor  #: ℓ(z, x), ``(B,)``
    r: Tensor  #: (f − z, μ⁺ − μ, −∇ₓL) side by side, ``(B, 2n + d)``
    lagrangian: Tensor  #: L(z, μ, x), ``(B,)``: to first order, the loss at the equilibrium of x
    doubt: Tensor  #: ‖f − z‖ ‖μ⁺ − μ‖, ``(B,)``: how far from that loss L is taken to be at most
    score: Tensor  #: max(ℓ, L) + ‖f − z‖ ‖μ⁺ − μ‖, ``(B,)``: seldom less than that loss
    sizes: Sizes
    residuals: Residuals
    total: Tensor  #: the relative KKT residual, ``(B,)``
    loss_grad: tuple[Tensor, Tensor] | None  #: ∂ℓ/∂z and ∂ℓ/∂x; None: not kept apart


@dataclass
class Work:
    """Calls made so far, each over the whole batch."""

    f: int = 0  #: evaluations of f
    vjp: int = 0  #: products with (∂f/∂(z, x))ᵀ
    loss: int = 0  #: evaluations of the loss with its gradient


def norm(rows: Tensor) -> Tensor:
    """Euclidean norm of each row, in at least float32; ``(B, n) -> (B,)``."""
    wide = torch.float32 if rows.dtype in (torch.float16, torch.bfloat16) else None
    return cast(Tensor, torch.linalg.vector_norm(rows, dim=1, dtype=wide))


def at_hand(mask: Tensor) -> bool:
    """Whether reading ``mask`` is cheap: on the CPU. For a GPU's one would have to wait."""
    return mask.device.type == "cpu"


def some(mask: Tensor) -> bool:
    """Whether any problem is in ``mask``, ``(B,)``; True where that is not cheap to know."""
    return not at_hand(mask) or bool(mask.any())


def row_mask(mask: Tensor, like: Tensor) -> Tensor:
    """``mask``, ``(B,)``, of the shape that broadcasts over ``like``, ``(B, …)``."""
    return mask.reshape(-1, *[1] * (like.dim() - 1))


def choose(mask: Tensor, new: Row, old: Row) -> Row:
    """``new`` for the problems in ``mask``, ``(B,)``, and ``old`` for the others.

    Both are tensors ``(B, …)``, or tuples of such, of one structure.
    """
    if at_hand(mask):  # a look is cheaper than a pass over the blocks
        if bool(mask.all()):
            return new
        if not bool(mask.any()):
            return old
    return cast(Row, _merge(mask, new, old))


def _merge(mask: Tensor, new: Any, old: Any) -> Any:
    if isinstance(new, Tensor):
        return torch.where(row_mask(mask, new), new, old)
    parts = [_merge(mask, a, b) for a, b in zip(new, old, strict=True)]
    return type(new)(*parts) if hasattr(new, "_fields") else tuple(parts)


@dataclass
class KKT:
    """The augmented system of a batch of problems, on matrices with a row per problem."""

    f: Callable[[Tree, Tree], Tree]
    loss: Callable[[Tree, Tree], Tensor]
    z_layout: Layout
    x_layout: Layout
    project: Callable[[Tensor], Tensor] | None = None  # on (B, d); None: C is everything
    sign: float = 1.0  # −1 to maximize: everything inside is the minimization of −ℓ
    autocast: Scope = nullcontext  # that f and the loss are called in
    work: Work = field(default_factory=Work)
    apart: bool = False  # whether sweeps keep the loss's gradient, for solvers that need it
    guarded: bool = False  # whether f and the loss have been looked at for side effects
    # Makes w ↦ about (∂r/∂v)⁻¹ w in the units of v, r as in `Sweep`, where a solve has told of it.
    near_inverse: Callable[[Tensor], Callable[[Tensor], Tensor]] | None = None

    def state_map(self, z: Tensor, x: Tensor) -> Tensor:
        """f on matrices: ``(B, n), (B, d) -> (B, n)``."""
        with self.autocast():
            image = self.f(self.z_layout.unflatten(z), self.x_layout.unflatten(x))
        return self.z_layout.flatten(image, "f(z, x)").to(z.dtype)

    def objective(self, z: Tensor, x: Tensor) -> Tensor:
        """±ℓ on matrices: ``(B, n), (B, d) -> (B,)``."""
        with self.autocast():
            value = self.loss(self.z_layout.unflatten(z), self.x_layout.unflatten(x))
        if not isinstance(value, Tensor) or value.numel() != z.shape[0]:
            raise ValueError(
                f"loss(z, x) must return {z.shape[0]} values at every call, as at the first; got "
                f"{tuple(value.shape) if isinstance(value, Tensor) else value!r}. Return the same "
                "kind of value at every call."
            )
        return self.sign * value.reshape(z.shape[0]).to(z.dtype)

    def lagrangian(self, point: Point) -> Tensor:
        """L(z, μ, x), eq. 13; ``(B,)``, differentiable in the point and all that f and ℓ read."""
        z, mu, x = point
        return self.objective(z, x) + (mu * (self.state_map(z, x) - z)).sum(dim=1)

    def sweep(self, point: Point) -> Sweep:
        """One evaluation of the augmented map's ingredients, eq. 9-11."""
        z, mu, x = point
        vjp = self._vjp()
        image, pull = vjp(self.state_map, z, x)
        f_z, f_x = pull(mu, retain_graph=False)
        # Copies: f and the loss may write each result where their last one is, as CUDA graphs do.
        image, f_z, f_x = image.clone(), f_z.clone(), f_x.clone()
        value, loss_grad = self._loss(vjp, z, x)
        self.work.f += 1
        self.work.vjp += 1
        if self.apart:
            loss_grad = loss_grad[0].clone(), loss_grad[1].clone()
        f_z.add_(loss_grad[0])
        f_x.add_(loss_grad[1])
        found = self._measured(point, image, f_z, f_x, value)
        return found._replace(loss_grad=loss_grad) if self.apart else found

    def loss_gradient(self, z: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """∂ℓ/∂z and ∂ℓ/∂x, each of its block's shape."""
        return self._loss(pullback, z, x)[1]

    def _loss(
        self, vjp: Callable[..., tuple[Tensor, Pull]], z: Tensor, x: Tensor
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        self.work.loss += 1
        value, pull = vjp(self.objective, z, x)
        loss_z, loss_x = pull(torch.ones_like(value), retain_graph=False)
        return value, (loss_z, loss_x)

    def _vjp(self) -> Callable[..., tuple[Tensor, Pull]]:
        """Guarded the first time: what changes nothing then is taken to change nothing later."""
        if self.guarded:
            return pullback
        self.guarded = True
        return guarded_pullback

    def _measured(self, point: Point, f: Tensor, mu: Tensor, grad: Tensor, value: Tensor) -> Sweep:
        """The sweep with the relative norms of the KKT blocks, eq. 14."""
        z, x, n = point.z, point.x, point.z.shape[1]
        r = z.new_empty(len(z), 2 * n + x.shape[1])
        torch.sub(f, z, out=r[:, :n])
        torch.sub(mu, point.mu, out=r[:, n : 2 * n])
        torch.neg(grad, out=r[:, 2 * n :])
        off, adjoint_off, stationarity = Point.split(r, n)
        if self.project is not None:
            stationarity = x - self.constrain(x - grad)
        sizes = self.sizes(point)
        lengths = [norm(block) for block in (off, adjoint_off, stationarity)]
        residuals = Residuals(*(torch.stack(lengths) / sizes.whole).unbind())
        coupling = (point.mu * off).sum(dim=1)  # not a product of matrices: autocast would round it
        wide = value.to(sizes.whole.dtype)
        lagrangian = wide + coupling
        # The loss at the equilibrium of x is L + (μ⁺ − μ)ᵀ (I − ∂f/∂z)⁻¹ (f − z) and terms of the
        # square of f − z. An estimate below the loss at hand is not believed.
        doubt = lengths[0] * lengths[1]
        score = torch.maximum(wide, lagrangian) + doubt
        return Sweep(
            f, mu, grad, value, r, lagrangian, doubt, score, sizes, residuals, residuals.total, None
        )

    def linearize(self, z: Tensor, x: Tensor) -> tuple[Callable[[Tensor], Tensor], Tensor]:
        """μ ↦ (∂f/∂z)ᵀ μ at one (z, x), to be applied many times, and ∂ℓ/∂z there."""
        vjp = self._vjp()
        _, f_pull = vjp(lambda z: self.state_map(z, x), z)
        value, loss_pull = vjp(lambda z: self.objective(z, x), z)
        self.work.f += 1
        self.work.loss += 1

        def pull(mu: Tensor) -> Tensor:
            self.work.vjp += 1
            return f_pull(mu, retain_graph=True)[0]

        return pull, loss_pull(torch.ones_like(value), retain_graph=False)[0].clone()

    def constrain(self, x: Tensor) -> Tensor:
        """P_C(x)."""
        return x if self.project is None else self.project(x)

    def sizes(self, point: Point) -> Sizes:
        """The point's norms, and what residuals there are relative to."""
        z, mu, x = map(norm, point)
        state = torch.hypot(z, x)
        whole = 1 + torch.hypot(state, mu)
        # A norm that overflows would hide every residual: 0·∞ is NaN, and the point non-finite.
        return Sizes(z, mu, x, 1 + state, whole + 0 * whole)

    def gradient(self, point: Point, step: Tensor | float = 1.0) -> Point:
        """The KKT map ∇L as a differentiable function of the point and of everything f and ℓ read.

        Blocks in the order (∇_z L, ∇_μ L, ∇_x L), so that its Jacobian, the Hessian of L, is
        symmetric. With a constraint the last block is x − P_C(x − step ∇_x L), and it is not.
        """
        with torch.enable_grad():
            z, mu, x = (block if block.requires_grad else block.requires_grad_() for block in point)
            total = self.lagrangian(Point(z, mu, x)).sum()
            grad_z, grad_mu, grad_x = torch.autograd.grad(
                total, (z, mu, x), create_graph=True, materialize_grads=True
            )
            if self.project is not None:
                grad_x = x - self.project(x - step * grad_x)
            return Point(grad_z, grad_mu, grad_x)
