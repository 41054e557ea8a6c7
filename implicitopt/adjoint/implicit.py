"""Implicit differentiation of a root: the full KKT system, or the state equation alone.

A solution v*(θ) of r(v, θ) = 0 has dv* = −J⁻¹ ∂r/∂θ dθ with J = ∂r/∂v (JIIO eq. 16-17). The
residual is evaluated outside any autograd Function, so that every tensor that f and the loss close
over is in its graph; `_RootTwice` then carries a cotangent c of v* to −w of r, where Jᵀw = c.

When the backward pass is being recorded, its result −wᵀ ∂r/∂θ must itself depend on θ through v*
and through w. So r is evaluated a second time, at a v* attached by `_Root`, and w, being a root of
s(w) = Jᵀw − c, is attached by the same rule. Second derivatives are exact then; a third would need
a third evaluation, and raises.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from implicitopt.accelerators.anderson import window
from implicitopt.adjoint.balance import balance
from implicitopt.adjoint.envelope import Attached, FirstOrderValue, optimal_value, refuse
from implicitopt.adjoint.krylov import SMALL, KrylovResult, Operator, checked, gmres, minres
from implicitopt.autocast import autocast_off, precision
from implicitopt.kkt import KKT, Point
from implicitopt.options import check_callable, check_option
from implicitopt.solution import AdjointReport, Status

__all__ = ["AdjointWarning", "FrozenInput", "Implicit", "LinearOptions", "attach_root"]


#: How many of the solve's differences are kept where nobody says: at least and at most.
RECYCLED = 20, 60
#: Vectors that GMRES keeps on a KKT system of more than ``SMALL`` unknowns.
VECTORS = 60


class AdjointWarning(UserWarning):
    """The linear system of a backward pass was not solved to its tolerance.

    The gradient is then inexact, by about the residual that ``sol.adjoint`` reports.

    >>> import torch, implicitopt, warnings
    >>> scale = torch.tensor([1.0, 2.0, 3.0], requires_grad=True)
    >>> sol = implicitopt.solve(
    ...     lambda z, x: 0.5 * z + x, lambda z, x: (scale * (z - 1) ** 2 + x**2).sum(),
    ...     torch.zeros(3), adjoint=implicitopt.Implicit(max_steps=1, recycle=0),
    ... )
    >>> with warnings.catch_warnings(record=True) as caught:
    ...     warnings.simplefilter("always")
    ...     sol.x.sum().backward()
    >>> issubclass(caught[0].category, implicitopt.AdjointWarning)
    True
    """


@dataclass(frozen=True)
class LinearOptions:
    """How the adjoint system is solved: relative tolerance, iteration limit, preconditioner."""

    tol: float | None
    max_steps: int
    precondition: Callable[[Tensor], Tensor] | None = None

    def __post_init__(self) -> None:
        if self.tol is not None:
            check_option("adjoint tol", self.tol, float, above=0, below=1)
        check_option("adjoint max_steps", self.max_steps, int, least=1)
        if self.precondition is not None:
            check_callable("precondition", self.precondition, "precondition(v)")

    def tolerance(self, dtype: torch.dtype) -> float:
        """The tolerance asked for, or what the dtype can be expected to reach."""
        return self.tol or {torch.float64: 1e-10, torch.float32: 1e-5}.get(dtype, 1e-2)


@dataclass(frozen=True)
class Implicit:
    """Differentiate ``sol.x``, ``sol.z``, ``sol.mu`` through the whole KKT system, once or twice.

    GMRES solves the adjoint system with its rows as the joint iteration has them, (f − z, μ⁺ − μ,
    −∇ₓL). There it is near −1 in z and μ if f contracts, and what that leaves of it in x, the
    reduced loss's Hessian, has the same sign: so it takes a quarter to two thirds of the products.
    Without a constraint the Jacobian of the KKT map is the Hessian of the Lagrangian, symmetric and
    indefinite, and where GMRES has used up its vectors MINRES goes on. One product costs two
    sweeps. After ``.backward()``, ``sol.adjoint`` says how each problem's system went; one that
    failed raises an :class:`AdjointWarning`.

    The solve's own sweeps make a preconditioner: between two of them the iterate and the residual
    of the system changed by s and y ≈ As, so that s is about what A⁻¹ makes of y. GMRES then takes
    half of the products on linear maps, and solves the same system to the same tolerance. It is
    left out for problems that did not converge, and where differences contradict each other, as
    where f bends much on the way or has kinks.

    Args:
        tol: relative residual ‖D(Hw − c)‖ / ‖Dc‖ per problem, D being units of z, μ and x in which
            H's blocks are alike: so loss and x may come in any units. Default 1e-10 in float64,
            1e-5 in float32, 1e-2 in half precision and where autocast makes products in it.
        max_steps: Krylov iterations at most.
        precondition: approximate inverse of H on a ``(B, 2n + d)`` matrix whose columns are
            ordered (z, μ, x). Where there is no constraint it must be symmetric positive definite,
            and MINRES takes it from the start.
        recycle: how many of the solve's last differences to keep for that, of two states each and,
            after ``SQP``, a gradient of the loss. 0: none. None: 60, fewer for more than a thousand
            unknowns, at least 20; none where there is a constraint or ``precondition``.

    Raises:
        TypeError, ValueError: an option is not as above.
        RuntimeError: on a third derivative.

    Source: JIIO section 3.2, eq. 16-17; the solve's differences for the backward pass: SHINE,
    Ramzi et al. 2022, without the Krylov method that makes it exact.

    >>> import torch, implicitopt
    >>> theta = torch.tensor(2.0, requires_grad=True)
    >>> sol = implicitopt.solve(
    ...     lambda z, x: 0.5 * z + x,
    ...     lambda z, x: ((z - theta) ** 2 + x**2).sum(),  # least at x = 2θ/5
    ...     torch.zeros(1), tol=1e-6, adjoint=implicitopt.Implicit(),
    ... )
    >>> sol.x.sum().backward()
    >>> round(theta.grad.item(), 4)
    0.4
    """

    tol: float | None = None
    max_steps: int = 500
    precondition: Callable[[Tensor], Tensor] | None = None
    recycle: int | None = None

    def __post_init__(self) -> None:
        LinearOptions(self.tol, self.max_steps, self.precondition)
        if self.recycle is not None:
            check_option("adjoint recycle", self.recycle, int, least=0)

    def differences(self, kkt: KKT, start: Point) -> int:
        """How many of the solve's differences the backward pass has a use for."""
        if kkt.project is not None or self.precondition is not None:
            return 0
        unknowns = sum(block.shape[1] for block in start)
        return window(unknowns, *RECYCLED) if self.recycle is None else self.recycle

    def attach(self, kkt: KKT, point: Point, value: Tensor, report: AdjointReport) -> Attached:
        n = point.z.shape[1]
        units, step = None, torch.ones_like(point.x[:, :1])
        if kkt.project is not None and self.precondition is None:
            units, step = _constrained_units(kkt, point)

        def residual(v: Tensor) -> Tensor:
            return kkt.gradient(Point.split(v, n), step).joined()

        options = LinearOptions(self.tol, self.max_steps, self.precondition)
        v = attach_root(
            residual,
            point.joined(),
            options,
            report,
            symmetric=kkt.project is None,
            saddle=n,
            units=units,
            near_inverse=kkt.near_inverse,
            remedy="See sol.adjoint; raise max_steps, loosen tol, pass a preconditioner, or "
            "regularize x in the loss.",
        )
        z, mu, x = Point.split(v, n)
        first = optimal_value(kkt, point)
        full = kkt.lagrangian(Point(z, mu, x))
        return Attached(z, mu, x, _Value.apply(first, full, value))


