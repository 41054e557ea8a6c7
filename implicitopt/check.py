"""check(): what to run first when something is off."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from implicitopt import inputs
from implicitopt.diagnosis import findings
from implicitopt.diagnosis.measurements import Directions
from implicitopt.diagnosis.report import Finding, Report
from implicitopt.kkt import KKT
from implicitopt.options import check_callable, check_option
from implicitopt.pullback import CHANGES, REMEDY
from implicitopt.tree import Tree

__all__ = ["Finding", "Report", "check"]

#: Where one of these fails, nothing after it can be told.
ENDS = ("repeatable", "finite start")


def check(
    f: Callable[[Tree, Tree], Tree],
    loss: Callable[[Tree, Tree], Tensor],
    x0: Tree,
    z0: Any = None,
    *,
    project: Callable[[Tree], Tree] | None = None,
    seed: int = 0,
    quiet: bool = False,
) -> Report:
    """Look at a problem before any solver is to blame; print and return what is found.

    Args:
        f, loss, x0, z0, project: as for :func:`implicitopt.solve`.
        seed: of the random directions; torch's own generators are left as they were.
        quiet: do not print.

    Returns:
        A :class:`Report`. Its findings: the inputs as ``solve`` checks them; whether f and the loss
        are the same when called again; whether problems are coupled; whether all is finite;
        whether f contracts; derivatives against central differences, with the steps that the
        dtype allows; the gradient of the reduced problem, likewise; the projection.

    It takes some hundreds of evaluations of f, and raises nothing but a ``TypeError`` for a seed
    that is none: an exception of ``f``, ``loss`` or ``project`` is a finding.

    >>> import torch, implicitopt
    >>> f = lambda z, x: torch.tanh(0.5 * z + x.detach())  # x gets no gradient
    >>> report = implicitopt.check(f, lambda z, x: (z**2).sum(-1), torch.ones(2, 3), quiet=True)
    >>> report.ok, report.coupled
    (False, False)
    >>> print(report["derivatives of f"].detail)
    in x: off by 100% in every problem
    """
    check_option("seed", seed, int)
    check_option("quiet", quiet, bool)
    devices = [torch.device("cuda", k) for k in range(torch.cuda.device_count())]
    with torch.random.fork_rng(devices=devices):
        report = Report(tuple(_look(f, loss, x0, z0, project, Directions(seed))))
    if not quiet:
        print(report)
    return report


def _look(
    f: Any, loss: Any, x0: Tree, z0: Any, project: Any, directions: Directions
) -> list[Finding]:
    try:
        kkt, z, x = _system(f, loss, x0, z0, project)
    except Exception as error:
        return [_raised("inputs", error)]
    found = [
        Finding(
            "inputs",
            True,
            f"{len(x)} problem{'s' if len(x) > 1 else ''} of {z.shape[1]} numbers in z and "
            f"{x.shape[1]} in x; {x.dtype} on {x.device}",
        )
    ]
    looks: list[tuple[str, Callable[[], Finding]]] = [
        ("repeatable", lambda: findings.repeatable(kkt, z, x)),
        ("coupling", lambda: findings.coupled(kkt, z, x, directions)),
        ("finite start", lambda: findings.finite(kkt, z, x)),
        ("plain iteration", lambda: findings.plain(kkt, z, x)),
        ("contraction", lambda: findings.contraction(kkt, z, x, directions)),
        ("derivatives of f", lambda: findings.derivatives(kkt.state_map, "f", z, x, directions)),
        (
            "derivatives of loss",
            lambda: findings.derivatives(kkt.objective, "loss", z, x, directions),
        ),
        ("reduced gradient", lambda: findings.reduced(kkt, z, x, directions)),
    ]
    if kkt.project is not None:
        looks.append(("projection", lambda: findings.projection(kkt, x, directions)))
    with inputs.without_gradient():
        for name, look in looks:
            try:
                found.append(look())
            except Exception as error:
                found.append(_raised(name, error))
            if not found[-1].ok and name in ENDS:
                break
    return found


def _system(f: Any, loss: Any, x0: Tree, z0: Any, project: Any) -> tuple[KKT, Tensor, Tensor]:
    """The system and its start f(z0, x0), P_C(x0), by the checks that solve makes."""
    check_callable("f", f, "f(z, x)")
    check_callable("loss", loss, "loss(z, x)")
    first = inputs.tensors("x0", x0)[0]
    inputs.check_finite("x0", x0)
    x0 = inputs.detached(x0)
    z0 = inputs.initial_state(f, x0, z0)
    inputs.same_kind("z0", z0, "x0", first)
    inputs.check_finite("z0", z0)
    image = inputs.check_map(f, z0, x0)
    batch = inputs.problem_count(loss, image, x0)
    z_layout, x_layout = inputs.one_layout(z0, batch), inputs.one_layout(x0, batch)
    projection = inputs.check_projection(project, x0, x_layout)
    kkt = KKT(f, loss, z_layout, x_layout, projection)
    with torch.no_grad():
        x = kkt.constrain(x_layout.flatten(x0))
        return kkt, z_layout.flatten(image).to(first.dtype), x


def _raised(name: str, error: Exception) -> Finding:
    remedy = REMEDY if CHANGES in str(error) else ""
    return Finding(name, False, f"{type(error).__name__}: {error}", remedy)
