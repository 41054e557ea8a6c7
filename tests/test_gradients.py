"""Gradients through solve() and fixed_point() of tanh networks.

The references are long unrolled loops, which autograd follows step by step, and finite differences.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from families import F64, Known, TanhProblem, relative, unrolled, worst
from torch import Tensor, nn

import implicitopt
from implicitopt import (
    AdjointWarning,
    Envelope,
    FrozenInput,
    Implicit,
    Joint,
    L2Ball,
    Status,
    fixed_point,
    jacobian_penalty,
)

PRECISE = {"tol": 1e-12, "max_steps": 1000}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def solved(problem: TanhProblem, **options: Any) -> implicitopt.Solution:
    sol = implicitopt.solve(
        problem.f, problem.loss, problem.x0, problem.z0, **{**PRECISE, **options}
    )
    return sol.raise_if_failed()


def reference(problem: TanhProblem, steps: int = 300, **options: Any) -> Known:
    x, z = problem.x0.clone(), problem.z0.clone()
    return unrolled(problem.f, problem.loss, x, z, steps=steps, **options)


def gradient(scalar: Tensor, theta: list[Tensor], *, create_graph: bool = False) -> list[Tensor]:
    grads = torch.autograd.grad(
        scalar, theta, retain_graph=True, create_graph=create_graph, materialize_grads=True
    )
    return list(grads)


def outer(x: Tensor, z: Tensor, mu: Tensor) -> Tensor:
    """A smooth function of all three blocks that treats no two entries alike."""
    total = x.new_zeros(())
    for block, shift in ((x, 0.1), (z, 0.7), (mu, 1.3)):
        weight = torch.cos(torch.arange(block.numel(), dtype=F64) + shift).reshape(block.shape)
        total = total + (weight * block + torch.sin(block + weight)).sum()
    return total


# ---------------------------------------------------------------- against a long unrolled loop


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("ball", [None, 0.15])
def test_every_parameter_gets_the_gradient_of_the_unrolled_loop(
    seed: int, ball: float | None
) -> None:
    """Module parameters, a buffer, a target, and a tensor that the loss captured as a non-leaf."""
    problem = TanhProblem.draw(seed=seed)
    project = None if ball is None else L2Ball(ball)
    known = reference(problem, project=project)
    sol = solved(problem, project=project, adjoint=Implicit())
    found = Known(sol.x, sol.z, sol.mu, sol.value)
    assert worst(found, known) <= 1e-9
    if ball is not None:
        lengths = torch.linalg.vector_norm(known.x, dim=1)
        assert bool((lengths >= ball - 1e-9).any())  # the constraint is felt
    theta = list(problem.theta.values())

    answer = gradient(known.value.sum(), theta)
    assert all(bool(g.abs().max() > 1e-4) for g in answer)  # each is really there to be lost
    for adjoint in (Envelope(), FrozenInput(), Implicit()):
        other = solved(problem, project=project, adjoint=adjoint)
        assert worst(gradient(other.value.sum(), theta), answer) <= 1e-8, adjoint

    answer = gradient(outer(*known[:3]), theta)
    assert worst(gradient(outer(*found[:3]), theta), answer) <= 1e-7
    for name in ("x", "z", "mu"):  # each block alone
        found_grads = gradient(getattr(found, name).sin().sum(), theta)
        assert worst(found_grads, gradient(getattr(known, name).sin().sum(), theta)) <= 1e-7, name


def test_second_derivatives_are_those_of_the_unrolled_loop() -> None:
    problem = TanhProblem.draw(n=3, d=2, seed=4)
    known, sol = reference(problem), solved(problem, adjoint=Implicit())
    theta = list(problem.theta.values())
    for found, answer in (
        (outer(sol.x, sol.z, sol.mu), outer(*known[:3])),
        (sol.value.sum(), known.value.sum()),
    ):
        sides = []
        for scalar in (found, answer):
            grads = gradient(scalar, theta, create_graph=True)
            slope = sum((g * g.detach().cos()).sum() for g in grads)
            sides.append(gradient(slope, theta))
        assert worst(*sides) <= 1e-6


def test_maximize_gives_the_gradient_of_the_unrolled_loop() -> None:
    """The loss as given is −ℓ, and so is its adjoint."""
    problem = TanhProblem.draw(seed=5)
    positive = problem.loss
    problem = problem._replace(loss=lambda z, x: -positive(z, x))
    known = reference(problem, sign=-1.0)
    sol = solved(problem, maximize=True, adjoint=Implicit())
    assert worst((sol.x, sol.z, sol.mu, sol.value), known) <= 1e-9
    theta = list(problem.theta.values())
    assert worst(gradient(sol.value.sum(), theta), gradient(known.value.sum(), theta)) <= 1e-8
    found, answer = outer(sol.x, sol.z, sol.mu), outer(*known[:3])
    assert worst(gradient(found, theta), gradient(answer, theta)) <= 1e-7


def test_frozen_input_differentiates_the_state_alone() -> None:
    """z* as a function of θ with x* held: Picard iterations at the constant x*, unrolled."""
    problem = TanhProblem.draw(seed=6)
    sol = solved(problem, adjoint=FrozenInput())
    z, x = problem.z0, sol.x.detach()
    for _ in range(80):
        z = problem.f(z, x)
    theta = list(problem.theta.values())
    answer = gradient(z.sin().sum(), theta)
    assert worst(gradient(sol.z.sin().sum(), theta), answer) <= 1e-8
    assert not sol.x.requires_grad
    whole = solved(problem, adjoint=Implicit())
    assert worst(gradient(whole.z.sin().sum(), theta), answer) > 1e-2  # x* moves, in truth
    with pytest.raises(RuntimeError, match=r"FrozenInput.*Implicit"):
        sol.mu.sum().backward()
    with pytest.raises(RuntimeError, match=r"second derivative.*FrozenInput.*Implicit"):
        torch.autograd.grad(sol.value.sum(), theta, create_graph=True)


# ---------------------------------------------------------------- against finite differences


def small(seed: int) -> tuple[Tensor, ...]:
    """W, U, b, V, λ of a problem with n = 2, d = 1 and two problems in the batch."""
    generator = torch.Generator().manual_seed(seed)
    W, U, b, V = (
        0.4 * torch.randn(*shape, dtype=F64, generator=generator)
        for shape in ((2, 2), (2, 1), (2, 2), (2, 2))
    )
    return tuple(t.requires_grad_() for t in (W, U + 0.5, b, V, torch.tensor(0.5, dtype=F64)))


def solve_small(
    W: Tensor, U: Tensor, b: Tensor, V: Tensor, lam: Tensor, **options: Any
) -> implicitopt.Solution:
    lam = lam.exp()  # captured as a non-leaf

    def f(z: Tensor, x: Tensor) -> Tensor:
        return torch.tanh(z @ W.T + x @ U.T + b)

    def loss(z: Tensor, x: Tensor) -> Tensor:
        return ((torch.sin(z @ V.T) - 0.3) ** 2).sum(-1) + 0.5 * lam * (x**2).sum(-1)

    zeros = torch.zeros(2, 2, dtype=F64)
    return implicitopt.solve(
        f, loss, zeros[:, :1], zeros, tol=1e-13, max_steps=300,
        adjoint=Implicit(tol=1e-12), **options,
    ).raise_if_failed()  # fmt: skip


@pytest.mark.parametrize("field", ["x", "z", "mu", "value"])
def test_gradcheck_through_solve(field: str) -> None:
    assert torch.autograd.gradcheck(lambda *theta: getattr(solve_small(*theta), field), small(1))


@pytest.mark.parametrize(
    "field", ["x", *(pytest.param(field, marks=pytest.mark.slow) for field in ("z", "mu", "value"))]
)
def test_gradgradcheck_through_solve(field: str) -> None:
    def function(*theta: Tensor) -> Tensor:
        return getattr(solve_small(*theta), field)

    assert torch.autograd.gradgradcheck(function, small(2), atol=1e-4)


def test_gradcheck_in_the_radius_and_center_of_a_ball() -> None:
    theta = tuple(t.detach() for t in small(1))

    def function(radius: Tensor, center: Tensor) -> tuple[Tensor, ...]:
        sol = solve_small(*theta, project=L2Ball(radius, center))
        return sol.x, sol.z, sol.value

    # The first problem's ball binds, the second's does not.
    free = solve_small(*theta).x.detach().abs()[:, 0]
    radius = (free * torch.tensor([0.5, 3.0], dtype=F64)).requires_grad_()
    center = torch.tensor(0.01, dtype=F64, requires_grad=True)
    assert torch.autograd.gradcheck(function, (radius, center))


def equilibrium(W: Tensor, U: Tensor, b: Tensor, x: Tensor) -> Tensor:
    return fixed_point(
        lambda z, x: torch.tanh(z @ W.T + x @ U.T + b), x, torch.zeros(2, 2, dtype=F64),
        tol=1e-13, adjoint_tol=1e-12,
    )  # fmt: skip


def test_gradcheck_and_gradgradcheck_through_fixed_point() -> None:
    W, U, b, _, _ = small(4)
    x = torch.tensor([[0.3], [-0.8]], dtype=F64, requires_grad=True)
    assert torch.autograd.gradcheck(equilibrium, (W, U, b, x))
    assert torch.autograd.gradgradcheck(equilibrium, (W, U, b, x), atol=1e-4)


def test_fixed_point_derivatives_of_first_and_second_order_and_no_wrong_third() -> None:
    """A map whose second derivative in z and mixed derivative in z and x both count.

    Attached once, the implicit rule gives a first derivative that autograd takes for constant in
    z*: second derivatives that are wrong, without a word.
    """
    x = torch.tensor([[0.7], [-0.4]], dtype=F64, requires_grad=True)

    def f(z: Tensor, x: Tensor) -> Tensor:
        return torch.tanh(0.5 * z * x + x)

    z = torch.zeros(2, 1, dtype=F64)
    for _ in range(120):
        z = f(z, x)
    found = fixed_point(f, x, tol=1e-14)
    for _ in range(2):
        (found,) = torch.autograd.grad(found.sin().sum(), x, create_graph=True)
        (z,) = torch.autograd.grad(z.sin().sum(), x, create_graph=True)
        assert relative(found, z) <= 1e-9
    with pytest.raises(RuntimeError, match="third derivative"):
        torch.autograd.grad(found.sum(), x)


def test_solve_gives_no_wrong_third_derivative() -> None:
    theta = small(1)
    y = solve_small(*theta).x.sum()
    for _ in range(2):
        y = sum(g.sum() for g in gradient(y, list(theta), create_graph=True))
    with pytest.raises(RuntimeError, match="third derivative"):
        torch.autograd.grad(y, theta)


# ------------------------------------------------- a forward pass that autograd cannot follow


class ThroughNumpy:
    """Plain iteration in numpy: a right gradient can only have come from the implicit rule."""

    def init(self, v: Tensor) -> None:
        return None

    def step(self, state: None, v: Tensor, Fv: Tensor) -> tuple[Tensor, None]:
        return torch.from_numpy(Fv.detach().numpy().copy()), None


def test_a_forward_pass_in_numpy_changes_no_gradient() -> None:
    problem = TanhProblem.draw(seed=7)
    known, theta = reference(problem), list(problem.theta.values())
    solver = Joint(ThroughNumpy(), implicitopt.StepSizes(x=0.15))
    sol = solved(problem, solver=solver, adjoint=Implicit())
    assert worst(gradient(outer(sol.x, sol.z, sol.mu), theta),
                 gradient(outer(*known[:3]), theta)) <= 1e-7  # fmt: skip
    sol = solved(problem, solver=solver)
    assert worst(gradient(sol.value.sum(), theta), gradient(known.value.sum(), theta)) <= 1e-8

    x = problem.x0.clone().requires_grad_()
    found = fixed_point(problem.f, x, problem.z0, accelerator=ThroughNumpy(), tol=1e-13)
    z = problem.z0
    for _ in range(80):
        z = problem.f(z, x)
    theta = [x, *problem.f.parameters()]
    assert worst(gradient(found.sin().sum(), theta), gradient(z.sin().sum(), theta)) <= 1e-8


# ---------------------------------------------------------------- what is refused, and warned of


@pytest.mark.parametrize("field", ["x", "z", "mu"])
def test_envelope_refuses_gradients_of_the_solution(field: str) -> None:
    sol = solved(TanhProblem.draw(seed=8), tol=1e-6)
    with pytest.raises(RuntimeError) as caught:
        getattr(sol, field).sum().backward()
    for remedy in ("Implicit()", "sol.value", ".detach()"):
        assert remedy in str(caught.value)
    getattr(sol, field).detach().sum()  # as a constant it is fine


def test_envelope_refuses_second_derivatives() -> None:
    problem = TanhProblem.draw(seed=8)
    sol = solved(problem, tol=1e-6)
    theta = list(problem.theta.values())
    with pytest.raises(RuntimeError, match=r"second derivative.*Implicit\(\)"):
        torch.autograd.grad(sol.value.sum(), theta, create_graph=True)


@pytest.mark.parametrize("adjoint", [Envelope(), Implicit(), FrozenInput()])
def test_x0_gets_no_gradient(adjoint: Any) -> None:
    """Nor does what x0 was computed from; a warning says so."""
    problem = TanhProblem.draw(seed=8)
    leaf = problem.x0.clone().requires_grad_()
    x0 = 2 * leaf
    z0 = (0.0 * leaf).sum() + problem.z0
    with pytest.warns(UserWarning, match="requires a gradient and will get none") as caught:
        sol = implicitopt.solve(problem.f, problem.loss, x0, z0, adjoint=adjoint)
    assert [str(warning.message)[:2] for warning in caught] == ["x0", "z0"]
    assert caught[0].filename == __file__
    total = sol.value.sum()
    if isinstance(adjoint, Implicit):
        total = total + outer(sol.x, sol.z, sol.mu)
    total.backward()
    assert leaf.grad is None
    assert problem.f.W.grad is not None


@pytest.mark.parametrize("adjoint", [Envelope(), Implicit(), FrozenInput()])
def test_no_grad_gives_plain_tensors(adjoint: Any) -> None:
    problem = TanhProblem.draw(seed=8)
    with torch.no_grad():
        sol = solved(problem, adjoint=adjoint, tol=1e-6)
        z = fixed_point(problem.f, problem.x0, problem.z0)
    for tensor in (sol.x, sol.z, sol.mu, sol.value, z):
        assert not tensor.requires_grad
        assert tensor.grad_fn is None


def test_the_adjoint_reports_after_backward() -> None:
    problem = TanhProblem.draw(seed=9, batch=3)
    sol = solved(problem, adjoint=Implicit(tol=1e-9))
    report = sol.adjoint
    assert report.status is report.residual is report.steps is None
    outer(sol.x, sol.z, sol.mu).backward()
    assert report.status.tolist() == [Status.CONVERGED] * 3
    assert bool((report.residual <= 1e-9).all())
    size = sol.x.shape[1] + 2 * sol.z.shape[1]
    assert bool(((report.steps >= 1) & (report.steps <= size + 1)).all())
    assert report.products >= int(report.steps.max())


@pytest.mark.parametrize("project", [None, L2Ball(0.1)])
def test_an_adjoint_that_fails_says_so(project: Any) -> None:
    problem = TanhProblem.draw(seed=9)
    sol = solved(problem, adjoint=Implicit(max_steps=1), project=project)
    with pytest.warns(AdjointWarning, match="2 of 2 problems"):
        outer(sol.x, sol.z, sol.mu).backward()
    assert sol.adjoint.status.tolist() == [Status.MAX_STEPS] * 2
    assert bool((sol.adjoint.residual > 1e-10).all())


def test_a_failed_adjoint_of_fixed_point_warns() -> None:
    problem = TanhProblem.draw(seed=9)
    z = fixed_point(problem.f, problem.x0, problem.z0, adjoint_max_steps=1)
    with pytest.warns(AdjointWarning, match="Raise adjoint_max_steps, or loosen adjoint_tol"):
        z.sum().backward()


def test_envelope_needs_no_linear_solve() -> None:
    """Nor does the first derivative of the value under the other adjoints."""
    problem = TanhProblem.draw(seed=9)
    for adjoint in (Envelope(), FrozenInput(max_steps=1), Implicit(max_steps=1)):
        sol = solved(problem, adjoint=adjoint)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            gradient(sol.value.sum(), list(problem.theta.values()))
        assert sol.adjoint.products == 0


# ---------------------------------------------------------------- one lost problem in a batch


class Exploding(nn.Module):
    """f = tanh(wz + x) + s·exp(wz²), with s > 0 in one problem: overflow, and NaN in ∂f/∂w."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor(0.4, dtype=F64))

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        switch = torch.tensor([[0.0], [1.0], [0.0]], dtype=F64)
        return torch.tanh(self.w * z + x) + switch * torch.exp(self.w * z**2)


