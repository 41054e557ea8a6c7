"""What the units of x and of the loss matter: sweeps to a KKT residual of 1e-6.

Two families of 32 problems, with x given in units from a thousandth of the natural one to a
thousand of it, and the loss likewise; at most 400 sweeps.
"""

from __future__ import annotations

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
SOLVERS: dict[str, Callable[[], Any]] = {
    "default": Adaptive, "Joint": Joint, "OneShot": OneShot,
}  # fmt: skip
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


#: family and unit of the loss -> solver -> unit of x -> mean of the sweeps, and the unsolved
Counts = dict[str, dict[str, dict[str, tuple[float, int]]]]


def measure(*, quick: bool, bar: Callable[..., Any]) -> Counts:
    """Every family in every unit, with every solver."""
    units = OF_X[::3] if quick else OF_X
    found: Counts = {}
    cases = [(name, of_loss) for name in FAMILIES for of_loss in OF_LOSS[:: 2 if quick else 1]]
    for name, of_loss in bar(cases, desc="units"):
        row = found[f"{name}, loss × {of_loss:g}"] = {solver: {} for solver in SOLVERS}
        for solver, make in SOLVERS.items():
            for of_x in units:
                problem = in_units(FAMILIES[name](), of_x, of_loss)
                with torch.no_grad():
                    sol = implicitopt.solve(*problem, solver=make(), tol=1e-6, max_steps=MAX_STEPS)
                steps = sol.steps.masked_fill(~sol.converged, MAX_STEPS)
                lost = int((~sol.converged).sum())
                row[solver][f"x × {of_x:g}"] = (geometric_mean(steps.tolist()), lost)
    return found


def table(found: Counts) -> str:
    """A row per family, unit of the loss and solver."""
    rows = [
        [
            name,
            solver,
            *(f"{mean:.0f}" + f" ({lost})" * (lost > 0) for mean, lost in cells.values()),
        ]
        for name, row in found.items()
        for solver, cells in row.items()
    ]
    units = next(iter(next(iter(found.values())).values()))
    header = ["sweeps (unsolved of 32)", "solver", *units]
    return tabulate(rows, header, tablefmt="github", disable_numparse=True)
