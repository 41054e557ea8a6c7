"""Plain equilibria by implicitopt.fixed_point and by torchdeq, forward and implicit gradient."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

import implicitopt

__all__ = ["CASES", "TOL", "Counter", "Equilibrium", "Solved", "contenders", "draw"]

#: ‖f(z) − z‖ ≤ TOL (1 + ‖z‖) for each problem; the adjoint systems are solved to TOL / 100.
TOL, MAX_STEPS = 1e-6, 200


class Equilibrium(NamedTuple):
    """z = φ(Wz + c) for each row of c: φ is tanh, or the identity if ``affine``."""

    W: Tensor  # (n, n)
    c: Tensor  # (B, n)
    affine: bool

    def f(self, z: Tensor, W: Tensor) -> Tensor:
        image = z @ W.T + self.c
        return image if self.affine else image.tanh()

    def known(self) -> tuple[Tensor, Tensor]:
        """The equilibria and the gradient of Σ½z² in W, by Newton's method and dense solves."""
        z = torch.zeros_like(self.c)
        eye = torch.eye(len(self.W), dtype=z.dtype)
        for _ in range(50):
            image = self.f(z, self.W)
            slope = torch.ones_like(z) if self.affine else 1 - image**2
            jacobian = eye - slope[..., None] * self.W  # (B, n, n)
            step = torch.linalg.solve(jacobian, (image - z)[..., None])[..., 0]
            z = z + step
            if step.abs().max() < 1e-13 * z.abs().max():
                break
        else:
            raise AssertionError("the reference equilibrium was not reached")
        w = torch.linalg.solve(jacobian.mT, z[..., None])[..., 0]
        return z, (slope * w).T @ z


class Solved(NamedTuple):
    """What a contender found."""

    z: Tensor
    grad: Tensor


class Counter:
    """f, counting its calls; ``reached``: the call whose input first met the tolerance."""

    def __init__(self, f: Callable[[Tensor, Tensor], Tensor]) -> None:
        self.f, self.calls, self.reached = f, 0, None

    def __call__(self, z: Tensor, W: Tensor) -> Tensor:
        self.calls += 1
        image = self.f(z, W)
        with torch.no_grad():
            off = (image - z).norm(dim=1) / (1 + z.norm(dim=1))
        if self.reached is None and bool((off <= TOL).all()):
            self.reached = self.calls
        return image


def draw(measure: str, rho: float, *, affine: bool, n: int = 64, batch: int = 16) -> Equilibrium:
    """W Gaussian, of 2-norm ("norm") or of spectral radius ("radius") rho."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    W = normal(n, n)
    size = torch.linalg.matrix_norm(W, 2) if measure == "norm" else torch.linalg.eigvals(W).abs()
    U, x = normal(n, 8) / 8**0.5, normal(batch, 8)
    return Equilibrium(rho / size.max() * W, x @ U.T, affine)


CASES: dict[str, Callable[[], Equilibrium]] = {
    "easy: tanh, ‖W‖ = 0.5": partial(draw, "norm", 0.5, affine=False),
    "non-normal: affine, spectral radius 0.97": partial(draw, "radius", 0.97, affine=True),
}


def ours(problem: Equilibrium, f: Callable[..., Tensor], accelerator: Any) -> Solved:
    W = problem.W.clone().requires_grad_()
    z = implicitopt.fixed_point(
        lambda z, W: f(z, W), W, torch.zeros_like(problem.c), accelerator=accelerator,
        tol=TOL, max_steps=MAX_STEPS, adjoint_tol=TOL / 100,
    )  # fmt: skip
    (grad,) = torch.autograd.grad(0.5 * z.square().sum(), W)
    return Solved(z.detach(), grad)


def theirs(problem: Equilibrium, f: Callable[..., Tensor], solver: str) -> Solved:
    from torchdeq import get_deq

    deq = get_deq(
        core="sliced", ift=True, f_solver=solver, b_solver=solver, f_tol=TOL, b_tol=TOL / 100,
        f_max_iter=MAX_STEPS, b_max_iter=MAX_STEPS, f_stop_mode="rel", b_stop_mode="rel",
    )  # fmt: skip
    deq.train()
    W = problem.W.clone().requires_grad_()
    found, _ = deq(lambda z: f(z, W), torch.zeros_like(problem.c))
    z = found[-1]
    (grad,) = torch.autograd.grad(0.5 * z.square().sum(), W)
    return Solved(z.detach(), grad)


Contender = Callable[[Equilibrium, Callable[..., Tensor]], Solved]


def contenders(*, torchdeq: bool) -> dict[str, Contender]:
    """implicitopt's two accelerators and, where it is there, torchdeq with several settings."""
    found: dict[str, Contender] = {
        "implicitopt, Anderson II (default)": partial(ours, accelerator=None),
        "implicitopt, Broyden": partial(ours, accelerator=implicitopt.Broyden()),
    }
    if torchdeq:
        from torchdeq.solver import get_solver, register_solver

        anderson = get_solver("anderson")
        # The ridge is absolute there, and 1e-4 by default, which stops it short of 1e-6.
        for memory, ridge in ((6, 1e-4), (6, 0.0), (60, 0.0)):
            name = f"anderson, m {memory}, ridge {ridge:g}"
            register_solver(name, partial(anderson, m=memory, lam=ridge))
            found[f"torchdeq, Anderson, m {memory}, ridge {ridge:g}"] = partial(theirs, solver=name)
        found["torchdeq, Broyden"] = partial(theirs, solver="broyden")
    return found
