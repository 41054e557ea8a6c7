"""Sequential quadratic programming on the KKT system, whose derivatives come from secants."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from implicitopt.accelerators.anderson import window
from implicitopt.kkt import KKT, Point, Sweep, choose, norm
from implicitopt.options import check_option
from implicitopt.rows import take
from implicitopt.solvers.joint import SHARE_OF_PLAIN
from implicitopt.solvers.kkt_model import Model, Move
from implicitopt.solvers.kkt_secants import KKTSecants
from implicitopt.solvers.step_size import WARMUP, StepSize

__all__ = ["SQP"]

#: How many differences are kept where nobody says: at least and at most.
LEAST, MOST = 20, 30
#: How far a step may go, as a share of 1 + ‖(z, μ, τ x)‖.
REACH = 0.7
#: The share of the reach that is x's, with what follows of it, however far states are off.
TANGENTIAL = 0.65
#: How far steps are trusted changes by one factor after a step for the worse, and by the other
#: after one that was not.
SHORTER, LONGER = 0.8, 1.2
#: A residual so many times the last one has grown.
GREW = 1.2
#: L may be off by so many times what two vectors of unrelated directions make: of n numbers each,
#: 1/√n of their lengths. And by so many units of rounding.
UNRELATED, ROUNDING = 3.0, 16


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
        reach: a step may be this share of 1 + ‖(z, μ, τ x)‖ long, or half the plain step where
            that is longer; a longer one is cut. The share is larger where f and the loss turn out
            to be nearly linear and quadratic, and smaller after steps for the worse.

    In these lengths, and wherever else x and z are compared, x is measured in units 1/τ in which
    ∂f/∂x is about as large as ∂f/∂z, so that it does not matter in which it comes. Of the longest
    step, what takes the state back to its equilibrium comes first, and x, with what follows of it,
    has the rest, at least 65 %. Where the model has no minimum the step in x goes downhill all the
    same; with a constraint the model is minimized over C.

    Raises:
        TypeError, ValueError: an option is not as above.

    Source: total quasi-Newton methods, Griewank and Walther 2002 (secants of ∂f from both sides);
    SQP with their updates, Diehl, Walther, Bock, Kostina 2010; steps of two parts, Omojokun 1989.

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
        kkt.apart = True
        memory = self.memory or window(sum(block.shape[1] for block in start), LEAST, MOST)
        return start, SQPState.at(start, memory)

    def step(self, kkt: KKT, point: Point, sweep: Sweep, state: SQPState) -> tuple[Point, SQPState]:
        state.secants.push(point, sweep)
        tau = state.secants.tau.to(point.x.dtype)
        warming = state.count < WARMUP
        state.count += 1
        if warming:
            scaled = point._replace(x=tau * point.x), sweep._replace(grad=sweep.grad / tau)
            state.size.fit(*scaled)
        plain = self._plain(kkt, point, sweep, state)
        off, down = _norm(plain.z, plain.mu), norm(plain.x)
        state.judge(torch.hypot(off, down / state.size.alpha[:, 0]), sweep)
        move = plain
        if not warming:
            move = self._newton(kkt, point, sweep, state, plain, torch.hypot(off, down))
        moved = Point(point.z + move.z, point.mu + move.mu, point.x + move.x / tau)
        if kkt.project is not None:  # by rounding, and where C is not convex
            moved = moved._replace(x=kkt.constrain(moved.x))
        return moved, state

    def _plain(self, kkt: KKT, point: Point, sweep: Sweep, state: SQPState) -> Point:
        """(f − z, μ⁺ − μ, τ Δx), Δx down ∇ₓL; none in x at first, where τ cannot be known yet."""
        tau = state.secants.tau.to(point.x.dtype)
        off, adjoint_off, descent = Point.split(sweep.r, point.z.shape[1])
        down = state.size.alpha / tau * descent
        if state.count == 1:
            down = torch.where(state.size.cold[:, None], 0.0, down)
        if kkt.project is not None:
            down = tau * (kkt.constrain(point.x + down / tau) - point.x)
        return Point(off, adjoint_off, down)

    def _newton(
        self, kkt: KKT, point: Point, sweep: Sweep, state: SQPState, plain: Point, length: Tensor
    ) -> Point:
        """The model's step, cut per problem where it is too long; the plain one where none is.

        ``length``: of the plain step, ``(B,)``.
        """
        secants = state.secants
        tau = secants.tau.to(point.x.dtype)
        model = Model(secants, sweep, state.size.alpha)
        reach = self.reach * secants.size
        limit = state.trust * reach / secants.bend.amax(dim=1).sqrt()
        longest = torch.maximum(limit, SHARE_OF_PLAIN * length)
        found = model.solve(point.x, kkt.project)
        here, share = sweep.loss_grad, _share(found, longest)
        assert here is not None
        s_z, s_x = _cut((found.back + share * found.along, share * found.dx), longest)
        there = kkt.loss_gradient(point.z + s_z, point.x + s_x / tau)
        model.probe((s_z, s_x), (there[0] - here[0], (there[1] - here[1]) / tau))
        found = model.solve(point.x, kkt.project)
        step = model.step(found, _share(found, longest))
        found_length = _norm(*step)
        sound = found_length < math.inf
        step, length = choose(sound, (step, found_length), (plain, length))
        share = torch.where(length > longest, longest / length, 1.0)
        state.made = share * length / reach
        return Point(*(share[:, None].to(block.dtype) * block for block in step))

    def restart(self, state: SQPState, mask: Tensor) -> SQPState:
        """Start over, for the problems in ``mask``, with a quarter of step size and reach."""
        state.size.restart(mask)
        state.trust = torch.where(mask, state.trust / 4, state.trust)
        state.residual = torch.where(mask, math.inf, state.residual)
        state.least = torch.where(mask, -math.inf, state.least)
        state.most = torch.where(mask, math.inf, state.most)
        state.secants.forget(mask)
        return state

    def take(self, state: SQPState, rows: Tensor) -> SQPState:
        """The state of the problems ``rows`` alone."""
        return take(state, rows)


def _share(found: Move, longest: Tensor) -> Tensor:
    """How much of the step in x may be made, ``(B, 1)``.

    What the states' way back to their equilibrium leaves of the longest step, at least 65 % of it.
    """
    left = torch.maximum(longest - norm(found.back), TANGENTIAL * longest)
    length = _norm(found.along, found.dx)
    return torch.where(length > left, left / length, 1.0)[:, None].to(found.dx.dtype)


def _norm(*blocks: Tensor) -> Tensor:
    """Of the blocks side by side, ``(B,)``."""
    return cast(Tensor, torch.linalg.vector_norm(torch.stack([*map(norm, blocks)]), dim=0))


def _cut(step: Sequence[Tensor], longest: Tensor) -> list[Tensor]:
    """A step's blocks, cut per problem where it is too long; none where it is not finite."""
    length = _norm(*step)
    share = torch.where(length > longest, longest / length, 1.0)
    share = torch.where(length < math.inf, share, 0.0)[:, None].to(step[0].dtype)
    return [torch.where(share > 0, share * block, 0.0) for block in step]


