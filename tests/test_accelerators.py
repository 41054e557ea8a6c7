"""Accelerators against dense linear algebra, the secant method, GMRES and a plain reference."""

from __future__ import annotations

import math
from functools import partial
from itertools import pairwise

import pytest
import torch
from families import F64, contraction
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import implicitopt
from implicitopt import Anderson, Broyden, Joint, Nested, Picard

ACCELERATORS = [
    Picard(),
    Picard(damping=0.7),
    Anderson("I"),
    Anderson("I", memory=5),
    Anderson("I", memory=3, ridge=1e-8),
    Anderson("I", memory=10, damping=0.6),
    Anderson("II"),
    Anderson("II", memory=1),
    Anderson("II", memory=5, ridge=1e-6),
    Anderson("II", memory=8, damping=0.5),
    Broyden("good"),
    Broyden("good", memory=8, damping=0.8),
    Broyden("bad"),
    Broyden("bad", memory=8),
]
HISTORIES = [a for a in ACCELERATORS if not isinstance(a, Picard)]


def normal(seed: int, *shape: int, dtype: torch.dtype = F64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, dtype=F64, generator=generator).to(dtype)


def linear_map(seed: int, n: int, batch: int, rho: float):
    """v ↦ Av + b with ‖A‖₂ = rho, and its fixed points from dense linear algebra."""
    A = contraction(n, rho, "norm", torch.Generator().manual_seed(seed))
    b = normal(seed + 1, batch, n)
    solution = torch.linalg.solve(torch.eye(n, dtype=F64) - A, b.T).T
    return A, b, solution


def iterate(accelerator, F, v: Tensor, steps: int) -> list[Tensor]:
    """v and the iterates that follow it."""
    state, seen = accelerator.init(v), [v]
    for _ in range(steps):
        v, state = accelerator.step(state, v, F(v))
        seen.append(v)
    return seen


# Fixed points


@pytest.mark.parametrize("accelerator", ACCELERATORS, ids=str)
@settings(max_examples=8, deadline=None, derandomize=True)
@given(seed=st.integers(0, 2**31), n=st.integers(1, 20), rho=st.floats(0, 0.85))
def test_linear_fixed_points_agree_with_dense_algebra(accelerator, seed, n, rho):
    A, b, solution = linear_map(seed, n, 3, rho)
    with torch.no_grad():
        z = implicitopt.fixed_point(
            lambda z, x: z @ A.T + x, b, accelerator=accelerator, max_steps=300, tol=1e-10
        )
    # ‖v − v*‖ ≤ ‖F(v) − v‖ / (1 − rho)
    bound = 1e-10 * (1 + solution.norm(dim=1)) / (1 - rho) * 2
    assert ((z - solution).norm(dim=1) <= bound).all()


@pytest.mark.parametrize("accelerator", ACCELERATORS, ids=str)
@settings(max_examples=6, deadline=None, derandomize=True)
@given(seed=st.integers(0, 2**31), n=st.integers(1, 16))
def test_tanh_fixed_points_agree_with_a_long_picard_iteration(accelerator, seed, n):
    A, b, _ = linear_map(seed, n, 3, 0.8)
    known = torch.zeros(3, n, dtype=F64)
    for _ in range(200):
        known = torch.tanh(known @ A.T + b)
    with torch.no_grad():
        z = implicitopt.fixed_point(
            lambda z, x: torch.tanh(z @ A.T + x), b, accelerator=accelerator, max_steps=300,
            tol=1e-10,
        )  # fmt: skip
    assert (z - known).norm(dim=1).max() <= 1e-8


# What theory says of the iterates


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("n", [2, 6, 12])
def test_type_2_with_full_memory_ends_a_linear_problem_in_n_plus_1_steps_as_gmres_does(n, seed):
    A, b, solution = linear_map(seed, n, 4, 0.9)
    accelerator = Anderson("II", memory=n + 1, ridge=0.0)
    v = iterate(accelerator, lambda v: v @ A.T + b, torch.zeros(4, n, dtype=F64), n + 1)[-1]
    assert (v - solution).abs().max() <= 1e-8 * (1 + solution.abs().max())