@dataclass(frozen=True)
class FrozenInput:
    """Hold x* constant and differentiate the state z*(θ) = f(z*, x*; θ) only.

    What the paper does where the outer loss differs from the inner one: cheaper than
    :class:`Implicit` and biased, since x* moves with θ too. ``sol.x`` carries no gradient;
    backward through ``sol.mu``, and second derivatives of ``sol.value``, raise.

    Args:
        tol: relative residual of the linear solve with (I − ∂f/∂z)ᵀ. Default 1e-10 in float64,
            1e-5 in float32, 1e-2 in half precision and where autocast makes products in it.
        max_steps: GMRES iterations at most.

    Raises:
        TypeError, ValueError: an option is not as above.

    Source: JIIO section 3.2.

    >>> import torch, implicitopt
    >>> theta = torch.tensor(2.0, requires_grad=True)
    >>> sol = implicitopt.solve(
    ...     lambda z, x: 0.5 * z + theta * x,              # z* = 2θx
    ...     lambda z, x: ((z - 4) ** 2).sum(),             # least at x = 2/θ
    ...     torch.zeros(1), tol=1e-6, adjoint=implicitopt.FrozenInput(),
    ... )
    >>> sol.z.sum().backward()                             # 2x, while the whole derivative is 0
    >>> round(theta.grad.item(), 3)
    2.0
    """

    tol: float | None = None
    max_steps: int = 500

    def __post_init__(self) -> None:
        LinearOptions(self.tol, self.max_steps)

    def attach(self, kkt: KKT, point: Point, value: Tensor, report: AdjointReport) -> Attached:
        def residual(z: Tensor) -> Tensor:
            return kkt.state_map(z, point.x) - z

        options = LinearOptions(self.tol, self.max_steps)
        z = attach_root(
            residual, point.z, options, report, symmetric=False,
            remedy="See sol.adjoint; raise max_steps, or loosen tol.",
        )  # fmt: skip
        first = optimal_value(kkt, point)
        value = FirstOrderValue.apply(first, value, "FrozenInput")
        return Attached(z, refuse(point.mu, first, "FrozenInput"), point.x, value)