@pytest.mark.parametrize("adjoint", [Envelope(), Implicit(), FrozenInput()])
def test_a_lost_problem_leaves_the_others_gradient(adjoint: Any) -> None:
    f = Exploding()

    def loss(z: Tensor, x: Tensor) -> Tensor:
        return ((z - 0.3) ** 2 + 0.1 * x**2).sum(-1)

    zeros = torch.zeros(3, 1, dtype=F64)
    start = zeros + torch.tensor([[0.0], [20.0], [0.0]], dtype=F64)  # overflows in f(z0, x0)
    sol = implicitopt.solve(f, loss, zeros, start, adjoint=adjoint, **PRECISE)
    assert sol.status.tolist() == [Status.CONVERGED, Status.NONFINITE, Status.CONVERGED]

    sound = implicitopt.solve(
        lambda z, x: torch.tanh(f.w * z + x), loss, zeros[:2], zeros[:2], adjoint=adjoint, **PRECISE
    )
    scalar, answer = sol.value.sum(), sound.value.sum()
    if isinstance(adjoint, Implicit):
        scalar, answer = scalar + sol.x.sin().sum(), answer + sound.x.sin().sum()
    if not isinstance(adjoint, Envelope):
        scalar, answer = scalar + sol.z.sin().sum(), answer + sound.z.sin().sum()
    (found,), (answer,) = gradient(scalar, [f.w]), gradient(answer, [f.w])
    assert bool(torch.isfinite(found))
    assert relative(found, answer) <= 1e-9


