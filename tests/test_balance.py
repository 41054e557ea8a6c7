"""Implicit derivatives where the loss and x come in very large or very small units.

The reference is the closed form of a linear-quadratic problem, in units of its own.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from implicitopt import SQP, Box, Implicit, Solution, Status, solve
from implicitopt.adjoint.balance import balance
from implicitopt.kkt import Point

F64 = torch.float64
TARGET, LOW, HIGH = 0.1, 0.15, 0.6
WEIGHTS = torch.tensor([1.0, 3.0, 2.0], dtype=F64)
SHIFT = torch.tensor([0.3, -0.2, 0.1], dtype=F64)
A = 0.5 * torch.eye(3, dtype=F64) + 0.1 * torch.eye(3, dtype=F64).roll(1, 0)


def in_units(loss_unit: float, x_unit: float, c: Tensor, w: Tensor, **options: Any) -> Solution:
    """x = argmin k Σ w (z − 1)² + (a x − .1)², z = Az + a x + c, with a = 1 / ``x_unit``."""
    map_z = A.to(c)
    return solve(
        lambda z, x: z @ map_z.mT + x / x_unit + c,
        lambda z, x: (w * (z - 1) ** 2 + (x / x_unit - TARGET) ** 2).sum(-1) * loss_unit,
        torch.zeros(1, 3).to(c), solver=SQP(), max_steps=40, **options,
    )  # fmt: skip


def closed_form(c: Tensor, w: Tensor, free: Tensor, at: Tensor) -> Tensor:
    """a x* with all but the inputs in ``free`` held ``at`` a value."""
    M = torch.linalg.inv(torch.eye(3, dtype=F64) - A)
    F = torch.eye(3, dtype=F64)[:, free]
    held = torch.where(free, 0.0, at)
    normal = M.mT @ w.diag() @ M + torch.eye(3, dtype=F64)
    rhs = M.mT @ (w * (1 - M @ (c + held))) + TARGET - held
    return held + F @ torch.linalg.solve(F.mT @ normal @ F, F.mT @ rhs)


def derivatives(u: Tensor, c: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    """The gradient of Σ u³ in (c, w), and that of its square, side by side."""
    first = torch.cat(torch.autograd.grad((u**3).sum(), (c, w), create_graph=True))
    second = torch.cat(torch.autograd.grad(first.square().sum(), (c, w)))
    return first.detach(), second


def corners_first(loss_unit: float, x_unit: float) -> Any:
    """What lies between the extremes is left to the slow tests."""
    corner = loss_unit in (1e-3, 1e10) and x_unit != 1.0
    return pytest.param(loss_unit, x_unit, marks=() if corner else pytest.mark.slow)


UNITS = [corners_first(k, a) for k in (1e-3, 1.0, 1e6, 1e10) for a in (1e-3, 1.0, 1e3)]


@pytest.mark.parametrize(("loss_unit", "x_unit"), UNITS)
@pytest.mark.parametrize("box", [False, True], ids=["free", "box"])
def test_derivatives_do_not_depend_on_units(loss_unit: float, x_unit: float, box: bool) -> None:
    c, w = SHIFT.clone().requires_grad_(), WEIGHTS.clone().requires_grad_()
    project = Box(LOW * x_unit, HIGH * x_unit) if box else None
    # As far as it goes: a tolerance is relative to μ, which is large where the loss is.
    sol = in_units(loss_unit, x_unit, c, w, project=project, tol=0.0, adjoint=Implicit())
    free = torch.tensor([not box, True, True])
    u = closed_form(c, w, free, torch.full((3,), LOW, dtype=F64))
    assert (sol.x[0] / x_unit - u).abs().max() < 1e-5
    expected = derivatives(u, c, w)
    found = derivatives(sol.x[0] / x_unit, c, w)
    assert sol.adjoint.status.tolist() == [Status.CONVERGED]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("loss_unit", [1e-4, 1.0, 1e4])
def test_nor_do_they_in_single_precision(loss_unit: float) -> None:
    c, w = SHIFT.float().requires_grad_(), WEIGHTS.float()
    sol = in_units(loss_unit, 1e-4, c, w, adjoint=Implicit())
    (found,) = torch.autograd.grad(sol.x.sum() / 1e-4, c)
    exact = SHIFT.clone().requires_grad_()
    u = closed_form(exact, WEIGHTS, torch.tensor([True] * 3), exact)
    (expected,) = torch.autograd.grad(u.sum(), exact)
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-4)


def test_a_preconditioner_is_in_the_units_of_the_system() -> None:
    """Not in the balanced ones: |H|⁻¹ leaves eigenvalues of ±1, for which two steps do."""
    k, a, eye = 1e6, 1e3, torch.eye(3, dtype=F64)
    blocks = [
        [2 * k * WEIGHTS.diag(), (A - eye).mT, 0 * eye],
        [A - eye, 0 * eye, a * eye],
        [0 * eye, a * eye, 2 * k * a * a * eye],
    ]
    H = torch.cat([torch.cat(row, dim=1) for row in blocks])
    values, vectors = torch.linalg.eigh(H)
    inverse = vectors @ (vectors / values.abs()).mT  # positive definite, as MINRES needs
    c, w = SHIFT.clone().requires_grad_(), WEIGHTS.clone()
    for precondition, most in ((lambda v: v @ inverse, 6), (None, 40)):
        adjoint = Implicit(precondition=precondition, recycle=0, tol=1e-8)
        sol = in_units(k, 1 / a, c, w, tol=1e-12, adjoint=adjoint)
        (found,) = torch.autograd.grad(a * sol.x.sum(), c)
        u = closed_form(c, w, torch.tensor([True] * 3), c)
        torch.testing.assert_close(found, torch.autograd.grad(u.sum(), c)[0], rtol=1e-5, atol=1e-5)
        assert sol.adjoint.steps is not None
        assert sol.adjoint.steps.item() <= most


def test_balanced_blocks_are_of_one_size() -> None:
    """Each problem's by itself: J − I keeps its size, L_zz and the rows of x get about 1."""
    generator = torch.Generator().manual_seed(0)
    n, d = 20, 12
    H = torch.randn(3, 2 * n + d, 2 * n + d, generator=generator, dtype=F64)
    H = (H + H.mT) / math.sqrt(2 * n + d)
    H[:, n : 2 * n, n : 2 * n] = 0
    scale = torch.tensor([[1.0, 1.0, 1.0], [3e4, 1 / 3e4, 1e-3], [1e-5, 1e5, 1e6]], dtype=F64)
    D = scale.repeat_interleave(torch.tensor([n, n, d]), dim=1)
    H = D[:, :, None] * H * D[:, None]
    units = balance(lambda w: (H @ w[..., None])[..., 0], torch.zeros(3, 2 * n + d, dtype=F64), n)
    z, mu, _ = Point.split(units, n)
    assert torch.equal(z * mu, torch.ones_like(z))
    assert torch.equal(torch.exp2(units.log2().round()), units)  # powers of two
    balanced = units[:, :, None] * H * units[:, None]
    for rows in (slice(n), slice(2 * n, None)):
        length = torch.linalg.matrix_norm(balanced[:, rows, rows], 2)
        assert ((length > 0.2) & (length < 5)).all()
    alone = balance(lambda w: (H[1] @ w[..., None])[..., 0], units[1:2], n)
    assert torch.equal(alone[0], units[1])


def test_without_curvature_units_are_the_own_ones() -> None:
    units = balance(lambda w: 0 * w, torch.zeros(2, 7), 2)
    assert torch.equal(units, torch.ones(2, 7))
    units = balance(lambda w: w * math.nan, torch.zeros(2, 7), 2)
    assert torch.equal(units, torch.ones(2, 7))
