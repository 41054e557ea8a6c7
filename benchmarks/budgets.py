"""What a solve of few sweeps comes to, by the rule that says which iterate is returned.

A budget of 5 to 30 sweeps is what training can afford. Of what the loss falls between the start
and the lowest loss that any of these solves found, both at the true equilibria of their inputs, the
share that is still to go is shown: 100 % is the start, more is worse than that.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from tabulate import tabulate

from benchmarks.problems import Setting
from benchmarks.profile import losses, run
from implicitopt import Best, Joint, Last, OneShot, PaperRule

__all__ = ["measure", "table"]

BUDGETS = (5, 10, 15, 20, 30)
SOLVERS: dict[str, Callable[[], Any]] = {
    "default": lambda: None, "Joint": Joint, "OneShot": OneShot,
}  # fmt: skip
RULES = {"best": Best(), "best, small 0.03": Best(small=0.03), "last": Last(), "paper": PaperRule()}


def measure(
    made: dict[str, Callable[[], Setting]], *, quick: bool, bar: Callable[..., Any]
) -> dict[str, dict[str, list[float]]]:
    """problem -> solver and rule -> the median share to go over its batch, with each budget."""
    problems = {name.rpartition(", to ")[0] or name: make for name, make in reversed(made.items())}
    found = {}
    for name in bar(list(problems)[:: 12 if quick else 1], desc="budgets"):
        setting = problems[name]()
        sign = -1 if setting.options.get("maximize") else 1
        rows = {
            f"{solver}, {rule}": torch.stack([
                sign * losses(setting, run(setting, make(), budget, 0.0, select=select)[0].x)
                for budget in BUDGETS
            ])
            for solver, make in SOLVERS.items()
            for rule, select in RULES.items()
        }  # fmt: skip
        start = sign * losses(setting, setting.arguments[2])
        lowest = torch.stack([row.nan_to_num(nan=torch.inf) for row in rows.values()]).amin((0, 1))
        found[name] = {
            key: ((row - lowest) / (start - lowest)).median(dim=1).values.tolist()
            for key, row in rows.items()
        }
    return found


def table(found: dict[str, dict[str, list[float]]]) -> str:
    """A row per solver and rule: means over the problems, none counted for more than 200 %."""
    rows = []
    for key in next(iter(found.values())):
        shares = torch.tensor([row[key] for row in found.values()]).nan_to_num(nan=2).clamp(max=2)
        rows.append([key, *(f"{100 * share:.0f}" for share in shares.mean(dim=0).tolist())])
    header = ["% of the way still to go", *(f"{budget} sweeps" for budget in BUDGETS)]
    return tabulate(rows, header, tablefmt="github", disable_numparse=True)
