"""A bare sweep: the evaluations that no first-order method does without, and nothing else."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from implicitopt.kkt import KKT, Point
from implicitopt.pullback import pullback
from implicitopt.solve import _prepare

__all__ = ["bare", "bare_of"]


@torch.no_grad()
def bare(kkt: KKT, point: Point, vjp: Callable[..., Any] = pullback) -> None:
    """f, its transposed product, and the loss with its gradient; by ``torch.func.vjp`` too."""
    z, mu, x = point
    pull = vjp(kkt.state_map, z, x)[1]
    pull(mu, retain_graph=False)
    value, pull = vjp(kkt.objective, z, x)
    pull(torch.ones_like(value), retain_graph=False)


def bare_of(case: Any) -> Callable[[], None]:
    """A bare sweep of a case with f, loss, x0 and z0, at f(z0, x0) and a multiplier not zero."""
    kkt, start, _ = _prepare(case.f, case.loss, case.x0, case.z0, None, False, None)
    return partial(bare, kkt, start._replace(mu=start.z))
