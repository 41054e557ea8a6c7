"""Against what people do now: nested Adam, and the paper's iteration, on trained decoders.

The mark is the loss, at the true equilibrium of the codes, that nested Adam has after 40 updates
with the best of five learning rates; each contestant is given growing budgets until it is there,
and is then timed in turn with the others. Adam's inner solves start from the state of the start
(cold) or of the last update (warm), with 20 iterations each, forward and adjoint. The paper's
iteration is to meet the loss that the default has after ``MARK_SWEEPS`` sweeps, too.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from tabulate import tabulate

import implicitopt
from benchmarks.clock import interleaved
from benchmarks.paper import paper
from benchmarks.problems import Setting
from benchmarks.profile import losses
from implicitopt import Nested

__all__ = ["measure", "table"]

RATES = (0.02, 0.05, 0.1, 0.2, 0.4)
UPDATES = 40
MOST_SWEEPS, MARK_SWEEPS = 200, 40


@dataclass(frozen=True)
class Run:
    """A solver with a budget, and the loss it came to."""

    solver: Any
    steps: int
    loss: float
    f: int
    vjp: int


@torch.no_grad()
def run(setting: Setting, solver: Any, steps: int) -> Run:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        sol = implicitopt.solve(*setting.arguments, solver=solver, max_steps=steps, tol=0)
    loss = losses(setting, sol.x).mean().item()
    return Run(solver, steps, loss, sol.sweeps.f, sol.sweeps.vjp)


def reach(setting: Setting, solver: Any, mark: float, most: int) -> Run | None:
    """The least budget with which a loss is reached, searched in steps of a tenth."""
    steps = 2
    while steps <= most:
        found = run(setting, solver, steps)
        if found.loss <= mark:
            return found
        steps = max(steps + 1, round(1.1 * steps))
    return None


def seconds(setting: Setting, runs: dict[str, Run], repeats: int) -> dict[str, float]:
    """Medians, the contestants in turn."""

    @torch.no_grad()
    def again(each: Run) -> None:
        implicitopt.solve(*setting.arguments, solver=each.solver, max_steps=each.steps, tol=0)

    return interleaved({name: partial(again, each) for name, each in runs.items()}, repeats=repeats)


def measure(
    made: dict[str, Callable[[], Setting]], *, quick: bool, bar: Callable[..., Any]
) -> dict[str, Any]:
    """decoder -> mark -> contestant -> its run and seconds; the decoders among ``made`` only."""
    found: dict[str, Any] = {}
    updates, repeats = (4, 1) if quick else (UPDATES, 3)
    todo = [name for name in made if name.startswith("decoder")]
    for name in bar(todo, desc="against Adam"):
        setting = made[name]()
        adam = {}
        for kind, warm in (("cold", False), ("warm", True)):
            tries = [
                run(setting, Nested(partial(torch.optim.Adam, lr=rate), warm=warm), updates)
                for rate in RATES
            ]
            adam[kind] = min(tries, key=lambda each: each.loss)
        marks = {f"nested Adam, {kind}": each.loss for kind, each in adam.items()}
        marks["default"] = run(setting, None, 5 if quick else MARK_SWEEPS).loss
        ours = {"default": None, "Joint, memory 40": _joint(), "OneShot": implicitopt.OneShot(),
                "paper": paper(damped=False), "paper, damped": paper(damped=True)}  # fmt: skip
        found[name] = {}
        for mark, loss in marks.items():
            runs = {
                n: reach(setting, s, loss, 20 if quick else MOST_SWEEPS) for n, s in ours.items()
            }
            if mark != "default":
                runs[mark] = adam[mark.rpartition(" ")[2]]
            took = seconds(setting, {n: r for n, r in runs.items() if r is not None}, repeats)
            found[name][mark] = {
                "loss": loss,
                "runs": {
                    n: None if r is None else {
                        "steps": r.steps, "f": r.f, "vjp": r.vjp, "seconds": took[n]
                    }
                    for n, r in runs.items()
                },
            }  # fmt: skip
    return found


def _joint() -> Any:
    return implicitopt.Joint(implicitopt.Anderson(memory=40))


def table(found: dict[str, Any]) -> str:
    """A row per contestant and mark."""
    rows = []
    for decoder, marks in found.items():
        for mark, entry in marks.items():
            runs = entry["runs"]
            own = runs["default"]["seconds"] if runs["default"] else None
            for name, r in runs.items():
                if r is None:
                    rows.append([decoder, mark, f"{entry['loss']:.4g}", name, *"––––"])
                    continue
                times = f"{r['seconds'] / own:.1f}" if own else "–"
                cells = [name, f"{r['f']} / {r['vjp']}", r["steps"], f"{r['seconds']:.3f}", times]
                rows.append([decoder, mark, f"{entry['loss']:.4g}", *cells])
    header = ["decoder", "to the loss of", "loss", "by", "f / vjp", "steps", "s", "default = 1"]
    return tabulate(rows, header, tablefmt="github", disable_numparse=True)
