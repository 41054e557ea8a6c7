"""The baseline: a full forward and adjoint solve for every step of an optimizer on x."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from implicitopt.accelerators.anderson import Anderson
from implicitopt.accelerators.protocol import Accelerator, check_accelerator
from implicitopt.fixed_point import picard_to_rest
from implicitopt.kkt import KKT, Point, Sweep
from implicitopt.options import check_option

__all__ = ["Nested", "ProjectedGradient"]


class ProjectedGradient(torch.optim.Optimizer):
    """x ← x − lr · g/‖g‖ per problem, which ``solve(..., project=...)`` then projects: PGD.

    Args:
        params: what ``torch.optim`` optimizers take; dim 0 is the batch.
        lr: step length, in units of x.
        normalize: divide each problem's gradient by its norm; False: plain gradient descent.

    Raises:
        ValueError: lr is not positive.

    >>> from functools import partial
    >>> import torch, implicitopt
    >>> sol = implicitopt.solve(
    ...     lambda z, x: 0.5 * z + x, lambda z, x: ((z - 9) ** 2).sum(-1), torch.zeros(2, 3),
    ...     solver=implicitopt.Nested(partial(implicitopt.ProjectedGradient, lr=0.1)),
    ...     project=implicitopt.L2Ball(0.5), max_steps=20,
    ... )
    >>> bool((sol.x.norm(dim=1) - 0.5).abs().max() < 1e-5)
    True
    """

    def __init__(self, params: Iterable[Tensor], lr: float, normalize: bool = True) -> None:
        check_option("ProjectedGradient lr", lr, float, above=0)
        check_option("ProjectedGradient normalize", normalize, bool)
        super().__init__(params, {"lr": lr, "normalize": normalize})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None if closure is None else closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                g = parameter.grad
                if group["normalize"]:
                    length = torch.linalg.vector_norm(g.flatten(1), dim=1)
                    length = torch.where(length > 0, length, torch.ones_like(length))
                    g = g / length.reshape(-1, *[1] * (g.dim() - 1))
                parameter.sub_(g, alpha=group["lr"])
        return loss


@dataclass(frozen=True)
class Nested:
    """Solve z = f(z, x), then its adjoint, then step x: the loop in a loop that everyone has.

    Args:
        optimizer: ``params -> torch.optim.Optimizer``, such as ``partial(torch.optim.Adam,
            lr=0.1)``, :class:`ProjectedGradient` for PGD. Elementwise optimizers keep problems
            apart; LBFGS would couple them and serves a single problem only.
        accelerator: of the forward and the adjoint iteration.
        inner_steps: iterations of each, at most.
        inner_tol: relative residual at which each stops early.
        warm: start each solve from the last one's solution; False: from the start of the run.

    ``max_steps`` and ``Solution.steps`` count updates of x.

    Raises:
        TypeError, ValueError: an option is not as above; in ``solve``, ``optimizer`` makes no
            optimizer, or an LBFGS for more than one problem.

    >>> from functools import partial
    >>> import torch, implicitopt
    >>> sol = implicitopt.solve(
    ...     lambda z, x: 0.5 * z + x, lambda z, x: ((z - 1) ** 2).sum(-1), torch.zeros(2, 3),
    ...     solver=implicitopt.Nested(partial(torch.optim.Adam, lr=0.1)), max_steps=200,
    ... )
    >>> bool((sol.x - 0.5).abs().max() < 1e-2)
    True
    """

    optimizer: Callable[..., torch.optim.Optimizer] = field(
        default_factory=lambda: partial(torch.optim.Adam, lr=0.1)
    )
    accelerator: Accelerator = field(default_factory=lambda: Anderson("II", memory=5))
    inner_steps: int = 20
    inner_tol: float = 1e-6
    warm: bool = True

    def __post_init__(self) -> None:
        if not callable(self.optimizer):
            raise TypeError(
                "Nested(optimizer=...) must make an optimizer from parameters, such as "
                f"partial(torch.optim.Adam, lr=0.1); got {self.optimizer!r}. Pass one, or leave "
                "it out for Adam."
            )
        check_accelerator("Nested accelerator", self.accelerator)
        check_option("Nested inner_steps", self.inner_steps, int, least=1)
        check_option("Nested inner_tol", self.inner_tol, float, least=0)
        check_option("Nested warm", self.warm, bool)

    @property
    def initial_sweeps(self) -> int:
        """The first sweep looks at the start, before any update of x."""
        return 1

    def init(self, kkt: KKT, start: Point) -> tuple[Point, NestedState]:
        parameter = torch.nn.Parameter(start.x.clone())
        optimizer = self.optimizer([parameter])
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise TypeError(
                f"Nested(optimizer=...) must return a torch.optim.Optimizer; got {optimizer!r}. "
                "Pass partial(torch.optim.Adam, lr=0.1), say."
            )
        if isinstance(optimizer, torch.optim.LBFGS) and len(start.x) > 1:
            raise ValueError(
                "LBFGS must have a single problem, since it would couple several; got "
                f"{len(start.x)}. Solve one at a time or use an elementwise optimizer such as Adam."
            )
        state = NestedState(parameter, optimizer, start)
        return self._equilibrium(kkt, start, state), state

    def step(
        self, kkt: KKT, point: Point, sweep: Sweep, state: NestedState
    ) -> tuple[Point, NestedState]:
        parameter, latest = state.parameter, [point]
        parameter.copy_(point.x)
        sweeps = [sweep]

        def closure() -> Any:
            with torch.no_grad():
                if not sweeps:  # a line search looks elsewhere
                    moved = latest[0]._replace(x=kkt.constrain(parameter.detach().clone()))
                    latest[0] = self._equilibrium(kkt, moved, state)
                    sweeps.append(kkt.sweep(latest[0]))
                found = sweeps.pop()
                parameter.grad = found.grad.clone()
                return found.value.sum()

        state.optimizer.step(closure)
        x = kkt.constrain(parameter.detach().clone())
        return self._equilibrium(kkt, latest[0]._replace(x=x), state), state

    def restart(self, state: NestedState, mask: Tensor) -> NestedState:
        return state  # the point goes back to the best iterate; an optimizer has no smaller step

    def _equilibrium(self, kkt: KKT, point: Point, state: NestedState) -> Point:
        """z = f(z, x) and its adjoint, at the point's x."""
        x = point.x
        z, mu = (point if self.warm else state.start)[:2]
        to_rest = partial(
            picard_to_rest,
            accelerator=self.accelerator,
            max_steps=self.inner_steps,
            tol=self.inner_tol,
        )

        def forward(z: Tensor) -> Tensor:
            kkt.work.f += 1
            return kkt.state_map(z, x)

        z, _, _ = to_rest(forward, z)
        pull, loss_z = kkt.linearize(z, x)
        mu, _, _ = to_rest(lambda mu: pull(mu) + loss_z, mu)
        return Point(z, mu, x)


@dataclass
class NestedState:
    """The optimizer and its parameter, ``(B, d)``, and the point that cold solves start from."""

    parameter: torch.nn.Parameter
    optimizer: torch.optim.Optimizer
    start: Point
