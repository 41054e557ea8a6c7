"""A guard on the default solver's cost: sweeps to KKT 1e-6, untuned, and no problem lost.

Medians of 24 to 34 were measured where 40 is asked for, and worst cases of 28 to 44 where 50 is
and of 53 to 58 where 70 is.
"""

from __future__ import annotations

import pytest
import torch
from families import F64, contraction
from torch import Tensor

import implicitopt
from benchmarks.families import families
from benchmarks.sweeps import count, share_within

BATCH = 32


def sweeps_needed(f, loss, d: int, n: int) -> Tensor:
    """Sweeps of each problem, by the untuned default."""
    x0, z0 = torch.zeros(BATCH, d, dtype=F64), torch.zeros(BATCH, n, dtype=F64)
    with torch.no_grad():
        sol = implicitopt.solve(f, loss, x0, z0, tol=1e-6, max_steps=300)
    assert sol.converged.all(), f"lost {(~sol.converged).sum().item()} of {BATCH} problems"
    return sol.steps


def tanh_sweeps(seed: int, *, rows: int = 10, targets: str = "reachable") -> Tensor:
    """f = tanh(Wz + Ux + b) with ‖W‖₂ = 0.9, n = 64, d = 8; ℓ = ½‖Cz − y‖² + ½·0.1‖x‖²."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=F64, generator=generator)

    n, d = 64, 8
    W, U, b = contraction(n, 0.9, "norm", generator), normal(n, d) / d**0.5, 0.1 * normal(n)
    C = normal(rows, n) / n**0.5

    def f(z: Tensor, x: Tensor) -> Tensor:
        return torch.tanh(z @ W.T + x @ U.T + b)

    if targets == "reachable":
        x, z = normal(BATCH, d), torch.zeros(BATCH, n, dtype=F64)
        for _ in range(400):
            z = f(z, x)
        y = z @ C.T
    else:
        y = 0.3 * normal(BATCH, rows)

    def loss(z: Tensor, x: Tensor) -> Tensor:
        return 0.5 * ((z @ C.T - y) ** 2).sum(-1) + 0.05 * (x**2).sum(-1)

    return sweeps_needed(f, loss, d, n)


CASES = [
    (rows, targets, seed)
    for rows in (10, 64)
    for targets in ("reachable", "random")
    for seed in range(3)
]


@pytest.mark.parametrize(("rows", "targets", "seed"), CASES)
def test_tanh_maps_take_at_most_40_sweeps_and_50_at_worst(rows: int, targets: str, seed: int):
    steps = tanh_sweeps(seed, rows=rows, targets=targets)
    assert steps.median() <= 40
    assert steps.max() <= 50


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_slow_linear_quadratic_problem_takes_at_most_70_sweeps(seed: int):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=F64, generator=generator)

    n, d = 40, 12
    A, B, c = contraction(n, 0.95, "radius", generator), normal(n, d), normal(BATCH, n)
    W, y = normal(n, n) / n**0.5, normal(BATCH, n)

    def f(z: Tensor, x: Tensor) -> Tensor:
        return z @ A.T + x @ B.T + c

    def loss(z: Tensor, x: Tensor) -> Tensor:
        return 0.5 * ((z @ W.T - y) ** 2).sum(-1) + 0.05 * (x**2).sum(-1)

    assert sweeps_needed(f, loss, d, n).max() <= 70


@pytest.mark.slow
@pytest.mark.parametrize(
    "family", ["radius, y random, λ 0.01", "orth, U 1, λ 0.01", "orth, y random, λ 0.01"]
)
def test_no_problem_is_lost_where_descent_used_to_begin_again_from_the_start(family: str):
    """Each lost 3 or 4 of 32 problems, those that had not been near an equilibrium."""
    assert None not in count(families()[family](), implicitopt.Adaptive())


def test_shares_count_the_problems_solved_near_the_fewest_sweeps():
    counts = {"one": {"a": [10, 20, None], "b": [8, None, None]}, "two": {"a": [4], "b": [5]}}
    assert share_within(counts, "a", 1.25) == 3 / 4  # all but the problem that nobody solves
    assert share_within(counts, "a", 1.0) == 2 / 4
    assert share_within(counts, "b", 1.25) == 2 / 4
