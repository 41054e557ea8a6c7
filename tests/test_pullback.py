"""The transposed Jacobian of a sweep: that of ``torch.func.vjp``, and where it differs."""

from __future__ import annotations

import sys
from functools import partial

import pytest
import torch
from torch import Tensor

import implicitopt
from implicitopt.pullback import _uncompiled, guarded_pullback, pullback

W = torch.linalg.qr(torch.randn(5, 5, generator=torch.manual_seed(0), dtype=torch.float64)).Q


class OldStyle(torch.autograd.Function):
    """tanh as many a kernel is wrapped, with ``ctx`` in forward: torch.func refuses it."""

    @staticmethod
    def forward(ctx, x):
        y = torch.tanh(x)
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx, g):
        (y,) = ctx.saved_tensors
        return g * (1 - y * y)


FUNCTIONS = {
    "smooth": lambda z, x: torch.tanh(z @ W + x),
    "in place": lambda z, x: (z @ W).add_(x).tanh_(),
    "indexed": lambda z, x: torch.stack([z[:, 0] * x[:, 1], z[:, 2].exp()], dim=1),
    "without x": lambda z, x: z.square(),
    "constant": lambda z, x: torch.ones(3, 2, dtype=z.dtype),
    "a parameter alone": lambda z, x: PARAMETER * 1.0,
    "the input itself": lambda z, x: z,
    "detached in part": lambda z, x: z * x.detach(),
}
PARAMETER = torch.nn.Parameter(torch.ones(3, 2, dtype=torch.float64))


@pytest.mark.parametrize("name", FUNCTIONS)
def test_it_is_that_of_torch_func(name):
    function = FUNCTIONS[name]
    torch.manual_seed(1)
    z, x = torch.randn(2, 3, 5, dtype=torch.float64)
    with torch.no_grad():
        expected, expected_pull = torch.func.vjp(function, z, x)
        image, pull = pullback(function, z, x)
        cotangent = torch.randn_like(expected)
        wanted = expected_pull(cotangent)
        for retain_graph in (True, False):
            found = pull(cotangent, retain_graph=retain_graph)
            assert all(map(torch.equal, found, wanted))
    assert torch.equal(image, expected)
    assert not any(tensor.requires_grad for tensor in (image, z, x))
    assert PARAMETER.grad is None


def test_what_a_function_captures_is_not_changed_in_place():
    seen = torch.zeros(2, dtype=torch.float64)

    def function(z):
        seen.copy_(z.sum(1))
        return z * seen[:, None]

    with pytest.raises(RuntimeError, match="mutate a captured"):
        guarded_pullback(function, torch.ones(2, 3, dtype=torch.float64))


@pytest.mark.parametrize(
    "solver",
    [
        implicitopt.Adaptive(),
        implicitopt.Nested(partial(implicitopt.ProjectedGradient, lr=0.1)),
    ],
)
def test_batch_norm_in_training_is_refused(solver):
    norm = torch.nn.BatchNorm1d(3)
    with pytest.raises(RuntimeError, match="mutate a captured") as caught:
        implicitopt.solve(
            lambda z, x: torch.tanh(0.5 * norm(z) + x),
            lambda z, x: (z - 0.3).square().sum(-1),
            torch.zeros(4, 3),
            solver=solver,
        )
    if sys.version_info >= (3, 11):
        assert "Call .eval() on the model" in " ".join(caught.value.__notes__)


def tanh_problem() -> tuple[Tensor, Tensor]:
    torch.manual_seed(2)
    return 0.8 * W, torch.randn(4, 5, dtype=torch.float64) / 2


def solved(f):
    """The solution for a map, and the gradient of a function of it in a captured scale."""
    A, target = tanh_problem()
    scale = torch.tensor(1.0, dtype=torch.float64, requires_grad=True)

    def loss(z, x):
        return 0.5 * (z - target).square().sum(-1) + 0.05 * x.square().sum(-1)

    sol = implicitopt.solve(
        lambda z, x: f(scale * (z @ A) + x), loss, torch.zeros(4, 5, dtype=torch.float64),
        solver=implicitopt.Adaptive(implicitopt.Joint()), adjoint=implicitopt.Implicit(), tol=1e-10,
    )  # fmt: skip
    (grad,) = torch.autograd.grad(sol.x.square().sum(), scale)
    return sol, grad


