"""solve() on linear maps with quadratic losses, against dense linear algebra.

Solutions come from torch.linalg.solve (with a ball: from bisection on its multiplier), and every
derivative of them from autograd through that.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from families import F64, Known, LinearQuadratic, relative, worst
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor

import implicitopt
from implicitopt import Implicit, L2Ball

PRECISE = {"tol": 1e-11, "max_steps": 2000}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@dataclass(frozen=True)
class Size:
    n: int
    d: int
    batch: int
    rho: float
    measure: str
    seed: int

    def draw(self) -> LinearQuadratic:
        return LinearQuadratic.draw(self.n, self.d, self.batch, self.rho, self.measure, self.seed)


SIZES = st.builds(
    Size,
    n=st.integers(1, 40),
    d=st.integers(1, 12),
    batch=st.integers(1, 9),
    rho=st.floats(0.1, 0.95),
    measure=st.sampled_from(["radius", "norm"]),
    seed=st.integers(0, 2**31),
)


class Tally:
    """How many problems converged over all draws of a test, and which did not."""

    def __init__(self) -> None:
        self.total, self.failed = 0, 0
        self.where: list[Any] = []

    def count(self, converged: Tensor, drawn: Any) -> Tensor:
        lost = int((~converged).sum())
        self.total, self.failed = self.total + converged.numel(), self.failed + lost
        if lost:
            self.where.append((lost, drawn))
        return converged

    def require_most(self) -> None:
        assert self.total > 0
        share = 1 - self.failed / self.total
        assert share >= 0.97, f"only {share:.1%} of {self.total} problems converged: {self.where}"


def over_draws(
    examples: int, **strategies: st.SearchStrategy[Any]
) -> Callable[[Callable[..., None]], Callable[[], None]]:
    """Run a check on ``examples`` draws, the same ones each time; 97 % of problems must converge.

    The check is called as check(tally, size, ...) and looks at the converged problems only.
    """

    def decorate(check: Callable[..., None]) -> Callable[[], None]:
        # A plain wrapper: functools.wraps would show pytest the check's arguments as fixtures.
        def test() -> None:
            tally = Tally()
            bound = functools.partial(check, tally)

            # No shrinking: it would fill the tally with small problems.
            @settings(
                max_examples=examples, derandomize=True, database=None, deadline=None,
                phases=[Phase.explicit, Phase.generate],
                suppress_health_check=list(HealthCheck),
            )  # fmt: skip
            @given(size=SIZES, **strategies)
            def run(**drawn: Any) -> None:
                bound(**drawn)

            run()
            tally.require_most()

        test.__doc__ = check.__doc__
        return test

    return decorate


def solved(problem: LinearQuadratic, **options: Any) -> implicitopt.Solution:
    x0, z0 = problem.start()
    return implicitopt.solve(problem.f, problem.loss, x0, z0, **{**PRECISE, **options})


class Outer:
    """A random smooth function of x, z and μ, summed over the problems given."""

    def __init__(self, problem: LinearQuadratic, keep: Tensor) -> None:
        generator = torch.Generator().manual_seed(7)
        (batch, n), d = problem.c.shape, problem.B.shape[1]
        self.keep = keep.to(F64)[:, None]
        self.p, self.q, self.r = (
            torch.randn(batch, size, dtype=F64, generator=generator) for size in (d, n, n)
        )

    def __call__(self, x: Tensor, z: Tensor, mu: Tensor) -> Tensor:
        return sum(
            (self.keep * (w * block + torch.sin(w + block))).sum()
            for w, block in ((self.p, x), (self.q, z), (self.r, mu))
        )


def gradient(
    scalar: Tensor, theta: tuple[Tensor, ...], *, create_graph: bool = False
) -> list[Tensor]:
    """Zeros where nothing flows. The graph stays: solution and answer share that of λ."""
    grads = torch.autograd.grad(
        scalar, theta, retain_graph=True, create_graph=create_graph, materialize_grads=True
    )
    assert all(bool(torch.isfinite(g).all()) for g in grads)
    return list(grads)


def first_and_second(
    scalar: Tensor, theta: tuple[Tensor, ...]
) -> tuple[list[Tensor], list[Tensor]]:
    """The gradient, and the Hessian times a fixed direction."""
    generator = torch.Generator().manual_seed(11)
    grads = gradient(scalar, theta, create_graph=True)
    along = [torch.randn(g.shape, dtype=F64, generator=generator) for g in grads]
    slope = sum((g * a).sum() for g, a in zip(grads, along, strict=True))
    return grads, gradient(slope, theta)


def some_radius(problem: LinearQuadratic, share: float) -> Tensor:
    """A radius that is ``share`` times the median length of the unconstrained solutions."""
    lengths = torch.linalg.vector_norm(problem.known().x.detach(), dim=1)
    return share * lengths.median()


def assert_solution(sol: implicitopt.Solution, known: Known, keep: Tensor, bound: float) -> None:
    found = Known(sol.x, sol.z, sol.mu, sol.value)
    for name, block, answer in zip(Known._fields, found, known, strict=True):
        assert block.shape == answer.shape
        assert relative(block[keep], answer[keep]) <= bound, name


@over_draws(18)
def test_solution_and_envelope_gradient(tally: Tally, size: Size) -> None:
    problem = size.draw()
    sol, known = solved(problem), problem.known()
    keep = tally.count(sol.converged, size)
    assert_solution(sol, known, keep, 1e-8)
    theta = problem.parameters
    found = gradient(sol.value[keep].sum(), theta)
    answer = gradient(known.value[keep].sum(), theta)
    assert worst(found, answer) <= 1e-7


@over_draws(15)
def test_float32_is_as_near_as_its_residual_says(tally: Tally, size: Size) -> None:
    """A residual r moves the solution of a linear system by K⁻¹ r: no other error is allowed."""
    problem = size.draw()
    tol = 3e-5
    sol, known = solved(problem.to(torch.float32), tol=tol), problem.known()
    keep = tally.count(sol.converged, size)
    assert sol.x.dtype == sol.z.dtype == sol.mu.dtype == sol.value.dtype == torch.float32
    found, answer = (
        torch.cat([s.x[keep], s.z[keep], s.mu[keep]], dim=1).detach().to(F64) for s in (sol, known)
    )
    error = torch.linalg.vector_norm(found - answer, dim=1)
    scale = 1 + torch.linalg.vector_norm(answer, dim=1)
    # Twice: for the scale, which is that of the solution found, and for rounding.
    assert bool((error <= 2 * problem.sensitivity() * tol * scale).all())
    assert relative(sol.value[keep], known.value[keep]) <= 1e-3


@over_draws(8)
def test_implicit_gradient_and_hessian_products(tally: Tally, size: Size) -> None:
    problem = size.draw()
    sol, known = solved(problem, adjoint=Implicit()), problem.known()
    outer = Outer(problem, tally.count(sol.converged, size))
    first, second = first_and_second(outer(sol.x, sol.z, sol.mu), problem.parameters)
    answer, answer_2 = first_and_second(outer(*known[:3]), problem.parameters)
    assert worst(first, answer) <= 1e-6
    assert worst(second, answer_2) <= 1e-4


@over_draws(8, block=st.sampled_from(["x", "z", "mu"]))
def test_each_block_alone_has_its_gradient(tally: Tally, size: Size, block: str) -> None:
    problem = size.draw()
    sol, known = solved(problem, adjoint=Implicit()), problem.known()
    keep = tally.count(sol.converged, size)
    found, answer = getattr(sol, block), getattr(known, block)
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(found.shape, dtype=F64, generator=generator) * keep[:, None]
    found, answer = (
        gradient((weight * block).sum(), problem.parameters) for block in (found, answer)
    )
    assert worst(found, answer) <= 1e-6


@over_draws(7)
def test_value_under_implicit_has_its_second_derivative(tally: Tally, size: Size) -> None:
    problem = size.draw()
    sol, known = solved(problem, adjoint=Implicit()), problem.known()
    keep = tally.count(sol.converged, size)
    first, second = first_and_second(sol.value[keep].sum(), problem.parameters)
    answer, answer_2 = first_and_second(known.value[keep].sum(), problem.parameters)
    assert worst(first, answer) <= 1e-7
    assert worst(second, answer_2) <= 1e-4


# A share of 0.4: the ball holds nearly every solution back; 1.0: half of them; 4: none.
@over_draws(18, share=st.sampled_from([0.4, 1.0, 4.0]))
def test_ball_against_bisection(tally: Tally, size: Size, share: float) -> None:
    problem = size.draw()
    radius = some_radius(problem, share).requires_grad_()
    sol = solved(problem, project=L2Ball(radius), adjoint=Implicit())
    known, keep = problem.known(radius), tally.count(sol.converged, (size, share))
    assert_solution(sol, known, keep, 1e-8)
    assert bool((torch.linalg.vector_norm(sol.x, dim=1) <= radius * (1 + 1e-12)).all())
    theta = (*problem.parameters, radius)

    found = gradient(sol.value[keep].sum(), theta)
    answer = gradient(known.value[keep].sum(), theta)
    assert worst(found, answer) <= 1e-7

    edge = on_the_edge(problem, radius)
    outer = Outer(problem, keep & ~edge)
    found = gradient(outer(sol.x, sol.z, sol.mu), theta)
    answer = gradient(outer(*known[:3]), theta)
    assert worst(found, answer) <= 1e-6


def on_the_edge(problem: LinearQuadratic, radius: Tensor) -> Tensor:
    """Whose unconstrained solution lies on the sphere (the median's does, at share 1).

    The solution is not differentiable there; the value is.
    """
    lengths = torch.linalg.vector_norm(problem.known().x.detach(), dim=1)
    return (lengths - radius.detach()).abs() <= 1e-6 * lengths


@over_draws(5, share=st.sampled_from([0.4, 4.0]))
def test_ball_second_derivatives(tally: Tally, size: Size, share: float) -> None:
    problem = size.draw()
    radius = some_radius(problem, share).requires_grad_()
    sol = solved(problem, project=L2Ball(radius), adjoint=Implicit())
    known, keep = problem.known(radius), tally.count(sol.converged, (size, share))
    theta, outer = problem.parameters, Outer(problem, keep)
    for found, answer in (
        (outer(sol.x, sol.z, sol.mu), outer(*known[:3])),
        (sol.value[keep].sum(), known.value[keep].sum()),
    ):
        first, second = first_and_second(found, theta)
        answer_1, answer_2 = first_and_second(answer, theta)
        assert worst(first, answer_1) <= 1e-6
        assert worst(second, answer_2) <= 1e-4


def test_value_in_the_radius_is_minus_the_multiplier() -> None:
    """Envelope(): dV/dR = −νR with ν from bisection for a binding ball, and 0 for another."""
    problem = LinearQuadratic.draw(n=12, d=4, batch=5, rho=0.7, measure="norm", seed=5)
    lengths = torch.linalg.vector_norm(problem.known().x.detach(), dim=1)
    # A radius for each problem: three of five bind.
    radius = (lengths * torch.tensor([0.3, 2.0, 0.9, 0.5, 1.5], dtype=F64)).requires_grad_()
    sol = solved(problem, project=L2Ball(radius)).raise_if_failed()
    (found,) = gradient(sol.value.sum(), (radius,))
    _, _, H, q = (t.detach() for t in problem.reduced())
    pull = -(sol.x.detach() @ H + q)  # νx
    nu = (pull * sol.x.detach()).sum(1) / radius.detach() ** 2
    assert relative(found, -nu * radius.detach()) <= 1e-8
    assert found[[0, 2, 3]].max() < -1e-3
    assert bool((found[[1, 4]].abs() <= 1e-9).all())


@over_draws(9, share=st.sampled_from([None, 0.4, 4.0]))
def test_maximize_is_minimize_of_the_negated_loss(
    tally: Tally, size: Size, share: float | None
) -> None:
    """μ is the adjoint of the loss as given: of −ℓ here."""
    problem = size.draw()
    radius = None if share is None else some_radius(problem, share)
    x0, z0 = problem.start()
    sol = implicitopt.solve(
        problem.f, lambda z, x: -problem.loss(z, x), x0, z0, maximize=True, adjoint=Implicit(),
        project=None if radius is None else L2Ball(radius), **PRECISE,
    )  # fmt: skip
    known, keep = problem.known(radius), tally.count(sol.converged, (size, share))
    negated = Known(known.x, known.z, -known.mu, -known.value)
    assert_solution(sol, negated, keep, 1e-8)
    outer, theta = Outer(problem, keep), problem.parameters
    found = gradient(sol.value[keep].sum(), theta)
    answer = gradient(negated.value[keep].sum(), theta)
    assert worst(found, answer) <= 1e-7
    found = gradient(outer(sol.x, sol.z, sol.mu), theta)
    answer = gradient(outer(*negated[:3]), theta)
    assert worst(found, answer) <= 1e-6


@over_draws(8, summed=st.booleans())
def test_scalar_loss_is_one_problem(tally: Tally, size: Size, summed: bool) -> None:
    """A loss of shape (): either rows coupled by a sum, or tensors without a batch dimension."""
    problem = size.draw()
    known, (x0, z0) = problem.known(), problem.start()
    if summed:
        sol = implicitopt.solve(
            problem.f, lambda z, x: problem.loss(z, x).sum(), x0, z0, adjoint=Implicit(), **PRECISE
        )
        known = known._replace(value=known.value.sum())
    else:
        sol = implicitopt.solve(
            lambda z, x: problem.f(z, x)[0], lambda z, x: problem.loss(z[None], x[None])[0],
            x0[0], z0[0], adjoint=Implicit(), **PRECISE,
        )  # fmt: skip
        known = Known(*(block[0] for block in known))
    assert sol.status.shape == sol.value.shape == sol.steps.shape == ()
    if not tally.count(sol.converged, (size, summed)):
        return
    assert_solution(sol, known, torch.tensor(True), 1e-8)
    theta = problem.parameters
    for found, answer in (
        (sol.value, known.value),
        (torch.sin(sol.x).sum() + torch.sin(sol.z + sol.mu).sum(),
         torch.sin(known.x).sum() + torch.sin(known.z + known.mu).sum()),
    ):  # fmt: skip
        found, answer = (gradient(scalar, theta) for scalar in (found, answer))
        assert worst(found, answer) <= 1e-6


@over_draws(7)
def test_pytrees(tally: Tally, size: Size) -> None:
    """The same problem with x as a dict and z as a nested tuple, of leaves of several shapes."""
    size = Size(max(3, size.n), max(2, size.d), *list(vars(size).values())[2:])
    problem = size.draw()
    n, d = problem.B.shape
    cut, at = d // 2, n // 2

    def x_tree(x: Tensor) -> dict[str, Tensor]:
        return {"b": x[:, cut:, None], "a": x[:, :cut]}

    def z_tree(z: Tensor) -> tuple[Tensor, list[Tensor]]:
        return z[:, :1, None, None], [z[:, 1:at], z[:, None, at:]]

    def x_rows(x: dict[str, Tensor]) -> Tensor:
        return torch.cat([x["a"], x["b"][..., 0]], dim=1)

    def z_rows(z: tuple[Tensor, list[Tensor]]) -> Tensor:
        return torch.cat([z[0][:, :, 0, 0], z[1][0], z[1][1][:, 0]], dim=1)

    x0, z0 = problem.start()
    sol = implicitopt.solve(
        lambda z, x: z_tree(problem.f(z_rows(z), x_rows(x))),
        lambda z, x: problem.loss(z_rows(z), x_rows(x)),
        x_tree(x0), z_tree(z0), adjoint=Implicit(), **PRECISE,
    )  # fmt: skip
    known, keep = problem.known(), tally.count(sol.converged, size)
    assert sol.x["b"].shape == (size.batch, d - cut, 1)
    assert sol.z[1][1].shape == sol.mu[1][1].shape == (size.batch, 1, n - at)
    found = Known(x_rows(sol.x), z_rows(sol.z), z_rows(sol.mu), sol.value)
    assert worst([b[keep] for b in found], [b[keep] for b in known]) <= 1e-8
    outer, theta = Outer(problem, keep), problem.parameters
    grads = gradient(outer(*found[:3]), theta)
    assert worst(grads, gradient(outer(*known[:3]), theta)) <= 1e-6


@pytest.mark.slow
@over_draws(150, share=st.sampled_from([None, 0.4, 1.0, 4.0]))
def test_many_more_draws(tally: Tally, size: Size, share: float | None) -> None:
    problem = size.draw()
    radius = None if share is None else some_radius(problem, share)
    sol = solved(problem, project=None if radius is None else L2Ball(radius), adjoint=Implicit())
    known, keep = problem.known(radius), tally.count(sol.converged, (size, share))
    assert_solution(sol, known, keep, 1e-8)
    smooth = keep if radius is None else keep & ~on_the_edge(problem, radius)
    outer, theta = Outer(problem, smooth), problem.parameters
    first, second = first_and_second(outer(sol.x, sol.z, sol.mu), theta)
    answer, answer_2 = first_and_second(outer(*known[:3]), theta)
    assert worst(first, answer) <= 1e-6
    assert worst(second, answer_2) <= 1e-4
