"""What a warm start is worth: problems solved again after a change, and in pieces of a few sweeps.

The change moves the equilibrium of every input by a random 0.01 a state. Pieces are as a training
loop makes them that gives each visit of a problem 8 sweeps and keeps x, z and μ between visits;
shown is the KKT residual after 16 of them, which a solve in one piece brings to 1e-6 in less.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor

from benchmarks.problems import monotone, quadratic, tanh
from implicitopt import Adaptive, Joint, OneShot, Solution, WarmStart, solve

__all__ = ["in_pieces", "measure", "table"]

TOL, MOST, PIECE, PIECES, SHIFT = 1e-6, 300, 8, 16, 0.01
SOLVERS: dict[str, Callable[[], Any]] = {"default": Adaptive, "Joint": Joint, "OneShot": OneShot}
PROBLEMS: dict[str, Callable[[], tuple[Any, ...]]] = {
    "linear, cond 1e+02, ρ 0.9": partial(quadratic, 1e2, 0.9, 16),
    "linear, cond 1e+04, ρ 0.3": partial(quadratic, 1e4, 0.3, 16),
    **{
        f"tanh, {kind}, ρ {rho}": partial(tanh, kind, rho, 16, torch.float64)
        for kind in ("gauss", "orth", "sym")
        for rho in (0.3, 0.9)
    },
    "tanh, gauss, softmax of 10": partial(tanh, "gauss", 0.9, 16, torch.float64, classes=10),
    "monotone, margin 0.3": partial(monotone, 0.3, 16, torch.float64),
}


def in_pieces(arguments: tuple[Any, ...], solver: Any, **options: Any) -> Solution:
    """The last of ``PIECES`` solves, each from where the one before ended."""
    f, loss, x0, z0 = arguments
    run = partial(solve, f, loss, solver=solver, max_steps=PIECE, tol=TOL, **options)
    sol = run(x0, z0)
    for _ in range(PIECES - 1):
        sol = run(sol.x, z0, warm_start=WarmStart(sol.x, sol.z, sol.mu))
    return sol


def median_steps(sol: Solution) -> float | None:
    """Of the batch; None where half of it did not converge."""
    steps = torch.where(sol.converged, sol.steps.double(), torch.inf).median().item()
    return None if steps == torch.inf else steps


@torch.no_grad()
def measure(*, quick: bool, bar: Callable[..., Any]) -> dict[str, dict[str, dict[str, Any]]]:
    """problem -> solver -> sweeps of a cold and a warm solve, and the residual of pieces."""
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for name in bar(list(PROBLEMS)[:: 5 if quick else 1], desc="warm"):
        f, loss, x0, z0 = PROBLEMS[name]()
        torch.manual_seed(0)
        shift = SHIFT * torch.randn_like(z0)

        def moved(z: Tensor, x: Tensor, f: Any = f, shift: Tensor = shift) -> Tensor:
            return f(z - shift, x) + shift

        found[name] = {}
        for kind, make in SOLVERS.items():
            run = partial(solve, loss=loss, z0=z0, solver=make(), max_steps=MOST, tol=TOL)
            first = run(f, x0=x0)
            found[name][kind] = {
                "cold": median_steps(run(moved, x0=x0)),
                "warm": median_steps(run(moved, x0=first.x, warm_start=first)),
                "pieces": in_pieces((f, loss, x0, z0), make()).residuals.total.median().item(),
            }
    return found


def table(found: dict[str, dict[str, dict[str, Any]]]) -> str:
    """A row per problem."""

    def cells(row: dict[str, Any]) -> list[str]:
        counts = ["–" if row[k] is None else f"{row[k]:.0f}" for k in ("cold", "warm")]
        return [" / ".join(counts), f"{row['pieces']:.0e}"]

    rows = [
        [name, *(cell for kind in SOLVERS for cell in cells(row[kind]))]
        for name, row in found.items()
    ]
    header = [
        "",
        *(text for kind in SOLVERS for text in (f"{kind}, cold / warm", "in pieces")),
    ]
    return tabulate(rows, header, tablefmt="github", disable_numparse=True)
