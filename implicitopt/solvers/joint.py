"""The paper's method: state, adjoint and input as one fixed point, accelerated."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from implicitopt.accelerators.anderson import Anderson, AndersonState
from implicitopt.accelerators.protocol import (
    Accelerator,
    Restartable,
    accelerate,
    check_accelerator,
    take_rows,
)
from implicitopt.kkt import KKT, Point, Sweep, choose, norm, some
from implicitopt.options import check_option
from implicitopt.rows import take
from implicitopt.solvers.step_size import LOOKS, WARMUP, StepSize

__all__ = ["Joint", "StepSizes"]

#: How far a step may go, as a share of 1 + ‖(z, μ, x)‖, where the step size in x is chosen here.
REACH = 0.25
#: A step beyond that may still be this share of the plain one.
SHARE_OF_PLAIN = 0.5
#: Steps after which the step size in x is no longer looked at.
SETTLED = LOOKS[-1] + 1


@dataclass(frozen=True)
class StepSizes:
    """The damping of the augmented iteration (JIIO eq. 11).

        z⁺ = z + α_z (f − z),   μ⁺ = μ + α_μ (μ⁺ − μ),   x⁺ = P_C(x − α_x ∇ₓL)

    Args:
        z, mu: α_z and α_μ in (0, 1].
        x: α_x > 0, a number, or a schedule ``step -> α_x``. None: found for each problem, in
            whatever units x and the loss come. It is 1, or less where the first plain steps would
            be longer than 1 + ‖x‖ (from a warm start with μ ≠ 0, than a hundredth of that). Where
            f then lands far from z the step is made again, shorter; where, up to step 18, the
            gradient has hardly changed along the steps, it becomes one over the curvature met.

    Raises:
        ValueError: a number is not as above.

    >>> import torch, implicitopt
    >>> steps = implicitopt.StepSizes(z=0.8, mu=0.6, x=lambda step: 0.6 if step < 30 else 0.2)
    >>> sol = implicitopt.solve(
    ...     lambda z, x: torch.tanh(0.5 * z + x), lambda z, x: ((z - 0.3) ** 2).sum(-1),
    ...     torch.zeros(2, 3), solver=implicitopt.Joint(steps=steps),
    ... )
    >>> sol.converged.tolist()
    [True, True]
    """

    z: float = 1.0
    mu: float = 1.0
    x: float | Callable[[int], float] | None = None

    def __post_init__(self) -> None:
        for name, value in (("z", self.z), ("mu", self.mu)):
            check_option(f"StepSizes {name}", value, float, above=0, most=1)
        if self.x is not None and not callable(self.x):
            check_option("StepSizes x", self.x, float, above=0)

    def in_x(self, step: int) -> float | Tensor | None:
        """α_x of this step, if it is given."""
        if not callable(self.x):
            return self.x
        alpha: float | Tensor = self.x(step)
        if isinstance(alpha, Tensor) and alpha.numel() == 1:
            return alpha.detach().reshape(())
        if not (isinstance(alpha, Real) and alpha >= 0):
            raise ValueError(
                f"StepSizes x(step) must return a number of at least 0; got {alpha!r} for step "
                f"{step}. Return one step size, for all problems."
            )
        return alpha


@dataclass(frozen=True)
class Joint:
    """Iterate z, μ and x at once, one sweep a step, with an accelerator.

    Args:
        accelerator: ``Anderson(...)``, ``Broyden(...)``, ``Picard(...)`` or your own, on the
            ``(B, 2n + d)`` matrix of the blocks z, μ and x side by side.
        steps: the damping of the three blocks.
        reach: a step may be this share of 1 + ‖v‖ long, v = (z, μ, x), or half the plain step
            F(v) − v where that is longer; a longer one is cut. Extrapolation from a nearly
            singular system would otherwise leave the region that the differences tell of. None:
            0.25, and no limit where ``steps.x`` is given, so that eq. 11 holds as written.

    With a constraint x is projected in the iteration and again after the accelerator's mixing,
    which would leave C. A problem that becomes non-finite goes back to its best iterate with a
    quarter of its step size and no history.

    Raises:
        TypeError, ValueError: an option is not as above.

    Source: JIIO, algorithm 1 and eq. 9-11.

    >>> import torch, implicitopt
    >>> sol = implicitopt.solve(
    ...     lambda z, x: torch.tanh(0.5 * z + x), lambda z, x: ((z - 0.3) ** 2).sum(-1),
    ...     torch.zeros(2, 3), solver=implicitopt.Joint(implicitopt.Anderson("II", memory=10)),
    ... )
    >>> sol.converged.tolist()
    [True, True]
    """

    accelerator: Accelerator = field(default_factory=Anderson)
    steps: StepSizes = field(default_factory=StepSizes)
    reach: float | None = None

    def __post_init__(self) -> None:
        check_accelerator("Joint accelerator", self.accelerator)
        if not isinstance(self.steps, StepSizes):
            raise TypeError(
                f"Joint steps must be StepSizes(...); got {self.steps!r}. Pass StepSizes(x=0.2), "
                "say, or leave it out for the default."
            )
        if self.reach is not None:
            check_option("Joint reach", self.reach, float, above=0)

    @property
    def initial_sweeps(self) -> int:
        """Every sweep is a step."""
        return 0

    def init(self, kkt: KKT, start: Point) -> tuple[Point, JointState]:
        inner = self.accelerator.init(torch.cat(start, dim=1))
        return start, JointState(StepSize.at(start), inner)

    def step(
        self, kkt: KKT, point: Point, sweep: Sweep, state: JointState
    ) -> tuple[Point, JointState]:
        step, size, given = state.count, state.size, self.steps.in_x(state.count)
        state.count += 1
        warming, too_long = given is None and step < WARMUP, None
        if warming:
            size.fit(point, sweep)
        elif given is not None:
            size.alpha = size.shrink * given
        elif isinstance(self.accelerator, Restartable):
            too_long = size.shorten(step, point, sweep)
            too_short = size.lengthen(step, point, sweep)
            if too_short is not None and some(too_short):
                self._forget(state, too_short)
        n, v, r = point.z.shape[1], point.joined(), self._residual(kkt, point, sweep, size.alpha)
        if warming:
            mixed = v + r
        else:
            mixed, state.inner = accelerate(self.accelerator, state.inner, v, r)
        moved = Point.split(self._within_reach(v, r, mixed, sweep.sizes.whole), n)
        if too_long is not None:
            moved = choose(too_long, size.back(point), moved)
            self._forget(state, too_long)
        if kkt.project is not None:  # mixing leaves C
            moved = moved._replace(x=kkt.constrain(moved.x))
        return moved, state

    def _residual(self, kkt: KKT, point: Point, sweep: Sweep, alpha: Tensor) -> Tensor:
        """F(v) − v of the damped iteration, eq. 11."""
        r = sweep.r.clone()
        off_z, off_mu, off_x = Point.split(r, point.z.shape[1])
        for block, damping in ((off_z, self.steps.z), (off_mu, self.steps.mu)):
            if damping != 1:
                block.mul_(damping)
        off_x.mul_(alpha)
        if kkt.project is not None:
            off_x.copy_(kkt.constrain(point.x + off_x) - point.x)
        return r

    def _within_reach(self, v: Tensor, r: Tensor, mixed: Tensor, whole: Tensor) -> Tensor:
        """The accelerator's step, cut per problem where it is too long."""
        if self.reach is None and self.steps.x is not None:
            return mixed
        reach = REACH if self.reach is None else self.reach
        longest = torch.maximum(reach * whole, SHARE_OF_PLAIN * norm(r))
        step = mixed - v
        length = norm(step)
        far = (length > longest) & (length < math.inf)
        if not some(far):
            return mixed
        share = (longest / length).to(v.dtype)[:, None]
        return torch.where(far[:, None], v + share * step, mixed)

    def restart(self, state: JointState, mask: Tensor) -> JointState:
        state.size.restart(mask)
        self._forget(state, mask)
        return state

    def join(self, start: Point, steps: int) -> JointState:
        """A state for problems that will ``enter`` it, after ``steps`` of another solver.

        What becomes of one does not depend on whether it, or a neighbour before it, had this made.
        """
        inner = self.accelerator.init(start.joined())
        if isinstance(inner, AndersonState):
            inner.age(steps)
        return JointState(StepSize.at(start), inner, SETTLED)

    def enter(self, state: JointState, mask: Tensor, alpha: Tensor) -> JointState:
        """Begin anew, for the problems in ``mask``, with ``alpha``, ``(B, 1)``."""
        state.size.alpha = torch.where(mask[:, None], alpha, state.size.alpha)
        self._forget(state, mask)
        return state

    def _forget(self, state: JointState, mask: Tensor) -> None:
        """The accelerator's history of the problems in ``mask``, where it can."""
        if isinstance(self.accelerator, Restartable):
            state.inner = self.accelerator.restart(state.inner, mask)

    def take(self, state: JointState, rows: Tensor) -> JointState:
        """The state of the problems ``rows`` alone."""
        inner = take_rows("Joint accelerator", self.accelerator, state.inner, rows)
        return JointState(take(state.size, rows), inner, state.count)


@dataclass
class JointState:
    """The step size in x, the accelerator's state, and the steps made."""

    size: StepSize
    inner: Any
    count: int = 0
