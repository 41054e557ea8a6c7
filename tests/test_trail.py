"""What a solve's sweeps leave behind for its backward pass, and what it makes of that."""

import pytest
import torch
from families import F64, LinearQuadratic

import implicitopt
from benchmarks import recycle
from benchmarks.families import linear_quadratic, tanh
from implicitopt import SQP, Adaptive, Implicit, Joint, L2Ball, OneShot, solve
from implicitopt.iteration import iterate
from implicitopt.kkt import Point
from implicitopt.select import Best
from implicitopt.solve import _prepare
from implicitopt.trail import Trail


@torch.no_grad()
def run(problem, keep, solver=None):
    """The system, and the outcome of a solve that keeps so many differences."""
    kkt, start, _ = _prepare(*problem, None, False, None)
    outcome = iterate(
        kkt, solver or Joint(), start, max_steps=200, tol=1e-9, rule=Best(), keep=keep
    )  # fmt: skip
    return kkt, outcome


def jacobians(kkt, point):
    """∂r/∂v of each problem, r = (f − z, μ⁺ − μ, −∇ₓL), column by column, by finite differences."""
    v, n = torch.cat(point, dim=1), point.z.shape[1]
    columns = []
    for unit in 1e-6 * torch.eye(v.shape[1], dtype=v.dtype):
        up, down = (kkt.sweep(Point.split(v + sign * unit, n).contiguous()).r for sign in (1, -1))
        columns.append((up - down) / 2e-6)
    return torch.stack(columns, dim=2)


@torch.no_grad()
def test_on_what_the_differences_span_it_is_the_inverse():
    f, loss, x0, z0 = tanh("gauss")
    kkt, outcome = run((f, loss, x0, z0), 30)
    A = jacobians(kkt, outcome.point)
    secants = outcome.trail.secants
    apply = outcome.trail.inverse(torch.ones(len(x0), dtype=torch.bool), torch.ones(1, 1))
    for age in range(5):  # the newest, of which A is that of the solution
        slot = (secants.count - 1 - age) % 30
        s, y = (ring[torch.arange(len(x0)), slot] for ring in secants.rings)
        assert ((A @ s[..., None])[..., 0] - y).norm(dim=1).div(y.norm(dim=1)).max() < 1e-2
        off = (apply(y) - s).norm(dim=1) / s.norm(dim=1)
        assert off.median() < 0.05
        assert ((-y - s).norm(dim=1) / s.norm(dim=1)).median() > 0.3  # which says something


@torch.no_grad()
def test_a_spanning_trail_of_a_linear_system_inverts_it(monkeypatch):
    monkeypatch.setattr(implicitopt.trail, "RIDGE", 1e-14)
    problem = LinearQuadratic.draw(5, 2, 3, 0.6, "spectral", 0)
    kkt, start, _ = _prepare(problem.f, problem.loss, *problem.start(), None, False, None)
    trail, generator = Trail.at(start, 12), torch.Generator().manual_seed(0)
    everyone = torch.ones(3, dtype=torch.bool)
    for _ in range(13):
        v = torch.randn(3, 12, dtype=F64, generator=generator)
        point = Point.split(v, 5).contiguous()
        trail.push(point, kkt.sweep(point).r, everyone)
    A = jacobians(kkt, start)
    w = torch.randn(3, 12, dtype=F64, generator=generator)
    expected = torch.linalg.solve(A, w[..., None])[..., 0]
    for of_v, off in (([1.0, 1.0, 1.0], 1e-6), ([8.0, 0.125, 64.0], 1e-3)):
        d_z, d_mu, d_x = of_v
        units = torch.tensor([d_z] * 5 + [d_mu] * 5 + [d_x] * 2, dtype=F64).expand(3, -1)
        of_rows = torch.tensor([d_mu] * 5 + [d_z] * 5 + [d_x] * 2, dtype=F64)
        found = units * trail.inverse(everyone, units)(of_rows * w)
        torch.testing.assert_close(found, expected, rtol=off, atol=off)
        assert torch.equal(trail.inverse(~everyone, units)(w), -w)


@torch.no_grad()
@pytest.mark.parametrize(
    ("problem", "apart"),
    [(linear_quadratic(30, 8, 0.7), True), (tanh("gauss", scale=1.0, lam=0.01), False)],
    ids=["linear", "tanh"],
)
def test_a_difference_of_a_linear_map_is_two(problem, apart):
    """What z and x, and what μ makes of r: both are products with one matrix if f is linear."""
    kkt, outcome = run(problem, 20, SQP())
    s, y, alike = outcome.trail._pairs(torch.ones(len(problem[2]), dtype=torch.bool))
    halves = s[:, 20:].flatten(1).any(dim=1)
    assert halves.all() if apart else not halves.any()
    A = jacobians(kkt, outcome.point)
    off = (y - s @ A.mT).norm(dim=2) / (s.norm(dim=2) + (s == 0).all(dim=2))
    assert alike.all() if apart else not alike.all()
    assert (off.amax(dim=1) <= 1e-5).all() == apart


