"""``SQP``: its model against one formed of dense matrices, its sweeps, and what it refuses."""

import math
from types import SimpleNamespace

import pytest
import torch
from families import F64, LinearQuadratic, worst

import implicitopt
from benchmarks.attacks import classifier
from benchmarks.families import linear_quadratic, tanh
from benchmarks.problems import tanh as softmax
from benchmarks.sharp import sharp
from benchmarks.shears import shear
from benchmarks.sweeps import count
from benchmarks.units import in_units
from implicitopt import SQP, Adaptive, Box, Implicit, Joint, L2Ball, LinfBall, OneShot, solve
from implicitopt.kkt import Point
from implicitopt.solvers import kkt_model
from implicitopt.solvers.kkt_model import Model
from implicitopt.solvers.kkt_secants import KKTSecants
from implicitopt.solvers.sqp import SQPState


class Differences:
    """What ``KKTSecants`` keeps, kept plainly: rows of differences, and of a probe of the loss."""

    def __init__(self):
        self.last, self.rows, self.points = None, [], []
        self.of_f = self.of_loss = 1.0  # how curved f and the loss are
        self.flips = 0  # steps that would have led up

    def push(self, point, sweep):
        g = torch.cat(sweep.loss_grad, 1)
        joint = torch.cat([sweep.mu, sweep.grad], 1)
        now = (torch.cat([point.z, point.x], 1), sweep.f, point.mu, joint - g, g)
        v, self.sweep = torch.cat(point, 1), sweep
        if self.last is not None:
            self.rows.append(tuple(a - b for a, b in zip(now, self.last[0], strict=True)))
            self.points.append(0.5 * (v + self.last[1]))
        self.last = now, v

    def learn(self, S, Y, T, ridge, wrong, ends):
        """Of the newest difference, the last: what the others' ridge regression makes of it."""
        known = S[:, :-1]
        gram = known @ known.mT + torch.diag_embed(ridge[:, :-1])
        weights = torch.linalg.solve(gram, known @ S[:, -1:].mT)
        off = (Y[:, -1] - (Y[:, :-1].mT @ weights)[..., 0]).norm(dim=1) / Y.norm(dim=2).amax(1)
        spread = (weights[..., 0] ** 2 * wrong[:, :-1]).sum(1) + wrong[:, -1]
        size = T.diagonal(dim1=1, dim2=2).abs().sqrt()
        apart = wrong + wrong[:, -1:]
        skew = (T[:, -1] - T[:, :, -1]).abs() / (size * size[:, -1:] * apart)
        MY, WS = ends
        off_ends, of_ends = (MY - WS) ** 2, MY**2 + WS**2
        disagree = ((off_ends[:, -1] + off_ends[:, :, -1]) / apart).sum(1)
        both = (of_ends[:, -1] + of_ends[:, :, -1]).sum(1)
        found = (
            torch.minimum(
                off**2 / (kkt_model.NONLINEAR**2 * spread),
                kkt_model.ENDS_DISAGREE * disagree / both,
            ),
            skew.mean(1) / kkt_model.ASYMMETRIC,
        )
        self.of_f, self.of_loss = (
            new.clamp(kkt_model.STRAIGHT, most)[:, None].maximum(
                torch.as_tensor(kkt_model.STRAIGHTER * old, dtype=F64)
            )
            for new, most, old in zip(
                found, kkt_model.MOST_CURVED, (self.of_f, self.of_loss), strict=True
            )
        )

    def step(self, sweep, alpha, tau, probe, memory):
        """The step of the module's equations, by dense linear algebra; with it τ Δx for Δx."""
        S, Y, M, W, G = (torch.stack(rows, 1) for rows in zip(*self.rows[-memory:], strict=True))
        here, n = self.last[1], sweep.f.shape[1]
        N, d = S.shape[2], S.shape[2] - n
        units = torch.cat([torch.ones(len(tau), n, dtype=F64), tau.expand(-1, d)], 1)
        S, W, G = S * units[:, None], W / units[:, None], G / units[:, None]
        v_units = torch.cat([units[:, :n], units[:, :n], units[:, n:]], 1)
        middles = torch.stack(self.points[-memory:], 1)
        size, state = (
            1 + (v * u).norm(dim=1) for v, u in ((here, v_units), (self.last[0][0], units))
        )
        wrong = (((here[:, None] - middles) * v_units[:, None]).norm(dim=2) / size[:, None]) ** 2
        ridge = kkt_model.NONLINEAR**2 * self.of_f * wrong + 1e-10
        s, m = S.norm(dim=2, keepdim=True), M.norm(dim=2, keepdim=True)
        S, Y, G, M, W = S / s, Y / s, G / s, M / m, W / m
        ratio = (m / s)[..., 0] * (state / self.last[0][2].norm(dim=1))[:, None]
        P, P_c = (
            torch.linalg.solve(S @ S.mT + torch.diag_embed(D), S)
            for D in (ridge, ridge + kkt_model.ADJOINTS_DROWN * ratio**2)
        )
        J = Y.mT @ P
        E = W - M @ J
        SE = S @ (E * m / s).mT
        C = P_c.mT @ (0.5 * (SE + SE.mT)) @ P_c
        D = ridge + kkt_model.STATES_DROWN * self.of_f / ratio**2
        J = J + M.mT @ torch.linalg.solve(M @ M.mT + torch.diag_embed(D), E - (E @ S.mT) @ P)
        T = S @ G.mT
        T = 0.5 * (T + T.mT)
        diagonal = T.diagonal(dim1=1, dim2=2)
        flat = kkt_model.FLAT * diagonal.abs().amax(1, keepdim=True)
        shift = torch.copysign(flat, diagonal) + (
            kkt_model.LOSS_NONLINEAR * self.of_loss * wrong * diagonal.abs()
        )
        shares = (torch.as_tensor(share).clamp(max=1) for share in (self.of_f, self.of_loss))
        either = torch.maximum(*shares)
        self.learn(S, Y, S @ G.mT, ridge, wrong, (M @ Y.mT, W @ S.mT))
        T = T + torch.diag_embed(shift)
        # The probe: all secants of the loss together.
        X = S[:, :, n:]
        S, G = (torch.cat([a, b[:, None]], 1) for a, b in zip((S, G), probe, strict=True))
        T = torch.nn.functional.pad(T, (0, 1, 0, 1))
        T[:, -1] = T[:, :, -1] = (S @ G[:, -1:].mT)[..., 0]
        T[:, -1, -1] += torch.copysign(flat[:, 0], T[:, -1, -1])
        H = C + G.mT @ torch.linalg.solve(T, G)
        K = torch.zeros(len(J), N + n, N + n, dtype=F64)
        K[:, N:, :N] = J
        K[:, N:, :n] -= torch.eye(n, dtype=F64)
        K[:, :N, :N], K[:, :N, N:] = H, K[:, N:, :N].mT
        lengths = X.norm(dim=2, keepdim=True)
        X = torch.where(lengths > 0, X / lengths, 0.0)
        # Along the differences of x, with states and adjoints following.
        others = [*range(n), *range(N, N + n)]
        inner = torch.linalg.inv(K[:, others][:, :, others])
        side = K[:, others, n:N]
        reduced = H[:, n:, n:] - side.mT @ inner @ side
        most = ((X @ reduced) * X).sum(2).amax(1, keepdim=True)
        far = (alpha * most > kkt_model.FAR_OFF) | (alpha * most > 0) & (
            alpha * most < 1 / kkt_model.FAR_OFF
        )
        alpha = torch.where(far, 1 / most, alpha)
        untrusted = either * (kkt_model.TRIED + kkt_model.NONLINEAR**2 * wrong) + 1e-10
        tried = X.mT @ torch.linalg.solve(X @ X.mT + torch.diag_embed(untrusted), X)
        K[:, n:N, n:N] += (torch.eye(d, dtype=F64) - tried) / alpha[..., None]
        grad = -sweep.r[:, 2 * n :] / tau
        right = -torch.cat([sweep.r[:, n : 2 * n], grad, sweep.r[:, :n]], 1)
        found = torch.linalg.solve(K, right[..., None])[..., 0]
        # Downhill, if it is a step up: with states and adjoints at their equilibria all the same.
        at_rest = (inner @ right[:, others, None])[..., 0]
        slope = ((grad + (side.mT @ at_rest[..., None])[..., 0]) * found[:, n:N]).sum(dim=1)
        found[:, n:N] *= torch.where(slope > 0, -1.0, 1.0)[:, None]
        self.flips += int((slope > 0).sum())
        found[:, others] = at_rest - (inner @ side @ found[:, n:N, None])[..., 0]
        return Point(found[:, :n], found[:, N:], found[:, n:N])