# ---------------------------------------------------------------- the penalty


def dense_penalty(f: Any, z: Tensor, x: Tensor) -> Tensor:
    """‖∂f/∂z‖²_F per problem, from the dense Jacobian; differentiable."""
    rows = [
        torch.autograd.functional.jacobian(lambda v, i=i: f(v[None], x[i : i + 1])[0], z[i],
                                           create_graph=True)
        for i in range(len(z))
    ]  # fmt: skip
    return torch.stack([(J**2).sum() for J in rows])


def test_jacobian_penalty_is_unbiased() -> None:
    """Against the dense Jacobian, with its gradient in the parameters, z and x."""
    problem = TanhProblem.draw(n=3, d=2, batch=2, seed=10)
    z = torch.randn(2, 3, dtype=F64, generator=torch.Generator().manual_seed(1)).requires_grad_()
    x = problem.x0.clone().requires_grad_()
    answer = dense_penalty(problem.f, z, x)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        found = jacobian_penalty(problem.f, z, x, probes=4000)
    assert found.shape == (2,)
    # The estimate's standard deviation is at most √2 ‖J‖²_F / √probes: 2.3 %, and this is four.
    assert bool(((found - answer).abs() <= 0.09 * answer).all())
    theta = [problem.f.W, problem.f.U, problem.f.b, z, x]
    for a, b in zip(gradient(found.sum(), theta), gradient(answer.sum(), theta), strict=True):
        assert bool((a - b).norm() <= 0.15 * b.norm())


