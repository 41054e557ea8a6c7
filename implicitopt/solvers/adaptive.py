"""The default: SQP, and the joint iteration and descent for the problems it makes no headway on."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from implicitopt.kkt import KKT, Point, Sweep, choose, norm
from implicitopt.options import check_option
from implicitopt.rows import take
from implicitopt.solvers.joint import Joint
from implicitopt.solvers.one_shot import OneShot
from implicitopt.solvers.sqp import SQP

__all__ = ["Adaptive", "AdaptiveState"]

#: A problem stays with a solver while each ``patience`` steps bring its lowest KKT
#: residual below this share of what it was.
SHARE = 0.5
#: A state residual at which an iterate's score means something here. Farther from any equilibrium,
#: as what a solve returns may be, descent would run away where there is none.
FEASIBLE = 1e-2


@dataclass(frozen=True)
class Adaptive:
    """``SQP`` first, then ``Joint`` and ``OneShot``, for each problem that makes no headway.

    SQP needs the fewest sweeps on nearly every problem; what its model fits badly, the joint
    iteration may solve, and the one-shot iteration descends from anywhere. Every ``patience`` steps
    a problem whose lowest KKT residual has not fallen enough since the last look goes on with the
    next solver, from its lowest loss so far, as far as an iterate tells (from its smallest state
    residual, where none was small yet); the others, and its neighbours, do not notice.

    Args:
        first: ``SQP(...)``, or ``Joint(...)``, which does a quarter of the work of its own a sweep
            and keeps half of the memory, for up to twice the sweeps: what training, with a few
            sweeps a step, may want. What SQP makes no headway on goes to ``Joint()``, and then to
            ``one_shot``.
        one_shot: ``OneShot(...)``.
        patience: steps between looks; the first one comes after two of them.

    Raises:
        TypeError, ValueError: an option is not as above.

    >>> import torch, implicitopt
    >>> sol = implicitopt.solve(
    ...     lambda z, x: torch.tanh(0.5 * z + x), lambda z, x: ((z - 0.3) ** 2).sum(-1),
    ...     torch.zeros(2, 3), solver=implicitopt.Adaptive(patience=20),
    ... )
    >>> sol.converged.tolist()
    [True, True]
    """

    first: SQP | Joint = field(default_factory=SQP)
    one_shot: OneShot = field(default_factory=OneShot)
    patience: int = 40

    def __post_init__(self) -> None:
        for name, value, kinds in (
            ("first", self.first, (SQP, Joint)),
            ("one_shot", self.one_shot, (OneShot,)),
        ):
            if not isinstance(value, kinds):
                wanted = " or ".join(f"{kind.__name__}(...)" for kind in kinds)
                raise TypeError(
                    f"Adaptive {name} must be {wanted}; got {value!r}. Pass one, or leave it out "
                    "for the default."
                )
        check_option("Adaptive patience", self.patience, int, least=1)

    @property
    def initial_sweeps(self) -> int:
        """Every sweep is a step."""
        return 0

    @property
    def solvers(self) -> tuple[Any, ...]:
        """In the order in which a problem comes to them."""
        between = (Joint(),) if isinstance(self.first, SQP) else ()
        return (self.first, *between, self.one_shot)

    def init(self, kkt: KKT, start: Point) -> tuple[Point, AdaptiveState]:
        first, *others = self.solvers
        states = [first.init(kkt, start)[1], *(None for _ in others)]
        inf = torch.full_like(norm(start.x), math.inf)
        at_first = torch.zeros_like(inf, dtype=torch.int64)
        return start, AdaptiveState(
            states, at_first, start, score=inf, off=inf, total=inf, lowest=inf, before=inf,
            moving=at_first > 0,
        )  # fmt: skip

    def step(
        self, kkt: KKT, point: Point, sweep: Sweep, state: AdaptiveState
    ) -> tuple[Point, AdaptiveState]:
        state.count += 1
        state.look(point, sweep)
        moved = point
        for at, solver in enumerate(self.solvers):
            if state.states[at] is not None:
                found, state.states[at] = solver.step(kkt, point, sweep, state.states[at])
                moved = choose(state.solver == at, found, moved)
        if state.count % self.patience == 0:
            moved = self._choose(moved, state)
        return moved, state

    def _choose(self, moved: Point, state: AdaptiveState) -> Point:
        """Send the problems without headway over to their next solver."""
        solvers, states = self.solvers, state.states
        slow = state.moving & (state.lowest > SHARE * state.before)
        stuck = slow & (state.solver < len(solvers) - 1)
        state.moving = torch.zeros_like(stuck)
        if not bool(stuck.any()):  # a host sync, every ``patience`` steps
            state.before = state.lowest
            return moved
        state.solver = state.solver + stuck.long()
        state.lowest = torch.where(stuck, math.inf, state.lowest)
        state.before = state.lowest
        for at, solver in enumerate(solvers):
            enter = stuck & (state.solver == at)
            if not bool(enter.any()):
                continue
            if states[at] is None:
                states[at] = solver.join(state.best, state.count)
            if isinstance(solver, Joint):  # after SQP
                states[at] = solver.enter(states[at], enter, states[0].alpha)
            else:
                states[at] = solver.enter(states[at], enter, state.best)
        return choose(stuck, state.best, moved)

    def restart(self, state: AdaptiveState, mask: Tensor) -> AdaptiveState:
        for at, solver in enumerate(self.solvers):
            if state.states[at] is not None:
                state.states[at] = solver.restart(state.states[at], mask)
        return state

    def take(self, state: AdaptiveState, rows: Tensor) -> AdaptiveState:
        """The state of the problems ``rows`` alone."""
        states = [
            None if each is None else solver.take(each, rows)
            for solver, each in zip(self.solvers, state.states, strict=True)
        ]
        alone = replace(state, states=[])
        return replace(take(alone, rows), states=states)


@dataclass
class AdaptiveState:
    """The solvers' states, and per problem what the choice between them needs."""

    states: list[Any]  # of each solver; None until a problem comes to it
    solver: Tensor  # (B,) which of them the problem is with
    best: Point  # lowest score so far at a small state residual; before that, the smallest residual
    score: Tensor  # its score
    off: Tensor  # its state residual
    total: Tensor  # KKT residual of the last sweep
    lowest: Tensor  # lowest KKT residual of this solver so far
    before: Tensor  # ``lowest`` at the last look
    moving: Tensor  # (B,) whether it changed since then: it does not where a problem has finished
    count: int = 0

    def look(self, point: Point, sweep: Sweep) -> None:
        residuals = sweep.residuals
        lower = (residuals.z <= FEASIBLE) & (sweep.score < self.score) & (sweep.score > -math.inf)
        better = torch.where(self.off <= FEASIBLE, lower, residuals.z < self.off)
        self.best, self.score, self.off = choose(
            better,
            (Point(sweep.f, sweep.mu, point.x), sweep.score, residuals.z),
            (self.best, self.score, self.off),
        )
        self.moving = self.moving | (sweep.total != self.total)
        self.total = sweep.total
        self.lowest = torch.fmin(sweep.total, self.lowest)  # past NaN
