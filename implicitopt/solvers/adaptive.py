"""The default: the joint iteration, and one-shot descent for the problems it does not settle."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from implicitopt.kkt import KKT, Point, Sweep, choose, norm
from implicitopt.options import check_option
from implicitopt.rows import take
from implicitopt.solvers.joint import Joint
from implicitopt.solvers.one_shot import OneShot, OneShotState
from implicitopt.solvers.sqp import SQP

__all__ = ["Adaptive", "AdaptiveState"]

#: A problem stays with the joint iteration while each ``patience`` steps bring its lowest KKT
#: residual below this share of what it was.
SHARE = 0.5
#: A state residual at which an iterate's score means something here. Farther from any equilibrium,
#: as what a solve returns may be, descent would run away where there is none.
FEASIBLE = 1e-2


@dataclass(frozen=True)
class Adaptive:
    """``Joint`` first, then ``OneShot`` for each problem that ``Joint`` makes no headway on.

    The joint iteration needs the fewest sweeps near a solution and has no step control; the
    one-shot iteration descends from anywhere and needs more. Every ``patience`` steps a problem
    whose lowest KKT residual has not fallen enough since the last look goes on with ``one_shot``,
    from its lowest loss so far, as far as an iterate tells (from its smallest state residual, where
    none was small yet); the others, and its neighbours, do not notice.

    Args:
        joint: ``Joint(...)``, or ``SQP(...)``, for fewer sweeps and more work of its own a sweep.
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

    joint: Joint | SQP = field(default_factory=Joint)
    one_shot: OneShot = field(default_factory=OneShot)
    patience: int = 32

    def __post_init__(self) -> None:
        for name, value, kinds in (
            ("joint", self.joint, (Joint, SQP)),
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

    def init(self, kkt: KKT, start: Point) -> tuple[Point, AdaptiveState]:
        _, joint = self.joint.init(kkt, start)
        infinite = torch.full_like(norm(start.x), float("inf"))
        none = torch.zeros_like(infinite, dtype=torch.bool)
        return start, AdaptiveState(joint, start, infinite, infinite, infinite, infinite, none)

    def step(
        self, kkt: KKT, point: Point, sweep: Sweep, state: AdaptiveState
    ) -> tuple[Point, AdaptiveState]:
        state.count += 1
        state.look(point, sweep)
        moved, state.joint = self.joint.step(kkt, point, sweep, state.joint)
        if state.one_shot is not None:
            other, state.one_shot = self.one_shot.step(kkt, point, sweep, state.one_shot)
            moved = choose(state.descending, other, moved)
        if state.count % self.patience == 0:
            moved = self._choose(kkt, moved, state)
        return moved, state

    def _choose(self, kkt: KKT, moved: Point, state: AdaptiveState) -> Point:
        """Send the problems without headway over to the one-shot iteration."""
        stuck = ~state.descending & (state.lowest > SHARE * state.before)
        state.before = state.lowest
        if not bool(stuck.any()):  # a host sync, every ``patience`` steps
            return moved
        if state.one_shot is None:
            state.one_shot = self.one_shot.join(state.best, state.count)
        state.one_shot = self.one_shot.enter(state.one_shot, stuck, state.best)
        state.descending = state.descending | stuck
        return choose(stuck, state.best, moved)

    def restart(self, state: AdaptiveState, mask: Tensor) -> AdaptiveState:
        state.joint = self.joint.restart(state.joint, mask)
        if state.one_shot is not None:
            state.one_shot = self.one_shot.restart(state.one_shot, mask)
        return state

    def take(self, state: AdaptiveState, rows: Tensor) -> AdaptiveState:
        """The state of the problems ``rows`` alone."""
        joint = self.joint.take(state.joint, rows)
        other = state.one_shot
        alone: Any = replace(state, joint=None, one_shot=None)
        part: AdaptiveState = take(alone, rows)
        return replace(
            part, joint=joint, one_shot=None if other is None else self.one_shot.take(other, rows)
        )


@dataclass
class AdaptiveState:
    """Both solvers' states, and per problem what the choice between them needs."""

    joint: Any  # that of its solver
    best: Point  # lowest score so far at a small state residual; before that, the smallest residual
    score: Tensor  # its score
    off: Tensor  # its state residual
    lowest: Tensor  # lowest KKT residual so far
    before: Tensor  # ``lowest`` at the last look
    descending: Tensor  # (B,) bool: gone over to the one-shot iteration
    one_shot: OneShotState | None = None  # made when the first problem goes over
    count: int = 0

    def look(self, point: Point, sweep: Sweep) -> None:
        residuals = sweep.residuals
        lower = (residuals.z <= FEASIBLE) & (sweep.score < self.score)
        better = torch.where(self.off <= FEASIBLE, lower, residuals.z < self.off)
        self.best, self.score, self.off = choose(
            better,
            (Point(sweep.f, sweep.mu, point.x), sweep.score, residuals.z),
            (self.best, self.score, self.off),
        )
        self.lowest = torch.fmin(sweep.total, self.lowest)  # past NaN
