"""The step size in x of the joint iteration where nobody gives one, found from its first steps.

How long a step in x may be depends on the units of x and of the loss, which nobody tells either.
Plain steps at the start bound it by their length. It is wrong by orders of magnitude where they
throw the state far away, or where, a few steps later, the gradient has hardly changed along them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import NamedTuple, cast

import torch
from torch import Tensor

from implicitopt.kkt import Point, Sweep, choose, norm, some

__all__ = ["WARMUP", "StepSize"]

#: Plain steps at the start.
WARMUP = 2
#: The step size in x that those start from.
LONGEST = 1.0
#: The longest plain step in x, as a share of 1 + ‖x‖: from anywhere, and from where an earlier
#: solve ended (μ is not 0). There ∇ₓL is small, however curved the loss, and says nothing of how
#: long a step may be.
COLD, WARM = 1.0, 0.01
#: A plain step in x was too long where f is farther from z than this many times 1 + ‖z‖. Then it
#: is made again, this many times shorter, and so up to so many times.
FAR, CUT, TRIES = 3.0, 3.0, 8
#: Unless f − z became shorter by as much, within this share: f is straight there, however steep.
STRAIGHT = 0.2
#: Steps at which the step size is compared with the curvature met so far.
LOOKS = (6, 12, 18)
#: It is too short where it is this share, or less, of one over the curvature, which it becomes,
#: though by no more than the second number at once.
SHORT, MOST = 0.1, 1e4
#: But not where ∇ₓL is less than this share of what it was: there the steps are long enough, and
#: what is left of it may vary for any reason.
LEFT = 0.1
#: Numbers to which differences of residuals are folded for that.
FOLDED = 64


class Seen(NamedTuple):
    """What a sweep found, as far as the curvature needs it."""

    off: Tensor  #: (B, at most 64) f − z, folded
    adjoint_off: Tensor  #: (B, at most 64) μ⁺ − μ, folded
    descent: Tensor  #: (B, d) −∇ₓL
    x: Tensor  #: (B, d)


@dataclass
class StepSize:
    """α_x of each problem, and what it is found from."""

    alpha: Tensor  # (B, 1)
    longest: Tensor  # (B,) what plain steps may be of 1 + ‖x‖
    cold: Tensor  # (B,) bool: no earlier solve's end
    trying: Tensor  # (B,) bool: its first steps may be too long still
    off: Tensor  # (B,) ‖f − z‖ where it was found too long last; 0: not yet
    before: Tensor  # (B, d) x before the last plain step
    shrink: Tensor  # (B, 1) factor for restarts
    steepest: Tensor  # (B,) largest ‖∇ₓL‖ yet
    seen: list[Seen] = field(default_factory=list)

    @classmethod
    def at(cls, start: Point) -> StepSize:
        warm, one = start.warm, torch.ones_like(start.x[:, :1])
        longest = torch.where(warm, WARM, COLD).to(norm(start.x).dtype)
        trying, zero = torch.ones_like(warm), torch.zeros_like(longest)
        return cls(LONGEST * one, longest, ~warm, trying, zero, start.x, one, zero)

    def restart(self, mask: Tensor) -> None:
        """Take a quarter of the step for the problems in ``mask``, from now on."""
        quarter = torch.where(mask[:, None], 0.25, 1.0).to(self.alpha.dtype)
        self.shrink, self.alpha = self.shrink * quarter, self.alpha * quarter

    def fit(self, point: Point, sweep: Sweep) -> None:
        """As it is, or less where the plain step from here would be too long."""
        self.before = point.x
        reach, size = self.longest * (1 + norm(point.x)), norm(sweep.grad)
        long = (size > reach) & (size < math.inf)
        share = torch.where(long, reach / torch.where(long, size, 1.0), 1.0)
        self.alpha = torch.minimum(self.alpha, share[:, None].to(self.alpha.dtype))

    def shorten(self, step: int, point: Point, sweep: Sweep) -> Tensor | None:
        """The problems, if any can be, whose last plain step was too long; theirs is shorter now.

        How long a step may be for f is not known before f has seen its end.
        """
        if not WARMUP <= step < WARMUP + TRIES or not some(self.trying):
            return None
        off = sweep.residuals.z * sweep.sizes.whole
        straight = self.trying & ((off * CUT - self.off).abs() < STRAIGHT * self.off)
        self.trying = self.trying & ~straight & (off > FAR * (1 + norm(point.z)))
        self.off = off
        if not some(self.trying | straight):
            return None
        shorter = torch.where(self.trying[:, None], self.alpha / CUT, self.alpha)
        self.alpha = torch.where(straight[:, None], self.alpha * CUT, shorter)
        return self.trying

    def back(self, point: Point) -> Point:
        """The point at which such a step, made shorter, would have ended."""
        return point._replace(x=self.before + (point.x - self.before) / CUT)

    def lengthen(self, step: int, point: Point, sweep: Sweep) -> Tensor | None:
        """The problems, if it is time to look, whose step was too short; theirs is longer now."""
        if step > LOOKS[-1] or not some(self.cold):
            return None
        off, adjoint_off, descent = Point.split(sweep.r, point.z.shape[1])
        new = Seen(_folded(off), _folded(adjoint_off), descent.clone(), point.x)
        slope = norm(descent)
        steepest = torch.fmax(self.steepest, slope)
        if some(self.trying):  # what was seen at too long a step says nothing: as if it were here
            steepest = torch.where(self.trying, slope, steepest)
            self.seen = [choose(self.trying, new, old) for old in self.seen]
        self.steepest = steepest
        self.seen.append(new)
        if step not in LOOKS:
            return None
        share = self.alpha[:, 0] * _curvature(self.seen)
        self.seen = self.seen[-1:] if step < LOOKS[-1] else []
        short = self.cold & (slope >= LEFT * steepest) & (share > 0) & (share < SHORT)
        longer = torch.where(short, (1 / share).clamp(max=MOST), 1.0)
        most = torch.finfo(self.alpha.dtype).max ** 0.5  # a step by more would overflow
        self.alpha = (self.alpha * longer[:, None].to(self.alpha.dtype)).clamp(max=most)
        return short


def _folded(r: Tensor) -> Tensor:
    """``(B, n) -> (B, at most 64)``, such that scalar products remain about what they are."""
    n = r.shape[1]
    if n <= FOLDED:
        return r.double()
    at = torch.arange(n, device=r.device)
    signs = 1 - 2 * ((at * 2654435761 >> 16) & 1)  # as good as random
    padded = torch.nn.functional.pad(r * signs, (0, -n % FOLDED))
    return cast(Tensor, padded.unflatten(1, (-1, FOLDED)).sum(dim=1, dtype=torch.float64))


def _curvature(seen: list[Seen]) -> Tensor:
    """‖change of ∇ₓL‖ / ‖change of x‖ along the states' and adjoints' equilibria, ``(B,)``.

    Of the combinations of the last differences, of that along which x changes most for what the
    residuals of z and μ do. NaN where there is none.
    """
    changes = [torch.stack(rows, dim=1).double().diff(dim=1) for rows in zip(*seen, strict=True)]
    off, adjoint_off, descent, x = changes
    unit = torch.linalg.vector_norm(x, dim=2, keepdim=True).reciprocal()
    unit = torch.where(unit < math.inf, unit, 0.0)
    gram_x = _gram(x * unit)
    gram = _gram(_relative(off) * unit) + _gram(_relative(adjoint_off) * unit)
    gram = gram / gram.diagonal(dim1=1, dim2=2).amax(dim=1)[:, None, None]
    gram.diagonal(dim1=1, dim2=2).add_(1e-8)
    factor, _ = torch.linalg.cholesky_ex(gram)
    half = torch.linalg.solve_triangular(factor, gram_x, upper=False)
    matrix = torch.linalg.solve_triangular(factor, half.mT, upper=False)
    for _ in range(6):  # its 64th power has the first eigenvector for its columns
        matrix = matrix / matrix.diagonal(dim1=1, dim2=2).sum(dim=1)[:, None, None]
        matrix = matrix @ matrix
    first = matrix.diagonal(dim1=1, dim2=2).argmax(dim=1)
    column = matrix.gather(2, first[:, None, None].expand(-1, matrix.shape[1], 1))
    c = torch.linalg.solve_triangular(factor.mT, column, upper=True) * unit
    moved, changed = ((c * part).sum(dim=1) for part in (x, descent))
    return norm(changed) / norm(moved)


def _gram(rows: Tensor) -> Tensor:
    return rows @ rows.mT


def _relative(changes: Tensor) -> Tensor:
    """In units of the largest change of each problem, whatever the residual's own."""
    size = torch.linalg.vector_norm(changes, dim=2).amax(dim=1)[:, None, None]
    return changes / torch.where(size > 0, size, 1.0)