def wells(n, d, batch):
    """A linear map, and a loss with a maximum at z = 0 and minima on all sides of it."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=F64)

    W, U, x0 = 0.6 * torch.linalg.qr(normal(n, n)).Q, normal(d, n), 0.1 * normal(batch, d)

    def loss(z, x):
        return ((z**2 - 1) ** 2).sum(-1) + 0.05 * (x**2).sum(-1)

    return lambda z, x: z @ W + x @ U, loss, x0, x0.new_zeros(batch, n)


@pytest.mark.parametrize("up", [False, True], ids=["convex", "wells"])
@pytest.mark.parametrize("d", [3, 40], ids=["in x", "in differences of x"])
def test_the_step_is_that_of_dense_matrices(d, up, monkeypatch):
    dense, compared, alphas, calls = Differences(), [], [], []
    push, reduce, step, probe = KKTSecants.push, Model._reduce, Model.step, Model.probe

    def pushed(self, point, sweep):
        dense.push(point, sweep)
        return push(self, point, sweep)

    def reduced(self, alpha):
        alphas.append(alpha[..., 0])
        return reduce(self, alpha)

    def probed(self, move, change):
        length = torch.hypot(move[0].norm(dim=1), move[1].norm(dim=1))[:, None]
        calls.append((torch.cat(move, 1) / length, torch.cat(change, 1) / length))
        return probe(self, move, change)

    def stepped(self, found, share):
        whole = step(self, found, torch.ones_like(share))
        known = dense.step(dense.sweep, alphas[-1], self.tau, calls[-1], memory=6)
        if self.k >= 3:
            compared.append(worst(whole, known))
        return step(self, found, share)

    monkeypatch.setattr(KKTSecants, "push", pushed)
    monkeypatch.setattr(Model, "_reduce", reduced)
    monkeypatch.setattr(Model, "step", stepped)
    monkeypatch.setattr(Model, "probe", probed)
    problem = wells(10, d, 3) if up else tanh("gauss", n=10, d=d, rows=5, batch=3)
    implicitopt.solve(*problem, solver=SQP(memory=6), max_steps=12, tol=0.0)
    assert len(compared) >= 6
    assert max(compared) <= 1e-9
    assert (dense.flips > 0) == up


@pytest.mark.parametrize("options", [{}, {"project": Box(-0.5, 0.5)}], ids=["free", "in a box"])
def test_it_ends_in_minima(options):
    """From near a maximum, to which Newton's steps lead: the loss's Hessian says where it ends."""
    f, loss, x0, z0 = wells(3, 3, 32)
    sol = solve(f, loss, x0, z0, solver=SQP(), max_steps=300, **options)
    assert sol.converged.all()
    inverse = torch.linalg.inv(torch.eye(3, dtype=F64) - torch.func.jacrev(f)(z0[0], x0[0]))
    response = inverse @ torch.func.jacrev(f, argnums=1)(z0[0], x0[0])
    for x, z in zip(sol.x, sol.z, strict=True):
        curvature = response.mT @ torch.diag(12 * z**2 - 4) @ response + 0.1 * torch.eye(3)
        free = x.abs() < 0.5 if options else x == x
        assert (torch.linalg.eigvalsh(curvature[free][:, free]) > 0).all()


@pytest.mark.parametrize(
    ("problem", "share"),
    [(tanh(), 0.8), (tanh("radius"), 0.75), (tanh("orth", scale=0.1, lam=0.01), 0.5),
     (tanh("sym", rows=64, reachable=False), 0.8), (linear_quadratic(40, 12, 0.95), 0.8)],
    ids=["gauss", "radius", "orth", "sym", "linear"],
)  # fmt: skip
def test_it_takes_fewer_sweeps_than_the_joint_iteration(problem, share):
    mine, joint = (
        torch.tensor([math.inf if n is None else n for n in count(problem, solver)])
        for solver in (SQP(), Joint())
    )
    assert mine.median() <= share * joint.median()


def test_a_residual_that_has_to_grow_does_not_end_the_trust_in_steps():
    """Judged by the residual alone one problem took 400 sweeps, with the loss falling all along."""
    problem = softmax("orth", 0.9, 16, F64, classes=10)
    sol = solve(*problem, solver=SQP(), tol=1e-6, max_steps=100)
    assert sol.converged.all()


@pytest.mark.parametrize(
    ("loss", "residual", "trusted"),
    [(0.5, 9.0, "more"), (1.5, 0.1, "less"), (0.9, 9.0, "less"), (1.1, 1.1, "more"),
     (1.1, 1.3, "less")],
    ids=["loss fell", "loss rose", "unsure, worse", "unsure, hardly worse", "unsure, a bit worse"],
)  # fmt: skip
def test_a_step_is_judged_by_the_loss_where_that_is_sure(loss, residual, trusted):
    one, nothing = torch.ones(1, dtype=F64), torch.zeros(1, 1, dtype=F64)
    sweeps = [
        SimpleNamespace(f=nothing, lagrangian=value * one, doubt=0.1 * one) for value in (1.0, loss)
    ]
    state = SQPState.at(Point(nothing, nothing, nothing), memory=3)
    state.trust = 0.5 * one
    state.judge(one, sweeps[0])
    before = state.trust
    state.judge(residual * one, sweeps[1])
    assert ("more" if state.trust > before else "less") == trusted


@pytest.mark.parametrize("of_x", [1e-2, 1e2])
@pytest.mark.parametrize("problem", [tanh(), linear_quadratic(40, 12, 0.9)], ids=["tanh", "linear"])
def test_units_of_x_hardly_matter(problem, of_x):
    # In units of 10 no linear problem was solved while x was taken as it comes.
    ours, theirs = (
        torch.tensor([math.inf if n is None else n for n in count(each, SQP())])
        for each in (problem, in_units(problem, of_x, 1.0))
    )
    assert (theirs <= 1.25 * ours + 5).all()


@pytest.mark.parametrize("of_loss", [1e-3, 1e3])
def test_units_of_the_loss_hardly_matter(of_loss):
    sweeps = count(in_units(tanh(), 1.0, of_loss), SQP())
    assert None not in sweeps
    assert sum(sweeps) / len(sweeps) <= 60


def test_attacks_within_bounds_take_half_of_the_joint_iterations_sweeps():
    f, loss, x, z = classifier(0)
    options = {"project": LinfBall(0.05, center=x), "maximize": True, "tol": 1e-4, "max_steps": 200}
    mine, other = (
        solve(f, loss, x, z, solver=each, **options) for each in (SQP(), Adaptive(Joint()))
    )
    assert mine.converged.all()
    assert other.converged.all()
    assert mine.steps.median() <= 0.5 * other.steps.median()
    assert ((mine.x - x).abs() <= 0.05 + 1e-12).all()
    assert mine.value.mean() >= other.value.mean() - 1e-2


def test_a_linear_problem_is_solved_to_rounding():
    problem = LinearQuadratic.draw(12, 5, 4, 0.9, "radius", 3)
    known = problem.known()
    sol = implicitopt.solve(
        problem.f, problem.loss, *problem.start(), solver=SQP(), tol=1e-12, max_steps=60
    )
    assert sol.converged.all()
    assert worst((sol.x, sol.z, sol.mu), known[:3]) <= 1e-10 * problem.sensitivity()


def test_it_counts_the_probes_of_the_loss():
    sol = implicitopt.solve(*tanh(batch=2), solver=SQP(), max_steps=10, tol=0.0)
    assert sol.sweeps.f == sol.sweeps.vjp == 10
    assert 10 + 6 <= sol.sweeps.loss <= 10 + 8  # but at the two plain steps, and at the last


def test_implicit_gradients_are_those_of_another_solver():
    grads = []
    for solver in (SQP(), Joint()):
        problem = LinearQuadratic.draw(6, 3, 2, 0.5, "norm", 0)
        sol = implicitopt.solve(
            problem.f, problem.loss, *problem.start(), solver=solver,
            adjoint=Implicit(tol=1e-10), tol=1e-10, max_steps=200,
        )  # fmt: skip
        grads.append(torch.autograd.grad(sol.x.sum(), problem.parameters))
    for mine, other in zip(*grads, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    ("problem", "straight"), [(linear_quadratic(40, 12, 0.95), True), (tanh(), False)],
    ids=["linear", "tanh"],
)  # fmt: skip
def test_a_linear_map_is_known_by_its_two_ends(problem, straight, monkeypatch):
    """From the third difference on, while each still brings a direction that is new."""
    shares, judge = [], SQPState.judge

    def judged(self, residual, sweep):
        shares.append(self.secants.curved[:, 0].clone())
        judge(self, residual, sweep)

    monkeypatch.setattr(SQPState, "judge", judged)
    implicitopt.solve(*problem, solver=SQP(), max_steps=12, tol=0.0)
    assert (shares[8] <= 1e-5).all() if straight else (shares[8] >= 1e-2).all()


def test_rounding_is_not_taken_for_curvature():
    """The first difference after an earlier solution is hardly more than that."""
    problem = LinearQuadratic.draw(8, 4, 3, 0.5, "norm", 6)
    limits = {"solver": SQP(), "tol": 1e-9, "max_steps": 100}
    first = implicitopt.solve(problem.f, problem.loss, *problem.start(), **limits)
    problem.y = problem.y + 1e-4
    cold = implicitopt.solve(problem.f, problem.loss, *problem.start(), **limits)
    warm = implicitopt.solve(
        problem.f, problem.loss, *problem.start(), warm_start=first, **limits
    )  # fmt: skip
    assert warm.converged.all()
    assert warm.steps.max() <= cold.steps.max() + 1


@pytest.mark.parametrize(("n", "norm", "most"), [(2, 100.0, 30), (6, 10.0, 60), (6, 100.0, 80)])
def test_maps_far_from_normal_are_found_to_be_linear(n, norm, most):
    """Where it took 71 sweeps, or did not solve them, with old differences always distrusted."""
    sol = solve(*shear(n, norm), solver=SQP(), max_steps=200)
    assert sol.converged.sum() >= 15
    assert sol.steps.median() <= most


@pytest.mark.parametrize(
    "loss", ["softmax of 5 (z − y)", pytest.param("fourth power", marks=pytest.mark.slow)]
)
def test_a_linear_map_does_not_make_its_loss_quadratic(loss):
    """Steps as long as the map allows threw these out again and again, up to half of them."""
    sol = solve(*sharp(loss, 30, 8), solver=SQP(), max_steps=300)
    assert sol.converged.all()


def test_after_a_restart_the_reach_grows_again():
    """f is NaN beyond |x| = 1, towards which the loss pulls: each try is shorter than the last."""
    sol = solve(
        lambda z, x: 0.5 * z + (1 - x**2).sqrt(),
        lambda z, x: (x - 2).square().sum(-1),
        torch.zeros(1, 1, dtype=F64),
        solver=SQP(),
        max_steps=100,
    )
    assert sol.status.tolist() == [implicitopt.Status.NONFINITE]
    assert sol.value.item() < 1.5  # 1 at the edge; 2.9 with the whole reach at each try


@pytest.mark.parametrize("options", [{"memory": 0}, {"memory": 2.5}, {"reach": 0.0}])
def test_options_are_checked(options):
    with pytest.raises((TypeError, ValueError), match="SQP"):
        SQP(**options)


@pytest.mark.slow
def test_adaptive_takes_it_and_nothing_else():
    with pytest.raises(TypeError, match=r"Adaptive first must be SQP\(...\) or Joint\(...\)"):
        Adaptive(OneShot())
    problem = tanh("gauss", reachable=False, lam=0.01, scale=1.0)
    sweeps = count(problem, Adaptive())
    assert sweeps.count(None) <= 1


@pytest.mark.parametrize("radius", [0.5001, 0.501, 0.55])
def test_a_warm_start_within_a_constraint_that_moved_saves_sweeps(radius):
    """Where states move before adjoints do; it took up to ten times the sweeps, or did not end."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=F64)

    W, U, y = 0.6 * torch.linalg.qr(normal(20, 20)).Q, normal(10, 20) / 3, normal(24, 20)

    def within(radius, **options):
        return solve(
            lambda z, x: torch.tanh(z @ W + x @ U),
            lambda z, x: 0.5 * (z - y).square().sum(-1),
            y.new_zeros(24, 10),
            y.new_zeros(24, 20),
            solver=SQP(), project=L2Ball(radius), max_steps=200, **options,
        )  # fmt: skip

    cold, warm = within(radius), within(radius, warm_start=within(0.5))
    assert warm.converged.all()
    assert warm.steps.sum() < cold.steps.sum()
    torch.testing.assert_close(warm.value, cold.value, rtol=1e-6, atol=1e-6)


def test_what_it_does_not_settle_goes_to_the_joint_iteration():
    """It solves next to none of these, and one-shot descent none."""
    problem = shear(20, 30.0)
    assert solve(*problem, solver=SQP(), max_steps=130).converged.sum() <= 3
    sol = solve(*problem, solver=Adaptive(), max_steps=200)
    assert sol.converged.sum() >= 12


def test_float32_windows_of_more_than_2048_unknowns():
    problem = tanh("gauss", n=1200, d=8, batch=2)
    narrow = [
        (lambda z, x, part=part: part(z.double(), x.double()).float()) for part in problem[:2]
    ]
    start = [block.float() for block in problem[2:]]
    sol = implicitopt.solve(*narrow, *start, solver=SQP(), max_steps=100)
    assert sol.converged.all()
    known = implicitopt.solve(*problem, max_steps=200)
    assert worst((sol.x,), (known.x,)) <= 1e-2
