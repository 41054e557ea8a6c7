"""The step size in x that ``Joint`` finds, in whatever units x and the loss come."""

import math
from functools import cache

import pytest
import torch

import implicitopt
from benchmarks.families import linear_quadratic, tanh
from benchmarks.units import in_units
from implicitopt import Adaptive, Anderson, Joint, WarmStart
from implicitopt.iteration import iterate
from implicitopt.select import Best
from implicitopt.solve import _prepare
from implicitopt.solvers import step_size
from implicitopt.solvers.step_size import LOOKS, WARMUP, Seen, StepSize, _curvature, _folded

F64 = torch.float64
BASES = {"tanh": tanh, "linear": lambda: linear_quadratic(30, 8, 0.7)}


def sizes_of(problem, *, steps=40, solver=None, **options):
    """α_x of every step, ``(steps, B)``."""
    solver = Joint() if solver is None else solver
    found = []

    class Watched(Joint):
        def step(self, kkt, point, sweep, state):
            moved, state = super().step(kkt, point, sweep, state)
            found.append(state.size.alpha[:, 0].clone())
            return moved, state

    watched = Watched(solver.accelerator, solver.steps, solver.reach)
    implicitopt.solve(*problem, solver=watched, max_steps=steps, tol=0.0, **options)
    return torch.stack(found)