@dataclass
class SQPState:
    """The step size in x, the differences, how far steps may go, and how many were made."""

    size: StepSize
    secants: KKTSecants
    trust: Tensor  # (B,) how far steps may go, a share of the reach
    made: Tensor  # (B,) how far the last one went, a share of the reach for curved problems
    residual: Tensor  # (B,) of the last iterate, x's in units 1/τ
    least: Tensor  # (B,) what the loss at the last iterate's equilibrium is at least
    most: Tensor  # (B,) and at most
    count: int = 0

    @classmethod
    def at(cls, start: Point, memory: int) -> SQPState:
        whole = torch.ones_like(norm(start.x))
        none = torch.full_like(whole, math.inf)
        secants = KKTSecants.empty(start, memory)
        return cls(
            StepSize.at(start),
            secants,
            trust=whole,
            made=whole,
            residual=none,
            least=-none,
            most=none,
        )

    @property
    def alpha(self) -> Tensor:
        """The step size in x, in its own units, ``(B, 1)``."""
        found = self.size.alpha.double() / self.secants.tau.square()
        dtype = self.size.alpha.dtype
        return found.clamp(max=torch.finfo(dtype).max ** 0.5).to(dtype)

    def judge(self, residual: Tensor, sweep: Sweep) -> None:
        """Trust steps less if the last one was for the worse, and more if it was not.

        It was if the loss at x's equilibrium rose, and was not if it fell, where L tells that for
        sure: a residual has to grow on many ways to a solution. Else if the residual grew a lot.
        Where it is the loss that bends, steps are then trusted less far than the last one went.
        """
        value = sweep.lagrangian.double()
        share = min(1.0, UNRELATED / math.sqrt(sweep.f.shape[1]))
        rounding = ROUNDING * torch.finfo(sweep.f.dtype).eps
        margin = torch.add(share * sweep.doubt.double(), value.abs(), alpha=rounding)
        least, most = value - margin, value + margin
        rose, fell = least > self.most, most < self.least
        worse = rose | ((residual > GREW * self.residual) & ~fell)
        made = self.made / self.secants.bend[:, 1].sqrt()
        shorter = SHORTER * torch.minimum(self.trust, made)
        trust = torch.where(worse, shorter, LONGER * self.trust)
        self.trust, self.residual = trust.clamp(max=1), residual
        self.least, self.most = least, most
