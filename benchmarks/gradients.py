"""What a gradient costs, over a bare sweep and over the solve, and how accurate it is.

Problems: a tanh map and a linear-quadratic one (32 problems, float64), differentiated in a shift of
the map to 1e-6; and an MDEQ decoder of two branches (640 states, codes of length 16, 8 images of
digits, trained for a few steps, float64), differentiated in all its parameters to 1e-3, with
λ/2 ‖x‖² in the loss for λ = 0, .01, .1 and 1.

Measured, in medians of interleaved calls in one run by time.perf_counter: a bare sweep (f, its
transposed product, and the loss's gradient), the solve under no_grad, backward of ``sol.value``
under ``Envelope()``, attaching it and backward (a warm-started solve of one sweep and its backward,
less that solve under no_grad), and backward of ½‖x‖² under ``Implicit()``. Its products are counted
without what the solve's sweeps tell, too.

Accuracy: the KKT matrix is formed column by column and solved densely in float64. On the smooth
problems Newton's method first brings the point to the exact solution, so that all errors count; the
decoder has kinks, and its reference is the dense solution of the adjoint system at the point found.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

import implicitopt
from benchmarks import families
from benchmarks.accuracy import relative_error
from benchmarks.bare import bare_of
from benchmarks.clock import interleaved
from implicitopt import AdjointWarning, Envelope, Implicit, Joint, Status

__all__ = ["LAMBDAS", "Case", "cases", "dense", "measure", "table"]

LAMBDAS = (0.0, 0.01, 0.1, 1.0)


class Case(NamedTuple):
    """A batch of problems on matrices, and what their gradient is taken in."""

    f: Callable[[Tensor, Tensor], Tensor]
    loss: Callable[[Tensor, Tensor], Tensor]
    x0: Tensor
    z0: Tensor
    theta: tuple[Tensor, ...]
    tol: float  # of the adjoint system
    forward_tol: float | None
    max_steps: int
    smooth: bool

    def solve(self, **options: Any) -> implicitopt.Solution:
        options = {"tol": self.forward_tol, "max_steps": self.max_steps, **options}
        return implicitopt.solve(self.f, self.loss, self.x0, self.z0, **options)


def smooth(problem: families.Problem) -> Case:
    """One of the families, with a shift of its map as the parameter."""
    f, loss, x0, z0 = problem
    shift = torch.zeros_like(z0[0]).requires_grad_()
    return Case(lambda z, x: f(z, x) + shift, loss, x0, z0, (shift,), 1e-6, 1e-6, 500, True)


def decoder(steps: int, count: int = 8) -> Callable[[float], Case]:
    """λ -> the inversion of a decoder that was trained for so many steps on digits."""
    from sklearn.datasets import load_digits

    from benchmarks.decoders import examples_module

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = examples_module("mdeq").Decoder(16, image=(1, 8), channels=(8, 8)).double()
    images = torch.from_numpy(load_digits().images).unsqueeze(1) / 16
    theta = tuple(model.parameters())
    z0 = torch.zeros(count, model.cell.width, dtype=torch.float64)
    x0 = torch.zeros(count, 16, dtype=torch.float64)

    def f(z: Tensor, x: Tensor) -> Tensor:
        return model.cell.flatten(model.f(model.cell.unflatten(z), x))

    def case(lam: float, at: int = 0) -> Case:
        target = images[at : at + count]

        def loss(z: Tensor, x: Tensor) -> Tensor:
            misfit = (model.image(model.cell.unflatten(z)) - target).square().flatten(1).sum(1)
            return 0.5 * misfit + 0.5 * lam * x.square().sum(1)

        return Case(f, loss, x0, z0, theta, 1e-3, None, 100, False)

    optimizer = torch.optim.Adam(theta, lr=3e-3)
    for step in range(steps):
        optimizer.zero_grad()
        sol = case(0.01, at=count * (step + 1)).solve(max_steps=20, solver=Joint())
        sol.value.mean().backward()
        optimizer.step()
    return case


def cases(*, quick: bool) -> dict[str, Callable[[], Case]]:
    """Every case by name; ``quick``: the smooth ones, and the decoder at λ = 0.1."""
    found: dict[str, Callable[[], Case]] = {
        "tanh, ρ 0.9": lambda: smooth(families.tanh()),
        "linear-quadratic, ρ 0.7": lambda: smooth(families.linear_quadratic(30, 8, 0.7)),
    }
    trained: list[Callable[[float], Case]] = []

    def of(lam: float) -> Case:
        if not trained:
            trained.append(decoder(2 if quick else 40))
        return trained[0](lam)

    for lam in (0.1,) if quick else LAMBDAS:
        found[f"MDEQ decoder, λ {lam:g}"] = partial(of, lam)
    return found


def outer(x: Tensor) -> Tensor:
    return 0.5 * x.square().sum()


def flat(grads: tuple[Tensor | None, ...], theta: tuple[Tensor, ...]) -> Tensor:
    """One vector of several gradients."""
    pairs = zip(grads, theta, strict=True)
    return torch.cat([(torch.zeros_like(t) if g is None else g).flatten() for g, t in pairs])


def dense(case: Case, point: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """dΣ½‖x*‖²/dθ and dΣℓ*/dθ, by dense linear algebra at the point, or at the exact solution."""
    sizes = [block.shape[1] for block in point]
    v = torch.cat(point, dim=1).detach()

    def lagrangian(v: Tensor) -> Tensor:
        z, mu, x = v.split(sizes, dim=1)
        return case.loss(z, x).sum() + (mu * (case.f(z, x) - z)).sum()

    def system(v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """v as a leaf, ∇L there, and its Jacobian, ``(B, N, N)``."""
        v = v.detach().requires_grad_()
        (slope,) = torch.autograd.grad(lagrangian(v), v, create_graph=True)
        columns = []
        for unit in torch.eye(v.shape[1], dtype=v.dtype):
            columns.append(
                torch.autograd.grad(slope, v, unit.expand_as(v), retain_graph=True)[0].detach()
            )
        return v, slope, torch.stack(columns, dim=2)

    v, slope, K = system(v)
    for _ in range(20 if case.smooth else 0):
        step = torch.linalg.solve(K, slope.detach()[..., None])[..., 0]
        v, slope, K = system(v - step)
        if step.norm() < 1e-11 * v.norm():
            break
    x = v.detach().split(sizes, dim=1)[2]
    pull = torch.cat([torch.zeros_like(v[:, : sum(sizes[:2])]), x], dim=1)
    w = torch.linalg.solve(K.mT, pull[..., None])[..., 0]
    implicit = torch.autograd.grad((-w * slope).sum(), case.theta, allow_unused=True)
    envelope = torch.autograd.grad(lagrangian(v.detach()), case.theta, allow_unused=True)
    return flat(implicit, case.theta), flat(envelope, case.theta)


def measure_case(case: Case, *, repeats: int) -> dict:
    theta = case.theta

    def gradient(value: Tensor) -> Tensor:
        return flat(torch.autograd.grad(value, theta, retain_graph=True, allow_unused=True), theta)

    def forward() -> implicitopt.Solution:
        with torch.no_grad():
            return case.solve()

    def again() -> implicitopt.Solution:
        return case.solve(max_steps=1, warm_start=start)

    def again_only() -> None:
        with torch.no_grad():
            again()

    start = forward()
    implicit = case.solve(adjoint=Implicit(tol=case.tol))
    # Warm-started at its solution, so that they are attached at the same point.
    envelope, alone = (
        case.solve(max_steps=1, warm_start=implicit, adjoint=a)
        for a in (Envelope(), Implicit(tol=case.tol, recycle=0))
    )
    point = tuple(block.detach() for block in (implicit.z, implicit.mu, implicit.x))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", AdjointWarning)  # the status is in the results
        found = gradient(outer(implicit.x))
        gradient(outer(alone.x))
        report, products = implicit.adjoint, implicit.adjoint.products
        without = alone.adjoint.products
        seconds = interleaved(
            {
                "sweep": bare_of(case),
                "solve": forward,
                "envelope": lambda: gradient(envelope.value.sum()),
                "again": again_only,
                "again_envelope": lambda: gradient(again().value.sum()),
                "implicit": lambda: gradient(outer(implicit.x)),
            },
            repeats=repeats,
        )
    known, known_envelope = dense(case, point)
    statuses = Counter(Status(code).name for code in report.status.tolist())
    return {
        "tol": case.tol,
        "problems": len(case.x0),
        "solve_sweeps": start.sweeps.vjp,
        "solve_residual": start.residuals.total.max().item(),
        "adjoint_status": dict(statuses),
        "adjoint_steps": report.steps.max().item(),
        "adjoint_products": products,
        "adjoint_products_alone": without,
        "adjoint_residual": report.residual.max().item(),
        # At the point found the envelope's gradient is exact, and says nothing.
        "envelope_error": (
            relative_error(gradient(envelope.value.sum()), known_envelope) if case.smooth else None
        ),
        "implicit_error": relative_error(found, known),
        "seconds": seconds,
    }


def measure(*, quick: bool, bar: Callable[..., Any]) -> dict:
    """Every case; ``quick``: three of them, with one repeat."""
    repeats = 1 if quick else 15
    rows = bar(cases(quick=quick).items(), desc="gradients")
    return {name: measure_case(make(), repeats=repeats) for name, make in rows}


def table(results: dict) -> str:
    """Two Markdown tables: cost in ratios, then accuracy."""
    lines = [
        "| problem | sweeps of the solve | solve / sweep | envelope backward / sweep |"
        " with attaching it | implicit backward / sweep | / solve |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for name, row in results.items():
        s = row["seconds"]
        attached = s["again_envelope"] - s["again"]
        ratios = (
            s["solve"] / s["sweep"], s["envelope"] / s["sweep"], attached / s["sweep"],
            s["implicit"] / s["sweep"], s["implicit"] / s["solve"],
        )  # fmt: skip
        shown = " | ".join(f"{ratio:.2f}" for ratio in ratios)
        lines.append(f"| {name} | {row['solve_sweeps']} | {shown} |")
    lines += [
        "",
        "| problem | adjoint tol | status | steps, worst | products | with recycle=0 |"
        " residual, worst | envelope error | implicit error |",
        "|---|---:|---|---:|---:|---:|---:|---:|---:|",
    ]
    for name, row in results.items():
        status = ", ".join(f"{key} {count}" for key, count in row["adjoint_status"].items())
        envelope = "–" if row["envelope_error"] is None else f"{row['envelope_error']:.0e}"
        lines.append(
            f"| {name} | {row['tol']:.0e} | {status} | {row['adjoint_steps']} | "
            f"{row['adjoint_products']} | {row['adjoint_products_alone']} | "
            f"{row['adjoint_residual']:.0e} | "
            f"{envelope} | {row['implicit_error']:.0e} |"
        )
    return "\n".join(lines)
