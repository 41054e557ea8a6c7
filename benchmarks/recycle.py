"""What a solve's own differences spare its backward pass, in Krylov steps.

The profile's problems without a constraint, solved by the default to their residual; then the
gradient of ‖x*‖² in a shift of x under ``Implicit()`` and under ``Implicit(recycle=0)``, to
1e-10 in float64 and to 1e-5 in float32. A step is a product, of about two sweeps.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from tabulate import tabulate

import implicitopt
from benchmarks.problems import Setting, problems
from implicitopt import Implicit

__all__ = ["measure", "steps", "table"]

#: Steps of each problem, without and with.
Found = dict[str, dict[str, list[int]]]


def steps(setting: Setting, recycle: int | None) -> list[int]:
    """Krylov steps of each problem's system."""
    f, loss, x0, *z0 = setting.arguments
    shift = torch.zeros_like(x0[:1]).requires_grad_()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", implicitopt.AdjointWarning)
        sol = implicitopt.solve(
            lambda z, x: f(z, x + shift), loss, x0, *z0, tol=setting.tol, max_steps=300,
            adjoint=Implicit(recycle=recycle),
        )  # fmt: skip
        torch.autograd.grad(sol.x.square().sum(), shift)
    assert sol.adjoint.steps is not None  # as backward has run
    found: list[int] = sol.adjoint.steps.tolist()
    return found


def measure(*, quick: bool, bar: Callable[..., Any]) -> Found:
    """problem -> "without", "with" -> steps of each problem of the batch."""
    made = {name: make() for name, make in problems().items()}
    smooth = {name: setting for name, setting in made.items() if not setting.options}
    names = list(smooth)[:: 12 if quick else 1]
    return {
        name: {"without": steps(smooth[name], 0), "with": steps(smooth[name], None)}
        for name in bar(names, desc="recycle")
    }


def table(found: Found) -> str:
    """A row per kind of problem and residual; a batch goes on until its last problem is done."""
    groups: dict[str, list[dict[str, list[int]]]] = {}
    for name, row in found.items():
        kind, *_, target = name.split(", ")
        groups.setdefault(f"{kind}, {target}", []).append(row)
    rows = []
    for name, group in groups.items():
        flat = {key: [n for row in group for n in row[key]] for key in ("without", "with")}
        batches = {key: sum(max(row[key]) for row in group) / len(group) for key in flat}
        more = max(b - a for a, b in zip(flat["without"], flat["with"], strict=True))
        rows.append([
            name, f"{len(flat['with'])}", f"{median(flat['without']):.0f}",
            f"{median(flat['with']):.0f}", f"{batches['without']:.0f}", f"{batches['with']:.0f}",
            f"{more:+d}",
        ])  # fmt: skip
    header = [
        "Krylov steps", "problems", "median, recycle=0", "median", "batch, recycle=0", "batch",
        "most more",
    ]  # fmt: skip
    return tabulate(rows, header, "github", disable_numparse=True)
