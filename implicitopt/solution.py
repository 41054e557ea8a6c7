"""What a solve returns."""

from __future__ import annotations

import html
from collections import Counter
from dataclasses import dataclass, field, replace
from enum import IntEnum
from typing import Any

from torch import Tensor

from implicitopt.inputs import detached
from implicitopt.kkt import Residuals, Work
from implicitopt.tree import Tree

__all__ = ["AdjointReport", "History", "Solution", "SolveError", "Status", "WarmStart"]


class Status(IntEnum):
    """How one problem of a batch ended.

    ``sol.status`` holds them as int64, which compare with the members.

    >>> import torch, implicitopt
    >>> from implicitopt import Status
    >>> sol = implicitopt.solve(
    ...     lambda z, x: 0.5 * z + x, lambda z, x: ((z - 1) ** 2).sum(-1), torch.zeros(2, 3)
    ... )
    >>> (sol.status == Status.CONVERGED).tolist()
    [True, True]
    >>> Status(sol.status[0].item()).advice
    'the relative KKT residual is at most tol'
    """

    CONVERGED = 0
    MAX_STEPS = 1
    STALLED = 2
    NONFINITE = 3

    @property
    def advice(self) -> str:
        """What happened and what to do about it."""
        return _ADVICE[self]


_ADVICE = {
    Status.CONVERGED: "the relative KKT residual is at most tol",
    Status.MAX_STEPS: (
        "max_steps ran out first; raise max_steps, or loosen tol; if that does not help, run "
        "implicitopt.check(f, loss, x0, z0)"
    ),
    Status.STALLED: (
        "neither the loss nor the KKT residual improved for many steps; loosen tol, use float64, "
        "or run implicitopt.check(f, loss, x0, z0)"
    ),
    Status.NONFINITE: (
        "f, the loss or a derivative became NaN or infinite; look at this problem's data, start "
        "nearer to a solution, or constrain x with project="
    ),
}


class SolveError(RuntimeError):
    """Raised on request when problems did not converge; ``solution`` holds what was found.

    >>> import torch, implicitopt
    >>> f, loss = lambda z, x: 0.5 * z + x, lambda z, x: ((z - 1) ** 2).sum(-1)
    >>> try:
    ...     implicitopt.solve(f, loss, torch.zeros(2, 3), max_steps=2, throw=True)
    ... except implicitopt.SolveError as error:
    ...     print(error.solution.status.tolist(), error)
    [1, 1] 2 of 2 problems did not reach the relative KKT residual tol=0.0001. ...
    """

    def __init__(self, message: str, solution: Any) -> None:
        super().__init__(message)
        self.solution = solution


@dataclass
class AdjointReport:
    """How the linear solves of the last backward pass through a solution went.

    But for ``point``, every field is ``None`` until ``.backward()`` has run.

    >>> import torch, implicitopt
    >>> target = torch.ones(2, 3, requires_grad=True)
    >>> sol = implicitopt.solve(
    ...     lambda z, x: 0.5 * z + x, lambda z, x: ((z - target) ** 2 + x**2).sum(-1),
    ...     torch.zeros(2, 3), adjoint=implicitopt.Implicit(),
    ... )
    >>> sol.x.sum().backward()
    >>> sol.adjoint.status.tolist(), bool((sol.adjoint.residual < 1e-4).all())
    ([0, 0], True)
    """

    status: Tensor | None = None  #: `Status` per problem, ``(B,)``
    residual: Tensor | None = None  #: true relative residual ‖D(Hw − c)‖ / ‖Dc‖, ``(B,)``
    steps: Tensor | None = None  #: Krylov iterations per problem, ``(B,)``
    products: int = 0  #: Jacobian products over all backward passes so far
    point: Tensor | None = None  #: `Status` of the solve at whose point they were made, ``(B,)``


@dataclass(frozen=True)
class History:
    """Per-step records, each ``(steps, B)``; a problem's entries repeat once it has finished."""

    value: Tensor
    residuals: Residuals


@dataclass(frozen=True)
class WarmStart:
    """A point to start from, where it is not one :class:`Solution` as a whole.

    For problems that come again, in other batches: keep each one's ``x``, ``z`` and ``mu``, and
    start the next solve from the rows of those in the batch. With x alone kept, the first sweeps
    from a new state and a zero adjoint would lead x astray.

    Args:
        x: shaped as ``x0``.
        z: shaped as ``f`` returns it.
        mu: shaped as z; zeros where nothing is known.

    >>> import torch, implicitopt
    >>> f, x0 = lambda z, x: torch.tanh(0.5 * z + x), torch.zeros(6, 2)
    >>> loss = lambda z, x: ((z - 0.3) ** 2).sum(-1) + 0.01 * (x**2).sum(-1)
    >>> sol = implicitopt.solve(f, loss, x0)
    >>> rows = torch.tensor([4, 1])
    >>> kept = implicitopt.WarmStart(sol.x[rows], sol.z[rows], sol.mu[rows])
    >>> implicitopt.solve(f, loss, x0[rows], warm_start=kept).steps.tolist()
    [1, 1]
    """

    x: Tree
    z: Tree
    mu: Tree


