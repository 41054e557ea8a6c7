"""Solving again and again leaves no tensor, and no node of an autograd graph, behind."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator

import pytest
import torch
from families import F64, TanhProblem
from torch import Tensor

import implicitopt
from implicitopt import Envelope, FrozenInput, Implicit, L2Ball

FEW = 6  # sweeps: a solution is not needed here, only all that a solve makes


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    gc.collect()
    gc.freeze()  # what was there before takes a second to go through, each time
    yield
    gc.unfreeze()
    torch.set_num_threads(threads)


def alive() -> int:
    """Tensors and contexts of autograd functions that Python holds."""
    kinds = (Tensor, torch.autograd.function.FunctionCtx, torch.autograd.graph.Node)
    # type(), not isinstance: that would wake lazy modules up.
    return sum(issubclass(type(thing), kinds) for thing in gc.get_objects())


def solve_with(adjoint: object, *, constrained: bool = False) -> Callable[[TanhProblem], None]:
    def work(problem: TanhProblem) -> None:
        sol = implicitopt.solve(
            problem.f, problem.loss, problem.x0, problem.z0, adjoint=adjoint, max_steps=FEW,
            project=L2Ball(0.3) if constrained else None, history=True, sample_iterate=True,
        )  # fmt: skip
        total = sol.value.sum()
        if isinstance(adjoint, Implicit):
            total = total + (sol.x.sum() + sol.z.sum() + sol.mu.sum()).sin()
        if isinstance(adjoint, FrozenInput):
            total = total + sol.z.sum().sin()
        total.backward()

    return work


def second_derivative(problem: TanhProblem) -> None:
    sol = implicitopt.solve(
        problem.f, problem.loss, problem.x0, problem.z0, adjoint=Implicit(), max_steps=FEW
    )
    theta = list(problem.theta.values())
    grads = torch.autograd.grad(sol.x.sin().sum(), theta, create_graph=True)
    sum((g * g).sum() for g in grads).backward()


def unused(problem: TanhProblem) -> None:
    """Solved with a graph attached, and dropped without a backward pass."""
    implicitopt.solve(
        problem.f, problem.loss, problem.x0, problem.z0, adjoint=Implicit(), max_steps=FEW
    )


def equilibrium(problem: TanhProblem) -> None:
    z = implicitopt.fixed_point(problem.f, problem.x0, problem.z0)
    (z.sum() + implicitopt.jacobian_penalty(problem.f, z.detach(), problem.x0).sum()).backward()


WORK = {
    "envelope": solve_with(Envelope()),
    "implicit": solve_with(Implicit()),
    "implicit, constrained": solve_with(Implicit(), constrained=True),
    "frozen input": solve_with(FrozenInput()),
    "second derivative": second_derivative,
    "no backward pass": unused,
    "fixed point": equilibrium,
}


def run(work: Callable[[TanhProblem], None], times: int) -> None:
    for _ in range(times):
        # Drawn anew: its λ is computed by a graph that the first backward pass frees.
        work(TanhProblem.draw(n=4, d=2, batch=2, seed=1))


@pytest.mark.slow
@pytest.mark.parametrize("name", WORK)
def test_a_hundred_solves_leave_nothing_behind(name: str) -> None:
    run(WORK[name], 2)  # what is made once and kept, such as caches
    gc.collect()
    before = alive()
    run(WORK[name], 100 if name == "implicit" else 15)
    gc.collect()
    assert alive() <= before


@pytest.mark.parametrize("name", list(WORK))
def test_nothing_waits_for_the_cycle_collector(name: str) -> None:
    """On a GPU a cycle holds memory until the collector happens to run."""
    run(WORK[name], 2)
    gc.collect()
    gc.disable()
    try:
        before = alive()
        run(WORK[name], 5)
        assert alive() <= before
    finally:
        gc.enable()


def test_the_count_sees_a_cycle() -> None:
    """The tests above can fail: a tensor in a cycle, and a context in one, are counted."""

    class Keeps(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.cycle = [ctx]
            ctx.kept = torch.ones(3)
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            return grad

    gc.collect()
    gc.disable()
    try:
        before = alive()
        Keeps.apply(torch.ones(3, dtype=F64, requires_grad=True))
        assert alive() >= before + 2
    finally:
        gc.enable()
        gc.collect()


def test_the_solution_does_not_outlive_its_last_name() -> None:
    problem = TanhProblem.draw(n=4, d=2, batch=2, seed=1)
    gc.collect()
    gc.disable()
    try:
        before = alive()
        sol = implicitopt.solve(
            problem.f, problem.loss, problem.x0, problem.z0, adjoint=Implicit(), max_steps=FEW
        )
        assert alive() > before
        del sol
        assert alive() <= before
    finally:
        gc.enable()
