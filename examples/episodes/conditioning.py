"""How hard it is to differentiate through what a task's solve found, and how right that is."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Sequence
from dataclasses import astuple, dataclass, replace

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
    implicit = implicitopt.Implicit(tol=inner.adjoint_tol, max_steps=max_steps, recycle=0)
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


#: The solve, and the linear systems, at which a gradient counts as exact.
EXACT_SWEEPS, EXACT_TOL, EXACT_STEPS = 400, 1e-6, 300


@dataclass(frozen=True)
class Agreement:
    """One way to the weights' gradient, beside the exact one; medians over tasks.

    Attributes:
        gradient: "frozen", or "implicit" with the Krylov steps that its system is given at most.
        sweeps: of the tasks' solve.
        kkt: the relative KKT residual that it comes to.
        cosine: of the angle between the gradient and the exact one.
        length: over the exact one's.
    """

    gradient: str
    sweeps: int
    kkt: float
    cosine: float
    length: float


def agreement(
    learner: Equilibrium, episode: Episode, sweeps: Sequence[int], steps: Sequence[int]
) -> list[Agreement]:
    """The gradients of the queries' loss from solves of few sweeps, beside the exact one.

    The exact one is `Implicit`'s of a solve that has converged; in float64, and with queries whose
    equilibria and linear systems are solved, so that the tasks' solve alone makes the difference.
    """
    learner = copy.deepcopy(learner).double()
    episode = replace(episode, support=episode.support.double(), query=episode.query.double())
    learner.inner = replace(
        learner.inner, query_steps=EXACT_SWEEPS, query_tol=EXACT_TOL,
        adjoint_tol=EXACT_TOL, adjoint_steps=EXACT_STEPS,
    )  # fmt: skip
    ways = [(budget, most) for budget in sweeps for most in (0, *steps)]
    rows = []
    for task in range(len(episode)):
        one = Episode(*(part[task : task + 1] for part in astuple(episode)))
        exact, _ = _gradient(learner, one, EXACT_SWEEPS, EXACT_STEPS, EXACT_TOL)
        for budget, most in ways:
            gradient, kkt = _gradient(learner, one, budget, most, learner.inner.tol)
            cosine = gradient @ exact / (gradient.norm() * exact.norm())
            rows.append(torch.stack([kkt, cosine, gradient.norm() / exact.norm()]))
    medians = torch.stack(rows).unflatten(0, (len(episode), len(ways))).quantile(0.5, dim=0)
    return [
        Agreement(f"implicit, {most}" if most else "frozen", budget, *row)
        for (budget, most), row in zip(ways, medians.tolist(), strict=True)
    ]


def _gradient(
    learner: Equilibrium, episode: Episode, sweeps: int, steps: int, tol: float
) -> tuple[Tensor, Tensor]:
    """Of a task's loss in all weights, and the solve's KKT residual; 0 steps: x* is a constant."""
    kept, learner.inner = learner.inner, replace(learner.inner, sweeps=sweeps, tol=tol)
    implicit = implicitopt.Implicit(tol=1e-2 if tol > EXACT_TOL else tol, max_steps=max(steps, 1))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", implicitopt.AdjointWarning)
        sol = learner.learn(episode.support, episode.support_labels, adjoint=implicit)
        x = sol.x if steps else {name: part.detach() for name, part in sol.x.items()}
        loss = cross_entropy(learner.answer(episode.query, x), episode.query_labels).mean()
        weights = list(learner.parameters())
        parts = torch.autograd.grad(loss, weights, materialize_grads=True)
    learner.inner = kept
    return torch.cat([part.reshape(-1) for part in parts]), sol.residuals.total[0]


def _median(values: Tensor) -> float:
    return torch.quantile(values.detach().double(), 0.5).item()
