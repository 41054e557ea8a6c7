"""Finished problems leave the batch where solve is told how to go on without them."""

from __future__ import annotations

import pytest
import torch

import implicitopt
from implicitopt import SQP, Adaptive, Anderson, Broyden, Joint, L2Ball, Nested, OneShot, solve

F64 = torch.float64
SOLVERS = {
    "adaptive": Adaptive(patience=8),
    "adaptive, joint": Adaptive(Joint(), patience=8),  # soon enough that problems change to descent
    "joint": Joint(),
    "joint II": Joint(Anderson("II")),
    "broyden": Joint(Broyden()),
    "one-shot": OneShot(),
    "sqp": SQP(),
}


class Uneven:
    """Eight tanh problems with weights of their own: the last ones are slower by far."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)

        def normal(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, dtype=F64, generator=generator)

        W, self.U, self.y = normal(12, 12), normal(12, 3), 0.1 * normal(8, 12)
        self.W = W / torch.linalg.matrix_norm(W, 2)
        self.rho = torch.tensor([0.1] * 5 + [0.5, 0.9, 0.97], dtype=F64)
        self.calls: list[list[int]] = []
        self.start = torch.zeros(8, 3, dtype=F64), torch.zeros(8, 12, dtype=F64)

    def of(self, rows):
        rho, y = self.rho[rows, None], self.y[rows]

        def f(z, x):
            return torch.tanh(rho * (z @ self.W.T) + x @ self.U.T)

        def loss(z, x):
            return 0.5 * ((z - y) ** 2).sum(-1) + 0.05 * (x**2).sum(-1)

        return f, loss

    def subset(self, rows):
        self.calls.append(rows.tolist())
        return self.of(rows)


@pytest.mark.parametrize("solver", SOLVERS.values(), ids=SOLVERS)
def test_the_result_is_that_without_leaving_to_rounding(solver):
    problem = Uneven()
    options = {"solver": solver, "tol": 1e-8, "max_steps": 400, "history": True}
    stay = solve(*problem.of(torch.arange(8)), *problem.start, **options)
    seen = []
    leave = solve(
        *problem.of(torch.arange(8)), *problem.start, subset=problem.subset,
        callback=lambda progress: seen.append(progress), **options,
    )  # fmt: skip
    assert problem.calls  # some left
    assert torch.equal(stay.status, leave.status)
    assert (stay.steps - leave.steps).abs().max() <= 10
    for block in ("x", "z", "mu", "value"):
        assert torch.allclose(getattr(stay, block), getattr(leave, block), atol=1e-6)
    assert all(len(p.value) == len(p.active) == len(p.residuals.z) == 8 for p in seen)
    assert [p.step for p in seen] == list(range(len(seen)))
    assert leave.history.value.shape == (len(seen), 8)
    finished = seen[-1].value[leave.converged], leave.value[leave.converged]
    assert torch.allclose(*finished, atol=1e-6)


def test_problems_leave_by_halves_and_are_named_by_their_places():
    problem = Uneven()
    functions = problem.of(torch.arange(8))
    sol = solve(*functions, *problem.start, subset=problem.subset, max_steps=200)
    sizes = [len(rows) for rows in problem.calls]
    assert sizes
    for before, after in zip([8, *sizes], sizes, strict=False):
        assert after <= before / 2
    left = [row for row in range(8) if row not in problem.calls[-1]]
    assert sol.steps[problem.calls[-1]].min() >= sol.steps[left].max()
    for rows in problem.calls:
        assert rows == sorted(rows)
        assert set(rows) <= set(range(8))


def test_backward_passes_take_what_those_of_the_whole_batch_take():
    """With the differences that problems made before and after the others had left."""
    steps = {}
    for subset in (False, True):
        for recycle in (0, 30):
            problem = Uneven()
            shift = torch.zeros(12, dtype=F64, requires_grad=True)

            def shifted(rows, of=problem.of, shift=shift):
                f, loss = of(rows)
                return lambda z, x: f(z, x) + shift, loss

            sol = solve(
                *shifted(torch.arange(8)), *problem.start, tol=1e-8, max_steps=400,
                subset=shifted if subset else None, adjoint=implicitopt.Implicit(recycle=recycle),
            )  # fmt: skip
            assert sol.converged.all()
            sol.x.square().sum().backward()
            steps[subset, recycle] = sol.adjoint.steps
    assert (steps[True, 30] - steps[False, 30]).abs().max() <= 2
    assert (steps[True, 30] < steps[True, 0]).all()


def test_gradients_are_those_of_the_whole_batch():
    problem = Uneven()
    grads = []
    for subset in (None, problem.subset):
        weight = problem.W.clone().requires_grad_()
        problem.W = weight
        sol = solve(
            *problem.of(torch.arange(8)), *problem.start, subset=subset, tol=1e-10, max_steps=400,
            adjoint=implicitopt.Implicit(),
        )  # fmt: skip
        (sol.value.sum() + sol.x.square().sum()).backward()
        grads.append(weight.grad)
        problem.W = weight.detach()
    assert torch.allclose(*grads, atol=1e-7)


def test_a_projection_with_a_radius_for_each_problem():
    problem = Uneven()
    radius = torch.linspace(0.1, 0.8, 8, dtype=F64)

    def subset(rows):
        return *problem.subset(rows), L2Ball(radius[rows])

    options = {"project": L2Ball(radius), "tol": 1e-8, "max_steps": 300}
    functions = problem.of(torch.arange(8))
    stay = solve(*functions, *problem.start, **options)
    leave = solve(*functions, *problem.start, subset=subset, **options)
    assert problem.calls
    assert torch.allclose(stay.x, leave.x, atol=1e-7)
    with pytest.raises(TypeError, match=r"\(f, loss, project\)"):
        solve(*functions, *problem.start, subset=problem.subset, **options)


def test_functions_of_other_problems_are_refused():
    problem = Uneven()
    functions = problem.of(torch.arange(8))
    with pytest.raises(ValueError, match=r"subset must return .* other numbers"):
        solve(*functions, *problem.start, subset=lambda rows: problem.of(rows - rows[0]))
    with pytest.raises(ValueError, match="subset must return"):
        solve(*functions, *problem.start, subset=lambda rows: functions)


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"subset": 3}, TypeError, "subset must be callable"),
        ({"solver": Nested()}, TypeError, "take"),
        ({"subset": lambda rows: None}, TypeError, "subset must return"),
    ],
)
def test_what_cannot_narrow_says_so(options, kind, message):
    problem = Uneven()
    options = {"subset": problem.subset} | options
    with pytest.raises(kind, match=message):
        solve(*problem.of(torch.arange(8)), *problem.start, **options)


def test_one_problem_has_no_subset():
    with pytest.raises(ValueError, match="batch of problems"):
        solve(
            lambda z, x: 0.5 * z + x, lambda z, x: (z**2).sum(), torch.ones(3),
            subset=lambda rows: None,
        )  # fmt: skip


def test_an_accelerator_without_take_says_so():
    class Plain:
        def init(self, v):
            return None

        def step(self, state, v, Fv):
            return Fv, None

    problem = Uneven()
    solver = Joint(Plain(), implicitopt.StepSizes(x=0.5))
    with pytest.raises(TypeError, match=r"take\(state, rows\)"):
        solve(
            *problem.of(torch.arange(8)), *problem.start, solver=solver, subset=problem.subset,
            max_steps=400, tol=1e-3,
        )  # fmt: skip
