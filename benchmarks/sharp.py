"""What losses that bend sharply cost, on linear maps: sweeps to a KKT residual of 1e-6.

f = A z + B x, where A's spectral radius is .8, and convex losses whose curvature changes a lot from
one place to another, with .05 ‖x‖² added; 32 random targets of each, at most 400 sweeps.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from benchmarks.families import BATCH, Draw, Problem, scaled
from benchmarks.medians import Found, medians, table

__all__ = ["LOSSES", "measure", "sharp", "table"]

SIZES = ((8, 4), (30, 8), (40, 20))
LABELS = torch.arange(BATCH) % 4
#: Of states z and random targets y.
LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "pseudo-Huber, width .1": lambda z, y: 0.1 * torch.hypot((z - y) / 0.1, z.new_ones(())).sum(-1),
    "fourth power": lambda z, y: (z - y).pow(4).sum(-1),
    "exponential": lambda z, y: ((z - y).exp() - 1.5 * z).sum(-1),
    "softmax of 5 (z − y)": lambda z, y: cross_entropy(5 * (z - y), LABELS, reduction="none"),
}  # fmt: skip


def sharp(name: str, n: int, d: int) -> Problem:
    """Problems of n states and d inputs."""
    draw = Draw(0)
    A, B, y = scaled(draw, n, 0.8, "radius"), draw(n, d) / d**0.5, draw(BATCH, n)

    def f(z: Tensor, x: Tensor) -> Tensor:
        return z @ A.T + x @ B.T

    def loss(z: Tensor, x: Tensor) -> Tensor:
        return LOSSES[name](z, y) + 0.05 * x.square().sum(-1)

    return Problem(f, loss, y.new_zeros(BATCH, d), y.new_zeros(BATCH, n))


def measure(*, quick: bool, bar: Callable[..., Any]) -> Found:
    """Every loss and size with every solver."""
    cases = [(name, *size) for name in LOSSES for size in SIZES][: 1 if quick else None]
    return medians(
        (f"{name}, n {n}, d {d}", sharp(name, n, d)) for name, n, d in bar(cases, desc="sharp")
    )
