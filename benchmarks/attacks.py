"""Attacks on a classifier with many inputs, and few of them within their bounds: sweeps to 1e-4.

An equilibrium classifier z = tanh(Wz + Ux + b) of 64 states and 300 inputs in [0, 1], 10 classes;
32 inputs of two random models are changed so that the cross-entropy of their class is largest. At
most 300 sweeps.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor

import implicitopt
from benchmarks.families import Draw, scaled
from benchmarks.paper import paper
from implicitopt import SQP, Adaptive, Box, Joint, L2Ball, LinfBall, OneShot

__all__ = ["classifier", "measure", "table"]

MAX_STEPS, TOL, BATCH = 300, 1e-4, 16
#: Where an attack on ``x`` may go.
BOUNDS: dict[str, Callable[[Tensor], Callable[[Tensor], Tensor]]] = {
    "L2 ball of 1": lambda x: L2Ball(1.0, center=x),
    "L∞ ball of .05": lambda x: LinfBall(0.05, center=x),
    "[0, 1]": lambda x: Box(0.0, 1.0),
}
SOLVERS: dict[str, Callable[[], Any]] = {
    "default": Adaptive, "SQP": SQP, "Joint": Joint, "Adaptive(Joint())": lambda: Adaptive(Joint()),
    "OneShot": OneShot, "paper": lambda: paper(damped=False),
}  # fmt: skip


def classifier(seed: int) -> tuple[Any, ...]:
    """The arguments of ``solve`` that attack a random model at random inputs."""
    draw, n, d = Draw(seed), 64, 300
    W, U, b = scaled(draw, n, 0.9, "gauss"), draw(n, d) / d**0.5, 0.1 * draw(n)
    C, labels = draw(10, n) / n**0.5, torch.arange(BATCH) % 10
    x = draw(BATCH, d).sigmoid()

    def f(z: Tensor, x: Tensor) -> Tensor:
        return torch.tanh(z @ W.T + x @ U.T + b)

    def loss(z: Tensor, x: Tensor) -> Tensor:
        return torch.nn.functional.cross_entropy(3 * z @ C.T, labels, reduction="none")

    return f, loss, x, x.new_zeros(BATCH, n)


#: bound -> solver -> median sweeps, most sweeps, how many not solved, mean loss
Found = dict[str, dict[str, tuple[int, int, int, float]]]


def measure(*, quick: bool, bar: Callable[..., Any]) -> Found:
    """Every bound with every solver."""
    found: Found = {}
    for name, bound in bar(
        dict(list(BOUNDS.items())[: 1 if quick else None]).items(), desc="attacks"
    ):
        found[name] = {}
        for solver, make in SOLVERS.items():
            steps, losses = [], []
            for seed in range(1 if quick else 2):
                f, loss, x, z = classifier(seed)
                with torch.no_grad():
                    sol = implicitopt.solve(
                        f, loss, x, z, solver=make(), project=bound(x), maximize=True, tol=TOL,
                        max_steps=MAX_STEPS,
                    )  # fmt: skip
                steps += sol.steps.masked_fill(~sol.converged, MAX_STEPS + 1).tolist()
                losses += sol.value.tolist()
            lost = sum(n > MAX_STEPS for n in steps)
            ranked = sorted(steps)
            found[name][solver] = (
                ranked[len(ranked) // 2], ranked[-1], lost, sum(losses) / len(losses)
            )  # fmt: skip
    return found


def table(found: Found) -> str:
    """A row per bound; median / worst sweeps, the unsolved in brackets, the loss reached."""
    rows = [
        [
            name,
            *(
                (f"{middle} / {worst}" if lost == 0 else f"{middle} / – ({lost})") + f", {loss:.3f}"
                for middle, worst, lost, loss in row.values()
            ),
        ]
        for name, row in found.items()
    ]
    header = ["median / worst (unsolved of 32), mean loss", *SOLVERS]
    return tabulate(rows, header, tablefmt="github", disable_numparse=True)
