"""Precisions, compiled and functional maps, transforms, threads, copies and repetitions."""

import copy
import pickle
import re
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
import torch
from torch import nn

import implicitopt
from implicitopt import (
    SQP,
    Adaptive,
    Anderson,
    Best,
    Box,
    Broyden,
    Envelope,
    FrozenInput,
    Implicit,
    Joint,
    L2Ball,
    Last,
    LinfBall,
    Nested,
    OneShot,
    PaperRule,
    Picard,
    Simplex,
    StepSizes,
    WarmStart,
    fixed_point,
    jacobian_penalty,
    solve,
)
from tests.reliability.malformed import kkt_residual

N, B = 4, 3
SOLVERS = [Adaptive(), Joint(), OneShot(), SQP(), Nested(inner_steps=10)]


class Cell(nn.Module):
    """A contractive f(z, x), and a loss with a parameter of its own."""

    def __init__(self, dtype=torch.float64, seed=0):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.mix = nn.Linear(N, N, dtype=dtype)
        with torch.no_grad():
            W = torch.randn(N, N, generator=generator, dtype=torch.float64)
            self.mix.weight.copy_(0.6 * W / torch.linalg.matrix_norm(W, 2))
            self.mix.bias.zero_()
        self.target = nn.Parameter(torch.full((N,), 0.3, dtype=dtype))

    def forward(self, z, x):
        return torch.tanh(self.mix(z) + x)

    def loss(self, z, x):
        return (z - self.target).square().sum(-1) + 0.1 * x.square().sum(-1)


