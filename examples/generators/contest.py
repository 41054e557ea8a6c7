"""Runs of solvers on the same problems, watched sweep by sweep."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

import implicitopt
from generators.equilibrium import matching
from generators.race import Point, reach
from mdeq import Decoder


@dataclass(frozen=True)
class Contestant:
    """A solver, and the budgets it is given.

    Args:
        name: for people.
        solver: of ``implicitopt.solve``.
        budgets: its ``max_steps``, from few to many.
        alone: whether it solves one problem at a time, since it would couple those of a batch.
    """

    name: str
    solver: Any
    budgets: tuple[int, ...]
    alone: bool = False

    def parts(self, target: Tensor) -> list[Tensor]:
        """The problems as it is given them."""
        return list(target.split(1 if self.alone else len(target)))


@dataclass(frozen=True)
class Track:
    """A contestant's way, an entry a sweep; for nested solvers an entry an update of the codes.

    Args:
        work: evaluations of f and of its vjp so far, halved, so one a sweep; for a contestant
            that is alone, the mean over the problems.
        seconds: since the solve began; for a contestant that is alone, the sum over the problems.
        median, lower, upper: the quartiles over the problems of the lowest KKT residual so far.
    """

    work: list[float]
    seconds: list[float]
    median: list[float]
    lower: list[float]
    upper: list[float]


@dataclass(frozen=True)
class Result:
    """What a contestant did: losses at its budgets, and residuals on the way to the last one."""

    name: str
    points: tuple[Point, ...]
    track: Track

    def first(self, loss: float) -> Point | None:
        """The first point whose loss is as low."""
        return next((point for point in self.points if point.loss <= loss), None)


class Watched:
    """A solver that notes seconds and work after each sweep, and otherwise changes nothing."""

    def __init__(self, solver: Any) -> None:
        self.solver, self.notes = solver, []
        self.began = time.perf_counter()

    def note(self, work: Any, value: Tensor) -> None:
        value.sum().item()  # waits for the device
        self.notes.append((time.perf_counter() - self.began, (work.f + work.vjp) / 2))

    @property
    def initial_sweeps(self) -> int:
        return self.solver.initial_sweeps

    def init(self, kkt: Any, start: Any) -> tuple[Any, Any]:
        return self.solver.init(kkt, start)

    def step(self, kkt: Any, point: Any, sweep: Any, state: Any) -> tuple[Any, Any]:
        self.note(kkt.work, sweep.value)
        return self.solver.step(kkt, point, sweep, state)

    def restart(self, state: Any, mask: Tensor) -> Any:
        return self.solver.restart(state, mask)


@torch.no_grad()
def watch(decoder: Decoder, target: Tensor, decay: float, solver: Any, steps: int) -> list[Tensor]:
    """Seconds and work so far, each ``(steps,)``, and KKT residuals, ``(steps, B)``."""
    loss = matching(decoder, target, decay)
    start = target.new_zeros(len(target), decoder.latent)
    watched = Watched(solver)
    options = {"solver": watched, "max_steps": steps, "tol": 0, "history": True}
    sol = implicitopt.solve(decoder.f, loss, start, decoder.start, **options)
    watched.note(sol.sweeps, sol.value)  # no step follows the last sweep
    seconds, work = torch.tensor(watched.notes, dtype=torch.float64).T
    return [seconds, work, sol.history.residuals.total]


def lowest_so_far(residuals: Tensor) -> Tensor:
    """The running minimum over steps, dim 0; what is not finite does not count."""
    return residuals.nan_to_num(nan=torch.inf, posinf=torch.inf).cummin(dim=0).values


def padded(rows: Tensor, count: int) -> Tensor:
    """The rows, and the last one again until there are so many: an ended solve stays as it is."""
    return torch.cat([rows, rows[-1:].expand(count - len(rows), *rows.shape[1:])])


def run_once(
    decoder: Decoder, target: Tensor, decay: float, contestant: Contestant
) -> tuple[Tensor, Tensor, Tensor]:
    """Seconds, work and lowest residuals so far on the way to the contestant's last budget."""
    steps = contestant.budgets[-1]
    parts = contestant.parts(target)
    found = [watch(decoder, part, decay, contestant.solver, steps) for part in parts]
    longest = max(len(part[0]) for part in found)
    seconds, work, residuals = (
        [padded(entry, longest) for entry in column] for column in zip(*found, strict=True)
    )
    lowest = lowest_so_far(torch.cat(residuals, dim=1))
    return torch.stack(seconds).sum(dim=0), torch.stack(work).mean(dim=0), lowest


def point(
    decoder: Decoder, target: Tensor, decay: float, contestant: Contestant, steps: int
) -> Point:
    """What the contestant comes to with a budget: means over the problems, and all its seconds."""
    found = [
        reach(decoder, part, decay, contestant.solver, steps) for part in contestant.parts(target)
    ]
    mean = {
        name: sum(getattr(part, name) for part in found) / len(found)
        for name in ("loss", "f", "vjp")
    }
    seconds = sum(part.seconds for part in found)
    return Point(mean["loss"], seconds, steps, round(mean["f"]), round(mean["vjp"]))


def contest(
    decoder: Decoder,
    target: Tensor,
    decay: float,
    contestants: Sequence[Contestant],
    repeats: int,
    bar: Callable[..., Any],
) -> list[Result]:
    """Each contestant on the same problems, from codes of 0.

    Losses are from a solve for each budget, as a user would get them. Seconds are medians over
    repeats of the longest solve, all contestants taking turns.
    """
    points = {
        c.name: [point(decoder, target, decay, c, steps) for steps in c.budgets]
        for c in bar(contestants, desc="losses")
    }
    runs: dict[str, list] = {c.name: [] for c in contestants}
    for contestant in bar(list(contestants) * repeats, desc="residuals"):
        runs[contestant.name].append(run_once(decoder, target, decay, contestant))
    return [result(c, points[c.name], runs[c.name]) for c in contestants]


def result(contestant: Contestant, points: Sequence[Point], runs: Sequence[tuple]) -> Result:
    """The repeats as one: they differ in their seconds alone."""
    seconds = torch.stack([run[0] for run in runs]).quantile(0.5, dim=0)
    _, work, lowest = runs[0]
    share = lowest.new_tensor([0.25, 0.5, 0.75])
    lower, median, upper = lowest.quantile(share, dim=1)
    rows = (work, seconds, median, lower, upper)
    initial = contestant.solver.initial_sweeps
    timed = [
        replace(p, seconds=seconds[min(initial + p.steps, len(seconds)) - 1].item()) for p in points
    ]
    return Result(contestant.name, tuple(timed), Track(*(row.tolist() for row in rows)))