@dataclass(frozen=True, repr=False)
class Solution:
    """The result of :func:`implicitopt.solve`.

    ``x``, ``z`` and ``mu`` are shaped as ``x0`` and ``z0``; per-problem fields are shaped as
    ``loss`` returns its value, ``(B,)`` or ``()``. Pickled, or copied by ``copy.deepcopy``, it has
    lost its gradient.

    >>> import torch, implicitopt
    >>> sol = implicitopt.solve(
    ...     lambda z, x: 0.5 * z + x, lambda z, x: ((z - 1) ** 2).sum(-1), torch.zeros(2, 3)
    ... )
    >>> sol.x.shape, sol.value.shape, sol.residuals.total.max() <= sol.tol
    (torch.Size([2, 3]), torch.Size([2]), tensor(True))
    >>> sol
    Solution(CONVERGED 2; value ..., KKT residual ... at worst, steps ..., sweeps ...)
    """

    x: Tree  #: the input found
    z: Tree  #: the state, z ≈ f(z, x)
    mu: Tree  #: the adjoint of the loss as given: μ ≈ (∂f/∂z)ᵀ μ + (∂ℓ/∂z)ᵀ
    value: Tensor  #: ℓ(z, x), carrying the envelope gradient
    status: Tensor  #: `Status` as int64
    residuals: Residuals  #: relative norms of the KKT blocks at the solution
    steps: Tensor  #: steps made while the problem was active
    sweeps: Work  #: evaluations of f, of its vjp and of the loss, each over the batch
    tol: float  #: the tolerance that was asked for
    history: History | None = None  #: loss and residuals of every step, with ``history=True``
    iterate: tuple[Tree, Tree] | None = None  #: (z, x) drawn uniformly from the trajectory
    adjoint: AdjointReport = field(default_factory=AdjointReport)  #: on the last backward pass

    @property
    def converged(self) -> Tensor:
        """Which problems reached ``tol``."""
        return self.status == Status.CONVERGED

    def __getstate__(self) -> dict[str, Any]:
        # Pickled and deeply copied without the graph, which neither could follow.
        return {name: detached(value) for name, value in vars(self).items()}

    def __copy__(self) -> Solution:
        return replace(self)

    def raise_if_failed(self) -> Solution:
        """Return self if every problem converged, else raise :class:`SolveError`.

        >>> import torch, implicitopt
        >>> sol = implicitopt.solve(
        ...     lambda z, x: 0.5 * z + x, lambda z, x: ((z - 1) ** 2).sum(-1), torch.zeros(2, 3)
        ... )
        >>> sol.raise_if_failed() is sol
        True
        """
        status = self.status.reshape(-1).tolist()
        if all(code == Status.CONVERGED for code in status):
            return self
        residual = self.residuals.total.reshape(-1).tolist()
        failed = [(i, Status(code)) for i, code in enumerate(status) if code]
        listed = ", ".join(f"{i}: {code.name} ({residual[i]:.1e})" for i, code in failed[:10])
        more = f", and {len(failed) - 10} more" if len(failed) > 10 else ""
        advice = "; ".join(f"{code.name}: {code.advice}" for code in sorted({c for _, c in failed}))
        raise SolveError(
            f"{len(failed)} of {len(status)} problems did not reach the relative KKT residual "
            f"tol={self.tol:g}. By problem, with its residual: {listed}{more}. {advice}.",
            self,
        )

    def __repr__(self) -> str:
        counts = Counter(Status(code).name for code in self.status.reshape(-1).tolist())
        states = ", ".join(f"{name} {count}" for name, count in sorted(counts.items()))
        if self.status.numel() == 0:
            return "Solution(no problems)"
        sound = self.status != Status.NONFINITE
        measured = "no finite value"
        if bool(sound.any()):
            value, residual = self.value.detach()[sound], self.residuals.total[sound]
            measured = f"value {value.mean():.4g}, KKT residual {residual.max():.1e} at worst"
        return (
            f"Solution({states}; {measured}, "
            f"steps {self.steps.max().item()}, sweeps {self.sweeps.vjp})"
        )

    def _repr_html_(self) -> str:
        """What a notebook shows: the line above, and a row for each status that occurs."""
        names = ("status", "problems", "mean loss", "worst z", "worst mu", "worst x", "most steps")
        cells = ["".join(f"<th>{name}</th>" for name in names)]
        for status in Status:
            mask = self.status == status
            if bool(mask.any()):
                worst = (f"{block[mask].max():.1e}" for block in self.residuals)
                mean, steps = self.value.detach()[mask].mean(), self.steps[mask].max()
                row = (status.name, int(mask.sum()), f"{mean:.4g}", *worst, int(steps))
                cells.append("".join(f"<td>{cell}</td>" for cell in row))
        rows = "".join(f"<tr>{row}</tr>" for row in cells)
        return f"<p><code>{html.escape(repr(self))}</code></p><table>{rows}</table>"
