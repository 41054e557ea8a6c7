"""The projections against their definition: the nearest point of C."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize
from torch.autograd import gradcheck, gradgradcheck
from torch.utils._python_dispatch import TorchDispatchMode

from implicitopt.projections import Box, L2Ball, LinfBall, Simplex

NAMES = ["L2Ball", "LinfBall", "Box", "Simplex"]
CASES = pytest.mark.parametrize("name", NAMES)


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


def rand(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def build(name: str, batch: int, n: int):
    """A projection with tensor parameters that differ between problems."""
    if name == "L2Ball":
        return L2Ball(torch.rand(batch).double() + 0.5, center=rand(n))
    if name == "LinfBall":
        return LinfBall(torch.rand(batch).double() + 0.2, center=rand(batch, n))
    if name == "Box":
        lower = rand(batch, n) - 0.5
        return Box(lower, lower + torch.rand(n).double())
    return Simplex(torch.rand(batch).double() + 0.5)


def members(name: str, project, batch: int, n: int, count: int = 50) -> torch.Tensor:
    """Random points of C, drawn without the projection: (count, batch, n)."""
    unit = torch.rand(count, batch, n).double()
    if name == "L2Ball":
        direction = rand(count, batch, n)
        direction = direction / direction.norm(dim=2, keepdim=True) * unit[:, :, :1].sqrt()
        return project.center + project.radius[:, None] * direction
    if name == "LinfBall":
        return project.center + project.radius[:, None] * (2 * unit - 1)
    if name == "Box":
        return project.lower + (project.upper - project.lower) * unit
    weights = -(unit.log() ** 3)  # some near the corners
    return project.total[:, None] * weights / weights.sum(dim=2, keepdim=True)


def distance_to_c(name: str, project, p: torch.Tensor) -> torch.Tensor:
    if name == "L2Ball":
        return (p - project.center).norm(dim=1) - project.radius
    if name == "LinfBall":
        return (p - project.center).abs().amax(dim=1) - project.radius
    if name == "Box":
        return torch.maximum(project.lower - p, p - project.upper).amax(dim=1)
    return torch.maximum((-p).amax(dim=1), (p.sum(dim=1) - project.total).abs())


@settings(max_examples=80, deadline=None, derandomize=True)
@given(
    name=st.sampled_from(NAMES),
    batch=st.integers(1, 4),
    n=st.integers(1, 12),
    scale=st.sampled_from([0.0, 0.1, 1.0, 10.0, 1e6]),
    seed=st.integers(0, 2**16),
)
def test_is_the_euclidean_projection(name, batch, n, scale, seed):
    torch.manual_seed(seed)
    project, x, y = build(name, batch, n), scale * rand(batch, n), scale * rand(batch, n)
    p, slack = project(x), 1e-12 * (1 + scale) * n
    assert (distance_to_c(name, project, p) <= slack).all()
    # The variational inequality: p = P(x) if and only if (x − p)·(c − p) ≤ 0 for every c in C.
    angle = ((x - p) * (members(name, project, batch, n) - p)).sum(dim=2)
    assert (angle <= slack * (1 + scale)).all()
    torch.testing.assert_close(project(p), p, rtol=0, atol=slack)
    shrunk = (p - project(y)).norm(dim=1) - (x - y).norm(dim=1)
    assert (shrunk <= slack).all()


@CASES
def test_agrees_with_a_numerical_minimization(name):
    n = 4
    project, x = build(name, 1, n), 2 * rand(1, n)
    constraints, bounds = [], None
    if name == "L2Ball":
        center, radius = project.center.numpy(), project.radius.item()
        constraints = [{"type": "ineq", "fun": lambda c: radius**2 - np.sum((c - center) ** 2)}]
    elif name == "Simplex":
        bounds, total = [(0, None)] * n, project.total.item()
        constraints = [{"type": "eq", "fun": lambda c: np.sum(c) - total}]
    elif name == "LinfBall":
        radius = project.radius.item()
        bounds = [(c - radius, c + radius) for c in project.center[0].tolist()]
    else:
        bounds = list(zip(project.lower[0].tolist(), project.upper[0].tolist(), strict=True))
    start = members(name, project, 1, n)[0, 0].numpy()
    options = {"ftol": 1e-10, "maxiter": 500}
    nearest = minimize(
        lambda c: np.sum((c - x[0].numpy()) ** 2),
        start,
        jac=lambda c: 2 * (c - x[0].numpy()),
        method="SLSQP",
        bounds=bounds,
        constraints=constraints,
        options=options,
    )
    assert nearest.success
    torch.testing.assert_close(project(x)[0], torch.tensor(nearest.x), rtol=0, atol=1e-5)


def parameters(name: str, project) -> list[torch.Tensor]:
    fields = {"L2Ball": ["radius", "center"], "LinfBall": ["radius", "center"]}
    fields |= {"Box": ["lower", "upper"], "Simplex": ["total"]}
    return [getattr(project, field) for field in fields[name]]


@CASES
@pytest.mark.parametrize("scale", [0.3, 3.0])
def test_derivatives_in_x_and_in_every_bound(name, scale):
    kind = {"L2Ball": L2Ball, "LinfBall": LinfBall, "Box": Box, "Simplex": Simplex}[name]
    bounds = [b.requires_grad_() for b in parameters(name, build(name, 3, 5))]
    x = (scale * rand(3, 5)).requires_grad_()

    def apply(x, *bounds):
        return kind(*bounds)(x)

    assert gradcheck(apply, (x, *bounds), check_forward_ad=True)
    assert gradgradcheck(apply, (x, *bounds))


@CASES
def test_the_derivatives_of_torch_func_are_those_of_autograd(name):
    project, x, v = build(name, 3, 5), rand(3, 5), rand(3, 5)
    jacobian = torch.autograd.functional.jacobian(project, x).reshape(15, 15)
    _, pull = torch.func.vjp(project, x)
    torch.testing.assert_close(pull(v)[0].ravel(), jacobian.T @ v.ravel())
    _, push = torch.func.jvp(project, (x,), (v,))
    torch.testing.assert_close(push.ravel(), jacobian @ v.ravel())
    _, again = torch.func.vjp(lambda x: torch.func.vjp(project, x)[1](v)[0].square().sum(), x)
    assert again(torch.tensor(1.0).double())[0].isfinite().all()


@pytest.mark.parametrize("project", [L2Ball(0.0), L2Ball(1.0, 0.0), LinfBall(1.0), Box(0.0, 0.0)])
def test_no_nan_gradient_at_the_center(project):
    x = torch.zeros(2, 3, dtype=torch.float64, requires_grad=True)
    (first,) = torch.autograd.grad(
        project(x).square().sum() + project(x).sum(), x, create_graph=True
    )
    assert first.isfinite().all()
    (second,) = torch.autograd.grad(first.sum(), x)
    assert second.isfinite().all()


@pytest.mark.parametrize("project", [L2Ball(1.0), LinfBall(1.0), Box(0.0, 1.0)])
def test_the_derivative_on_the_boundary_is_that_of_the_inside(project):
    x = torch.tensor([[1.0, 0.0], [0.0, 1.0]], requires_grad=True)
    project(x).sum().backward()
    assert torch.equal(x.grad, torch.ones(2, 2))


@CASES
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_nan_stays_in_its_problem_bit_for_bit(name, bad):
    project, x = build(name, 4, 5), 3 * rand(4, 5)
    shared = {
        "L2Ball": lambda t: L2Ball(t, t),
        "LinfBall": lambda t: LinfBall(t, t),
        "Box": lambda t: Box(-t, t),
        "Simplex": Simplex,
    }[name]
    others, poisoned = [0, 1, 3], x.clone()
    poisoned[2, 1] = bad
    weights = rand(4, 5)
    weights[2] = 0.0

    def values_and_gradients(x):
        x, t = (
            x.clone().requires_grad_(),
            torch.tensor(0.7, dtype=torch.float64, requires_grad=True),
        )
        p = project(x)
        grad_x = torch.autograd.grad((weights * p)[others].sum(), x)[0]
        grad_t = torch.autograd.grad(shared(t)(x)[others].mul(weights[others]).sum(), t)[0]
        return p[others], grad_x[others], grad_t

    for have, want in zip(values_and_gradients(poisoned), values_and_gradients(x), strict=True):
        assert torch.equal(have, want)
    if bad != bad:
        assert project(poisoned)[2].isnan().any()


@CASES
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_keeps_the_dtype(name, dtype):
    project, x = build(name, 3, 40), 3 * rand(3, 40).to(dtype)
    p = project(x)
    assert p.dtype == dtype
    torch.testing.assert_close(
        p.double(), project(x.double()), rtol=2 * torch.finfo(dtype).eps, atol=1e-6
    )


class NoHostReads(TorchDispatchMode):
    """Fails on what would make the host wait for a GPU."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func is not torch.ops.aten._local_scalar_dense.default
        assert func is not torch.ops.aten.nonzero.default
        return func(*args, **(kwargs or {}))


