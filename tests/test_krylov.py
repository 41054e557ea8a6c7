"""minres and gmres against dense linear algebra."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from implicitopt.adjoint.krylov import KrylovResult, gmres, minres

TIGHT = {torch.float64: 1e-10, torch.float32: 1e-4, torch.bfloat16: 0.1}
SOLVERS = pytest.mark.parametrize("solver", [minres, gmres])


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


def rand(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def spectrum(count: int, condition: float) -> torch.Tensor:
    return torch.logspace(0, -torch.tensor(condition).log10().item(), count, dtype=torch.float64)


def indefinite(batch: int, n: int, condition: float) -> torch.Tensor:
    q = torch.linalg.qr(rand(batch, n, n)).Q
    signs = torch.where(torch.rand(batch, n) < 0.5, -1.0, 1.0)
    a = (q * (spectrum(n, condition) * signs)[:, None, :]) @ q.mT
    return (a + a.mT) / 2


def general(batch: int, n: int, condition: float) -> torch.Tensor:
    u, v = (torch.linalg.qr(rand(batch, n, n)).Q for _ in range(2))
    return (u * spectrum(n, condition)) @ v.mT


def times(a: torch.Tensor):
    return lambda v: (a @ v[:, :, None]).squeeze(2)


def true_residual(a: torch.Tensor, b: torch.Tensor, result: KrylovResult) -> torch.Tensor:
    r = b.double() - times(a.double())(result.solution.double())
    return r.norm(dim=1) / b.double().norm(dim=1)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    solver=st.sampled_from([minres, gmres]),
    batch=st.integers(1, 5),
    n=st.integers(1, 40),
    log_condition=st.floats(0, 4),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16]),
    scale=st.sampled_from([1e-15, 1.0, 1e15]),
    seed=st.integers(0, 2**16),
)
def test_agrees_with_a_dense_solve(solver, batch, n, log_condition, dtype, scale, seed):
    torch.manual_seed(seed)
    # Half precision resolves only well-conditioned systems, float32 those up to about 100.
    condition = 10 ** (log_condition * {8: 1.0, 4: 0.5, 2: 0.1}[dtype.itemsize])
    a = (indefinite if solver is minres else general)(batch, n, condition).to(dtype)
    b = (scale * rand(batch, n)).to(dtype)
    result = solver(times(a), b, tol=TIGHT[dtype], max_steps=10 * n + 10)
    assert result.converged.all()
    assert result.solution.dtype == dtype
    assert (result.steps <= 10 * n + 10).all()
    exact = torch.linalg.solve(a.double(), b.double())
    error = (result.solution.double() - exact).norm(dim=1) / exact.norm(dim=1)
    slack = 1.0 if dtype != torch.bfloat16 else 3.0  # x itself is rounded to bfloat16
    assert (error <= slack * 2 * condition * TIGHT[dtype]).all()
    residual = true_residual(a, b, result)
    torch.testing.assert_close(
        result.residual, residual, rtol=0.1, atol=8 * torch.finfo(dtype).eps * condition
    )


@pytest.mark.parametrize("n", [40, 100])
def test_condition_1e4_reaches_1e_10_because_the_lanczos_vectors_are_kept(n):
    a, b = indefinite(6, n, 1e4), rand(6, n)
    kept = minres(times(a), b, tol=1e-10, max_steps=10 * n)
    assert kept.converged.all()
    assert kept.steps.max() <= n + 2
    short = minres(times(a), b, tol=1e-10, max_steps=10 * n, reorthogonalize=0)
    assert short.steps.max() > 2 * n


def test_minres_without_kept_vectors_solves_a_large_system():
    n = 20_000
    diagonal = torch.linspace(0.2, 1.0, n, dtype=torch.float64)
    diagonal[::2] *= -1
    b = rand(3, n)
    result = minres(lambda v: v * diagonal, b, tol=1e-8, max_steps=300)
    assert result.converged.all()
    torch.testing.assert_close(result.solution, b / diagonal, rtol=0, atol=1e-6)


def test_restarted_gmres():
    a, b = torch.eye(60).double() + 0.4 * general(3, 60, 10.0), rand(3, 60)
    result = gmres(times(a), b, tol=1e-10, max_steps=200, restart=5)
    assert result.converged.all()
    assert (result.steps > 5).all()
    assert (true_residual(a, b, result) <= 1e-10).all()


@SOLVERS
def test_every_problem_stops_at_its_own_step(solver):
    # k distinct eigenvalues take k steps; the products are those of the slowest problem.
    n, kinds = 12, [1, 3, 6]
    diagonal = torch.stack([(torch.arange(n) % k) + 1.0 for k in kinds]).double()
    result = solver(lambda v: v * diagonal, rand(3, n), tol=1e-9, max_steps=50, check_every=1)
    assert result.steps.tolist() == kinds
    assert result.products == 6 + 1


@SOLVERS
def test_looking_less_often_changes_the_products_alone(solver):
    a, b = indefinite(3, 20, 10.0), rand(3, 20)
    often = solver(times(a), b, tol=1e-6, max_steps=100, check_every=1)
    seldom = solver(times(a), b, tol=1e-6, max_steps=100, check_every=7)
    assert torch.equal(often.solution, seldom.solution)
    assert torch.equal(often.steps, seldom.steps)
    assert often.products <= seldom.products


class HostReads(TorchDispatchMode):
    """Counts what would make the host wait for a GPU."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