@cache
def in_natural_units(base):
    return implicitopt.solve(*BASES[base](), tol=1e-6, max_steps=400)


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize(
    ("of_x", "of_loss"),
    [(1e-2, 1.0), (0.1, 1.0), (10.0, 1.0), (1e2, 1.0), (1.0, 1e-3), (1.0, 1e3), (0.1, 1e-3),
     (1e2, 1e3)],
)  # fmt: skip
def test_units_hardly_matter(base, of_x, of_loss):
    """It was up to 240 sweeps for 44, with one step size for all units."""
    natural = in_natural_units(base)
    scaled = implicitopt.solve(*in_units(BASES[base](), of_x, of_loss), tol=1e-6, max_steps=400)
    assert scaled.converged.all()
    assert scaled.steps.median() <= 2 * natural.steps.median()
    # tol is relative to 1 + ‖(z, μ, x)‖, so it does depend on units.
    loss = scaled.value / of_loss
    torch.testing.assert_close(loss, natural.value, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("base", BASES)
def test_in_natural_units_nothing_changes_after_the_plain_steps(base):
    sizes = sizes_of(BASES[base]())
    assert (sizes[WARMUP:] == sizes[WARMUP]).all()


def test_a_step_that_is_too_long_is_made_again_shorter():
    sizes = sizes_of(in_units(tanh(), 100.0, 1.0))
    assert (sizes[WARMUP] < sizes[WARMUP - 1]).all()
    assert (sizes[-1] < sizes[WARMUP - 1] / 9).all()


def test_where_f_is_straight_its_length_is_no_reason():
    sizes = sizes_of(in_units(linear_quadratic(30, 8, 0.7), 1e4, 1.0))
    assert (sizes[WARMUP] < sizes[WARMUP - 1]).any()
    torch.testing.assert_close(sizes[-1], sizes[WARMUP - 1], rtol=1e-12, atol=0)


def test_a_step_that_is_too_short_becomes_longer_at_the_looks_alone():
    sizes = sizes_of(in_units(tanh(), 0.1, 1e-3))
    changed = (sizes[1:] != sizes[:-1]).any(dim=1).nonzero()[:, 0] + 1
    assert set(changed.tolist()) <= {*range(1, WARMUP), *LOOKS}
    assert (sizes[-1] > 100 * sizes[0]).all()


def test_a_warm_start_keeps_its_short_steps():
    problem = in_units(tanh(), 0.1, 1e-3)
    first = implicitopt.solve(*problem, tol=1e-4)
    warm = WarmStart(first.x + 1e-3, first.z, first.mu)
    sizes = sizes_of(problem, warm_start=warm)
    assert (sizes[1:] <= sizes[:-1]).all()


def test_an_accelerator_that_cannot_forget_keeps_its_step():
    class Plain:
        def init(self, v):
            return Anderson().init(v)

        def step(self, state, v, Fv):
            return Anderson().step(state, v, Fv)

    sizes = sizes_of(in_units(tanh(), 0.1, 1e-3), solver=Joint(Plain()))
    assert (sizes[WARMUP:] == sizes[WARMUP]).all()


def test_a_step_size_that_is_given_is_kept():
    solver = Joint(steps=implicitopt.StepSizes(x=1e-3))
    assert (sizes_of(in_units(tanh(), 100.0, 1.0), solver=solver) == 1e-3).all()


@pytest.mark.parametrize("of_loss", [1e-3, 1.0])
@pytest.mark.parametrize(
    "solver", [Joint(), Adaptive(Joint(), patience=8)], ids=["joint", "adaptive"]
)
def test_problems_of_other_units_do_not_notice_each_other(solver, of_loss):
    units = torch.tensor([1.0, 1e-2, 100.0, 1.0, 0.1, 10.0], dtype=F64)[:, None]

    def solved(rows):
        f, loss, x0, z0 = tanh(batch=6)
        whole = torch.zeros(6, 64, dtype=F64), torch.zeros(6, 8, dtype=F64)

        def put(z, x):
            return whole[0].index_copy(0, rows, z), whole[1].index_copy(0, rows, x * units[rows])

        return implicitopt.solve(
            lambda z, x: f(z, x * units[rows]),
            lambda z, x: of_loss * loss(*put(z, x))[rows],
            x0[rows], z0[rows], solver=solver, tol=1e-6, max_steps=60,
        )  # fmt: skip

    together = solved(torch.arange(6))
    for row in range(6):
        alone = solved(torch.tensor([row]))
        assert alone.steps[0] == together.steps[row]
        torch.testing.assert_close(alone.x[0], together.x[row], rtol=1e-6, atol=1e-9)


def test_the_curvature_along_equilibria_is_found_among_noise():
    """Against the reduced Hessian of a linear-quadratic problem, in closed form."""
    generator = torch.Generator().manual_seed(0)
    H = torch.randn(3, 5, 5, generator=generator, dtype=F64)
    H = H @ H.mT + 0.1 * torch.eye(5, dtype=F64)
    g = torch.randn(3, 5, generator=generator, dtype=F64)
    direction = g / g.norm(dim=1, keepdim=True)
    moves = torch.tensor([0.0, 0.5, 0.7, 1.5, 2.0, 2.1], dtype=F64)
    seen = []
    for at, move in enumerate(moves):
        # Every other difference changes z and μ too, and with them the gradient.
        off, adjoint_off = torch.randn(2, 3, 7, generator=generator, dtype=F64) * (
            1 if at < 2 else 1e-6
        )
        x = move * direction
        unsettled = 50 * adjoint_off[:, :5]
        seen.append(Seen(off, adjoint_off, -(g + (H @ x[..., None])[..., 0] + unsettled), x))
    expected = (H @ direction[..., None])[..., 0].norm(dim=1)
    torch.testing.assert_close(_curvature(seen), expected, rtol=1e-2, atol=0)


def test_without_any_move_there_is_no_curvature():
    still = Seen(*(torch.ones(2, 3, dtype=F64) for _ in range(4)))
    assert not (_curvature([still] * 4) > 0).any()


def test_folding_keeps_scalar_products_about():
    short = torch.randn(2, 64)
    assert torch.equal(_folded(short), short.double())
    generator = torch.Generator().manual_seed(0)
    long = torch.randn(6, 10_001, generator=generator)
    exact, found = (rows.double() @ rows.double().mT for rows in (long, _folded(long)))
    assert (found - exact).abs().max() <= 0.5 * exact.max()
    assert _folded(long).shape == (6, 64)


def test_it_is_one_of_a_stuck_gradient_only(monkeypatch):
    """Where ∇ₓL has all but gone, no ratio of its changes makes the step longer."""
    monkeypatch.setattr(step_size, "_curvature", lambda seen: torch.full((32,), 1e-9, dtype=F64))
    kkt, start, _ = _prepare(*tanh(), None, False, None)
    solver, sizes = Joint(), []
    init = solver.init(kkt, start)[1].size
    assert isinstance(init, StepSize)

    class Watched(Joint):
        def step(self, kkt, point, sweep, state):
            before = state.size.alpha[:, 0].clone()
            moved, state = super().step(kkt, point, sweep, state)
            gone = sweep.grad.norm(dim=1) < step_size.LEFT * state.size.steepest
            sizes.append((gone, state.size.alpha[:, 0] > before))
            return moved, state

    with torch.no_grad():
        iterate(kkt, Watched(), start, max_steps=20, tol=0.0, rule=Best())
    gone, longer = map(torch.stack, zip(*sizes, strict=True))
    assert gone[LOOKS[1]].any()
    assert longer[LOOKS[0]].any()
    assert not (gone & longer).any()
    assert math.isfinite(float(longer.sum()))