def test_type_2_residuals_are_those_of_gmres_at_every_step():
    # Walker and Ni 2011: with G(v) = Av + b, v_{k+1} = A x_k + b, x_k the GMRES iterate from v_0.
    n = 10
    A, b, _ = linear_map(3, n, 1, 0.9)
    M, rhs = torch.eye(n, dtype=F64) - A, b[0]
    accelerator = Anderson("II", memory=n, ridge=0.0)
    iterates = iterate(accelerator, lambda v: v @ A.T + b, torch.zeros(1, n, dtype=F64), n - 1)
    basis = [rhs]
    for k in range(1, n - 1):
        K = torch.linalg.qr(torch.stack(basis, dim=1)).Q
        x = K @ torch.linalg.lstsq(M @ K, rhs[:, None]).solution[:, 0]
        assert (iterates[k + 1][0] - (A @ x + rhs)).norm() <= 1e-8 * (1 + rhs.norm())
        basis.append(M @ basis[-1])


@pytest.mark.parametrize("accelerator", [
    Anderson("I", memory=1, ridge=0.0), Anderson("II", memory=1, ridge=0.0), Broyden("good"),
    Broyden("bad"),
], ids=str)  # fmt: skip
@pytest.mark.parametrize("start", [-1.0, 0.2, 1.5])
def test_in_one_dimension_every_type_is_the_secant_method(accelerator, start):
    def F(v):
        return 0.8 * torch.cos(v) + 0.1

    seen = iterate(accelerator, F, torch.tensor([[start]], dtype=F64), 5)
    before, now = start, 0.8 * math.cos(start) + 0.1
    known = [before, now]
    for _ in range(4):
        r, r_before = (0.8 * math.cos(v) + 0.1 - v for v in (now, before))
        before, now = now, now - r * (now - before) / (r - r_before)
        known.append(now)
    assert [v.item() for v in seen] == pytest.approx(known, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize(("accelerator", "pick"), [
    (Anderson("I", memory=4, ridge=0.0), "S"), (Anderson("II", memory=4, ridge=0.0), "Y"),
    (Broyden("good"), None), (Broyden("bad"), None),
], ids=str)  # fmt: skip
def test_the_step_is_the_multisecant_quasi_newton_step(accelerator, pick):
    """v⁺ = v − J⁻¹ r: the least change to J = −I (I), or to J⁻¹ = −I (II), with J S = Y.

    For Broyden the change is rank one, and J s = y holds for the newest difference.
    """
    n, steps = 7, 4
    A, b, _ = linear_map(5, n, 1, 0.9)
    seen = iterate(accelerator, lambda v: v @ A.T + b, torch.zeros(1, n, dtype=F64), steps + 1)
    vs = torch.cat(seen)
    rs = vs @ A.T + b - vs
    S, Y = vs[: steps + 1].diff(dim=0).T, rs[: steps + 1].diff(dim=0).T
    eye = torch.eye(n, dtype=F64)
    if pick == "S":  # good Broyden's condition: J = −I + (Y + S)(SᵀS)⁻¹Sᵀ
        inverse = torch.linalg.inv(-eye + (Y + S) @ torch.linalg.pinv(S))
    elif pick == "Y":  # bad Broyden's: J⁻¹ = −I + (S + Y)(YᵀY)⁻¹Yᵀ
        inverse = -eye + (S + Y) @ torch.linalg.pinv(Y)
    elif accelerator.kind == "good":
        J = -eye
        for s, y in zip(S.T, Y.T, strict=True):
            J = J + torch.outer(y - J @ s, s) / (s @ s)
        assert torch.allclose(J @ S[:, -1], Y[:, -1])
        inverse = torch.linalg.inv(J)
    else:
        inverse = -eye
        for s, y in zip(S.T, Y.T, strict=True):
            inverse = inverse + torch.outer(s - inverse @ y, y) / (y @ y)
    expected = vs[steps] - inverse @ rs[steps]
    assert torch.allclose(vs[steps + 1], expected, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("kind", ["I", "II"])
@pytest.mark.parametrize("damping", [1.0, 0.6])
def test_a_ring_buffer_that_wraps_agrees_with_lists(kind, damping):
    """30 steps at memory 3, the reference from lists with torch.linalg.lstsq and solve."""
    n, memory = 12, 3
    A, b, _ = linear_map(11, n, 2, 0.9)
    # Near-symmetric, so that type I is well posed and nothing is left out.
    A = 0.5 * (A + A.T) + 0.1 * (A - A.T)

    def F(v):
        return v @ A.T + b

    accelerator = Anderson(kind, memory=memory, ridge=0.0, damping=damping)
    v = torch.zeros(2, n, dtype=F64)
    state = accelerator.init(v)
    lists: list[tuple[Tensor, Tensor]] = []
    for step in range(30):
        lists.append((v, F(v) - v))
        r = lists[-1][1]
        recent = lists[-memory - 1 :]
        expected = v + damping * r
        if len(recent) > 1:
            S = torch.stack([b[0] - a[0] for a, b in pairwise(recent)], dim=2)
            Y = torch.stack([b[1] - a[1] for a, b in pairwise(recent)], dim=2)
            if kind == "II":
                c = torch.linalg.lstsq(Y, r[..., None]).solution
            else:
                c = torch.linalg.solve(S.mT @ Y, S.mT @ r[..., None])
            expected = expected - ((S + damping * Y) @ c)[..., 0]
        v, state = accelerator.step(state, v, F(v))
        error = (v - expected).norm() / r.norm()
        assert error <= 1e-5, f"step {step}"


@pytest.mark.parametrize("accelerator", [
    Picard(0.3), Anderson("I", damping=0.3), Anderson("II", damping=0.3), Broyden(damping=0.3),
], ids=str)  # fmt: skip
def test_the_first_step_goes_the_damped_part_of_the_way(accelerator):
    v, Fv = normal(0, 3, 5), normal(1, 3, 5)
    moved, _ = accelerator.step(accelerator.init(v), v, Fv)
    assert torch.allclose(moved, 0.7 * v + 0.3 * Fv, rtol=1e-14)


# Rows do not see each other


@pytest.mark.parametrize("accelerator", HISTORIES, ids=str)
def test_restart_forgets_the_masked_rows_only(accelerator):
    A, b, _ = linear_map(7, 9, 4, 0.9)

    def F(v):
        return v @ A.T + b

    start, mask = torch.zeros(4, 9, dtype=F64), torch.tensor([False, True, False, True])

    def run(*, restarted: bool) -> list[Tensor]:
        v, state = start, accelerator.init(start)
        seen = []
        for step in range(12):
            v, state = accelerator.step(state, v, F(v))
            if restarted and step == 5:
                state = accelerator.restart(state, mask)
            seen.append(v)
        return seen

    plain, restarted = run(restarted=False), run(restarted=True)
    for step in range(12):
        assert torch.equal(plain[step][~mask], restarted[step][~mask])
    # The next step of a restarted row is the plain one, and those after know nothing older.
    beta = accelerator.damping
    expected = restarted[5] + beta * (F(restarted[5]) - restarted[5])
    assert torch.allclose(restarted[6][mask], expected[mask], rtol=1e-13, atol=1e-13)
    # From there on they are what a run that begins there gives.
    fresh = iterate(accelerator, F, restarted[5], 3)
    for step in range(4):
        known = fresh[step][mask]
        assert torch.allclose(restarted[5 + step][mask], known, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("accelerator", ACCELERATORS, ids=str)
def test_a_non_finite_row_leaves_the_others_bit_for_bit(accelerator, bad):
    A, b, _ = linear_map(13, 8, 4, 0.9)

    def run(*, broken: bool) -> Tensor:
        v = torch.zeros(4, 8, dtype=F64)
        state, seen = accelerator.init(v), []
        for step in range(15):
            Fv = v @ A.T + b
            if broken and step >= 4:
                Fv[2] = bad
            v, state = accelerator.step(state, v, Fv)
            seen.append(v)
        return torch.stack(seen)

    others = torch.tensor([0, 1, 3])
    assert torch.equal(run(broken=False)[:, others], run(broken=True)[:, others])


@pytest.mark.parametrize("accelerator", HISTORIES, ids=str)
def test_a_row_recovers_after_one_non_finite_image(accelerator):
    A, b, solution = linear_map(17, 6, 2, 0.8)
    v = torch.zeros(2, 6, dtype=F64)
    state = accelerator.init(v)
    for step in range(150):
        Fv = v @ A.T + b
        if step == 4:
            Fv[0] = float("nan")
        moved, state = accelerator.step(state, v, Fv)
        if step == 4:  # as the loop of every solver does
            state = accelerator.restart(state, torch.tensor([True, False]))
            moved = torch.where(torch.isfinite(moved), moved, v)
        v = moved
    assert (v - solution).abs().max() <= 1e-6


@pytest.mark.parametrize("accelerator", ACCELERATORS, ids=str)
def test_staying_at_the_solution_is_harmless(accelerator):
    A, b, solution = linear_map(19, 6, 2, 0.8)
    seen = iterate(accelerator, lambda v: v @ A.T + b, solution, 10)
    assert (torch.stack(seen) - solution).abs().max() <= 1e-12


# Accelerators of one's own


class HeavyBall:
    """v⁺ = F(v) + β (v − v_before)."""

    def init(self, v: Tensor) -> Tensor:
        return v

    def step(self, state: Tensor, v: Tensor, Fv: Tensor) -> tuple[Tensor, Tensor]:
        return Fv + 0.2 * (v - state), v


class Aitken:
    """Relaxation by Irons and Tuck: ω⁺ = −ω ⟨r_before, dr⟩ / ⟨dr, dr⟩, per problem."""

    def init(self, v: Tensor) -> tuple[Tensor, Tensor | None]:
        return torch.full_like(v[:, :1], 0.5), None

    def step(self, state, v: Tensor, Fv: Tensor):
        omega, before = state
        r = Fv - v
        if before is not None:
            dr = r - before
            square = (dr * dr).sum(1, keepdim=True)
            fitted = -omega * (before * dr).sum(1, keepdim=True) / square.clamp_min(1e-30)
            omega = fitted.clamp(0.1, 1.0)
        return v + omega * r, (omega, r)


@pytest.mark.parametrize("accelerator", [HeavyBall(), Aitken()], ids=["heavy ball", "Aitken"])
def test_a_users_accelerator_works_wherever_one_is_taken(accelerator):
    A, b, solution = linear_map(23, 5, 3, 0.6)
    with torch.no_grad():
        z = implicitopt.fixed_point(
            lambda z, x: z @ A.T + x, b, accelerator=accelerator, max_steps=200, tol=1e-9
        )
    assert (z - solution).abs().max() <= 1e-7

    # ℓ = ½‖z − y‖² + ½‖x‖² with z = Gx: x = (GᵀG + I)⁻¹ Gᵀ y.
    G, y = torch.linalg.inv(torch.eye(5, dtype=F64) - A), normal(24, 3, 5)
    known = torch.linalg.solve(G.T @ G + torch.eye(5, dtype=F64), G.T @ y.T).T

    def loss(z, x):
        return 0.5 * ((z - y) ** 2).sum(-1) + 0.5 * (x**2).sum(-1)

    joint = Joint(accelerator, implicitopt.StepSizes(x=0.1))
    adam = partial(torch.optim.Adam, lr=0.1)
    nested = Nested(adam, accelerator=accelerator, inner_steps=40, inner_tol=1e-4)
    for solver, tol in ((joint, 1e-6), (nested, 1e-2)):
        sol = implicitopt.solve(
            lambda z, x: z @ A.T + x, loss, torch.zeros(3, 5, dtype=F64), solver=solver,
            max_steps=400, tol=tol,
        )  # fmt: skip
        assert sol.converged.all(), (solver, sol)
        assert (sol.x - known).abs().max() <= 10 * tol


# Options and dtypes


@pytest.mark.parametrize(("make", "error", "said"), [
    (lambda: Picard(damping=0), ValueError, "Picard damping"),
    (lambda: Picard(damping=2.0), ValueError, "Picard damping"),
    (lambda: Anderson("III"), ValueError, "Anderson kind"),
    (lambda: Anderson(memory=0), ValueError, "Anderson memory"),
    (lambda: Anderson(memory=2.5), TypeError, "Anderson memory"),
    (lambda: Anderson(memory=True), TypeError, "Anderson memory"),
    (lambda: Anderson(ridge=-1e-9), ValueError, "Anderson ridge"),
    (lambda: Anderson(ridge=1.0), ValueError, "Anderson ridge"),
    (lambda: Anderson(ridge=float("nan")), ValueError, "Anderson ridge"),
    (lambda: Anderson(damping=0), ValueError, "Anderson damping"),
    (lambda: Anderson(damping=1.5), ValueError, "Anderson damping"),
    (lambda: Broyden("ugly"), ValueError, "Broyden kind"),
    (lambda: Broyden(memory=0), ValueError, "Broyden memory"),
    (lambda: Broyden(memory="5"), TypeError, "Broyden memory"),
    (lambda: Broyden(damping=float("nan")), ValueError, "Broyden damping"),
    (lambda: Joint(Anderson), TypeError, "init"),
    (lambda: Joint(lambda v: v), TypeError, "init"),
    (lambda: Nested(accelerator=Picard), TypeError, "init"),
])  # fmt: skip
def test_options_are_checked_and_named(make, error, said):
    with pytest.raises(error, match=said):
        make()


@pytest.mark.parametrize("make", [Picard, Anderson, Broyden])
def test_an_unknown_option_is_an_error(make):
    with pytest.raises(TypeError, match="beta"):
        make(beta=0.5)


@pytest.mark.parametrize(("dtype", "tol"), [(torch.float32, 1e-4), (torch.bfloat16, 1e-1)])
@pytest.mark.parametrize("accelerator", ACCELERATORS, ids=str)
def test_low_precision_keeps_its_dtype_and_converges(accelerator, dtype, tol):
    A, b, solution = linear_map(29, 8, 3, 0.5)
    A, b = A.to(dtype), b.to(dtype)
    seen = iterate(accelerator, lambda v: v @ A.T + b, torch.zeros(3, 8, dtype=dtype), 40)
    assert seen[-1].dtype == dtype
    lowest = min((v.to(F64) - solution).norm(dim=1).max() for v in seen)
    assert lowest <= tol * (1 + solution.norm())


def test_a_subclass_of_anderson_may_have_a_step_of_its_own():
    """It is given to no shortcut around that."""
    calls = []

    class Counted(Anderson):
        def step(self, state, v, Fv):
            calls.append(1)
            return super().step(state, v, Fv)

    x = torch.ones(2, 3)
    implicitopt.fixed_point(lambda z, x: 0.5 * z.cos() + x, x, accelerator=Counted("II"))
    assert calls
    calls.clear()
    implicitopt.solve(
        lambda z, x: 0.5 * z.cos() + x, lambda z, x: (z - 1).square().sum(-1), x,
        solver=Joint(Counted()), max_steps=9, tol=0.0,
    )  # fmt: skip
    assert len(calls) == 6  # of 9 sweeps the last moves nothing, and two steps are plain


@pytest.mark.parametrize("seed", range(5))
def test_a_vector_is_one_problem(seed):
    """Taken for sixteen problems of one number, these ended far from any fixed point, unnoticed."""
    generator = torch.Generator().manual_seed(seed)
    W = 0.5 * torch.linalg.qr(torch.randn(16, 16, generator=generator, dtype=torch.float64)).Q
    x = torch.randn(16, generator=generator, dtype=torch.float64)

    def f(z, x):
        return torch.tanh(z @ W + x)

    z = implicitopt.fixed_point(f, x)
    assert (f(z, x) - z).norm() <= 1e-6 * (1 + z.norm())
    number = implicitopt.fixed_point(lambda z, x: 0.5 * z + x.sum(), x, x.new_zeros(()))
    torch.testing.assert_close(number, 2 * x.sum(), rtol=1e-5, atol=1e-5)