@SOLVERS
def test_the_host_reads_values_every_check_every_steps(solver):
    a, b = indefinite(2, 60, 100.0), rand(2, 60)
    with HostReads() as reads:
        result = solver(times(a), b, tol=1e-12, max_steps=50, check_every=10)
    assert result.products == 50 + 1
    assert reads.count <= 50 // 10 + 3


@SOLVERS
def test_products_are_counted(solver):
    a, b, calls = indefinite(2, 15, 100.0), rand(2, 15), []

    def matvec(v):
        calls.append(None)
        return times(a)(v)

    assert solver(matvec, b, tol=1e-9, max_steps=100, x0=rand(2, 15)).products == len(calls)


@SOLVERS
def test_max_steps_bounds_every_problem(solver):
    a, b = indefinite(4, 50, 1e3), rand(4, 50)
    result = solver(times(a), b, tol=1e-12, max_steps=7)
    assert (result.steps == 7).all()
    assert not result.converged.any()
    assert (result.residual < 1).all()
    torch.testing.assert_close(result.residual, true_residual(a, b, result))


@SOLVERS
def test_minimizes_the_residual_over_the_krylov_space(solver):
    a, b, k = indefinite(3, 25, 50.0), rand(3, 25), 6
    result = solver(times(a), b, tol=1e-12, max_steps=k)
    powers = [b]
    for _ in range(k - 1):
        powers.append(times(a)(powers[-1]))
    space = a @ torch.linalg.qr(torch.stack(powers, dim=2)).Q
    best = b - (space @ torch.linalg.lstsq(space, b[:, :, None]).solution).squeeze(2)
    torch.testing.assert_close(result.residual, best.norm(dim=1) / b.norm(dim=1))


@SOLVERS
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_singular_consistent_system_is_solved(solver, dtype):
    a = indefinite(4, 30, 100.0)
    values, vectors = torch.linalg.eigh(a)
    values[:, 10:14] = 0.0
    a = ((vectors * values[:, None, :]) @ vectors.mT).to(dtype)
    b = times(a)(rand(4, 30).to(dtype))
    assert solver(times(a), b, tol=TIGHT[dtype], max_steps=300).converged.all()


@SOLVERS
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_singular_inconsistent_system_ends_at_least_squares(solver, dtype):
    a = indefinite(4, 30, 100.0)
    values, vectors = torch.linalg.eigh(a)
    values[:, 10:14] = 0.0
    a, b = ((vectors * values[:, None, :]) @ vectors.mT).to(dtype), rand(4, 30).to(dtype)
    result = solver(times(a), b, tol=1e-8, max_steps=300)
    part = (vectors[:, :, 10:14].mT @ b.double()[:, :, None]).squeeze(2)
    best = part.norm(dim=1) / b.double().norm(dim=1)
    assert not result.converged.any()
    torch.testing.assert_close(result.residual, best, rtol=1e-3, atol=1e-3)


def test_gmres_that_cannot_progress_stops():
    # The cyclic shift: no progress before step n (Nachtigal, Reddy & Trefethen 1992).
    n = 20
    b = torch.eye(n, dtype=torch.float64)[:2]
    whole = gmres(lambda v: v.roll(1, dims=1), b, tol=1e-10, max_steps=100)
    assert whole.converged.all()
    cut = gmres(lambda v: v.roll(1, dims=1), b, tol=1e-10, max_steps=100, restart=5)
    assert not cut.converged.any()
    assert cut.products < 100


@SOLVERS
def test_zero_right_hand_sides_and_zero_operators(solver):
    a, b = indefinite(3, 8, 10.0), rand(3, 8)
    b[0], a[1] = 0.0, 0.0
    result = solver(times(a), b, tol=1e-8, max_steps=50, x0=rand(3, 8))
    assert result.converged.tolist() == [True, False, True]
    assert torch.equal(result.solution[0], torch.zeros(8, dtype=torch.float64))
    assert (result.residual[0], result.steps[0]) == (0, 0)
    assert result.solution.isfinite().all()
    assert result.residual[1] == 1


@SOLVERS
def test_no_problem_to_solve(solver):
    assert solver(lambda v: v, torch.zeros(0, 4), tol=1e-8, max_steps=5).solution.shape == (0, 4)
    result = solver(lambda v: v * torch.nan, torch.zeros(2, 4), tol=1e-8, max_steps=5)
    assert result.converged.all()
    assert result.products == 0


