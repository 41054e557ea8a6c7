"""Batched Krylov solvers: B independent linear systems A x = b, one row of a (B, n) tensor each.

A pass runs until every problem has converged by its recurrence, has broken down or has spent its
products. Then the residual is computed anew, and a problem that is not there yet starts another
pass on it while that helps (iterative refinement). Vectors are in the dtype of b (float32 for the
half precisions), all scalars and small matrices in float64.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

Operator = Callable[[Tensor], Tensor]
# A pass: (right-hand sides of norm 1 or 0, target, budget) -> (x, steps, products). Target and
# budget are per problem; a problem with budget 0 takes no part.
Pass = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor, int]]

SMALL = 1024  # up to this n every Krylov vector may be kept: at most n of them, as large as A
ROUNDING = 0.05  # the most rounding in A x, relative to b, for which an x is worth taking


class KrylovResult(NamedTuple):
    """What a Krylov solver found.

    Attributes:
        solution: (B, n), finite. The best iterate; 0 where none was better.
        residual: (B,) float64, ‖b − A x‖ / ‖b‖ of that solution, computed from it and not from a
            recurrence; 0 where b = 0, inf where b is not finite.
        converged: (B,) bool, residual ≤ tol.
        steps: (B,) int64, Krylov steps taken, each one product with A.
        products: the calls of matvec, those that compute residuals included.
    """

    solution: Tensor
    residual: Tensor
    converged: Tensor
    steps: Tensor
    products: int


@torch.no_grad()
def minres(
    matvec: Operator,
    b: Tensor,
    *,
    tol: float,
    max_steps: int,
    precondition: Operator | None = None,
    x0: Tensor | None = None,
    check_every: int | None = None,
    reorthogonalize: int | None = None,
) -> KrylovResult:
    """Solve A x = b for symmetric A, definite or not, by short recurrences.

    Minimizes ‖b − A x‖ (in the norm of M⁻¹ with a preconditioner) over the Krylov space. A problem
    whose A is singular and whose b is not in its range ends at a least-squares solution.

    Args:
        matvec: (B, n) -> (B, n), row i to Aᵢ times row i. It is called without autograd, and
            with zeros for a problem that has stopped.
        b: (B, n) right-hand sides.
        tol: bound on ‖b − A x‖ / ‖b‖, for each problem.
        max_steps: the most steps for each problem.
        precondition: row i to M⁻¹ times row i, M ≈ A symmetric positive definite.
        x0: (B, n) where to start; rows worse than 0 start from 0. None: 0.
        check_every: steps between looks at whether all problems are done. Each makes the host wait
            for the device; None: 10, and 1 on the CPU.
        reorthogonalize: how many of the last Lanczos vectors to keep, and to make each new one
            orthogonal to. None: all where n ≤ 1024, else none.

    Raises:
        ValueError: b, x0 or an option does not fit.

    Source: Paige & Saunders (1975); the scalars are those of their code. Keeping vectors: Fong &
    Saunders (LSMR, 2011), section 7.

    >>> A = torch.tensor([[2.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
    >>> result = minres(lambda v: v @ A, A[:1] - A[1:], tol=1e-12, max_steps=10)
    >>> result.solution.round(decimals=9).tolist(), result.converged
    ([[1.0, -1.0]], tensor([True]))
    """
    every = _check_options(b, x0, tol, max_steps, check_every)
    if reorthogonalize is not None and reorthogonalize < 0:
        raise ValueError(
            f"reorthogonalize must be >= 0; got {reorthogonalize}. Pass None to choose from n."
        )
    apply = _in_dtype_of(matvec, b)
    unit = None if precondition is None else _in_dtype_of(checked(precondition), b)
    keep = (
        (b.shape[1] if b.shape[1] <= SMALL else 0) if reorthogonalize is None else reorthogonalize
    )

    def run(rhs: Tensor, target: Tensor, budget: Tensor) -> tuple[Tensor, Tensor, int]:
        return _minres_pass(apply, unit, rhs, target, budget, max_steps, every, keep)

    # A pass ends converged or broken down: one that does not halve the residual is at its limit.
    return _refine(run, apply, b, x0, tol, max_steps, progress=0.5)


@torch.no_grad()
def gmres(
    matvec: Operator,
    b: Tensor,
    *,
    tol: float,
    max_steps: int,
    restart: int | None = None,
    precondition: Operator | None = None,
    x0: Tensor | None = None,
    check_every: int | None = None,
) -> KrylovResult:
    """Solve A x = b for general A, with as many stored vectors as steps between restarts.

    Minimizes ‖b − A x‖ over the Krylov space of A M⁻¹, then restarts from the solution found.

    Args:
        matvec, b, tol, max_steps, x0, check_every: as in `minres`.
        restart: steps between restarts; restart + 1 tensors like b are stored. None: no restart
            where n ≤ 1024, else 30.
        precondition: row i to M⁻¹ times row i, M ≈ A (right preconditioning).

    Raises:
        ValueError: b, x0 or an option does not fit.

    Source: Saad & Schultz (1986); each vector is made orthogonal twice by classical Gram–Schmidt,
    which is as good as Householder reflections (Giraud et al. 2005).

    >>> A = torch.tensor([[0.0, 1.0], [-1.0, 0.0]], dtype=torch.float64)
    >>> result = gmres(lambda v: v @ A.T, torch.eye(2, dtype=torch.float64), tol=1e-12, max_steps=9)
    >>> result.solution.round().tolist(), result.steps
    ([[0.0, 1.0], [-1.0, 0.0]], tensor([2, 2]))
    """
    every = _check_options(b, x0, tol, max_steps, check_every)
    if restart is not None and restart < 1:
        raise ValueError(f"restart must be >= 1; got {restart}. Pass None to choose from n.")
    apply = _in_dtype_of(matvec, b)
    unit = None if precondition is None else _in_dtype_of(checked(precondition), b)
    n = b.shape[1]
    length = min(restart or (n if n <= SMALL else 30), max_steps, n)

    def run(rhs: Tensor, target: Tensor, budget: Tensor) -> tuple[Tensor, Tensor, int]:
        return _gmres_pass(apply, unit, rhs, target, budget, length, every)

    return _refine(run, apply, b, x0, tol, max_steps, progress=0.999)


def _minres_pass(
    apply: Operator,
    unit: Operator | None,
    rhs: Tensor,
    target: Tensor,
    budget: Tensor,
    length: int,
    every: int,
    keep: int,
) -> tuple[Tensor, Tensor, int]:
    # Lanczos: A vₖ = βₖ₊₁ pₖ₊₁ + αₖ pₖ + βₖ pₖ₋₁ with p = M v and vᵀp = 1; p and v are the same
    # without a preconditioner. r is the residual, rₖ = sₖ² rₖ₋₁ − φ̄ₖ cₖ pₖ₊₁.
    p, v = rhs, rhs if unit is None else unit(rhs)
    beta = _dot(p, v).clamp(min=0).sqrt()
    active = (budget > 0) & (beta > 0) & beta.isfinite()
    p, v = _divide(p, beta, active), _divide(v, beta, active)
    x, w, w_old, p_old = (torch.zeros_like(rhs) for _ in range(4))
    r, phi_bar = rhs, beta
    cos, sin = -torch.ones_like(beta), torch.zeros_like(beta)
    d_bar, epsilon, size, stretch = (torch.zeros_like(beta) for _ in range(4))
    norm_r = torch.ones_like(beta)
    steps, products = torch.zeros_like(budget), 0
    kept_p = _Basis(keep)
    kept_v = kept_p if unit is None else _Basis(keep)
    tiny = torch.finfo(rhs.dtype).eps
    for step in range(length):
        if step % every == 0 and not active.any():
            break
        y = apply(v)
        products += 1
        steps = steps + active
        if unit is not None:
            stretch = torch.maximum(stretch, (_dot(y, y) / _dot(v, v)).sqrt())
        alpha = _dot(v, y)
        y = y - _col(beta, y) * p_old - _col(alpha, y) * p
        if keep:
            kept_p.append(p)
            if unit is not None:
                kept_v.append(v)
            y, _ = kept_p.remove_from(y, kept_v)
        z = y if unit is None else unit(y)
        beta_next = _dot(y, z).clamp(min=0).sqrt()
        size = torch.maximum(size, torch.hypot(alpha, beta_next))
        # The rotation of the Lanczos matrix's next column, as in Paige & Saunders.
        epsilon_old, delta, g_bar = epsilon, cos * d_bar + sin * alpha, sin * d_bar - cos * alpha
        epsilon, d_bar = sin * beta_next, -cos * beta_next
        # ‖A r‖ / ‖r‖: at rounding level r is in the null space, and x the best there is.
        slope = torch.hypot(g_bar, d_bar)
        gamma = torch.hypot(g_bar, beta_next)
        sound = active & (slope > tiny * size) & slope.isfinite() & gamma.isfinite()
        gamma = torch.where(sound, gamma, 1.0)
        cos, sin = g_bar / gamma, beta_next / gamma
        phi, phi_bar = cos * phi_bar, sin * phi_bar
        w_old, w = w, (v - _col(epsilon_old, v) * w_old - _col(delta, v) * w) / _col(gamma, v)
        x_next = x + _col(phi, x) * w
        # Rounding in A x is about ε ‖A‖ ‖x‖: no residual can be reached below that. A singular
        # system without a solution shows here, by a step far out along the null space.
        norm_a = size if unit is None else stretch
        rounding = tiny * norm_a * _dot(x_next, x_next).sqrt()
        sound = sound & (rounding < norm_r.clamp(max=ROUNDING))
        x = torch.where(sound[:, None], x_next, x)
        active = sound & (beta_next > tiny * size)
        p_old, beta = p, beta_next
        p = _divide(y, beta, active)
        v = p if unit is None else _divide(z, beta, active)
        r = _col(sin * sin, r) * r - _col(phi_bar * cos, r) * p
        norm_r = _dot(r, r).sqrt()
        active = active & (norm_r > target) & (steps < budget)
    return x, steps, products


def _gmres_pass(
    apply: Operator,
    unit: Operator | None,
    rhs: Tensor,
    target: Tensor,
    budget: Tensor,
    length: int,
    every: int,
) -> tuple[Tensor, Tensor, int]:
    # Arnoldi: A M⁻¹ Vₖ = Vₖ₊₁ Hₖ. With q the null vector of Hₖᵀ that begins with 1, the smallest
    # residual is 1 / ‖q‖ (Ayachour 2003): no rotations, one scalar product a step.
    v, active = rhs, (budget > 0) & (_dot(rhs, rhs) > 0)
    basis = _Basis(length)
    hessenberg = rhs.new_zeros(len(rhs), length + 1, length, dtype=torch.float64)
    null = torch.zeros_like(hessenberg[:, :, 0])
    null[:, 0] = 1.0
    square, most = null[:, 0].clone(), target**-2  # ‖q‖², and what it is at the target
    steps, columns, products = torch.zeros_like(budget), torch.zeros_like(budget), 0
    tiny = torch.finfo(rhs.dtype).eps
    for step in range(length):
        if step % every == 0 and not active.any():
            break
        basis.append(v)
        y = apply(v if unit is None else unit(v))
        products += 1
        steps = steps + active
        reach = _length(y)
        y, first = basis.remove_from(y, basis)
        y, second = basis.remove_from(y, basis)
        h, height = first + second, _length(y)
        sound = active & (height < math.inf)  # h too: an infinite part makes y NaN
        columns = columns + sound
        column = torch.cat((h, height[:, None]), dim=1)
        hessenberg[:, : step + 2, step] = column.masked_fill_(~sound[:, None], 0.0)
        active = sound & (height > tiny * reach) & (steps < budget)
        entry = (h * null[:, : step + 1]).sum(dim=1) / height
        entry = torch.where(active, entry, 0.0)
        null[:, step + 1] = -entry
        square = square + entry.square()
        active = active & (square < most)
        v = _divide(y, height, active)
    size = torch.linalg.vector_norm(hessenberg, dim=1).amax(dim=1)  # ‖A M⁻¹ v‖ at most
    # With this ridge ε ‖A‖ ‖x‖ ≤ ROUNDING, also where a singular A makes H singular.
    ridge = torch.where(size > 0, size * tiny / (2 * ROUNDING), 1.0)
    x = torch.zeros_like(rhs)
    # By number of columns: padding one problem to another's would change how it rounds.
    for used in columns.unique().tolist():
        if used:
            rows = (columns == used).nonzero().squeeze(1)
            weights = _least_squares(hessenberg[rows, : used + 1, :used], ridge[rows])
            x[rows] = torch.bmm(weights[:, None, :].to(x.dtype), basis.rows[rows, :used]).squeeze(1)
    return x if unit is None else unit(x), steps, products


def _least_squares(hessenberg: Tensor, ridge: Tensor) -> Tensor:
    """The y that minimizes ‖e₁ − H y‖² + ‖ridge y‖² for each H: (B, k + 1, k) -> (B, k)."""
    damping = torch.diag_embed(ridge[:, None].expand(-1, hessenberg.shape[2]))
    q, r = torch.linalg.qr(torch.cat([hessenberg, damping], dim=1))
    y: Tensor = torch.linalg.solve_triangular(r, q[:, 0, :, None], upper=True)
    return y.squeeze(2)


def _refine(
    run: Pass,
    apply: Operator,
    b: Tensor,
    x0: Tensor | None,
    tol: float,
    max_steps: int,
    progress: float,
) -> KrylovResult:
    """Passes on the residual of the solution so far, until it is small or they no longer help."""
    dtype = b.dtype
    b = b.to(torch.promote_types(dtype, torch.float32))
    norm_b = _norm(b)
    sound = norm_b.isfinite()
    nonzero = sound & (norm_b > 0)
    b = torch.where(nonzero[:, None], b, 0.0)
    x, r = torch.zeros_like(b), b
    residual = torch.where(sound, nonzero.double(), torch.inf)
    steps, products = torch.zeros_like(norm_b, dtype=torch.int64), 0

    def improved(x_try: Tensor, allowed: Tensor) -> Tensor:
        nonlocal x, r, residual, products
        x_try = torch.where((allowed & x_try.isfinite().all(dim=1))[:, None], x_try, x)
        r_try = b - apply(x_try)
        products += 1
        residual_try = _norm(r_try) / torch.where(nonzero, norm_b, 1.0)
        better = allowed & (residual_try < residual)
        x = torch.where(better[:, None], x_try, x)
        r = torch.where(better[:, None], r_try, r)
        before, residual = residual, torch.where(better, residual_try, residual)
        return better & (residual < progress * before)

    if x0 is not None:
        improved(x0.to(b.dtype), nonzero)
    alive = nonzero
    while (alive := alive & (residual > tol) & (steps < max_steps)).any():
        norm_r = torch.where(alive, residual * norm_b, 1.0)
        # A margin for rounding: a pass that misses by a hair costs another pass.
        target = 0.9 * tol / residual.clamp(min=torch.finfo(torch.float64).tiny)
        rhs = torch.where(alive[:, None], r / _col(norm_r, r), 0.0)
        change, taken, calls = run(rhs, target, torch.where(alive, max_steps - steps, 0))
        steps, products = steps + taken, products + calls
        alive = improved(x + _col(norm_r, x) * change, alive)
    return KrylovResult(x.to(dtype), residual, residual <= tol, steps, products)


class _Basis:
    """The last `size` vectors of each problem; the storage grows as they come."""

    def __init__(self, size: int) -> None:
        self.size, self.count = size, 0
        self.rows = torch.empty(0)

    def append(self, v: Tensor) -> None:
        if self.count == 0:
            self.rows = v.new_zeros(len(v), min(self.size, 8), v.shape[1])
        elif self.count == self.rows.shape[1] < self.size:
            self.rows = torch.cat([self.rows, torch.zeros_like(self.rows)], dim=1)[:, : self.size]
        self.rows[:, self.count % self.size] = v
        self.count += 1

    def remove_from(self, y: Tensor, dual: _Basis) -> tuple[Tensor, Tensor]:
        """y less its components along these vectors, and the components: dualᵀ y, float64."""
        used = min(self.count, self.size)
        y = y[:, None]
        parts = torch.bmm(y, dual.rows[:, :used].mT)
        y = torch.baddbmm(y, parts, self.rows[:, :used], alpha=-1)
        return y.squeeze(1), parts.squeeze(1).double()


def _dot(u: Tensor, v: Tensor) -> Tensor:
    return (u * v).sum(dim=1, dtype=torch.float64)


def _length(v: Tensor) -> Tensor:
    length: Tensor = torch.linalg.vector_norm(v, dim=1, dtype=torch.float64)
    return length


def _norm(v: Tensor) -> Tensor:
    # Scaled: squares of tiny gradients would underflow in float32, and b count as 0.
    peak = v.abs().amax(dim=1)
    return peak * _dot(*[v / torch.where(peak > 0, peak, 1.0)[:, None]] * 2).sqrt()


def _col(scalars: Tensor, like: Tensor) -> Tensor:
    return scalars.to(like.dtype)[:, None]


def _divide(y: Tensor, scalars: Tensor, active: Tensor) -> Tensor:
    # Problems that have stopped go on as zeros, which no NaN of theirs survives.
    return torch.where(active[:, None], y / _col(scalars, y), 0.0)


def checked(precondition: Operator) -> Operator:
    """The preconditioner, which says so where what it returns does not fit."""

    def apply(v: Tensor) -> Tensor:
        found: object = precondition(v)
        if not isinstance(found, Tensor) or found.shape != v.shape:
            got = tuple(found.shape) if isinstance(found, Tensor) else repr(found)
            raise TypeError(
                f"precondition must return a tensor shaped like its argument, {tuple(v.shape)}; "
                f"got {got}. Return an approximate inverse of H times each row."
            )
        return found

    return apply


def _in_dtype_of(operator: Operator, b: Tensor) -> Operator:
    return lambda v: operator(v.to(b.dtype)).to(v.dtype)


def _check_options(
    b: Tensor, x0: Tensor | None, tol: float, max_steps: int, check_every: int | None
) -> int:
    """Raises on what does not fit; else the steps between looks at the device."""
    if b.ndim != 2 or b.shape[1] == 0 or not b.is_floating_point():
        raise ValueError(
            f"b must be a floating-point tensor of shape (B, n), n >= 1; got {b.dtype} of shape "
            f"{tuple(b.shape)}. Flatten each problem to one row."
        )
    if x0 is not None and x0.shape != b.shape:
        raise ValueError(
            f"x0 must have the shape of b, {tuple(b.shape)}; got {tuple(x0.shape)}. "
            "Reshape it, or pass None to start from 0."
        )
    if not tol >= 0 or max_steps < 1 or (check_every is not None and check_every < 1):
        raise ValueError(
            "expected tol >= 0, max_steps >= 1 and check_every >= 1 or None; got "
            f"tol={tol}, max_steps={max_steps}, check_every={check_every}. Correct these."
        )
    # The CPU computes in order: there a look costs nothing, and saves products.
    return check_every or (1 if b.device.type == "cpu" else 10)
