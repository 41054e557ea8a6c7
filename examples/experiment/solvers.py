"""The solvers that ``--solver`` names."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

import implicitopt

#: The values of ``--solver``.
SOLVERS = (
    "joint-first", "default", "joint", "one-shot", "sqp", "paper", "nested-adam", "nested-pgd",
)  # fmt: skip


def mnist_steps(step: int) -> float:
    """The paper's step size in x for its MNIST model: 0.6, later 0.2."""
    return 0.6 if step < 40 else 0.2


def solver(
    name: str, *, memory: int = 20, x: float | Callable[[int], float] = mnist_steps
) -> Any | None:
    """The solver of that name, for ``implicitopt.solve(..., solver=...)``; None: the default one.

    Args:
        name: one of ``SOLVERS``.
        memory: of the "joint" and the "paper" solver's Anderson acceleration.
        x: the "paper" solver's step size in x, a number or a schedule ``step -> α_x``.

    "joint-first" is the joint iteration, and descent for what it does not settle: for training,
    where each visit has a few sweeps. With a "nested" solver ``max_steps`` counts updates of x;
    with any other, sweeps.
    """
    steps = implicitopt.StepSizes(z=0.8, mu=0.6, x=x)
    paper = implicitopt.Joint(implicitopt.Anderson("I", memory=memory, ridge=0), steps)
    made = {
        "joint-first": implicitopt.Adaptive(implicitopt.Joint()),
        "default": None,
        "joint": implicitopt.Joint(implicitopt.Anderson(memory=memory)),
        "one-shot": implicitopt.OneShot(),
        "sqp": implicitopt.SQP(),
        "paper": paper,
        "nested-adam": implicitopt.Nested(partial(torch.optim.Adam, lr=0.1)),
        "nested-pgd": implicitopt.Nested(partial(implicitopt.ProjectedGradient, lr=0.2)),
    }
    if name not in made:
        raise ValueError(f"solver must be one of {', '.join(made)}; got {name!r}.")
    return made[name]