def test_jacobian_penalty_of_a_multiple_of_a_rotation_is_exact() -> None:
    """‖Jᵀε‖² = s²‖ε‖² for every ε, so that the estimate is known from the probe alone."""
    turn = torch.tensor([[0.6, -0.8], [0.8, 0.6]], dtype=F64)
    s = torch.tensor(0.7, dtype=F64, requires_grad=True)
    z = torch.zeros(3, 2, dtype=F64)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        found = jacobian_penalty(lambda z, x: s * z @ turn.T + x, z, z)
        torch.manual_seed(5)
        probe = torch.randn(3, 2, dtype=F64)
    assert relative(found, s**2 * (probe**2).sum(1)) <= 1e-14
    (slope,) = gradient(found.sum(), [s])
    assert relative(slope, 2 * s * (probe**2).sum()) <= 1e-14


def test_jacobian_penalty_of_one_problem() -> None:
    """batched=False: () is the mean over probes of what batched=True gives for one row."""
    problem = TanhProblem.draw(n=3, d=2, batch=1, seed=10)
    values = []
    for batched in (True, False):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(3)
            values.append(
                jacobian_penalty(problem.f, problem.z0, problem.x0, probes=3, batched=batched)
            )
    assert values[0].shape == (1,)
    assert values[1].shape == ()
    assert relative(values[1], values[0][0]) <= 1e-14


