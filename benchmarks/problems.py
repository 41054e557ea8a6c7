"""The problems of the performance profile, each with fixed seeds and a target.

Linear-quadratic ones, tanh maps, monotone operator networks, classification losses and constrained
problems go to a KKT residual; what trained models are asked for to a loss within 1 % of the best
known, since kinks keep their residuals up.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.families import Draw, scaled
from implicitopt import Box, L2Ball, LinfBall, Simplex

__all__ = ["Setting", "problems"]


@dataclass(frozen=True)
class Setting:
    """A batch of problems: the arguments of ``implicitopt.solve``.

    ``tol`` is the KKT residual to reach; None: a loss within 1 % of the best known.
    """

    arguments: tuple[Any, ...]
    tol: float | None
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def batch(self) -> int:
        return len(self.arguments[2])


def quadratic(
    condition: float, rho: float, batch: int, *, seed: int = 0, lam: float = 1e-2
) -> tuple[Any, ...]:
    """f = Az + Bx + c, ℓ = ½‖Wz − y‖² + ½λ‖x‖², W of the given condition number."""
    draw, n, d = Draw(seed), 40, 10
    A, B, c = scaled(draw, n, rho, "radius"), draw(n, d) / d**0.5, draw(batch, n)
    U, V = (torch.linalg.qr(draw(n, n)).Q for _ in range(2))
    W = U * torch.logspace(0, -torch.tensor(condition).log10().item(), n, dtype=U.dtype) @ V
    y = draw(batch, n)

    def f(z: Tensor, x: Tensor) -> Tensor:
        return z @ A.T + x @ B.T + c

    def loss(z: Tensor, x: Tensor) -> Tensor:
        return 0.5 * ((z @ W.T - y) ** 2).sum(-1) + 0.5 * lam * (x**2).sum(-1)

    return f, loss, c.new_zeros(batch, d), torch.zeros_like(c)


def tanh(
    kind: str, rho: float, batch: int, dtype: torch.dtype, *, classes: int = 0, seed: int = 0
) -> tuple[Any, ...]:
    """f = tanh(Wz + Ux + b); ℓ is a squared error, or the cross-entropy of so many classes."""
    draw, n, d = Draw(seed, dtype), 64, 8
    W, U, b = scaled(draw, n, rho, kind), draw(n, d) / d**0.5, 0.1 * draw(n)
    C, y = draw(classes or 10, n) / n**0.5, 0.3 * draw(batch, 10)
    labels = torch.arange(batch) % max(classes, 1)

    def f(z: Tensor, x: Tensor) -> Tensor:
        return torch.tanh(z @ W.T + x @ U.T + b)

    def loss(z: Tensor, x: Tensor) -> Tensor:
        shown = z @ C.T
        if classes:
            fit = torch.nn.functional.cross_entropy(3 * shown, labels, reduction="none")
        else:
            fit = 0.5 * ((shown - y) ** 2).sum(-1)
        return fit + 0.05 * (x**2).sum(-1)

    return f, loss, b.new_zeros(batch, d), b.new_zeros(batch, n)


def monotone(margin: float, batch: int, dtype: torch.dtype, *, seed: int = 0) -> tuple[Any, ...]:
    """A monotone operator network, damped: z ← ½z + ½ softplus(Wz + Ux + b), W ≼ (1 − margin) I.

    Source: Winston and Kolter, "Monotone operator equilibrium networks", NeurIPS 2020.
    """
    draw, n, d = Draw(seed, dtype), 48, 8
    P, Q = draw(n, n) / n**0.5, draw(n, n) / n**0.5
    W = (1 - margin) * torch.eye(n, dtype=dtype) - 0.3 * P.T @ P + 0.5 * (Q - Q.T)
    U, b, C, y = draw(n, d) / d**0.5, 0.1 * draw(n), draw(10, n) / n**0.5, draw(batch, 10)

    def f(z: Tensor, x: Tensor) -> Tensor:
        return 0.5 * z + 0.5 * torch.nn.functional.softplus(z @ W.T + x @ U.T + b)

    def loss(z: Tensor, x: Tensor) -> Tensor:
        return 0.5 * ((z @ C.T - y) ** 2).sum(-1) + 0.05 * (x**2).sum(-1)

    return f, loss, b.new_zeros(batch, d), b.new_zeros(batch, n)


def problems(
    trained: dict[str, Callable[[], Setting]] | None = None,
) -> dict[str, Callable[[], Setting]]:
    """Every problem by name, made when called; ``trained`` adds models by name."""
    f32, f64 = torch.float32, torch.float64
    made: dict[str, tuple[Callable[[], tuple[Any, ...]], float, dict[str, Any]]] = {}

    def add(name: str, make: Callable[[], tuple[Any, ...]], tol: float, **options: Any) -> None:
        made[f"{name}, to {tol:g}"] = (make, tol, options)

    for condition in (1.0, 1e2, 1e4, 1e6):
        for rho, batch in ((0.3, 1), (0.9, 16)):
            make = partial(quadratic, condition, rho, batch)
            for tol in (1e-3, 1e-6):
                add(f"linear, cond {condition:.0e}, ρ {rho}, B {batch}", make, tol)
    for kind in ("gauss", "radius", "orth", "sym"):
        for rho, batch, dtype, tol in (
            (0.3, 64, f32, 1e-3), (0.9, 8, f64, 1e-3), (0.9, 8, f64, 1e-6), (0.99, 8, f64, 1e-6),
        ):  # fmt: skip
            shown = str(dtype).removeprefix("torch.")
            make = partial(tanh, kind, rho, batch, dtype)
            add(f"tanh, {kind}, ρ {rho}, B {batch}, {shown}", make, tol)
        make = partial(tanh, kind, 0.9, 16, f64, classes=10)
        add(f"tanh, {kind}, ρ 0.9, softmax of 10", make, 1e-6)
    for kind in ("gauss", "orth"):
        make = partial(tanh, kind, 0.8, 16, f64, classes=2)
        add(f"tanh, {kind}, ρ 0.8, logistic", make, 1e-6)
    for margin in (0.5, 0.1):
        for batch, dtype, tol in ((1, f64, 1e-6), (32, f32, 1e-3)):
            make = partial(monotone, margin, batch, dtype)
            add(f"monotone, margin {margin}, B {batch}", make, tol)
    sets = {"ball": L2Ball(0.5), "cube": LinfBall(0.2), "box": Box(0.0, 1.0), "simplex": Simplex()}
    for name, project in sets.items():
        for kind, maximize in (("gauss", True), ("orth", False)):
            make = partial(tanh, kind, 0.8, 16, f64, classes=10)
            aim = "max" if maximize else "min"
            add(f"{aim} over {name}, {kind}", make, 1e-6, project=project, maximize=maximize)
    found: dict[str, Callable[[], Setting]] = {
        name: cache(lambda make=make, tol=tol, options=options: Setting(make(), tol, options))
        for name, (make, tol, options) in made.items()
    }
    for name, make in (trained or {}).items():
        found[name] = cache(make)
    return found