@CASES
def test_a_call_does_not_read_values_on_the_host(name):
    project, x = build(name, 3, 5), rand(3, 5).requires_grad_()
    with NoHostReads():
        project(x).sum().backward()
    assert x.grad is not None


def test_norms_neither_overflow_nor_underflow():
    x = torch.tensor([[3e30, 4e30], [3e-30, 4e-30]])
    p = L2Ball(torch.tensor([1.0, 1e-30]))(x)
    torch.testing.assert_close(p, torch.tensor([[0.6, 0.8], [0.6e-30, 0.8e-30]]), atol=0, rtol=1e-5)
    # Sums over entries far from 0 keep the digits of their differences.
    torch.testing.assert_close(
        Simplex()(torch.tensor([[1e6, 1e6 + 0.5]])), torch.tensor([[0.25, 0.75]])
    )


@CASES
def test_a_problem_is_all_leaves_together(name):
    x = {"a": rand(3, 2, 2), "b": (rand(3), rand(3, 4))}
    flat = torch.cat([x["a"].flatten(1), x["b"][0][:, None], x["b"][1]], dim=1)
    project = {
        "L2Ball": L2Ball(torch.tensor([0.5, 1.0, 9.0]), 0.3),
        "LinfBall": LinfBall(torch.tensor([0.5, 1.0, 9.0]), 0.3),
        "Box": Box(-0.5, 0.7),
        "Simplex": Simplex(torch.tensor([0.5, 1.0, 9.0])),
    }[name]
    p, want = project(x), project(flat)
    have = torch.cat([p["a"].flatten(1), p["b"][0][:, None], p["b"][1]], dim=1)
    torch.testing.assert_close(have, want)
    assert [leaf.shape for leaf in (p["a"], *p["b"])] == [(3, 2, 2), (3,), (3, 4)]


