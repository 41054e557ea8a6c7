"""The performance profile: in how many sweeps and seconds does each solver reach the target?

Every solver, as it comes, on every problem of ``benchmarks.problems``. A problem of KKT residual
``tol`` costs the sweeps it was active for (of f and its transposed product, halved where they
differ); a trained decoder's costs the least budget of a geometric series with which the loss, at
the true equilibrium of the codes, comes within 1 % of the best that any solver found. Of a batch
the median counts, and a batch is solved where at least half of it is. The profile of a solver is
the share of problems that it solves in at most τ times the cost of the best solver for each.

Source: Dolan and Moré, "Benchmarking optimization software with performance profiles", 2002.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate

import implicitopt
from benchmarks.clock import now
from benchmarks.paper import paper
from benchmarks.problems import Setting
from implicitopt import Adaptive, Anderson, Broyden, Joint, Nested, OneShot, ProjectedGradient

__all__ = ["SOLVERS", "draw", "measure", "profile", "table"]

MOST_SWEEPS, MOST_UPDATES = 300, 60
BUDGETS = [round(5 * 1.15**k) for k in range(27)]  # 5 … 189 sweeps
FACTORS = (1.0, 1.25, 2.0, 4.0)

SOLVERS: dict[str, Callable[[], Any]] = {
    "default": Adaptive,
    "Joint": Joint,
    "OneShot": OneShot,
    "Joint, Anderson II": lambda: Joint(Anderson("II")),
    "Joint, Broyden": lambda: Joint(Broyden("good")),
    "paper": lambda: paper(damped=False),
    "paper, damped": lambda: paper(damped=True),
    "nested Adam": lambda: Nested(partial(torch.optim.Adam, lr=0.1)),
    "nested L-BFGS": lambda: Nested(partial(torch.optim.LBFGS, lr=0.5, max_iter=1)),
    "nested PGD": lambda: Nested(partial(ProjectedGradient, lr=0.05)),
}


def applies(name: str, setting: Setting) -> bool:
    """L-BFGS of torch is for one problem; PGD's steps, of one length, need a constraint to end."""
    if name == "nested L-BFGS":
        return setting.batch == 1
    if name == "nested PGD":
        return "project" in setting.options
    return True


def run(
    setting: Setting, solver: Any, max_steps: int, tol: float, **options: Any
) -> tuple[Any, float, float]:
    """The solution, the sweeps of one step, and the seconds of a sweep."""
    begin = now()
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        sol = implicitopt.solve(
            *setting.arguments,
            solver=solver,
            max_steps=max_steps,
            tol=tol,
            **setting.options,
            **options,
        )
    work = (sol.sweeps.f + sol.sweeps.vjp) / 2
    return sol, work / max(int(sol.steps.max()), 1), (now() - begin) / work


def to_residual(setting: Setting, solver: Any) -> dict[str, Any]:
    """Sweeps to ``tol`` of each problem, None where not reached, and the seconds of a sweep."""
    most = MOST_UPDATES if isinstance(solver, Nested) else MOST_SWEEPS
    sol, work, seconds = run(setting, solver, most, setting.tol or 0.0)
    pairs = zip(sol.steps.tolist(), sol.converged.tolist(), strict=True)
    return {"sweeps": [steps * work if ok else None for steps, ok in pairs], "seconds": seconds}


@torch.no_grad()
def losses(setting: Setting, x: Any) -> torch.Tensor:
    """The loss of each problem at the true equilibrium of ``x``."""
    f, loss, _, start = setting.arguments
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", implicitopt.ConvergenceWarning)
        return loss(implicitopt.fixed_point(f, x, start, max_steps=300, tol=1e-4), x)


def at_budgets(setting: Setting, solver: Any, budgets: list[int]) -> dict[str, Any]:
    """The loss of each problem with each budget, and what the budgets are in sweeps."""
    nested = isinstance(solver, Nested)
    points = []
    for budget in budgets:
        if nested and budget > MOST_UPDATES:
            break
        sol, work, seconds = run(setting, solver, budget, 0.0)
        points.append((budget * work, losses(setting, sol.x).tolist(), seconds))
    spent, found, seconds = zip(*points, strict=True)
    return {"budgets": spent, "losses": found, "seconds": min(seconds)}