def test_differences_that_contradict_each_other_are_left_out():
    generator = torch.Generator().manual_seed(0)
    start = Point(*(torch.zeros(2, k, dtype=F64) for k in (4, 4, 2)))
    H = torch.randn(2, 10, 10, dtype=F64, generator=generator)
    H[0] = H[0] + H[0].mT  # of a Lagrangian; the other one is not
    trail = Trail.at(start, 8)
    for _ in range(9):
        v = torch.randn(2, 10, dtype=F64, generator=generator)
        z, mu, x = Point.split((H @ v[..., None])[..., 0], 4)
        trail.push(Point.split(v, 4), torch.cat((mu, z, -x), dim=1), torch.ones(2) > 0)
    w = torch.randn(2, 10, dtype=F64, generator=generator)
    found = trail.inverse(torch.ones(2) > 0, torch.ones(2, 10))(w)
    assert not torch.equal(found[0], -w[0])
    assert torch.equal(found[1], -w[1])


def test_what_is_not_finite_or_has_finished_leaves_no_difference():
    start = Point(*(torch.zeros(3, k) for k in (2, 2, 1)))
    trail = Trail.at(start, 4)
    moving = torch.tensor([True, True, False])
    for step in range(4):
        v = torch.full((3, 5), float(step))
        r = v.clone()
        if step == 1:
            r[1, 0] = torch.nan
        trail.push(Point.split(v, 2), r, moving)
    assert trail.secants.count.tolist() == [3, 2, 0]  # the second: 0 to 2, and 2 to 3
    for ring in trail.secants.rings:
        assert ring[1, 0].unique().tolist() == [2.0]
        assert ring.isfinite().all()
        assert torch.equal(ring[2], torch.zeros(4, 5))


def gradient(kept, solver, problem):
    """Of ‖x*‖² in a shift of the map, and the report of its backward solve."""
    f, loss, x0, z0 = problem
    shift = torch.zeros_like(z0[0]).requires_grad_()
    sol = solve(
        lambda z, x: f(z, x) + shift, loss, x0, z0, solver=solver, tol=1e-8,
        adjoint=Implicit(recycle=kept), max_steps=300,
    )  # fmt: skip
    assert sol.converged.all()
    (grad,) = torch.autograd.grad(sol.x.square().sum(), shift)
    return grad, sol.adjoint


@pytest.mark.parametrize(
    ("solver", "problem"),
    [(None, linear_quadratic(30, 8, 0.7)), (Adaptive(Joint()), tanh()), (OneShot(), tanh())],
    ids=["default, linear", "joint", "one-shot"],
)
def test_a_backward_pass_takes_fewer_products_for_the_same_gradient(solver, problem):
    """The default's few and long steps agree with each other on linear maps, and count twice."""
    plain, alone = gradient(0, solver, problem)
    found, report = gradient(None, solver, problem)
    torch.testing.assert_close(found, plain, rtol=1e-8, atol=1e-9)
    assert report.residual.max() <= 1e-10
    assert report.products < 0.8 * alone.products
    assert (report.steps <= alone.steps).all()


def test_problems_that_did_not_converge_go_without_it():
    """What their differences tell may be of anywhere."""
    f, loss, x0, z0 = tanh("gauss")
    shift = torch.zeros_like(z0[0]).requires_grad_()
    found = []
    for kept in (0, 20):
        sol = solve(
            lambda z, x: f(z, x) + shift, loss, x0, z0, max_steps=20,
            adjoint=Implicit(recycle=kept, tol=1e-6),
        )  # fmt: skip
        assert not sol.converged.any()
        (grad,) = torch.autograd.grad(sol.x.sum(), shift)
        found.append((grad, sol.adjoint.steps))
    assert torch.equal(found[0][1], found[1][1])
    torch.testing.assert_close(found[0][0], found[1][0], rtol=1e-9, atol=1e-12)


def test_what_it_spares_is_shown_by_kind_of_problem():
    found = {
        "tanh, one, to 1e-06": {"without": [10, 40], "with": [6, 41]},
        "tanh, two, to 1e-06": {"without": [20], "with": [9]},
        "linear, to 0.001": {"without": [7], "with": [7]},
    }
    *_, smooth, linear = recycle.table(found).splitlines()
    cells = [cell.strip() for cell in smooth.split("|")[1:-1]]
    assert cells == ["tanh, to 1e-06", "3", "20", "9", "30", "25", "+1"]
    assert linear.split("|")[-2].strip() == "+0"
    quick = recycle.measure(quick=True, bar=lambda names, desc: names)
    assert all(
        after <= before
        for row in quick.values()
        for before, after in zip(row["without"], row["with"], strict=True)
    )


def test_it_is_kept_only_where_it_is_used():
    f, loss, x0, z0 = tanh("gauss")
    kkt, start, _ = _prepare(f, loss, x0, z0, None, False, None)
    assert Implicit().differences(kkt, start) == 60
    assert Implicit(recycle=7).differences(kkt, start) == 7
    assert Implicit(precondition=lambda v: v).differences(kkt, start) == 0
    inside, _, _ = _prepare(f, loss, x0, z0, L2Ball(1.0), False, None)
    assert Implicit().differences(inside, start) == 0
    wide = Point(*(torch.zeros(1, k) for k in (6144, 6144, 64)))
    assert Implicit().differences(kkt, wide) == 20
    assert run((f, loss, x0, z0), 0)[1].trail is None


@pytest.mark.parametrize("bad", [-1, 2.5, "some"])
def test_recycle_is_a_number_of_differences(bad):
    with pytest.raises((TypeError, ValueError), match="adjoint recycle must be"):
        Implicit(recycle=bad)
