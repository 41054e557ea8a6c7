"""Families of problems with fixed seeds: tanh maps and linear-quadratic problems, in float64."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Draw", "Problem", "families", "linear_quadratic", "scaled", "tanh"]

BATCH = 32


class Problem(NamedTuple):
    """The first four arguments of ``implicitopt.solve``."""

    f: Callable[[Tensor, Tensor], Tensor]
    loss: Callable[[Tensor, Tensor], Tensor]
    x0: Tensor
    z0: Tensor


class Draw:
    """Standard normal tensors from one seed."""

    def __init__(self, seed: int, dtype: torch.dtype = torch.float64) -> None:
        self.generator, self.dtype = torch.Generator().manual_seed(seed), dtype

    def __call__(self, *shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=self.generator).to(self.dtype)


def scaled(draw: Draw, n: int, rho: float, kind: str) -> Tensor:
    """W, n × n: of 2-norm rho (gauss, orth, sym) or of spectral radius rho (radius)."""
    W = draw(n, n)
    if kind == "orth":
        return rho * torch.linalg.qr(W).Q
    if kind == "sym":
        W = W + W.T
    if kind == "radius":
        return W * (rho / torch.linalg.eigvals(W).abs().max())
    return W * (rho / torch.linalg.matrix_norm(W, 2))


def tanh(
    kind: str = "gauss",
    *,
    scale: float = 8**-0.5,
    lam: float = 0.1,
    reachable: bool = True,
    rows: int = 10,
    n: int = 64,
    d: int = 8,
    rho: float = 0.9,
    seed: int = 0,
    batch: int = BATCH,
) -> Problem:
    """f = tanh(Wz + Ux + b), ℓ = ½‖Cz − y‖² + ½λ‖x‖²; U's entries have deviation ``scale``.

    ``reachable``: y = C z(x) for a random x, so that the misfit could be zero; else y is random.
    """
    draw = Draw(seed)
    W, U, b = scaled(draw, n, rho, kind), scale * draw(n, d), 0.1 * draw(n)
    C = draw(rows, n) / n**0.5

    def f(z: Tensor, x: Tensor) -> Tensor:
        return torch.tanh(z @ W.T + x @ U.T + b)

    z0 = torch.zeros(batch, n, dtype=torch.float64)
    if reachable:
        x, z = draw(batch, d), z0
        for _ in range(500):
            z = f(z, x)
        y = z @ C.T
    else:
        y = draw(batch, rows)

    def loss(z: Tensor, x: Tensor) -> Tensor:
        return 0.5 * ((z @ C.T - y) ** 2).sum(-1) + 0.5 * lam * (x**2).sum(-1)

    return Problem(f, loss, z0.new_zeros(batch, d), z0)


def linear_quadratic(
    n: int, d: int, rho: float, *, lam: float = 0.1, seed: int = 0, batch: int = BATCH
) -> Problem:
    """f = Az + Bx + c with spectral radius rho, ℓ = ½‖Wz − y‖² + ½λ‖x‖²."""
    draw = Draw(seed)
    A, B, c = scaled(draw, n, rho, "radius"), draw(n, d), draw(batch, n)
    W, y = draw(n, n) / n**0.5, draw(batch, n)

    def f(z: Tensor, x: Tensor) -> Tensor:
        return z @ A.T + x @ B.T + c

    def loss(z: Tensor, x: Tensor) -> Tensor:
        return 0.5 * ((z @ W.T - y) ** 2).sum(-1) + 0.5 * lam * (x**2).sum(-1)

    return Problem(f, loss, c.new_zeros(batch, d), torch.zeros_like(c))


def families(*, quick: bool = False) -> dict[str, Callable[[], Problem]]:
    """Every family by name; ``quick``: five of them."""
    found: dict[str, Callable[[], Problem]] = {}
    for kind in ("gauss", "radius", "orth", "sym"):
        for scale, shown in ((1.0, "1"), (8**-0.5, "1/√8"), (0.1, ".1")):
            for lam in (1.0, 0.1, 0.01):
                name = f"{kind}, U {shown}, λ {lam:g}"
                found[name] = partial(tanh, kind, scale=scale, lam=lam)
        for lam in (1.0, 0.1, 0.01):
            found[f"{kind}, y random, λ {lam:g}"] = partial(tanh, kind, lam=lam, reachable=False)
        found[f"{kind}, C 64 rows"] = partial(tanh, kind, rows=64)
        found[f"{kind}, C 64 rows, y random"] = partial(tanh, kind, rows=64, reachable=False)
    for n, d, rho in ((30, 8, 0.3), (30, 8, 0.7), (30, 8, 0.95), (40, 12, 0.95)):
        found[f"linear n {n}, d {d}, ρ {rho:g}"] = partial(linear_quadratic, n, d, rho)
    if quick:
        names = ("gauss, U 1/√8, λ 0.1", "radius, U 1/√8, λ 0.1", "gauss, y random, λ 0.1",
                 "gauss, C 64 rows", "linear n 40, d 12, ρ 0.95")  # fmt: skip
        return {name: found[name] for name in names}
    return found