@SOLVERS
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("place", ["b", "A", "x0", "late"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_nan_stays_in_its_problem_bit_for_bit(solver, bad, place, dtype):
    a, b, x0 = (t.to(dtype) for t in (indefinite(5, 60, 2.0), rand(5, 60), rand(5, 60)))
    a[2] = indefinite(1, 60, 300.0)[0]  # the slowest: without it the passes are shorter
    kwargs = {"tol": TIGHT[dtype], "max_steps": 200, "x0": x0}
    clean = solver(times(a), b, **kwargs)
    a_bad, b_bad, x0_bad, calls = a.clone(), b.clone(), x0.clone(), []
    if place != "late":
        {"b": b_bad, "A": a_bad, "x0": x0_bad}[place][2].view(-1)[3] = bad

    def matvec(v):
        calls.append(None)
        assert v.isfinite().all()
        product = times(a_bad)(v)
        if place == "late" and len(calls) > 5:
            product[2, 0] = bad
        return product

    result = solver(matvec, b_bad, **{**kwargs, "x0": x0_bad})
    others = [0, 1, 3, 4]
    assert clean.converged[others].all()
    assert clean.steps[2] > clean.steps[others].max()
    for field in ("solution", "residual", "converged", "steps"):
        assert torch.equal(getattr(result, field)[others], getattr(clean, field)[others]), field
    assert result.solution[2].isfinite().all()
    assert bool(result.converged[2]) == (place == "x0")  # a bad start is replaced by 0


@SOLVERS
def test_a_start_helps_and_a_bad_one_is_dropped(solver):
    a, b = indefinite(2, 30, 1e3), rand(2, 30)
    exact = torch.linalg.solve(a, b)
    start = torch.stack([exact[0] * (1 + 1e-13), 1e6 * exact[1]])
    result = solver(times(a), b, tol=1e-8, max_steps=200, x0=start)
    assert result.steps[0] == 0
    assert result.converged.all()
    cold = solver(times(a), b, tol=1e-8, max_steps=200)
    assert torch.equal(result.solution[1], cold.solution[1])


@pytest.mark.parametrize("keep", [0, 400])
def test_a_preconditioner_saves_minres_steps(keep):
    n = 400
    size = spectrum(n, 1e4)
    diagonal = torch.where(torch.arange(n) % 2 == 0, size, -size) * (1 + 0.1 * rand(n).tanh())
    a, b = torch.diag(diagonal) + 1e-6 * torch.ones(n, n).double(), rand(2, n)
    options = {"tol": 1e-8, "max_steps": 300, "reorthogonalize": keep}
    plain = minres(lambda v: v @ a, b, **options)
    better = minres(lambda v: v @ a, b, precondition=lambda r: r / size, **options)
    assert not plain.converged.any()
    assert better.converged.all()
    assert (better.steps < 60).all()
    exact = torch.linalg.solve(a, b.T).T
    torch.testing.assert_close(better.solution, exact, rtol=1e-3, atol=1e-3)


def test_a_preconditioner_saves_gmres_steps():
    a = torch.diag_embed(spectrum(50, 1e4)) + 1e-5 * rand(2, 50, 50)
    b = rand(2, 50)
    options = {"tol": 1e-9, "max_steps": 200, "restart": 10}
    assert not gmres(times(a), b, **options).converged.any()
    better = gmres(times(a), b, precondition=lambda r: r / spectrum(50, 1e4), **options)
    assert better.converged.all()
    assert (true_residual(a, b, better) <= 1e-9).all()


@SOLVERS
def test_a_preconditioner_that_is_not_definite_or_not_finite_does_no_harm(solver):
    a, b = indefinite(3, 10, 10.0), rand(3, 10)
    factor = torch.tensor([[1.0], [0.0], [torch.nan]], dtype=torch.float64)
    result = solver(times(a), b, tol=1e-9, max_steps=50, precondition=lambda r: r * factor)
    assert result.converged.tolist() == [True, False, False]
    assert result.solution.isfinite().all()


@SOLVERS
def test_runs_without_autograd(solver):
    a = indefinite(2, 5, 10.0).requires_grad_()
    assert not solver(times(a), rand(2, 5), tol=1e-8, max_steps=20).solution.requires_grad


@SOLVERS
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"b": torch.ones(3)}, r"shape \(B, n\).*got torch.float32 of shape \(3,\)"),
        ({"b": torch.ones(3, 2, dtype=torch.int64)}, "floating-point"),
        ({"x0": torch.ones(2, 3)}, r"shape of b, \(3, 2\); got \(2, 3\)"),
        ({"tol": -1.0}, "tol=-1.0"),
        ({"tol": float("nan")}, "tol=nan"),
        ({"max_steps": 0}, "max_steps=0"),
        ({"check_every": 0}, "check_every=0"),
    ],
)
def test_what_does_not_fit_is_refused(solver, change, message):
    kwargs = {"b": torch.ones(3, 2), "tol": 1e-3, "max_steps": 5, **change}
    with pytest.raises(ValueError, match=message):
        solver(lambda v: v, kwargs.pop("b"), **kwargs)


def test_options_of_one_solver_are_checked():
    with pytest.raises(ValueError, match="restart must be >= 1; got 0"):
        gmres(lambda v: v, torch.ones(1, 2), tol=1e-3, max_steps=5, restart=0)
    with pytest.raises(ValueError, match="reorthogonalize must be >= 0; got -1"):
        minres(lambda v: v, torch.ones(1, 2), tol=1e-3, max_steps=5, reorthogonalize=-1)