def test_functions_of_the_old_style_are_solved():
    (expected, expected_grad), (sol, grad) = solved(torch.tanh), solved(OldStyle.apply)
    assert sol.converged.all()
    torch.testing.assert_close(sol.x, expected.x, rtol=0, atol=1e-12)
    torch.testing.assert_close(grad, expected_grad)


def in_place_tanh():
    """tanh that writes all its results, and all its gradients, in one place each.

    As the functions of ``torch.cuda.make_graphed_callables`` do.
    """
    places = [torch.zeros(4, 5, dtype=torch.float64) for _ in range(2)]

    class InPlace(torch.autograd.Function):
        @staticmethod
        def forward(ctx, v):
            places[0].copy_(v.tanh())
            return places[0].detach()

        @staticmethod
        def backward(ctx, g):
            places[1].copy_(g * (1 - places[0] * places[0]))
            return places[1].detach()

    return InPlace.apply


@pytest.mark.parametrize("max_steps", [1, 2, 30])
@pytest.mark.parametrize("solver", [implicitopt.Adaptive(patience=4), implicitopt.OneShot()])
def test_a_map_may_write_all_its_images_in_one_place(solver, max_steps):
    A, target = tanh_problem()
    x0 = torch.randn(4, 5, dtype=torch.float64)
    found = [
        implicitopt.solve(
            lambda z, x, tanh=tanh: tanh(z @ A + x),
            lambda z, x, tanh=tanh: (tanh(z - x) - target).square().sum(-1) + x.square().sum(-1),
            x0, solver=solver, max_steps=max_steps, tol=0.0,
        )
        for tanh in (OldStyle.apply, in_place_tanh())
    ]  # fmt: skip
    for name in ("x", "z", "mu", "value", "steps"):
        assert torch.equal(getattr(found[0], name), getattr(found[1], name)), name
    z, x = found[1].z.detach(), found[1].x.detach()
    off = (torch.tanh(z @ A + x) - z).norm(dim=1)
    whole = 1 + torch.cat([z, x, found[1].mu.detach()], dim=1).norm(dim=1)
    torch.testing.assert_close(found[1].residuals.z, off / whole)


def test_a_fixed_point_is_that_of_a_map_that_writes_in_one_place():
    A, _ = tanh_problem()
    x = torch.randn(4, 5, dtype=torch.float64)
    z, expected = (
        implicitopt.fixed_point(lambda z, x, tanh=tanh: tanh(z @ A + x), x, tol=1e-10)
        for tanh in (in_place_tanh(), torch.tanh)
    )
    torch.testing.assert_close(z, expected, rtol=0, atol=1e-8)


def test_a_map_that_writes_on_its_state_only_where_nothing_is_recorded():
    A, _ = tanh_problem()

    def f(z, x):
        image = torch.tanh(z @ A + x)
        return image if torch.is_grad_enabled() else z.copy_(image)

    with pytest.raises(ValueError, match="in place"), torch.no_grad():
        implicitopt.fixed_point(f, torch.ones(4, 5, dtype=torch.float64))


def test_old_style_functions_do_not_hide_batch_norm_in_training():
    """A backward hook on a module is such a function."""
    net = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.BatchNorm1d(3))
    net.register_full_backward_hook(lambda module, before, after: None)
    with pytest.raises(RuntimeError, match="a BatchNorm1d changed"):
        implicitopt.solve(
            lambda z, x: torch.tanh(0.5 * net(z) + x), lambda z, x: (z - 0.3).square().sum(-1),
            torch.zeros(4, 3),
        )  # fmt: skip
    assert net.eval()
    assert implicitopt.solve(
        lambda z, x: torch.tanh(0.5 * net(z) + x), lambda z, x: (z - 0.3).square().sum(-1),
        torch.zeros(4, 3),
    ).x.isfinite().all()  # fmt: skip


