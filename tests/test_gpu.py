"""On a CUDA device: the results of the CPU, and no wait for the device between looks."""

from __future__ import annotations

import sys
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import implicitopt
from benchmarks import gpu
from benchmarks.graphed import Graphed
from implicitopt import Adaptive, Anderson, Broyden, Joint, OneShot
from implicitopt.iteration import CHECK_EVERY

needs_gpu = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
on_gpu = pytest.mark.parametrize(
    "device", [pytest.param(torch.device("cuda"), marks=needs_gpu, id="cuda")]
)

SOLVERS = {
    "adaptive": Adaptive(),
    "adaptive, joint": Adaptive(Joint()),
    "joint, Anderson I": Joint(Anderson("I")),
    "joint, Anderson II": Joint(Anderson("II")),
    "joint, Broyden": Joint(Broyden()),
    "one-shot": OneShot(),
}
all_solvers = pytest.mark.parametrize("solver", SOLVERS.values(), ids=SOLVERS)


def problem(device="cpu", W=None):
    """A tanh map of 16 states and 3 inputs, made on the CPU, so that every device has the same."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    drawn = normal(16, 16)
    if W is None:
        W = (0.7 / torch.linalg.matrix_norm(drawn, 2) * drawn).to(device)
    U, C, y = (t.to(W.device) for t in (normal(16, 3), normal(5, 16) / 4, normal(6, 5)))

    def f(z, x):
        return torch.tanh(z @ W.T + x @ U.T)

    def loss(z, x):
        return 0.5 * (z @ C.T - y).square().sum(-1) + 0.1 * x.square().sum(-1)

    return W, (f, loss, y.new_zeros(6, 3), y.new_zeros(6, 16))


def guarded_solve(arguments, solver, guard):
    """A solve; ``guard(True)`` is in force from the sweep after a look to the one before the next.

    Returns for how many steps it was.
    """
    guarded = 0

    def callback(progress):
        nonlocal guarded
        look_follows = (progress.step + 1) % CHECK_EVERY == 0
        guard(not look_follows)
        guarded += not look_follows

    if isinstance(solver, Adaptive):  # whose own, rarer looks shall fall on those of the loop
        solver = replace(solver, patience=6 * CHECK_EVERY)
    try:
        with torch.no_grad():
            implicitopt.solve(
                *arguments, solver=solver, tol=0.0, max_steps=13 * CHECK_EVERY, callback=callback
            )
    finally:
        guard(False)
    return guarded


@on_gpu
@all_solvers
def test_no_host_sync_between_looks(device, solver):
    def guard(on):
        torch.cuda.set_sync_debug_mode("error" if on else "default")

    _, arguments = problem(device)
    assert guarded_solve(arguments, solver, guard) > 40


class HostReads(TorchDispatchMode):
    """Counts the reads of tensors for which a device would have to be waited for."""

    WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "_unique2", "equal", "is_nonzero")

    def __init__(self):
        super().__init__()
        self.on, self.guarded, self.others = False, 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket.__name__ in self.WAITS:
            self.guarded += self.on
            self.others += not self.on
        return func(*args, **(kwargs or {}))


@all_solvers
def test_no_tensor_is_read_between_looks_where_a_look_is_dear(solver, monkeypatch):
    """The same without a GPU: the CPU made to behave as one, and the reads of tensors counted."""
    for name, module in list(sys.modules.items()):
        if name.startswith("implicitopt.") and hasattr(module, "at_hand"):
            monkeypatch.setattr(module, "at_hand", lambda mask: False)
    _, arguments = problem()
    with HostReads() as reads:
        steps = guarded_solve(arguments, solver, partial(setattr, reads, "on"))
    assert steps > 40
    assert reads.guarded == 0
    assert reads.others >= 12  # the looks themselves: the count does see a read


@on_gpu
@all_solvers
def test_solve_finds_what_the_cpu_finds(device, solver):
    found = []
    for where in ("cpu", device):
        _, arguments = problem(where)
        sol = implicitopt.solve(*arguments, solver=solver, tol=1e-9, max_steps=1000, throw=True)
        assert sol.x.device.type == sol.status.device.type == torch.device(where).type
        found.append((sol.x.detach().cpu(), sol.z.detach().cpu(), sol.value.detach().cpu()))
    torch.testing.assert_close(found[1], found[0], rtol=1e-6, atol=1e-7)


@on_gpu
@pytest.mark.parametrize(
    "adjoint",
    [implicitopt.Envelope(), implicitopt.Implicit(), implicitopt.FrozenInput()],
    ids=["envelope", "implicit", "frozen"],
)
def test_gradients_are_those_of_the_cpu(device, adjoint):
    found = []
    for where in ("cpu", device):
        W, _ = problem(where)
        W.requires_grad_()
        _, arguments = problem(W=W)
        sol = implicitopt.solve(*arguments, adjoint=adjoint, tol=1e-10, max_steps=1000, throw=True)
        outer = sol.value.sum()
        if not isinstance(adjoint, implicitopt.Envelope):
            outer = outer + sol.z.square().sum()
        if isinstance(adjoint, implicitopt.Implicit):
            outer = outer + sol.x.square().sum()
        (grad,) = torch.autograd.grad(outer, W)
        found.append(grad.cpu())
    torch.testing.assert_close(found[1], found[0], rtol=1e-5, atol=1e-7)


@on_gpu
def test_fixed_point_and_its_gradient_are_those_of_the_cpu(device):
    found = []
    for where in ("cpu", device):
        _, (f, _, x0, z0) = problem(where)
        x = (x0 + 0.3).requires_grad_()
        z = implicitopt.fixed_point(f, x, z0, tol=1e-11)
        (grad,) = torch.autograd.grad(z.square().sum(), x)
        found.append((z.detach().cpu(), grad.cpu()))
    torch.testing.assert_close(found[1], found[0], rtol=1e-7, atol=1e-9)


@on_gpu
def test_float32_on_the_gpu(device):
    _, (f, loss, x0, z0) = problem(device)
    exact = implicitopt.solve(f, loss, x0, z0, tol=1e-9, max_steps=1000)
    f32, l32 = (lambda z, x, g=g: g(z.double(), x.double()).float() for g in (f, loss))
    sol = implicitopt.solve(f32, l32, x0.float(), z0.float(), tol=1e-4)
    assert sol.converged.all()
    torch.testing.assert_close(sol.value.double(), exact.value, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    "device", ["cpu", pytest.param("cuda", marks=needs_gpu)], ids=["cpu", "cuda"]
)
def test_a_graphed_map_is_the_map(device):
    _, (f, loss, x0, z0) = problem(device)

    def pair(z, x):  # a pytree of two leaves
        image = f(torch.cat(z, dim=1), x)
        return image[:, :7], image[:, 7:]

    start = (z0[:, :7], z0[:, 7:])
    graphed = Graphed(pair, start, x0)
    # New values, not those that it was made with.
    z = tuple(torch.full_like(leaf, 0.3) for leaf in start)
    x = torch.full_like(x0, -0.2)
    for map_ in (pair, graphed):
        image, pull = torch.func.vjp(map_, z, x)
        pulled = pull(image)
        if map_ is pair:
            known = image, pulled
    torch.testing.assert_close((image, pulled), known)
    plain, replayed = (
        implicitopt.solve(m, lambda z, x: loss(torch.cat(z, dim=1), x), x0, start, tol=1e-8)
        for m in (pair, graphed)
    )
    torch.testing.assert_close(replayed.x, plain.x)


def test_the_benchmark_says_that_there_is_no_device(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    results = gpu.measure(quick=True, bar=lambda items, desc: items)
    assert gpu.table(results) == "no CUDA device"


def test_the_benchmark_table():
    ms = {"sweep": 2.0, "OneShot": 100.0, "Joint": 90.0, "Adaptive (default)": 120.0}
    eager = {"steps": 40, "syncs": 9, "value": 0.0, "milliseconds": ms}
    halved = {**eager, "milliseconds": {key: t / 2 for key, t in ms.items()}}
    rows = {"eager": eager, "CUDA graphs": halved, "torch.compile": {"failed": "RuntimeError"}}
    shown = gpu.table({"device": "a card", "cases": {"small": rows}})
    for line in (
        "| small | eager | 2.00 | 40 | 100.0 | 1.25 | 90.0 | 1.12 | 120.0 | 1.50 | 1.00 | 9 |",
        "| small | CUDA graphs | 1.00 | 40 | 50.0 | 1.25 | 45.0 | 1.12 | 60.0 | 1.50 | 2.00 | 9 |",
    ):
        assert line in shown
    assert "| small | torch.compile | failed: RuntimeError |" in shown


def test_the_benchmark_problems_can_be_solved_without_a_gpu():
    """Two sweeps of the smallest, so that the part does not fail only where it is dear."""
    case = gpu.attack(1, torch.device("cpu"), steps=2)
    assert bool(case.solve(OneShot()).value.isfinite().all())
    graphed = gpu.MODES["CUDA graphs"](case)
    torch.testing.assert_close(
        graphed.solve(OneShot()).value, case.solve(OneShot()).value, rtol=1e-4, atol=1e-5
    )


@on_gpu
@pytest.mark.slow
def test_the_benchmark_runs(device):
    results = gpu.measure(quick=True, bar=lambda items, desc: items)
    rows = results["cases"]["MDEQ small, batch 1"]
    assert rows["eager"]["milliseconds"]["sweep"] > 0
    assert abs(rows["CUDA graphs"]["value"] - rows["eager"]["value"]) < 1e-2
    assert results["device"] in gpu.table(results)
