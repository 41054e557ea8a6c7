"""The paper's method: state, adjoint and input as one fixed point, accelerated."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from implicitopt.accelerators.anderson import Anderson
from implicitopt.accelerators.protocol import Accelerator, Restartable, check_accelerator
from implicitopt.inputs import check_option
from implicitopt.kkt import KKT, Point, Sweep, norm

__all__ = ["Joint", "StepSizes"]

#: Plain steps at the start, from which the step size in x is set.
WARMUP = 2
#: The step size in x that those start from.
LONGEST = 1.0
#: How far a step may go, as a share of 1 + ‖(z, μ, x)‖, where the step size in x is chosen here.
REACH = 0.25
#: A step beyond that may still be this share of the plain one.
SHARE_OF_PLAIN = 0.5


@dataclass(frozen=True)
class StepSizes:
    """The damping of the augmented iteration (JIIO eq. 11).

        z⁺ = z + α_z (f − z),   μ⁺ = μ + α_μ (μ⁺ − μ),   x⁺ = P_C(x − α_x ∇ₓL)

    Args:
        z, mu: α_z and α_μ in (0, 1].
        x: α_x > 0, a number, or a schedule ``step -> α_x``. None: for each problem 1, or less
            where the first plain steps would be longer than 1 + ‖x‖.

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
            if not isinstance(value, (int, float)) or not 0 < value <= 1:
                raise ValueError(f"StepSizes({name}=...) must lie in (0, 1]; got {value!r}")
        if self.x is not None and not callable(self.x) and not self.x > 0:
            raise ValueError(f"StepSizes(x=...) must be positive; got {self.x!r}")


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
            raise TypeError(f"Joint(steps=...) must be StepSizes(...); got {self.steps!r}.")
        if self.reach is not None:
            check_option("Joint reach", self.reach, float)
            if not self.reach > 0:
                raise ValueError(f"Joint reach must be positive, or None; got {self.reach}")

    @property
    def initial_sweeps(self) -> int:
        """Every sweep is a step."""
        return 0

    def init(self, kkt: KKT, start: Point) -> tuple[Point, JointState]:
        state = JointState(torch.full_like(start.x[:, :1], LONGEST))
        state.inner = self.accelerator.init(torch.cat(start, dim=1))
        return start, state

    def step(
        self, kkt: KKT, point: Point, sweep: Sweep, state: JointState
    ) -> tuple[Point, JointState]:
        warming = self.steps.x is None and state.count < WARMUP
        if warming:
            state.fit_alpha(point, sweep)
        elif self.steps.x is not None:
            alpha = self.steps.x(state.count) if callable(self.steps.x) else self.steps.x
            state.alpha = state.shrink * torch.full_like(state.alpha, alpha)
        state.count += 1
        z, mu, x = point
        z_next = z + self.steps.z * (sweep.f - z)
        mu_next = mu + self.steps.mu * (sweep.mu - mu)
        x_next = kkt.constrain(x - state.alpha * sweep.grad)
        v, Fv = torch.cat(point, dim=1), torch.cat((z_next, mu_next, x_next), dim=1)
        if warming:
            mixed = Fv
        else:
            mixed, state.inner = self.accelerator.step(state.inner, v, Fv)
        mixed = self._within_reach(v, Fv, mixed)
        z_next, mu_next, x_next = mixed.split([z.shape[1], z.shape[1], x.shape[1]], dim=1)
        return Point(z_next, mu_next, kkt.constrain(x_next)), state

    def _within_reach(self, v: Tensor, Fv: Tensor, mixed: Tensor) -> Tensor:
        """The accelerator's step, cut per problem where it is too long."""
        if self.reach is None and self.steps.x is not None:
            return mixed
        reach = REACH if self.reach is None else self.reach
        longest = torch.maximum(reach * (1 + norm(v)), SHARE_OF_PLAIN * norm(Fv - v))
        length = norm(mixed - v)
        far = (length > longest) & torch.isfinite(length)
        share = torch.where(far, longest / torch.where(far, length, 1.0), 1.0)[:, None]
        return torch.where(far[:, None], v + share.to(v.dtype) * (mixed - v), mixed)

    def restart(self, state: JointState, mask: Tensor) -> JointState:
        quarter = torch.where(mask[:, None], 0.25, 1.0).to(state.alpha.dtype)
        state.shrink, state.alpha = state.shrink * quarter, state.alpha * quarter
        if isinstance(self.accelerator, Restartable):
            state.inner = self.accelerator.restart(state.inner, mask)
        return state


@dataclass
class JointState:
    """Step sizes in x, ``(B, 1)``, and the accelerator's state."""

    alpha: Tensor
    inner: Any = None
    count: int = 0
    shrink: Tensor | float = 1.0

    def fit_alpha(self, point: Point, sweep: Sweep) -> None:
        """α_x as it is, or less where a plain step would be longer than 1 + ‖x‖."""
        reach, size = 1 + norm(point.x), norm(sweep.grad)
        long = (size > reach) & torch.isfinite(size)
        share = torch.where(long, reach / torch.where(long, size, 1.0), 1.0)
        self.alpha = torch.minimum(self.alpha, share[:, None].to(self.alpha.dtype))