def test_bounds_that_match_a_pytree():
    x = {"a": rand(3, 2), "b": rand(3).float()}
    box = Box({"a": torch.tensor([0.0, -1.0]), "b": -0.1}, {"a": torch.zeros(3, 1) + 2.0, "b": 0.1})
    p = box(x)
    want = torch.tensor([0.0, -1.0]).double().maximum(x["a"]).clamp(max=2.0)
    torch.testing.assert_close(p["a"], want)
    torch.testing.assert_close(p["b"], x["b"].clamp(-0.1, 0.1))
    assert p["b"].dtype == torch.float32
    # A number is taken in the precision of x: 0.1 is not float32's 0.1.
    assert (Box(0.1, {"a": 0.1, "b": 0.1})(x)["a"] == 0.1).all()
    center = {"a": torch.ones(2), "b": torch.zeros(3)}
    ball = L2Ball(0.5, center)(x)
    gap = torch.cat([ball["a"] - 1.0, ball["b"][:, None]], dim=1).norm(dim=1)
    assert (gap <= 0.5 + 1e-6).all()


@CASES
def test_one_problem_without_a_batch(name):
    project, x = build(name, 1, 6), 3 * rand(6)
    assert torch.equal(project(x, batched=False), project(x[None])[0])
    tree = {"a": x[:2], "b": x[2:].reshape(2, 2), "c": torch.tensor(0.1).double()}
    flat = torch.cat([leaf.ravel() for leaf in tree.values()])
    plain = {
        "L2Ball": L2Ball(1.0),
        "LinfBall": LinfBall(1.0),
        "Box": Box(0, 1),
        "Simplex": Simplex(),
    }
    p = plain[name](tree, batched=False)
    want = plain[name](flat[None])[0]
    torch.testing.assert_close(torch.cat([leaf.ravel() for leaf in p.values()]), want)
    assert p["c"].shape == ()


