"""Sequential quadratic programming on the KKT system, whose derivatives come from secants."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from implicitopt.accelerators.anderson import window
from implicitopt.kkt import KKT, Point, Sweep, norm
from implicitopt.options import check_option
from implicitopt.rows import take
from implicitopt.solvers.joint import REACH, SHARE_OF_PLAIN
from implicitopt.solvers.kkt_model import Model
from implicitopt.solvers.kkt_secants import KKTSecants
from implicitopt.solvers.secants import clip
from implicitopt.solvers.step_size import WARMUP, StepSize

__all__ = ["SQP"]

#: How many differences are kept where nobody says: at least and at most.
LEAST, MOST = 20, 30


@dataclass(frozen=True)
class SQP:
    """Newton's step on the KKT system, one sweep a step, with a model of it from secants.

    ``Joint`` accelerates z, μ and x as one vector and so needs a difference for each direction of
    all three together. Here they are taken apart: the sweeps' differences of states and of adjoints
    tell of ∂f from both sides, those of the loss's gradient of its Hessian. With each step the
    model is solved twice, and in between the loss alone is differentiated at the end of the step
    (one gradient of the loss more than a sweep has; no f).

    Args:
        memory: differences to keep, of five states and three inputs each. None: 30, fewer where z,
            μ and x are more than two thousand numbers, at least 20.
        reach: a step may be this share of 1 + ‖(z, μ, x)‖ long, or half the plain step where that
            is longer; a longer one is cut.

    Raises:
        TypeError, ValueError: an option is not as above.

    It takes no ``project``. Like ``Joint`` it has no step control but ``reach``:
    ``Adaptive(joint=SQP())`` adds one.

    Source: total quasi-Newton methods, Griewank and Walther 2002 (secants of ∂f from both sides);
    SQP with their updates, Diehl, Walther, Bock, Kostina 2010.

    >>> import torch, implicitopt
    >>> sol = implicitopt.solve(
    ...     lambda z, x: torch.tanh(0.5 * z + x), lambda z, x: ((z - 0.3) ** 2).sum(-1),
    ...     torch.zeros(2, 3), solver=implicitopt.SQP(),
    ... )
    >>> sol.converged.tolist()
    [True, True]
    """

    memory: int | None = None
    reach: float = REACH

    def __post_init__(self) -> None:
        if self.memory is not None:
            check_option("SQP memory", self.memory, int, least=1)
        check_option("SQP reach", self.reach, float, above=0)

    @property
    def initial_sweeps(self) -> int:
        """Every sweep is a step."""
        return 0

    def init(self, kkt: KKT, start: Point) -> tuple[Point, SQPState]:
        if kkt.project is not None:
            raise ValueError(
                "SQP() takes no constraint; got project=.... Use Adaptive(), Joint() or OneShot() "
                "with it."
            )
        kkt.apart = True
        memory = self.memory or window(sum(block.shape[1] for block in start), LEAST, MOST)
        return start, SQPState(StepSize.at(start), KKTSecants.empty(start, memory))

    def step(self, kkt: KKT, point: Point, sweep: Sweep, state: SQPState) -> tuple[Point, SQPState]:
        warming = state.count < WARMUP
        state.count += 1
        state.secants.push(point, sweep)
        if warming:
            state.size.fit(point, sweep)
        plain = sweep.r.clone()
        Point.split(plain, point.z.shape[1]).x.mul_(state.size.alpha)
        if warming:
            move = Point.split(plain, point.z.shape[1])
        else:
            model = Model(state.secants, sweep, state.size.alpha.double())
            self._probe(kkt, point, sweep, model)
            move = self._within_reach(model.step(), plain, sweep)
        return Point(*(a + b for a, b in zip(point, move, strict=True))), state

    def _probe(self, kkt: KKT, point: Point, sweep: Sweep, model: Model) -> None:
        """Look at ∇ℓ where the model's step would lead, as far as that is within reach."""
        dz, dx = model.response()
        length = torch.hypot(norm(dz), norm(dx))
        longest = self.reach * sweep.sizes.whole
        share = torch.where(length > longest, longest / length, 1.0)
        share = torch.where(length < math.inf, share, 0.0)[:, None].to(dz.dtype)
        dz, dx = (torch.where(share > 0, share * block, 0.0) for block in (dz, dx))
        there, here = kkt.loss_gradient(point.z + dz, point.x + dx), sweep.loss_grad
        assert here is not None
        model.probe((dz, dx), (there[0] - here[0], there[1] - here[1]))

    def _within_reach(self, move: Point, plain: Tensor, sweep: Sweep) -> Point:
        """The step, cut per problem where it is too long; the plain one where there is none."""
        v = move.joined()
        sound = norm(v) < math.inf
        v = torch.where(sound[:, None], v, plain)
        longest = torch.maximum(self.reach * sweep.sizes.whole, SHARE_OF_PLAIN * norm(plain))
        return Point.split(clip(v, longest), move.z.shape[1])

    def restart(self, state: SQPState, mask: Tensor) -> SQPState:
        """Start over, for the problems in ``mask``, with a quarter of the step size."""
        state.size.restart(mask)
        state.secants.forget(mask)
        return state

    def take(self, state: SQPState, rows: Tensor) -> SQPState:
        """The state of the problems ``rows`` alone."""
        return take(state, rows)


@dataclass
class SQPState:
    """The step size in x, the differences, and the steps made."""

    size: StepSize
    secants: KKTSecants
    count: int = 0
