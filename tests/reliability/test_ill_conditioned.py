"""Gradients through ill-conditioned systems meet their tolerance, or say that they do not.

Linear-quadratic problems whose KKT matrix, and whose derivative of the solution, are known from
their factors: f = A z + B x, ℓ = ½‖W z − y‖² with W (I − A)⁻¹ B = Q₁ D Q₂, so that dx*/dy is
Q₂ᵀ D⁻¹ Q₁ᵀ, whatever the condition of D.

    python -m tests.reliability.test_ill_conditioned      # the table of docs/reliability.md
"""

import itertools
import warnings

import pytest
import torch
from tabulate import tabulate

from implicitopt import AdjointWarning, Box, FrozenInput, Implicit, fixed_point, solve

F64 = torch.float64
N = 6
CONDITIONS = [10.0**k for k in range(2, 11)]
PROJECTIONS = [None, Box(-1e30, 1e30)]


def orthogonal(seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(N, N, dtype=F64, generator=generator)).Q


def system(condition, seed):
    """A, W, and dx*/dy, for a reduced Hessian D² of that condition; B = I."""
    A = 0.5 * orthogonal(seed)
    D = torch.logspace(0, -0.5 * torch.tensor(condition).log10().item(), N, dtype=F64)
    Q1, Q2 = orthogonal(seed + 100), orthogonal(seed + 200)
    W = Q1 @ torch.diag(D) @ Q2 @ (torch.eye(N, dtype=F64) - A)
    return A, W, Q2.T @ torch.diag(1 / D) @ Q1.T


def kkt_matrix(A, W):
    """The Hessian of L in (z, μ, x)."""
    eye, zero = torch.eye(N, dtype=F64), torch.zeros(N, N, dtype=F64)
    return torch.cat(
        [
            torch.cat([W.T @ W, A.T - eye, zero], 1),
            torch.cat([A - eye, zero, eye], 1),
            torch.cat([zero, eye, zero], 1),
        ]
    )


def gradient_of(out, wrt):
    """The gradient, and whether the backward pass warned."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        (grad,) = torch.autograd.grad(out, wrt)
    return grad, any(issubclass(w.category, AdjointWarning) for w in caught)


def implicit(A, W, dx_dy, seed, project, dtype):
    """Whether Implicit() met its tolerance, the adjoint's report, c, and cᵀ dx*/dy, ours and true.

    Where it did not, it has said so.
    """
    y = torch.ones(1, N, dtype=dtype, requires_grad=True)
    A, W = A.to(dtype), W.to(dtype)
    sol = solve(
        lambda z, x: z @ A.T + x,
        lambda z, x: 0.5 * (z @ W.T - y).square().sum(-1),
        torch.zeros(1, N, dtype=dtype),
        max_steps=10,  # the system is the same everywhere
        project=project,
        adjoint=Implicit(),
    )
    c = torch.randn(1, N, generator=torch.Generator().manual_seed(seed), dtype=F64).to(dtype)
    grad, told = gradient_of((sol.x * c).sum(), y)
    reached = bool((sol.adjoint.status == 0).all())
    assert reached or told
    return reached, sol.adjoint, c, grad.double(), c.double() @ dx_dy


@pytest.mark.parametrize("dtype", [F64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("project", PROJECTIONS, ids=["free", "in a box"])
@pytest.mark.parametrize("condition", CONDITIONS, ids="{:.0e}".format)
def test_implicit_meets_its_tolerance_or_reports(condition, project, dtype):
    for seed in range(3):
        A, W, dx_dy = system(condition, seed)
        K = kkt_matrix(A, W)
        smallest = torch.linalg.svdvals(K)[-1].item()
        reached, report, c, grad, known = implicit(A, W, dx_dy, seed, project, dtype)
        if not reached:
            continue
        tol = 1e-10 if dtype == F64 else 1e-5
        assert report.residual.item() <= tol
        # An error of tol ‖c‖ in K w = c is one of tol ‖c‖ / σ_min in w; y's own is Wᵀ w_z.
        rounding = 1e2 * torch.finfo(dtype).eps * torch.linalg.matrix_norm(K, 2).item()
        bound = (tol + rounding) * c.norm().item() / smallest
        assert (grad - known).norm().item() <= 2 * bound


@pytest.mark.parametrize("condition", CONDITIONS, ids="{:.0e}".format)
def test_equilibria_near_singular_meet_their_tolerance_or_report(condition):
    for seed in range(3):
        Q, P = orthogonal(seed), orthogonal(seed + 300)
        J = Q @ torch.diag(torch.logspace(0, -torch.tensor(condition).log10().item(), N, dtype=F64))
        J = J @ P  # I − A
        A = torch.eye(N, dtype=F64) - J
        inverse = P.T @ torch.diag(1 / torch.linalg.svdvals(J)) @ Q.T
        x = torch.ones(1, N, dtype=F64, requires_grad=True)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the forward pass is not what is tested
            z = fixed_point(lambda z, x, A=A: z @ A.T + x, x, max_steps=20)
        c = torch.ones(1, N, dtype=F64)
        grad, told = gradient_of((z * c).sum(), x)
        bound = 2 * (1e-10 + 1e2 * 2e-16) * c.norm() * condition
        assert told or (grad - c @ inverse).norm() <= bound

        theta = torch.ones(1, N, dtype=F64, requires_grad=True)
        sol = solve(
            lambda z, x, A=A, theta=theta: z @ A.T + theta + 0 * x,
            lambda z, x: (z - x).square().sum(-1),
            torch.zeros(1, N, dtype=F64),
            max_steps=5,
            adjoint=FrozenInput(),
        )
        grad, told = gradient_of((sol.z * c).sum(), theta)
        assert told or (grad - c @ inverse).norm() <= bound


def test_a_singular_system_is_reported():
    y = torch.ones(1, 2, dtype=F64, requires_grad=True)
    sol = solve(
        lambda z, x: 0.5 * z + x,
        lambda z, x: (z[:, :1] - y[:, :1]).square().sum(-1),  # flat in the second coordinate
        torch.zeros(1, 2, dtype=F64),
        adjoint=Implicit(),
    )
    _, told = gradient_of(sol.x[:, 1].sum(), y)
    assert told
    assert (sol.adjoint.status != 0).all()


def table():
    """How many of ten met the tolerance, and the largest relative error of their gradients."""
    rows = []
    for condition in CONDITIONS:
        cells = []
        for dtype, project in itertools.product((F64, torch.float32), PROJECTIONS):
            found = [implicit(*system(condition, k), k, project, dtype) for k in range(10)]
            errors = [
                ((grad - known).norm() / known.norm()).item()
                for reached, *_, grad, known in found
                if reached
            ]
            cells.append(f"{len(errors)}: {max(errors):.0e}" if errors else "0")
        rows.append([f"{condition:.0e}", *cells])
    header = [
        "condition",
        "free, float64",
        "in a box, float64",
        "free, float32",
        "in a box, float32",
    ]
    return tabulate(rows, header, tablefmt="github", disable_numparse=True)


if __name__ == "__main__":
    print(table())