@CASES
def test_an_empty_batch(name):
    plain = {
        "L2Ball": L2Ball(1.0),
        "LinfBall": LinfBall(1.0),
        "Box": Box(0, 1),
        "Simplex": Simplex(),
    }
    assert plain[name](torch.zeros(0, 3)).shape == (0, 3)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: L2Ball(-1.0), ValueError, "radius must be finite and >= 0; got -1.0"),
        (lambda: LinfBall(float("inf")), ValueError, "radius must be finite"),
        (lambda: L2Ball(torch.tensor([1.0, torch.nan])), ValueError, "radius must be finite"),
        (lambda: L2Ball(torch.ones(2, 1)), ValueError, r"shape \(\) or \(B,\).*got \(2, 1\)"),
        (lambda: L2Ball("1"), TypeError, "radius must be a number or a tensor; got '1'"),
        (lambda: L2Ball(True), TypeError, "radius must be given as numbers"),
        (lambda: L2Ball(1.0, "origin"), TypeError, "center must be given as numbers"),
        (lambda: Simplex(0.0), ValueError, "total must be finite and > 0; got 0.0"),
        (lambda: Box(1.0, 0.0), ValueError, "lower must be <= upper"),
        (lambda: Box(torch.tensor([0.0, torch.nan]), 1.0), ValueError, "lower must be <= upper"),
        (lambda: Box({"a": 0.0, "b": 2.0}, 1.0), ValueError, "lower must be <= upper"),
        (lambda: Box([0.0, 0.0], [1.0, 1.0, 1.0]), ValueError, "must fit one x"),
        (lambda: Box(torch.zeros(2), torch.ones(3)), ValueError, "must fit one x"),
        (lambda: Box(None, 1.0), TypeError, "lower must be given as numbers"),
    ],
)
def test_what_is_no_set_is_refused(make, error, message):
    with pytest.raises(error, match=message):
        make()


@pytest.mark.parametrize(
    ("project", "x", "error", "message"),
    [
        (Simplex(), torch.ones(2, 3, dtype=torch.int64), TypeError, "got a torch.int64 tensor"),
        (Simplex(), [1.0, 2.0], TypeError, "floating-point tensors; got 1.0"),
        (Simplex(), torch.tensor(1.0), ValueError, "batched=False"),
        (Simplex(), [torch.ones(2), torch.ones(3)], ValueError, r"shapes \[\(2,\), \(3,\)\]"),
        (Simplex(), [torch.ones(2), torch.tensor(1.0)], ValueError, "batched=False"),
        (Simplex(torch.ones(2)), torch.ones(3, 4), ValueError, r"\(\) or \(3,\).*got \(2,\)"),
        (Box(torch.zeros(2), 1.0), torch.ones(3, 4), ValueError, "lower must broadcast"),
        (Box(0.0, torch.ones(1, 3, 4)), torch.ones(3, 4), ValueError, "upper must broadcast"),
        (L2Ball(1.0, [0.0]), {"a": torch.ones(3, 4)}, ValueError, "structure of x"),
    ],
)
def test_an_x_that_does_not_fit_is_refused(project, x, error, message):
    with pytest.raises(error, match=message):
        project(x)