class _Value(torch.autograd.Function):
    """The value, with the envelope's gradient when that is all that is asked for.

    ``first`` is L at the constant solution, ``full`` is L at the attached one. Their gradients
    agree where the KKT conditions hold; only ``full`` has the right second derivatives, and only
    ``first`` needs no linear solve.
    """

    @staticmethod
    def forward(ctx: Any, first: Tensor, full: Tensor, value: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        recorded = torch.is_grad_enabled()
        return (None, grads[0], None) if recorded else (grads[0], None, None)


class Units(NamedTuple):
    """By what a Jacobian's rows and columns are multiplied before it is solved with, ``(B, N)``."""

    rows: Tensor
    columns: Tensor


def _constrained_units(kkt: KKT, point: Point) -> tuple[Units, Tensor]:
    """Units for the KKT map with a constraint, and the step in x in its last block, ``(B, 1)``.

    A step of the order of one over the curvature in x tells which constraints hold x back: over a
    longer one, errors in ∇ₓL would take x to the other end of C.
    """
    n, free, v = point.z.shape[1], replace(kkt, project=None), point.joined()
    system = _System(
        lambda v: free.gradient(Point.split(v, n)).joined(), True, LinearOptions(None, 1),
        AdjointReport(),
    )  # fmt: skip
    units = balance(system.product(v, transpose=True, record=False), v, n)
    unit = units[:, -1:]
    limit = torch.finfo(point.x.dtype).max ** 0.5
    step = unit.square().clamp(1 / limit, limit)
    rows = torch.cat([units[:, : 2 * n], (unit / step).expand_as(point.x)], dim=1)
    return Units(rows, units), step.to(point.x.dtype)


@dataclass
class _System:
    """Solves with the Jacobian J(v) = ∂r/∂v or its transpose, differentiably."""

    residual: Callable[[Tensor], Tensor]
    symmetric: bool
    options: LinearOptions
    report: AdjointReport = field(repr=False)
    saddle: int = 0  # n where rows and columns are (z, μ, x), z and μ n numbers each
    near_inverse: Callable[[Tensor], Operator] | None = None  # as the KKT system has it
    remedy: str = ""  # what the warning says to do
    units: Units | None = None  # of a saddle's rows and columns, known from the first solve on

    def product(self, v: Tensor, *, transpose: bool, record: bool) -> Callable[[Tensor], Tensor]:
        """w ↦ J(v)ᵀ w or J(v) w, from one linearization; in the autograd graph if ``record``."""
        with torch.enable_grad():
            if not (record and v.requires_grad):
                v = v.detach().requires_grad_()
            image = self.residual(v)

        def transposed(w: Tensor, create_graph: bool = record) -> Tensor:
            (out,) = torch.autograd.grad(
                image, v, w, retain_graph=True, create_graph=create_graph, materialize_grads=True
            )
            return out

        if transpose or self.symmetric:
            return transposed
        with torch.enable_grad():  # J w is the derivative of p ↦ Jᵀp, which is linear, along w
            probe = torch.zeros_like(image, requires_grad=True)
            pulled = transposed(probe, create_graph=True)

        def straight(w: Tensor) -> Tensor:
            (out,) = torch.autograd.grad(
                pulled, probe, w, retain_graph=True, create_graph=record, materialize_grads=True
            )
            return out

        return straight

    def solve(self, v: Tensor, c: Tensor, *, transpose: bool) -> Tensor:
        """w with J(v)ᵀ w = c, or J(v) w = c; differentiable in v, c and θ if grad mode is on."""
        w = self._krylov(v.detach(), c.detach(), transpose=transpose)
        if not torch.is_grad_enabled():
            return w
        slack = self.product(v, transpose=transpose, record=True)(w) - c
        solved: Tensor = _LinearRoot.apply(slack, w, v, self, transpose)
        return solved

    def _krylov(self, v: Tensor, c: Tensor, *, transpose: bool) -> Tensor:
        sound = torch.isfinite(c).all(dim=1)
        product = self.product(v, transpose=transpose, record=False)
        tol = self.options.tolerance(precision(c))
        with torch.no_grad(), autocast_off(c.device):
            c = torch.where(sound[:, None], c, torch.zeros_like(c))
            result = self._solved(product, c, tol, transpose=transpose)
        solved = result.converged & sound
        status = torch.full_like(result.steps, Status.MAX_STEPS)
        status = torch.where(solved, torch.full_like(status, Status.CONVERGED), status)
        bad = ~(sound & torch.isfinite(result.residual))
        self.report.status = torch.where(bad, torch.full_like(status, Status.NONFINITE), status)
        self.report.residual = result.residual
        self.report.steps = result.steps
        self.report.products += result.products
        if not bool(solved.all()):
            worst = result.residual[torch.isfinite(result.residual)]
            largest = worst.max().item() if len(worst) else float("nan")
            point = self.report.point
            away = 0 if point is None else int((~solved & (point != Status.CONVERGED)).sum())
            unsettled = (
                f" The solve itself had not converged in {away} of them: raise its max_steps "
                "first, since away from a solution the gradient means little however well its "
                "system is solved."
            )
            warnings.warn(
                f"the adjoint system of {int((~solved).sum())} of {len(solved)} problems was not "
                f"solved to the relative residual {tol:.0e} in "
                f"{self.options.max_steps} steps (worst {largest:.1e}): their gradient is "
                f"approximate, and zero where it was not finite. {self.remedy}"
                + (unsettled if away else ""),
                AdjointWarning,
                stacklevel=2,
            )
        return torch.where(bad[:, None], torch.zeros_like(c), result.solution)

    def _solved(self, product: Operator, c: Tensor, tol: float, *, transpose: bool) -> KrylovResult:
        """The system, in units in which its blocks are alike, and its residual in these."""
        given, probes = self.options.precondition, 0
        if not self.saddle:
            return self._by_krylov(product, c, tol, given)
        wide = torch.promote_types(c.dtype, torch.float32)
        if self.units is None:
            units, probes = balance(product, c, self.saddle), 2
            self.units = Units(units, units)
        inner, outer = self.units.rows, self.units.columns
        if not transpose:
            inner, outer = outer, inner

        def scaled(w: Tensor) -> Tensor:
            return outer * product((inner * w).to(c.dtype)).to(wide)

        def precondition(w: Tensor) -> Tensor:
            assert given is not None
            return checked(given)((w / outer).to(c.dtype)).to(wide) / inner

        unit = None if given is None else precondition
        found = self._by_krylov(scaled, outer * c.to(wide), tol, unit)
        solution = (inner * found.solution).to(c.dtype)
        return found._replace(solution=solution, products=found.products + probes)

    def _by_krylov(
        self, product: Operator, c: Tensor, tol: float, unit: Operator | None
    ) -> KrylovResult:
        """By the Krylov method that suits the system, with the preconditioner ``unit`` if any."""
        most = self.options.max_steps
        near = None
        if self.near_inverse is not None and self.units is not None:
            near = self.near_inverse(self.units.columns)
        if self.symmetric and unit is not None:
            return minres(product, c, tol=tol, max_steps=most, precondition=unit)
        vectors = c.shape[1] if c.shape[1] <= SMALL else VECTORS
        length = min(most, vectors) if self.symmetric else most
        first = gmres(
            lambda w: self._swapped(product(w)),
            self._swapped(c),
            tol=tol,
            max_steps=length,
            restart=vectors if self.saddle else None,
            precondition=near if unit is None else lambda w: unit(self._swapped(w)),
        )
        if length == most or bool(first.converged.all()):
            return first
        rest = minres(product, c, tol=tol, max_steps=most - length, x0=first.solution)
        return rest._replace(
            steps=first.steps + rest.steps, products=first.products + rest.products
        )

    def _swapped(self, rows: Tensor) -> Tensor:
        """∇L to what the joint iteration adds, (f − z, μ⁺ − μ, −∇ₓL), or back."""
        if not self.saddle:
            return rows
        z, mu, x = Point.split(rows, self.saddle)
        return torch.cat((mu, z, -x), dim=1)


class _Root(torch.autograd.Function):
    """(r, v) ↦ v with dv = −J(v)⁻¹ dr."""

    @staticmethod
    def forward(ctx: Any, residual: Tensor, v: Tensor, system: _System) -> Tensor:
        root = v.clone()
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(root)
        ctx.system = system
        return root

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, None, None]:
        if grads[0] is None:
            return None, None, None
        (v,) = ctx.saved_tensors
        return -ctx.system.solve(v, grads[0], transpose=True), None, None


