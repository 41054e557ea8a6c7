"""How hard it is to differentiate through what a task's solve found, and what makes it easier."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

import implicitopt

from .equilibrium import Equilibrium, Inner
from .learner import cross_entropy, share_right
from .tasks import Episode


@dataclass(frozen=True)
class Conditioning:
    """How the adjoint system of some tasks went, at one decay.

    Attributes:
        decay: λ.
        kkt: the relative KKT residual of the solves, median; the adjoint is only as right as that.
        steps: Krylov steps, median.
        residual: of the linear system, relative, at worst.
        solved: the share of the systems that were solved to their tolerance.
        accuracy: on the queries.
    """

    decay: float
    kkt: float
    steps: float
    residual: float
    solved: float
    accuracy: float


def conditioning(
    learner: Equilibrium, episode: Episode, decays: Sequence[float], max_steps: int
) -> list[Conditioning]:
    """Differentiate the queries' loss through x*, at each decay."""
    kept, found = learner.inner, []
    for decay in decays:
        learner.inner = replace(kept, decay=decay)
        try:
            found.append(_measured(learner, episode, max_steps))
        finally:
            learner.inner = kept
    return found


def _measured(learner: Equilibrium, episode: Episode, max_steps: int) -> Conditioning:
    """One backward pass, and what its adjoint reports."""
    inner: Inner = learner.inner
    implicit = implicitopt.Implicit(tol=inner.adjoint_tol, max_steps=max_steps)
    sol = learner.learn(episode.support, episode.support_labels, adjoint=implicit)
    logits = learner.answer(episode.query, sol.x)
    with warnings.catch_warnings():
        # That a system was not solved is what is measured.
        warnings.simplefilter("ignore", implicitopt.AdjointWarning)
        cross_entropy(logits, episode.query_labels).sum().backward()
    learner.zero_grad()
    report = sol.adjoint
    return Conditioning(
        decay=inner.decay,
        kkt=_median(sol.residuals.total),
        steps=_median(report.steps),
        residual=report.residual.max().item(),
        solved=(report.status == implicitopt.Status.CONVERGED).float().mean().item(),
        accuracy=share_right(logits.detach(), episode.query_labels).mean().item(),
    )


def _median(values: Tensor) -> float:
    return torch.quantile(values.detach().double(), 0.5).item()
