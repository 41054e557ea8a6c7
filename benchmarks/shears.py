"""What far from normal maps cost: sweeps to a KKT residual of 1e-6.

f = (D + N) z + x with D diagonal, within ±.9, and N strictly upper triangular: nothing lasts, and
all the same states grow by about ‖N‖ with each sweep at first. ℓ = ‖z − y‖² + .1 ‖x‖²; 16 random
maps of each kind, at most 400 sweeps.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.families import Draw, Problem
from benchmarks.medians import Found, medians, table

__all__ = ["measure", "shear", "table"]

BATCH = 16
SIZES, NORMS = (2, 6, 20), (1.0, 10.0, 100.0, 1000.0)


def shear(n: int, norm: float) -> Problem:
    """Maps of n states and as many inputs, ‖N‖₂ = ``norm``."""
    draw = Draw(0)
    upper = draw(BATCH, n, n).triu(1)
    upper = norm * upper / torch.linalg.matrix_norm(upper, 2, keepdim=True)
    A = upper + torch.diag_embed(0.9 * draw(BATCH, n).tanh())
    y = draw(BATCH, n)

    def f(z: Tensor, x: Tensor) -> Tensor:
        return torch.einsum("bij,bj->bi", A, z) + x

    def loss(z: Tensor, x: Tensor) -> Tensor:
        return (z - y).square().sum(-1) + 0.1 * x.square().sum(-1)

    return Problem(f, loss, torch.zeros_like(y), torch.zeros_like(y))


def measure(*, quick: bool, bar: Callable[..., Any]) -> Found:
    """Every size and norm with every solver."""
    cases = [(n, norm) for n in SIZES for norm in NORMS][: 1 if quick else None]
    return medians(
        (f"{n} states, ‖N‖ {norm:g}", shear(n, norm)) for n, norm in bar(cases, desc="shears")
    )
