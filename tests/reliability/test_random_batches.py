"""Whatever becomes of some problems of a batch, the others are as they would be, bit for bit."""

import random
from functools import partial

import pytest
import torch

from implicitopt import (
    SQP,
    Adaptive,
    Anderson,
    Box,
    Broyden,
    Joint,
    L2Ball,
    LinfBall,
    Nested,
    OneShot,
    Picard,
    Simplex,
    StepSizes,
    solve,
)
from tests.test_isolation import DIVERGE, SPOIL, Tanh, blocks, sound

SOLVERS = [
    lambda: Adaptive(Joint(), patience=4),
    lambda: Joint(Anderson("I")),
    lambda: Joint(Anderson("II", memory=3)),
    lambda: Joint(Broyden("good")),
    lambda: Joint(Picard(), StepSizes(z=0.9, mu=0.8, x=0.2)),
    OneShot,
    SQP,
    lambda: Adaptive(patience=4),
    lambda: Nested(partial(torch.optim.Adam, lr=0.05), inner_steps=6),
]
PROJECTIONS = [None, None, L2Ball(0.5), LinfBall(0.2), Box(-0.1, 0.3), Simplex()]
POISON = SPOIL | DIVERGE


def poisoned(problem, by_row):
    """f and loss of the problem, in which each row of ``by_row`` goes wrong in its own way."""

    def f(z, x):
        image = list(problem.f(z, x).split(1))
        for row, spoil in by_row.items():
            at = slice(row, row + 1)
            image[row] = spoil(image[row], 0.0 * z[at, 0], z[at], x[at])[0]
        return torch.cat(image)

    def loss(z, x):
        value = list(problem.loss(z, x).split(1))
        for row, spoil in by_row.items():
            at = slice(row, row + 1)
            value[row] = spoil(0.0 * z[at], value[row], z[at], x[at])[1]
        return torch.cat(value)

    return f, loss


def check_batch(seed, solvers=SOLVERS):
    rng = random.Random(seed)
    batch, n, d = rng.randint(2, 7), rng.randint(1, 6), rng.randint(1, 4)
    dtype = rng.choice([torch.float64, torch.float32])
    problem = Tanh(seed, batch, n, d, rho=rng.uniform(0.3, 0.95), dtype=dtype)
    bad = rng.sample(range(batch), rng.randint(1, batch - 1))
    kinds = {row: rng.choice(list(POISON)) for row in bad}
    options = {
        "solver": rng.choice(solvers)(),
        "project": rng.choice(PROJECTIONS),
        "maximize": rng.random() < 0.2,
        "max_steps": rng.randint(3, 25),
        "tol": 0.0,  # so that no problem leaves the batch, which changes how others round
    }
    clean, spoilt = (
        solve(*poisoned(problem, by_row), problem.x0, problem.z0, **options)
        for by_row in (dict.fromkeys(bad, sound), {row: POISON[kinds[row]] for row in bad})
    )
    others = [row for row in range(batch) if row not in bad]
    for name, there in blocks(clean).items():
        found = blocks(spoilt)[name]
        assert torch.equal(found[others], there[others]), (
            f"batch {seed}: {name}, {kinds}, {options}"
        )
    for name in ("status", "steps"):
        assert torch.equal(getattr(clean, name)[others], getattr(spoilt, name)[others])


def check_alone(seed):
    """To convergence: a problem of a batch, poisoned problems in it, and the same by itself."""
    rng = random.Random(seed)
    batch, n, d = rng.randint(2, 5), rng.randint(1, 6), rng.randint(1, 3)
    problem = Tanh(seed, batch, n, d, rho=rng.uniform(0.3, 0.8))
    bad, one = rng.sample(range(batch), 2)
    # No poison through which the problem can be solved after all, and none that takes long.
    kind = rng.choice(list(SPOIL))
    options = {"tol": 1e-12, "max_steps": 400, "project": rng.choice(PROJECTIONS[:5])}
    sol = solve(*poisoned(problem, {bad: SPOIL[kind]}), problem.x0, problem.z0, **options)
    at = slice(one, one + 1)
    own = Tanh(seed, batch, n, d)
    own.W, own.U, own.target = problem.W, problem.U, problem.target[at]
    alone = solve(own.f, own.loss, problem.x0[at], problem.z0[at], **options)
    if not (alone.converged.all() and sol.converged[one]):
        return False
    off = max((sol.x[at] - alone.x).abs().max(), (sol.z[at] - alone.z).abs().max())
    start = (problem.x0, alone.value)
    same_minimum = (sol.value[at] - alone.value).abs() < 1e-6 * (1 + start[1].abs())
    assert not same_minimum or off <= 1e-9, f"batch {seed}: off by {off}"
    return bool(same_minimum)


def test_random_batches():
    for seed in range(20):
        check_batch(seed)


@pytest.mark.parametrize("seed", [49, 106, 714, 849])
def test_when_a_neighbour_goes_over_to_descent_does_not_matter(seed):
    """It used to: the window at fixed x began with the first to go, and its sums with it."""
    check_batch(seed, [partial(Adaptive, patience=patience) for patience in (3, 2, 5)])


@pytest.mark.slow
@pytest.mark.parametrize("part", range(10))
def test_a_thousand_random_batches(part):
    for seed in range(100 * part, 100 * (part + 1)):
        check_batch(seed)


def test_problems_of_a_poisoned_batch_are_those_solved_alone():
    compared = sum(check_alone(seed) for seed in range(5))
    assert compared >= 4


@pytest.mark.slow
def test_many_problems_of_poisoned_batches_are_those_solved_alone():
    compared = sum(check_alone(seed) for seed in range(200))
    assert compared >= 160
