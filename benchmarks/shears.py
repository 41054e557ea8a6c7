"""What far from normal maps cost: sweeps to a KKT residual of 1e-6.

f = (D + N) z + x with D diagonal, within ±.9, and N strictly upper triangular: nothing lasts, and
all the same states grow by about ‖N‖ with each sweep at first. ℓ = ‖z − y‖² + .1 ‖x‖²; 16 random
maps of each kind, at most 400 sweeps.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor

import implicitopt
from benchmarks.families import Draw, Problem
from benchmarks.paper import paper
from implicitopt import SQP, Adaptive, Joint, OneShot

__all__ = ["measure", "shear", "table"]

MAX_STEPS, BATCH = 400, 16
SIZES, NORMS = (2, 6, 20), (1.0, 10.0, 100.0, 1000.0)
SOLVERS: dict[str, Callable[[], Any]] = {
    "default": Adaptive, "Joint": Joint, "SQP": SQP, "Adaptive(SQP())": lambda: Adaptive(SQP()),
    "OneShot": OneShot, "paper": lambda: paper(damped=False),
}  # fmt: skip


def shear(n: int, norm: float, *, seed: int = 0) -> Problem:
    """Maps of n states and as many inputs, ‖N‖₂ = ``norm``."""
    draw = Draw(seed)
    upper = draw(BATCH, n, n).triu(1)
    upper = norm * upper / torch.linalg.matrix_norm(upper, 2, keepdim=True)
    A = upper + torch.diag_embed(0.9 * draw(BATCH, n).tanh())
    y = draw(BATCH, n)

    def f(z: Tensor, x: Tensor) -> Tensor:
        return torch.einsum("bij,bj->bi", A, z) + x

    def loss(z: Tensor, x: Tensor) -> Tensor:
        return (z - y).square().sum(-1) + 0.1 * x.square().sum(-1)

    return Problem(f, loss, torch.zeros_like(y), torch.zeros_like(y))


#: size and ‖N‖ -> solver -> median of the sweeps, and the unsolved
Found = dict[str, dict[str, tuple[int, int]]]


def measure(*, quick: bool, bar: Callable[..., Any]) -> Found:
    """Every size and norm with every solver."""
    cases = [(n, norm) for n in SIZES for norm in NORMS]
    found: Found = {}
    for n, norm in bar(cases[:1] if quick else cases, desc="shears"):
        row = found[f"{n} states, ‖N‖ {norm:g}"] = {}
        for solver, make in SOLVERS.items():
            with torch.no_grad():
                sol = implicitopt.solve(
                    *shear(n, norm), solver=make(), tol=1e-6, max_steps=MAX_STEPS
                )
            lost = int((~sol.converged).sum())
            steps = sol.steps.masked_fill(~sol.converged, MAX_STEPS).sort().values
            row[solver] = (int(steps[BATCH // 2]), lost)
    return found


def table(found: Found) -> str:
    """A row per size and norm; the median, and how many were not solved in brackets."""
    rows = [
        [name, *(f"{n}" if lost == 0 else f"{n} ({lost})" for n, lost in row.values())]
        for name, row in found.items()
    ]
    header = ["median (unsolved of 16)", *SOLVERS]
    return tabulate(rows, header, tablefmt="github", disable_numparse=True)
