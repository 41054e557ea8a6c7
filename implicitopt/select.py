"""Which iterate of a solve is returned: rules, one decision per problem and step.

A rule is called at every step with what the step found and what is kept so far, and says for each
problem whether to keep the new iterate instead. Whatever the rule, a non-finite iterate is never
kept and one that meets the tolerance always is.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from implicitopt.kkt import Residuals, Sweep
from implicitopt.options import check_option

__all__ = ["RULES", "Best", "Candidate", "Kept", "Last", "PaperRule", "Rule"]


class Candidate(NamedTuple):
    """One step's iterates, all ``(B,)``; values are of the minimization (−ℓ when maximizing)."""

    step: int  #: from 0
    value: Tensor  #: loss
    estimate: Tensor  #: L(z, μ, x): to first order, the loss at the equilibrium of x
    score: Tensor  #: max(value, estimate) + ‖f − z‖ ‖μ⁺ − μ‖: seldom less than that loss
    residuals: Residuals
    residual: Tensor  #: the relative KKT residual, ``residuals.total``

    @classmethod
    def of(cls, step: int, sweep: Sweep) -> Candidate:
        """What a sweep tells of its iterate, in the dtype of its norms."""
        value = sweep.value.to(sweep.total.dtype)
        return cls(step, value, sweep.lagrangian, sweep.score, sweep.residuals, sweep.total)


class Kept(NamedTuple):
    """What is kept so far, all ``(B,)``; infinite before anything is kept."""

    value: Tensor  #: loss of the iterate kept
    residual: Tensor  #: its relative KKT residual
    state_residual: Tensor  #: its relative state residual
    score: Tensor  #: its score
    lowest_residual: Tensor  #: lowest relative KKT residual of all iterates seen


Rule = Callable[[Candidate, Kept], Tensor]

#: A KKT residual this many times smaller says more than a score that is lower by a share of less
#: than the root of the larger residual: a score so far off a solution may be too low by as much.
NEARER = 1e-3


@dataclass(frozen=True)
class Last:
    """Keep the newest finite iterate; ``select="last"``.

    >>> import torch, implicitopt
    >>> f, loss = lambda z, x: 0.5 * z + x, lambda z, x: ((z - 1) ** 2).sum(-1)
    >>> rule = implicitopt.Last()
    >>> sol = implicitopt.solve(f, loss, torch.zeros(2, 3), select=rule, max_steps=9)
    >>> sol.value.shape
    torch.Size([2])
    """

    def __call__(self, new: Candidate, kept: Kept) -> Tensor:
        return torch.ones_like(new.value, dtype=torch.bool)


@dataclass(frozen=True)
class Best:
    """Keep the input whose loss at its equilibrium is, as far as an iterate tells, the lowest.

    An iterate off the equilibrium may show any loss. What its input is worth is estimated by the
    Lagrangian where that is the higher one, and doubted by what the residuals of z and μ leave open
    (``Candidate.score``). Far from any equilibrium this means little, so iterates count only where
    their state residual is at most ``small``; until one is, the smallest is kept. Among scores
    that are equal to rounding, or to what a KKT residual a thousand times larger leaves open, the
    smallest residual decides: so a tolerance that is out of reach does no harm.

    So the state returned with few sweeps may be off its equilibrium by ``small``; its residual says
    by how much, and a smaller ``small`` bounds it.

    Args:
        small: of ‖f − z‖ / (1 + ‖(z, μ, x)‖), positive. ``select="best"`` is ``Best()``.

    Raises:
        ValueError: small is not positive.

    >>> import torch, implicitopt
    >>> f, loss = lambda z, x: 0.5 * z + x, lambda z, x: ((z - 1) ** 2).sum(-1)
    >>> rule = implicitopt.Best(small=0.01)
    >>> sol = implicitopt.solve(f, loss, torch.zeros(2, 3), select=rule, max_steps=9)
    >>> sol.value.shape
    torch.Size([2])
    """

    small: float = 0.3

    def __post_init__(self) -> None:
        check_option("Best small", self.small, float, above=0)

    def __call__(self, new: Candidate, kept: Kept) -> Tensor:
        size = new.value.abs()
        rounding = torch.finfo(new.score.dtype).eps ** 0.75 * (1 + size)
        less = torch.minimum(new.residual, kept.residual)
        more = torch.maximum(new.residual, kept.residual)
        doubt = torch.where(less <= NEARER * more, more.sqrt() * size, 0.0)
        tie = (new.score - kept.score).abs() <= torch.maximum(doubt, rounding)
        better = torch.where(tie, new.residual < kept.residual, new.score < kept.score)
        feasible, was_feasible = new.residuals.z <= self.small, kept.state_residual <= self.small
        nearer = new.residuals.z < kept.state_residual
        return torch.where(was_feasible, feasible & better, feasible | nearer)


@dataclass(frozen=True)
class PaperRule:
    """The rule of the JIIO authors' code.

    Keep an iterate if its relative residual is the best so far, or it is among the first ten, or
    its loss is below that of the last one kept while its residual is within 1.3 of the best.
    ``select="paper"``.

    >>> import torch, implicitopt
    >>> f, loss = lambda z, x: 0.5 * z + x, lambda z, x: ((z - 1) ** 2).sum(-1)
    >>> rule = implicitopt.PaperRule()
    >>> sol = implicitopt.solve(f, loss, torch.zeros(2, 3), select=rule, max_steps=9)
    >>> sol.value.shape
    torch.Size([2])
    """

    def __call__(self, new: Candidate, kept: Kept) -> Tensor:
        residual = new.residual
        lower = (new.value < kept.value) & (residual <= 1.3 * kept.lowest_residual)
        return (residual <= kept.lowest_residual) | lower | (new.step < 10)


RULES: dict[str, Rule] = {"best": Best(), "last": Last(), "paper": PaperRule()}
