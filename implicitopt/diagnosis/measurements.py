"""What `implicitopt.check` measures of a problem, per problem, at one point."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from implicitopt.accelerators.anderson import Anderson
from implicitopt.fixed_point import picard_to_rest
from implicitopt.kkt import KKT, Point, norm
from implicitopt.pullback import guarded_pullback

__all__ = [
    "Directions", "attainable", "coupling", "derivative_error", "expansion", "plain_iteration",
    "reduced_gradient_error", "settle", "spectral_radius",
]  # fmt: skip


#: Keeps 0 / 0 from being NaN.
TINY = 1e-300


class Directions:
    """Random matrices from a seed, without touching torch's global generators."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(int(seed))

    def like(self, rows: Tensor) -> Tensor:
        """Standard normal entries."""
        drawn = torch.randn(rows.shape, generator=self.generator, dtype=torch.float64)
        return drawn.to(rows.device, rows.dtype)


def _entry(rows: Tensor) -> Tensor:
    """1 + the root mean square of a row's entries, ``(B, 1)``: the size a change is relative to."""
    mean = norm(rows) / float(max(1, rows.shape[1])) ** 0.5
    size: Tensor = (1 + mean)[:, None].to(rows.dtype)
    return size


def _eps(rows: Tensor) -> float:
    return float(torch.finfo(rows.dtype).eps)


def plain_iteration(kkt: KKT, z: Tensor, x: Tensor, steps: int) -> tuple[Tensor, Tensor, Tensor]:
    """z ← f(z, x): the last state, ‖f − z‖ / (1 + ‖z‖) there, and the rate, the last two ``(B,)``.

    The rate is the factor by which a step shrinks ‖f − z‖, averaged over the last ten steps above
    rounding; 0 where there are none.
    """
    moves, above = [], []
    for _ in range(steps):
        image = kkt.state_map(z, x)
        moves.append(norm(image - z))
        relative = moves[-1] / (1 + norm(z))
        above.append(relative > 100 * _eps(z))
        z = image
    shown, logs = torch.stack(above), torch.stack(moves).log()
    pairs = shown[:-1] & shown[1:]
    recent = pairs & (pairs.flip(0).cumsum(dim=0).flip(0) <= 10)
    total = torch.where(recent, logs[1:] - logs[:-1], 0.0).sum(dim=0)
    mean = (total / recent.sum(dim=0).clamp(min=1)).exp()
    return z, relative, torch.where(recent.any(dim=0), mean, 0.0)


def settle(kkt: KKT, z: Tensor, x: Tensor, max_steps: int = 100) -> tuple[Tensor, Tensor]:
    """The fixed point by Anderson acceleration, and its relative residual, ``(B,)``."""
    state, residual, _ = picard_to_rest(
        lambda state: kkt.state_map(state, x), z, Anderson("II"), max_steps=max_steps,
        tol=_eps(z) ** 0.75,
    )  # fmt: skip
    return state, residual


def attainable(rows: Tensor) -> float:
    """The relative error beyond which a derivative is called wrong, with room for kinks."""
    return float(_eps(rows) ** 0.25)


def spectral_radius(
    kkt: KKT, z: Tensor, x: Tensor, directions: Directions, steps: int = 40
) -> Tensor:
    """ρ(∂f/∂z), by power iteration on its transpose; growth averaged over the second half."""
    pull, _ = kkt.linearize(z, x)
    v, logs = directions.like(z), []
    for step in range(steps):
        size = norm(v)
        v = v / torch.where(size > 0, size, torch.ones_like(size))[:, None].to(v.dtype)
        v = pull(v)
        if 2 * step >= steps:
            # The average over many steps is right for complex pairs too, where one step is not.
            logs.append(norm(v).log())
    return torch.stack(logs).mean(dim=0).exp()


def coupling(
    function: Callable[..., Tensor],
    blocks: tuple[Tensor, ...],
    directions: Directions,
    size: float = 1.0,
) -> Tensor:
    """Relative change of each problem's value when others' blocks change by ``size``, ``(B,)``."""
    base = function(*blocks)
    change = torch.zeros_like(norm(base.reshape(len(base), -1)))
    odd = torch.arange(len(base), device=base.device) % 2 == 1
    for mask in (odd, ~odd):
        moved = [
            torch.where(mask[:, None], b + size * _entry(b) * directions.like(b), b) for b in blocks
        ]
        difference = (function(*moved) - base).reshape(len(base), -1)
        relative = norm(difference) / (1 + norm(base.reshape(len(base), -1)))
        change = torch.where(mask, change, relative)
    finite = torch.isfinite(base.reshape(len(base), -1)).all(dim=1)
    return torch.where(finite, change, 0.0)  # what is NaN anyway was not made so by others