def to_loss(row: dict[str, dict[str, Any]]) -> None:
    """Fill in the sweeps to within 1 % of the best loss that any solver found."""
    every = torch.tensor([loss for entry in row.values() for loss in entry["losses"]])
    best = every.nan_to_num(nan=math.inf).min(dim=0).values
    for entry in row.values():
        reached = torch.tensor(entry["losses"]) <= best + 0.01 * best.abs()
        entry["sweeps"] = [
            next((b for b, ok in zip(entry["budgets"], each, strict=True) if ok), None)
            for each in reached.T.tolist()
        ]


def measure(
    made: dict[str, Callable[[], Setting]], *, quick: bool, bar: Callable[..., Any]
) -> dict[str, dict[str, Any]]:
    """problem -> solver -> {"sweeps": of each problem of the batch, "seconds": of a sweep}."""
    names = list(made)[:: 12 if quick else 1]
    found: dict[str, dict[str, Any]] = {}
    for name in bar(names, desc="profile"):
        setting, found[name] = made[name](), {}
        for solver, make in SOLVERS.items():
            if not applies(solver, setting):
                continue
            if setting.tol is None:
                budgets = BUDGETS[:: 6 if quick else 1]
                found[name][solver] = at_budgets(setting, make(), budgets)
            else:
                found[name][solver] = to_residual(setting, make())
        if setting.tol is None:
            to_loss(found[name])
    return found


def cost(entry: dict[str, Any] | None, unit: str) -> float:
    """The median over a batch, ∞ where half of it is not solved; in sweeps or in seconds."""
    if entry is None:
        return math.inf
    ranked = sorted(math.inf if n is None else n for n in entry["sweeps"])
    return ranked[(len(ranked) - 1) // 2] * (entry["seconds"] if unit == "seconds" else 1)


def profile(found: dict[str, dict[str, Any]], unit: str) -> dict[str, list[float]]:
    """Per solver and problem, the cost over the best solver's; ∞ where not solved."""
    ratios: dict[str, list[float]] = {name: [] for name in SOLVERS}
    for row in found.values():
        costs = {name: cost(row.get(name), unit) for name in SOLVERS}
        best = min(costs.values())
        for name, value in costs.items():
            ratios[name].append(value / best if math.isfinite(value) else math.inf)
    return ratios


def table(found: dict[str, dict[str, Any]]) -> str:
    """The profile at a few factors, and the problems solved one by one."""
    rows = []
    by_sweeps, by_seconds = profile(found, "sweeps"), profile(found, "seconds")
    for name in SOLVERS:
        shares = [
            f"{100 * sum(r <= factor for r in ratios[name]) / len(found):.0f}"
            for ratios in (by_sweeps, by_seconds)
            for factor in FACTORS
        ]
        of = [n for row in found.values() if name in row for n in row[name]["sweeps"]]
        solved = f"{100 * sum(n is not None for n in of) / len(of):.1f} of {len(of)}" if of else "–"
        rows.append([name, *shares, solved])
    factors = [f"{factor:g}" for factor in FACTORS]
    header = ["% within", *(f"{f}× sweeps" for f in factors), *(f"{f}× time" for f in factors)]
    shown = tabulate(rows, [*header, "% solved"], tablefmt="github", disable_numparse=True)
    each = [
        [name, *(f"{cost(row.get(solver), 'sweeps'):.0f}" for solver in SOLVERS)]
        for name, row in found.items()
    ]
    each_shown = tabulate(
        each, ["median sweeps", *SOLVERS], tablefmt="github", disable_numparse=True
    )
    return f"{shown}\n\n{each_shown}".replace(" inf ", "   – ")


def draw(found: dict[str, dict[str, Any]], path: Path) -> None:
    """The profile's curves, in sweeps and in seconds."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(10, 4), sharey=True, layout="constrained")
    for axis, unit in zip(axes, ("sweeps", "seconds"), strict=True):
        for name, ratios in profile(found, unit).items():
            ranked = sorted(r for r in ratios if math.isfinite(r))
            shares = [(k + 1) / len(ratios) for k in range(len(ranked))]
            axis.step(
                [1, *ranked, 100], [0, *shares, (shares or [0])[-1]], where="post", label=name
            )
        axis.set(xscale="log", xlim=(1, 20), ylim=(0, 1.03), xlabel=f"τ, in {unit}")
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("problems solved within τ of the best")
    axes[1].legend(loc="lower right", fontsize="small")
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