def test_a_failed_adjoint_system_at_no_solution_says_to_solve_first() -> None:
    def solved_in(max_steps: int) -> implicitopt.Solution:
        problem = TanhProblem.draw(seed=8)
        return implicitopt.solve(
            problem.f, problem.loss, problem.x0, problem.z0,
            adjoint=Implicit(max_steps=2), tol=1e-8, max_steps=max_steps,
        )  # fmt: skip

    with pytest.warns(AdjointWarning, match="The solve itself had not converged in"):
        solved_in(3).x.sum().backward()
    late = solved_in(500)
    assert late.converged.all()
    with pytest.warns(AdjointWarning) as caught:
        late.x.sum().backward()
    assert "The solve itself" not in str(caught[0].message)


def adjoint_of(problem: TanhProblem, **options: Any) -> tuple[Tensor, Any]:
    """∂Σx*/∂W by `Implicit`, and the report."""
    sol = implicitopt.solve(
        problem.f, problem.loss, problem.x0, problem.z0,
        adjoint=Implicit(**options), tol=1e-11, max_steps=1000,
    )  # fmt: skip
    assert sol.converged.all()
    (grad,) = torch.autograd.grad(sol.x.sum(), problem.f.W)
    return grad, sol.adjoint


def test_minres_goes_on_where_gmres_has_used_up_its_vectors(monkeypatch) -> None:
    known, full = adjoint_of(TanhProblem.draw(seed=8), tol=1e-8, recycle=0)
    assert full.steps.min() > 6
    monkeypatch.setattr("implicitopt.adjoint.implicit.SMALL", 0)
    monkeypatch.setattr("implicitopt.adjoint.implicit.VECTORS", 6)
    found, report = adjoint_of(TanhProblem.draw(seed=8), tol=1e-8, recycle=0)
    assert relative(found, known) <= 1e-6
    assert (report.status == 0).all()
    assert (report.steps > 6).all()
    with pytest.warns(AdjointWarning):  # all of max_steps, and no more
        _, report = adjoint_of(TanhProblem.draw(seed=8), tol=1e-8, recycle=0, max_steps=8)
    assert report.steps.max() == 8
