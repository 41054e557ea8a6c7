"""The equilibrium learner: a task is learned by one solve for the vector that says what it is."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

import implicitopt

from .classifier import State, TaskClassifier, Vector
from .learner import Learner, cross_entropy, share_right
from .tasks import Episode, Tasks


@dataclass(frozen=True)
class Inner:
    """How a task is learned, and how the model is from that.

    Args:
        decay: λ, of mean(v²) and of each class's direction.
        sweeps: of a task's solve.
        tol: at which a task's solve ends before that.
        query_steps, query_tol: of the queries' equilibrium.
        gradient: "frozen", "implicit" or "envelope"; see `Equilibrium`.
        adjoint_steps, adjoint_tol: Krylov steps, and the residual at which they end.
        penalty: weight of the Jacobian penalty.
        solver: of the task's solve; None: the default.
    """

    decay: float = 0.1
    sweeps: int = 12
    tol: float = 1e-3
    query_steps: int = 15
    query_tol: float = 1e-2
    gradient: Literal["frozen", "implicit", "envelope"] = "frozen"
    adjoint_steps: int = 60
    adjoint_tol: float = 1e-2
    penalty: float = 0.5
    solver: Any = None


class Equilibrium(Learner):
    """Learn a task by one solve, and answer queries at the equilibrium under what was learned.

        x* = argmin over x of  mean CE(read(z, x), labels) + λ‖x‖²   s.t.  z = f(z, x; support)
        loss = mean CE(read(z', x*), labels)                          with  z' = f(z', x*; query)

    (JIIO, eq. 28–29). The outer loss is not the inner one, so its gradient is one of three:

    - "frozen": x* is a constant, and z' is differentiated by the implicit function theorem. This is
      what the paper does. It learns features under which what was found fits the queries, and is
      blind to how the weights change what is found.
    - "implicit": x* is differentiated too, through the support's whole KKT system. It is exact if
      that system is solved; see `conditioning`.
    - "envelope": another outer loss, the inner one's least value with support *and* queries known:
      how well one vector can fit all of a task's images at that λ. Its gradient is exact and free,
      and needs neither an equilibrium of the queries nor a linear solve. It brings a class's
      drawings together, but never asks what the support alone would lead to.
    """

    def __init__(self, tasks: Tasks, model: TaskClassifier, inner: Inner) -> None:
        super().__init__(tasks)
        self.model, self.inner = model, inner

    def task_loss(self, labels: Tensor, decay: float | None = None):
        """ℓ(z, x) of labelled images, one value a task."""
        decay = self.inner.decay if decay is None else decay

        def loss(z: State, x: Vector) -> Tensor:
            value = cross_entropy(self.model.read(z, x), labels)
            value = value + decay * x["film"].square().mean(dim=1)
            if "head" in x:
                value = value + decay * x["head"].square().sum(dim=2).mean(dim=1)
            return value

        return loss

    def learn(self, images: Tensor, labels: Tensor, **options: Any) -> implicitopt.Solution:
        """The solve for the vectors of tasks; ``options`` are more of `implicitopt.solve`'s."""
        ways = int(labels.max()) + 1  # training tasks may have more than those of the test
        return implicitopt.solve(
            self.model.map(images),
            self.task_loss(labels),
            self.model.blank(images, ways),
            self.model.start(images),
            solver=self.inner.solver,
            max_steps=self.inner.sweeps,
            tol=self.inner.tol,
            **options,
        )

    def answer(self, images: Tensor, x: Vector) -> Tensor:
        """Logits of images of tasks that were learned."""
        inner = self.inner
        with warnings.catch_warnings():
            # The loss of an equilibrium that is short of its tolerance is still the one to train.
            warnings.simplefilter("ignore", implicitopt.ConvergenceWarning)
            z = implicitopt.fixed_point(
                self.model.map(images),
                x,
                self.model.start(images),
                max_steps=inner.query_steps,
                tol=inner.query_tol,
                adjoint_tol=inner.adjoint_tol,
                adjoint_max_steps=inner.adjoint_steps,
            )
        return self.model.read(z, x)

    def logits(self, episode: Episode) -> Tensor:
        x = self.learn(episode.support, episode.support_labels).x
        return self.answer(episode.query, {name: part.detach() for name, part in x.items()})

    def loss(self, episode: Episode) -> tuple[Tensor, dict[str, Tensor]]:
        mode, inner = self.inner.gradient, self.inner
        if mode == "envelope":
            images, labels = episode.images, episode.labels
            sol = self.learn(images, labels)
            outer, read = sol.value.mean(), self.model.read(sol.z, sol.x)
        else:
            images, labels = episode.support, episode.query_labels
            implicit = implicitopt.Implicit(tol=inner.adjoint_tol, max_steps=inner.adjoint_steps)
            exact = {"adjoint": implicit} if mode == "implicit" else {}
            sol = self.learn(images, episode.support_labels, **exact)
            x = sol.x if exact else {name: part.detach() for name, part in sol.x.items()}
            read = self.answer(episode.query, x)
            outer = cross_entropy(read, labels).mean()
        logged = {
            "accuracy": share_right(read.detach(), labels).mean(),
            "kkt": sol.residuals.total.mean(),
        }
        if not inner.penalty:
            return outer, logged
        penalty = self.penalty(images, sol)
        return outer + inner.penalty * penalty, logged | {"penalty": penalty}

    def penalty(self, images: Tensor, sol: implicitopt.Solution) -> Tensor:
        """‖∂f/∂z‖²_F over the size of z, of the first task at its solution."""
        z = tuple(branch[:1].detach() for branch in sol.z)
        x = {name: part[:1].detach() for name, part in sol.x.items()}
        size = sum(branch[0].numel() for branch in z)
        return implicitopt.jacobian_penalty(self.model.map(images[:1]), z, x).mean() / size
