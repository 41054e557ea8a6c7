"""The cost of a solve against its sweeps and seconds, for one decoder and several solvers."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

import implicitopt
from experiment import solver as named
from generators.equilibrium import equilibrium, matching
from mdeq import Decoder

RATES = (0.05, 0.1, 0.2)  # of nested Adam; the best is shown


@dataclass(frozen=True)
class Point:
    """What a solver that was given so many steps, from the beginning, reached.

    Args:
        loss: the mean over the images, at the true equilibrium of the codes found.
        seconds: of the solve.
        steps: sweeps; for nested Adam, updates of the codes.
        f, vjp: evaluations of the map and of its transposed Jacobian.
    """

    loss: float
    seconds: float
    steps: int
    f: int
    vjp: int


@dataclass(frozen=True)
class Curve:
    """The points of one solver, from few steps to many."""

    solver: str
    points: tuple[Point, ...]


@torch.no_grad()
def true_loss(decoder: Decoder, target: Tensor, decay: float, codes: Tensor) -> float:
    """The mean loss of codes over the images, at their true equilibrium."""
    return matching(decoder, target, decay)(equilibrium(decoder, codes), codes).mean().item()


@torch.no_grad()
def reach(decoder: Decoder, target: Tensor, decay: float, solver: Any, steps: int) -> Point:
    """What a solver comes to in so many steps, from codes of 0."""
    loss = matching(decoder, target, decay)
    start = target.new_zeros(len(target), decoder.latent)
    begin = time.perf_counter()
    options = {"solver": solver, "max_steps": steps, "tol": 0}
    sol = implicitopt.solve(decoder.f, loss, start, decoder.start, **options)
    sol.value.sum().item()  # waits for the device
    seconds = time.perf_counter() - begin
    reached = true_loss(decoder, target, decay, sol.x)
    return Point(reached, seconds, steps, sol.sweeps.f, sol.sweeps.vjp)


def race(
    decoder: Decoder,
    target: Tensor,
    decay: float,
    *,
    sweeps: Sequence[int],
    updates: Sequence[int],
    memory: int,
    step_size: float,
    bar: Callable[..., Any],
) -> list[Curve]:
    """Codes of the targets from 0, by each solver, with each budget.

    Args:
        decoder, target, decay: the problems.
        sweeps: the budgets of the solvers that count sweeps.
        updates: those of nested Adam.
        memory: of the joint and of the paper's solver.
        step_size: of the paper's solver.
    """
    point = partial(reach, decoder, target, decay)
    joint = {"default": None, "joint": named("joint", memory=memory), "one-shot": named("one-shot")}
    joint["paper"] = named("paper", memory=memory, x=step_size)
    adam = {
        rate: implicitopt.Nested(partial(torch.optim.Adam, lr=rate), inner_steps=20)
        for rate in RATES
    }
    point(None, 2)  # the first call of anything is slow
    todo = [(name, s, sweeps) for name, s in joint.items()]
    todo += [(f"nested Adam, rate {rate:g}", s, updates) for rate, s in adam.items()]
    curves = [
        Curve(name, tuple(point(solver, steps) for steps in budgets))
        for name, solver, budgets in bar(todo, desc="solvers")
    ]
    nested = min(curves[len(joint) :], key=lambda curve: curve.points[-1].loss)
    return [*curves[: len(joint)], nested]


def seconds_to(curve: Curve, loss: float) -> float | None:
    """The least seconds in which the curve came down to a loss; None if it never did."""
    return min((p.seconds for p in curve.points if p.loss <= loss), default=None)