# Made once: vmap forbids random numbers inside of it. Near enough that every solver gets there.
START = 0.1 * torch.randn(B, N, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def start(dtype=torch.float64):
    return START.to(dtype).clone()


def gradients(cell):
    return torch.cat([p.grad.reshape(-1) for p in cell.parameters()])


# Precision


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("solver", SOLVERS, ids=lambda s: type(s).__name__)
def test_under_autocast_the_answer_is_near_that_of_float32(dtype, solver):
    cell = Cell(torch.float32)
    exact = solve(cell, cell.loss, start(torch.float32), max_steps=200)
    with torch.autocast("cpu", dtype):
        sol = solve(cell, cell.loss, start(torch.float32), solver=solver, max_steps=200, tol=1e-2)
        done = sol.converged
        residual = kkt_residual(cell, cell.loss, sol, None, False)
        sol.value.sum().backward()
    assert sol.x.dtype == sol.z.dtype == sol.value.dtype == torch.float32
    assert done.any()
    assert (residual[done] <= 1.1e-2).all()
    off = torch.finfo(dtype).eps
    assert (sol.value - exact.value).abs().max() <= 10 * off
    found = gradients(cell)
    cell.zero_grad()
    exact.value.sum().backward()
    # At a tolerance of 1e-2 the envelope gradient errs by a multiple of it.
    assert (found - gradients(cell)).norm() <= 0.1 * (1 + gradients(cell).norm())


def full_precision(function):
    """A function that turns autocast off within."""

    def narrowed_by_none(*arguments):
        with torch.autocast("cpu", enabled=False):
            return function(*arguments)

    return narrowed_by_none


def many_states():
    """f and a loss of 2,100 states, too many for Anderson to keep in float64, and 3 inputs."""
    generator = torch.Generator().manual_seed(0)
    mix, target = (0.03 * torch.randn(k, 2100, generator=generator) for k in (3, 2))
    return (
        full_precision(lambda z, x: torch.tanh(0.7 * z.roll(1, 1) + x @ mix)),
        full_precision(lambda z, x: (z - target).square().sum(-1) + 0.1 * x.square().sum(-1)),
    )


@pytest.mark.parametrize(
    "solver",
    [*SOLVERS, Joint(Anderson("II")), Joint(Broyden("good")), Joint(Broyden("bad"))],
    ids=lambda solver: f"{type(solver).__name__} {getattr(solver, 'accelerator', '')}",
)
def test_autocast_is_for_f_and_the_loss_alone(solver):
    """Where those turn it off, nothing is left of it: not a bit of any result."""
    f, loss = many_states()
    found = []
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            found.append(
                solve(
                    f, loss, torch.zeros(2, 3), torch.zeros(2, 2100), solver=solver,
                    project=L2Ball(0.5), max_steps=40, tol=1e-5, adjoint=Implicit(max_steps=5),
                )
            )  # fmt: skip
    plain, under = found
    assert torch.equal(under.steps, plain.steps)
    for name in ("x", "z", "mu", "value"):
        assert torch.equal(getattr(under, name), getattr(plain, name)), name


@pytest.mark.parametrize("accelerator", [None, Anderson("I"), Broyden()], ids=str)
def test_autocast_is_for_the_map_of_a_fixed_point_alone(accelerator):
    f, _ = many_states()
    x = torch.ones(2, 3)
    options = {"accelerator": accelerator, "tol": 1e-5, "max_steps": 200}
    plain = fixed_point(f, x, torch.zeros(2, 2100), **options)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(fixed_point(f, x, torch.zeros(2, 2100), **options), plain)


@pytest.mark.parametrize("inside", [False, True], ids=["backward outside", "backward inside"])
def test_f_runs_under_the_autocast_that_holds_where_it_is_called_for(inside):
    """In the solve as that was called, in a backward pass as that is, though neither says so."""
    seen = []

    def noting(function):
        def noted(z, x):
            seen.append(torch.is_autocast_enabled("cpu"))
            return function(z, x)

        return noted

    cell = Cell(torch.float32)
    f, loss = noting(cell), noting(cell.loss)
    with torch.autocast("cpu", torch.bfloat16):
        sol = solve(f, loss, start(torch.float32), adjoint=Implicit(tol=1e-2), tol=1e-2)
        z = fixed_point(f, start(torch.float32), tol=1e-2, adjoint_tol=1e-2)
    assert seen
    assert all(seen)
    seen.clear()
    with torch.autocast("cpu", torch.bfloat16, enabled=inside):
        (sol.x.sum() + z.sum()).backward()
    assert seen
    assert set(seen) == {inside}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_each_dtype_stays_what_it_is(dtype):
    cell = Cell(torch.float64).to(dtype)
    wide = Cell(torch.float64)
    exact = solve(wide, wide.loss, start()).value.detach()
    sol = solve(cell, cell.loss, start(dtype), max_steps=200)
    assert {t.dtype for t in (sol.x, sol.z, sol.mu, sol.value)} == {dtype}
    assert (sol.value.double() - exact).abs().max() <= 1e-4 + 30 * torch.finfo(dtype).eps


# Compiled and functional maps


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # dynamo's own look at it
@pytest.mark.parametrize("adjoint", [Envelope(), Implicit(), FrozenInput()], ids=str)
def test_a_compiled_f_gives_the_same(adjoint):
    cell = Cell()
    compiled = torch.compile(cell, backend="eager")
    found = []
    for f in (cell, compiled):
        cell.zero_grad()
        sol = solve(f, cell.loss, start(), adjoint=adjoint)
        (sol.value.sum() if isinstance(adjoint, Envelope) else sol.z.sum()).backward()
        found.append((sol.x.detach(), gradients(cell) if cell.target.grad is not None else None))
    (x, grad), (x_compiled, grad_compiled) = found
    torch.testing.assert_close(x_compiled, x, rtol=0, atol=1e-12)
    if grad is not None:
        torch.testing.assert_close(grad_compiled, grad, rtol=0, atol=1e-12)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch's compiler needs g++")
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")  # torch's own
def test_an_f_compiled_to_machine_code_gives_the_same():
    cell = Cell()
    sol, compiled = (
        solve(f, cell.loss, start()) for f in (cell, torch.compile(cell, backend="inductor"))
    )
    torch.testing.assert_close(compiled.x, sol.x, rtol=0, atol=1e-9)


def test_functional_call_carries_the_gradient():
    cell = Cell()
    solve(cell, cell.loss, start()).value.sum().backward()
    known = gradients(cell)
    weights = {name: p.detach().clone().requires_grad_() for name, p in cell.named_parameters()}

    def f(z, x):
        return torch.func.functional_call(cell, weights, (z, x))

    def loss(z, x):
        return (z - weights["target"]).square().sum(-1) + 0.1 * x.square().sum(-1)

    solve(f, loss, start()).value.sum().backward()
    names = [name for name, _ in cell.named_parameters()]
    found = torch.cat([weights[name].grad.reshape(-1) for name in names])
    torch.testing.assert_close(found, known, rtol=0, atol=1e-14)


# Transforms


CELL, START = Cell(), start()  # made outside of vmap, which forbids random numbers


def optimum(theta):
    return solve(
        lambda z, x: CELL(z, x * theta),
        lambda z, x: (z - 0.3).square().sum(-1) + 0.1 * x.square().sum(-1),
        START,
    ).value


def equilibrium(theta):
    return fixed_point(lambda z, x: CELL(z, x * theta), START).sum(-1)


def penalty(theta):
    return jacobian_penalty(lambda z, x: CELL(z * theta, x), START, START)


@pytest.mark.parametrize("function", [optimum, equilibrium, penalty])
@pytest.mark.parametrize(
    "transform",
    [
        lambda g: torch.func.grad(lambda t: g(t).sum()),
        torch.func.jacrev,
        torch.func.jacfwd,
        torch.func.hessian,
        lambda g: lambda t: torch.func.vmap(g)(torch.stack([t, t])),
        lambda g: lambda t: torch.func.vjp(g, t),
        lambda g: lambda t: torch.func.jvp(g, (t,), (t,)),
    ],
    ids=["grad", "jacrev", "jacfwd", "hessian", "vmap", "vjp", "jvp"],
)
def test_the_transforms_of_torch_func_are_refused_with_a_remedy(function, transform):
    with pytest.raises(RuntimeError, match=r"outside of torch\.func.*Use torch\.autograd\.grad"):
        transform(function)(torch.ones(N, dtype=torch.float64))


@pytest.mark.parametrize("function", [optimum, equilibrium])
def test_the_remedy_works(function):
    theta = torch.ones(N, dtype=torch.float64, requires_grad=True)
    jacobian = torch.autograd.functional.jacobian(function, theta)
    step = 1e-4
    for k in range(N):
        away = torch.zeros(N, dtype=torch.float64)
        away[k] = step
        with torch.no_grad():
            difference = (function(theta + away) - function(theta - away)) / (2 * step)
        torch.testing.assert_close(jacobian[:, k], difference, rtol=0, atol=1e-3)


@pytest.mark.parametrize("function", [optimum, equilibrium])
def test_inference_mode_is_refused(function):
    with torch.inference_mode(), pytest.raises(RuntimeError, match=r"torch\.no_grad\(\) instead"):
        function(torch.ones(N, dtype=torch.float64))


# Threads and repetitions


def everything(seed):
    """What a user may look at, as one vector."""
    cell = Cell(seed=seed)
    sol = solve(cell, cell.loss, start(), adjoint=Implicit(), solver=SOLVERS[seed % len(SOLVERS)])
    (sol.value.sum() + sol.x.square().sum()).backward()
    z = fixed_point(cell, start())
    parts = (sol.x, sol.z, sol.mu, sol.value, sol.residuals.total, gradients(cell), z)
    return torch.cat([part.detach().reshape(-1) for part in parts])


@pytest.mark.slow
def test_eight_threads_give_what_one_gives():
    seeds = range(8)
    serial = [everything(seed) for seed in seeds]
    with ThreadPoolExecutor(8) as pool:
        parallel = list(pool.map(everything, seeds))
    for one, other in zip(serial, parallel, strict=True):
        assert torch.equal(one, other)


@pytest.mark.slow
def test_a_call_repeated_is_the_same_to_the_bit():
    for seed in range(4):
        assert torch.equal(everything(seed), everything(seed))


def test_what_is_random_follows_the_seed():
    cell = Cell()

    def drawn():
        torch.manual_seed(3)
        z, x = solve(cell, cell.loss, start(), sample_iterate=True).iterate
        return torch.cat([z, x, jacobian_penalty(cell, z, x)[:, None]], 1)

    assert torch.equal(drawn(), drawn())


# Copies

OPTIONS = [
    Adaptive(patience=7),
    Joint(Anderson("II", memory=3), StepSizes(x=0.1)),
    OneShot(memory=4),
    SQP(memory=4),
    Nested(partial(torch.optim.SGD, lr=0.1)),
    Broyden("bad"),
    Picard(0.5),
    Envelope(),
    Implicit(tol=1e-3),
    FrozenInput(max_steps=3),
    L2Ball(torch.ones(B)),
    LinfBall(0.5),
    Box(torch.zeros(N), 1.0),
    Simplex(2.0),
    Best(0.1),
    Last(),
    PaperRule(),
    WarmStart(torch.ones(1), torch.ones(2), torch.zeros(2)),
]
COPIES = [copy.copy, copy.deepcopy, lambda thing: pickle.loads(pickle.dumps(thing))]


@pytest.mark.parametrize("duplicate", COPIES, ids=["copy", "deepcopy", "pickle"])
@pytest.mark.parametrize("thing", OPTIONS, ids=lambda t: type(t).__name__)
def test_options_can_be_copied(thing, duplicate):
    def told(option):
        return re.sub(r" at 0x[0-9a-f]+", "", repr(option))

    assert told(duplicate(thing)) == told(thing)
    assert type(duplicate(thing)) is type(thing)


@pytest.mark.parametrize("adjoint", [Envelope(), Implicit(), FrozenInput()], ids=str)
@pytest.mark.parametrize("duplicate", COPIES, ids=["copy", "deepcopy", "pickle"])
def test_solutions_can_be_copied(adjoint, duplicate):
    cell = Cell()
    options = {"adjoint": adjoint, "history": True, "sample_iterate": True}
    sol = solve(cell, cell.loss, start(), **options)
    twin = duplicate(sol)
    assert repr(twin) == repr(sol)
    for name in ("x", "z", "mu", "value", "status", "steps"):
        assert torch.equal(getattr(twin, name), getattr(sol, name))
    assert torch.equal(twin.history.value, sol.history.value)
    assert torch.equal(twin.residuals.total, sol.residuals.total)
    if duplicate is copy.copy:
        assert twin.value is sol.value
    else:
        assert not twin.value.requires_grad
        assert not twin.x.requires_grad
    again = solve(cell, cell.loss, start(), warm_start=twin)
    assert sol.converged.sum() >= 2
    assert (again.steps[sol.converged] <= 1).all()
    sol.value.sum().backward()  # the first one's gradient is still there


def test_this_is_a_supported_torch():
    major, minor = (int(part) for part in torch.__version__.split(".")[:2])
    assert (major, minor) >= (2, 5)
    assert sys.version_info >= (3, 10)
    assert implicitopt.__version__