def test_what_subset_returns_is_looked_at_too():
    A, target = tanh_problem()
    target[0] = torch.tanh(target[0] @ A)  # finished sooner than the others
    calls = torch.zeros((), dtype=torch.float64)

    def of(rows, counted=True):
        def f(z, x):
            return torch.tanh(z @ A + x) + (calls.add_(z.sum()) * 0 if counted else 0)

        return f, lambda z, x: (z - target[rows]).square().sum(-1) * (1 + 20 * rows)

    with pytest.raises(RuntimeError, match="mutate a captured"):
        implicitopt.solve(
            *of(torch.arange(4), counted=False), torch.zeros(4, 5, dtype=torch.float64), subset=of
        )


def test_a_gradient_may_be_taken_under_autocast():
    A, target = (part.float() for part in tanh_problem())
    scale = torch.tensor(1.0, requires_grad=True)

    def gradient(enabled):
        sol = implicitopt.solve(
            lambda z, x: torch.tanh(scale * (z @ A) + x),
            lambda z, x: (z - target).square().sum(-1) + 0.1 * x.square().sum(-1),
            torch.zeros(4, 5), adjoint=implicitopt.Implicit(), tol=1e-5,
        )  # fmt: skip
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            return torch.autograd.grad(sol.x.square().sum(), scale)[0]

    torch.testing.assert_close(gradient(True), gradient(False), rtol=3e-2, atol=1e-3)


@pytest.mark.parametrize(
    ("dtype", "reached"), [(torch.float64, 1e-10), (torch.float32, 1e-2)], ids=["f64", "f32"]
)
def test_a_backward_solve_asks_for_what_autocast_leaves_to_reach(dtype, reached):
    """Which does not touch float64."""
    A, target = (part.to(dtype) for part in tanh_problem())
    scale = torch.ones((), dtype=dtype, requires_grad=True)
    sol = implicitopt.solve(
        lambda z, x: torch.tanh(scale * (z @ A) + x),
        lambda z, x: (z - target).square().sum(-1) + 0.1 * x.square().sum(-1),
        torch.zeros(4, 5, dtype=dtype), adjoint=implicitopt.Implicit(), tol=1e-5,
    )  # fmt: skip
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.autograd.grad(sol.x.square().sum(), scale)
    assert (sol.adjoint.status == 0).all()
    assert sol.adjoint.residual.max() <= reached
    assert reached == 1e-10 or sol.adjoint.residual.max() > 1e-5


@pytest.mark.skipif(not hasattr(torch.compiler, "set_stance"), reason="needs torch 2.6")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # dynamo's own look at it
def test_a_compiled_map_runs_compiled():
    """In all sweeps but the first, which looks for side effects."""
    runs = []

    def backend(module, inputs):
        def run(*values):
            runs.append(torch.is_grad_enabled())
            return module(*values)

        return run

    A, target = tanh_problem()
    f = torch.compile(lambda z, x: torch.tanh(z @ A + x), backend=backend)
    sol = implicitopt.solve(
        f, lambda z, x: (z - target).square().sum(-1) + x.square().sum(-1),
        torch.zeros(4, 5, dtype=torch.float64), max_steps=12, tol=0.0,
    )  # fmt: skip
    assert sol.sweeps.f == 12
    assert sum(runs) >= 11


@pytest.mark.skipif(not hasattr(torch.compiler, "set_stance"), reason="needs torch 2.6")
def test_the_compiler_is_as_it_was_after_solves_in_two_threads():
    """Whichever of two first sweeps at one time ends first."""
    from torch._dynamo import eval_frame

    before = eval_frame._stance
    first, second = _uncompiled(), _uncompiled()
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert eval_frame._stance.stance == "force_eager"  # the second still is in there
    second.__exit__(None, None, None)
    assert eval_frame._stance == before
