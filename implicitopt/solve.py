"""solve: check, start, iterate, select, attach the gradient."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from functools import cache, partial
from typing import Any, Protocol, cast

import torch
from torch import Tensor

from implicitopt.adjoint.envelope import Attached, Envelope
from implicitopt.adjoint.implicit import Implicit
from implicitopt.autocast import autocast_as_now, autocast_off
from implicitopt.inputs import (
    check_finite,
    check_map,
    check_projection,
    check_warm_start,
    detached,
    initial_state,
    one_layout,
    problem_count,
    refuse_transforms,
    same_kind,
    tensors,
    warn_of_gradient,
    without_gradient,
)
from implicitopt.iteration import Outcome, Progress, Solver, iterate
from implicitopt.kkt import KKT, Point, Residuals
from implicitopt.options import check_callable, check_option
from implicitopt.select import RULES, Rule
from implicitopt.solution import AdjointReport, History, Solution, Status, WarmStart
from implicitopt.solvers.adaptive import Adaptive
from implicitopt.tree import Tree

__all__ = ["Adjoint", "default_tol", "solve"]


class Adjoint(Protocol):
    """How gradients reach a solution."""

    def attach(self, kkt: KKT, point: Point, value: Tensor, report: AdjointReport) -> Attached:
        """The point and value with their gradients."""
        ...


def default_tol(dtype: torch.dtype) -> float:
    """1e-6 in float64, 1e-4 in float32, 1e-2 in half precision."""
    return {torch.float64: 1e-6, torch.float32: 1e-4}.get(dtype, 1e-2)


def solve(
    f: Callable[[Tree, Tree], Tree],
    loss: Callable[[Tree, Tree], Tensor],
    x0: Tree,
    z0: Any = None,
    *,
    solver: Solver | None = None,
    adjoint: Adjoint | None = None,
    project: Callable[[Tree], Tree] | None = None,
    maximize: bool = False,
    max_steps: int = 100,
    tol: float | None = None,
    select: str | Rule = "best",
    warm_start: Solution | WarmStart | None = None,
    callback: Callable[[Progress], object] | None = None,
    throw: bool = False,
    history: bool = False,
    sample_iterate: bool = False,
    subset: Callable[[Tensor], tuple[Any, ...]] | None = None,
) -> Solution:
    """Minimize ``loss(z, x)`` over ``x`` subject to ``z = f(z, x)``.

    State, adjoint and input are solved jointly as one augmented fixed point (JIIO, section 3).

    Args:
        f: the fixed-point map, ``f(z, x) -> z``. z and x are tensors or pytrees of tensors. It may
            close over modules and tensors; gradients reach all of them.
        loss: ``loss(z, x)`` of shape ``(B,)``, when dim 0 of every leaf of x and z is a batch of B
            independent problems, or ``()`` for a single problem.
        x0: the input to start from, floating point, finite. Solutions do not depend on it (other
            than through which local minimum is found), so no gradient reaches it.
        z0: the state to start from, tensors or a callable ``x0 -> z0``; the solver starts from
            ``f(z0, x0)``. None: zeros shaped like ``x0`` if f maps those to their own shape.
        solver: ``Adaptive(...)``, ``Joint(...)``, ``OneShot(...)``, ``SQP(...)`` or
            ``Nested(...)``; None: ``Adaptive()``, SQP with a fallback to the joint iteration and
            descent.
        adjoint: ``Envelope()`` (default), ``Implicit(...)`` or ``FrozenInput(...)``.
        project: the projection onto the set C that x is confined to, per problem: ``L2Ball``,
            ``LinfBall``, ``Box``, ``Simplex`` or any callable ``x -> x``.
        maximize: maximize the loss instead.
        max_steps: sweeps at most (for ``Nested``: updates of x).
        tol: relative KKT residual, per problem, at which a problem is CONVERGED. Default 1e-6 in
            float64, 1e-4 in float32, 1e-2 in half precision; 0 runs all of ``max_steps``. Nor does
            a problem count as converged whose ‖f − z‖ exceeds tol (1 + ‖(z, x)‖), or whose KKT
            residual as such exceeds √tol times 1 + ‖(z, x)‖ at the start: a μ or an x that grows
            without bound makes every residual small beside it.
        select: which iterate is returned where none met ``tol``: "best", "last", "paper" or a
            callable (see :mod:`implicitopt.select`).
        warm_start: an earlier solution of problems of the same shape, or a ``WarmStart`` made of
            several, to start from instead of ``x0`` and ``z0``.
        callback: called with a :class:`Progress` after every sweep; stops the solve by returning
            True.
        throw: raise :class:`SolveError` if a problem did not converge.
        history: record the loss and residuals of every step.
        sample_iterate: also return one iterate drawn uniformly from each problem's trajectory.
        subset: ``problems -> (f, loss)``, or ``(f, loss, project)`` where there is a ``project``:
            the functions for some of the problems, given their indices, an int64 tensor ``(K,)``.
            Finished problems then leave the batch whenever half of it has finished, so that a few
            hard ones do not cost what the whole batch does; results equal those without it to
            rounding. None: all stay, since f and loss may hold data of each problem.

    Returns:
        A :class:`Solution`; ``sol.value`` carries the envelope gradient.

    Raises:
        ValueError, TypeError: an input is not as described above.
        RuntimeError: called under ``torch.inference_mode`` or inside of a ``torch.func`` transform.
        SolveError: with ``throw=True``, a problem did not converge.

    Source: Gurumurthy, Bai, Manchester, Kolter, "Joint inference and input optimization in
    equilibrium networks", NeurIPS 2021.

    >>> import torch, implicitopt
    >>> f = lambda z, x: torch.tanh(0.5 * z + x)
    >>> loss = lambda z, x: ((z - 0.3) ** 2).sum(-1) + 0.01 * (x**2).sum(-1)
    >>> sol = implicitopt.solve(f, loss, torch.zeros(4, 2))
    >>> sol.converged.all().item(), sol.x.shape
    (True, torch.Size([4, 2]))
    """
    refuse_transforms("solve")
    solver = Adaptive() if solver is None else solver
    adjoint = Envelope() if adjoint is None else adjoint
    rule = _check_options(
        solver,
        adjoint,
        project,
        maximize,
        max_steps,
        tol,
        select,
        warm_start,
        callback,
        {"throw": throw, "history": history, "sample_iterate": sample_iterate},
    )
    if subset is not None:
        _check_subset(subset, solver)
    kkt, start, shape = _prepare(f, loss, x0, z0, project, maximize, warm_start)
    tol = default_tol(start.x.dtype) if tol is None else float(tol)
    kept = _kept(adjoint, kkt, start, max_steps)
    with without_gradient(), autocast_off(start.x.device):
        outcome = iterate(
            kkt,
            solver,
            start,
            max_steps=max_steps,
            tol=tol,
            rule=rule,
            callback=callback,
            history=history,
            sample_iterate=sample_iterate,
            narrow=None if subset is None else _narrowing(kkt, start, shape, project, subset),
            keep=kept,
        )
    solution = _attach(kkt, outcome, adjoint, shape, tol)
    return solution.raise_if_failed() if throw else solution


def _check_options(
    solver: Any, adjoint: Any, project: Any, maximize: Any, max_steps: Any, tol: Any, select: Any,
    warm_start: Any, callback: Any, flags: dict[str, Any],
) -> Rule:  # fmt: skip
    if isinstance(solver, type) or not (hasattr(solver, "init") and hasattr(solver, "step")):
        raise TypeError(
            "solver must be Adaptive(...), Joint(...), OneShot(...), SQP(...), Nested(...) or an "
            f"object with their methods; got {solver!r}. Pass one, or leave it out for Adaptive()."
        )
    if isinstance(adjoint, type) or not hasattr(adjoint, "attach"):
        raise TypeError(
            f"adjoint must be Envelope(), Implicit(...) or FrozenInput(...); got {adjoint!r}. "
            "Pass one, or leave it out for Envelope()."
        )
    for name, value in (("project", project), ("callback", callback)):
        if value is not None and (isinstance(value, type) or not callable(value)):
            raise TypeError(
                f"{name} must be callable or None; got {value!r}. Pass a function, or an object "
                "such as L2Ball(1.0)."
            )
    for name, value in {"maximize": maximize, **flags}.items():
        check_option(name, value, bool)
    check_option("max_steps", max_steps, int, least=1)
    if tol is not None:
        check_option("tol", tol, float, least=0)
    if warm_start is not None and not isinstance(warm_start, (Solution, WarmStart)):
        raise TypeError(
            "warm_start must be a Solution from solve() or a WarmStart(x, z, mu); got "
            f"{warm_start!r}. Pass one, or leave it out."
        )
    if isinstance(select, str):
        if select not in RULES:
            raise ValueError(
                f"select must be one of {sorted(RULES)} or a callable; got {select!r}. Pass one, "
                "or leave it out."
            )
        return RULES[select]
    if isinstance(select, type) or not callable(select):
        raise TypeError(
            f"select must be one of {sorted(RULES)} or a callable; got {select!r}. Pass one, such "
            "as Best(), or leave it out."
        )
    return cast(Rule, select)


def _check_subset(subset: Any, solver: Any) -> None:
    if not callable(subset):
        raise TypeError(
            f"subset must be callable as subset(problems) -> (f, loss); got {subset!r}. Pass such "
            "a function, or leave it out."
        )
    if not hasattr(solver, "take"):
        raise TypeError(
            f"solver must have a method take(state, rows) for subset=..., as Adaptive(...), "
            f"Joint(...), OneShot(...) and SQP(...) have; got {solver!r}. Use one of these, or "
            "leave subset out."
        )


def _narrowing(
    kkt: KKT, start: Point, shape: tuple[int, ...], project: Any, subset: Callable[[Tensor], Any]
) -> Callable[[Tensor], KKT]:
    """The system of some of the problems, by their indices."""
    if not shape:
        raise ValueError(
            "subset must come with a batch of problems, a loss of shape (B,); got a loss of shape "
            "(), one problem. Leave subset out."
        )
    expected = 2 if project is None else 3

    def narrow(rows: Tensor) -> KKT:
        found = subset(rows)
        if not isinstance(found, tuple) or len(found) != expected or not all(map(callable, found)):
            names = "(f, loss)" if project is None else "(f, loss, project)"
            raise TypeError(
                f"subset must return {names} for the problems asked for; got {found!r}. Return a "
                "tuple of these functions."
            )
        some = kkt.x_layout.unflatten(start.x[rows])
        constrain = check_projection(found[2], some, kkt.x_layout) if project is not None else None
        return replace(kkt, f=found[0], loss=found[1], project=constrain, guarded=False)

    return narrow


def _prepare(
    f: Any, loss: Any, x0: Tree, z0: Any, project: Any, maximize: bool,
    warm_start: Solution | WarmStart | None,
) -> tuple[KKT, Point, tuple[int, ...]]:  # fmt: skip
    """The system and the point to start from: (f(z0, x0), 0, P_C(x0)), or the warm start."""
    check_callable("f", f, "f(z, x)")
    check_callable("loss", loss, "loss(z, x)")
    first = tensors("x0", x0)[0]
    check_finite("x0", x0)
    warn_of_gradient(x0=x0, z0=z0)
    x0 = detached(x0)
    if warm_start is not None:
        check_warm_start(warm_start, x0)
    z0 = initial_state(f, x0, z0 if warm_start is None else detached(warm_start.z))
    same_kind("z0", z0, "x0", first)
    check_finite("z0", z0)
    image = check_map(f, z0, x0)
    batch = problem_count(loss, image, x0)
    sign = -1.0 if maximize else 1.0
    z_layout, x_layout = one_layout(z0, batch), one_layout(x0, batch)
    constrain, autocast = check_projection(project, x0, x_layout), autocast_as_now(first.device)
    kkt = KKT(f, loss, z_layout, x_layout, constrain, sign, autocast)
    with torch.no_grad():
        z, x = z_layout.flatten(image).to(first.dtype), x_layout.flatten(x0)
        mu = torch.zeros_like(z)
        if warm_start is not None:
            z, mu = z_layout.flatten(z0), sign * z_layout.flatten(detached(warm_start.mu))
            x = x_layout.flatten(detached(warm_start.x))
        x = kkt.constrain(x)
    return kkt, Point(z, mu, x).contiguous(), () if batch is None else (batch,)


def _kept(adjoint: Adjoint, kkt: KKT, start: Point, max_steps: int) -> int:
    """How many differences between sweeps the backward pass will have a use for."""
    if not isinstance(adjoint, Implicit) or not torch.is_grad_enabled():
        return 0
    return min(max_steps, adjoint.differences(kkt, start))


def _attach(
    kkt: KKT, outcome: Outcome, adjoint: Adjoint, shape: tuple[int, ...], tol: float
) -> Solution:
    """Give the solution its gradient, and its problems the shapes they came in."""
    report, work = AdjointReport(point=outcome.status), replace(kkt.work)
    point, value = outcome.point, outcome.value
    if torch.is_grad_enabled():
        kkt = replace(kkt, autocast=nullcontext)  # f in a backward pass: as that finds autocast
        if outcome.trail is not None:
            settled = outcome.status == Status.CONVERGED
            kkt.near_inverse = cache(partial(outcome.trail.inverse, settled))
        sound = outcome.status != torch.full_like(outcome.status, Status.NONFINITE)
        found = adjoint.attach(kkt, _stand_in(point, sound), value, report)
        z, mu, x, value = (
            torch.where(sound if block.dim() == 1 else sound[:, None], block, plain)
            for block, plain in zip(found, (*point, value), strict=True)
        )
    else:
        z, mu, x = point
    z_of, x_of = kkt.z_layout.unflatten, kkt.x_layout.unflatten
    history = outcome.history
    if history is not None and not shape:
        history = History(
            history.value[:, 0], Residuals(*(block[:, 0] for block in history.residuals))
        )
    drawn = outcome.drawn
    return Solution(
        x=x_of(x),
        z=z_of(z),
        mu=z_of(kkt.sign * mu),
        value=(kkt.sign * value).reshape(shape),
        status=outcome.status.reshape(shape),
        residuals=Residuals(*(block.reshape(shape) for block in outcome.residuals)),
        steps=outcome.steps.reshape(shape),
        sweeps=work,
        tol=tol,
        history=history,
        iterate=None if drawn is None else (z_of(drawn[0]), x_of(drawn[1])),
        adjoint=report,
    )


def _stand_in(point: Point, sound: Tensor) -> Point:
    """The point with every failed problem's row replaced by a sound one's.

    Derivatives at a failed problem are NaN, and zero times NaN would reach shared parameters.
    """
    donor = sound.to(torch.uint8).argmax()
    return Point(*(torch.where(sound[:, None], block, block[donor]) for block in point))