class _RootTwice(torch.autograd.Function):
    """(r(v₀), r(v₁), v₁) ↦ v with dv = −J⁻¹ dr: of r(v₀) if that is all, of r(v₁) if recorded.

    v₀ is a constant and v₁ the root attached by `_Root`, so that −wᵀ ∂r/∂θ at v₁ has a derivative
    in v₁. What r(v₁) sends on to v₁, −Jᵀw, the cotangent c sent there as well takes away again.
    """

    @staticmethod
    def forward(ctx: Any, constant: Tensor, attached: Tensor, v: Tensor, system: _System) -> Tensor:
        root = v.clone()
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(root)
        ctx.system = system
        return root

    @staticmethod
    def backward(
        ctx: Any, *grads: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        if grads[0] is None:
            return None, None, None, None
        (v,) = ctx.saved_tensors
        w = ctx.system.solve(v, grads[0], transpose=True)
        if torch.is_grad_enabled():
            return None, -w, grads[0], None
        return -w, None, None, None


class _LinearRoot(torch.autograd.Function):
    """(s, w) ↦ w for s = Jᵀw − c (or Jw − c), with dw = −J⁻ᵀ ds (or −J⁻¹ ds)."""

    @staticmethod
    def forward(
        ctx: Any, slack: Tensor, w: Tensor, v: Tensor, system: _System, transpose: bool
    ) -> Tensor:
        ctx.save_for_backward(v)
        ctx.system, ctx.transpose = system, transpose
        return w.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None, None]:
        (v,) = ctx.saved_tensors
        with torch.no_grad():
            solved = -ctx.system.solve(v, grads[0], transpose=not ctx.transpose)
        if torch.is_grad_enabled():
            solved = _NoThird.apply(solved, v, grads[0])
        return solved, None, None, None, None


