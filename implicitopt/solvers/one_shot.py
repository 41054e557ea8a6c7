"""One-shot optimization: quasi-Newton steps in x, state and adjoint carried along.

With z and μ at equilibrium, ∇ₓL is the gradient of the reduced loss x ↦ ℓ(z(x), x), and off it L
errs by the square of the residual r = (f − z, μ⁺ − μ) only, ∇ₓL by its first power. So x moves as
soon as both errors, estimated from two sweeps at one x, are small against what is decided with
them: whether the last step is kept (sufficient decrease of L), and where the next one goes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from implicitopt.accelerators.anderson import Anderson, AndersonState, window
from implicitopt.kkt import KKT, Point, Sweep, choose, norm, some
from implicitopt.options import check_option
from implicitopt.rows import take
from implicitopt.solvers.secants import Secants, clip, ratio

__all__ = ["OneShot", "OneShotState"]

#: The trust radius to begin with, as a share of 1 + ‖x‖: from anywhere, and from where an earlier
#: solve ended (μ is not 0), which is near a solution.
COLD, WARM = 0.3, 0.03
#: Quasi-Newton pairs to keep, where there is room: more are no better.
MOST_PAIRS = 20
#: Sweeps at one x after which the step is decided on whatever accuracy there is.
MOST_SWEEPS = 30
#: Errors of L may be this large against the change of L that is judged.
SHARE_OF_CHANGE = 0.3
#: Contraction rates above this are taken for it.
SLOWEST = 0.98
#: The strictest relative accuracy of ∇ₓL asked for after steps that were not kept.
STRICTEST = 1e-3


@dataclass(frozen=True)
class OneShot:
    """Limited-memory quasi-Newton steps in x, with as many sweeps between them as they need.

    No step size to choose. Each problem decides for itself when its gradient is accurate enough to
    step, keeps or rejects the step, and adapts its trust radius. z and μ follow x by a linear
    prediction from earlier steps and are refined at fixed x by Anderson acceleration (type II).
    With a constraint, steps are projected, and where the projected quasi-Newton step does not
    descend, a projected gradient step is taken.

    Args:
        memory: quasi-Newton pairs, and steps for the prediction. None: 20, fewer where z, μ
            and x are more than three thousand numbers, at least 10.
        inner_memory: of the acceleration at fixed x. None: as ``Anderson`` has it.
        accuracy: relative accuracy of ∇ₓL at which x moves, between 0 and 1.

    Raises:
        TypeError, ValueError: an option is not as above.

    Descends, so it is the safe choice far from a solution; near one ``Joint`` needs fewer sweeps.

    Source: one-shot methods of PDE-constrained optimization (Ta'asan, Kuruvila, Salas 1992;
    Hamdi and Griewank 2010); inexact hypergradients (HOAG, Pedregosa 2016).

    >>> import torch, implicitopt
    >>> sol = implicitopt.solve(
    ...     lambda z, x: torch.tanh(0.5 * z + x), lambda z, x: ((z - 0.3) ** 2).sum(-1),
    ...     torch.zeros(2, 3), solver=implicitopt.OneShot(),
    ... )
    >>> sol.converged.tolist()
    [True, True]
    """

    memory: int | None = None
    inner_memory: int | None = None
    accuracy: float = 0.1

    def __post_init__(self) -> None:
        for name in ("memory", "inner_memory"):
            if getattr(self, name) is not None:
                check_option(f"OneShot {name}", getattr(self, name), int, least=1)
        check_option("OneShot accuracy", self.accuracy, float, above=0, below=1)

    @property
    def initial_sweeps(self) -> int:
        """Every sweep is a step."""
        return 0

    def init(self, kkt: KKT, start: Point) -> tuple[Point, OneShotState]:
        state = OneShotState.begin(self, start)
        state.radius = state.radius * torch.where(start.warm, WARM / COLD, 1.0)
        return start, state

    def step(
        self, kkt: KKT, point: Point, sweep: Sweep, state: OneShotState
    ) -> tuple[Point, OneShotState]:
        state.measure(kkt, point, sweep)
        keep, reject = state.judge(point, sweep)
        decided = keep | reject
        moved = self._refine(point, sweep, state)
        if some(decided):
            state.learn(decided, point, sweep)
            state.recenter(keep, reject, point, sweep, self.accuracy)
            moved = choose(decided, state.trial(kkt), moved)
        state.decided = decided
        state.sweeps = torch.where(decided, torch.zeros_like(state.sweeps), state.sweeps + 1)
        return moved, state

    def restart(self, state: OneShotState, mask: Tensor) -> OneShotState:
        """Start over, for the problems in ``mask``, with a quarter of the radius."""
        state.radius = torch.where(mask, 0.25 * state.radius, state.radius)
        state.centered = state.centered & ~mask
        state.sweeps = torch.where(mask, torch.zeros_like(state.sweeps), state.sweeps)
        state.inner.forget(mask)
        for history in (state.pairs, state.following):
            history.clear(mask)
        return state

    def take(self, state: OneShotState, rows: Tensor) -> OneShotState:
        """The state of the problems ``rows`` alone."""
        return take(state, rows)

    def join(self, start: Point, steps: int) -> OneShotState:
        """A state for problems that will ``enter`` it, after ``steps`` of another solver.

        What becomes of one does not depend on whether it, or a neighbour before it, had this made.
        """
        state = OneShotState.begin(self, start)
        state.inner.age(steps)
        return state

    def enter(self, state: OneShotState, mask: Tensor, at: Point) -> OneShotState:
        """Begin anew, for the problems in ``mask``, at the point ``at``."""
        fresh = OneShotState.begin(self, at)
        fresh.radius *= 0.3  # where another solver has failed steps had better be short
        state = self.restart(state, mask)
        for name in (
            "radius", "accuracy", "rate", "grad_factor", "value_factor", "rejections", "decided"
        ):  # fmt: skip
            new, old = getattr(fresh, name), getattr(state, name)
            setattr(state, name, torch.where(mask, new, old))
        state.center = choose(mask, at, state.center)
        return state

    def _refine(self, point: Point, sweep: Sweep, state: OneShotState) -> Point:
        """One accelerated step of z and μ at fixed x; differences across steps of x are void."""
        inner = state.inner
        void = state.decided
        inner.fresh = void if inner.fresh is None else inner.fresh | void
        accelerator = Anderson("II", memory=self.inner_memory)
        v = torch.cat(point[:2], dim=1)
        mixed, state.inner = accelerator.step_from_residual(inner, v, sweep.r[:, : v.shape[1]])
        z, mu = mixed.split([point.z.shape[1]] * 2, dim=1)
        return Point(z, mu, point.x)


@dataclass
class OneShotState:
    """Per problem: the center (the last point kept), the trial's errors, and histories."""

    center: Point
    center_grad: Tensor
    center_tangent: Tensor
    center_value: Tensor  # L, accurate to center_error
    center_error: Tensor
    centered: Tensor  # (B,) bool: False while the center itself is being refined
    radius: Tensor
    accuracy: Tensor
    rejections: Tensor
    sweeps: Tensor  # made at the present x, before this one
    decided: Tensor  # whether the last sweep led to a step of x
    pairs: Secants  # (dx, dg)
    following: Secants  # (dx, dz, dμ)
    inner: AndersonState
    # of the present sweep, and of the one before at the same x
    grad: Tensor
    value: Tensor
    residual: Tensor
    rate: Tensor
    grad_factor: Tensor  # error of ∇ₓL over the residual
    value_factor: Tensor  # error of L over the residual's square
    tangent: Tensor  # ∇ₓL along C
    size: Tensor  # its norm

    @classmethod
    def begin(cls, options: OneShot, start: Point) -> OneShotState:
        zero = torch.zeros_like(norm(start.x))
        no, none = zero > 0, zero.long()
        inner = Anderson("II", memory=options.inner_memory).init(torch.cat(start[:2], dim=1))
        memory = options.memory or min(MOST_PAIRS, window(sum(block.shape[1] for block in start)))
        return cls(
            center=start, center_grad=torch.zeros_like(start.x),
            center_tangent=torch.zeros_like(start.x), center_value=zero,
            center_error=zero, centered=no, radius=COLD * (1 + norm(start.x)),
            accuracy=zero + options.accuracy, rejections=none, sweeps=none, decided=no,
            pairs=Secants.empty(memory, start.x, start.x),
            following=Secants.empty(memory, start.x, start.z, start.z), inner=inner,
            grad=torch.zeros_like(start.x), tangent=torch.zeros_like(start.x), value=zero,
            residual=zero, rate=zero + 0.5, grad_factor=zero, value_factor=zero, size=zero,
        )  # fmt: skip

    def measure(self, kkt: KKT, point: Point, sweep: Sweep) -> None:
        """L, ∇ₓL and how they depend on the residual, from this sweep and the one before."""
        relative, whole = sweep.residuals, sweep.sizes.whole
        residual = whole * torch.sqrt(relative.z**2 + relative.mu**2)
        value = sweep.lagrangian.to(residual.dtype)
        same_x = self.sweeps > 0

        def update(new: Tensor, old: Tensor, fade: float) -> Tensor:
            return torch.where(same_x & (new < math.inf), torch.maximum(new, fade * old), old)

        rate = ratio(residual, self.residual).clamp(0.1, SLOWEST)
        self.rate = update(rate, self.rate, 0.9)
        by_grad = ratio(norm(sweep.grad - self.grad), self.residual)
        by_value = ratio((value - self.value).abs(), self.residual**2)
        self.grad_factor = update(by_grad, self.grad_factor, 0.5)
        self.value_factor = update(by_value, self.value_factor, 0.5)
        self.grad, self.value, self.residual = sweep.grad, value, residual
        self.tangent = _tangent(kkt, point.x, sweep.grad)
        self.size = norm(self.tangent)

    def judge(self, point: Point, sweep: Sweep) -> tuple[Tensor, Tensor]:
        """Which trials become the center, and which are rejected; the others need more sweeps."""
        eps = torch.finfo(self.value.dtype).eps
        q = self.rate
        grad_error = self.grad_factor * self.residual * q / (1 - q)
        value_error = self.value_factor * self.residual**2 * q**2 / (1 - q**2)
        self.value_error = value_error
        accurate = (self.grad_factor > 0) & (grad_error <= self.accuracy * self.size)
        # Factors measured at another x hold for small residuals.
        near = self.residual <= 0.1 * sweep.sizes.whole
        accurate &= (self.sweeps > 0) | (self.centered & near)
        rested = self.residual == 0
        late = self.sweeps >= MOST_SWEEPS
        dx = point.x - self.center.x
        slope, slope_here = (self.center_grad * dx).sum(dim=1), (self.grad * dx).sum(dim=1)
        change = self.value - self.center_value
        scale = 1 + self.value.abs()
        judged = torch.maximum(change.abs(), 1e-4 * slope.abs())
        known = value_error + self.center_error <= SHARE_OF_CHANGE * judged
        known = known | (value_error <= 10 * eps * scale)
        # Near a solution the change of L drowns in rounding: the gradient must fall instead.
        drowned = change.abs() <= eps**0.65 * scale
        flatter = slope_here.abs() <= 0.9 * slope.abs()
        smaller = self.size <= 0.9 * norm(self.center_tangent)
        descends = (change <= 1e-4 * slope) | (drowned & (flatter | smaller))
        ready = (accurate & known) | rested | late
        keep = torch.where(self.centered, ready & descends, accurate | rested | late)
        reject = self.centered & ready & ~descends
        self.sound = accurate | rested
        self.gained = change <= 0.1 * slope
        return keep, reject

    def learn(self, decided: Tensor, point: Point, sweep: Sweep) -> None:
        """Take curvature pairs and the response of z and μ from an accurate trial, kept or not."""
        dx, dg = point.x - self.center.x, self.tangent - self.center_tangent
        use = decided & self.centered & self.sound & (norm(dx) > 0)
        curved = (dx * dg).sum(dim=1) > 1e-6 * norm(dx) * norm(dg)
        center = self.center
        self.pairs.push(use & curved, (point.x, center.x), (self.tangent, self.center_tangent))
        responses = (sweep.f, center.z), (sweep.mu, center.mu)
        self.following.push(use, (point.x, center.x), *responses)

    def recenter(
        self, keep: Tensor, reject: Tensor, point: Point, sweep: Sweep, accuracy: float
    ) -> None:
        """Move the center, the trust radius and the accuracy asked for."""
        length = norm(point.x - self.center.x)
        grown = torch.where(self.gained, torch.maximum(self.radius, 2.5 * length), self.radius)
        grown = torch.where(self.centered, grown, self.radius)
        self.radius = torch.where(reject, 0.3 * length, torch.where(keep, grown, self.radius))
        stricter = (0.3 * self.accuracy).clamp_min(STRICTEST)
        looser = (2 * self.accuracy).clamp_max(accuracy)
        self.accuracy = torch.where(reject, stricter, torch.where(keep, looser, self.accuracy))
        mask = keep[:, None]
        self.center = choose(keep, Point(sweep.f, sweep.mu, point.x), self.center)
        self.center_grad = torch.where(mask, self.grad, self.center_grad)
        self.center_tangent = torch.where(mask, self.tangent, self.center_tangent)
        self.center_value = torch.where(keep, self.value, self.center_value)
        self.center_error = torch.where(keep, self.value_error, self.center_error)
        self.rejections = torch.where(
            reject, self.rejections + 1, torch.where(keep, 0, self.rejections)
        )
        # Two rejections in a row cast doubt on the center: look at it again, more closely.
        doubt = self.rejections >= 2
        self.centered = (self.centered | keep) & ~doubt
        self.rejections = torch.where(doubt, 0, self.rejections)

    def trial(self, kkt: KKT) -> Point:
        """The next point to look at: a step of x from the center, z and μ predicted there."""
        x, g = self.center.x, self.center_tangent
        unit = 0.3 * ratio(1 + norm(x), norm(g))
        moved = kkt.constrain(x + clip(self.pairs.quasi_newton(g, unit), self.radius))
        if kkt.project is not None:  # which bends the step: it must still descend
            plain = kkt.constrain(x - clip(g * unit[:, None].to(g.dtype), self.radius))
            slope = ((moved - x) * self.center_grad).sum(dim=1)
            descends = slope < -1e-4 * norm(moved - x) * norm(g)
            moved = torch.where(descends[:, None], moved, plain)
        moved = torch.where(self.centered[:, None], moved, x)
        dz, dmu = self.following.predict(moved - x)
        return Point(self.center.z + dz, self.center.mu + dmu, moved)


def _tangent(kkt: KKT, x: Tensor, grad: Tensor) -> Tensor:
    """∇ₓL where x is free, and its part along the boundary of C where −∇ₓL points out of it."""
    if kkt.project is None:
        return grad
    reach = (1e-2 * ratio(1 + norm(x), norm(grad)))[:, None].to(x.dtype)
    moved = kkt.constrain(x - reach * grad)
    return torch.where(reach > 0, (x - moved) / torch.where(reach > 0, reach, 1.0), grad)