def derivative_error(
    function: Callable[..., Tensor], blocks: tuple[Tensor, ...], which: int, directions: Directions
) -> Tensor:
    """How far the vjp in one block is from central differences, relative, ``(B,)``.

    Along a random direction d it compares uᵀ(J d) from differences with (Jᵀu)ᵀ d, where u is J d
    itself: a random u would see 1/√n of a missing derivative. Rounding is allowed for. The median
    over three directions, so that one step across a kink is no error.
    """
    point = blocks[which]
    h = _eps(point) ** (1 / 3) * _entry(point)

    def at(block: Tensor) -> Tensor:
        value = function(*blocks[:which], block, *blocks[which + 1 :])
        return value.reshape(len(point), -1)

    _, pull = guarded_pullback(at, point)
    errors = []
    for _ in range(3):
        d = directions.like(point)
        above, below = at(point + h * d), at(point - h * d)
        change = ((above - below) / (2 * h)).double()
        noise = 10 * _eps(point) * (norm(above) + norm(below)) / h[:, 0].double() + TINY
        size = norm(change)
        random = directions.like(change)
        seen = (size > noise)[:, None]
        u = torch.where(seen, change, random)
        u = u / norm(u)[:, None]
        (pulled,) = pull(u.to(above.dtype), retain_graph=True)
        found, expected = (pulled.double() * d.double()).sum(dim=1), (u * change).sum(dim=1)
        excess = ((found - expected).abs() - noise).clamp(min=0)
        errors.append(excess / (torch.maximum(found.abs(), expected.abs()) + noise))
    return torch.stack(errors).median(dim=0).values


def reduced_gradient_error(
    kkt: KKT, z: Tensor, x: Tensor, directions: Directions, max_steps: int = 100
) -> tuple[Tensor, Tensor]:
    """∇ₓL at the solved z(x), μ(x) against central differences of ℓ(z(x), x).

    Returns the relative error and whether all the states and the adjoint were solved, ``(B,)``.
    """
    eps = _eps(x)
    h = eps ** (1 / 3) * _entry(x)
    solved = torch.ones_like(x[:, 0], dtype=torch.bool)

    def rest(map_: Callable[[Tensor], Tensor], start: Tensor) -> Tensor:
        nonlocal solved
        found, residual, _ = picard_to_rest(
            map_, start, Anderson("II"), max_steps=max_steps, tol=10 * eps
        )
        solved = solved & (residual <= eps**0.6)
        return found

    def loss_at(x: Tensor, mu: Tensor) -> tuple[Tensor, Tensor]:
        """ℓ(z(x), x), and what the state's residual and rounding leave uncertain of it."""
        state = rest(lambda state: kkt.state_map(state, x), z)
        value = kkt.objective(state, x).double()
        slack = (mu * (kkt.state_map(state, x) - state)).sum(dim=1).abs()
        return value, slack.double() + 10 * eps * value.abs()

    z = rest(lambda state: kkt.state_map(state, x), z)
    pull, loss_z = kkt.linearize(z, x)
    mu = rest(lambda mu: pull(mu) + loss_z, torch.zeros_like(z))
    grad = kkt.sweep(Point(z, mu, x)).grad

    errors = []
    steepest = grad / norm(grad).clamp(min=torch.finfo(x.dtype).tiny)[:, None].to(x.dtype)
    for d in (steepest * x.shape[1] ** 0.5, directions.like(x)):
        above, slack_above = loss_at(x + h * d, mu)
        below, slack_below = loss_at(x - h * d, mu)
        step = 2 * h[:, 0].double()
        expected, noise = (above - below) / step, 2 * (slack_above + slack_below) / step + TINY
        found = (grad * d).sum(dim=1).double()
        excess = ((found - expected).abs() - noise).clamp(min=0)
        errors.append(excess / (norm(grad).double() * norm(d) + noise + expected.abs()))
    return torch.stack(errors).amax(dim=0), solved


def expansion(project: Callable[[Tensor], Tensor], x: Tensor, directions: Directions) -> Tensor:
    """The largest ‖P(a) − P(b)‖ / ‖a − b‖ over random pairs near x, near and far, ``(B,)``."""
    ratios = []
    for scale in (0.01, 0.1, 1.0, 10.0):
        a = x + scale * _entry(x) * directions.like(x)
        b = a + scale * _entry(x) * directions.like(x)
        ratios.append(norm(project(a) - project(b)) / norm(a - b))
    return torch.stack(ratios).amax(dim=0)