class _NoThird(torch.autograd.Function):
    """The identity; an error on the way back to the tensors that ``solved`` depends on."""

    @staticmethod
    def forward(ctx: Any, solved: Tensor, v: Tensor, cotangent: Tensor) -> Tensor:
        return solved.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, None, None]:
        raise RuntimeError(
            "a third derivative through an implicitly differentiated solution was asked for, but "
            "only the first and second are right; drop create_graph=True from the second "
            "backward pass, or unroll f by hand"
        )


def attach_root(
    residual: Callable[[Tensor], Tensor],
    v: Tensor,
    options: LinearOptions,
    report: AdjointReport,
    *,
    symmetric: bool,
    saddle: int = 0,
    units: Units | None = None,
    near_inverse: Callable[[Tensor], Operator] | None = None,
    remedy: str = "",
) -> Tensor:
    """The root ``v`` of ``residual``, ``(B, N)``, differentiable in all that ``residual`` reads.

    ``saddle``: n where v is (z, μ, x) and the residual ∇L, z and μ being n numbers each. Then the
    system is solved in ``units``, found by two products where they are not given, and in those of v
    ``near_inverse``, where there is one, makes about the inverse of the joint iteration's Jacobian.
    ``remedy``: what the warning says to do where a linear solve fails.
    """
    v = v.detach()
    system = _System(residual, symmetric, options, report, saddle, near_inverse, remedy, units)
    constant = residual(v)
    once: Tensor = _Root.apply(constant, v, system)
    if not once.requires_grad:
        return once
    root: Tensor = _RootTwice.apply(constant, residual(once), once, system)
    return root
