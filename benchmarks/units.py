"""What the units of x and of the loss matter: sweeps to a KKT residual of 1e-6.

Two families of 32 problems, with x given in units from a thousandth of the natural one to a
thousand of it, and the loss likewise; at most 400 sweeps.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from statistics import geometric_mean
from typing import Any

import torch
from tabulate import tabulate

import implicitopt
from benchmarks.families import Problem, linear_quadratic, tanh
from implicitopt import Adaptive, Joint, OneShot

__all__ = ["in_units", "measure", "table"]

MAX_STEPS = 400
OF_X = (1e-3, 1e-2, 0.1, 1.0, 10.0, 100.0, 1000.0)
OF_LOSS = (1e-3, 1.0, 1e3)
SOLVERS: dict[str, Callable[[], Any]] = {"default": Adaptive, "Joint": Joint, "OneShot": OneShot}
FAMILIES: dict[str, Callable[[], Problem]] = {
    "tanh": partial(tanh, "sym", lam=1.0),
    "linear": partial(linear_quadratic, 30, 8, 0.7),
}


def in_units(problem: Problem, of_x: float, of_loss: float) -> Problem:
    """The same problem, where x and the loss are so many of their natural units in one of ours."""
    f, loss, x0, z0 = problem
    return Problem(
        lambda z, x: f(z, x * of_x), lambda z, x: of_loss * loss(z, x * of_x), x0 / of_x, z0
    )


def measure(*, quick: bool, bar: Callable[..., Any]) -> dict[str, dict[str, list[float]]]:
    """family and unit of the loss -> solver -> for each unit of x the mean and the unsolved."""
    units = OF_X[::3] if quick else OF_X
    found: dict[str, dict[str, Any]] = {}
    cases = [(name, of_loss) for name in FAMILIES for of_loss in OF_LOSS[:: 2 if quick else 1]]
    for name, of_loss in bar(cases, desc="units"):
        row: dict[str, Any] = found.setdefault(f"{name}, loss × {of_loss:g}", {})
        for solver, make in SOLVERS.items():
            row[solver] = []
            for of_x in units:
                problem = in_units(FAMILIES[name](), of_x, of_loss)
                with torch.no_grad():
                    sol = implicitopt.solve(*problem, solver=make(), tol=1e-6, max_steps=MAX_STEPS)
                steps = sol.steps.masked_fill(~sol.converged, MAX_STEPS)
                lost = int((~sol.converged).sum())
                row[solver].append((geometric_mean(steps.tolist()), lost))
    return found


def table(found: dict[str, dict[str, Any]]) -> str:
    """A row per family, unit of the loss and solver."""
    rows = [
        [name, solver, *(f"{mean:.0f}" + f" ({lost})" * (lost > 0) for mean, lost in cells)]
        for name, row in found.items()
        for solver, cells in row.items()
    ]
    count = len(rows[0]) - 2
    units = OF_X[:: math.ceil(len(OF_X) / count)]
    header = ["sweeps (unsolved of 32)", "solver", *(f"x × {unit:g}" for unit in units)]
    return tabulate(rows, header, tablefmt="github", disable_numparse=True)
