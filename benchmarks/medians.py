"""Median sweeps to a KKT residual of 1e-6, and how many problems were not solved, by solver."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from tabulate import tabulate

import implicitopt
from benchmarks.families import Problem
from benchmarks.paper import paper
from implicitopt import SQP, Adaptive, Joint, OneShot

__all__ = ["Found", "medians", "table"]

TOL, MAX_STEPS = 1e-6, 400
SOLVERS: dict[str, Callable[[], Any]] = {
    "default": Adaptive, "SQP": SQP, "Joint": Joint, "Adaptive(Joint())": lambda: Adaptive(Joint()),
    "OneShot": OneShot, "paper": lambda: paper(damped=False),
}  # fmt: skip

#: problems -> solver -> median of the sweeps, MAX_STEPS for the unsolved; and how many these are
Found = dict[str, dict[str, tuple[int, int]]]


def medians(cases: Iterable[tuple[str, Problem]]) -> Found:
    """Each batch of problems with every solver."""
    found: Found = {}
    for name, problem in cases:
        row = found[name] = {}
        for solver, make in SOLVERS.items():
            with torch.no_grad():
                sol = implicitopt.solve(*problem, solver=make(), tol=TOL, max_steps=MAX_STEPS)
            steps = sol.steps.masked_fill(~sol.converged, MAX_STEPS).sort().values
            row[solver] = int(steps[len(steps) // 2]), int((~sol.converged).sum())
    return found


def table(found: Found) -> str:
    """A row per batch of problems; the unsolved in brackets."""
    rows = [
        [name, *(f"{n}" if lost == 0 else f"{n} ({lost})" for n, lost in row.values())]
        for name, row in found.items()
    ]
    return tabulate(rows, ["median (unsolved)", *SOLVERS], "github", disable_numparse=True)
